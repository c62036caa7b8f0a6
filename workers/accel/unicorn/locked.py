"""Locked instructions: a plain load and a plain store to Unicorn, and so done here with the host's atomics instead.
Imported to compile only (hooks.py)."""

from __future__ import annotations

import numpy as np
from numba import carray, njit, types
from unicorn import unicorn_const
from unicorn import x86_const as x86

from ipc.compiled.atomics import cmpxchg_u8, cmpxchg_u16, cmpxchg_u32, cmpxchg_u64, cmpxchg_u128, fence

from .context import LockedOp, Stop
from .native import (
    CONTEXT_POINTER,
    LOCKED_POINTER,
    NEW_AT,
    WANTED_AT,
    address_of,
    call_stop,
    context_at,
    get_register,
    locked_at,
    set_register,
    slots_at,
)
from .paging import permitted, place_of
from .writes import find_slot, log_write

__all__ = ["on_locked"]

_i64, _u64 = types.int64, types.uint64
_SPECIAL, _FAULT = np.uint64(Stop.SPECIAL), np.uint64(Stop.FAULT)
_ZERO, _ONE = np.uint64(0), np.uint64(1)

_CF, _PF, _AF, _ZF, _SF, _OF = (np.uint64(1 << bit) for bit in (0, 2, 4, 6, 7, 11))
_ARITHMETIC = _CF | _PF | _AF | _ZF | _SF | _OF
_RAX, _RBX, _RCX, _RDX, _AX, _AL = (
    x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX, x86.UC_X86_REG_AX,
    x86.UC_X86_REG_AL)
_RIP, _EFLAGS, _CR3 = x86.UC_X86_REG_RIP, x86.UC_X86_REG_RFLAGS, x86.UC_X86_REG_CR3
_U32_MASK = np.uint64(0xFFFF_FFFF)
_WRITE = unicorn_const.UC_MEM_WRITE

# Plain integers: what Numba folds into the code.
_ADD, _OR, _ADC, _SBB, _AND, _SUB, _XOR, _INC, _DEC, _NOT, _NEG, _XCHG, _CMPXCHG, _XADD, _BTS, _BTR, _BTC, \
    _CMPXCHG8B, _CMPXCHG16B, _FENCE = (int(op) for op in LockedOp)


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


@njit(_i64(CONTEXT_POINTER, LOCKED_POINTER, _i64))
def _operand_address(context, instruction, engine):  # type: ignore[no-untyped-def]
    l = carray(instruction, 1)[0]  # noqa: E741
    at = l.displacement
    if l.base:
        at += get_register(context, engine, l.base)
    if l.index:
        at += get_register(context, engine, l.index) * l.scale
    at &= l.address_mask
    if l.segment_base:
        at += get_register(context, engine, l.segment_base)
    if _BTS <= l.op <= _BTC and l.source:
        # The bit string may begin before or go on behind the operand: bit offset, signed.
        bits = np.int64(get_register(context, engine, l.source))
        if l.size < 8:
            spare = 64 - l.size * 8
            bits = (bits << spare) >> spare
        at += np.uint64((bits // (l.size * 8)) * l.size)
    return np.int64(at)


@njit(types.boolean(CONTEXT_POINTER, LOCKED_POINTER, _i64, _i64))
def _cmpxchg_pair(context, instruction, engine, host):  # type: ignore[no-untyped-def]
    """CMPXCHG8B, CMPXCHG16B; False when the CPU has to see to it (#GP)."""
    c = carray(context, 1)[0]
    l = carray(instruction, 1)[0]  # noqa: E741
    a, b = get_register(context, engine, _RAX), get_register(context, engine, _RBX)
    d, x = get_register(context, engine, _RDX), get_register(context, engine, _RCX)
    flags = get_register(context, engine, _EFLAGS) & ~_ZF
    if l.op == _CMPXCHG8B:
        wanted = (a & _U32_MASK) | d << np.uint64(32)
        old = cmpxchg_u64(host, wanted, (b & _U32_MASK) | x << np.uint64(32))
        equal = old == wanted
        a, d = old & _U32_MASK, old >> np.uint64(32)
    else:
        if host & 15:
            return False
        c.wanted[0], c.wanted[1], c.new[0], c.new[1] = a, d, b, x
        at = address_of(context)
        equal = cmpxchg_u128(host, at + WANTED_AT, at + NEW_AT) != 0
        a, d = c.wanted[0], c.wanted[1]
    if equal:
        flags |= _ZF
    else:
        set_register(context, engine, _RAX, a)
        set_register(context, engine, _RDX, d)
    set_register(context, engine, _EFLAGS, flags)
    return True


@njit(types.void(CONTEXT_POINTER, LOCKED_POINTER, _i64, _i64, _i64))
def _modify(context, instruction, engine, host, size):  # type: ignore[no-untyped-def]
    """Everything else: read, compute, compare and exchange until nobody came between."""
    l = carray(instruction, 1)[0]  # noqa: E741
    op = l.op
    mask = ~_ZERO >> np.uint64(64 - size * 8)
    source = (get_register(context, engine, l.source) if l.source else l.immediate) & mask
    eflags = get_register(context, engine, _EFLAGS)
    if op == _CMPXCHG:
        wanted = get_register(context, engine, _RAX) & mask
        old = _cmpxchg(host, size, wanted, source)
        flags = _flags(op, wanted, old, (wanted - old) & mask, _ZERO, size)
        if old != wanted:
            set_register(context, engine, _RAX if size >= 4 else _AX if size == 2 else _AL, old)
        set_register(context, engine, _EFLAGS, eflags & ~_ARITHMETIC | flags)
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
        set_register(context, engine, l.target, a)
    set_register(context, engine, _EFLAGS, flags)


def on_locked(engine, address, size, at):  # type: ignore[no-untyped-def]
    """UC_HOOK_CODE of a locked instruction: do it with the host's atomics and go on behind it.

    An operand outside RAM is left to Unicorn, whose fault is the right one; so is one of a program's that lies in two
    pages, which makes it two accesses.
    """
    instruction = locked_at(at)
    l = carray(instruction, 1)[0]  # noqa: E741
    if l.op == _FENCE:
        fence()     # Unicorn has none; the instruction itself follows and does nothing
        return
    context = context_at(l.context)
    c = carray(context, 1)[0]
    gpa = _operand_address(context, instruction, engine)
    if c.root:
        if (gpa & 4095) + l.size > 4096:
            return
        entry = permitted(context, np.uint64(gpa), _WRITE)
        if not entry:
            c.stop |= _FAULT
            call_stop(c.emu_stop, engine)
            return
        gpa = place_of(entry, np.uint64(gpa))
    elif get_register(context, engine, _CR3) != c.cr3:
        c.special = np.uint64(address)      # the run loop says that it cannot be
        c.stop |= _SPECIAL
        call_stop(c.emu_stop, engine)
        return
    i = find_slot(context, gpa)
    if i < 0:
        return
    slot = carray(slots_at(c.slots), c.slot_count)[i]
    if gpa + l.size > slot.end:
        return
    log_write(context, gpa, l.size)
    host = slot.host + gpa - slot.gpa
    if l.op == _CMPXCHG8B or l.op == _CMPXCHG16B:
        if not _cmpxchg_pair(context, instruction, engine, host):
            return
    else:
        _modify(context, instruction, engine, host, l.size)
    set_register(context, engine, _RIP, l.next)     # leaves the block, not the emulation
