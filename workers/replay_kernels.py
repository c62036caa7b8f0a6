"""The replay accelerator's loops: a producer that dirties pages, and the reset of its ring.

Both threads of a worker run at once, the vCPU thread in :func:`produce` and the service thread in
:func:`reset`, without a lock. A page has a bit in each of two arrays: ``pushed``, which the producer alone writes,
and ``reset``, which the reset alone writes. Equal bits mean that the page is protected: its next write makes an
entry and flips its bit in ``pushed``; the reset of that entry flips its bit in ``reset``. So neither needs an
atomic read-modify-write. (A producer that sees a reset late takes its write for one that came before it, which
it may: a kick, or the acknowledged reset, has both caches agree.)
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numba import carray, from_dtype, njit, types
from numba.extending import intrinsic

from ipc.atomics import (
    load_acquire_u32,
    load_acquire_u64,
    load_u64,
    store_release_u64,
    store_u64,
)
from ipc.layout import DIRTY_GFN_F_RESET
from ipc.ring import publish_entry

__all__ = ["PRODUCER", "QUANTILES", "SLOT", "Left", "Pattern", "produce", "reset"]

#: Equal steps of probability between the quantiles of a Zipf distribution.
QUANTILES = 1 << 14


class Pattern(IntEnum):
    """Which page is written next. *k* counts the writes of a phase, *n* the pages of the vCPU's share."""

    SEQUENTIAL = 0      # k mod n
    STRIDED = 1         # k * stride mod n
    RANDOM = 2          # uniform
    ZIPF = 3            # the quantile of a uniform number
    TRACE = 4           # as recorded


class Left(IntEnum):
    """Why :func:`produce` has come back."""

    DONE = 0            # it has made its writes
    FULL = 1            # soft-full
    KICKED = 2          # asked out, or at the push limit


#: A memory slot. The pages of all slots, in the order of the machine's file, are numbered through.
SLOT = np.dtype([
    ("first", np.uint64), ("end", np.uint64),       # its pages among all
    ("id", np.uint64),
    ("logged", np.uint64),
    ("record", np.int64),           # address of the words of the verifier's record; 0: none is kept
    ("summary", np.int64),          # and of its summary (ipc/bitmap.py)
])

#: What a producer knows. Written by the vCPU thread but where it says otherwise. Addresses are int64.
PRODUCER = np.dtype([
    ("ring", np.int64), ("entries", np.uint64),
    ("soft_limit", np.uint64),      # entries in use at which the vCPU is to be left
    ("pushed", np.uint64),          # entries, since the ring was built
    ("push_limit", np.uint64),      # value of ``pushed`` at which it is to be left (dirty limit)
    ("reset", np.int64),            # address of the count of entries reset (u64, by the service thread)
    ("immediate_exit", np.int64),   # address of the control block's flag (u32)
    ("pushed_total", np.int64),     # address of the control block's
    ("pushed_bits", np.int64),      # address of a bit a page of the share; 0: every write makes an entry
    ("reset_bits", np.int64),
    ("slots", np.int64), ("slot_count", np.int64),      # address of SLOT records
    ("first", np.uint64), ("pages", np.uint64),         # this vCPU's share
    ("seed", np.uint64),
    ("written", np.uint64),         # writes made in all
    # the phase
    ("pattern", np.int64),
    ("cursor", np.uint64),          # sequential, strided: the next page of the share; trace: the next entry
    ("stride", np.uint64),
    ("quantiles", np.int64),        # address of QUANTILES + 1 float64
    ("trace", np.int64),            # address of the trace's entries, uint64: slot id << 48 | page
])

_SLOT_POINTER = types.CPointer(from_dtype(SLOT))
_DOUBLE_POINTER = types.CPointer(types.float64)
_u64, _i64 = types.uint64, types.int64
_STATE = types.Array(from_dtype(PRODUCER), 1, "C")
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


def _cast(pointer_type: Any) -> Any:
    def cast(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

        return pointer_type(types.int64), codegen

    return intrinsic(cast)


_slots_at = _cast(_SLOT_POINTER)
_doubles_at = _cast(_DOUBLE_POINTER)


@njit(_u64(_u64), cache=True, inline="always")
def _mix(z):  # type: ignore[no-untyped-def]
    """SplitMix64's output function (Steele, Lea, Flood 2014): a number from a counter."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return z ^ (z >> np.uint64(31))


@njit(types.void(_i64, _i64, _u64), cache=True, inline="always")
def _note(words, summary, page):  # type: ignore[no-untyped-def]
    """Set the page's bit in a record, its summary first. Behind the entry, which is there already."""
    at = summary + np.int64((page >> np.uint64(18)) << np.uint64(3))
    store_release_u64(at, load_u64(at) | (_ONE << ((page >> np.uint64(12)) & np.uint64(63))))
    at = words + np.int64((page >> np.uint64(6)) << np.uint64(3))
    store_release_u64(at, load_u64(at) | (_ONE << (page & np.uint64(63))))


@njit(_i64(_STATE, _u64), cache=True, nogil=True)
def produce(state, count):  # type: ignore[no-untyped-def]
    """Make ``count`` writes, or fewer; a value of Left. ``state``: PRODUCER, shape [1]."""
    c = state[0]
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


@njit(_u64(_STATE, types.Array(_i64, 1, "C")), cache=True, nogil=True)
def reset(state, bases):  # type: ignore[no-untyped-def]
    """Free the harvested entries, in sequence, and protect their pages again; how many.

    ``bases``, int64 [slot ids]: a slot's first page, counted from that of the vCPU's share. The service thread's.
    """
    c = state[0]
    ring, mask, reset_bits = c.ring, c.entries - _ONE, c.reset_bits
    at = load_u64(c.reset)
    count = _ZERO
    while count < c.entries:
        entry = ring + np.int64(((at + count) & mask) << np.uint64(4))
        word = load_acquire_u64(entry)
        if not word & _RESET_FLAG:
            break
        slot_id = word >> np.uint64(32)
        if reset_bits and slot_id < len(bases):
            page = np.uint64(bases[slot_id] + np.int64(load_u64(entry + 8)))
            if page < c.pages:
                where = reset_bits + np.int64((page >> np.uint64(6)) << np.uint64(3))
                store_release_u64(where, load_u64(where) ^ (_ONE << (page & np.uint64(63))))
        store_release_u64(entry, _ZERO)
        count += _ONE
        if count & (_CHUNK - _ONE) == _ZERO:
            store_release_u64(c.reset, at + count)      # the producer need not wait for the whole of it
    store_release_u64(c.reset, at + count)
    return count
