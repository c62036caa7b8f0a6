"""Where ``syscall`` enters on a KVM that has page tables alone, which costs an exit of 25 us: code of the guest's that
asks the system itself, and looks for the answer for a while, without leaving the guest.

Each thread vCPU has two pages of the system slot for that. Its **gate** is code, and LSTAR: as ``syscall`` does not
change the level there, a program executes it. Its **desk** is what the gate writes to, and so is every program's too::

    0x000   u32         the state of the mailbox (ipc/programs.py)
    0x004   u32         whether the worker sleeps until it is answered
    0x040   18 x u64    registers, as ipc.programs.REGISTERS has them
    0x400   512 x u16   by number of the call: how often the gate looks for an answer; 0: the worker has the call
    0x800   512 x u16   by number: an answer has come while it looked
    0xff0   a stack, for the flags

The way of a call: the registers go to the desk, the state becomes ``INSIDE``, the bell is rung. If the system sleeps,
or has not answered by the last look, or its answer has more than a result, the gate restores the two registers that it
has used and writes to the port, as the stub of other hosts does at once (vmm/machine/boot.py); then the call is the
worker's, which sees by the state that it has been asked already. Else the gate takes the result and goes back.

A vCPU may be stopped anywhere in a gate. Nobody runs it on: what it has done is seen from where it stands (`Stop`).

No more is believed of what is on a desk (or of the bell, another such page) than a program may say for itself: its
registers, and that it makes a call. Whatever else an answer says (page tables, frames to drop) is in the mailbox, which
no program has. So a program that writes to a desk can disturb the calls of other programs of its machine (it runs at
the level of the gate: there is no other), but neither their memory nor the system.

**FUTEX_WAKE where nobody waits** is 0, and needs nobody. Each worker says in a page that programs can read (`Waits`)
on which word it is about to wait, and takes that back when it has waited: the place of the word in its page, which is
the same wherever the page is mapped. The gate looks through them all, and has the call made if one may be meant. No
wake-up is lost. Who waits stores what it says, and then has the kernel compare the word, behind an atomic operation
(futex(2): it queues itself before it looks). Who wakes has stored to the word, and then, behind a fence, reads what is
said. So it cannot be that the waiter saw the old word and the waker saw nobody: one of the two loads comes last, and
sees the other side's store. Whoever was put on the queue of another word (FUTEX_REQUEUE) is not where it said; so once
that is used, it is said first, and no gate answers any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import NamedTuple

__all__ = ["ASKED", "DESK_REGISTERS", "DONE", "FUTEX", "INSIDE", "LEAST_ANSWER", "NOTICE_ASLEEP", "Looks", "Stop",
           "Waits", "gate", "stopped_at"]

#: States: a call of the gate's; from ``LEAST_ANSWER`` on an answer is there; ``DONE``: a result, and nothing else.
ASKED, INSIDE, LEAST_ANSWER, DONE = 1, 2, 4, 5
_FREE = 0

FUTEX = 202             # the number of the call

DESK_REGISTERS, _DESK_LOOKS, _DESK_GOOD, _DESK_STACK = 0x40, 0x400, 0x800, 0x1000
_CALLS_MOST = 512
#: Of the page that programs may read: what workers say, behind whether waiters may be somewhere else; whether the
#: system sleeps.
_WAITS, NOTICE_ASLEEP = 4, 0xFFC

#: Before the worker has the call.
_LOOKS = 2000
#: How often in a row the worker has it at once after looking was of no use, at most.
_PAUSE_MAX = 127

_RAX, _RCX, _RSP, _R11, _RIP, _RFLAGS = 0, 2, 6, 11, 16, 17     # of ipc.programs.REGISTERS
#: (its number for the processor, its place on the desk) of those that the gate does not use.
_OTHERS = ((0, 0), (3, 1), (2, 3), (6, 4), (7, 5), (4, 6), (5, 7), (8, 8), (9, 9), (10, 10), (12, 12), (13, 13),
           (14, 14), (15, 15))
_TRAP = 0x100
_FLAGS, _FLAGS_ALWAYS = 0x24_0DD5, 0x202        # that a program may have; that it has


class _To(NamedTuple):
    """An instruction whose operand is the distance to a label: four bytes, in front of ``rest``."""

    code: bytes
    label: str
    offset: int = 0
    rest: bytes = b""


def _place(register: int) -> bytes:
    return (DESK_REGISTERS + 8 * register).to_bytes(4, "little")


def _number(value: int) -> bytes:
    return value.to_bytes(4, "little", signed=True)


_JMP, _JE, _JNE, _JAE = b"\xe9", b"\x0f\x84", b"\x0f\x85", b"\x0f\x83"
_STATE = b"\x41\xc7\x83" + _number(0)                  # movl ..., state: with r11 the desk, as in all that follows
_LOAD_RCX, _LOAD_R11 = b"\x49\x8b\x8b" + _place(_RCX), b"\x4d\x8b\x9b" + _place(_R11)      # mov place, ...
_FENCE = b"\x0f\xae\xf0"                               # mfence


def _code(threads: int) -> list[bytes | str | _To]:
    """With labels, of which "desk", "bell" and "waits" are elsewhere."""
    return [
        _To(b"\x4c\x89\x1d", "desk", DESK_REGISTERS + 8 * _R11),       # mov %r11, r11(%rip)
        _To(b"\x48\x89\x0d", "desk", DESK_REGISTERS + 8 * _RCX),       # mov %rcx, rcx(%rip)
        "kept",
        _To(b"\x4c\x8d\x1d", "desk"),                                 # lea desk(%rip), %r11
        b"\x49\x89\x8b" + _place(_RIP),                               # mov %rcx, rip
        b"\x49\x8b\x8b" + _place(_R11),                               # mov r11, %rcx
        b"\x81\xe1" + _number(_FLAGS),                                # and $_FLAGS, %ecx
        b"\x81\xc9" + _number(_FLAGS_ALWAYS),                         # or $_FLAGS_ALWAYS, %ecx
        b"\x49\x89\x8b" + _place(_RFLAGS),                            # mov %rcx, rflags
        b"\xf7\xc1" + _number(_TRAP), _To(_JNE, "leave"),             # test $_TRAP, %ecx
        b"\x48\x3d" + _number(FUTEX), _To(_JE, "waking"),             # cmp $FUTEX, %rax
        b"\x48\x3d" + _number(_CALLS_MOST), _To(_JAE, "leave"),       # cmp $_CALLS_MOST, %rax
        b"\x41\x0f\xb7\x8c\x43" + _number(_DESK_LOOKS),              # movzwl looks(%r11,%rax,2), %ecx
        b"\x85\xc9", _To(_JE, "leave"),                               # test %ecx, %ecx
        b"".join((b"\x49" if number < 8 else b"\x4d") + bytes([0x89, 0x83 | (number & 7) << 3]) + _place(place)
                 for number, place in _OTHERS),                       # mov %reg, place
        _STATE + _number(INSIDE),
        _To(b"\xc7\x05", "bell", 0, _number(1)),                      # movl $1, bell(%rip)
        _FENCE,
        _To(b"\x83\x3d", "waits", NOTICE_ASLEEP, b"\0"), _To(_JNE, "leave"),     # cmpl $0, asleep(%rip)
        "look",
        b"\xf3\x90\x41\x83\xbb" + _number(0) + bytes([LEAST_ANSWER]),     # pause; cmpl $LEAST_ANSWER, state
        _To(_JAE, "answered"),
        b"\xff\xc9", _To(_JNE, "look"),                               # dec %ecx
        "leave",
        _LOAD_RCX, _LOAD_R11, b"\xe6\xf1\xf4",                        # out %al, $PORT_CALL; hlt

        "waking",
        b"\x89\xf1\x81\xe1" + _number(~0x80),                         # mov %esi, %ecx; and $~FUTEX_PRIVATE_FLAG, %ecx
        b"\x83\xf9\1", _To(_JNE, "not here"),                         # cmp $FUTEX_WAKE, %ecx
        b"\x48\x89\xf9\x48\xc1\xe9\x2f", _To(_JNE, "not here"),        # mov %rdi, %rcx; shr $47, %rcx
        b"\x40\xf6\xc7\3", _To(_JNE, "not here"),                     # test $3, %dil
        b"\x8b\x0f",                                                  # mov (%rdi), %ecx: or it is a fault
        _FENCE,
        _To(b"\x4c\x8d\x1d", "waits"),                                # lea waits(%rip), %r11
        b"\x41\x83\x3b\0", _To(_JNE, "not here"),                     # cmpl $0, (%r11)
        b"\x89\xf9\x81\xe1" + _number(0xFFF) + b"\xff\xc1",           # mov %edi, %ecx; and $0xfff, %ecx; inc %ecx
        b"\xb8" + _number(threads),                                   # mov $threads, %eax
        "next",
        b"\x66\x41\x39\x8c\x43" + _number(_WAITS - 2), _To(_JE, "not here"),       # cmp %cx, waits - 2(%r11,%rax,2)
        b"\xff\xc8", _To(_JNE, "next"),                               # dec %eax
        _To(b"\x4c\x8d\x1d", "desk"),                                 # lea desk(%rip), %r11
        _LOAD_RCX,
        b"\x49\x89\xa3" + _place(_RSP),                               # mov %rsp, rsp
        b"\x49\xc7\x83" + _place(_RAX) + _number(0),                  # movq $0, rax
        b"\x31\xc0", _To(_JMP, "back"),                               # xor %eax, %eax
        "not here",
        b"\xb8" + _number(FUTEX), _To(b"\x4c\x8d\x1d", "desk"), _To(_JMP, "leave"),
        "answered",
        _To(_JE, "leave"),
        b"\x66\x41\xc7\x84\x43" + _number(_DESK_GOOD) + b"\1\0",      # movw $1, good(%r11,%rax,2)
        _LOAD_RCX, b"\x49\x8b\x83" + _place(_RAX),                    # mov rax, %rax
        _STATE + _number(_FREE),
        "back",
        b"\x49\x8d\xa3" + _number(_DESK_STACK),                       # lea stack, %rsp
        b"\x41\xff\xb3" + _place(_RFLAGS) + b"\x9d",                  # push rflags; popf
        b"\x49\x8b\xa3" + _place(_RSP), _LOAD_R11,                    # mov rsp, %rsp
        b"\xff\xe1",                                                  # jmp *%rcx
        "end"]


def _size(part: bytes | str | _To) -> int:
    if isinstance(part, _To):
        return len(part.code) + 4 + len(part.rest)
    return len(part) if isinstance(part, bytes) else 0


def _labels(code: Iterable[bytes | str | _To]) -> dict[str, int]:
    at, found = 0, {}
    for part in code:
        if isinstance(part, str):
            found[part] = at
        at += _size(part)
    return found


def gate(threads: int, *, desk: int, bell: int, waits: int) -> bytes:
    """The code. ``desk``, ``bell``, ``waits``: where they are, from its own beginning on."""
    parts = _code(threads)
    labels, code = _labels(parts) | {"desk": desk, "bell": bell, "waits": waits}, b""
    for part in parts:
        if isinstance(part, _To):
            distance = labels[part.label] + part.offset - len(code) - _size(part)
            code += part.code + _number(distance) + part.rest
        elif isinstance(part, bytes):
            code += part
    return code


class Stop(Enum):
    """What a vCPU that stands in its gate has done, and which of the program's registers are on the desk."""

    ENTERED = auto()    # nothing: rcx and r11 are as ``syscall`` has left them
    BEGUN = auto()      # these two are. Whether it has asked, and is answered, is in the state
    WAKING = auto()     # these two are; it is a FUTEX call, which has not been made
    BACK = auto()       # a call has been made: rax, rcx, rsp, r11, rip, rflags are those with which the program goes on


_LABELS = _labels(_code(1))


def stopped_at(place: int) -> Stop | None:
    """``place``: of the next instruction, from the beginning of the gate on; None: it is not in there."""
    if not 0 <= place < _LABELS["end"]:
        return None
    if place <= _LABELS["kept"]:
        return Stop.ENTERED
    if place >= _LABELS["back"]:
        return Stop.BACK
    return Stop.WAKING if _LABELS["waking"] <= place < _LABELS["answered"] else Stop.BEGUN


class Waits:
    """What workers say of the words that they wait on: a page of the system slot."""

    def __init__(self, page: memoryview, index: int) -> None:
        self._moved = page[:4].cast("I")
        self._mine = page[_WAITS + 2 * index:_WAITS + 2 * index + 2].cast("H")

    def close(self) -> None:
        self._moved.release()
        self._mine.release()

    def begin(self, address: int) -> None:
        """Before the kernel compares the word."""
        self._mine[0] = address % 4096 + 1

    def end(self) -> None:
        """It waits no more."""
        self._mine[0] = 0

    def move(self) -> None:
        """Before anybody is put on the queue of another word."""
        self._moved[0] = 1


class Looks:
    """Which calls a gate makes, of a desk: the worker's. A call for which looking was of no use is made by the worker
    the next time, or the next 3, 7, ... times (ipc.programs.Spin says why)."""

    def __init__(self, desk: memoryview) -> None:
        self._looks = desk[_DESK_LOOKS:_DESK_LOOKS + 2 * _CALLS_MOST].cast("H")
        self._good = desk[_DESK_GOOD:_DESK_GOOD + 2 * _CALLS_MOST].cast("H")
        self._pauses: dict[int, int] = {}
        self._left: dict[int, int] = {}     # of those that it does not make for a while

    def close(self) -> None:
        self._looks.release()
        self._good.release()

    def begin(self, outside: Iterable[int]) -> None:
        """All but these."""
        for number in {*range(_CALLS_MOST)} - {*outside}:
            self._looks[number] = _LOOKS

    def in_vain(self, number: int) -> None:
        if number < _CALLS_MOST and self._looks[number]:
            pause = 1 if self._good[number] else min(2 * self._pauses.get(number, 0) + 1, _PAUSE_MAX)
            self._looks[number] = self._good[number] = 0
            self._pauses[number] = self._left[number] = pause

    def passed(self, number: int) -> None:
        """The worker has made it."""
        left = self._left.get(number)
        if left is not None and left > 1:
            self._left[number] = left - 1
        elif left is not None:
            del self._left[number]
            self._looks[number] = _LOOKS
