"""ptrace(2) of one thread, x86-64: stopping it, its registers, and letting it go on from one system call to the next.

A thread that is *seized* goes on by itself when its tracer ends, however that comes. Two things are left out here
because they do not keep to that: single-stepping (the trap flag stays set, so the next instruction of a thread whose
tracer has ended is a SIGTRAP that kills its process), and the mask of blocked signals (it stays as it was set).

Numbers are those of Linux ``uapi/linux/ptrace.h``, ``asm/user_64.h`` and ``uapi/linux/elf.h``. All calls for a thread
are made by the thread that seized it.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import NamedTuple

from .libc import LIBC, check

__all__ = ["Ended", "Registers", "Stop", "Traced"]

_CONT, _GETREGS, _SETREGS, _DETACH, _SYSCALL = 7, 12, 13, 17, 24
_GETREGSET, _SEIZE, _INTERRUPT, _GETSIGMASK = 0x4204, 0x4206, 0x4207, 0x420A
_GET_RSEQ, _GET_DISPATCH = 0x420F, 0x4211
_O_TRACESYSGOOD = 1
_EVENT_STOP = 128
_NT_X86_XSTATE = 0x202
_WALL = 0x40000000
_XSTATE_MAX = 1 << 16

_ptrace = LIBC.ptrace
_ptrace.restype = ctypes.c_long
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


class Registers(ctypes.Structure):
    """``struct user_regs_struct``"""

    _fields_ = [(name, ctypes.c_uint64) for name in (
        "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
        "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs")]

    def copy(self) -> Registers:
        return Registers.from_buffer_copy(self)


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _Rseq(ctypes.Structure):
    """``struct ptrace_rseq_configuration``"""

    _fields_ = [("pointer", ctypes.c_uint64), ("size", ctypes.c_uint32), ("signature", ctypes.c_uint32),
                ("flags", ctypes.c_uint32), ("pad", ctypes.c_uint32)]


class Stop(NamedTuple):
    """Why a thread stands still."""

    #: "stop" (by ``interrupt``), "group" (its process is being stopped by a signal), "syscall" (it enters or leaves a
    #: system call), "signal" (one is about to be delivered to it).
    kind: str
    signal: int     # the one that is about to be delivered; 0 for all other kinds


class Ended(Exception):
    """The thread has ended, or its process."""


class Traced:
    """One thread that this thread traces, from ``Traced(tid)`` on. What is asked of one that has ended raises
    Ended, other failures OSError."""

    def __init__(self, tid: int) -> None:
        """It runs on until ``interrupt``. Raises OSError (EPERM: it may not be traced, or is already), and Ended."""
        self.tid = tid
        self._call(_SEIZE, 0, _O_TRACESYSGOOD)

    def _call(self, request: int, address: int = 0, data: int = 0) -> None:
        try:
            check(_ptrace(request, self.tid, address, data))
        except ProcessLookupError:
            raise Ended from None

    def interrupt(self) -> None:
        """It is to stop; ``wait`` for that."""
        self._call(_INTERRUPT)

    def wait(self) -> Stop:
        """Until it stands still. Raises Ended, and what a handler of a signal raises meanwhile."""
        try:
            _, status = os.waitpid(self.tid, _WALL)
        except ChildProcessError:
            raise Ended from None
        if not os.WIFSTOPPED(status):
            raise Ended
        number, event = os.WSTOPSIG(status), status >> 16
        if event == _EVENT_STOP:
            return Stop("stop" if number == signal.SIGTRAP else "group", 0)
        if number == signal.SIGTRAP | 0x80:
            return Stop("syscall", 0)
        return Stop("signal", number)

    def registers(self) -> Registers:
        found = Registers()
        self._call(_GETREGS, 0, ctypes.addressof(found))
        return found

    def set_registers(self, registers: Registers) -> None:
        self._call(_SETREGS, 0, ctypes.addressof(registers))

    def extended_state(self) -> bytes:
        """Vector and floating-point registers, as XSAVE lays them out (standard format); in the bytes from 464 on
        that are software's, the features that the kernel has there (u64)."""
        room = ctypes.create_string_buffer(_XSTATE_MAX)
        vector = _Vector(ctypes.addressof(room), _XSTATE_MAX)
        self._call(_GETREGSET, _NT_X86_XSTATE, ctypes.addressof(vector))
        return room.raw[:vector.length]

    def blocked_signals(self) -> int:
        """Bit n-1 is signal n. (Where a call such as ppoll has a mask of its own: that from before it.)"""
        found = ctypes.c_uint64()
        self._call(_GETSIGMASK, ctypes.sizeof(found), ctypes.addressof(found))
        return found.value

    def restartable_sequences(self) -> int | None:
        """Address of its ``struct rseq``; 0: it has none. None where the kernel does not tell (before 5.13)."""
        found = _Rseq()
        try:
            self._call(_GET_RSEQ, ctypes.sizeof(found), ctypes.addressof(found))
        except OSError:
            return None
        return int(found.pointer)

    def dispatches_calls(self) -> bool:
        """Its own system calls are signals to it (prctl PR_SET_SYSCALL_USER_DISPATCH)."""
        found = (ctypes.c_uint64 * 4)()
        try:
            self._call(_GET_DISPATCH, ctypes.sizeof(found), ctypes.addressof(found))
        except OSError:         # a kernel before 6.4
            return False
        return bool(found[0])

    def run(self, deliver: int = 0) -> None:
        """Let it go on; ``deliver``: the signal that it stopped for."""
        self._call(_CONT, 0, deliver)

    def run_to_call(self, deliver: int = 0) -> None:
        """Let it go on until it enters a system call or leaves one."""
        self._call(_SYSCALL, 0, deliver)

    def detach(self, deliver: int = 0) -> None:
        """Let it go on for good. It must stand still. Raises Ended."""
        self._call(_DETACH, 0, deliver)
