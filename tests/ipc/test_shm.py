"""Segments: reserved or refused, mode 0600, gone when closed."""

from __future__ import annotations

import os
import stat
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
