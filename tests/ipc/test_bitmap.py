"""Bitmaps against a plain Python set of pages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.bitmap import Bitmap, bitmap_bytes, dirty_ranges, word_count
from ipc.compiled import calls
from ipc.shm import Segment
from vmm.machine.names import segment_name

PAGES = 3 * 4096 + 3    # several summary groups, not a multiple of 64

ranges = st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(0, 300)).map(
    lambda r: (r[0], min(r[1], PAGES - r[0]))), max_size=8)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Bitmap, Bitmap]]:
    with Segment.create(segment_name("test-bitmap", f"pair-{os.getpid()}"), 2 * bitmap_bytes(PAGES)) as segment:
        yield Bitmap(segment, 0, PAGES), Bitmap(segment, bitmap_bytes(PAGES), PAGES)


def fill(bitmap: Bitmap, wanted: list[tuple[int, int]]) -> set[int]:
    bitmap.clear()
    pages: set[int] = set()
    for first, count in wanted:
        bitmap.mark_range(first, count)
        pages |= set(range(first, first + count))
    return pages


def pages_of(bitmap: Bitmap) -> set[int]:
    return set(np.flatnonzero(bitmap.bools()).tolist())


def assert_summary_covers(bitmap: Bitmap) -> None:
    for word in np.flatnonzero(bitmap.words):
        group = int(word) // 64
        assert int(bitmap.summary[group // 64]) >> (group % 64) & 1


@given(ranges)
def test_marking_and_reading_back(pair: tuple[Bitmap, Bitmap], wanted: list[tuple[int, int]]) -> None:
    pages = fill(pair[0], wanted)
    assert pages_of(pair[0]) == pages
    assert pair[0].count() == len(pages)
    assert all(pair[0].get(p) for p in pages)
    covered = [p for first, count in pair[0].ranges() for p in range(first, first + count)]
    assert covered == sorted(pages)
    assert_summary_covers(pair[0])


@given(ranges, ranges)
def test_publish_moves_and_counts_what_is_new(pair: tuple[Bitmap, Bitmap], a: list[tuple[int, int]],
                                              b: list[tuple[int, int]]) -> None:
    source, target = pair
    there, more = fill(target, a), fill(source, b)
    fresh = calls.publish(source, target)
    assert fresh == len(more - there)
    assert pages_of(target) == there | more
    assert pages_of(source) == set()
    assert not source.summary.any()
    assert_summary_covers(target)


@given(ranges, ranges)
def test_fold_leaves_the_source_and_clear_empties_it(pair: tuple[Bitmap, Bitmap],
                                                     a: list[tuple[int, int]],
                                                     b: list[tuple[int, int]]) -> None:
    source, target = pair
    there, more = fill(target, a), fill(source, b)
    calls.fold(source, target)
    assert pages_of(target) == there | more
    assert pages_of(source) == more
    assert_summary_covers(target)
    calls.clear(source)
    assert pages_of(source) == set()
    assert not source.summary.any()


@given(ranges, ranges)
@settings(max_examples=50)
def test_merge_of_a_plain_bitmap_keeps_the_summary_true(pair: tuple[Bitmap, Bitmap],
                                                        a: list[tuple[int, int]],
                                                        b: list[tuple[int, int]]) -> None:
    source, target = pair
    there, more = fill(target, a), fill(source, b)
    target.merge(source.words)
    assert pages_of(target) == there | more
    assert_summary_covers(target)


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, PAGES + 1), (PAGES, 1), (0, -1)])
def test_out_of_bounds_is_refused(pair: tuple[Bitmap, Bitmap], first: int, count: int) -> None:
    with pytest.raises(IndexError):
        pair[0].mark_range(first, count)


@given(st.lists(st.booleans(), min_size=1, max_size=400))
def test_ranges_of_any_bits(bits: list[bool]) -> None:
    words = np.zeros(word_count(len(bits)), np.uint64)
    for page, bit in enumerate(bits):
        words[page // 64] |= np.uint64(int(bit) << (page % 64))
    covered = [p for first, count in dirty_ranges(words, len(bits)) for p in range(first, first + count)]
    assert covered == [p for p, bit in enumerate(bits) if bit]



@pytest.fixture(scope="module")
def three() -> Iterator[list[Bitmap]]:
    size = bitmap_bytes(PAGES)
    with Segment.create(segment_name("test-bitmap", f"three-{os.getpid()}"), 3 * size) as segment:
        yield [Bitmap(segment, at * size, PAGES) for at in range(3)]


@given(ranges, ranges, ranges)
def test_take_is_fold_clear_and_publish_in_one(three: list[Bitmap], a: list[tuple[int, int]],
                                               b: list[tuple[int, int]], c: list[tuple[int, int]]) -> None:
    slot, pending, synced = three
    fresh, older = fill(slot, a), fill(pending, b)
    fill(synced, c)      # of the last take: gone
    assert calls.take(slot, pending, synced) == len(fresh | older)
    assert pages_of(synced) == fresh | older
    assert pages_of(slot) == pages_of(pending) == set()
    assert not slot.summary.any()
    assert not pending.summary.any()
    assert_summary_covers(synced)


@pytest.mark.parametrize("pages", [1 << 26, (1 << 26) + 64 * 8 * 3, (1 << 26) + 1])
@pytest.mark.parametrize("gap", [0, 8])     # bytes between two bitmaps: they begin with a cache line, or not
def test_take_of_bitmaps_that_no_cache_holds(pages: int, gap: int) -> None:
    """Against whole arrays of words."""
    rng = np.random.default_rng(1)
    size = -(-bitmap_bytes(pages) // 64) * 64 + gap
    with Segment.create(segment_name("test-bitmap", f"large-{os.getpid()}"), 3 * size) as segment:
        slot, pending, synced = (Bitmap(segment, at * size, pages) for at in range(3))
        for _ in range(3):
            expected = np.zeros(word_count(pages), np.uint64)
            for bitmap, count in ((slot, 3000), (pending, 50), (synced, 3000)):
                dirty = rng.integers(0, pages - 4096, count)
                if bitmap is not pending:
                    dirty = np.append(dirty, pages - 1)
                for page in dirty.tolist():
                    bitmap.mark_range(page, 1)
                if bitmap is not synced:
                    np.bitwise_or.at(expected, dirty // 64, np.uint64(1) << (dirty % 64).astype(np.uint64))
            assert calls.take(slot, pending, synced) == int(np.bitwise_count(expected).sum())
            assert np.array_equal(synced.words, expected)
            for emptied in (slot, pending):
                assert not emptied.words.any()
                assert not emptied.summary.any()
            groups = np.add.reduceat(expected != 0, np.arange(0, len(expected), 64))
            bits = np.unpackbits(synced.summary.view(np.uint8), bitorder="little")[:len(groups)]
            assert bits[groups > 0].all()
        del slot, pending, synced, bitmap, emptied


def test_kernels_kept_on_disk_run_without_the_compiler() -> None:
    """In a process of its own: what Numba brings along is not there."""
    program = """
import sys
from types import SimpleNamespace
import numpy as np
from ipc.compiled import calls
from ipc.bitmap import Bitmap, bitmap_bytes
assert "numba" not in sys.modules
pages = 100_003
memory = [np.zeros(bitmap_bytes(pages) // 8, np.uint64) for _ in range(3)]
a, b, c = (Bitmap(SimpleNamespace(buf=m, address=m.ctypes.data), 0, pages) for m in memory)
a.mark_range(5, 90_000)
assert calls.publish(a, b) == 90_000 and a.count() == 0 and b.count() == 90_000
calls.fold(b, a)
assert calls.take(a, b, c) == 90_000 and (a.count(), b.count(), c.count()) == (0, 0, 90_000)
calls.clear(c)
assert c.count() == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
