"""mmap(2) and its like."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from ..contents import Regular
from ..inodes import Node
from ..space import COPIED, LEFT, PAGE, WIPED
from .registry import served, signed32

if TYPE_CHECKING:
    from ..processes import Thread
    from ..system import System

# uapi/asm-generic/mman-common.h, mman.h
MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_TYPE = 1, 2, 3, 0xF
MAP_FIXED, MAP_ANONYMOUS, MAP_GROWSDOWN, MAP_NORESERVE, MAP_FIXED_NOREPLACE = 0x10, 0x20, 0x100, 0x4000, 0x100000
_PROT = 7
#: LEGACY_MAP_MASK: what MAP_SHARED_VALIDATE knows.
_KNOWN = 0x7C07_F9F3
_ASYNC, _INVALIDATE, _SYNC = 1, 2, 4            # MS_*
_ON_FAULT = 1                                   # MLOCK_ONFAULT
_LOCK_FLAGS, _LOCK_ON_FAULT = 7, 4              # MCL_*
#: MFD_CLOEXEC, MFD_ALLOW_SEALING, MFD_HUGETLB (with a size), MFD_NOEXEC_SEAL, MFD_EXEC.
_MEMFD_FLAGS, _MEMFD_HUGE, _MEMFD_SIZES = 0x1F, 4, 0x3F << 26
_MEMFD_NAME = 250
_ADDRESSES = 0x7FFF_FFFF_F000
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_DONTNEED, _FREE, _REMOVE = 4, 8, 9             # MADV_*
_AT_FORK = {10: LEFT, 11: COPIED, 18: WIPED, 19: COPIED}
_ADVICE = frozenset({0, 1, 2, 3, 4, 8, 9, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21})


@served("brk")
def brk(system: System, thread: Thread, address: int, *_: int) -> int:
    return thread.process.space.set_break(address)


@served("mmap")
def mmap(system: System, thread: Thread, address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    if offset % PAGE:
        raise OSError(errno.EINVAL, "")
    file = None if flags & MAP_ANONYMOUS else thread.process.files.get(signed32(fd))
    kind = flags & MAP_TYPE
    if length >> 47:
        raise OSError(errno.ENOMEM, "")
    if not length or kind not in (MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE):
        raise OSError(errno.EINVAL, "")
    if kind == MAP_SHARED_VALIDATE:
        if file is None:
            raise OSError(errno.EINVAL, "")
        if flags & 0xFFFF_FFFF & ~_KNOWN:
            raise OSError(errno.EOPNOTSUPP, "")
    shared = kind != MAP_PRIVATE
    if file is not None:
        if not file.readable or (shared and prot & 2 and not file.writable):
            raise OSError(errno.EACCES, "")
        if isinstance(file.inode, Regular):
            return _map(thread, address, length, prot, flags, shared, file.inode, offset,
                        read_only=shared and not file.writable)
        if not isinstance(file.inode, Node) or file.inode.rdev != Node.ZERO:
            raise OSError(errno.ENODEV, "")
    if shared:
        return _map_shared(system, thread, address, length, prot, flags, read_only=bool(file and not file.writable))
    return _map(thread, address, length, prot, flags, False, None, 0)


def _map(thread: Thread, address: int, length: int, prot: int, flags: int, shared: bool, backing: Regular | None,
         offset: int, *, read_only: bool = False) -> int:
    return thread.process.space.map(
        address, length, prot & _PROT, fixed=bool(flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)),
        replace_there=not flags & MAP_FIXED_NOREPLACE, shared=shared, backing=backing, offset=offset // PAGE,
        grows=bool(flags & MAP_GROWSDOWN), reserve=not flags & MAP_NORESERVE, read_only=read_only)


def _map_shared(system: System, thread: Thread, address: int, length: int, prot: int, flags: int, *,
                read_only: bool) -> int:
    """Memory that children share: a file without a name, as in Linux."""
    files = system.files
    file = files.open(files.root, b"/", os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        assert isinstance(file.inode, Regular)
        file.resize(-(-length // PAGE) * PAGE)
        return _map(thread, address, length, prot, flags, True, file.inode, 0, read_only=read_only)
    finally:
        file.let_go()


@served("munmap")
def munmap(system: System, thread: Thread, address: int, length: int, *_: int) -> int:
    thread.process.space.unmap(address, length)
    return 0


@served("mprotect")
def mprotect(system: System, thread: Thread, address: int, length: int, prot: int, *_: int) -> int:
    thread.process.space.protect(address, length, prot & _PROT)
    return 0


@served("mremap")
def mremap(system: System, thread: Thread, address: int, old: int, new: int, flags: int, to: int, *_: int) -> int:
    if flags & ~(_MREMAP_MAYMOVE | _MREMAP_FIXED) or (flags & _MREMAP_FIXED and not flags & _MREMAP_MAYMOVE):
        raise OSError(errno.EINVAL, "")
    return thread.process.space.remap(address, old, new, may_move=bool(flags & _MREMAP_MAYMOVE),
                                      to=to if flags & _MREMAP_FIXED else None)


@served("madvise")
def madvise(system: System, thread: Thread, address: int, length: int, advice: int, *_: int) -> int:
    """What is only a hint is taken as one. MADV_FREE is MADV_DONTNEED at once."""
    advice, space = signed32(advice), thread.process.space
    if advice not in _ADVICE or address % PAGE:
        raise OSError(errno.EINVAL, "")
    if not length:
        return 0
    if advice == _DONTNEED:
        space.advise_unneeded(address, length)
    elif advice == _FREE:
        space.advise_free(address, length)
    elif advice == _REMOVE:
        _remove(thread, address, length)
    elif advice in _AT_FORK:
        space.advise_fork(address, length, _AT_FORK[advice])
    else:
        space.check_mapped(address, length)
    return 0


def _remove(thread: Thread, address: int, length: int) -> None:
    """What shared mappings show of files is zero, and has no memory any more. Raises OSError."""
    space = thread.process.space
    for each in space.parts(address, length):
        file = each.backing
        if not isinstance(file, Regular):
            raise OSError(errno.EINVAL, "")
        if not each.shared or each.read_only:
            raise OSError(errno.EACCES, "")
        file.punch(each.offset * PAGE, (each.offset + each.end - each.start) * PAGE)
    space.check_mapped(address, length)


@served("msync")
def msync(system: System, thread: Thread, address: int, length: int, flags: int, *_: int) -> int:
    """Mapped files are memory."""
    if flags & ~(_ASYNC | _INVALIDATE | _SYNC) or flags & (_ASYNC | _SYNC) == _ASYNC | _SYNC or address % PAGE:
        raise OSError(errno.EINVAL, "")
    _check_mapped(thread, address, length)
    return 0


@served("mlock", "munlock")
def mlock(system: System, thread: Thread, address: int, length: int, *_: int) -> int:
    """Memory is not paged out."""
    _check_mapped(thread, address // PAGE * PAGE, length + address % PAGE)
    return 0


@served("mlock2")
def mlock2(system: System, thread: Thread, address: int, length: int, flags: int, *_: int) -> int:
    if flags & ~_ON_FAULT:
        raise OSError(errno.EINVAL, "")
    return mlock(system, thread, address, length)


@served("mlockall")
def mlockall(system: System, thread: Thread, flags: int, *_: int) -> int:
    if flags & ~_LOCK_FLAGS or flags & _LOCK_FLAGS in (0, _LOCK_ON_FAULT):
        raise OSError(errno.EINVAL, "")
    return 0


@served("munlockall")
def munlockall(system: System, thread: Thread, *_: int) -> int:
    return 0


def _check_mapped(thread: Thread, address: int, length: int) -> None:
    """All of it is. Raises OSError."""
    if address + length > _ADDRESSES:
        raise OSError(errno.ENOMEM if length >> 63 == 0 else errno.EINVAL, "")
    if length:
        thread.process.space.check_mapped(address, length)


@served("memfd_create")
def memfd_create(system: System, thread: Thread, name: int, flags: int, *_: int) -> int:
    if flags & 0xFFFF_FFFF & ~(_MEMFD_FLAGS | (_MEMFD_SIZES if flags & _MEMFD_HUGE else 0)):
        raise OSError(errno.EINVAL, "")
    try:
        text = thread.process.space.text(name, _MEMFD_NAME)
    except OSError:
        raise OSError(errno.EINVAL, "") from None
    files = system.files
    file = files.open(files.root, b"/", os.O_TMPFILE | os.O_RDWR, 0o777)
    file.inode.place = files.root, b"memfd:" + text
    return thread.process.files.add(file, close_on_exec=bool(flags & 1))
