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

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, from_dtype, njit, types
from numba.extending import intrinsic
from unicorn import x86_const as x86

from ipc.compiled.atomics import (
    cast_to,
    cmpxchg_u8,
    cmpxchg_u16,
    cmpxchg_u32,
    cmpxchg_u64,
    cmpxchg_u128,
    fence,
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

from .context import CONTEXT, LOCKED, PAGE_CODE, PAGE_LOGGED, SEEN, SEEN_BLOCKS, SLOT, LockedOp, Stop

__all__ = ["EXPORTS"]

_i64, _u64, _u8, _i32 = types.int64, types.uint64, types.uint8, types.int32
_CONTEXT_POINTER = types.CPointer(from_dtype(CONTEXT))
_LOCKED_POINTER = types.CPointer(from_dtype(LOCKED))
_SLOT_POINTER = types.CPointer(from_dtype(SLOT))
_SEEN_POINTER = types.CPointer(from_dtype(SEEN))

_LOGGED, _CODE = np.uint8(PAGE_LOGGED), np.uint8(PAGE_CODE)
_FULL, _UNSEEN, _SPECIAL, _CODE_WRITTEN = (
    np.uint64(s) for s in (Stop.FULL, Stop.UNSEEN, Stop.SPECIAL, Stop.CODE_WRITTEN))
_RESET = np.uint32(DIRTY_GFN_F_RESET)
_SEEN_MASK = np.uint64(SEEN_BLOCKS - 1)
_HASH = np.uint64(0x9E37_79B9_7F4A_7C15)    # 2**64 / golden ratio (Knuth, TAOCP vol. 3, 6.4)
_ZERO, _ONE = np.uint64(0), np.uint64(1)
_FIELDS: Any = CONTEXT.fields
_EXCHANGE_AT, _WANTED_AT, _NEW_AT = (int(_FIELDS[n][1]) for n in ("exchange", "wanted", "new"))


# --- casts and calls that Numba has no word for -------------------------------------------------------


_context_at = cast_to(_CONTEXT_POINTER)
_locked_at = cast_to(_LOCKED_POINTER)
_slots_at = cast_to(_SLOT_POINTER)
_seen_at = cast_to(_SEEN_POINTER)


@intrinsic
def _address_of(typingctx: Any, pointer: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(pointer), codegen


def _call(builder: Any, function: Any, *args: Any) -> Any:
    kind = ir.FunctionType(ir.IntType(32), [a.type for a in args])
    return builder.call(builder.inttoptr(function, kind.as_pointer()), args)


@intrinsic
def _call_stop(typingctx: Any, function: Any, engine: Any) -> Any:
    """``uc_emu_stop(engine)``"""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, *args)

    return types.int32(types.int64, types.int64), codegen


@intrinsic
def _call_register(typingctx: Any, function: Any, engine: Any, register: Any, address: Any) -> Any:
    """``uc_reg_read`` or ``uc_reg_write(engine, register, address)``"""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        function, engine, register, address = args
        return _call(builder, function, engine, builder.trunc(register, ir.IntType(32)), address)

    return types.int32(types.int64, types.int64, types.int64, types.int64), codegen


# --- dirty logging ---------------------------------------------------------------------------------------


@njit(types.void(_CONTEXT_POINTER, _i64, _u64))
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


@njit(_i64(_CONTEXT_POINTER, _i64))
def _find_slot(context, gpa):  # type: ignore[no-untyped-def]
    """Index of the slot that holds ``gpa``; -1 outside RAM."""
    c = carray(context, 1)[0]
    slots = carray(_slots_at(c.slots), c.slot_count)
    last = c.last_slot
    if last < c.slot_count and slots[last].gpa <= gpa < slots[last].end:
        return last
    for i in range(c.slot_count):
        if slots[i].gpa <= gpa < slots[i].end:
            c.last_slot = i
            return i
    return np.int64(-1)


@njit(types.void(_CONTEXT_POINTER, _i64, _i64))
def _code_written(context, first, end):  # type: ignore[no-untyped-def]
    """A page with code is written: is it the code of a block that was looked at?"""
    c = carray(context, 1)[0]
    seen = carray(_seen_at(c.seen), SEEN_BLOCKS)
    for i in range(SEEN_BLOCKS):
        if seen[i].size and seen[i].address < np.uint64(end) and np.uint64(first) < seen[i].address + seen[i].size:
            c.stop |= _CODE_WRITTEN
            return


@njit(types.void(_CONTEXT_POINTER, _i64, _i64))
def _log_write(context, gpa, size):  # type: ignore[no-untyped-def]
    """Guest memory [gpa, gpa + size) is about to be written."""
    c = carray(context, 1)[0]
    end = gpa + size
    at = gpa
    while at < end:
        i = _find_slot(context, at)
        after = (at | 4095) + 1
        if i >= 0:
            slot = carray(_slots_at(c.slots), c.slot_count)[i]
            page = (at - slot.gpa) >> 12
            flags = load_u8(slot.flags + page)
            if flags & _CODE:
                _code_written(context, at, min(after, end))
            if not flags & _LOGGED:
                store_u8(slot.flags + page, flags | _LOGGED)
                if c.ring:
                    _push(context, slot.id, np.uint64(page))
        at = after


def _on_write(engine, kind, gpa, size, value, at):  # type: ignore[no-untyped-def]
    """UC_HOOK_MEM_WRITE: before every store, with its physical address."""
    context = _context_at(at)
    c = carray(context, 1)[0]
    slots = carray(_slots_at(c.slots), c.slot_count)
    last = c.last_slot
    # The short way: within one page of the slot written last, and that page needs no entry.
    if last < c.slot_count and slots[last].gpa <= gpa and gpa + size <= slots[last].end:
        offset = gpa - slots[last].gpa
        if (offset & 4095) + size <= 4096 and load_u8(slots[last].flags + (offset >> 12)) == _LOGGED:
            return
    _log_write(context, gpa, np.int64(size))


@njit(_u64(_CONTEXT_POINTER))
def _reset_ring(context):  # type: ignore[no-untyped-def]
    c = carray(context, 1)[0]
    slots = carray(_slots_at(c.slots), c.slot_count)
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


def _reset(context):  # type: ignore[no-untyped-def]
    return _reset_ring(_context_at(context))


def _log(context, gpa, size):  # type: ignore[no-untyped-def]
    _log_write(_context_at(context), gpa, size)


# --- leaving the guest ----------------------------------------------------------------------------------


def _remember(context, address, size):  # type: ignore[no-untyped-def]
    c = carray(_context_at(context), 1)[0]
    seen = carray(_seen_at(c.seen), SEEN_BLOCKS)
    at = ((address * _HASH) >> np.uint64(40)) & _SEEN_MASK
    while seen[at].size:
        at = (at + _ONE) & _SEEN_MASK
    seen[at].address = address
    seen[at].size = size


def _on_block(engine, address, size, context):  # type: ignore[no-untyped-def]
    """UC_HOOK_BLOCK: before a block's first instruction, the one place to leave from."""
    c = carray(_context_at(context), 1)[0]
    if c.stop or c.hold or load_u32(c.immediate_exit):
        _call_stop(c.emu_stop, engine)
        return
    seen = carray(_seen_at(c.seen), SEEN_BLOCKS)
    at = ((np.uint64(address) * _HASH) >> np.uint64(40)) & _SEEN_MASK
    while seen[at].size:
        if seen[at].address == np.uint64(address) and seen[at].size >= np.uint64(size):
            return
        at = (at + _ONE) & _SEEN_MASK
    c.block = np.uint64(address)
    c.block_size = np.uint64(size)
    c.stop |= _UNSEEN
    _call_stop(c.emu_stop, engine)


def _on_special(engine, address, size, context):  # type: ignore[no-untyped-def]
    """UC_HOOK_CODE of an instruction that the run loop carries out: leave before it."""
    c = carray(_context_at(context), 1)[0]
    c.special = np.uint64(address)
    c.stop |= _SPECIAL
    _call_stop(c.emu_stop, engine)


# --- locked instructions --------------------------------------------------------------------------------

_CF, _PF, _AF, _ZF, _SF, _OF = (np.uint64(1 << bit) for bit in (0, 2, 4, 6, 7, 11))
_ARITHMETIC = _CF | _PF | _AF | _ZF | _SF | _OF
_RAX, _RBX, _RCX, _RDX, _AX, _AL = (
    x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX, x86.UC_X86_REG_AX,
    x86.UC_X86_REG_AL)
_RIP, _EFLAGS, _CR3 = x86.UC_X86_REG_RIP, x86.UC_X86_REG_RFLAGS, x86.UC_X86_REG_CR3
_U32_MASK = np.uint64(0xFFFF_FFFF)

# Plain integers: what Numba folds into the code.
_ADD, _OR, _ADC, _SBB, _AND, _SUB, _XOR, _INC, _DEC, _NOT, _NEG, _XCHG, _CMPXCHG, _XADD, _BTS, _BTR, _BTC, \
    _CMPXCHG8B, _CMPXCHG16B, _FENCE = (int(op) for op in LockedOp)


@njit(_u64(_CONTEXT_POINTER, _i64, _i64))
def _get(context, engine, register):  # type: ignore[no-untyped-def]
    """A register's value, zero-extended."""
    c = carray(context, 1)[0]
    c.exchange = _ZERO
    _call_register(c.reg_read, engine, register, _address_of(context) + _EXCHANGE_AT)
    return load_u64(_address_of(context) + _EXCHANGE_AT)


@njit(types.void(_CONTEXT_POINTER, _i64, _i64, _u64))
def _set(context, engine, register, value):  # type: ignore[no-untyped-def]
    """Writes as many of the low bytes as the register has."""
    c = carray(context, 1)[0]
    store_u64(_address_of(context) + _EXCHANGE_AT, value)
    _call_register(c.reg_write, engine, register, _address_of(context) + _EXCHANGE_AT)


@njit(_u64(_i64, _i64, _u64, _u64))
def _cmpxchg(host, size, wanted, new):  # type: ignore[no-untyped-def]
    if size == 8:
        return cmpxchg_u64(host, wanted, new)
    if size == 4:
        return np.uint64(cmpxchg_u32(host, np.uint32(wanted), np.uint32(new)))
    if size == 2:
        return np.uint64(cmpxchg_u16(host, np.uint16(wanted), np.uint16(new)))
    return np.uint64(cmpxchg_u8(host, np.uint8(wanted), np.uint8(new)))


@njit(_u64(_i64, _u64, _u64, _u64, _u64, _i64))
def _flags(op, a, b, r, carry_in, size):  # type: ignore[no-untyped-def]
    """CF PF AF ZF SF OF of ``r = a op b``, values of ``size`` bytes (SDM vol. 1, 3.4.3.1)."""
    shift = np.uint64(size * 8 - 1)
    flags = _ZERO
    if r == _ZERO:
        flags |= _ZF
    if (r >> shift) & _ONE:
        flags |= _SF
    low = r & np.uint64(0xFF)
    low ^= low >> np.uint64(4)
    low ^= low >> np.uint64(2)
    low ^= low >> np.uint64(1)
    if not low & _ONE:
        flags |= _PF
    if op in (_ADD, _ADC, _INC, _XADD):
        if r < a or (carry_in and r == a):
            flags |= _CF
        if (((a ^ r) & (b ^ r)) >> shift) & _ONE:
            flags |= _OF
        flags |= (a ^ b ^ r) & _AF
    elif op in (_SUB, _SBB, _DEC, _NEG, _CMPXCHG):
        if a < b or (carry_in and a == b):
            flags |= _CF
        if (((a ^ b) & (a ^ r)) >> shift) & _ONE:
            flags |= _OF
        flags |= (a ^ b ^ r) & _AF
    return flags


@njit(_i64(_CONTEXT_POINTER, _LOCKED_POINTER, _i64))
def _operand_address(context, instruction, engine):  # type: ignore[no-untyped-def]
    l = carray(instruction, 1)[0]  # noqa: E741
    at = l.displacement
    if l.base:
        at += _get(context, engine, l.base)
    if l.index:
        at += _get(context, engine, l.index) * l.scale
    at &= l.address_mask
    if l.segment_base:
        at += _get(context, engine, l.segment_base)
    if _BTS <= l.op <= _BTC and l.source:
        # The bit string may begin before or go on behind the operand: bit offset, signed.
        bits = np.int64(_get(context, engine, l.source))
        if l.size < 8:
            spare = 64 - l.size * 8
            bits = (bits << spare) >> spare
        at += np.uint64((bits // (l.size * 8)) * l.size)
    return np.int64(at)


@njit(types.boolean(_CONTEXT_POINTER, _LOCKED_POINTER, _i64, _i64))
def _cmpxchg_pair(context, instruction, engine, host):  # type: ignore[no-untyped-def]
    """CMPXCHG8B, CMPXCHG16B; False when the CPU has to see to it (#GP)."""
    c = carray(context, 1)[0]
    l = carray(instruction, 1)[0]  # noqa: E741
    a, b = _get(context, engine, _RAX), _get(context, engine, _RBX)
    d, x = _get(context, engine, _RDX), _get(context, engine, _RCX)
    flags = _get(context, engine, _EFLAGS) & ~_ZF
    if l.op == _CMPXCHG8B:
        wanted = (a & _U32_MASK) | d << np.uint64(32)
        old = cmpxchg_u64(host, wanted, (b & _U32_MASK) | x << np.uint64(32))
        equal = old == wanted
        a, d = old & _U32_MASK, old >> np.uint64(32)
    else:
        if host & 15:
            return False
        c.wanted[0], c.wanted[1], c.new[0], c.new[1] = a, d, b, x
        at = _address_of(context)
        equal = cmpxchg_u128(host, at + _WANTED_AT, at + _NEW_AT) != 0
        a, d = c.wanted[0], c.wanted[1]
    if equal:
        flags |= _ZF
    else:
        _set(context, engine, _RAX, a)
        _set(context, engine, _RDX, d)
    _set(context, engine, _EFLAGS, flags)
    return True


@njit(types.void(_CONTEXT_POINTER, _LOCKED_POINTER, _i64, _i64, _i64))
def _modify(context, instruction, engine, host, size):  # type: ignore[no-untyped-def]
    """Everything else: read, compute, compare and exchange until nobody came between."""
    l = carray(instruction, 1)[0]  # noqa: E741
    op = l.op
    mask = ~_ZERO >> np.uint64(64 - size * 8)
    source = (_get(context, engine, l.source) if l.source else l.immediate) & mask
    eflags = _get(context, engine, _EFLAGS)
    if op == _CMPXCHG:
        wanted = _get(context, engine, _RAX) & mask
        old = _cmpxchg(host, size, wanted, source)
        flags = _flags(op, wanted, old, (wanted - old) & mask, _ZERO, size)
        if old != wanted:
            _set(context, engine, _RAX if size >= 4 else _AX if size == 2 else _AL, old)
        _set(context, engine, _EFLAGS, eflags & ~_ARITHMETIC | flags)
        return
    carry = eflags & _CF if op in (_ADC, _SBB) else _ZERO
    bit = _ONE << (source & np.uint64(size * 8 - 1))
    b = source
    old = _ZERO
    while True:
        a = old
        if op in (_ADD, _ADC, _XADD):
            new = a + b + carry
        elif op in (_SUB, _SBB):
            new = a - b - carry
        elif op == _INC:
            b = _ONE
            new = a + b
        elif op == _DEC:
            b = _ONE
            new = a - b
        elif op == _NEG:
            new = ~a + _ONE
        elif op == _NOT:
            new = ~a
        elif op == _OR:
            new = a | b
        elif op == _AND:
            new = a & b
        elif op == _XOR:
            new = a ^ b
        elif op == _XCHG:
            new = b
        elif op == _BTS:
            new = a | bit
        elif op == _BTR:
            new = a & ~bit
        else:
            new = a ^ bit
        new &= mask
        # The first round's guess is zero; the exchange itself says what is really there.
        old = _cmpxchg(host, size, a, new)
        if old == a:
            break
    if op in (_XCHG, _NOT):
        flags = eflags
    elif _BTS <= op <= _BTC:
        flags = eflags & ~_CF | (_CF if a & bit else _ZERO)
    elif op in (_INC, _DEC):
        flags = eflags & ~(_ARITHMETIC & ~_CF) | (_flags(op, a, b, new, carry, size) & ~_CF)
    elif op == _NEG:
        flags = eflags & ~_ARITHMETIC | _flags(op, _ZERO, a, new, carry, size)
    else:
        flags = eflags & ~_ARITHMETIC | _flags(op, a, b, new, carry, size)
    if op in (_XCHG, _XADD):
        _set(context, engine, l.target, a)
    _set(context, engine, _EFLAGS, flags)


def _on_locked(engine, address, size, at):  # type: ignore[no-untyped-def]
    """UC_HOOK_CODE of a locked instruction: do it with the host's atomics and go on behind it.

    An operand outside RAM is left to Unicorn, whose fault is the right one.
    """
    instruction = _locked_at(at)
    l = carray(instruction, 1)[0]  # noqa: E741
    if l.op == _FENCE:
        fence()     # Unicorn has none; the instruction itself follows and does nothing
        return
    context = _context_at(l.context)
    c = carray(context, 1)[0]
    if _get(context, engine, _CR3) != c.cr3:
        c.special = np.uint64(address)      # the run loop says that it cannot be
        c.stop |= _SPECIAL
        _call_stop(c.emu_stop, engine)
        return
    gpa = _operand_address(context, instruction, engine)
    i = _find_slot(context, gpa)
    if i < 0:
        return
    slot = carray(_slots_at(c.slots), c.slot_count)[i]
    if gpa + l.size > slot.end:
        return
    _log_write(context, gpa, l.size)
    host = slot.host + gpa - slot.gpa
    if l.op == _CMPXCHG8B or l.op == _CMPXCHG16B:
        if not _cmpxchg_pair(context, instruction, engine, host):
            return
    else:
        _modify(context, instruction, engine, host, l.size)
    _set(context, engine, _RIP, l.next)     # leaves the block, not the emulation


_BLOCK = types.void(_i64, _i64, _i32, _i64)     # uc_cb_hookcode_t
EXPORTS = {
    "on_write": (_on_write, types.void(_i64, _i32, _i64, _i32, _i64, _i64)),    # uc_cb_hookmem_t
    "on_block": (_on_block, _BLOCK),
    "on_special": (_on_special, _BLOCK),
    "on_locked": (_on_locked, _BLOCK),
    "log_write": (_log, types.void(_i64, _i64, _i64)),
    "remember": (_remember, types.void(_i64, _u64, _u64)),
    "reset": (_reset, _u64(_i64)),
}
