"""Where Linux programs and their system meet: the system slot of such a machine, and the mailboxes in it.

The system slot (GPA ``SYSTEM_GPA``; a program has it at ``SYSTEM_ADDRESS``, of which only the two entry pages are its
own to execute)::

    page 0          IDT, exception stubs (as in any machine, vmm/machine/boot.py)
    page 1          where ``syscall`` enters (LSTAR), but for hosts with gates (ipc/gates.py)
    page 2          the vsyscall page
    page 3          the bell, rung by gates too (ipc/gates.py)
    page 4          what gates read: on which futexes workers wait, and whether the system sleeps
    page 5 + 3 i    vCPU i of the threads: TSS, GDT, I/O permission bitmap, exception stack
    page 5 + 3 n    two pages of each: its gate and its desk (ipc/gates.py)
    page 5 + 5 n    two pages of each: its mailbox; the second page is for an XSAVE area
    page 5 + 7 n    page tables, to the end

A mailbox is written by one side at a time. The worker (or the vCPU's gate) stores what it asks and then ``ASKED``
(``INSIDE``); the system stores its answer and then ``ANSWERED`` (``DONE``, where there is nothing but a result); x86
keeps the order of stores, and of loads. State and registers are on the desk, which a gate can reach. Each side tells
the other that it sleeps before it looks for the last time, and that needs more: a load must not be made before an
earlier store, hence a fence (ipc/spin.py).
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from enum import IntEnum, IntFlag

from .gates import ASKED, DESK_REGISTERS, DONE, INSIDE, LEAST_ANSWER, NOTICE_ASLEEP, Looks
from .linux import futex
from .shm import PAGE_SIZE
from .spin import Spin, fence

__all__ = ["ASKED", "BELL_PAGE", "ENTRY_PAGE", "EVERYTHING", "IDT_PAGE", "PORT_CALL", "REGISTERS", "SYSCALL_SIZE",
           "SYSTEM_ADDRESS", "VCPU_PAGE", "VCPU_PAGES", "VSYSCALL_ADDRESS", "VSYSCALL_PAGE", "WAITS_PAGE", "Answer",
           "Bell", "Kind", "Mailbox", "gate_page", "mailbox_page", "system_pages", "tables_page"]

SYSTEM_ADDRESS = 0xFFFF_FFFF_8000_0000
VSYSCALL_ADDRESS = 0xFFFF_FFFF_FF60_0000    # arch/x86/include/uapi/asm/vsyscall.h

#: Written to by the stub behind ``syscall``; exceptions have their own (workers/ports.py).
PORT_CALL = 0xF1

SYSCALL_SIZE = 2        # bytes of the instruction

IDT_PAGE, ENTRY_PAGE, VSYSCALL_PAGE, BELL_PAGE, WAITS_PAGE, VCPU_PAGE = range(6)
VCPU_PAGES = 3
_GATE_PAGES = 2         # the gate, the desk
_MAILBOX_PAGES = 2
_TABLES_MIN = 1024              # pages; and one for 256 of memory

#: In the order of struct kvm_regs.
REGISTERS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
             "r15", "rip", "rflags")


def gate_page(threads: int, index: int) -> int:
    """Its desk follows."""
    return VCPU_PAGE + threads * VCPU_PAGES + index * _GATE_PAGES


def mailbox_page(threads: int, index: int) -> int:
    return gate_page(threads, threads) + index * _MAILBOX_PAGES


def tables_page(threads: int) -> int:
    return mailbox_page(threads, threads)


def system_pages(threads: int, memory_pages: int) -> int:
    """Of the whole slot."""
    return tables_page(threads) + _TABLES_MIN + memory_pages // 256


class Kind(IntEnum):
    """What a worker asks for."""

    READY = 1           # it has no thread: for one
    CALL = 2            # a system call: the registers are those behind ``syscall``
    FAULT = 3           # an exception: ``vector``, ``error``, ``address``; the registers are those at the fault
    INTERRUPTED = 4     # it was asked out of the program
    XSAVE = 5           # here is its XSAVE area, which was asked for


class Answer(IntFlag):
    """What it is to do, in this order."""

    STALE = 1           # drop its mapping of ``stale`` frames, or more (`EVERYTHING`)
    ROOT = 2            # use the page tables at ``root``
    FS = 4              # FS base
    REGISTERS = 8       # all of them; without it, ``result`` is that of the call, and a fault is tried again
    SET_XSAVE = 16      # from the mailbox
    GET_XSAVE = 32      # put it into the mailbox and ask again (Kind.XSAVE): the program does not go on
    IDLE = 64           # its thread has ended
    END = 128           # the vCPU ends, with ``result``


_FREE, _HELD, _ANSWERED = 0, 3, LEAST_ANSWER

# Words of 64 bits of a mailbox.
(_KIND, _VECTOR, _ERROR, _ADDRESS, _ANSWER, _RESULT, _ROOT, _FS, _TID, _STALE, _INTERRUPTS, _DROPS, _CPU,
 _DROPPED) = range(2, 16)
_RUNS = 64
#: Runs of stale frames that there is room for, with an answer and with an attention each.
_RUNS_MAX = (PAGE_SIZE // 8 - _RUNS) // 4
#: Instead of a run: all memory, and all page tables. So it is too where there are more runs than there is room for.
EVERYTHING = (0, 0)


class Bell:
    """What a worker rings when it has asked: a flag, and whether the system sleeps, in which case a FIFO that both have
    open is to be written to as well."""

    def __init__(self, system: mmap.mmap) -> None:
        at, asleep = BELL_PAGE * PAGE_SIZE, WAITS_PAGE * PAGE_SIZE + NOTICE_ASLEEP
        self._words = memoryview(system)[at:at + 8].cast("I")
        self._asleep = memoryview(system)[asleep:asleep + 4].cast("I")
        self._spin = Spin()

    @property
    def asleep(self) -> bool:
        return bool(self._asleep[0])

    def set_asleep(self, asleep: bool) -> None:
        self._asleep[0] = asleep
        fence()

    def raise_flag(self) -> None:
        """A worker has asked."""
        self._words[0] = 1

    def lower_flag(self) -> None:
        """The system is about to look at all mailboxes."""
        self._words[0] = 0
        fence()

    def spin(self) -> bool:
        """Somebody has asked since, within a moment."""
        return self._spin.until(self._words, 1)

    def close(self) -> None:
        self._words.release()
        self._asleep.release()


class Mailbox:
    """Of thread vCPU ``index`` in the system slot mapped as ``system``."""

    def __init__(self, system: mmap.mmap, address: int, threads: int, index: int) -> None:
        at = mailbox_page(threads, index) * PAGE_SIZE
        view = memoryview(system)
        self.words = view[at:at + PAGE_SIZE].cast("Q")
        self._attention = view[at:at + 16].cast("I")
        self.xsave = view[at + PAGE_SIZE:at + 2 * PAGE_SIZE]
        desk = (gate_page(threads, index) + 1) * PAGE_SIZE
        #: The first of these 32-bit words is `ASKED` or ``INSIDE``, or something else.
        self.state = view[desk:desk + 8].cast("I")
        #: Of the thread's program, 18 words (`REGISTERS`).
        self.registers = view[desk + DESK_REGISTERS:desk + DESK_REGISTERS + 8 * len(REGISTERS)].cast("Q")
        #: Of a vCPU that has a gate.
        self.looks = Looks(view[desk:desk + PAGE_SIZE])
        self._state_address = address + desk
        self._spins: defaultdict[int, Spin] = defaultdict(Spin)
        self.attention_address = address + at + 8

    def close(self) -> None:
        for view in (self.registers, self.state, self.words, self.xsave, self._attention):
            view.release()
        self.looks.close()

    # --- what is asked ----------------------------------------------------------------------------------------------

    @property
    def asked(self) -> bool:
        return self.state[0] in (ASKED, INSIDE)

    @property
    def in_guest(self) -> bool:
        """The worker asks nothing and waits for nothing: what its thread has is in the vCPU."""
        return self.state[0] == _FREE

    @property
    def is_answered(self) -> bool:
        return self.state[0] >= _ANSWERED

    @property
    def is_held(self) -> bool:
        """It has been seen, and is answered later."""
        return self.state[0] == _HELD

    @property
    def waits(self) -> bool:
        """The worker waits for an answer: it does not enter the guest before that."""
        return self.state[0] in (ASKED, INSIDE, _HELD)

    @property
    def kind(self) -> int:
        """Of what is asked, or was."""
        if self.state[0] == INSIDE:
            self.words[_KIND] = Kind.CALL
        return self.words[_KIND]

    @property
    def fault(self) -> tuple[int, int, int]:
        """(vector, error, address)"""
        return self.words[_VECTOR], self.words[_ERROR], self.words[_ADDRESS]

    def ask(self, kind: int, vector: int = 0, error: int = 0, address: int = 0) -> None:
        """The registers are in their place."""
        words = self.words
        words[_KIND] = kind
        if kind == Kind.FAULT:
            words[_VECTOR], words[_ERROR], words[_ADDRESS] = vector, error, address
        self.state[0] = ASKED
        fence()

    def spin(self, what: int) -> bool:
        """Answered, within a moment. ``what`` was asked: what takes long says nothing of the rest."""
        return self._spins[what].until(self.state, _ANSWERED)

    def wait(self, seconds: float) -> bool:
        """Answered; False where a signal came, or the time is over."""
        if self.state[0] >= _ANSWERED:
            return True
        self.state[1] = 1
        state = self.state[0]
        if state < _ANSWERED:
            futex.wait(self._state_address, state, seconds)
        self.state[1] = 0
        return self.state[0] >= _ANSWERED

    def hold(self) -> None:
        """It is answered later: until then it is not ``asked``."""
        self.state[0] = _HELD

    # --- what is answered -------------------------------------------------------------------------------------------

    def answer(self, answer: int, result: int = 0) -> None:
        """All else is in its place. The worker goes on."""
        if answer:
            words = self.words
            words[_ANSWER] = answer
            words[_RESULT] = result & 0xFFFF_FFFF_FFFF_FFFF
            self.state[0] = _ANSWERED
        else:
            self.registers[0] = result & 0xFFFF_FFFF_FFFF_FFFF
            self.state[0] = DONE
        fence()
        if self.state[1]:
            futex.wake(self._state_address, 1)

    @property
    def answered(self) -> tuple[int, int] | None:
        """(answer, result) that the worker has not taken yet."""
        if self.state[0] == DONE:
            return 0, self.registers[0]
        return (self.words[_ANSWER], self.words[_RESULT]) if self.state[0] == _ANSWERED else None

    def take(self) -> tuple[int, int]:
        """(answer, result), as 64 bits each. None is taken twice, whatever a program has made of the state."""
        words, done = self.words, self.state[0] == DONE
        self.state[0] = _FREE
        if done:
            return 0, self.registers[0]
        answer, words[_ANSWER] = words[_ANSWER], 0
        return answer, words[_RESULT]

    root = property(lambda self: self.words[_ROOT], lambda self, value: self.words.__setitem__(_ROOT, value))
    fs_base = property(lambda self: self.words[_FS], lambda self, value: self.words.__setitem__(_FS, value))
    #: Processor time of the worker's vCPU thread when it asked, nanoseconds.
    cpu_ns = property(lambda self: self.words[_CPU], lambda self, value: self.words.__setitem__(_CPU, value))
    tid = property(lambda self: self.words[_TID], lambda self, value: self.words.__setitem__(_TID, value))

    # --- stale frames -----------------------------------------------------------------------------------------------

    # Those of an answer and those of an attention have their own places: the worker may not have come to the answer yet
    # when its attention is wanted.

    def put_stale(self, runs: list[tuple[int, int]], *, attention: bool = False) -> None:
        """Of frames (first, count), or `EVERYTHING`."""
        words, start = self.words, _RUNS + 2 * _RUNS_MAX * attention
        if len(runs) > _RUNS_MAX or EVERYTHING in runs:
            runs = [EVERYTHING]
        for at, (first, count) in enumerate(runs):
            words[start + 2 * at], words[start + 2 * at + 1] = first, count
        words[_DROPPED if attention else _STALE] = len(runs)

    def stale(self, *, attention: bool = False) -> list[tuple[int, int]]:
        words, start = self.words, _RUNS + 2 * _RUNS_MAX * attention
        return [(words[start + 2 * at], words[start + 2 * at + 1])
                for at in range(words[_DROPPED if attention else _STALE])]

    # --- attention: while the program runs --------------------------------------------------------------------------

    @property
    def attention(self) -> int:
        """Raised by the system for each time that it wants the worker's attention, a u32."""
        return self._attention[2]

    @property
    def interrupts(self) -> int:
        """How often the program was to leave the guest, so far."""
        return self.words[_INTERRUPTS]

    @property
    def drops(self) -> int:
        """How often there were frames to drop at once, so far."""
        return self.words[_DROPS]

    def want_attention(self, *, interrupt: bool) -> int:
        """For one or the other. Whoever wants frames dropped waits for that: the next ones would take their place."""
        self.words[_INTERRUPTS if interrupt else _DROPS] += 1
        self._attention[2] = wanted = (self._attention[2] + 1) & 0xFFFF_FFFF
        futex.wake(self.attention_address, 1)
        return wanted

    @property
    def attended(self) -> int:
        """The last attention that was given."""
        return self._attention[3]

    def attend(self, number: int) -> None:
        self._attention[3] = number


