"""The software CPU's native hooks, compiled (workers/accel/unicorn/hooks.py), and what the run loop calls of them.

Import this module late: the first import ever compiles (some seconds), later ones take 30 ms.
"""

from __future__ import annotations

import ctypes
from typing import Any

from ipc.compiled.loader import Native

__all__ = ["ON_BLOCK", "ON_CALL", "ON_FILL", "ON_LOCKED", "ON_SPECIAL", "ON_WRITE", "entry_of", "log_write", "remember",
           "reset"]

_native = Native("workers.accel.unicorn.hooks", "ipc.compiled.atomics", "ipc.layout", "ipc.compiled.loops",
                 "workers.accel.unicorn.context", "workers.accel.unicorn.native",
                 "workers.accel.unicorn.writes", "workers.accel.unicorn.locked",
                 "workers.accel.unicorn.paging")


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


#: Addresses, for uc_hook_add. The hooks' last argument is the address of a CONTEXT, of ON_LOCKED that of a LOCKED.
ON_WRITE, ON_BLOCK, ON_SPECIAL, ON_LOCKED, ON_FILL, ON_CALL = (
    _address(f) for f in (_native.on_write, _native.on_block, _native.on_special, _native.on_locked, _native.on_fill,
                          _native.on_call))


def log_write(context: int, gpa: int, size: int) -> None:
    """The run loop is about to write guest memory on the guest's behalf (INS). ``context`` is the address of the
    CONTEXT."""
    _native.log_write(context, gpa, size)


def entry_of(context: int, address: int) -> int:
    """Of a program's page tables, for the page of an address; 0 where there is none."""
    return int(_native.entry_of(context, address))


def remember(context: int, address: int, size: int) -> None:
    """Put a block into the table of those looked at. The caller keeps the table at most half full."""
    _native.remember(context, address, size)


def reset(context: int) -> int:
    """Free the harvested entries of the ring, and have the next write to their pages logged; how many. The guest is
    outside the emulation."""
    return int(_native.reset(context))
