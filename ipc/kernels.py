"""The hot loops, compiled by Numba once and cached: harvest, publish, fold.

Import this module late (it costs about 0.4 s): the coordinator does so while its workers start.

Everything a ring entry says is checked against the slot table (ipc.bitmap.slot_table).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.core import types

from .atomics import fence_release, load_acquire_u32, load_u32, load_u64, popcount, store_release_u32, store_u64
from .bitmap import GROUP_WORDS
from .layout import DIRTY_GFN_F_DIRTY, DIRTY_GFN_F_RESET, NR_ADDRESS_SPACES

__all__ = ["clear", "fold", "harvest", "publish", "take"]

_DIRTY = np.uint32(DIRTY_GFN_F_DIRTY)
_RESET = np.uint32(DIRTY_GFN_F_RESET)
_NONE = np.uint32(0)
_NR_AS = np.uint32(NR_ADDRESS_SPACES)
_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_GROUP_SHIFT = np.uint64(12)  # pages of a summary bit: 64 words of 64 pages
assert GROUP_WORDS * 64 == 1 << 12

_u64_1d = types.Array(types.uint64, 1, "C")
_u64_2d = types.Array(types.uint64, 2, "C")


@njit(types.int64(types.uint64), cache=True, inline="always")
def _log2(power):  # type: ignore[no-untyped-def]
    """Index of the one set bit of ``power``."""
    return np.int64(popcount(power - _ONE))


@njit(types.void(types.int64, types.uint32, types.uint64, types.uint64, _u64_2d, _u64_1d, _u64_1d),
      cache=True, nogil=True)
def harvest(ring, entries, fetch, limit, slots, out, pages):  # type: ignore[no-untyped-def]
    """Harvest one ring in sequence (seed: kvm_dirty_ring_reap_one).

    For each DIRTY entry from index ``fetch``: set its bit in the slot's staging bitmap, then
    release-store RESET. Entries in a row that fall into one word of the bitmap are one store to it, then their
    flags: a walk over memory then does not wait for the word again and again. An entry found in RESET already
    was harvested by a predecessor that died before it could store its fetch index: its staging bit is set, so it
    is only counted. ``limit``
    bounds the entries taken and must not exceed those that await no reset,
    ``entries - (fetch_total - reset_total)``: so a ring's own RESET entries are never taken for such
    leavings. ``pages`` takes (fetch index, slot word, offset) triples for
    tracing, or has length 0.

    out[0] harvested, out[1] dropped as bad, out[2] slot word and out[3] offset of the last entry.
    """
    mask = np.uint64(entries - np.uint32(1))
    count = _ZERO
    bad = _ZERO
    slot_word = np.uint32(out[2])
    offset = out[3]
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
            if slot_word >> np.uint32(16) < _NR_AS and slot_id < slots.shape[0]:
                words, summaries, total = slots[slot_id, 0], slots[slot_id, 1], slots[slot_id, 2]
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
    if len(pages):      # the entries are there until the reset
        for i in range(count):
            entry = ring + np.int64(((fetch + np.uint64(i)) & mask) << np.uint64(4))
            pages[3 * i] = fetch + np.uint64(i)
            pages[3 * i + 1] = np.uint64(load_u32(entry + 4))
            pages[3 * i + 2] = load_u64(entry + 8)
    out[0] = count
    out[1] = bad
    out[2] = np.uint64(slot_word)
    out[3] = offset


@njit(types.uint64(_u64_1d, _u64_1d), cache=True, inline="always")
def _merge_counting(src, dst):  # type: ignore[no-untyped-def]
    """``dst |= src``; bits that were new. (Loops like this one are compiled to vector instructions.)"""
    fresh = _ZERO
    for w in range(len(src)):
        fresh += popcount(src[w] & ~dst[w])
        dst[w] |= src[w]
    return fresh


@njit(types.uint64(_u64_1d, _u64_1d, _u64_1d, _u64_1d), cache=True, nogil=True)
def publish(src, src_summary, dst, dst_summary):  # type: ignore[no-untyped-def]
    """``dst |= src; src = 0``, group by group; the number of bits that were new in ``dst``.

    Each group is set in ``dst`` before it is cleared in ``src``, and the summary of ``src`` last:
    repeating an interrupted call is harmless. Serves staging -> slot bitmap.
    """
    fresh = _ZERO
    for s in range(len(src_summary)):
        groups = src_summary[s]
        if groups == _ZERO:
            continue
        dst_summary[s] |= groups
        while groups != _ZERO:
            low = groups & (~groups + _ONE)
            groups ^= low
            first = (s * 64 + _log2(low)) * GROUP_WORDS
            source = src[first : first + GROUP_WORDS]
            fresh += _merge_counting(source, dst[first : first + GROUP_WORDS])
            fence_release()
            source[:] = _ZERO
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
            source, target = src[first : first + GROUP_WORDS], dst[first : first + GROUP_WORDS]
            for w in range(len(source)):
                target[w] |= source[w]


@njit(types.void(_u64_1d, _u64_1d), cache=True, nogil=True)
def clear(words, summary):  # type: ignore[no-untyped-def]
    """Zero a bitmap where its summary says that something may be set; the summary last."""
    for s in range(len(summary)):
        groups = summary[s]
        while groups != _ZERO:
            low = groups & (~groups + _ONE)
            groups ^= low
            first = (s * 64 + _log2(low)) * GROUP_WORDS
            words[first : first + GROUP_WORDS] = _ZERO
        summary[s] = _ZERO


@njit(types.uint64(_u64_1d, _u64_1d, _u64_1d, _u64_1d, _u64_1d, _u64_1d), cache=True, nogil=True)
def take(slot, slot_summary, gathering, gathering_summary, front, front_summary):  # type: ignore[no-untyped-def]
    """What fold(slot, gathering), clear(slot), clear(front) and publish(gathering, front) come to, in one pass over
    memory: for a log with a single client. The number of bits in ``front``."""
    taken = _ZERO
    for s in range(len(slot_summary)):
        fresh = slot_summary[s]
        older = gathering_summary[s]
        stale = front_summary[s] & ~(fresh | older)
        groups = fresh | older | stale
        if groups == _ZERO:
            continue
        front_summary[s] = groups
        while groups != _ZERO:
            low = groups & (~groups + _ONE)
            groups ^= low
            first = (s * 64 + _log2(low)) * GROUP_WORDS
            target = front[first : first + GROUP_WORDS]
            if low & stale:
                target[:] = _ZERO
                continue
            source = slot[first : first + GROUP_WORDS]
            if low & older:
                kept = gathering[first : first + GROUP_WORDS]
                for w in range(len(target)):
                    target[w] = source[w] | kept[w]
                    taken += popcount(target[w])
                fence_release()
                kept[:] = _ZERO
            else:
                for w in range(len(target)):
                    target[w] = source[w]
                    taken += popcount(target[w])
                fence_release()
            source[:] = _ZERO
        front_summary[s] = fresh | older
        slot_summary[s] = _ZERO
        gathering_summary[s] = _ZERO
    return taken
