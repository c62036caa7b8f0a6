"""Another process: its mappings, threads and memory, as proc(5) and process_vm_readv(2) show them."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .libc import LIBC, SYS_PROCESS_MADVISE, check

__all__ = ["Mapping", "call_of", "children", "collapse", "has_memory", "mappings", "read_memory", "read_pages",
           "status", "threads", "write_memory"]

_VECTORS = 1024         # UIO_MAXIOV
_MADV_COLLAPSE = 25


class Mapping(NamedTuple):
    """A line of /proc/PID/maps."""

    start: int
    end: int
    mode: str           # "rwxp", "s" for shared
    inode: int          # 0: of no file
    name: str           # path, "[heap]", or ""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start

    @property
    def private(self) -> bool:
        return self.mode[3] == "p"

    @property
    def anonymous(self) -> bool:
        return self.inode == 0


def mappings(pid: int) -> list[Mapping]:
    """In the order of their addresses; none where the process has ended. Raises OSError (EACCES: it may not be
    looked into; ENOENT)."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_bytes().decode(errors="replace").splitlines():
        where, mode, _, _, inode, *name = line.split(None, 5)
        start, _, end = where.partition("-")
        found.append(Mapping(int(start, 16), int(end, 16), mode, int(inode), name[0] if name else ""))
    return found


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    """proc_pid_status(5) of a process, or of a thread of it. Raises OSError (ENOENT, ESRCH) when there is none."""
    path = Path(f"/proc/{pid}/status" if tid is None else f"/proc/{pid}/task/{tid}/status")
    pairs = (line.partition(":\t") for line in path.read_text(errors="replace").splitlines())
    return {key: value.strip() for key, _, value in pairs}


def has_memory(pid: int) -> bool:
    """False: the process has ended, or is about to. (A kernel's thread has none at any time.)"""
    try:
        return "VmSize" in status(pid)
    except OSError:
        return False


def threads(pid: int) -> list[int]:
    """Their ids. Raises OSError (ENOENT, ESRCH) when the process has ended."""
    return sorted(int(each) for each in os.listdir(f"/proc/{pid}/task"))


def call_of(pid: int, tid: int) -> int | None:
    """The number of the system call that a thread waits in; None where it runs, or cannot be told. Raises OSError
    when it has ended, or may not be looked into."""
    first = Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()[0]
    return int(first) if first.lstrip("-").isdigit() and int(first) >= 0 else None


def children(pid: int) -> set[int]:
    """Processes that it has started and that are there. None where the kernel does not tell (CONFIG_PROC_CHILDREN), or
    the process has ended."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for tid in threads(pid):
            found.update(map(int, Path(f"/proc/{pid}/task/{tid}/children").read_text().split()))
    return found


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("length", ctypes.c_size_t)]


def _transfer(function: object, pid: int, local: int, remote: Sequence[int], size: int) -> int:
    """Bytes that were moved."""
    here = _Vector(local, size * len(remote))
    there = (_Vector * len(remote))(*(_Vector(address, size) for address in remote))
    return check(function(pid, ctypes.byref(here), 1, there, len(remote), 0))  # type: ignore[operator]


def read_memory(pid: int, address: int, size: int) -> bytes:
    """Raises OSError (EFAULT: not all of it is there)."""
    room = ctypes.create_string_buffer(size)
    if _transfer(LIBC.process_vm_readv, pid, ctypes.addressof(room), [address], size) != size:
        raise OSError(14, os.strerror(14))
    return room.raw


def write_memory(pid: int, address: int, data: bytes) -> None:
    """Where the process itself could write. Raises OSError (EFAULT: it could not write all of it)."""
    room = ctypes.create_string_buffer(data, len(data))
    if _transfer(LIBC.process_vm_writev, pid, ctypes.addressof(room), [address], len(data)) != len(data):
        raise OSError(14, os.strerror(14))


def read_pages(pid: int, addresses: Sequence[int], size: int) -> Iterator[tuple[int, memoryview | None]]:
    """(address, its ``size`` bytes) of each, in order; None for one that cannot be read. The bytes are valid until
    the next is asked for. Raises OSError when the process has gone."""
    room = ctypes.create_string_buffer(size * min(len(addresses), _VECTORS)) if addresses else None
    at = 0
    while at < len(addresses):
        assert room is not None
        part = addresses[at:at + _VECTORS]
        try:
            done = _transfer(LIBC.process_vm_readv, pid, ctypes.addressof(room), part, size) // size
        except OSError as exc:
            if exc.errno != 14:
                raise
            done = 0
        view = memoryview(room).cast("B")
        for index in range(done):
            yield part[index], view[index * size:(index + 1) * size]
        at += done
        if done < len(part):        # the next one is what it stopped at
            yield addresses[at], None
            at += 1


def collapse(pidfd: int, address: int, size: int) -> None:
    """Have the kernel make huge pages of this memory of a process (process_madvise(2), MADV_COLLAPSE, Linux 6.1).
    Raises OSError (EINVAL: none can be made there)."""
    vector = _Vector(address, size)
    check(LIBC.syscall(SYS_PROCESS_MADVISE, pidfd, ctypes.byref(vector), ctypes.c_size_t(1), _MADV_COLLAPSE,
                       ctypes.c_uint(0)))
