"""The replay accelerator's loops, as Numba compiles them: a producer that dirties pages, and the reset of its ring.
workers/accel/replay/calls.py has them to call.

Both threads of a worker run at once, the vCPU thread in :func:`_produce` and the service thread in
:func:`_reset`, without a lock. A page has a bit in each of two arrays: ``pushed``, which the producer alone writes,
and ``reset``, which the reset alone writes. Equal bits mean that the page is protected: its next write makes an
entry and flips its bit in ``pushed``; the reset of that entry flips its bit in ``reset``. So neither needs an
atomic read-modify-write. (A producer that sees a reset late takes its write for one that came before it, which
it may: a kick, or the acknowledged reset, has both caches agree.)
"""

from __future__ import annotations

import numpy as np
from numba import carray, from_dtype, njit, types

from ipc.compiled.atomics import cast_to, load_acquire_u32, load_acquire_u64, load_u64, store_release_u64, store_u64
from ipc.compiled.loops import publish_entry
from ipc.layout import DIRTY_GFN_F_RESET

from .layout import PRODUCER, QUANTILES, SLOT, Left, Pattern

__all__ = ["EXPORTS"]

_u64, _i64 = types.uint64, types.int64
_RESET_FLAG = np.uint64(DIRTY_GFN_F_RESET)
_ZERO, _ONE = np.uint64(0), np.uint64(1)
_GOLDEN = np.uint64(0x9E37_79B9_7F4A_7C15)      # 2**64 / golden ratio
_LOW_32 = np.uint64(0xFFFF_FFFF)
_CHUNK = np.uint64(512)         # writes between two looks at the immediate-exit flag
_QUANTILE_SHIFT = np.uint64(64 - 14)
assert QUANTILES == 1 << 14
_FRACTION = 1.0 / (1 << 32)
_TRACE_SHIFT = np.uint64(48)
_TRACE_PAGE = np.uint64((1 << 48) - 1)
_SEQUENTIAL, _STRIDED, _RANDOM, _ZIPF = (int(p) for p in list(Pattern)[:4])
_DONE, _FULL, _KICKED = (int(r) for r in Left)


_producer_at = cast_to(types.CPointer(from_dtype(PRODUCER)))
_slots_at = cast_to(types.CPointer(from_dtype(SLOT)))
_doubles_at = cast_to(types.CPointer(types.float64))
_bases_at = cast_to(types.CPointer(types.int64))


@njit(_u64(_u64), inline="always")
def _mix(z):  # type: ignore[no-untyped-def]
    """SplitMix64's output function (Steele, Lea, Flood 2014): a number from a counter."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return z ^ (z >> np.uint64(31))


@njit(types.void(_i64, _i64, _u64), inline="always")
def _note(words, summary, page):  # type: ignore[no-untyped-def]
    """Set the page's bit in a record, its summary first. Behind the entry, which is there already."""
    at = summary + np.int64((page >> np.uint64(18)) << np.uint64(3))
    store_release_u64(at, load_u64(at) | (_ONE << ((page >> np.uint64(12)) & np.uint64(63))))
    at = words + np.int64((page >> np.uint64(6)) << np.uint64(3))
    store_release_u64(at, load_u64(at) | (_ONE << (page & np.uint64(63))))


def _produce(state, count):  # type: ignore[no-untyped-def]
    c = carray(_producer_at(state), 1)[0]
    slots = carray(_slots_at(c.slots), c.slot_count)
    quantiles = carray(_doubles_at(c.quantiles), QUANTILES + 1)
    pattern = c.pattern
    ring, mask = c.ring, c.entries - _ONE
    pushed_bits, reset_bits = c.pushed_bits, c.reset_bits
    first, pages = c.first, c.pages
    cursor, pushed, written = c.cursor, c.pushed, c.written
    end = written + count
    freed = load_acquire_u64(c.reset)
    # The slot of the last page: its pages among all, and what else is asked of it for each.
    low, high, slot_id, logged = _ONE, _ZERO, _ZERO, _ZERO
    record, summary = np.int64(0), np.int64(0)
    result = _DONE
    while written < end:
        if load_acquire_u32(c.immediate_exit) or pushed >= c.push_limit:
            result = _KICKED
            break
        if pushed - freed >= c.soft_limit:
            freed = load_acquire_u64(c.reset)
            if pushed - freed >= c.soft_limit:
                result = _FULL
                break
        # A write makes one entry at most: within these many no limit can be met.
        chunk = min(min(_CHUNK, end - written), min(c.soft_limit - (pushed - freed), c.push_limit - pushed))
        for _ in range(chunk):
            written += _ONE
            if pattern == _SEQUENTIAL:
                page = cursor
                cursor += _ONE
                if cursor == pages:
                    cursor = _ZERO
            elif pattern == _STRIDED:
                page = cursor
                cursor += c.stride
                if cursor >= pages:
                    cursor -= pages
            elif pattern == _RANDOM:
                page = ((_mix(c.seed + written * _GOLDEN) >> np.uint64(32)) * pages) >> np.uint64(32)
            elif pattern == _ZIPF:
                number = _mix(c.seed + written * _GOLDEN)
                step = np.int64(number >> _QUANTILE_SHIFT)
                part = np.float64(np.int64((number >> np.uint64(16)) & _LOW_32)) * _FRACTION
                rank = quantiles[step] + part * (quantiles[step + 1] - quantiles[step])
                page = min(np.uint64(np.int64(rank)), pages - _ONE)
            else:
                packed = load_u64(c.trace + np.int64(cursor << np.uint64(3)))
                cursor += _ONE
                wanted = packed >> _TRACE_SHIFT
                page = packed & _TRACE_PAGE
                for i in range(c.slot_count):
                    if slots[i].id == wanted:
                        page += slots[i].first
                        break
            among_all = first + page
            if among_all < low or among_all >= high:
                for i in range(c.slot_count):
                    if slots[i].first <= among_all < slots[i].end:
                        low, high, slot_id, logged = slots[i].first, slots[i].end, slots[i].id, slots[i].logged
                        record, summary = slots[i].record, slots[i].summary
            if not logged:
                continue
            if pushed_bits:
                word = np.int64((page >> np.uint64(6)) << np.uint64(3))
                bit = _ONE << (page & np.uint64(63))
                mine = load_u64(pushed_bits + word)
                if (mine ^ load_acquire_u64(reset_bits + word)) & bit:
                    if record:
                        _note(record, summary, among_all - low)
                    continue        # it has an entry that was not reset yet
                store_u64(pushed_bits + word, mine ^ bit)
            publish_entry(ring + np.int64((pushed & mask) << np.uint64(4)), slot_id, among_all - low)
            pushed += _ONE
            if record:
                _note(record, summary, among_all - low)
        store_u64(c.pushed_total, pushed)
    c.cursor, c.pushed, c.written = cursor, pushed, written
    return result


def _reset(state, bases, count_of_bases):  # type: ignore[no-untyped-def]
    c = carray(_producer_at(state), 1)[0]
    first_pages = carray(_bases_at(bases), count_of_bases)
    ring, mask, reset_bits = c.ring, c.entries - _ONE, c.reset_bits
    at = load_u64(c.reset)
    count = _ZERO
    while count < c.entries:
        entry = ring + np.int64(((at + count) & mask) << np.uint64(4))
        word = load_acquire_u64(entry)
        if not word & _RESET_FLAG:
            break
        slot_id = word >> np.uint64(32)
        if reset_bits and slot_id < count_of_bases:
            page = np.uint64(first_pages[slot_id] + np.int64(load_u64(entry + 8)))
            if page < c.pages:
                where = reset_bits + np.int64((page >> np.uint64(6)) << np.uint64(3))
                store_release_u64(where, load_u64(where) ^ (_ONE << (page & np.uint64(63))))
        store_release_u64(entry, _ZERO)
        count += _ONE
        if count & (_CHUNK - _ONE) == _ZERO:
            store_release_u64(c.reset, at + count)      # the producer need not wait for the whole of it
    store_release_u64(c.reset, at + count)
    return count


EXPORTS = {
    "produce": (_produce, _i64(_i64, _u64)),
    "reset": (_reset, _u64(_i64, _i64, _u64)),
}
