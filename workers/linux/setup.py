"""What a program finds when it starts: files of the host that the machine's configuration lists, and no others."""

from __future__ import annotations

import os
import stat
import tarfile
from pathlib import Path

from ipc.messages import ProgramSpec

from ..accel.base import AccelError
from .contents import Regular
from .directories import Directory
from .inodes import Inode
from .sources import HostTree, Source, TarTree
from .vfs import FileSystem

__all__ = ["fill"]

_PIECE = 1 << 20


def fill(files: FileSystem, program: ProgramSpec) -> None:
    """Directories and tar files are read when something of them is; single files at once. Raises AccelError, NoFrames
    and NoTables."""
    if program.root:
        _attach(files, "root", program.root, files.root, "guest.root")
    for number, (inside, outside) in enumerate(sorted(program.files.items())):
        try:
            _add(files, f"files.{number}", os.fsencode(inside), outside)
        except OSError as exc:
            raise AccelError(f"guest.files: {outside}: {os.strerror(exc.errno or 0)}") from None


def _attach(files: FileSystem, name: str, path: str, directory: Directory, key: str) -> None:
    try:
        source: Source = HostTree(path) if os.path.isdir(path) else TarTree(path)
        files.attach(name, source)
        files.import_tree(directory, name)
    except (OSError, tarfile.TarError) as exc:
        what = os.strerror(exc.errno or 0) if isinstance(exc, OSError) else str(exc)
        raise AccelError(f"{key}: {path}: {what}") from None


def _add(files: FileSystem, name: str, inside: bytes, outside: str) -> None:
    """Raises OSError."""
    parent: Inode = files.root
    *parts, last = [part for part in inside.split(b"/") if part]
    for part in parts:
        parent = _directory(files, parent, part)
    if os.path.isdir(outside):
        found = _directory(files, parent, last)
        assert isinstance(found, Directory)
        _attach(files, name, outside, found, f"guest.files: {outside}")
        return
    with Path(outside).open("rb") as file:
        status = os.fstat(file.fileno())
        opened = files.open(parent, last, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, stat.S_IMODE(status.st_mode))
        while data := file.read(_PIECE):
            opened.write(data)
    assert isinstance(opened.inode, Regular)
    opened.let_go()


def _directory(files: FileSystem, parent: Inode, name: bytes) -> Inode:
    try:
        files.mkdir(parent, name, 0o755)
    except FileExistsError:
        pass
    return files.find(parent, name)
