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

__all__ = ["fill", "sources"]

_ROOT = "root"      # as the name of a source; others are absolute paths

_PIECE = 1 << 20


def fill(files: FileSystem, program: ProgramSpec) -> None:
    """Directories and tar files are read when something of them is; single files at once. Raises AccelError, NoFrames
    and NoTables."""
    trees = sources(program)
    for name, tree in trees.items():
        files.attach(name, tree)
    if _ROOT in trees:
        files.import_tree(files.root, _ROOT)
    for inside, outside in sorted(program.files.items()):
        try:
            _add(files, os.fsencode(inside), outside, inside if inside in trees else "")
        except OSError as exc:
            raise AccelError(f"guest.files: {outside}: {os.strerror(exc.errno or 0)}") from None


def sources(program: ProgramSpec) -> dict[str, Source]:
    """The trees among them, by the name that what is imported from them remembers. Raises AccelError."""
    found = {_ROOT: _tree(program.root, "guest.root")} if program.root else {}
    return found | {inside: _tree(outside, "guest.files") for inside, outside in program.files.items()
                    if os.path.isdir(outside)}


def _tree(path: str, key: str) -> Source:
    try:
        return HostTree(path) if os.path.isdir(path) else TarTree(path)
    except (OSError, tarfile.TarError) as exc:
        what = os.strerror(exc.errno or 0) if isinstance(exc, OSError) else str(exc)
        raise AccelError(f"{key}: {path}: {what}") from None


def _add(files: FileSystem, inside: bytes, outside: str, tree: str) -> None:
    """``tree``: its name, where it is one. Raises OSError."""
    parent: Inode = files.root
    *parts, last = [part for part in inside.split(b"/") if part]
    for part in parts:
        parent = _directory(files, parent, part)
    if tree:
        found = _directory(files, parent, last)
        assert isinstance(found, Directory)
        files.import_tree(found, tree)
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
