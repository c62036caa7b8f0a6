"""How a Unicorn engine comes to stand at a guest's instruction, at its privilege level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unicorn import x86_const as ux

from ipc.shm import PAGE_SIZE

from ... import msr
from ..base import AccelError

__all__ = ["GENERAL", "enter", "load_boot", "number"]

GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13",
           "r14", "r15", "rip", "rflags")
_ENTERED = ("rip", "rsp", "rflags")
_TRAMPOLINE_CODE = bytes.fromhex("8ed8 8ec3 8ee1 8eea 48cf")     # mov to ds, es, fs, gs from eax to edx; iretq
_TRAMPOLINE_INSTRUCTIONS = 5


def number(register: str) -> int:
    """Unicorn's, of the register of this name."""
    return int(getattr(ux, f"UC_X86_REG_{register.upper()}"))


def load_boot(engine: Any, boot: Mapping[str, int], page: int) -> None:
    """The registers of ``WorkerSpec.boot``; ``page`` as for ``enter``. Raises AccelError, UcError."""
    engine.reg_write(ux.UC_X86_REG_GDTR, (0, boot["gdt_base"], boot["gdt_limit"], 0))
    engine.reg_write(ux.UC_X86_REG_IDTR, (0, boot["idt_base"], boot["idt_limit"], 0))
    engine.reg_write(ux.UC_X86_REG_TR, (boot["tr_selector"], boot["tss_base"], boot["tss_limit"], 0x8B00))
    engine.reg_write(ux.UC_X86_REG_CR3, boot["cr3"])
    engine.reg_write(ux.UC_X86_REG_CR4, boot["cr4"])
    engine.msr_write(msr.EFER, boot["efer"])
    engine.msr_write(msr.LSTAR, boot["lstar"])
    engine.reg_write(ux.UC_X86_REG_CR0, boot["cr0"])
    enter(engine, page, boot["rip"], boot["rsp"], boot["rflags"], boot["cs"], boot["ss"], [boot["ds"]] * 4)
    for name in GENERAL:
        if name in boot and name not in _ENTERED:
            engine.reg_write(number(name), boot[name])


def enter(engine: Any, page: int, rip: int, rsp: int, rflags: int, cs: int, ss: int, data: list[int]) -> None:
    """Load DS, ES, FS and GS (``data``) and go there with IRETQ, as an operating system would: told to set
    a selector, Unicorn does, but neither loads its descriptor nor changes the privilege level. ``page``: a guest
    physical address where nothing is.

    The general registers are not kept. Raises AccelError, UcError."""
    engine.mem_map(page, PAGE_SIZE)
    frame = page + PAGE_SIZE // 2
    engine.mem_write(page, _TRAMPOLINE_CODE)
    engine.mem_write(frame, b"".join(v.to_bytes(8, "little") for v in (rip, cs, rflags, rsp, ss)))
    engine.reg_write(ux.UC_X86_REG_RSP, frame)
    for register, selector in zip(("rax", "rbx", "rcx", "rdx"), data, strict=True):
        engine.reg_write(number(register), selector)
    engine.emu_start(page, rip, count=_TRAMPOLINE_INSTRUCTIONS)
    engine.mem_unmap(page, PAGE_SIZE)
    # From now on no address ends the emulation. (Unicorn would also look each one up in the guest's page
    # tables after every stop, and take the page fault for a first one of two.)
    engine.ctl_exits_enabled(True)
    engine.ctl_set_exits([])
    if engine.reg_read(ux.UC_X86_REG_CS) != cs or engine.reg_read(ux.UC_X86_REG_RIP) != rip:
        raise AccelError("the software CPU cannot be set up: it did not enter the guest's privilege level")
