"""Which functions serve which system calls."""

from __future__ import annotations

from collections.abc import Callable

from ..abi import number_of
from ..blocked import Blocked, Ended

__all__ = ["SERVED", "Blocked", "Call", "Ended", "served", "signed", "signed32"]


#: Of the system, the thread, and six arguments as the registers have them.
Call = Callable[..., int]


#: {number: function}
SERVED: dict[int, Call] = {}


def served(*names: str) -> Callable[[Call], Call]:
    """The function is that of these system calls. Raises ValueError where one of them has a function already."""
    def enter(function: Call) -> Call:
        for name in names:
            if SERVED.setdefault(number_of(name), function) is not function:
                raise ValueError(f"{name} is served twice: {SERVED[number_of(name)]} and {function}")
        return function

    return enter


def signed(value: int) -> int:
    """A long."""
    return value - (1 << 64) if value >> 63 else value


def signed32(value: int) -> int:
    """An int: of a register, its lower half."""
    value &= 0xFFFF_FFFF
    return value - (1 << 32) if value >> 31 else value
