"""Outputs: whole or as they were, tried before the work, and nothing but regular files is ever replaced."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vmm.outputs import OutputError, open_append, open_output


def only(folder: Path, *names: str) -> bool:
    """The folder holds these and nothing else (nothing beside a name is left)."""
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


def interrupted(path: Path, data: bytes, *, commit: bool = False) -> None:
    """An output whose work is given up."""
    with open_output(path) as out:
        out.write(data)
        if commit:
            out.commit()
        raise KeyboardInterrupt


def test_a_file_appears_whole_and_with_the_mode_of_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with open_output(tmp_path / "a") as out:
            out.write(b"one")
            out.file.flush()
            assert not (tmp_path / "a").exists()
    finally:
        os.umask(old)
    assert (tmp_path / "a").read_bytes() == b"one"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert only(tmp_path, "a")


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    path.chmod(0o604)
    with pytest.raises(KeyboardInterrupt):
        interrupted(path, b"x" * 100_000)
    assert path.read_bytes() == b"before"
    assert only(tmp_path, "a")
    with open_output(path) as out:
        out.write(b"after")
    assert path.read_bytes() == b"after"
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_what_was_committed_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "a", b"kept", commit=True)
    assert (tmp_path / "a").read_bytes() == b"kept"
    assert only(tmp_path, "a")


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"1")
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "dangling").symlink_to("made")
    for name in ("link", "dangling"):
        with open_output(tmp_path / name) as out:
            out.write(b"2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "there").read_bytes() == (tmp_path / "made").read_bytes() == b"2"
    assert only(tmp_path, "there", "link", "dangling", "made")


def test_a_device_is_written_to_and_stays_a_device() -> None:
    before = os.stat("/dev/full")
    with pytest.raises(OutputError, match=r"^/dev/full: cannot be written: No space left on device$"), \
            open_output("/dev/full") as out:
        out.write(b"x")
    with open_output("/dev/null") as out:
        out.write(b"x")
    after = os.stat("/dev/full")
    assert stat.S_ISCHR(after.st_mode)
    assert (after.st_ino, after.st_rdev) == (before.st_ino, before.st_rdev)
    os.close(open_append("/dev/full"))


def test_a_fifo_needs_a_reader_and_gets_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    for call in (open_output, open_append):
        with pytest.raises(OutputError, match="no process is reading from it"):
            call(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open_output(path) as out:
        out.write(b"through")
    assert os.read(reader, 64) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("stream", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_a_standard_stream_that_is_a_file_is_not_replaced(stream: str, tmp_path: Path) -> None:
    code = (f"import sys; from vmm.outputs import open_output; print('first', flush=True)\n"
            f"with open_output({stream!r}) as out: out.write(b'second\\n')\n"
            "print('third')")
    path = tmp_path / "all"
    with path.open("wb") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True, timeout=60)
    assert path.read_text().split() == ["first", "second", "third"]
    assert only(tmp_path, "all")


def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    (tmp_path / "file").write_bytes(b"")
    cases = [(tmp_path, "is a directory"), (tmp_path / "socket", "is not a regular file"),
             (tmp_path / "no" / "folder", "No such file or directory"),
             (tmp_path / "file" / "x", "Not a directory"), (Path("/dev/fd/999"), "Bad file descriptor"),
             (Path("a\0b"), "null"), (Path("/proc/x"), "cannot be written")]
    for path, why in cases:
        for call in (open_output, open_append):
            with pytest.raises(OutputError, match=why) as caught:
                call(path)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
    listener.close()
    assert only(tmp_path, "socket", "file")


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """At the flush too, where the bytes leave for good."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))        # Python ignores SIGXFSZ
    try:
        with pytest.raises(OutputError, match=r"/a: cannot be written: File too large"), \
                open_output(tmp_path / "a") as out:
            out.write(b"x" * 8193)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert only(tmp_path)


def test_the_longest_name_works(tmp_path: Path) -> None:
    with open_output(tmp_path / ("n" * 255)) as out:
        out.write(b"x")
    assert only(tmp_path, "n" * 255)


def test_libraries_write_through_it(tmp_path: Path) -> None:
    """zipfile seeks where it can."""
    with open_output(tmp_path / "a.npz") as out:
        np.savez(out.file, values=np.arange(5))
    assert np.load(tmp_path / "a.npz")["values"].tolist() == [0, 1, 2, 3, 4]


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for at in range(3):
        with open_output(tmp_path / "a") as out:
            out.write(b"x")
        with pytest.raises(ZeroDivisionError), open_output(tmp_path / "a") as out:
            out.write(b"%d" % (at // 0))
        with pytest.raises(OutputError), open_output("/dev/full") as out:
            out.write(b"x")
    assert len(os.listdir("/proc/self/fd")) == before
