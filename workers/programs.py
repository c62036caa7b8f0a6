"""A thread of a Linux program, on its vCPU: what it asks for goes through a mailbox to the system (workers/linux),
which is another process; some calls are served here, because they need nothing of it.

A wait for the answer can be left at any time, and taken up again: `begin` does. While the program runs the system can
still have something of this process (``attention``, served by a thread of its own): that it drops translations, or
takes the program out of the guest.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ipc.bell import PROGRAM_CALL, Doorbell
from ipc.gates import FUTEX, Waits
from ipc.layout import KICK_SIGNAL, VcpuControl, VcpuState
from ipc.linux import futex
from ipc.messages import ExitReason, WorkerSpec
from ipc.programs import REGISTERS, WAITS_PAGE, Answer, Bell, Kind, Mailbox
from ipc.shm import PAGE_SIZE

from .accel.base import Exit, ExitKind, ProgramAccelerator
from .futexes import FutexCall, Futexes
from .memory import GuestMemory

__all__ = ["ProgramThread"]

_RAX = REGISTERS.index("rax")
_ARGUMENTS = tuple(REGISTERS.index(name) for name in ("rdi", "rsi", "rdx", "r10", "r8", "r9"))
_STEP = 0.2             # seconds after which a wait looks around, should a kick have come just before it
_ATTENTION_STEP = 1.0
_REPEAT = 0.005
_SCHED_YIELD, _GETTID = 24, 186
#: Calls that no gate makes: rt_sigreturn, pause, nanosleep, clone, fork, vfork, execve, exit, getrusage, times,
#: rt_sigsuspend, arch_prctl, clock_gettime, clock_nanosleep, exit_group, execveat, clone3. They need to know what the
#: worker says with a call (the FS base, its processor time), or are answered with more than a result.
_OUTSIDE = (15, 34, 35, 56, 57, 58, 59, 60, 98, 100, 130, 158, 228, 230, 231, 322, 435)

#: Instead of the number of a call: the gate has looked, and the system was at something else, asleep, or without a
#: processor; which says nothing of the call.
_UNSEEN = -2

_KICKED = Exit(ExitKind.KICKED)


class ProgramThread:
    """A ProgramServer (workers/accel/base.py). ``close`` it when ``serve_attention`` has ended."""

    def __init__(self, spec: WorkerSpec, memory: GuestMemory, control: VcpuControl, accel: ProgramAccelerator) -> None:
        """Raises OSError."""
        slot = memory.slots[spec.system_slot.id]
        self._control, self._accel = control, accel
        self._slots = [each for each in memory.slots.values() if each is not slot]
        self._box = Mailbox(slot.segment.buf, slot.host_address, spec.threads, spec.index)
        self._bell = Bell(slot.segment.buf)
        self._doorbell = Doorbell(Path(spec.fd_socket).parent, PROGRAM_CALL)
        self._started = self._waiting = self._interrupted = False
        self._kind = Kind.READY
        self._asked = -1        # the number of a call, or something else
        system = memoryview(slot.segment.buf)
        page = WAITS_PAGE * PAGE_SIZE
        self._waits = Waits(system[page:page + PAGE_SIZE], spec.index)
        self._futexes = Futexes(self._slots, spec.system_slot, system, self._waits)
        self._futex: FutexCall | None = None
        self._local: dict[int, Callable[[], int]] = {_SCHED_YIELD: _sched_yield, _GETTID: lambda: self._box.tid}
        if accel.has_gate:
            self._box.looks.begin((*_OUTSIDE, FUTEX, *self._local))
        #: Nanoseconds that ``run`` has spent waiting, in all.
        self.away_ns = 0

    def close(self) -> None:
        self._doorbell.close()
        self._box.close()
        self._bell.close()
        self._waits.close()

    # --- from the program -------------------------------------------------------------------------------------------

    def begin(self) -> Exit | None:
        """Before the program is entered."""
        if self._futex is not None:
            return self._wait_futex()
        if self._waiting:
            return self._wait()
        if not self._started:
            self._started = True
            return self._ask(Kind.READY)
        return None

    def call(self) -> Exit | None:
        registers = self._accel.registers_now
        number = registers[_RAX]
        if not self._box.in_guest:
            return self._ask(Kind.CALL)     # the gate has asked
        if number == FUTEX:
            return self._call_futex(registers)
        local = self._local.get(number)
        if local is not None:
            registers[_RAX] = local()
            return None
        return self._ask(Kind.CALL)

    def _call_futex(self, registers: memoryview) -> Exit | None:
        a, b, c, d, e, f = _ARGUMENTS
        result = self._futexes.call(registers[a], registers[b], registers[c], registers[d], registers[e], registers[f])
        if isinstance(result, FutexCall):
            if self._futexes.spin(result):
                registers[_RAX] = -errno.EAGAIN & 0xFFFF_FFFF_FFFF_FFFF
                return None
            self._futex = result
            return self._wait_futex()
        if result is None:
            return self._ask(Kind.CALL)
        registers[_RAX] = result & 0xFFFF_FFFF_FFFF_FFFF
        return None

    def _wait_futex(self) -> Exit | None:
        assert self._futex is not None
        self._control.state = VcpuState.WAITING
        began = time.perf_counter_ns()
        result = self._futexes.wait(self._futex)
        self.away_ns += time.perf_counter_ns() - began
        if result == -errno.EINTR and not self._interrupted:
            return _KICKED      # it goes on waiting
        self._control.state = VcpuState.RUNNING
        self._futexes.over()
        self._futex = None
        if result is None or result == -errno.EINTR:
            self._interrupted = False
            return self._ask(Kind.CALL)     # the system knows what becomes of it
        self._accel.registers_now[_RAX] = result & 0xFFFF_FFFF_FFFF_FFFF
        return None

    def fault(self, vector: int, error: int, address: int) -> Exit | None:
        return self._ask(Kind.FAULT, vector, error, address)

    def interrupted(self) -> Exit | None:
        if self._interrupted:
            self._interrupted = False
            return self._ask(Kind.INTERRUPTED)
        return _KICKED

    def _ask(self, kind: Kind, vector: int = 0, error: int = 0, address: int = 0) -> Exit | None:
        self.put(kind, (vector, error, address))
        return self._wait()

    def put(self, kind: Kind, fault: tuple[int, int, int] = (0, 0, 0)) -> None:
        box = self._box
        box.fs_base = self._accel.fs_base
        box.cpu_ns = time.thread_time_ns()
        self._kind = kind
        self._asked = self._accel.registers_now[_RAX] if kind is Kind.CALL else -1
        if kind is not Kind.CALL or box.in_guest:
            box.registers[:] = self._accel.registers_now
            box.ask(kind, *fault)
            self._bell.raise_flag()
            box.looks.passed(self._asked)
        elif box.is_held:
            box.looks.in_vain(self._asked)
        elif not box.is_answered:
            self._asked = _UNSEEN
        if self._bell.asleep:
            self._doorbell.ring()
        self._waiting = True

    @property
    def repeats_call(self) -> bool:
        return self._futex is not None

    def _wait(self) -> Exit | None:
        if not self._box.spin(self._asked):
            began = time.perf_counter_ns()
            self._control.state = VcpuState.WAITING
            answered = self._box.wait(_STEP)
            self.away_ns += time.perf_counter_ns() - began
            if not answered:
                return _KICKED
            self._control.state = VcpuState.RUNNING
        self._waiting = False
        return self._take()

    def _take(self) -> Exit | None:
        box, accel = self._box, self._accel
        answer, result = box.take()
        if not answer:      # the usual one
            if self._kind is Kind.CALL:
                accel.registers_now[_RAX] = result
            return None
        if answer & Answer.STALE:
            accel.forget_frames(box.stale())
        if answer & Answer.ROOT:
            accel.set_root(box.root)
            self._futexes.root = box.root
        if answer & Answer.FS:
            accel.set_fs_base(box.fs_base)
        if answer & Answer.SET_XSAVE:
            accel.set_xsave(box.xsave)
        if answer & Answer.REGISTERS:
            accel.set_registers(box.registers)
        elif self._kind is Kind.CALL:
            accel.registers_now[_RAX] = result
        if answer & Answer.GET_XSAVE:
            accel.get_xsave(box.xsave)
            return self._ask(Kind.XSAVE)
        if answer & Answer.IDLE:
            return self._ask(Kind.READY)
        if answer & Answer.END:
            return Exit(ExitKind.END, reason=ExitReason.CODE, code=result)
        return None

    # --- from the system, while the program runs --------------------------------------------------------------------

    def serve_attention(self, ended: Callable[[], bool]) -> None:
        """In a thread of its own, until ``ended`` (it looks once a second)."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        main, box = threading.main_thread().ident, self._box
        assert main is not None
        seen, interrupts, drops = box.attended, 0, 0
        while not ended():
            wanted = box.attention
            if wanted != seen:
                seen = wanted
                if box.drops != drops:
                    drops = box.drops
                    self._accel.forget_frames(box.stale(attention=True))
                if box.interrupts != interrupts:
                    interrupts = box.interrupts
                    self._interrupted = True
                box.attend(wanted)
            if self._interrupted:       # again and again, should it have come just before a wait
                self._accel.interrupt()
                signal.pthread_kill(main, KICK_SIGNAL)
            futex.wait(box.attention_address, seen, _REPEAT if self._interrupted else _ATTENTION_STEP)


def _sched_yield() -> int:
    os.sched_yield()
    return 0
