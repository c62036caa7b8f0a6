"""Segments: reserved or refused, mode 0600, gone when closed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ipc import shm
from vmm.machine.names import segment_name

NAME = segment_name(f"test-{os.getpid()}", "x")     # tests may run side by side


def test_created_segment_is_private_zeroed_reserved_and_gone_after_close() -> None:
    path = Path("/dev/shm") / NAME[1:]
    with shm.Segment.create(NAME, 5000) as segment:
        status = path.stat()
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert segment.size == status.st_size == 8192
        assert status.st_blocks * 512 >= 8192  # reserved, not sparse
        assert not any(bytes(segment.buf))
    assert not path.exists()


def test_second_create_is_refused_and_leaves_the_first_alone() -> None:
    with shm.Segment.create(NAME, 4096) as first:
        first.buf[0] = 7
        with pytest.raises(shm.SegmentError, match="already exists"):
            shm.Segment.create(NAME, 4096)
        with shm.Segment.open(NAME) as second:
            assert second.buf[0] == 7
        assert shm.list_segments(NAME[1:]) == [NAME]


def test_too_large_is_an_error_with_the_sizes_and_leaves_nothing() -> None:
    size = shm.free_bytes() + (64 << 20)
    with pytest.raises(shm.SegmentError, match=r"/dev/shm is too small: .* KiB are free"):
        shm.Segment.create(NAME, size)
    assert shm.list_segments(NAME[1:]) == []


def test_open_of_a_missing_segment_is_one_line() -> None:
    with pytest.raises(shm.SegmentError, match="cannot open shared-memory segment"):
        shm.Segment.open(NAME)


def test_no_descriptor_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with shm.Segment.create(NAME, 4096):
            pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_was_begun_is_whole_once_it_has_settled() -> None:
    size = 16 << 20
    shm.Segment.begin(NAME, size)
    with shm.Segment.create(NAME, size) as segment:
        shm.Segment.settle()
        status = os.stat(f"/dev/shm{NAME}")
        assert (segment.size, status.st_size, status.st_blocks * 512) == (size, size, size)
    assert shm.list_segments(NAME[1:]) == []
    with shm.Segment.create(NAME, 4096) as other:       # it was given once
        assert other.size == 4096


_TWO = """
import contextlib, sys
from ipc import shm
name, errors = sys.argv[1], []
with contextlib.ExitStack() as stack:
    for each in "ab":
        shm.Segment.begin(name + each, 6 << 20)
    for each in "ab":
        try:
            stack.enter_context(shm.Segment.create(name + each, 6 << 20))
        except shm.SegmentError as exc:
            errors.append(str(exc))
    try:
        shm.Segment.settle()
    except shm.SegmentError as exc:
        errors.append(str(exc))
print(len(errors), all("/dev/shm is too small: segment" in each for each in errors), shm.list_segments(name[1:]))
"""


@pytest.mark.root
def test_what_was_begun_and_finds_no_room_is_an_error_and_leaves_nothing() -> None:
    """Each of the two fits alone: whether it is seen before they are given, or later, one of them fails, or both."""
    for _ in range(5):
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$@"', "sh",
             sys.executable, "-c", _TWO, NAME], capture_output=True, text=True, timeout=60, check=False)
        assert done.stderr == ""
        assert done.stdout in ("1 True []\n", "2 True []\n")
