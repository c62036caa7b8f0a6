"""The system of a machine that runs Linux programs, as a vCPU of its own kind: it has no CPU, but serves what the other
vCPUs ask for in their mailboxes (ipc/programs.py), one after the other, and logs what it writes into their memory.

To the coordinator it is a vCPU like any: it is kicked and paused between calls, it leaves at a full ring, it ends.
"""

from __future__ import annotations

import os
import random
import select
import time
from collections import deque
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Protocol

from ipc.layout import VcpuControl
from ipc.messages import ExitReason, Notification, ProgramCalls, SlotSpec, WorkerSpec
from ipc.programs import (

    ENTRY_PAGE,
    IDT_PAGE,
    REGISTERS,
    STALE_MAX,
    SYSTEM_ADDRESS,
    VCPU_PAGE,
    VSYSCALL_ADDRESS,
    VSYSCALL_PAGE,
    Answer,
    Bell,
    Kind,
    Mailbox,
    mailbox_page,
    tables_page,
)
from ipc.shm import PAGE_SIZE

from ..accel.base import AccelError, Exit, ExitKind
from ..memory import GuestMemory
from ..ports import PortBus
from ..programs import bell_path
from ..state import VcpuSaved
from .abi import CALLS
from .blocked import Blocked, Ended
from .channels import Terminal
from .frames import Frames, NoFrames, Run
from .log import WriteLog
from .processes import Thread
from .program import Started
from .ram import Ram
from .setup import fill
from .space import SegmentationFault, Space
from .system import Console, System
from .tables import ACCESSED, NO_EXECUTE, PRESENT, USER, WRITE, NoTables, Tables
from .terminals import LineConsole, StreamConsole, TerminalConsole
from .vfs import FileSystem

__all__ = ["Host", "SystemAccelerator"]

_R = {name: at for at, name in enumerate(REGISTERS)}
_NUMBER = _R["rax"]
_ARGUMENTS = tuple(_R[name] for name in ("rdi", "rsi", "rdx", "r10", "r8", "r9"))
_RIP, _RSP, _RFLAGS = _R["rip"], _R["rsp"], _R["rflags"]
_FLAGS = 0x202

_PAGE_FAULT = 14
#: Signals of exceptions (arch/x86/kernel/traps.c): of all others, SIGSEGV.
_SIGNALS = {0: 8, 1: 5, 3: 5, 4: 11, 6: 4, 12: 7, 16: 8, 17: 7, 19: 8}
_SIGSEGV, _SIGBUS, _SIGKILL = 11, 7, 9

_SPIN = 40              # looks at all mailboxes before it sleeps
_CONSOLE_EVERY = 32     # calls between two looks at the console
_FOREVER = 3600.0       # seconds
_END_TIMEOUT = 10.0     # seconds in which all threads have left the guest at the end
_ATTENTION_TIMEOUT = 5.0

class Host(Protocol):
    """The vCPU thread that runs it (workers/vcpu.py)."""

    def wait_for(self, poll: select.poll, seconds: float) -> None:
        """Until something happens at one of these descriptors, or a kick comes."""

    def wait_for_reset(self) -> None:
        """The ring is full: until it has been reset, or somebody wants something, which is attended to."""

    @property
    def is_to_end(self) -> bool: ...

    def say(self, message: Notification) -> None:
        """To the coordinator."""

class _Stopped(Exception):
    """The vCPU is to end in the middle of a call."""

class SystemAccelerator:
    """See workers/accel/base.py for the contract."""

    def __init__(self, spec: WorkerSpec, memory: GuestMemory, control: VcpuControl, ports: PortBus, host: Host) -> None:
        assert spec.program is not None
        self.vcpu_fd, self.kvm_run_size = -1, 0
        self._spec, self._program, self._control, self._host = spec, spec.program, control, host
        self._log = WriteLog(spec, memory, control, self._make_room)
        system = memory.slots[spec.system_slot.id]
        slots = [memory.slots[slot.id] for slot in spec.slots]
        self._ram = Ram(slots, self._log)
        self._bell = Bell(system.segment.buf)
        directory = Path(spec.fd_socket).parent
        self._bell_fd = os.open(bell_path(spec), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._bell_fd, select.POLLIN)
        self._stream: StreamConsole | TerminalConsole | None = None
        console: Console = LineConsole(ports.say)
        if spec.program.console == "terminal":
            console = self._stream = TerminalConsole(directory, self._send_signal, time.monotonic_ns)
        elif spec.program.console == "streams":
            console = self._stream = StreamConsole(directory, self._send_signal)
        self._boxes = [Mailbox(system.segment.buf, system.host_address, spec.threads, i) for i in range(spec.threads)]
        self._threads: list[Thread | None] = [None] * spec.threads
        self._idle: set[int] = set()
        self._ended: set[int] = set()
        self._to_start: deque[Callable[[int], None]] = deque()
        self._blocked: dict[int, Blocked] = {}
        self._served = self._said_missing = 0
        self._end_by = 0.0
        seed = spec.program.seed
        self._random: Callable[[int], bytes] = os.urandom if seed is None else random.Random(seed).randbytes
        first = spec.slots[0].gpa // PAGE_SIZE
        frames = Frames(first, spec.slots[0].size // PAGE_SIZE)
        page = tables_page(spec.threads)
        words = memoryview(system.segment.buf)[page * PAGE_SIZE:].cast("Q")
        self._tables = Tables(words, spec.system_slot.gpa + page * PAGE_SIZE)
        self._common = self._map_system()
        files = FileSystem(self._ram, frames, clock=time.time_ns, random=self._random,
                           blocks=spec.slots[0].size // PAGE_SIZE)
        try:
            fill(files, spec.program)
            self.system = System(self._ram, frames, self._tables, files, console, realtime=time.time_ns,
                                 monotonic=time.monotonic_ns, threads_max=spec.threads)
            self._spawn()
        except (NoFrames, NoTables):
            raise AccelError("memory: is too small for the program") from None

    # --- set-up -------------------------------------------------------------------------------------------------------

    def _map_system(self) -> int:
        """Page tables with what every program has above its own addresses. The mailboxes are nowhere."""
        root, gpa, threads = self._tables.new_root(), self._spec.system_slot.gpa, self._spec.threads
        supervisor = PRESENT | WRITE | ACCESSED
        entry = PRESENT | USER | ACCESSED
        pages = {SYSTEM_ADDRESS // PAGE_SIZE + page: gpa + page * PAGE_SIZE | supervisor
                 for page in (IDT_PAGE, *range(VCPU_PAGE, mailbox_page(threads, 0)))}
        pages[SYSTEM_ADDRESS // PAGE_SIZE + ENTRY_PAGE] = gpa + ENTRY_PAGE * PAGE_SIZE | entry
        pages[VSYSCALL_ADDRESS // PAGE_SIZE] = gpa + VSYSCALL_PAGE * PAGE_SIZE | entry
        for page, value in pages.items():
            (_, word, _), = self._tables.chunks(root, page & (1 << 36) - 1, 1, make=True)
            self._tables.set(word, value)
        return root

    def _spawn(self) -> None:
        program = self._program
        try:
            thread, started = self.system.spawn(
                os.fsencode(program.path), [os.fsencode(each) for each in program.args],
                [os.fsencode(each) for each in program.env], os.fsencode(program.directory))
        except OSError as exc:
            raise AccelError(f"guest.program: {program.path}: {os.strerror(exc.errno or 0)}") from None
        self._share_system(thread.process.space)
        self._start(thread, started)

    def _share_system(self, space: Space) -> None:
        self._tables.have_in_common(self._common, space.root, SYSTEM_ADDRESS // PAGE_SIZE)

    def _start(self, thread: Thread, started: Started) -> None:
        """On the next vCPU that has no thread."""
        def start(index: int) -> None:
            registers = self._boxes[index].registers
            registers[:] = memoryview(bytes(8 * len(REGISTERS))).cast("Q")
            registers[_RIP], registers[_RSP], registers[_RFLAGS] = started.rip, started.rsp, _FLAGS
            self._begin(index, thread, 0)

        self._to_start.append(start)

    def _begin(self, index: int, thread: Thread, fs_base: int) -> None:
        """Its registers are in the mailbox."""
        box = self._boxes[index]
        self._threads[index] = thread
        box.tid, box.root, box.fs_base = thread.tid, thread.process.space.root, fs_base
        self._answer(index, Answer.ROOT | Answer.FS | Answer.REGISTERS)

    # --- the vCPU -----------------------------------------------------------------------------------------------------

    def clear_immediate_exit(self) -> None:
        self._control.immediate_exit = 0

    def interrupt(self) -> None:
        self._control.immediate_exit = 1
        os.write(self._bell_fd, b"\0")

    def run(self) -> Exit:
        self._log.active = True
        try:
            return self._serve()
        except _Stopped:
            return Exit(ExitKind.KICKED)

    def _serve(self) -> Exit:
        while not self._control.immediate_exit:
            if self._log.full:
                return Exit(ExitKind.RING_FULL)
            if self._serve_all():
                continue
            if len(self.system.missing) > self._said_missing:
                self._say_calls()       # that there is one more; how often they were made, at the end
            if self.system.code is not None and self._end_all():
                self._say_calls()
                return Exit(ExitKind.END, reason=ExitReason.CODE, code=_exit_status(self.system.code))
            self._sleep()
        return Exit(ExitKind.KICKED)

    def _serve_all(self) -> bool:
        """Every mailbox once, and what is due; whether there was anything."""
        found = False
        for index, box in enumerate(self._boxes):
            if box.asked:
                found = True
                self._serve_one(index, box)
                if self._control.immediate_exit or self._log.full:
                    return True
        while self._to_start and self._idle:
            index = min(self._idle)
            self._idle.discard(index)
            self._to_start.popleft()(index)
            found = True
        if self._stream is not None and self._served % _CONSOLE_EVERY == 0:
            self._pump()
        return self._serve_blocked() or found

    def _serve_blocked(self) -> bool:
        """Calls whose time has come, or that wait for something which has changed."""
        if not self._blocked:
            self.system.notified.clear()
            return False
        notified, self.system.notified = self.system.notified, set()
        now = self.system.monotonic()
        due = [index for index, blocked in self._blocked.items()
               if (blocked.deadline is not None and blocked.deadline <= now) or not notified.isdisjoint(blocked.on)]
        for index in due:
            del self._blocked[index]
            self._serve_one(index, self._boxes[index])
        return bool(due)

    def _sleep(self) -> None:
        for _ in range(_SPIN):
            if self._is_asked():
                return
        self._bell.set_asleep(True)
        try:
            if self._is_asked():
                return
            deadlines = [each.deadline for each in self._blocked.values() if each.deadline is not None]
            seconds = min(deadlines, default=0) - self.system.monotonic()
            self._watch_console()
            self._host.wait_for(self._poll, max(0.0, seconds / 1e9) if deadlines else self._patience())
        finally:
            self._bell.set_asleep(False)
        try:
            os.read(self._bell_fd, 4096)
        except BlockingIOError:
            pass
        if self._stream is not None:
            self._pump()

    def _is_asked(self) -> bool:
        return any(box.asked for box in self._boxes)

    def _patience(self) -> float:
        return _FOREVER if self.system.code is None else 0.1

    # --- the console --------------------------------------------------------------------------------------------------

    def _watch_console(self) -> None:
        stream = self._stream
        if stream is None:
            return
        self._poll.register(stream.input_fd, select.POLLIN)
        self._poll.register(stream.output_fd, select.POLLOUT if stream.pending else 0)

    def _pump(self) -> None:
        assert self._stream is not None
        if self._stream.pump():
            self.system.notify(Terminal)

    def _send_signal(self, group: int, number: int) -> None:
        """``group``: 0 for the first process alone."""
        if group:
            self.system.signal_group(group, number)
        else:
            self.system.signal_first(number)

    # --- calls --------------------------------------------------------------------------------------------------------

    def _serve_one(self, index: int, box: Mailbox) -> None:
        self._served += 1
        kind, thread = box.kind, self._threads[index]
        if kind == Kind.READY:
            self._threads[index] = None
            self._idle.add(index)
            box.hold()
            return
        if self.system.code is not None or thread is None or thread.ended:
            self._let_go(index)
        elif kind == Kind.CALL:
            self._call(index, box, thread)
        elif kind == Kind.FAULT:
            self._fault(index, box, thread)
        else:
            self._answer(index, 0)

    def _call(self, index: int, box: Mailbox, thread: Thread) -> None:
        registers = box.registers
        try:
            result = self.system.call(thread, registers[_NUMBER], [registers[at] for at in _ARGUMENTS])
        except Blocked as blocked:
            self._blocked[index] = blocked
            box.hold()
            return
        except Ended:
            self._let_go(index)
            return
        answer = 0
        if thread.fs_base is not None:
            box.fs_base, thread.fs_base = thread.fs_base, None
            answer = Answer.FS
        self._answer(index, answer, result)

    def _fault(self, index: int, box: Mailbox, thread: Thread) -> None:
        vector, error, address = box.fault
        try:
            if vector != _PAGE_FAULT:
                self.system.end_process(thread.process, _SIGNALS.get(vector, _SIGSEGV))
            else:
                thread.process.space.fault(address, error)
        except SegmentationFault as fault:
            self.system.end_process(thread.process, _SIGBUS if fault.bus else _SIGSEGV)
        except (NoFrames, NoTables):
            self.system.end_process(thread.process, _SIGKILL)
        if thread.ended:
            self._let_go(index)
        else:
            self._answer(index, 0)

    def _let_go(self, index: int) -> None:
        """The thread has ended, and with it perhaps everything."""
        self._threads[index] = None
        if self.system.code is not None:
            self._ended.add(index)
            self._boxes[index].answer(Answer.END)
        else:
            self._boxes[index].answer(Answer.IDLE)

    def _answer(self, index: int, answer: int, result: int = 0) -> None:
        thread, box = self._threads[index], self._boxes[index]
        assert thread is not None
        stale = thread.process.space.take_stale()
        if stale:
            if len(stale) > STALE_MAX:
                stale = []
            self._tell_others(index, thread.process.space, stale)
            box.put_stale(stale)
            answer |= Answer.STALE
        box.answer(answer, result)

    def _tell_others(self, index: int, space: Space, stale: list[Run]) -> None:
        """Whoever else is in this address space drops these frames now, in the guest or not."""
        waiting = []
        for other, thread in enumerate(self._threads):
            if other != index and thread is not None and thread.process.space is space:
                box = self._boxes[other]
                box.put_stale(stale)
                waiting.append((box, box.want_attention(interrupt=False)))
        deadline = time.monotonic() + _ATTENTION_TIMEOUT
        for box, number in waiting:
            while box.attended != number and time.monotonic() < deadline:
                os.sched_yield()

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end_all(self) -> bool:
        """Have every thread leave the guest; whether all have, and everything has been shown."""
        now = time.monotonic()
        if not self._end_by:
            self._end_by = now + _END_TIMEOUT
            if self._stream is not None:
                self._stream.say_ended()
            for index, box in enumerate(self._boxes):
                if index in self._blocked or index in self._idle:
                    self._let_go(index)
                elif index not in self._ended:
                    box.want_attention(interrupt=True)
            self._blocked.clear()
            self._idle.clear()
        if self._stream is not None:
            self._pump()
        shown = self._stream is None or not self._stream.pending
        return (len(self._ended) == len(self._boxes) and shown) or now > self._end_by

    def _make_room(self) -> None:
        if self._host.is_to_end:
            raise _Stopped
        self._host.wait_for_reset()

    # --- for the worker -----------------------------------------------------------------------------------------------

    def registers(self) -> dict[str, int]:
        """It has none."""
        return {}

    def _say_calls(self) -> None:
        self._said_missing = len(self.system.missing)
        self._host.say(ProgramCalls(self._spec.index, self._served, {
            CALLS.get(number, str(number)): count for number, count in self.system.missing.items()}))

    def hypercall_args(self) -> tuple[int, int, int]:
        raise AccelError("a system does not make hypercalls")

    def set_hypercall_result(self, value: int) -> None:
        raise AccelError("a system does not make hypercalls")

    def pushed(self) -> int:
        return self._log.pushed

    def limit_pushes(self, count: int | None) -> None:
        """It is asked between calls."""

    def reset_ring(self, expected: int) -> int:
        return self._log.reset(expected)

    def rebuild_ring(self) -> None:
        self._log.rebuild()

    def set_tracking(self, spec: WorkerSpec) -> None:
        self._log.follow(spec)

    def set_memslot(self, slot: SlotSpec) -> None:
        self._log.set_slot(slot)

    def remove_memslot(self, slot_id: int) -> None:
        self._log.remove_slot(slot_id)

    def get_dirty_log(self, slot_id: int) -> int:
        return self._log.get(slot_id)

    def clear_dirty_log(self, slot_id: int) -> None:
        self._log.clear(slot_id)

    def get_state(self) -> VcpuSaved:
        raise AccelError("the state of a program's system cannot be saved yet")

    def set_state(self, state: VcpuSaved) -> None:
        raise AccelError("the state of a program's system cannot be restored yet")

    def close(self) -> None:
        """Idempotent."""
        if self._bell_fd >= 0:
            os.close(self._bell_fd)
            self._bell_fd = -1
        self._ram.close()
        self._log.close()

def _exit_status(code: int) -> int:
    """Of what wait(2) gives: as a shell has it."""
    return code >> 8 if not code & 0x7F else 128 + (code & 0x7F)
