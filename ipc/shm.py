"""POSIX shared-memory segments: made, opened, reserved and unlinked in one place.

Segments are mode 0600. A created segment is *reserved* with posix_fallocate: a full /dev/shm is then an error here
(ENOSPC) and never a SIGBUS in a guest store. What they are called is ipc/claims.py's and vmm/machine/names.py's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import posix_ipc

from .linux.memory import available_memory, cgroup_left
from .steps import step

__all__ = ["PAGE_SIZE", "SHM_DIRECTORY", "Room", "Segment", "SegmentError", "data_extents", "free_bytes",
           "is_named", "is_same", "list_segments", "open_fd", "reserve", "room", "unlink_segment"]

PAGE_SIZE = 4096
SHM_DIRECTORY = Path("/dev/shm")


class SegmentError(Exception):
    """A segment could not be made or opened; the text is fit for a user."""


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of shared memory that can still be had, and what sets that limit."""

    free: int
    limit: str
    remedy: str
    of_cgroup: bool = False     # then what processes have to themselves counts as well

    def shortage(self, what: str, needed: int) -> str:
        """One line: ``what`` needs so many bytes, and they are not there."""
        return (f"{self.limit} is too small: {what} needs {needed >> 10} KiB, but only {self.free >> 10} KiB are "
                f"free ({self.remedy})")


def room() -> Room:
    """What the size of /dev/shm leaves, the host has, and the memory cgroup of this process allows, whichever is
    least. (The size of /dev/shm may be all of the host's memory; reserving that much, or more than a cgroup may
    have, would have the kernel kill somebody.)"""
    st = os.statvfs(SHM_DIRECTORY)
    found = Room(min(st.f_bavail * st.f_frsize, available_memory()), "/dev/shm",
                 "mount -o remount,size=… /dev/shm, or use less memory")
    group = cgroup_left()
    if group is not None and group[0] < found.free:
        return Room(group[0], f"the memory cgroup {group[1]}", "raise its limit, or use less memory",
                    of_cgroup=True)
    return found


def free_bytes() -> int:
    """Bytes of shared memory that can still be had."""
    return room().free


def list_segments(prefix: str) -> list[str]:
    """Names (with the leading slash) of the existing segments that start with ``prefix``."""
    if not SHM_DIRECTORY.is_dir():
        return []
    return sorted(f"/{p.name}" for p in SHM_DIRECTORY.iterdir() if p.name.startswith(prefix))


def _path(name: str) -> Path:
    return SHM_DIRECTORY / name.removeprefix("/")


def is_named(name: str) -> bool:
    """There is a segment of that name."""
    return _path(name).exists()


def is_same(name: str, other: str) -> bool:
    """Both are names of one segment."""
    try:
        return _path(name).samefile(_path(other))
    except OSError:
        return False


def unlink_segment(name: str) -> bool:
    """Remove the name; True if it was there. Mappings live on until they are closed."""
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        return False
    return True


def open_fd(name: str) -> int:
    """A file descriptor of an existing segment: written through it, memory costs no page fault. Raises
    SegmentError."""
    try:
        return int(posix_ipc.SharedMemory(name).fd)
    except (posix_ipc.Error, OSError) as exc:
        raise SegmentError(f"cannot open shared-memory segment {name}: {exc}") from None


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(first byte, end) of the parts of a segment that were ever touched, in whole pages; all else is zero. What
    was reserved and not touched is no data to the kernel."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:    # none behind ``at``
                return
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start // PAGE_SIZE * PAGE_SIZE, min(-(-at // PAGE_SIZE) * PAGE_SIZE, size)


def reserve(fd: int, start: int, size: int) -> None:
    """What of [start, start + size) of a segment has no memory yet gets some. Raises OSError (ENOSPC: /dev/shm is
    full)."""
    os.posix_fallocate(fd, start, size)


class Segment:
    """One mapped shared-memory segment.

    ``Segment.create`` makes and owns the name (closing unlinks it); ``Segment.open`` maps an
    existing one. ``buf`` is the mmap; ``address`` its first byte in this process.
    """

    def __init__(self, name: str, fd: int, size: int, *, owner: bool) -> None:
        self.name = name
        self.size = size
        self._owner = owner
        self._closed = False
        try:
            self.buf = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self.buf.madvise(mmap.MADV_DONTDUMP)    # a core dump is no place for a guest's memory
        finally:
            os.close(fd)
        anchor = ctypes.c_char.from_buffer(self.buf)
        self.address = ctypes.addressof(anchor)
        del anchor  # an exported buffer would keep the mmap from closing

    @classmethod
    def create(cls, name: str, size: int, *, reserve: bool = True) -> Segment:
        """Make a zero-filled segment of ``size`` bytes (rounded up to whole pages).

        ``reserve=False`` leaves it sparse (for memory known to be far larger than the host's, or that is filled
        before a guest has it).
        Raises SegmentError when the name exists or /dev/shm has no room.
        """
        begun = _begun.get(name)
        if begun is None or begun.is_given:
            return cls._make(name, size, reserve=reserve)
        return begun.made()

    @classmethod
    def begin(cls, name: str, size: int, *, reserve: bool = True, link: str = "") -> None:
        """Make it meanwhile, in a thread: most of the time is the kernel's. ``create`` gives it once it has its size,
        or fails as that has failed; before ``settle`` there may be no room for what is touched. ``link``: it is the
        same memory as that segment, under a name of its own."""
        _begun[name] = _Begun(name, size, reserve, link)

    @staticmethod
    def settle() -> None:
        """What was begun is made and reserved, or has failed: there is no thread of it any more. Raises SegmentError
        for one that ``create`` has given and that could not be reserved."""
        for each in _begun.values():
            each.join()
        for given in [_begun.pop(each.name) for each in list(_begun.values()) if each.is_given]:
            given.check()

    @classmethod
    def _make(cls, name: str, size: int, *, reserve: bool, sized: Callable[[Segment], None] | None = None) -> Segment:
        """``sized`` is given it before it is reserved, and has it from then on, even if that fails."""
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        if reserve and size > free_bytes():     # without filling the host's memory up to find out
            raise SegmentError(room().shortage(f"segment {name}", size))
        try:
            shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
        except posix_ipc.ExistentialError:
            raise SegmentError(f"shared-memory segment {name} already exists (vmm gc removes "
                               "leftovers)") from None
        except (posix_ipc.Error, OSError) as exc:
            raise SegmentError(f"cannot create shared-memory segment {name}: {exc}") from None
        made: Segment | None = None
        try:
            step("segment-empty")
            os.ftruncate(shm.fd, size)
            step("segment-sized")
            made = cls(name, os.dup(shm.fd), size, owner=True)
            if sized is not None:
                sized(made)
            if reserve:
                os.posix_fallocate(shm.fd, 0, size)
            return made
        except OSError as exc:
            if made is None:
                unlink_segment(name)
            elif sized is None:
                made.close()
            if exc.errno in (errno.ENOSPC, errno.ENOMEM):
                raise SegmentError(room().shortage(f"segment {name}", size)) from None
            raise SegmentError(f"cannot set the size of shared-memory segment {name}: {exc}") from None
        finally:
            os.close(shm.fd)

    @classmethod
    def _link(cls, name: str, size: int, other: str) -> Segment:
        """Raises SegmentError."""
        fd = open_fd(other)
        try:
            if os.fstat(fd).st_size != size:
                raise SegmentError(f"shared-memory segment {other} has {os.fstat(fd).st_size} bytes, expected {size}")
            os.link(_path(other), _path(name))
            return cls(name, os.dup(fd), size, owner=True)
        except OSError as exc:
            raise SegmentError(f"shared-memory segment {other} cannot be given another name: {exc.strerror}") from None
        finally:
            os.close(fd)

    @classmethod
    def open(cls, name: str) -> Segment:
        """Map an existing segment whole. Raises SegmentError when it is not there, or has no size yet (its maker
        was killed)."""
        fd = open_fd(name)
        size = os.fstat(fd).st_size
        if not size:
            os.close(fd)
            raise SegmentError(f"cannot open shared-memory segment {name}: it is empty")
        return cls(name, fd, size, owner=False)

    @classmethod
    def adopt(cls, name: str, size: int, *, reserve: bool = True) -> tuple[Segment, bool]:
        """The segment of that name, which a process that died has left; a new one, zero-filled, where there is none
        or it is not whole (whoever made it was killed in between: it has another size, or is not reserved). Owned
        either way. The second value: it is new. Not for memory that has holes. Raises SegmentError."""
        wanted = -(-size // PAGE_SIZE) * PAGE_SIZE
        with contextlib.suppress(SegmentError):
            fd = open_fd(name)
            status = os.fstat(fd)
            if status.st_size == wanted and (status.st_blocks * 512 >= wanted or not reserve):
                return cls(name, fd, wanted, owner=True), False
            os.close(fd)
        unlink_segment(name)
        return cls.create(name, size, reserve=reserve), True

    def unlink(self) -> None:
        unlink_segment(self.name)
        self._owner = False

    def own(self) -> None:
        """Closing unlinks the name from now on (its maker has died)."""
        self._owner = True

    def close(self) -> None:
        """Unlink the name if owned, then unmap. A buffer still exported (a numpy view a caller
        holds) keeps the pages mapped until it is garbage; the name is gone all the same."""
        if self._closed:
            return
        self._closed = True
        if self._owner:
            unlink_segment(self.name)
        try:
            self.buf.close()
        except BufferError:
            pass  # a live numpy view: unmapped with its last reference

    def __enter__(self) -> Segment:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self.close()


class _Begun(threading.Thread):
    """The making of a segment."""

    def __init__(self, name: str, size: int, reserve: bool, link: str) -> None:
        super().__init__(name=name, daemon=True)
        self._wanted = name, size
        self._reserve, self._link = reserve, link
        self._segment: Segment | None = None
        self._error: Exception | None = None
        self._sized = threading.Event()     # or failed
        #: Somebody has it.
        self.is_given = False
        self.start()

    def run(self) -> None:
        try:
            if self._link:
                self._segment = Segment._link(*self._wanted, self._link)
            else:
                Segment._make(*self._wanted, reserve=self._reserve, sized=self._has_size)
        except Exception as exc:    # of whoever asks for it
            self._error = exc
        self._sized.set()

    def _has_size(self, segment: Segment) -> None:
        self._segment = segment
        self._sized.set()

    def made(self) -> Segment:
        """It may not be reserved yet. Raises what its making has raised until now."""
        self._sized.wait()
        error, segment = self._error, self._segment
        if error is not None:
            if segment is not None:
                segment.close()
            raise error
        assert segment is not None
        self.is_given, self._segment = True, None
        return segment

    def check(self) -> None:
        """Once it has ended. Raises what has happened since it was ``made``."""
        if self._error is not None:
            raise self._error


#: Of `Segment.begin`, by name.
_begun: dict[str, _Begun] = {}
