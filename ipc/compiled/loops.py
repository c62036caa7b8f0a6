"""The hot loops, as Numba compiles them: harvest, publish, fold, clear, take. calls.py has them to call.

Arguments are numbers and addresses, so that the compiled code needs nothing of Python (ipc/compiled/loader.py).
Everything a ring entry says is checked against the slot table (ipc.bitmap.slot_table).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.core import types

from ..bitmap import GROUP_WORDS
from ..layout import DIRTY_GFN_F_DIRTY, DIRTY_GFN_F_RESET, NR_ADDRESS_SPACES
from .atomics import (
    fence,
    fence_release,
    load_acquire_u32,
    load_u32,
    load_u64,
    load_word,
    popcount,
    store_release_u32,
    store_release_u64,
    store_u64,
    store_word,
)
from .streaming import prefetch, stream_line

__all__ = ["EXPORTS", "publish_entry"]

_DIRTY = np.uint32(DIRTY_GFN_F_DIRTY)
_DIRTY_WORD = np.uint64(DIRTY_GFN_F_DIRTY)
_RESET = np.uint32(DIRTY_GFN_F_RESET)
_NONE = np.uint32(0)
_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_GROUP_SHIFT = np.uint64(12)  # pages of a summary bit: 64 words of 64 pages
_ENTRY_SHIFT = np.uint64(4)
assert GROUP_WORDS * 64 == 1 << 12
assert NR_ADDRESS_SPACES == 1

#: Words of a bitmap that no cache holds, 8 MiB: it is written past them, and what is read next is fetched early.
_LARGE = 1 << 20
_AHEAD = 2048       # bytes

_i64, _u32, _u64 = types.int64, types.uint32, types.uint64


@njit(types.void(types.int64, types.uint64, types.uint64), inline="always")
def publish_entry(entry, slot_word, page):  # type: ignore[no-untyped-def]
    """The producer's end, for whoever plays a vCPU without a kernel's help: fill in the entry at this address and
    publish it. Flags and slot share a word: one release store shows both, and the offset before them."""
    store_u64(entry + 8, page)
    store_release_u64(entry, _DIRTY_WORD | (slot_word << np.uint64(32)))


@njit(inline="always")
def _log2(power):  # type: ignore[no-untyped-def]
    """Index of the one set bit of ``power``."""
    return np.int64(popcount(power - _ONE))


def _harvest(ring, entries, fetch, limit, table, slots, out, pages, room):  # type: ignore[no-untyped-def]
    """One entry after the other, and as little as can be for each: the next one's loads are under way then. (To put
    entries of one word together, or to load ahead, costs random pages more than it saves sequential ones.)"""
    size = np.int64(np.uint64(entries) << _ENTRY_SHIFT)
    at = begin = ring + np.int64((fetch & np.uint64(entries - np.uint32(1))) << _ENTRY_SHIFT)
    stop, end = at + np.int64(limit << _ENTRY_SHIFT), ring + size
    bad = _ZERO
    slot_word = np.uint32(load_word(out, 2))
    offset = load_word(out, 3)
    known = ~load_u32(at + 4)       # the slot table's row is that of this slot word
    words = summaries = total = _ZERO
    while True:
        upto = min(stop, end)
        while at < upto:
            flags = load_acquire_u32(at)
            if flags != _DIRTY and flags & _RESET == _NONE:
                break
            slot_word = load_u32(at + 4)
            offset = load_u64(at + 8)
            if flags == _DIRTY:     # else it was harvested by one that died
                if slot_word != known:
                    known = slot_word
                    total = _ZERO
                    if slot_word < slots:       # of address space 0, the only one
                        row = table + np.int64(slot_word) * 24
                        words, summaries, total = load_word(row, 0), load_word(row, 1), load_word(row, 2)
                if offset < total:
                    summary = np.int64(summaries + ((offset >> np.uint64(18)) << np.uint64(3)))
                    groups = load_u64(summary)
                    group = _ONE << ((offset >> _GROUP_SHIFT) & np.uint64(63))
                    if groups & group == _ZERO:
                        store_u64(summary, groups | group)
                    word = np.int64(words + ((offset >> np.uint64(6)) << np.uint64(3)))
                    store_u64(word, load_u64(word) | (_ONE << (offset & np.uint64(63))))
                else:
                    bad += _ONE
                store_release_u32(at, _RESET)
            at += 16
        if at != end or at == stop:
            break
        at, stop, begin = at - size, stop - size, begin - size      # once round the ring
    count = np.uint64((at - begin) >> 4)
    mask = np.uint64(entries - np.uint32(1))
    for i in range(np.int64(min(count, room))):       # the entries are there until the reset
        entry = ring + np.int64(((fetch + np.uint64(i)) & mask) << _ENTRY_SHIFT)
        store_word(pages, 3 * i, fetch + np.uint64(i))
        store_word(pages, 3 * i + 1, np.uint64(load_u32(entry + 4)))
        store_word(pages, 3 * i + 2, load_u64(entry + 8))
    store_word(out, 0, count)
    store_word(out, 1, bad)
    store_word(out, 2, np.uint64(slot_word))
    store_word(out, 3, offset)


# Bitmaps are addresses of their words; the summary lies behind them (ipc/bitmap.py).


@njit(inline="always")
def _end(first, words):  # type: ignore[no-untyped-def]
    """Of the group that begins at word ``first``."""
    return min(first + GROUP_WORDS, words)


@njit(inline="always")
def _zero(bitmap, first, end):  # type: ignore[no-untyped-def]
    for w in range(first, end):
        store_word(bitmap, w, _ZERO)


def _publish(src, dst, words, summary_words):  # type: ignore[no-untyped-def]
    fresh = _ZERO
    for s in range(words, words + summary_words):
        groups = load_word(src, s)
        if groups == _ZERO:
            continue
        store_word(dst, s, load_word(dst, s) | groups)
        while groups != _ZERO:
            low = groups & (~groups + _ONE)
            groups ^= low
            first = ((s - words) * 64 + _log2(low)) * GROUP_WORDS
            end = _end(first, words)
            for w in range(first, end):
                bits, there = load_word(src, w), load_word(dst, w)
                fresh += popcount(bits & ~there)
                store_word(dst, w, there | bits)
            fence_release()
            _zero(src, first, end)
        store_word(src, s, _ZERO)
    return fresh


def _fold(src, dst, words, summary_words):  # type: ignore[no-untyped-def]
    for s in range(words, words + summary_words):
        groups = load_word(src, s)
        if groups == _ZERO:
            continue
        store_word(dst, s, load_word(dst, s) | groups)
        while groups != _ZERO:
            low = groups & (~groups + _ONE)
            groups ^= low
            first = ((s - words) * 64 + _log2(low)) * GROUP_WORDS
            for w in range(first, _end(first, words)):
                store_word(dst, w, load_word(dst, w) | load_word(src, w))


def _clear(bitmap, words, summary_words):  # type: ignore[no-untyped-def]
    for s in range(words, words + summary_words):
        groups = load_word(bitmap, s)
        while groups != _ZERO:
            low = groups & (~groups + _ONE)
            groups ^= low
            first = ((s - words) * 64 + _log2(low)) * GROUP_WORDS
            _zero(bitmap, first, _end(first, words))
        store_word(bitmap, s, _ZERO)


@njit(inline="always")
def _stream(src, dst, first, end):  # type: ignore[no-untyped-def]
    """Whole lines, which both have at the same addresses modulo a line."""
    for w in range(first, end, 8):
        prefetch(src + 8 * w + _AHEAD)
    for w in range(first, end, 8):
        stream_line(src + 8 * w, dst + 8 * w)


def _take(slot, pending, synced, words, summary_words):  # type: ignore[no-untyped-def]
    taken = _ZERO
    streams = words >= _LARGE and words % 8 == 0 and slot % 64 == 0 and synced % 64 == 0
    for s in range(words, words + summary_words):
        fresh = load_word(slot, s)
        older = load_word(pending, s)
        stale = load_word(synced, s) & ~(fresh | older)
        groups = fresh | older | stale
        if groups == _ZERO:
            continue
        store_word(synced, s, groups)
        while groups != _ZERO:
            low = groups & (~groups + _ONE)
            groups ^= low
            first = ((s - words) * 64 + _log2(low)) * GROUP_WORDS
            end = _end(first, words)
            if low & stale:
                _zero(synced, first, end)
                continue
            if low & older:
                for w in range(first, end):
                    bits = load_word(slot, w) | load_word(pending, w)
                    store_word(synced, w, bits)
                    taken += popcount(bits)
                fence_release()
                _zero(pending, first, end)
            elif streams:
                _stream(slot, synced, first, end)
                for w in range(first, end):
                    taken += popcount(load_word(slot, w))
                fence_release()
            else:
                for w in range(first, end):
                    bits = load_word(slot, w)
                    store_word(synced, w, bits)
                    taken += popcount(bits)
                fence_release()
            _zero(slot, first, end)
        if streams:
            fence()
        store_word(synced, s, fresh | older)
        store_word(slot, s, _ZERO)
        store_word(pending, s, _ZERO)
    return taken


EXPORTS = {
    "harvest": (_harvest, types.void(_i64, _u32, _u64, _u64, _i64, _u32, _i64, _i64, _u64)),
    "publish": (_publish, _u64(_i64, _i64, _i64, _i64)),
    "fold": (_fold, types.void(_i64, _i64, _i64, _i64)),
    "clear": (_clear, types.void(_i64, _i64, _i64)),
    "take": (_take, _u64(_i64, _i64, _i64, _i64, _i64)),
}
