"""Signals as data, and the frame that a handler starts with (Linux: signal(7), arch/x86/kernel/signal_64.c's layout as
uapi/asm/sigcontext.h and ucontext.h give it)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from ipc.programs import REGISTERS

from .space import Space

__all__ = [
    "ACTION",
    "ALL",
    "CHLD",
    "CONT",
    "FRAME_FLAGS",
    "INIT_XSAVE",
    "KILL",
    "NOCLDSTOP",
    "NOCLDWAIT",
    "NODEFER",
    "ONSTACK",
    "PIPE",
    "RESETHAND",
    "RESTART",
    "SEGV",
    "STOPPING",
    "Action",
    "Default",
    "Frame",
    "SignalInfo",
    "bit",
    "build_frame",
    "default_of",
    "is_pending",
    "parse_frame",
]

HUP, INT, QUIT, ILL, TRAP, ABRT, BUS, FPE, KILL, USR1, SEGV, USR2, PIPE, ALRM, TERM = range(1, 16)
CHLD, CONT, STOP, TSTP, TTIN, TTOU, URG = 17, 18, 19, 20, 21, 22, 23
WINCH = 28
LAST = 64
_REALTIME = 32      # from here on, each that is sent is delivered

STOPPING = frozenset({STOP, TSTP, TTIN, TTOU})
_IGNORED = frozenset({CHLD, CONT, URG, WINCH})
#: With a core dump; there is none, but wait(2) says that there could have been.
_CORE = frozenset({QUIT, ILL, TRAP, ABRT, BUS, FPE, SEGV, 24, 25, 31})
_FAULTS = frozenset({ILL, TRAP, BUS, FPE, SEGV})

ALL = (1 << LAST) - 1

# sa_flags
NOCLDSTOP, NOCLDWAIT, SIGINFO = 1, 2, 4
ONSTACK, RESTART, NODEFER, RESETHAND = 0x0800_0000, 0x1000_0000, 0x4000_0000, 0x8000_0000
_KNOWN_FLAGS = 0xDC00_0807          # with SA_EXPOSE_TAGBITS and SA_RESTORER
ACTION = struct.Struct("<QQQQ")     # struct sigaction of the kernel: handler, flags, restorer, mask
_DEFAULT, _IGNORE = 0, 1


def bit(number: int) -> int:
    return 1 << number - 1


#: Neither blocked nor caught.
UNBLOCKABLE = bit(KILL) | bit(STOP)


class Default(Enum):
    """What a signal does where a process has not said."""

    IGNORE = 0
    END = 1
    STOP = 2
    CONTINUE = 3


def default_of(number: int) -> Default:
    if number == CONT:
        return Default.CONTINUE
    if number in _IGNORED:
        return Default.IGNORE
    return Default.STOP if number in STOPPING else Default.END


def wait_code(number: int) -> int:
    """Of a process that a signal has ended, as wait(2) gives it."""
    return number | (0x80 if number in _CORE else 0)


@dataclass(frozen=True, slots=True)
class Action:
    """What a process does at a signal."""

    handler: int = _DEFAULT
    flags: int = 0
    restorer: int = 0
    mask: int = 0

    @classmethod
    def asked(cls, data: bytes) -> Action:
        """As sigaction(2) is given it: what is not known is left out."""
        handler, flags, restorer, mask = ACTION.unpack(data)
        return cls(handler, flags & _KNOWN_FLAGS, restorer, mask & ~UNBLOCKABLE)

    def pack(self) -> bytes:
        return ACTION.pack(self.handler, self.flags, self.restorer, self.mask)

    @property
    def is_default(self) -> bool:
        return self.handler == _DEFAULT

    @property
    def ignores(self) -> bool:
        return self.handler == _IGNORE

    def as_default(self) -> Action:
        """Without its handler, and otherwise as it was."""
        return replace(self, handler=_DEFAULT)


@dataclass(frozen=True, slots=True)
class SignalInfo:
    """struct siginfo: which of its parts there are depends on ``number`` and ``code``."""

    number: int
    code: int = 0               # SI_USER
    pid: int = 0
    uid: int = 0
    status: int = 0
    address: int = 0
    value: int = 0
    raw: bytes = b""            # all of it, as rt_sigqueueinfo(2) was given it

    @property
    def is_fault(self) -> bool:
        """Of what a thread has just done."""
        return self.code > 0 and self.number in _FAULTS

    def pack(self) -> bytes:
        """128 bytes."""
        if self.raw:
            return self.raw.ljust(128, b"\0")
        head = struct.pack("<iii4x", self.number, 0, self.code)
        if self.is_fault:
            tail = struct.pack("<Q", self.address)
        elif self.number == CHLD and self.code > 0:
            tail = struct.pack("<iiiqq", self.pid, self.uid, self.status, 0, 0)
        elif self.code == -2:       # SI_TIMER
            tail = struct.pack("<iiQ", self.pid, self.status, self.value)     # the timer, its overrun
        else:
            tail = struct.pack("<iiQ", self.pid, self.uid, self.value)
        return (head + tail).ljust(128, b"\0")


# --- frames ---------------------------------------------------------------------------------------------------------

_R = {name: at for at, name in enumerate(REGISTERS)}
#: In the order of struct sigcontext.
_CONTEXT = tuple(_R[name] for name in ("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rdi", "rsi", "rbp", "rbx",
                                       "rdx", "rax", "rcx", "rsp", "rip", "rflags"))
_UCONTEXT = struct.Struct("<QQ" + "Qi4xQ" + "18Q" + "4H" + "4Q" + "Q" + "64x" + "Q")
_UC_FLAGS = 6           # UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
_CS, _SS = 0x33, 0x2B   # as Linux has them; not taken from a frame
_FRAME_SIZE = 8 + _UCONTEXT.size + 128
_RED_ZONE = 128
_MAGIC1, _MAGIC2 = 0x4650_5853, 0x4650_5845
_SW_AT = 464            # struct _fpx_sw_bytes within the FXSAVE area
_STATE_AT = 512         # XSTATE_BV, in an XSAVE area
_DISABLE, _ON_STACK = 2, 1
FRAME_FLAGS = ~(0x400 | 0x100) & (1 << 64) - 1      # a handler starts without DF and TF

#: (features in XSTATE_BV, bytes of the area), with which a processor has them in its standard form.
_SIZES = ((0x2E0, 2696), (0x18, 1088), (0x04, 832))
_SIZE_MIN = 576

#: Registers of a new thread, and of a handler: control words as after a reset, features 1 and 2 (x87, SSE) in the area.
INIT_XSAVE = struct.pack("<H22xII", 0x037F, 0x1F80, 0xFFFF).ljust(_STATE_AT, b"\0") + struct.pack("<Q", 3)
INIT_XSAVE = INIT_XSAVE.ljust(4096, b"\0")

assert _UCONTEXT.size == 304


@dataclass(frozen=True, slots=True)
class Frame:
    """What rt_sigreturn(2) goes back to."""

    registers: list[int]
    mask: int
    alternate: bytes            # struct stack_t
    xsave: bytes | None


def is_pending(number: int, pending: Iterable[SignalInfo]) -> bool:
    """Whether it need not be added to those: of a signal that is not a real-time one, one is enough."""
    return number < _REALTIME and any(each.number == number for each in pending)


def build_frame(space: Space, registers: Sequence[int], xsave: bytes, info: SignalInfo, action: Action, mask: int,
                alternate: bytes, *, error: int = 0, trap: int = 0, address: int = 0) -> list[int]:
    """Put it on the stack; the registers with which the handler starts. ``registers``: of where the thread goes on
    afterwards, ``mask`` what is blocked there. Raises SegmentationFault."""
    found = list(registers)
    rsp = registers[_R["rsp"]]
    base, flags, size = struct.unpack("<Qi4xQ", alternate or struct.pack("<Qi4xQ", 0, _DISABLE, 0))
    on = bool(size) and base < rsp <= base + size
    top = base + size if action.flags & ONSTACK and not flags & _DISABLE and not on else rsp - _RED_ZONE
    features, = struct.unpack_from("<Q", xsave, _STATE_AT)
    length = next((size for bits, size in _SIZES if features & bits), _SIZE_MIN)
    place = top - length - 4 & ~63
    sp = (place - _FRAME_SIZE & ~15) - 8
    area = bytearray(xsave[:length])
    saved = 0xE7 if length > 1088 else 7 if length > _SIZE_MIN else 3
    struct.pack_into("<IIQI", area, _SW_AT, _MAGIC1, length + 4, saved, length)
    context = _UCONTEXT.pack(
        _UC_FLAGS, 0, base, (_ON_STACK if on else flags & _DISABLE), size, *(registers[at] for at in _CONTEXT),
        _CS, 0, 0, _SS, error, trap, mask, address, place, mask)
    space.write(place, bytes(area) + struct.pack("<I", _MAGIC2))
    space.write(sp, struct.pack("<Q", action.restorer) + context + info.pack())
    found[_R["rsp"]], found[_R["rip"]] = sp, action.handler
    found[_R["rdi"]], found[_R["rsi"]], found[_R["rdx"]] = info.number, sp + 8 + _UCONTEXT.size, sp + 8
    found[_R["rax"]] = 0
    found[_R["rflags"]] &= FRAME_FLAGS
    return found


def parse_frame(space: Space, rsp: int) -> Frame:
    """At rt_sigreturn(2), where the return address has been taken off. Raises SegmentationFault."""
    fields = _UCONTEXT.unpack(space.read(rsp, _UCONTEXT.size))
    registers = [0] * len(REGISTERS)
    for at, value in zip(_CONTEXT, fields[5:23], strict=True):
        registers[at] = value
    place, mask = fields[31], fields[32]
    xsave = None
    if place:
        head = space.read(place, _STATE_AT)
        magic, _, _, length = struct.unpack_from("<IIQI", head, _SW_AT)
        length = length if magic == _MAGIC1 and _SIZE_MIN <= length <= 4096 else _STATE_AT
        xsave = space.read(place, length)
        if length == _STATE_AT:
            xsave += struct.pack("<Q", 3)
        xsave = xsave[:_SW_AT] + bytes(48) + xsave[_STATE_AT:]
        xsave = xsave.ljust(4096, b"\0")
    return Frame(registers, mask, struct.pack("<Qi4xQ", *fields[2:5]), xsave)
