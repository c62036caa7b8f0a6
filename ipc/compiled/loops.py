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

__all__ = ["EXPORTS", "publish_entry"]

_DIRTY = np.uint32(DIRTY_GFN_F_DIRTY)
_DIRTY_WORD = np.uint64(DIRTY_GFN_F_DIRTY)
_RESET = np.uint32(DIRTY_GFN_F_RESET)
_NONE = np.uint32(0)
_NR_AS = np.uint32(NR_ADDRESS_SPACES)
_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_GROUP_SHIFT = np.uint64(12)  # pages of a summary bit: 64 words of 64 pages
assert GROUP_WORDS * 64 == 1 << 12

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
    """Entries in a row that fall into one word of the bitmap are one store to it, then their flags: a walk over
    memory then does not wait for the word again and again."""
    mask = np.uint64(entries - np.uint32(1))
    count = _ZERO
    bad = _ZERO
    slot_word = np.uint32(load_word(out, 2))
    offset = load_word(out, 3)
    # The entry at index fetch + count is loaded already; the slot table's row is that of ``known``.
    entry = ring + np.int64((fetch & mask) << np.uint64(4))
    flags = load_acquire_u32(entry)
    next_word = load_u32(entry + 4)
    next_offset = load_u64(entry + 8)
    known = ~next_word
    words = summaries = total = _ZERO
    while count < limit and (flags == _DIRTY or flags & _RESET != _NONE):
        left_over = flags != _DIRTY
        slot_word = next_word
        offset = next_offset
        first = entry
        count += _ONE
        entry = ring + np.int64(((fetch + count) & mask) << np.uint64(4))
        flags = load_acquire_u32(entry)
        next_word = load_u32(entry + 4)
        next_offset = load_u64(entry + 8)
        if left_over:
            continue
        if slot_word != known:
            known = slot_word
            slot_id = slot_word & np.uint32(0xFFFF)
            total = _ZERO
            if slot_word >> np.uint32(16) < _NR_AS and slot_id < slots:
                row = table + np.int64(slot_id) * 24
                words, summaries, total = load_word(row, 0), load_word(row, 1), load_word(row, 2)
        if offset >= total:
            bad += _ONE
            store_release_u32(first, _RESET)
            continue
        summary = np.int64(summaries + ((offset >> np.uint64(18)) << np.uint64(3)))
        groups = load_u64(summary)
        group = _ONE << ((offset >> _GROUP_SHIFT) & np.uint64(63))
        if groups & group == _ZERO:
            store_u64(summary, groups | group)
        word = np.int64(words + ((offset >> np.uint64(6)) << np.uint64(3)))
        bits = _ONE << (offset & np.uint64(63))
        followers = _ZERO
        while (count < limit and (next_offset ^ offset) >> np.uint64(6) == _ZERO and next_word == slot_word
                and flags == _DIRTY and next_offset < total):
            offset = next_offset
            bits |= _ONE << (offset & np.uint64(63))
            count += _ONE
            followers += _ONE
            entry = ring + np.int64(((fetch + count) & mask) << np.uint64(4))
            flags = load_acquire_u32(entry)
            next_word = load_u32(entry + 4)
            next_offset = load_u64(entry + 8)
        store_u64(word, load_u64(word) | bits)
        store_release_u32(first, _RESET)
        while followers:
            store_release_u32(ring + np.int64(((fetch + count - followers) & mask) << np.uint64(4)), _RESET)
            followers -= _ONE
    for i in range(np.int64(min(count, room))):       # the entries are there until the reset
        entry = ring + np.int64(((fetch + np.uint64(i)) & mask) << np.uint64(4))
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


def _take(slot, pending, synced, words, summary_words):  # type: ignore[no-untyped-def]
    taken = _ZERO
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
            else:
                for w in range(first, end):
                    bits = load_word(slot, w)
                    store_word(synced, w, bits)
                    taken += popcount(bits)
                fence_release()
            _zero(slot, first, end)
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
