"""Files that a command writes for its user: tried before the work begins, and never half there.

``open_output`` writes beside the name and renames when all of it is written, so that whoever looks sees the file as
it was or as it is to be. What is at the name and is not a regular file is never replaced: a device, a FIFO or a
standard stream is written to as it is, and anything else (a directory, a socket, a block device) is refused.

Directly means at once: what was written there before an error stays written.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
from pathlib import Path
from types import TracebackType

from .errors import VmmError

__all__ = ["Output", "OutputError", "is_stdout", "open_append", "open_output"]

_STREAM = re.compile(r"/dev/(?:(stdin|stdout|stderr)|fd/(\d{1,6}))|/proc/self/fd/(\d{1,6})")
_STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}
_ASIDE_STEM = 200       # characters of the name that the file beside it keeps: a name has at most 255 bytes


class OutputError(VmmError):
    """A file that cannot be written; the text names it and says why."""


def _error(path: Path, exc: OSError | ValueError) -> OutputError:
    if isinstance(exc, OSError) and exc.errno == errno.ENXIO:
        return OutputError(f"{path}: cannot be written: no process is reading from it")
    return OutputError(f"{path}: cannot be written: {getattr(exc, 'strerror', None) or exc}")


class _Raw(io.FileIO):
    """A descriptor whose errors name the file that the user gave."""

    def __init__(self, fd: int, path: Path) -> None:
        super().__init__(fd, "wb")
        self._path = path

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as exc:
            raise _error(self._path, exc) from None


class Output:
    """One file while it is written. ``with`` commits it at its end, or discards it when it is left by an exception.

    ``file`` is a binary writer; it raises OutputError. It can be sought in unless it is a stream.
    """

    def __init__(self, path: Path, fd: int, aside: Path | None, target: Path) -> None:
        self.path = path
        self.file = io.BufferedWriter(_Raw(fd, path))
        self._aside = aside         # None: written to directly
        self._target = target

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Raises OutputError."""
        self.file.write(data)

    def commit(self) -> None:
        """All is written: the file has its name, and is on the disk. Idempotent. Raises OutputError."""
        if self.file.closed:
            return
        try:
            self.file.flush()
            if self._aside is not None:
                os.fsync(self.file.fileno())
                os.replace(self._aside, self._target)
                self._aside = None
            self.file.close()
        except OSError as exc:
            raise _error(self.path, exc) from None

    def close(self) -> None:
        """Without ``commit``: nothing is left of it, and what was there before is as it was. Idempotent."""
        if not self.file.closed:
            with contextlib.suppress(OSError, OutputError):     # not wanted any more
                self.file.close()
            self.file.raw.close()
        if self._aside is not None:
            self._aside.unlink(missing_ok=True)
            self._aside = None

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.close()


def open_output(path: str | os.PathLike[str]) -> Output:
    """Begin to write ``path``. What is there stays as it is until ``commit``. Raises OutputError, now rather than
    after the work, when it cannot be written."""
    path = Path(path)
    try:
        stream = _stream(path)
        if stream is not None:
            return Output(path, os.dup(stream), None, path)
        try:
            found: os.stat_result | None = os.stat(path)
        except FileNotFoundError:       # or a link to what is not there: then that is made
            found = None
        if found is not None and not stat.S_ISREG(found.st_mode):
            return Output(path, _open_special(path, found, os.O_WRONLY), None, path)
        target = Path(os.path.realpath(path))
        if found is not None and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        aside = target.with_name(f".{target.name[:_ASIDE_STEM]}.{os.urandom(4).hex()}")
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if found is not None:
            os.fchmod(fd, stat.S_IMODE(found.st_mode))
        return Output(path, fd, aside, target)
    except (OSError, ValueError) as exc:        # ValueError: a NUL in the name
        raise _error(path, exc) from None


def open_append(path: str | os.PathLike[str]) -> int:
    """A descriptor that adds to the end of ``path``, which is made if it is not there. Raises OutputError."""
    path = Path(path)
    flags = os.O_WRONLY | os.O_APPEND
    try:
        stream = _stream(path)
        if stream is not None:
            return os.dup(stream)
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not stat.S_ISREG(found.st_mode):
            return _open_special(path, found, flags)
        return os.open(path, flags | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        raise _error(path, exc) from None


def is_stdout(path: str | os.PathLike[str]) -> bool:
    """It is a name of this process's standard output."""
    return _stream(Path(path)) == 1


def _stream(path: Path) -> int | None:
    """The descriptor of this process that the path stands for. It may be a regular file that a shell has opened for
    several writers: so it is written to as it is, whatever it is."""
    match = _STREAM.fullmatch(str(path))
    if match is None:
        return None
    return _STREAMS[match[1]] if match[1] else int(match[2] or match[3])


def _open_special(path: Path, found: os.stat_result, flags: int) -> int:
    """Of a FIFO or a character device. Raises OSError, and OutputError for what cannot be written to."""
    if stat.S_ISDIR(found.st_mode):
        raise OutputError(f"{path}: is a directory")
    if not (stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode)):
        raise OutputError(f"{path}: is not a regular file")
    # Opening a FIFO waits for its reader, who may never come: without one it is an error.
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    os.set_blocking(fd, True)
    return fd
