"""With what a thread begins, or goes on, on a vCPU that has had none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ipc.programs import REGISTERS

from ..state import StateError
from .processes import Thread
from .signals import INIT_XSAVE

__all__ = ["Start"]

_WORDS = 1 << 64


@dataclass(slots=True, eq=False)
class Start:
    """``vcpu``: on which one (None: any). ``trap``: (error, vector, address) of a fault that is a signal it has to
    take. ``call``: it is about to make a call, which is made for it: so a signal that is pending interrupts that call,
    and does not come before it. What is None is somewhere else yet."""

    thread: Thread
    registers: list[int] | None = None
    fs_base: int | None = None
    vcpu: int | None = None
    xsave: bytes | None = None
    trap: tuple[int, int, int] | None = None
    call: bool = False

    def whole(self) -> tuple[list[int], int, bytes]:
        """(registers, FS base, XSAVE area)"""
        assert self.registers is not None
        assert self.fs_base is not None
        assert self.xsave is not None
        return self.registers, self.fs_base, self.xsave

    def save(self) -> dict[str, Any]:
        return {"tid": self.thread.tid, "vcpu": self.vcpu, "registers": self.registers, "fs_base": self.fs_base,
                "xsave": self.xsave, "trap": None if self.trap is None else list(self.trap), "call": self.call}

    @classmethod
    def load(cls, threads: Mapping[int, Thread], saved: dict[str, Any]) -> Start:
        """Raises StateError."""
        try:
            trap = saved["trap"]
            found = cls(threads[saved["tid"]], list(saved["registers"]), saved["fs_base"], saved["vcpu"],
                        saved["xsave"], None if trap is None else (trap[0], trap[1], trap[2]), saved["call"])
            registers, fs_base, xsave = found.whole()
            whole = len(registers) == len(REGISTERS) and len(xsave) <= len(INIT_XSAVE) and all(
                0 <= each < _WORDS for each in (*registers, fs_base))
        except (LookupError, TypeError, AssertionError):
            whole = False
        if not whole:
            raise StateError("not a valid state of a program's thread, or not all of it")
        found.xsave = xsave.ljust(len(INIT_XSAVE), b"\0")
        return found
