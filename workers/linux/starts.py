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
    and does not come before it. ``exception``: (vector, error, address) of one that nobody has looked at yet. What is
    None of its registers is in its vCPU."""

    thread: Thread
    registers: list[int] | None = None
    fs_base: int = 0            # with ``registers``
    vcpu: int | None = None
    xsave: bytes | None = None
    trap: tuple[int, int, int] | None = None
    exception: tuple[int, int, int] | None = None
    call: bool = False

    def save(self) -> dict[str, Any]:
        return {"tid": self.thread.tid, "vcpu": self.vcpu, "registers": self.registers, "fs_base": self.fs_base,
                "xsave": self.xsave, "trap": None if self.trap is None else list(self.trap),
                "exception": None if self.exception is None else list(self.exception), "call": self.call}

    @classmethod
    def load(cls, threads: Mapping[int, Thread], saved: dict[str, Any], vcpus: int) -> Start:
        """``vcpus``: how many there are. Raises StateError."""
        try:
            found = cls(threads[saved["tid"]], saved["registers"], saved["fs_base"], saved["vcpu"], saved["xsave"],
                        _three(saved["trap"]), _three(saved["exception"]), saved["call"])
            whole = found._is_whole(vcpus)
        except (LookupError, TypeError, ValueError):
            whole = False
        if not whole:
            raise StateError("not a valid state of a program's thread, or not all of it")
        if found.xsave is not None:
            found.xsave = found.xsave.ljust(len(INIT_XSAVE), b"\0")
        return found

    def _is_whole(self, vcpus: int) -> bool:
        """What it does not have can be in a vCPU. Raises TypeError."""
        registers, xsave = self.registers, self.xsave
        if self.vcpu is None:
            there = registers is not None and xsave is not None
        else:
            there = 0 <= self.vcpu < vcpus and (registers is not None or not (self.call or self.exception))
        return there and (registers is None or (len(registers) == len(REGISTERS) and all(
            0 <= each < _WORDS for each in (*registers, self.fs_base)))) and (
            xsave is None or len(xsave) <= len(INIT_XSAVE))


def _three(saved: Any) -> tuple[int, int, int] | None:
    """Raises ValueError."""
    if saved is None:
        return None
    one, two, three = saved
    return one, two, three
