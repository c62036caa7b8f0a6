"""mmap(2) and its like."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from ..contents import Regular
from ..space import PAGE
from .registry import served, signed32

if TYPE_CHECKING:
    from ..processes import Thread
    from ..system import System

# uapi/asm-generic/mman-common.h, mman.h
MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_TYPE = 1, 2, 3, 0xF
MAP_FIXED, MAP_ANONYMOUS, MAP_GROWSDOWN, MAP_NORESERVE, MAP_FIXED_NOREPLACE = 0x10, 0x20, 0x100, 0x4000, 0x100000
_PROT = 7
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_DONTNEED, _FREE, _REMOVE = 4, 8, 9
_ADVICE = frozenset({0, 1, 2, 3, 4, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21})


@served("brk")
def brk(system: System, thread: Thread, address: int, *_: int) -> int:
    return thread.process.space.set_break(address)


@served("mmap")
def mmap(system: System, thread: Thread, address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    kind = flags & MAP_TYPE
    if offset % PAGE or kind not in (MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE) or length >> 47:
        raise OSError(errno.EINVAL if offset % PAGE or not length >> 47 else errno.ENOMEM, "")
    shared = kind != MAP_PRIVATE
    backing = None
    if not flags & MAP_ANONYMOUS:
        file = thread.process.files.get(signed32(fd))
        if not file.readable or (shared and prot & 2 and not file.writable):
            raise OSError(errno.EACCES, "")
        if not isinstance(file.inode, Regular):
            raise OSError(errno.ENODEV, "")
        backing = file.inode
    elif shared:
        return _map_shared(system, thread, address, length, prot, flags)
    return _map(thread, address, length, prot, flags, shared, backing, offset)


def _map(thread: Thread, address: int, length: int, prot: int, flags: int, shared: bool, backing: Regular | None,
         offset: int) -> int:
    return thread.process.space.map(
        address, length, prot & _PROT, fixed=bool(flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)),
        replace_there=not flags & MAP_FIXED_NOREPLACE, shared=shared, backing=backing, offset=offset // PAGE,
        grows=bool(flags & MAP_GROWSDOWN), reserve=not flags & MAP_NORESERVE)


def _map_shared(system: System, thread: Thread, address: int, length: int, prot: int, flags: int) -> int:
    """Memory that children share: a file without a name, as in Linux."""
    files = system.files
    file = files.open(files.root, b"/", os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        assert isinstance(file.inode, Regular)
        file.resize(-(-length // PAGE) * PAGE)
        return _map(thread, address, length, prot, flags, True, file.inode, 0)
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
    if advice not in _ADVICE or address % PAGE:
        raise OSError(errno.EINVAL, "")
    if advice in (_DONTNEED, _FREE):
        thread.process.space.advise_unneeded(address, length)
    return 0


@served("msync", "mlock", "munlock", "mlock2", "mlockall", "munlockall")
def nothing(system: System, thread: Thread, *_: int) -> int:
    """Memory is not paged out, and mapped files are memory."""
    return 0


@served("memfd_create")
def memfd_create(system: System, thread: Thread, name: int, flags: int, *_: int) -> int:
    text, files = thread.process.space.text(name, 250), system.files
    file = files.open(files.root, b"/", os.O_TMPFILE | os.O_RDWR, 0o777)
    file.inode.place = files.root, b"memfd:" + text
    return thread.process.files.add(file, close_on_exec=bool(flags & 1))
