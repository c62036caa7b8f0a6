"""A chain's directory: which names and files in it are ours, the lock, and removal of those and nothing else."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from ipc.linux.files import open_locked
from ipc.steps import step

from ...errors import VmmError, one_line
from ...machine.names import is_snapshot_id

__all__ = ["SnapshotError", "clear_leftovers", "discard", "foreign_file", "has_manifest", "locked",
           "new_aside", "next_id", "no_snapshot", "remove", "snapshot_ids", "sync_directory", "sync_file"]

_ASIDE = re.compile(r"\.(?:new|old)-[0-9]{4,18}-[0-9a-f]{8}")
_FILE = re.compile(r"manifest\.(?:json|sum)|(?:slot[0-9]{1,9}|system)\.(?:map|mem|zst)|image")


class SnapshotError(VmmError):
    """A snapshot that is damaged, foreign, or not there; the text names the file."""


def snapshot_ids(directory: Path) -> list[str]:
    """Of every snapshot there, whole or damaged, the oldest first: ids are numbers. A directory that has such a
    name and no manifest is not ours. Raises SnapshotError."""
    if not directory.is_dir():
        raise SnapshotError(f"{directory}: is not a directory")
    try:
        names = os.listdir(directory)
    except OSError as exc:
        raise SnapshotError(f"{directory}: cannot be read: {exc.strerror}") from None
    return sorted((n for n in names if is_snapshot_id(n) and has_manifest(directory / n)), key=int)


def has_manifest(folder: Path) -> bool:
    """A snapshot is there, whole or damaged."""
    return any(os.path.lexists(folder / name) for name in ("manifest.json", "manifest.sum"))


def no_snapshot(directory: Path, name: str) -> SnapshotError:
    """What is said where there is none of that id."""
    there = snapshot_ids(directory)
    others = f"there {'is' if len(there) == 1 else 'are'} {', '.join(there)}" if there else "it contains no snapshots"
    return SnapshotError(f"{one_line(str(directory))}: no snapshot {name}; {others}")


def next_id(directory: Path) -> str:
    """Behind every snapshot there, and not yet the name of anything."""
    there = snapshot_ids(directory)
    number = int(there[-1]) + 1 if there else 1
    while os.path.lexists(directory / f"{number:04d}"):
        number += 1
    return f"{number:04d}"


def new_aside(directory: Path, snapshot_id: str) -> Path:
    """Make a directory to write a snapshot in before it gets its name. Raises OSError."""
    aside = directory / f".new-{snapshot_id}-{uuid.uuid4().hex[:8]}"
    aside.mkdir(mode=0o700)
    return aside


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One at a time changes a chain. Raises SnapshotError."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(open_locked(directory, os.O_RDONLY | os.O_DIRECTORY))
        except BlockingIOError:
            raise SnapshotError(f"{directory}: another snapshot is being taken, merged or deleted there") from None
        except OSError as exc:
            raise SnapshotError(f"{directory}: {exc.strerror}") from None
        yield


def foreign_file(folder: Path) -> str | None:
    """Something in a snapshot's directory that no snapshot has, if there is any. Raises SnapshotError."""
    try:
        with os.scandir(folder) as entries:
            return min((e.name for e in entries if e.is_dir(follow_symlinks=False) or not _FILE.fullmatch(e.name)),
                       default=None)
    except OSError as exc:
        raise SnapshotError(f"{folder}: cannot be read: {exc.strerror}") from None


def remove(directory: Path, snapshot_id: str) -> None:
    """Take a snapshot out of the chain in one step, then remove its files. The caller holds the lock. Raises
    OSError."""
    aside = directory / f".old-{snapshot_id}-{uuid.uuid4().hex[:8]}"
    os.rename(directory / snapshot_id, aside)
    sync_directory(directory)
    step("snapshot-out-of-chain")
    discard(aside)


def discard(folder: Path) -> None:
    """Remove a snapshot's files and its directory; what else is there stays, and the directory then too."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if _FILE.fullmatch(name):
                os.unlink(folder / name)
        folder.rmdir()


def clear_leftovers(directory: Path) -> None:
    """What was being written or removed when a process was killed. The caller holds the lock."""
    for name in os.listdir(directory):
        if _ASIDE.fullmatch(name):
            discard(directory / name)


def sync_file(path: Path) -> None:
    """Raises OSError."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
