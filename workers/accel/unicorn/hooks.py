"""The software CPU's native hooks, as Numba compiles them: write tracking, leaving the guest, locked instructions.
workers/accel/unicorn/calls.py has them to call.

Unicorn calls these from generated code; they take no lock and no GIL. Measured (benchmarks/tracking.py): they cost
a loop that does nothing but store half of its speed, where userfaultfd takes 11 us and more for each first write to
a page.

Three rules of Unicorn 2.1.4 shape them:

* The write hook is called *before* the store. An entry may be harvested before the guest's value is in
  memory, as with KVM; so pages are re-protected only while the guest is outside the emulation, where no
  store is pending (workers/accel/unicorn/cpu.py).
* After ``uc_emu_stop`` the emulation is left at the next *memory access*, and the program counter is put
  back to the start of that instruction: ``incq (mem)`` would be done twice. Only from a block's hook, or
  the hook of an instruction not begun yet, it is left between two instructions. So nothing else calls it:
  writes, other threads and signals set a flag, which the next block's hook looks at.
* A locked instruction is a plain load and a plain store to it. Their code hooks do the work with the
  host's atomics instead, and go on behind them.
"""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types

from ipc.compiled.atomics import load_u8, load_u32

from .context import PAGE_CODE, PAGE_LOGGED, SEEN_BLOCKS, WRITABLE, Stop
from .locked import on_locked
from .native import CONTEXT_POINTER, call_stop, context_at, seen_at, slots_at
from .paging import code_sum, entry_in, entry_of, on_fill, place_of
from .writes import find_slot, log_of, log_write, reset_of

__all__ = ["EXPORTS"]

_i64, _u64, _i32 = types.int64, types.uint64, types.int32
_LOGGED = np.uint8(PAGE_LOGGED)
_UNSEEN, _SPECIAL, _CALL, _CHANGED = (
    np.uint64(each) for each in (Stop.UNSEEN, Stop.SPECIAL, Stop.CALL, Stop.CHANGED))
_SEEN_MASK = np.uint64(SEEN_BLOCKS - 1)
_SEEN_MOST = np.uint64(SEEN_BLOCKS // 2)
_HASH = np.uint64(0x9E37_79B9_7F4A_7C15)    # 2**64 / golden ratio (Knuth, TAOCP vol. 3, 6.4)
_ZERO, _ONE, _WRITABLE = np.uint64(0), np.uint64(1), np.uint64(WRITABLE)
_CODE = np.uint8(PAGE_CODE)
_OFFSET, _PAGE = np.uint64(4095), np.uint64(4096)
#: A byte of every instruction that is looked for: the LOCK prefix (and the last byte of MFENCE), XCHG (SDM vol. 2).
_LOCK, _XCHG_8, _XCHG = np.uint8(0xF0), np.uint8(0x86), np.uint8(0x87)


def _on_write(engine, kind, gpa, size, value, at):  # type: ignore[no-untyped-def]
    """UC_HOOK_MEM_WRITE: before every store, with its physical address."""
    context = context_at(at)
    c = carray(context, 1)[0]
    slots = carray(slots_at(c.slots), c.slot_count)
    last = c.last_slot
    # The short way: within one page of the slot written last, and that page needs no entry.
    if last < c.slot_count and slots[last].gpa <= gpa and gpa + size <= slots[last].end:
        offset = gpa - slots[last].gpa
        if (offset & 4095) + size <= 4096 and load_u8(slots[last].flags + (offset >> 12)) == _LOGGED:
            return
    log_write(context, gpa, np.int64(size))


@njit(types.void(CONTEXT_POINTER, _u64, _u64))
def _put(context, address, size):  # type: ignore[no-untyped-def]
    c = carray(context, 1)[0]
    seen = carray(seen_at(c.seen), SEEN_BLOCKS)
    at = ((address * _HASH) >> np.uint64(40)) & _SEEN_MASK
    while seen[at].size and not (seen[at].sum and seen[at].address == address):     # it takes its own old place
        at = (at + _ONE) & _SEEN_MASK
    seen[at].address = address
    seen[at].size = size
    seen[at].sum = code_sum(context, address, size) if c.root else _ZERO
    c.seen_count += _ONE


def _remember(context, address, size):  # type: ignore[no-untyped-def]
    _put(context_at(context), address, size)


@njit(types.boolean(CONTEXT_POINTER, _u64, _i64))
def _is_plain(context, address, size):  # type: ignore[no-untyped-def]
    """A block of a program, in a page that is known to have code and cannot be written to, has no locked instruction,
    XCHG or MFENCE."""
    c = carray(context, 1)[0]
    if not c.root or c.seen_count >= _SEEN_MOST or (address & _OFFSET) + np.uint64(size) > _PAGE:
        return False
    entry = entry_of(context, address)
    gpa = place_of(entry, address)
    i = find_slot(context, gpa)
    if i < 0:
        return False
    slot = carray(slots_at(c.slots), c.slot_count)[i]
    if entry & _WRITABLE or not load_u8(slot.flags + ((gpa - slot.gpa) >> 12)) & _CODE:
        return False
    begin = slot.host + gpa - slot.gpa
    for at in range(begin, begin + size):
        byte = load_u8(at)
        if byte in (_LOCK, _XCHG_8, _XCHG):
            return False
    return True


def _on_block(engine, address, size, at_context):  # type: ignore[no-untyped-def]
    """UC_HOOK_BLOCK: before a block's first instruction, the one place to leave from."""
    context = context_at(at_context)
    c = carray(context, 1)[0]
    if c.stop or c.hold or load_u32(c.immediate_exit):
        call_stop(c.emu_stop, engine)
        return
    seen = carray(seen_at(c.seen), SEEN_BLOCKS)
    at = ((np.uint64(address) * _HASH) >> np.uint64(40)) & _SEEN_MASK
    while seen[at].size:
        if seen[at].address == np.uint64(address) and seen[at].size >= np.uint64(size):
            if seen[at].sum and code_sum(context, seen[at].address, seen[at].size) != seen[at].sum:
                c.block, c.block_size = seen[at].address, seen[at].size
                c.stop |= _CHANGED
                call_stop(c.emu_stop, engine)
            return
        at = (at + _ONE) & _SEEN_MASK
    if _is_plain(context, np.uint64(address), np.int64(size)):
        _put(context, np.uint64(address), np.uint64(size))
        return
    c.block = np.uint64(address)
    c.block_size = np.uint64(size)
    c.stop |= _UNSEEN
    call_stop(c.emu_stop, engine)


def _on_special(engine, address, size, context):  # type: ignore[no-untyped-def]
    """UC_HOOK_CODE of an instruction that the run loop carries out: leave before it."""
    c = carray(context_at(context), 1)[0]
    c.special = np.uint64(address)
    c.stop |= _SPECIAL
    call_stop(c.emu_stop, engine)


def _on_call(engine, context):  # type: ignore[no-untyped-def]
    """UC_HOOK_INSN of ``syscall``, which ends its block: the emulation is left behind it."""
    c = carray(context_at(context), 1)[0]
    c.stop |= _CALL
    call_stop(c.emu_stop, engine)


_BLOCK = types.void(_i64, _i64, _i32, _i64)     # uc_cb_hookcode_t
EXPORTS = {
    "on_write": (_on_write, types.void(_i64, _i32, _i64, _i32, _i64, _i64)),    # uc_cb_hookmem_t
    "on_block": (_on_block, _BLOCK),
    "on_special": (_on_special, _BLOCK),
    "on_locked": (on_locked, _BLOCK),
    "on_fill": (on_fill, _i32(_i64, _u64, _i32, _i64, _i64)),   # uc_cb_tlbevent_t
    "on_call": (_on_call, types.void(_i64, _i64)),              # uc_cb_insn_syscall_t
    "entry_of": (entry_in, _u64(_i64, _u64)),
    "log_write": (log_of, types.void(_i64, _i64, _i64)),
    "remember": (_remember, types.void(_i64, _u64, _u64)),
    "reset": (reset_of, _u64(_i64)),
}
