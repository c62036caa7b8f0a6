"""A Linux program's addresses: Unicorn asks for each page that it has no translation of, and is answered from the page
tables of the program's system (workers/linux/tables.py). Imported to compile only (hooks.py).

A page may be written to once its entry is in the log: until then the translation has no right to that, and the first
store asks again. So a store costs nothing here, and one that lies in two pages is logged in both. Whoever has pages
logged again drops the translations (workers/accel/unicorn/program.py).
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from unicorn import unicorn_const as uconst

from ipc.compiled.atomics import load_u8, load_u64

from .context import FRAME, NO_EXECUTE, PAGE_LOGGED, PRESENT, USER, WRITABLE
from .native import CONTEXT_POINTER, context_at, slots_at, translation_at
from .writes import find_slot, log_write

__all__ = ["code_sum", "entry_in", "entry_of", "on_fill", "permitted", "place_of"]

_i64, _u64, _i32 = types.int64, types.uint64, types.int32
_PRESENT, _WRITE, _USER, _NO_EXECUTE = np.uint64(PRESENT), np.uint64(WRITABLE), np.uint64(USER), np.uint64(NO_EXECUTE)
_FRAME = np.uint64(FRAME)
_OFFSET = np.uint64(0xFFF)
_INDEX = np.uint64(511)
#: Of a page fault's error code (SDM 3A, 4.7).
_BY_WRITE, _BY_USER, _BY_FETCH = np.uint64(2), np.uint64(4), np.uint64(16)
_PAGE_FAULT, _PROTECTION = np.uint64(14), np.uint64(13)
_LOGGED = np.uint8(PAGE_LOGGED)
_LOWER_HALF, _UPPER_HALF = np.uint64(1 << 47), np.uint64((1 << 64) - (1 << 47))
_ZERO, _ONE = np.uint64(0), np.uint64(1)
_FNV_BASIS, _FNV_PRIME = np.uint64(0xCBF2_9CE4_8422_2325), np.uint64(0x100_0000_01B3)

_MEM_WRITE, _MEM_FETCH = uconst.UC_MEM_WRITE, uconst.UC_MEM_FETCH
_READ_RIGHT, _WRITE_RIGHT, _EXECUTE_RIGHT = uconst.UC_PROT_READ, uconst.UC_PROT_WRITE, uconst.UC_PROT_EXEC


@njit(_u64(CONTEXT_POINTER, _u64))
def entry_of(context, address):  # type: ignore[no-untyped-def]
    """Of its page; 0 where there is none. Tables above the last have all rights."""
    c = carray(context, 1)[0]
    entry = c.root
    for level in range(4):
        table = entry & _FRAME
        if table < c.tables_gpa or table >= c.tables_end:
            return _ZERO
        index = (address >> np.uint64(39 - 9 * level)) & _INDEX
        entry = load_u64(c.tables + np.int64(table - c.tables_gpa + (index << np.uint64(3))))
        if not entry & _PRESENT:
            return _ZERO
    return entry


@njit(_u64(CONTEXT_POINTER, _u64, _i64))
def permitted(context, address, access):  # type: ignore[no-untyped-def]
    """The entry of its page, where the program may access it so (UC_MEM_*); else 0, and the fault is in the context."""
    c = carray(context, 1)[0]
    c.fault_vector, c.fault_address = _PAGE_FAULT, address
    if _LOWER_HALF <= address < _UPPER_HALF:
        c.fault_vector, c.fault_error = _PROTECTION, _ZERO
        return _ZERO
    entry = entry_of(context, address)
    error = _BY_USER | (entry & _PRESENT)
    right = entry & _USER != _ZERO
    if access == _MEM_WRITE:
        error |= _BY_WRITE
        right = right and entry & _WRITE != _ZERO
    elif access == _MEM_FETCH:
        error |= _BY_FETCH
        right = right and entry & _NO_EXECUTE == _ZERO
    c.fault_error = error
    return entry if right else _ZERO


@njit(_i64(_u64, _u64))
def place_of(entry, address):  # type: ignore[no-untyped-def]
    """The GPA behind an address in a page that has this entry."""
    return np.int64((entry & _FRAME) | (address & _OFFSET))


def on_fill(engine, address, access, translation, at):  # type: ignore[no-untyped-def]
    """UC_HOOK_TLB_FILL, with the address of the page. Where it is not allowed the instruction has not begun."""
    context = context_at(at)
    entry = permitted(context, address, np.int64(access))
    if not entry:
        return np.int32(0)
    c = carray(context, 1)[0]
    gpa = place_of(entry, _ZERO)
    rights = _READ_RIGHT
    if not entry & _NO_EXECUTE:
        rights |= _EXECUTE_RIGHT
    if access == _MEM_WRITE:
        log_write(context, gpa, np.int64(1))
        rights |= _WRITE_RIGHT
    elif entry & _WRITE:
        i = find_slot(context, gpa)
        if i >= 0:
            slot = carray(slots_at(c.slots), c.slot_count)[i]
            if load_u8(slot.flags + ((gpa - slot.gpa) >> 12)) == _LOGGED:
                rights |= _WRITE_RIGHT
    found = carray(translation_at(translation), 1)[0]
    found.address = np.uint64(gpa)
    found.rights = np.int32(rights)
    return np.int32(1)


@njit(_u64(CONTEXT_POINTER, _u64, _u64))
def code_sum(context, address, size):  # type: ignore[no-untyped-def]
    """Of code that the program may write to, never 0 (FNV-1a, by words); of other code 0: who writes to that is noticed
    otherwise. Code can be changed by other vCPUs, and by the system."""
    c = carray(context, 1)[0]
    end = address + size
    total = _FNV_BASIS
    writable = False
    at = address
    while at < end:
        entry = entry_of(context, at)
        gpa = place_of(entry, at)
        part = min(end, (at | _OFFSET) + _ONE) - at
        i = find_slot(context, gpa)
        if i >= 0 and entry & _WRITE:
            writable = True
            slot = carray(slots_at(c.slots), c.slot_count)[i]
            place = slot.host + gpa - slot.gpa
            last = place + np.int64(part)
            while place < last:
                if place & 7 == 0 and place + 8 <= last:
                    total = (total ^ load_u64(place)) * _FNV_PRIME
                    place += 8
                else:
                    total = (total ^ np.uint64(load_u8(place))) * _FNV_PRIME
                    place += 1
        at += part
    return total | _ONE if writable else _ZERO


def entry_in(context, address):  # type: ignore[no-untyped-def]
    return entry_of(context_at(context), address)
