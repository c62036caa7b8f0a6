"""Files that a user names to be read.

A file is regular, or it is refused: opening it never waits (a FIFO that nobody writes to) and touches no device.
No more is read than the caller can use, whatever the file says of itself. What is wrong is one line that names it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from ipc.messages import UNREADABLE

from .errors import VmmError, one_line

__all__ = ["Refusal", "decode_json", "input_name", "open_input", "read_input"]

_T = TypeVar("_T")

#: Makes the error of what is wrong with a file, for example ``"is not a regular file"``.
Refusal = Callable[[Path, str], VmmError]

_PIECE = 1 << 20    # bytes
_OWN = re.compile(r"/(?:dev|proc/self)/fd/([0-9]{1,9})")


def _refusal(path: Path, what: str) -> VmmError:
    return VmmError(f"{input_name(path)}: {what}")


def input_name(path: Path) -> str:
    """What errors call the file."""
    return "<stdin>" if str(path) == "-" else one_line(str(path))


def open_input(path: Path, refuse: Refusal = _refusal, *, pipes: bool = False) -> BinaryIO:
    """Open a regular file. ``pipes``: or what this process was given open, be it a pipe: ``-`` (standard input),
    ``/dev/stdin``, ``/dev/fd/N``. Raises what ``refuse`` makes."""
    try:
        own = _own_descriptor(path) if pipes else None
        if own is not None:
            return os.fdopen(os.dup(own), "rb")
        _check_regular(os.stat(path), path, refuse)     # before it is opened: that alone may do something
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _check_regular(os.fstat(fd), path, refuse)
            return os.fdopen(fd, "rb")
        except BaseException:
            os.close(fd)
            raise
    except OSError as exc:
        raise refuse(path, f"cannot be read: {exc.strerror}") from None
    except ValueError:      # a NUL in it, or a lone surrogate
        raise refuse(path, "cannot be read: not a valid file name") from None


def _check_regular(status: os.stat_result, path: Path, refuse: Refusal) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise refuse(path, "is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise refuse(path, "is not a regular file")


def _own_descriptor(path: Path) -> int | None:
    text = str(path)
    if text in ("-", "/dev/stdin"):
        return 0
    match = _OWN.fullmatch(text)
    return int(match[1]) if match else None


def read_input(path: Path, limit: int, refuse: Refusal = _refusal, *, pipes: bool = False) -> bytes:
    """All of a file of at most ``limit`` bytes. Raises what ``refuse`` makes."""
    with open_input(path, refuse, pipes=pipes) as file:
        try:
            data = bytearray()      # piece by piece: a read of ``limit`` bytes would take as much memory at once
            large = os.fstat(file.fileno()).st_size > limit
            while not large and (piece := file.read(_PIECE)):
                data += piece
                large = len(data) > limit
        except OSError as exc:
            raise refuse(path, f"cannot be read: {exc.strerror}") from None
    if large:
        raise refuse(path, f"is too large: more than {limit} bytes")
    return bytes(data)


def decode_json(data: bytes, kind: type[_T]) -> _T:
    """What is in the JSON text ``data``, which must be of this type. Raises ValueError, with one line."""
    try:
        return msgspec.json.decode(data, type=kind)
    except UNREADABLE as exc:
        raise ValueError(one_line(str(exc))) from None
