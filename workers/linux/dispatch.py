"""Which thread is on which vCPU, what each of them waits for, and how it goes on: between the mailboxes and the system.

A vCPU is idle, or runs a thread; then its worker is in the guest, or waits in its mailbox. What waits there is blocked
(its call is made again when something has changed), parked (its process is stopped), or about to be served.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ipc.gates import INSIDE
from ipc.programs import EVERYTHING, REGISTERS, SYSCALL_SIZE, Answer, Kind, Mailbox

from ..accel.base import AccelError
from ..state import StateError
from . import signals
from .abi import number_of
from .blocked import Again, Blocked, Ended
from .frames import NoFrames, Run
from .processes import Thread
from .program import Started
from .ram import Ram
from .signals import INIT_XSAVE, Action, SignalInfo, bit, build_frame
from .space import SegmentationFault, Space
from .starts import Start
from .system import System
from .tables import NoTables
from .tracing import Tracer

__all__ = ["Dispatcher"]

_R = {name: at for at, name in enumerate(REGISTERS)}
_RAX, _RIP = _R["rax"], _R["rip"]
_ARGUMENTS = tuple(_R[name] for name in ("rdi", "rsi", "rdx", "r10", "r8", "r9"))

_PAGE_FAULT = 14
#: Signals of exceptions, with their si_code (arch/x86/kernel/traps.c); of all others, SIGSEGV from the kernel.
_SIGNALS = {0: (signals.FPE, 1), 1: (signals.TRAP, 1), 3: (signals.TRAP, 0x80), 6: (signals.ILL, 2),
            12: (signals.BUS, 0x80), 16: (signals.FPE, 0), 17: (signals.BUS, 1), 19: (signals.FPE, 0)}
_SEGV_MAPERR, _SEGV_ACCERR, _BUS_ADRERR, _SI_KERNEL = 1, 2, 2, 0x80

#: Calls that are not made again after a handler, whatever it asked for (signal(7)).
_NEVER_AGAIN = frozenset(map(number_of, (
    "poll", "ppoll", "select", "pselect6", "epoll_wait", "epoll_pwait", "epoll_pwait2", "nanosleep", "clock_nanosleep",
    "pause", "rt_sigsuspend", "rt_sigtimedwait")))

_ATTENTION_TIMEOUT = 60.0   # seconds
_STALE_MOST = 1000          # runs that are kept for a vCPU

# As plain numbers: they are put together for each call.
_STALE, _ROOT, _FS, _REGISTERS = (int(each) for each in (Answer.STALE, Answer.ROOT, Answer.FS, Answer.REGISTERS))
_SET_XSAVE, _GET_XSAVE = int(Answer.SET_XSAVE), int(Answer.GET_XSAVE)
_IDLE, _END = int(Answer.IDLE), int(Answer.END)


class Dispatcher:
    """A ``Launcher`` (population.py). ``check`` is called while it waits for a worker, and may raise."""

    def __init__(self, system: System, boxes: Sequence[Mailbox], ram: Ram, check: Callable[[], None]) -> None:
        self._system, self._boxes, self._ram, self._check = system, boxes, ram, check
        self._states = [box.state for box in boxes]
        self._threads: list[Thread | None] = [None] * len(boxes)
        self._indices: dict[Thread, int] = {}
        self._idle: set[int] = set()
        self._ended: set[int] = set()
        self._blocked: dict[int, Blocked] = {}
        self._parked: dict[int, int] = {}       # their process is stopped; how they go on
        self._looks: set[int] = set()           # to be looked at: a signal, an end
        self._to_start: deque[Start] = deque()
        #: What else the next answer has for a thread that came here from somewhere else.
        self._first: dict[int, int] = {}
        #: Frames of which the worker of a vCPU has to drop its mapping before it goes on.
        self._stale: dict[int, list[Run]] = {}
        self._traps: dict[int, tuple[int, int, int]] = {}   # (error, vector, address) of a fault that is a signal
        self._cpu_at_start = [0] * len(boxes)
        self.served = 0
        #: While somebody wants to see calls.
        self.tracer: Tracer | None = None

    # --- for the accelerator ----------------------------------------------------------------------------------------

    def serve_asked(self, enough: Callable[[], bool]) -> bool:
        """Every mailbox in which something is asked, until it is ``enough``; whether there was any."""
        found = False
        for index, state in enumerate(self._states):
            if 0 < state[0] <= INSIDE:
                found = True
                self._serve(index, self._boxes[index])
                if enough():
                    break
        return found

    @property
    def is_asked(self) -> bool:
        return any(0 < state[0] <= INSIDE for state in self._states)

    def serve_others(self) -> bool:
        """Threads that are to begin, to be looked at, or can make their call again; whether there was any."""
        found = False
        while (start := self._startable()) is not None:
            found = True
            self._to_start.remove(start)
            if not start.thread.ended:
                self._begin(min(self._unbound) if start.vcpu is None else start.vcpu, start)
        while self._looks:
            found = True
            self._look(self._looks.pop())
        return self._serve_blocked() or found

    @property
    def deadline(self) -> int | None:
        """When a blocked call is to be made again at the latest."""
        if not self._blocked:
            return None
        return min((each.deadline for each in self._blocked.values() if each.deadline is not None), default=None)

    def start(self, thread: Thread, started: Started) -> None:
        """The first one."""
        self.launch(thread, started.registers(), 0)

    def end_all(self) -> None:
        """Everything has ended: have all vCPUs end."""
        for index in range(len(self._boxes)):
            self._look(index)

    @property
    def vcpus(self) -> Mapping[Thread, int]:
        """On which each thread is, of those that are on one."""
        return self._indices

    @property
    def all_ended(self) -> bool:
        return len(self._ended) == len(self._boxes)

    # --- Launcher ---------------------------------------------------------------------------------------------------

    def free_vcpus(self) -> int:
        return sum(each is None for each in self._threads) - len(self._to_start)

    def launch(self, thread: Thread, registers: Sequence[int], fs_base: int) -> None:
        self._to_start.append(Start(thread, list(registers), fs_base, xsave=INIT_XSAVE))

    def look_at(self, thread: Thread) -> None:
        index = self._indices.get(thread)
        if index is not None:
            self._looks.add(index)

    def forget_space(self, space: Space) -> None:
        self._make_stale(space.visitors, space.take_stale())

    def forget_frames(self, visitors: Iterable[int], runs: list[Run]) -> None:
        """Before they are cleared. A vCPU that is idle keeps nothing: it is told of page tables when it is no more."""
        self._make_stale([index for index in visitors if self._threads[index] is not None], runs)

    def forget_tables(self) -> None:
        self._make_stale(range(len(self._boxes)), [EVERYTHING])

    def host_address(self, frame: int, offset: int) -> int:
        return self._ram.host_address(frame, offset)

    def wrote(self, frame: int) -> None:
        self._ram.wrote(frame)

    # --- what is asked ----------------------------------------------------------------------------------------------

    def _serve(self, index: int, box: Mailbox) -> None:
        self.served += 1
        kind, thread = box.kind, self._threads[index]
        if kind == Kind.READY:
            self._idle.add(index)
            box.hold()
            if self._system.code is not None:
                self._look(index)
            return
        if thread is None or thread.ended:
            self._let_go(index)
            return
        thread.registers, thread.fs_now = box.registers, box.fs_base
        thread.cpu_ns = box.cpu_ns - self._cpu_at_start[index]
        if kind == Kind.CALL:
            self._call(index, box, thread)
        elif kind == Kind.FAULT:
            self._fault(index, thread, box.fault)
        elif kind == Kind.XSAVE:
            self._signal(index, box, thread)
        else:
            self._go_on(index, thread, 0)

    def _call(self, index: int, box: Mailbox, thread: Thread) -> None:
        registers, call = box.registers, self._system.call
        if self.tracer is not None:
            if self.tracer.wanted:
                call = self.tracer.call
            else:
                self.tracer = None
        try:
            result = call(thread, registers[_RAX], [registers[at] for at in _ARGUMENTS])
        except Blocked as blocked:
            self._blocked[index] = blocked
            box.hold()
            if self._system.deliverable(thread):
                self._looks.add(index)
            return
        except Again:
            registers[_RIP] -= SYSCALL_SIZE
            self._go_on(index, thread, _REGISTERS)
            return
        except Ended:
            self._let_go(index)
            return
        answer = 0
        if thread.fs_base is not None:
            box.fs_base, thread.fs_base = thread.fs_base, None
            answer = _FS
        if thread.jumps:
            answer |= self._jump(index, box, thread)
        else:
            registers[_RAX] = result & 0xFFFF_FFFF_FFFF_FFFF
        self._go_on(index, thread, answer)

    def _jump(self, index: int, box: Mailbox, thread: Thread) -> int:
        """It goes on somewhere else."""
        answer = _REGISTERS
        if thread.xsave is not None:
            box.xsave[:] = thread.xsave
            answer |= _SET_XSAVE
        if thread.new_space:
            box.root, box.fs_base, box.tid = thread.process.space.root, 0, thread.tid
            thread.process.space.visitors.add(index)
            answer |= _ROOT | _FS
        thread.jumps, thread.new_space, thread.xsave = False, False, None
        return answer

    def _fault(self, index: int, thread: Thread, fault: tuple[int, int, int]) -> None:
        vector, error, address = fault
        info = None
        if vector != _PAGE_FAULT:
            number, code = _SIGNALS.get(vector, (signals.SEGV, _SI_KERNEL))
            info = SignalInfo(number, code, address=0 if code == _SI_KERNEL else address)
        else:
            try:
                thread.process.space.fault(address, error)
            except SegmentationFault as fault:
                number = signals.BUS if fault.bus else signals.SEGV
                code = _BUS_ADRERR if fault.bus else _SEGV_ACCERR if fault.mapped else _SEGV_MAPERR
                info = SignalInfo(number, code, address=address)
            except (NoFrames, NoTables):
                self._system.end_process(thread.process, signals.KILL)      # as Linux does when it has none left
        if info is not None:
            self._traps[index] = error, vector, address
            self._system.force(thread, info)
        self._go_on(index, thread, 0)

    # --- how it goes on ---------------------------------------------------------------------------------------------

    def _go_on(self, index: int, thread: Thread, answer: int) -> None:
        """Its registers are in the mailbox as they will be."""
        system = self._system
        if thread.ended:
            self._let_go(index)
        elif thread.process.stopped:
            self._park(index, answer)
        elif not system.deliverable(thread):
            if thread.saved_mask is not None:
                thread.blocked, thread.saved_mask = thread.saved_mask, None
            self._answer(index, answer, self._boxes[index].registers[_RAX])
        elif self._has_handler(thread):
            self._answer(index, answer | _REGISTERS | _GET_XSAVE)       # for the frame
        elif system.act(thread, _no_handler):
            self._answer(index, answer | _REGISTERS)
        elif thread.ended:
            self._let_go(index)
        else:
            self._park(index, answer)

    def _park(self, index: int, answer: int = 0) -> None:
        """Its process is stopped. What it was to go on with stays in the mailbox."""
        self._parked[index] = answer
        self._boxes[index].hold()

    def _has_handler(self, thread: Thread) -> bool:
        process = thread.process
        for pending in (thread.pending, process.pending):
            for each in pending:
                action = process.action(each.number)
                if not thread.blocked & bit(each.number) and not (action.is_default or action.ignores):
                    return True
        return False

    def _signal(self, index: int, box: Mailbox, thread: Thread) -> None:
        """Its XSAVE area is here: a handler can be entered."""
        trap = self._traps.pop(index, (0, 0, 0))
        entered, number = False, 0

        def jump(info: SignalInfo, action: Action) -> None:
            nonlocal entered, number
            number = info.number
            mask = thread.blocked if thread.saved_mask is None else thread.saved_mask
            error, vector, address = trap
            registers = build_frame(thread.process.space, box.registers, bytes(box.xsave), info, action, mask,
                                    thread.alternate, error=error, trap=vector, address=address)
            for at, value in enumerate(registers):
                box.registers[at] = value
            thread.saved_mask = None
            thread.blocked |= action.mask & ~signals.UNBLOCKABLE
            if not action.flags & signals.NODEFER:
                thread.blocked |= bit(info.number)
            entered = True

        goes_on = None
        while goes_on is None:
            try:
                goes_on = self._system.act(thread, jump)
            except (SegmentationFault, NoFrames, NoTables):
                self._system.refuse_frame(thread, number)
        if thread.ended:
            self._let_go(index)
        elif not goes_on:
            self._park(index)
        elif entered:
            box.xsave[:] = INIT_XSAVE
            self._answer(index, _REGISTERS | _SET_XSAVE)
        else:
            self._answer(index, _REGISTERS)

    def _let_go(self, index: int) -> None:
        """The thread has ended, and with it perhaps everything."""
        thread, self._threads[index] = self._threads[index], None
        if thread is not None:
            self._trace_end(thread, None)
            self._system.give_up(thread)
            self._indices.pop(thread, None)
        self._blocked.pop(index, None)
        self._parked.pop(index, None)
        self._traps.pop(index, None)
        self._first.pop(index, None)
        if self._system.code is not None:
            self._idle.discard(index)
            self._ended.add(index)
            self._boxes[index].answer(_END)
        else:
            self._answer(index, _IDLE)

    def _startable(self) -> Start | None:
        """The first that can go on. One whose process is stopped waits here."""
        if not self._to_start or not self._idle:
            return None
        for each in self._to_start:
            if each.thread.ended or (not each.thread.process.stopped and (
                    self._unbound if each.vcpu is None else each.vcpu in self._idle)):
                return each
        return None

    @property
    def _unbound(self) -> set[int]:
        """vCPUs that are idle, and no thread is to go on there."""
        return self._idle - {each.vcpu for each in self._to_start if each.vcpu is not None}

    def _begin(self, index: int, start: Start) -> None:
        box, thread = self._boxes[index], start.thread
        self._idle.discard(index)
        self._threads[index] = thread
        self._indices[thread] = index
        thread.process.space.visitors.add(index)
        box.tid, box.root, given = thread.tid, thread.process.space.root, _ROOT
        if start.registers is not None:     # else they are there: the worker has put them into its mailbox
            given |= _FS | _REGISTERS
            box.fs_base = start.fs_base
            for at, value in enumerate(start.registers):
                box.registers[at] = value
        if start.xsave is not None:
            given |= _SET_XSAVE
            box.xsave[:] = start.xsave
        thread.registers, thread.fs_now = box.registers, box.fs_base
        self._cpu_at_start[index] = box.cpu_ns - thread.cpu_ns
        if start.trap is not None:
            self._traps[index] = start.trap
        self._first[index] = given
        if start.call:
            box.registers[_RIP] += SYSCALL_SIZE
            self._call(index, box, thread)
        elif start.exception is not None:
            self._fault(index, thread, start.exception)
        else:
            self._go_on(index, thread, 0)

    # --- blocked calls ----------------------------------------------------------------------------------------------

    def _serve_blocked(self) -> bool:
        """Calls whose time has come, or that wait for something which has changed."""
        notified, self._system.notified = self._system.notified, set()
        if not self._blocked:
            return False
        now = self._system.monotonic()
        due = [index for index, blocked in self._blocked.items()
               if (blocked.deadline is not None and blocked.deadline <= now) or not notified.isdisjoint(blocked.on)]
        for index in due:
            thread = self._threads[index]
            if index in self._blocked and thread is not None and not thread.process.stopped:
                del self._blocked[index]
                self._call(index, self._boxes[index], thread)
        return bool(due)

    def _look(self, index: int) -> None:
        """At a thread that has a signal to take, or has ended, or whose process goes on."""
        thread, box = self._threads[index], self._boxes[index]
        if index in self._ended:
            return
        if not box.waits:
            box.want_attention(interrupt=True)
        elif thread is None:
            if self._system.code is not None and index in self._idle:
                self._let_go(index)
        elif thread.ended:
            if not box.asked:
                self._let_go(index)
        elif index in self._parked:
            if not thread.process.stopped:
                self._go_on(index, thread, self._parked.pop(index) | _REGISTERS)
        elif index in self._blocked:
            self._interrupt(index, box, thread)

    def _interrupt(self, index: int, box: Mailbox, thread: Thread) -> None:
        """A blocked call, by a signal that has a handler or ends the process; others do not disturb it."""
        system = self._system
        if thread.vfork is not None or thread.process.stopped:
            return
        if thread.awaited and any(bit(each.number) & thread.awaited
                                  for each in (*thread.pending, *thread.process.pending)):
            system.notify(("signals", thread.tid))
            return
        if not self._has_handler(thread):
            again = self._blocked[index].again
            if not system.act(thread, _no_handler) and thread.ended:
                self._let_go(index)
            elif again:
                del self._blocked[index]
                self._trace_end(thread, None, again=True)
                box.registers[_RIP] -= SYSCALL_SIZE
                self._go_on(index, thread, _REGISTERS)
            return
        del self._blocked[index]
        registers, number = box.registers, box.registers[_RAX]
        again = number not in _NEVER_AGAIN and self._restarts(thread)
        if thread.done:
            registers[_RAX] = thread.done
        elif again:
            registers[_RIP] -= SYSCALL_SIZE
        else:
            registers[_RAX] = -errno.EINTR & 0xFFFF_FFFF_FFFF_FFFF
            system.write_time_left(thread, number, [registers[at] for at in _ARGUMENTS])
        self._trace_end(thread, thread.done or -errno.EINTR, again=again and not thread.done)
        thread.awaited = 0
        system.give_up(thread)
        self._go_on(index, thread, _REGISTERS)

    def _trace_end(self, thread: Thread, result: int | None, *, again: bool = False) -> None:
        """Of a blocked call."""
        if self.tracer is not None:
            self.tracer.over(thread, result, again=again)

    @staticmethod
    def _restarts(thread: Thread) -> bool:
        """The handler of the signal that comes first wants that."""
        process = thread.process
        numbers = [each.number for pending in (thread.pending, process.pending) for each in pending
                   if not thread.blocked & bit(each.number) and not process.action(each.number).is_default]
        return bool(numbers) and bool(process.action(min(numbers)).flags & signals.RESTART)

    # --- answers, and translations ----------------------------------------------------------------------------------

    def _answer(self, index: int, answer: int, result: int = 0) -> None:
        thread, box = self._threads[index], self._boxes[index]
        if thread is not None:
            space = thread.process.space
            if space.stale:
                self._make_stale(space.visitors, space.take_stale())
        answer |= self._first.pop(index, 0)
        stale = self._stale.pop(index, None)
        if stale is not None:
            box.put_stale(stale)
            answer |= _STALE
        box.answer(answer, result)

    def _make_stale(self, visitors: Iterable[int], runs: list[Run]) -> None:
        """These vCPUs must not use what they have read of these frames' entries. Those in their mailbox are told with
        their answer; for the others it is waited here."""
        if not runs:
            return
        waiting = []
        for index in visitors:
            box = self._boxes[index]
            if box.waits:
                stale = self._stale.setdefault(index, [])
                stale += runs
                if len(stale) > _STALE_MOST:
                    stale[:] = [EVERYTHING]
            else:
                box.put_stale(runs, attention=True)
                waiting.append((box, box.want_attention(interrupt=False)))
        deadline = time.monotonic() + _ATTENTION_TIMEOUT
        for box, number in waiting:
            while box.attended != number:
                self._check()
                if time.monotonic() > deadline:     # going on would leave it with what is another's memory by now
                    raise AccelError("a vCPU's worker does not drop its translations")
                time.sleep(0)

    # --- as data ----------------------------------------------------------------------------------------------------

    def save(self) -> list[dict[str, Any]]:
        """Each thread: on which vCPU it is (None: on none yet), and with what it goes on (`Start`). A call that waits
        for an answer is as before it was made. The page tables are others when it goes on. All workers stand still."""
        starts = [self._start_of(index, thread) for index, thread in enumerate(self._threads) if thread is not None]
        return [each.save() for each in (*starts, *self._to_start) if not each.thread.ended]

    def _start_of(self, index: int, thread: Thread) -> Start:
        box, start = self._boxes[index], Start(thread, vcpu=index, trap=self._traps.get(index))
        if box.in_guest:
            return start
        start.registers, start.fs_base = list(box.registers), box.fs_base
        given, answered = self._first.get(index, 0) | self._parked.get(index, 0), box.answered
        if answered is not None:
            given, result = answered
            if box.kind == Kind.CALL and not given & _REGISTERS:
                start.registers[_RAX] = result
        elif index in self._blocked or (box.asked and box.kind == Kind.CALL):
            start.registers[_RIP] -= SYSCALL_SIZE
            start.call = True
        elif box.asked and box.kind == Kind.FAULT:
            start.exception = box.fault
        if given & _SET_XSAVE or (box.asked and box.kind == Kind.XSAVE):
            start.xsave = bytes(box.xsave)
        return start

    def load(self, saved: list[dict[str, Any]], ended: Iterable[int]) -> None:
        """All vCPUs are without a thread; those that have ``ended`` will not ask for one. Raises StateError."""
        self._to_start.extend(Start.load(self._system.threads, each, len(self._boxes)) for each in saved)
        self._ended.update(ended)
        bound = [each.vcpu for each in self._to_start if each.vcpu is not None]
        if len({*bound, *self._ended}) < len(bound) + len(self._ended) or not self._ended <= {*range(len(self._boxes))}:
            raise StateError("two threads of a program have the same vCPU, or one that has ended")

    @property
    def ended(self) -> list[int]:
        """vCPUs that have been told so, and know it."""
        return sorted(each for each in self._ended if self._boxes[each].in_guest)


def _no_handler(info: SignalInfo, action: Action) -> None:
    raise AssertionError("a handler needs a frame")
