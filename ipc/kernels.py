"""The hot loops, compiled by Numba once and cached: harvest, publish, fold.

Import this module late (it costs about 0.4 s): the coordinator does so while its workers start.

Everything a ring entry says is checked against the slot table (ipc.bitmap.slot_table).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.core import types

from .atomics import load_acquire_u32, load_u32, load_u64, store_release_u32, store_u64
from .bitmap import GROUP_WORDS
from .layout import DIRTY_GFN_F_DIRTY, DIRTY_GFN_F_RESET, NR_ADDRESS_SPACES

__all__ = ["clear", "fold", "harvest", "publish"]

_DIRTY = np.uint32(DIRTY_GFN_F_DIRTY)
_RESET = np.uint32(DIRTY_GFN_F_RESET)
_NR_AS = np.uint32(NR_ADDRESS_SPACES)
_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_GROUP_SHIFT = np.uint64(12)  # pages of a summary bit: 64 words of 64 pages
assert GROUP_WORDS * 64 == 1 << 12

_u64_1d = types.Array(types.uint64, 1, "C")
_u64_2d = types.Array(types.uint64, 2, "C")


@njit(types.uint64(types.uint64), cache=True, inline="always")
def _popcount(x):  # type: ignore[no-untyped-def]
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(types.int64(types.uint64), cache=True, inline="always")
def _log2(power):  # type: ignore[no-untyped-def]
    """Index of the one set bit of ``power``."""
    return np.int64(_popcount(power - _ONE))


@njit(types.void(types.int64, types.uint32, types.uint64, types.uint64, _u64_2d, _u64_1d, _u64_1d),
      cache=True, nogil=True)
def harvest(ring, entries, fetch, limit, slots, out, pages):  # type: ignore[no-untyped-def]
    """Harvest one ring in sequence (seed: kvm_dirty_ring_reap_one).

    For each DIRTY entry from index ``fetch``: set its bit in the slot's staging bitmap, then
    release-store RESET. An entry found in RESET already was harvested by a predecessor that died
    before it could store its fetch index: its staging bit is set, so it is only counted. ``limit``
    bounds the entries taken and must not exceed those that await no reset,
    ``entries - (fetch_total - reset_total)``: so a ring's own RESET entries are never taken for such
    leavings. ``pages`` takes (fetch index, slot word, offset) triples for
    tracing, or has length 0.

    out[0] harvested, out[1] dropped as bad, out[2] slot word and out[3] offset of the last entry.
    """
    mask = np.uint64(entries - np.uint32(1))
    tracing = len(pages) > 0
    count = _ZERO
    bad = _ZERO
    slot_word = np.uint32(out[2])
    offset = out[3]
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
        if as_id < _NR_AS and slot_id < slots.shape[0] and offset < slots[slot_id, 2]:
            summary = np.int64(slots[slot_id, 1] + ((offset >> _GROUP_SHIFT >> np.uint64(6)) << np.uint64(3)))
            store_u64(summary, load_u64(summary) | (_ONE << ((offset >> _GROUP_SHIFT) & np.uint64(63))))
            word = np.int64(slots[slot_id, 0] + ((offset >> np.uint64(6)) << np.uint64(3)))
            store_u64(word, load_u64(word) | (_ONE << (offset & np.uint64(63))))
        else:
            bad += _ONE
        store_release_u32(entry, _RESET)
        if tracing:
            i = count * np.uint64(3)
            pages[i] = fetch + count
            pages[i + _ONE] = np.uint64(slot_word)
            pages[i + np.uint64(2)] = offset
        count += _ONE
    out[0] = count
    out[1] = bad
    out[2] = np.uint64(slot_word)
    out[3] = offset


@njit(types.uint64(_u64_1d, _u64_1d, _u64_1d, _u64_1d), cache=True, nogil=True)
def publish(src, src_summary, dst, dst_summary):  # type: ignore[no-untyped-def]
    """``dst |= src; src = 0``, group by group; the number of bits that were new in ``dst``.

    Each word is set in ``dst`` before it is cleared in ``src``, and the summary of ``src`` last:
    repeating an interrupted call is harmless. Serves staging -> slot bitmap.
    """
    fresh = _ZERO
    for s in range(len(src_summary)):
        groups = src_summary[s]
        if groups == _ZERO:
            continue
        dst_summary[s] |= groups
        g = groups
        while g != _ZERO:
            low = g & (~g + _ONE)
            g ^= low
            first = (s * 64 + _log2(low)) * GROUP_WORDS
            for w in range(first, min(first + GROUP_WORDS, len(src))):
                bits = src[w]
                if bits != _ZERO:
                    fresh += _popcount(bits & ~dst[w])
                    dst[w] |= bits
                    src[w] = _ZERO
        src_summary[s] = _ZERO
    return fresh


@njit(types.void(_u64_1d, _u64_1d, _u64_1d, _u64_1d), cache=True, nogil=True)
def fold(src, src_summary, dst, dst_summary):  # type: ignore[no-untyped-def]
    """``dst |= src`` where src is dirty; src unchanged. Serves slot bitmap -> client bitmaps."""
    for s in range(len(src_summary)):
        groups = src_summary[s]
        if groups == _ZERO:
            continue
        dst_summary[s] |= groups
        while groups != _ZERO:
            low = groups & (~groups + _ONE)
            groups ^= low
            first = (s * 64 + _log2(low)) * GROUP_WORDS
            for w in range(first, min(first + GROUP_WORDS, len(src))):
                dst[w] |= src[w]


@njit(types.void(_u64_1d, _u64_1d), cache=True, nogil=True)
def clear(words, summary):  # type: ignore[no-untyped-def]
    """Zero a bitmap where its summary says that something may be set; the summary last."""
    for s in range(len(summary)):
        groups = summary[s]
        while groups != _ZERO:
            low = groups & (~groups + _ONE)
            groups ^= low
            first = (s * 64 + _log2(low)) * GROUP_WORDS
            words[first : min(first + GROUP_WORDS, len(words))] = _ZERO
        summary[s] = _ZERO
