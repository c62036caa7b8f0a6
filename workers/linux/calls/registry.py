"""Which functions serve which system calls."""

from __future__ import annotations

from collections.abc import Callable

from ..abi import number_of

__all__ = ["SERVED", "Blocked", "Call", "Ended", "served", "signed", "signed32"]


#: Of the system, the thread, and six arguments as the registers have them.
Call = Callable[..., int]


class Blocked(Exception):
    """It cannot be served now: the thread makes it again, at the latest at ``deadline`` (CLOCK_MONOTONIC, in
    nanoseconds; None: when something has changed)."""

    def __init__(self, deadline: int | None = None) -> None:
        super().__init__()
        self.deadline = deadline


class Ended(Exception):
    """The thread does not come back from this call."""


#: {number: function}
SERVED: dict[int, Call] = {}


def served(*names: str) -> Callable[[Call], Call]:
    """The function is that of these system calls."""
    def enter(function: Call) -> Call:
        for name in names:
            SERVED[number_of(name)] = function
        return function

    return enter


def signed(value: int) -> int:
    """A long."""
    return value - (1 << 64) if value >> 63 else value


def signed32(value: int) -> int:
    """An int: of a register, its lower half."""
    value &= 0xFFFF_FFFF
    return value - (1 << 32) if value >> 31 else value
