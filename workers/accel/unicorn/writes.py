"""Dirty logging at the guest's speed: an entry at the first store to a page since it was last reset. Imported to
compile only (hooks.py)."""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types

from ipc.compiled.atomics import (
    load_acquire_u32,
    load_u8,
    load_u32,
    load_u64,
    store_release_u32,
    store_u8,
    store_u64,
)
from ipc.compiled.loops import publish_entry
from ipc.layout import DIRTY_GFN_F_RESET

from .context import PAGE_CODE, PAGE_LOGGED, SEEN_BLOCKS, Stop
from .native import CONTEXT_POINTER, context_at, seen_at, slots_at

__all__ = ["find_slot", "log_of", "log_write", "reset_of"]

_i64, _u64 = types.int64, types.uint64
_LOGGED, _CODE = np.uint8(PAGE_LOGGED), np.uint8(PAGE_CODE)
_FULL, _CODE_WRITTEN = np.uint64(Stop.FULL), np.uint64(Stop.CODE_WRITTEN)
_RESET = np.uint32(DIRTY_GFN_F_RESET)
_ZERO, _ONE = np.uint64(0), np.uint64(1)


@njit(types.void(CONTEXT_POINTER, _i64, _u64))
def _push(context, slot_id, page):  # type: ignore[no-untyped-def]
    """Publish an entry. What does not fit is counted: the ring has lost count then (invariant 3)."""
    c = carray(context, 1)[0]
    used = c.pushed - c.reset
    if used >= c.entries:
        c.overflowed += _ONE
        c.stop |= _FULL
        return
    entry = c.ring + np.int64((c.pushed & (c.entries - _ONE)) << np.uint64(4))
    publish_entry(entry, np.uint64(slot_id), page)
    c.pushed += _ONE
    store_u64(c.pushed_total, c.pushed)
    if used + _ONE >= c.soft_limit or c.pushed >= c.push_limit:
        c.stop |= _FULL


@njit(_i64(CONTEXT_POINTER, _i64))
def find_slot(context, gpa):  # type: ignore[no-untyped-def]
    """Index of the slot that holds ``gpa``; -1 outside RAM."""
    c = carray(context, 1)[0]
    slots = carray(slots_at(c.slots), c.slot_count)
    last = c.last_slot
    if last < c.slot_count and slots[last].gpa <= gpa < slots[last].end:
        return last
    for i in range(c.slot_count):
        if slots[i].gpa <= gpa < slots[i].end:
            c.last_slot = i
            return i
    return np.int64(-1)


@njit(types.void(CONTEXT_POINTER, _i64, _i64))
def _code_written(context, first, end):  # type: ignore[no-untyped-def]
    """A page with code is written: is it the code of a block that was looked at? (Of a program, whose blocks are where
    its page tables have them, any is.)"""
    c = carray(context, 1)[0]
    if c.root:
        c.stop |= _CODE_WRITTEN
        return
    seen = carray(seen_at(c.seen), SEEN_BLOCKS)
    for i in range(SEEN_BLOCKS):
        if seen[i].size and seen[i].address < np.uint64(end) and np.uint64(first) < seen[i].address + seen[i].size:
            c.stop |= _CODE_WRITTEN
            return


@njit(types.void(CONTEXT_POINTER, _i64, _i64))
def log_write(context, gpa, size):  # type: ignore[no-untyped-def]
    """Guest memory [gpa, gpa + size) is about to be written."""
    c = carray(context, 1)[0]
    end = gpa + size
    at = gpa
    while at < end:
        i = find_slot(context, at)
        after = (at | 4095) + 1
        if i >= 0:
            slot = carray(slots_at(c.slots), c.slot_count)[i]
            page = (at - slot.gpa) >> 12
            flags = load_u8(slot.flags + page)
            if flags & _CODE:
                _code_written(context, at, min(after, end))
            if not flags & _LOGGED:
                store_u8(slot.flags + page, flags | _LOGGED)
                if c.ring:
                    _push(context, slot.id, np.uint64(page))
        at = after


@njit(_u64(CONTEXT_POINTER))
def _reset_ring(context):  # type: ignore[no-untyped-def]
    c = carray(context, 1)[0]
    slots = carray(slots_at(c.slots), c.slot_count)
    count = _ZERO
    while c.reset < c.pushed:
        entry = c.ring + np.int64((c.reset & (c.entries - _ONE)) << np.uint64(4))
        if not load_acquire_u32(entry) & _RESET:
            break
        slot_id = np.int64(load_u32(entry + 4))
        page = np.int64(load_u64(entry + 8))
        for i in range(c.slot_count):
            if slots[i].id == slot_id and page < (slots[i].end - slots[i].gpa) >> 12:
                flags = slots[i].flags + page
                store_u8(flags, load_u8(flags) & ~_LOGGED)
        store_release_u32(entry, np.uint32(0))
        c.reset += _ONE
        count += _ONE
    return count


def reset_of(context):  # type: ignore[no-untyped-def]
    return _reset_ring(context_at(context))


def log_of(context, gpa, size):  # type: ignore[no-untyped-def]
    log_write(context_at(context), gpa, size)
