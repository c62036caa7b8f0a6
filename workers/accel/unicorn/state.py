"""The software CPU's architectural state, in and out (workers/state.py has the format, which is that of
KVM: a snapshot taken on one runs on the other)."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import unicorn
from unicorn import x86_const as ux

from ... import msr
from ...memory import GuestMemory
from ...state import EventsState, RegsState, SegmentsState, SegmentState, TableState, VcpuSaved
from ..base import AccelError

__all__ = ["check", "check_program", "get_state", "get_xsave", "is_boot_cr3", "set_program_registers", "set_registers",
           "set_system_registers", "set_xsave"]

_DATA_SEGMENTS = ("ds", "es", "fs", "gs")
_REGS = RegsState.__struct_fields__
_APIC_BASE = 0xFEE0_0900        # at its place, enabled, of the first processor: what KVM begins with
_XCR0_X87_SSE = 3
_CR3_ADDRESS = 0x000F_FFFF_FFFF_F000

# The XSAVE area in its standard form (Intel SDM vol. 1, 13.4): FXSAVE image, header, extended parts.
_FX = struct.Struct("<HHBxHQQII")      # FCW FSW FTW FOP FIP FDP MXCSR MXCSR_MASK
_ST_AT, _XMM_AT, _HEADER_AT, _XSAVE_SIZE = 32, 160, 512, 4096
_MXCSR_MASK = 0xFFFF


def _number(name: str) -> int:
    return int(getattr(ux, f"UC_X86_REG_{name.upper()}"))


# --- out ------------------------------------------------------------------------------------------------


def get_state(engine: Any, memory: GuestMemory) -> VcpuSaved:
    """The engine is outside the emulation."""
    read = engine.reg_read
    gdt, idt = read(ux.UC_X86_REG_GDTR), read(ux.UC_X86_REG_IDTR)
    segments = {}
    for name in ("cs", "ss", *_DATA_SEGMENTS):
        segments[name] = _descriptor(memory, gdt[1], gdt[2], read(_number(name)))
    for name in ("fs", "gs"):
        segments[name]["base"] = read(_number(f"{name}_base"))
    for name, register in (("tr", ux.UC_X86_REG_TR), ("ldt", ux.UC_X86_REG_LDTR)):
        selector, base, limit, _ = read(register)
        # A loaded TSS is a busy one; an LDT that was never loaded is unusable.
        segments[name] = {"base": base, "limit": limit, "selector": selector, "type": 0xB if name == "tr" else 2,
                          "present": 1, "dpl": 0, "db": 0, "s": 0, "l": 0, "g": 0, "avl": 0,
                          "unusable": int(name == "ldt" and not selector)}
    dr0, dr1, dr2, dr3, dr6, dr7 = (int(read(_number(f"dr{i}"))) for i in (0, 1, 2, 3, 6, 7))
    return VcpuSaved(
        regs=RegsState(**{name: int(read(_number(name))) for name in _REGS}),
        segments=SegmentsState(**{name: SegmentState(**fields) for name, fields in segments.items()}),
        gdt=TableState(gdt[1], gdt[2]), idt=TableState(idt[1], idt[2]),
        cr0=int(read(ux.UC_X86_REG_CR0)), cr2=int(read(ux.UC_X86_REG_CR2)), cr3=int(read(ux.UC_X86_REG_CR3)),
        cr4=int(read(ux.UC_X86_REG_CR4)), cr8=0,
        efer=int(engine.msr_read(msr.EFER)), apic_base=_APIC_BASE, xcr0=1, xsave=get_xsave(engine),
        debug=(dr0, dr1, dr2, dr3, dr6, dr7), msrs={str(index): int(engine.msr_read(index)) for index in msr.STATE},
        events=EventsState(**dict.fromkeys(EventsState.__struct_fields__, 0)), mp_state=0)


def _descriptor(memory: GuestMemory, table: int, limit: int, selector: int) -> dict[str, int]:
    """A segment as its descriptor in the GDT has it (SDM vol. 3, 3.4.5)."""
    at = selector & ~7
    raw = 0 if not at or at + 7 > limit else int.from_bytes(memory.read(table + at, 8), "little")
    size = raw & 0xFFFF | (raw >> 48 & 0xF) << 16
    granular = raw >> 55 & 1
    return {"base": raw >> 16 & 0xFF_FFFF | (raw >> 56) << 24,
            "limit": size << 12 | 0xFFF if granular else size, "selector": selector,
            "type": raw >> 40 & 0xF, "present": raw >> 47 & 1, "dpl": raw >> 45 & 3, "db": raw >> 54 & 1,
            "s": raw >> 44 & 1, "l": raw >> 53 & 1, "g": granular, "avl": raw >> 52 & 1,
            "unusable": int(raw == 0)}


def get_xsave(engine: Any) -> bytes:
    """All of an XSAVE area, 4096 bytes."""
    read = engine.reg_read
    status, tags = read(ux.UC_X86_REG_FPSW), read(ux.UC_X86_REG_FPTAG)
    top = status >> 11 & 7
    used = sum(1 << i for i in range(8) if tags >> 2 * i & 3 != 3)
    area = bytearray(_XSAVE_SIZE)
    _FX.pack_into(area, 0, read(ux.UC_X86_REG_FPCW), status, used, read(ux.UC_X86_REG_FOP),
                  read(ux.UC_X86_REG_FIP), read(ux.UC_X86_REG_FDP), read(ux.UC_X86_REG_MXCSR), _MXCSR_MASK)
    for i in range(8):      # in the order of the stack, from its top
        mantissa, exponent = read(ux.UC_X86_REG_FP0 + (top + i) % 8)
        struct.pack_into("<QH", area, _ST_AT + 16 * i, mantissa, exponent)
    for i in range(16):
        area[_XMM_AT + 16 * i:_XMM_AT + 16 * i + 16] = read(ux.UC_X86_REG_XMM0 + i).to_bytes(16, "little")
    struct.pack_into("<Q", area, _HEADER_AT, _XCR0_X87_SSE)
    return bytes(area)


# --- in ---------------------------------------------------------------------------------------------------


def is_boot_cr3(value: int, boot: int) -> bool:
    """CR3 has this value, or one with other flags (SDM vol. 3, 4.5.2)."""
    return value & _CR3_ADDRESS == boot


def check(state: VcpuSaved, boot_cr3: int) -> None:
    """Raises AccelError for what the software CPU does not have."""
    check_program(state)
    if not is_boot_cr3(state.cr3, boot_cr3):
        raise AccelError(f"the saved vCPU has its own page tables (CR3 {state.cr3:#x}), and the software CPU "
                         "cannot log what it writes there: restore it on kvm")


def check_program(state: VcpuSaved) -> None:
    """Raises AccelError for what it does not have, of a thread of a Linux program: the page tables are the system's."""
    if state.xcr0 & ~_XCR0_X87_SSE:
        raise AccelError(f"the saved vCPU uses extended registers (XCR0 {state.xcr0:#x}), which the software "
                         "CPU does not have: restore it on kvm")
    under_way = ("exception_injected", "exception_pending", "interrupt_injected", "nmi_injected", "nmi_pending",
                 "smi_pending", "triple_fault_pending")
    pending = [name for name in under_way if getattr(state.events, name)]
    if pending:
        raise AccelError(f"the saved vCPU has a pending event ({', '.join(pending)}), which the software CPU "
                         "cannot deliver: restore it on kvm")


def set_system_registers(engine: Any, state: VcpuSaved) -> None:
    """What must be so before the guest's segments can be loaded. The memory is in its place already."""
    write = engine.reg_write
    for register, table in ((ux.UC_X86_REG_GDTR, state.gdt), (ux.UC_X86_REG_IDTR, state.idt)):
        write(register, (0, table.base, table.limit, 0))
    for register, segment in ((ux.UC_X86_REG_TR, state.segments.tr), (ux.UC_X86_REG_LDTR, state.segments.ldt)):
        flags = 0x8000 | segment.type << 8 if segment.present else 0
        write(register, (segment.selector, segment.base, segment.limit, flags))
    write(ux.UC_X86_REG_CR3, state.cr3)
    write(ux.UC_X86_REG_CR4, state.cr4)
    engine.msr_write(msr.EFER, state.efer)
    write(ux.UC_X86_REG_CR0, state.cr0)
    write(ux.UC_X86_REG_CR2, state.cr2)


def set_registers(engine: Any, state: VcpuSaved) -> None:
    """All that IRETQ has not set: not RIP, RSP, RFLAGS and the selectors."""
    write = engine.reg_write
    set_program_registers(engine, state)
    for i, value in zip((0, 1, 2, 3, 6, 7), state.debug, strict=True):
        write(_number(f"dr{i}"), value)
    for index, value in state.msr_values.items():
        if index in msr.STATE and index != msr.TSC:
            with contextlib.suppress(unicorn.UcError):
                engine.msr_write(index, value)
    for name in _REGS:
        if name not in ("rip", "rsp", "rflags"):
            write(_number(name), getattr(state.regs, name))


def set_program_registers(engine: Any, state: VcpuSaved) -> None:
    """FS, GS, and the vector registers."""
    for name, segment in (("fs", state.segments.fs), ("gs", state.segments.gs)):
        engine.reg_write(_number(f"{name}_base"), segment.base)
    set_xsave(engine, state.xsave)


def set_xsave(engine: Any, area: bytes) -> None:
    """What ``get_xsave`` of one gave, or KVM."""
    write = engine.reg_write
    control, status, used, opcode, fip, fdp, mxcsr, _ = _FX.unpack_from(area)
    present = struct.unpack_from("<Q", area, _HEADER_AT)[0]
    if not present & 1:     # in its initial state: what the area holds of it does not count
        control, status, used, opcode, fip, fdp = 0x37F, 0, 0, 0, 0, 0
    top = status >> 11 & 7
    for i in range(8):
        write(ux.UC_X86_REG_FP0 + (top + i) % 8, struct.unpack_from("<QH", area, _ST_AT + 16 * i))
    write(ux.UC_X86_REG_FPCW, control)
    write(ux.UC_X86_REG_FPSW, status)
    write(ux.UC_X86_REG_FPTAG, sum((0 if used >> i & 1 else 3) << 2 * i for i in range(8)))
    for register, value in ((ux.UC_X86_REG_FOP, opcode), (ux.UC_X86_REG_FIP, fip), (ux.UC_X86_REG_FDP, fdp)):
        write(register, value)
    # MXCSR counts whenever SSE or AVX may be used, present or not (SDM vol. 1, 13.8).
    write(ux.UC_X86_REG_MXCSR, mxcsr)
    for i in range(16):
        value = area[_XMM_AT + 16 * i:_XMM_AT + 16 * i + 16] if present & 2 else bytes(16)
        write(ux.UC_X86_REG_XMM0 + i, int.from_bytes(value, "little"))
