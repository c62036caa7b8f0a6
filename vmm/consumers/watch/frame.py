"""A signal frame for a thread that no signal has come to.

With this in its memory, a thread that comes to rt_sigreturn(2) with its stack pointer behind the frame's first word is
where it was, with every register, the vector registers and its blocked signals. So a thread whose registers were
changed by a tracer needs no tracer to get back.

Layout of Linux x86-64: ``struct rt_sigframe`` (arch/x86/include/asm/sigframe.h), ``struct sigcontext_64`` and ``struct
_fpx_sw_bytes`` (uapi/asm/sigcontext.h).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ipc.linux.ptrace import Registers

__all__ = ["CALL_BYTES", "RED_ZONE", "SignalFrame", "after_restart", "build", "frame_room"]

RED_ZONE = 128              # bytes below the stack pointer that are the function's own
CALL_BYTES = 2              # of the instruction ``syscall``

_MAGIC1, _MAGIC2 = 0x46505853, 0x46505845
_SW_BYTES = 464             # where in the state those lie that are software's
_STATE_VECTOR = 512         # XSTATE_BV, of the XSAVE header
_STATE_MIN = 576
_TILES = 3 << 17            # AMX: a thread that uses it has a larger frame
_TILES_AT = 2752            # where their state begins
_UC_FLAGS = 7               # UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS
_NO_STACK = 3               # neither SS_ONSTACK nor SS_DISABLE: the alternate signal stack is left as it is
_SIGINFO = 128
_EINTR = 4
#: What a system call says that is to be made again, and what a handler of a signal makes of it.
_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND, _ERESTART_RESTARTBLOCK = 512, 513, 514, 516

_HEAD = struct.Struct("<QQQQiiQ")           # return address; flags, link; alternate stack: pointer, flags, -, size
_CONTEXT = struct.Struct("<18Q4H4QQ64x")    # registers, segments, err, trapno, oldmask, cr2, fpstate
_MASK = struct.Struct("<Q")
_FRAME = _HEAD.size + _CONTEXT.size + _MASK.size + _SIGINFO
_ORDER = ("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx", "rdx", "rax", "rcx",
          "rsp", "rip", "eflags")

assert _CONTEXT.size == 256
assert _FRAME == 440


class SignalFrame(NamedTuple):
    """``data`` is to lie at ``address``; ``stack`` is the stack pointer with which a ``ret`` goes to the restorer."""

    address: int
    data: bytes
    stack: int


def after_restart(registers: Registers) -> Registers:
    """As they are once the kernel has seen to a system call that was interrupted: made again, or, where the kernel
    alone knows how it goes on (the rest of a sleep), EINTR as after a signal that has a handler."""
    found = registers.copy()
    interrupted = (1 << 64) - found.rax
    if found.orig_rax < 1 << 63:
        if interrupted in (_ERESTARTSYS, _ERESTARTNOINTR, _ERESTARTNOHAND):
            found.rax = found.orig_rax
            found.rip -= CALL_BYTES
        elif interrupted == _ERESTART_RESTARTBLOCK:
            found.rax = (1 << 64) - _EINTR
    found.orig_rax = (1 << 64) - 1
    return found


def frame_room(state: bytes) -> int:
    """Bytes below the stack pointer that a frame with this state takes, at most."""
    return RED_ZONE + len(state) + 4 + 64 + _FRAME + 16


def build(registers: Registers, state: bytes, blocked: int, restorer: int) -> SignalFrame:
    """The frame of a thread with these registers, extended state and mask of blocked signals, below its red zone;
    ``restorer``: code that makes the call rt_sigreturn. Raises ValueError for a state that cannot be put into a frame
    from outside."""
    at = _state_with_magic(state)
    state_address = (registers.rsp - RED_ZONE - len(at)) & ~63
    stack = ((state_address - _FRAME) & ~15) - 8        # as if it had been called
    now = after_restart(registers)
    frame = (_HEAD.pack(restorer, _UC_FLAGS, 0, 0, _NO_STACK, 0, 0)
             + _CONTEXT.pack(*(getattr(now, name) for name in _ORDER), now.cs, 0, 0, now.ss, 0, 0, 0, 0,
                             state_address)
             + _MASK.pack(blocked) + bytes(_SIGINFO))
    gap = bytes(state_address - stack - len(frame))
    return SignalFrame(stack, frame + gap + at, stack)


def _state_with_magic(state: bytes) -> bytes:
    """The state, marked so that the kernel takes all of it, not only what FXSAVE has. Raises ValueError."""
    if len(state) < _STATE_MIN:
        raise ValueError("its processor has no XSAVE")
    (features,) = struct.unpack_from("<Q", state, _SW_BYTES)
    (there,) = struct.unpack_from("<Q", state, _STATE_VECTOR)
    size = len(state)
    if there & _TILES:
        raise ValueError("it uses AMX tiles")
    if features & _TILES:       # a thread that may not use them has a frame without them
        features &= ~_TILES
        size = min(size, _TILES_AT)
    software = struct.pack("<IIQI28x", _MAGIC1, size + 4, features, size)
    return (state[:_SW_BYTES] + software + state[_SW_BYTES + len(software):size] + struct.pack("<I", _MAGIC2))
