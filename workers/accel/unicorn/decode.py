"""Which instructions of a block the software CPU cannot be left alone with, and what they do.

Decoding is Capstone's; here its answer is put into the form that the native hooks work from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import capstone
import numpy as np
from capstone import x86 as cx
from unicorn import x86_const as ux

from .context import LOCKED, LockedOp

__all__ = ["Decoder", "PortAccess", "Special"]

_LOCKED_OPS = {
    cx.X86_INS_ADD: LockedOp.ADD, cx.X86_INS_OR: LockedOp.OR, cx.X86_INS_ADC: LockedOp.ADC,
    cx.X86_INS_SBB: LockedOp.SBB, cx.X86_INS_AND: LockedOp.AND, cx.X86_INS_SUB: LockedOp.SUB,
    cx.X86_INS_XOR: LockedOp.XOR, cx.X86_INS_INC: LockedOp.INC, cx.X86_INS_DEC: LockedOp.DEC,
    cx.X86_INS_NOT: LockedOp.NOT, cx.X86_INS_NEG: LockedOp.NEG, cx.X86_INS_XCHG: LockedOp.XCHG,
    cx.X86_INS_CMPXCHG: LockedOp.CMPXCHG, cx.X86_INS_XADD: LockedOp.XADD, cx.X86_INS_BTS: LockedOp.BTS,
    cx.X86_INS_BTR: LockedOp.BTR, cx.X86_INS_BTC: LockedOp.BTC, cx.X86_INS_CMPXCHG8B: LockedOp.CMPXCHG8B,
    cx.X86_INS_CMPXCHG16B: LockedOp.CMPXCHG16B,
}
_IN = {cx.X86_INS_IN, cx.X86_INS_INSB, cx.X86_INS_INSW, cx.X86_INS_INSD}
_OUT = {cx.X86_INS_OUT, cx.X86_INS_OUTSB, cx.X86_INS_OUTSW, cx.X86_INS_OUTSD}
_STRING = (_IN | _OUT) - {cx.X86_INS_IN, cx.X86_INS_OUT}
_NAMED = {cx.X86_INS_HLT: "hlt", cx.X86_INS_SYSCALL: "syscall", cx.X86_INS_SYSENTER: "sysenter"}
_SEGMENT_BASES = {cx.X86_REG_FS: ux.UC_X86_REG_FS_BASE, cx.X86_REG_GS: ux.UC_X86_REG_GS_BASE}
_U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class PortAccess:
    """IN, OUT, INS or OUTS."""

    write: bool
    size: int               # bytes
    port: int | None        # None: DX
    string: bool            # memory at RSI or RDI instead of EAX
    repeated: bool          # RCX times


@dataclass(frozen=True, slots=True)
class Special:
    """An instruction that the run loop carries out: a port access, or one that ends the vCPU."""

    next: int               # address of the next instruction
    name: str               # "port", "hlt", "syscall", "sysenter", "cr3", "locked"
    access: PortAccess | None = None
    source: int = 0         # cr3: Unicorn's number of the register that goes there


class Decoder:
    """Finds the instructions to hook in a block of 64-bit code."""

    def __init__(self, context_address: int) -> None:
        self._context = context_address
        self._capstone = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        self._capstone.detail = True

    def decode(self, code: bytes, address: int) -> tuple[dict[int, Any], dict[int, Special]]:
        """({address: LOCKED array [1]}, {address: Special}) of the instructions that begin in ``code``."""
        locked: dict[int, Any] = {}
        special: dict[int, Special] = {}
        for insn in self._capstone.disasm(code, address):
            after = insn.address + insn.size
            if insn.id == cx.X86_INS_MFENCE:
                locked[insn.address] = self._record(LockedOp.FENCE, 0, after)
            elif insn.id in _NAMED:
                special[insn.address] = Special(after, _NAMED[insn.id])
            elif insn.id in _IN or insn.id in _OUT:
                special[insn.address] = Special(after, "port", _port_access(insn))
            elif insn.id == cx.X86_INS_MOV and _loads_cr3(insn):
                special[insn.address] = Special(after, "cr3", source=self._register(insn, insn.operands[1].reg))
            elif insn.id in _LOCKED_OPS and _is_locked(insn):
                locked[insn.address] = self._locked(insn, after)
        return locked, special

    def first(self, code: bytes, address: int) -> Any:
        """Capstone's instruction at the beginning of ``code``; None where it knows none."""
        return next(self._capstone.disasm(code, address, 1), None)

    def _record(self, op: LockedOp, size: int, after: int) -> Any:
        record = np.zeros(1, LOCKED)
        record["context"], record["op"], record["size"], record["next"] = self._context, op, size, after
        return record

    def _locked(self, insn: Any, after: int) -> Any:
        memory = next(o for o in insn.operands if o.type == cx.X86_OP_MEM)
        record = self._record(_LOCKED_OPS[insn.id], memory.size, after)
        displacement = memory.mem.disp
        if memory.mem.base in (cx.X86_REG_RIP, cx.X86_REG_EIP):
            displacement += after
        else:
            record["base"] = self._register(insn, memory.mem.base)
        record["displacement"] = displacement & _U64
        record["index"] = self._register(insn, memory.mem.index)
        record["scale"] = memory.mem.scale
        record["segment_base"] = _SEGMENT_BASES.get(memory.mem.segment, 0)
        record["address_mask"] = 0xFFFF_FFFF if insn.addr_size == 4 else _U64
        for operand in insn.operands:
            if operand.type == cx.X86_OP_IMM:
                record["immediate"] = operand.imm & _U64
            elif operand.type == cx.X86_OP_REG:
                source = self._register(insn, operand.reg)
                record["source"] = record["target"] = source
                if memory.size == 4:
                    record["target"] = _whole(self._capstone.reg_name(operand.reg))
        return record

    def _register(self, insn: Any, number: int) -> int:
        """Unicorn's number of Capstone's register; 0 for none (RIZ and EIZ are none as well)."""
        if number in (0, cx.X86_REG_RIZ, cx.X86_REG_EIZ):
            return 0
        return int(getattr(ux, f"UC_X86_REG_{insn.reg_name(number).upper()}"))


def _whole(name: str) -> int:
    """The 64-bit register of a 32-bit one: eax -> rax, r8d -> r8."""
    wide = "r" + name[1:] if name.startswith("e") else name.removesuffix("d")
    return int(getattr(ux, f"UC_X86_REG_{wide.upper()}"))


def _is_locked(insn: Any) -> bool:
    in_memory = any(o.type == cx.X86_OP_MEM for o in insn.operands)
    return in_memory and (insn.prefix[0] == cx.X86_PREFIX_LOCK or insn.id == cx.X86_INS_XCHG)


def _loads_cr3(insn: Any) -> bool:
    target = insn.operands[0]
    return target.type == cx.X86_OP_REG and target.reg == cx.X86_REG_CR3


def _port_access(insn: Any) -> PortAccess:
    write = insn.id in _OUT
    string = insn.id in _STRING
    if string:
        size = {"b": 1, "w": 2, "d": 4}[insn.mnemonic.split()[-1][-1]]
        return PortAccess(write, size, None, True, insn.prefix[0] in (cx.X86_PREFIX_REP, cx.X86_PREFIX_REPNE))
    data, port = (insn.operands[1], insn.operands[0]) if write else (insn.operands[0], insn.operands[1])
    number = port.imm & 0xFF if port.type == cx.X86_OP_IMM else None
    return PortAccess(write, data.size, number, False, False)
