"""A name that one owner at a time has: a lock, and with it a directory and shared-memory segments.

    /dev/shm/<name>          the lock: byte 0 is the owner's for its life, byte 1 whoever's clears or takes over
    /dev/shm/<name>.<what>   the segments
    <directory>              sockets and files

What is removed is what a lock is held for, and nothing else. Whoever wants to own the name, or to clear what a dead
owner has left, takes byte 1 first, looks whether byte 0 is free, and only then removes. So two that want a name at
once, a clearing that runs beside a start, and processes of a dead owner that clear up late, never take anything
from a live one.

The lock lies where the memory lies, not in the directory: runtime directories are removed by others (at logout, by
cleaners of /tmp), and as long as its lock is held nobody takes a live owner's memory for left-over.

Locks are those of open file descriptions (fcntl(2), F_OFD_SETLK): they go with the last process that has the
descriptor, however it ends; and whether one is held can be asked without taking it, so that nobody who looks ever
stands in the way of one who wants it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .shm import SHM_DIRECTORY, list_segments, unlink_segment
from .steps import step

__all__ = ["Belongings", "Claim", "ClaimError", "Held"]

_OWNER, _CHANGE = 0, 1          # bytes of the lock file
_PATIENCE = 5.0                 # seconds for somebody else to be done with clearing
_FLOCK = struct.Struct("hhqqi4x")       # struct flock: type, whence, start, length, pid


class ClaimError(Exception):
    """A name cannot be had; the text is fit for a user."""


class Held(ClaimError):
    """Somebody owns it."""


@dataclass(frozen=True, slots=True)
class Belongings:
    """What goes with a name, which is like that of a segment, without a slash. No name is another and a dot and
    more."""

    name: str
    directory: Path

    @property
    def prefix(self) -> str:
        """Of the segments' names."""
        return f"{self.name}."

    @property
    def lock_path(self) -> Path:
        return SHM_DIRECTORY / self.name

    def held(self) -> bool:
        """Somebody owns it. Changes nothing."""
        try:
            fd = _open(self.lock_path, os.O_RDONLY)
        except OSError:
            return False
        try:
            return _locked(fd, _OWNER)
        finally:
            os.close(fd)

    def owner_pid(self) -> int | None:
        """As the owner has written it down; None when nobody owns it."""
        try:
            with open(_open(self.lock_path, os.O_RDONLY), "rb") as file:
                return int(file.read(32)) if _locked(file.fileno(), _OWNER) else None
        except (OSError, ValueError):
            return None

    def claim(self) -> Claim:
        """Own it from now on; what an earlier owner has left is cleared. Raises Held and ClaimError."""
        with _changing(self) as fd:
            if not _lock(fd, _OWNER):
                raise Held(f"{self.name} is owned by another process")
            os.ftruncate(fd, 0)     # a dead owner's pid, which may be another process's by now
            step("claim-locked")
            _remove(self)
            step("claim-cleared")
            try:
                os.pwrite(fd, b"%d" % os.getpid(), 0)
            except OSError as exc:
                raise ClaimError(f"{self.lock_path} cannot be written: {exc.strerror}") from None
            return Claim(self, os.dup(fd))

    def clear(self) -> list[str] | None:
        """Remove what a dead owner has left; what was removed. None: somebody owns it, and nothing was done. Raises
        ClaimError."""
        lock = [f"/{self.name}"] if os.path.lexists(self.lock_path) else []
        with _changing(self) as fd:
            return None if _locked(fd, _OWNER) else _end(self) + lock

    def left(self) -> list[str]:
        """What there is of it: segments, lock, directory."""
        found = list_segments(self.prefix)
        found += [f"/{self.name}"] if os.path.lexists(self.lock_path) else []
        return found + ([str(self.directory)] if os.path.lexists(self.directory) else [])


class Claim:
    """Ownership, as long as this process, or one that has inherited ``fd``, lives."""

    def __init__(self, belongings: Belongings, fd: int) -> None:
        self.belongings = belongings
        self.fd = fd

    def release(self) -> list[str]:
        """Remove all that goes with the name, and let it go; what was removed. Idempotent. Raises ClaimError when
        that has to be left to somebody else."""
        if self.fd < 0:
            return []
        fd, self.fd = self.fd, -1
        try:
            _await_change(fd, self.belongings, time.monotonic() + _PATIENCE)
            if _same(fd, self.belongings.lock_path):
                return _end(self.belongings)
        finally:
            os.close(fd)
        # The lock was removed by somebody who does not know of it. The name may be another's by now, and nothing of
        # it ours; if it is nobody's, what is there is ours.
        return self.belongings.clear() or []


def _end(belongings: Belongings) -> list[str]:
    """With byte 1 locked, and nobody else on byte 0. The lock goes last: whatever kills this process before that,
    the rest is found."""
    step("clear-locked")
    removed = _remove(belongings)
    step("clear-all")
    belongings.lock_path.unlink(missing_ok=True)
    return removed


def _remove(belongings: Belongings) -> list[str]:
    removed = []
    directory = belongings.directory
    if stat.S_ISDIR(_mode(directory)):
        with contextlib.suppress(OSError):
            shutil.rmtree(directory)
            removed.append(str(directory))
    step("clear-directory")
    return [name for name in list_segments(belongings.prefix) if unlink_segment(name)] + removed


def _mode(path: Path) -> int:
    """Of the path itself, not of what a link leads to; 0 when there is nothing."""
    try:
        return os.lstat(path).st_mode
    except OSError:
        return 0


@contextlib.contextmanager
def _changing(belongings: Belongings) -> Iterator[int]:
    """The lock file, with byte 1 locked: it is the one that has the name now, and stays it. Raises ClaimError."""
    path = belongings.lock_path
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fd = _open(path, os.O_RDWR | os.O_CREAT)
        except OSError as exc:
            raise ClaimError(f"{path} cannot be locked: {exc.strerror}") from None
        try:
            _await_change(fd, belongings, deadline)
            # Who removes the file holds this lock: if it is the one that has the name, it remains so.
            if _same(fd, path):
                try:
                    yield fd
                finally:
                    _unlock(fd, _CHANGE)    # a claim has its own descriptor of the same open file
                return
        finally:
            os.close(fd)


def _await_change(fd: int, belongings: Belongings, deadline: float) -> None:
    """Lock byte 1. It is held for as long as a directory takes to be removed. Raises ClaimError."""
    while not _lock(fd, _CHANGE):
        if time.monotonic() > deadline:
            raise ClaimError(f"{belongings.lock_path} has been locked by another process for {_PATIENCE:.0f} s")
        time.sleep(0.002)


def _open(path: Path, flags: int) -> int:
    """/dev/shm is everybody's: a file there that is somebody else's, or no regular one, is none of ours. Raises
    OSError."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise PermissionError(1, "it belongs to another user")
    return fd


def _same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except OSError:
        return False


def _lock(fd: int, byte: int) -> bool:
    """False: somebody has it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _unlock(fd: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))


def _locked(fd: int, byte: int) -> bool:
    """Whether somebody else has it."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
