"""Removal watches: told when a path goes, whoever has it open, and not when its neighbours do."""

from __future__ import annotations

import os
import select
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipc.linux.inotify import RemovalWatch


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A directory that is open, with a socket in it that is bound, and a file that is open."""
    directory, file = tmp_path / "root" / "machine", tmp_path / "lock"
    directory.mkdir(parents=True)
    file.touch()
    open_fds = [os.open(directory, os.O_RDONLY), os.open(file, os.O_RDWR)]
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(directory / "control"))
        yield directory, file
    for fd in open_fds:
        os.close(fd)


def replace_file(directory: Path, file: Path) -> None:
    file.with_name("other").touch()
    file.with_name("other").rename(file)


REMOVALS: list[Callable[[Path, Path], object]] = [
    lambda directory, file: shutil.rmtree(directory),
    lambda directory, file: directory.rename(directory.parent / "x"),
    lambda directory, file: shutil.rmtree(directory.parent), lambda directory, file: file.unlink(),
    lambda directory, file: directory.parent.rename(directory.parent.parent / "x"),
    lambda directory, file: file.rename(file.parent / "x"), replace_file,
]


@pytest.mark.parametrize("remove", REMOVALS, ids=range(len(REMOVALS)))
def test_a_removal_is_told(remove: Callable[[Path, Path], object], paths: tuple[Path, Path]) -> None:
    watch = RemovalWatch(*paths)
    assert not select.select([watch.fd], [], [], 0)[0]
    assert watch.gone() is None
    remove(*paths)
    assert select.select([watch.fd], [], [], 10)[0]
    assert watch.gone() in paths
    watch.close()
    watch.close()


def test_what_happens_beside_and_within_is_nothing(paths: tuple[Path, Path]) -> None:
    directory, file = paths
    watch = RemovalWatch(*paths)
    (directory / "state.json").write_text("x")
    (directory / "state.json").unlink()
    file.write_text("1234")
    (directory.parent / "machine-2").mkdir()
    (directory.parent / "machine-2").rmdir()
    assert watch.gone() is None
    assert not select.select([watch.fd], [], [], 0)[0]     # and is not told again
    watch.close()


def test_what_is_not_there_cannot_be_watched(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        RemovalWatch(tmp_path / "nothing")
    assert len(os.listdir("/proc/self/fd")) == before
