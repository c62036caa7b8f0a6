"""The hot loops, as Numba compiles them: harvest, publish, fold, clear. :mod:`ipc.kernels` has them to call.

Arguments are addresses, so that the compiled code needs nothing of Python (ipc/native.py). Everything a ring entry
says is checked against the slot table (ipc.bitmap.slot_table).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.core import types

from .atomics import load_acquire_u32, load_u32, load_u64, store_release_u32, store_u64
from .bitmap import GROUP_WORDS
from .layout import DIRTY_GFN_F_DIRTY, DIRTY_GFN_F_RESET, NR_ADDRESS_SPACES

__all__ = ["EXPORTS"]

_DIRTY = np.uint32(DIRTY_GFN_F_DIRTY)
_RESET = np.uint32(DIRTY_GFN_F_RESET)
_NR_AS = np.uint32(NR_ADDRESS_SPACES)
_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_GROUP_SHIFT = np.uint64(12)  # pages of a summary bit: 64 words of 64 pages
assert GROUP_WORDS * 64 == 1 << 12

_i64, _u32, _u64 = types.int64, types.uint32, types.uint64


@njit(_u64(_u64), inline="always")
def _popcount(x):  # type: ignore[no-untyped-def]
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(_i64(_u64), inline="always")
def _log2(power):  # type: ignore[no-untyped-def]
    """Index of the one set bit of ``power``."""
    return np.int64(_popcount(power - _ONE))


def _harvest(ring, entries, fetch, limit, table, slots, out, pages, room):  # type: ignore[no-untyped-def]
    """``table`` [slots, 3], ``out`` [4] and ``pages`` [room, 3] are addresses of uint64 arrays."""
    mask = np.uint64(entries - np.uint32(1))
    count = _ZERO
    bad = _ZERO
    slot_word = np.uint32(load_u64(out + 16))
    offset = load_u64(out + 24)
    while count < limit:
        entry = ring + np.int64(((fetch + count) & mask) << np.uint64(4))
        flags = load_acquire_u32(entry)
        if flags & _RESET:
            slot_word = load_u32(entry + 4)
            offset = load_u64(entry + 8)
            count += _ONE
            continue
        if flags != _DIRTY:
            break
        slot_word = load_u32(entry + 4)
        offset = load_u64(entry + 8)
        slot_id = slot_word & np.uint32(0xFFFF)
        as_id = slot_word >> np.uint32(16)
        row = table + np.int64(slot_id) * 24
        if as_id < _NR_AS and slot_id < slots and offset < load_u64(row + 16):
            summary = np.int64(load_u64(row + 8) + ((offset >> _GROUP_SHIFT >> np.uint64(6)) << np.uint64(3)))
            store_u64(summary, load_u64(summary) | (_ONE << ((offset >> _GROUP_SHIFT) & np.uint64(63))))
            word = np.int64(load_u64(row) + ((offset >> np.uint64(6)) << np.uint64(3)))
            store_u64(word, load_u64(word) | (_ONE << (offset & np.uint64(63))))
        else:
            bad += _ONE
        store_release_u32(entry, _RESET)
        if count < room:
            at = pages + np.int64(count * np.uint64(24))
            store_u64(at, fetch + count)
            store_u64(at + 8, np.uint64(slot_word))
            store_u64(at + 16, offset)
        count += _ONE
    store_u64(out, count)
    store_u64(out + 8, bad)
    store_u64(out + 16, np.uint64(slot_word))
    store_u64(out + 24, offset)


def _publish(src, dst, words, summary_words):  # type: ignore[no-untyped-def]
    """Bitmaps as they lie in memory: ``words``, behind them ``summary_words`` of summary."""
    fresh = _ZERO
    for s in range(summary_words):
        src_summary = src + 8 * (words + s)
        dst_summary = dst + 8 * (words + s)
        groups = load_u64(src_summary)
        if groups == _ZERO:
            continue
        store_u64(dst_summary, load_u64(dst_summary) | groups)
        g = groups
        while g != _ZERO:
            low = g & (~g + _ONE)
            g ^= low
            first = (s * 64 + _log2(low)) * GROUP_WORDS
            for w in range(first, min(first + GROUP_WORDS, words)):
                bits = load_u64(src + 8 * w)
                if bits != _ZERO:
                    there = load_u64(dst + 8 * w)
                    fresh += _popcount(bits & ~there)
                    store_u64(dst + 8 * w, there | bits)
                    store_u64(src + 8 * w, _ZERO)
        store_u64(src_summary, _ZERO)
    return fresh


def _fold(src, dst, words, summary_words):  # type: ignore[no-untyped-def]
    for s in range(summary_words):
        groups = load_u64(src + 8 * (words + s))
        if groups == _ZERO:
            continue
        dst_summary = dst + 8 * (words + s)
        store_u64(dst_summary, load_u64(dst_summary) | groups)
        while groups != _ZERO:
            low = groups & (~groups + _ONE)
            groups ^= low
            first = (s * 64 + _log2(low)) * GROUP_WORDS
            for w in range(first, min(first + GROUP_WORDS, words)):
                store_u64(dst + 8 * w, load_u64(dst + 8 * w) | load_u64(src + 8 * w))


def _clear(bitmap, words, summary_words):  # type: ignore[no-untyped-def]
    for s in range(summary_words):
        summary = bitmap + 8 * (words + s)
        groups = load_u64(summary)
        while groups != _ZERO:
            low = groups & (~groups + _ONE)
            groups ^= low
            first = (s * 64 + _log2(low)) * GROUP_WORDS
            for w in range(first, min(first + GROUP_WORDS, words)):
                store_u64(bitmap + 8 * w, _ZERO)
        store_u64(summary, _ZERO)


EXPORTS = {
    "harvest": (_harvest, types.void(_i64, _u32, _u64, _u64, _i64, _u32, _i64, _i64, _u64)),
    "publish": (_publish, _u64(_i64, _i64, _i64, _i64)),
    "fold": (_fold, types.void(_i64, _i64, _i64, _i64)),
    "clear": (_clear, types.void(_i64, _i64, _i64)),
}
