"""Compiled code on disk: found under a key, written and read only where nobody but this user and root can write.

The key is of what the code was made from: its sources, the LLVM binding and the processor. Neither Numba nor LLVM is
imported here, so that asking whether code is kept costs next to nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import tempfile
from pathlib import Path

import llvmlite
import msgspec

from ..messages import UNREADABLE

__all__ = ["LOOPS", "Function", "Kept", "cache_directories", "find", "is_kept", "keep", "key_of", "trusted"]

#: The hot loops (calls.py), and what goes into them.
LOOPS = ("ipc.compiled.loops", "ipc.compiled.atomics", "ipc.compiled.streaming", "ipc.bitmap", "ipc.layout")


class Function(msgspec.Struct):
    """One that can be linked and called."""

    name: str
    symbol: str
    result: str             # names of Numba's types
    arguments: list[str]
    needs: list[str]        # symbols that it does not have itself
    code: bytes             # an object file


class Kept(msgspec.Struct):
    """What a file holds."""

    key: str
    functions: list[Function]


def is_kept(source: str, *sources: str) -> bool:
    """The code of ``source``, into which the text of ``sources`` went, is there."""
    return find(source, key_of(source, *sources)) is not None


def key_of(*modules: str) -> str:
    found = hashlib.sha256(f"{llvmlite.__version__} {_processor()}".encode())
    for module in (*modules, __name__, f"{__package__}.loader"):
        found.update(_path(module).read_bytes())
    return found.hexdigest()


def _processor() -> str:
    """What of the first one's description does not change while it runs: model, and what it can do."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return ""
    return "\n".join(line for line in first.splitlines() if not line.startswith(("cpu MHz", "bogomips", "processor")))


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def cache_directories(source: str) -> list[Path]:
    """Where code may be kept, the best first: beside the source, as Python keeps its own, or the user's cache."""
    beside = _path(source).parent / "__pycache__"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [beside, Path(home) / "shardvmm"] if os.path.isabs(home) else [beside]      # not everybody has a home


def trusted(directory: Path) -> bool:
    """Whether code that lies there may be run: nobody but this user and root can have put it there. Raises OSError
    where there is no such directory."""
    return _is_ours(os.stat(directory))


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def find(source: str, key: str) -> Kept | None:
    for directory in cache_directories(source):
        try:
            kept = msgspec.msgpack.decode(_read(directory, f"{source}.native"), type=Kept)
        except (OSError, *UNREADABLE):
            continue
        if kept.key == key:
            return kept
    return None


def _read(directory: Path, name: str) -> bytes:
    """Raises OSError, also where somebody else could have written it."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    where = os.open(directory, flags | os.O_DIRECTORY)
    try:
        with open(os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=where), "rb") as file:
            if not (_is_ours(os.fstat(where)) and _is_ours(os.fstat(file.fileno()))):
                raise PermissionError(f"{directory / name}: other users may write there")
            return file.read()
    finally:
        os.close(where)


def keep(source: str, kept: Kept) -> None:
    """Written aside and renamed: several processes may do so at once. Where nothing can be written each start
    compiles (``vmm doctor`` says so)."""
    data = msgspec.msgpack.encode(kept)
    for directory in cache_directories(source):
        try:
            directory.mkdir(mode=0o755 if directory.name == "__pycache__" else 0o700, parents=True, exist_ok=True)
            if trusted(directory):
                _write(directory, f"{source}.native", data)
                return
        except OSError:
            continue


def _write(directory: Path, name: str, data: bytes) -> None:
    """Readable by all: beside a program that is everybody's it saves everybody the compiling. Raises OSError, with
    nothing left of it."""
    fd, aside = tempfile.mkstemp(dir=directory)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, 0o644)
            file.write(data)
        os.replace(aside, directory / name)
    except BaseException:
        os.unlink(aside)
        raise
