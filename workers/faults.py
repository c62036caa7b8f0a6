"""What an exception that nobody in the guest handles is called in a report."""

from __future__ import annotations

import struct

from ipc.messages import ExitReason

from .memory import GuestMemory

__all__ = ["FRAME_NAMES", "describe", "read_frame"]

PAGE_FAULT = 14

#: Intel SDM vol. 3, table 6-1.
_NAMES = {
    0: "#DE (divide error)", 1: "#DB (debug)", 2: "NMI", 3: "#BP (breakpoint)", 4: "#OF (overflow)",
    5: "#BR (bound range)", 6: "#UD (undefined instruction)", 7: "#NM (no FPU)", 8: "#DF (double fault)",
    10: "#TS (invalid TSS)", 11: "#NP (segment not present)", 12: "#SS (stack fault)",
    13: "#GP (general protection)", 14: "#PF (page fault)", 16: "#MF (x87 error)", 17: "#AC (alignment)",
    18: "#MC (machine check)", 19: "#XM (SIMD error)", 21: "#CP (control protection)",
}
#: What the machine's exception stubs leave at RSP, eight bytes each (vmm/machine/boot.py).
FRAME_NAMES = ("vector", "error", "rip", "cs", "rflags", "rsp", "ss")
_FRAME = struct.Struct(f"<{len(FRAME_NAMES)}Q")

_PF_PRESENT, _PF_WRITE, _PF_USER, _PF_FETCH = 1, 2, 4, 16


def describe(vector: int, error: int | None, cr2: int) -> tuple[ExitReason, str]:
    """Reason and text for an exception; ``error`` is None where the error code is not known."""
    name = _NAMES.get(vector, f"exception {vector}")
    if vector != PAGE_FAULT:
        code = f", error code {error:#x}" if error else ""
        return ExitReason.EXCEPTION, f"{name}{code}"
    if error is None:
        return ExitReason.BAD_ADDRESS, f"{name} at {cr2:#x}"
    access = "fetch" if error & _PF_FETCH else "write" if error & _PF_WRITE else "read"
    why = "not permitted" if error & _PF_PRESENT else "not mapped"
    return ExitReason.BAD_ADDRESS, f"{name}: {access} at {cr2:#x}, {why}"


def read_frame(memory: GuestMemory, rsp: int) -> dict[str, int]:
    """The exception stub's frame. Raises KeyError when RSP is outside RAM (then no stub made it)."""
    return dict(zip(FRAME_NAMES, _FRAME.unpack(memory.read(rsp, _FRAME.size)), strict=True))
