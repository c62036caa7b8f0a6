"""The system of a machine that runs Linux programs, as a vCPU of its own kind: it has no CPU, but serves what the other
vCPUs ask for in their mailboxes (ipc/programs.py), one after the other, and logs what it writes into their memory.

To the coordinator it is a vCPU like any: it is kicked and paused between calls, it leaves at a full ring, it ends.
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import Any, Protocol

from ipc.bell import PROGRAM_CALL, Doorbell
from ipc.layout import VcpuControl, VcpuState
from ipc.messages import BitmapPlace, ExitReason, Notification, ProgramCalls, SlotSpec, WorkerSpec
from ipc.programs import (
    BELL_PAGE,
    ENTRY_PAGE,
    IDT_PAGE,
    SYSTEM_ADDRESS,
    VCPU_PAGE,
    VSYSCALL_ADDRESS,
    VSYSCALL_PAGE,
    WAITS_PAGE,
    Bell,
    Mailbox,
    gate_page,
    tables_page,
)
from ipc.shm import PAGE_SIZE

from ..accel.base import AccelError, Exit, ExitKind
from ..memory import GuestMemory
from ..ports import PortBus
from ..state import SystemSaved
from .abi import CALLS
from .chance import Chance
from .channels import Terminal
from .dispatch import Dispatcher
from .forward import Forwarding
from .frames import Frames, NoFrames
from .log import WriteLog
from .population import FIRST_PID
from .ram import Ram
from .setup import fill, sources
from .signals import SignalInfo
from .state import pack, unpack
from .survey import Dirtied, survey
from .system import Console, System
from .tables import ACCESSED, DIRTY, NO_EXECUTE, PRESENT, USER, WRITE, NoTables, Tables
from .terminals import LineConsole, StreamConsole, TerminalConsole
from .tracing import Tracer
from .vdso import Vdso, counter
from .vfs import FileSystem

__all__ = ["Host", "SystemAccelerator"]

_SPIN_FROM = 0.001      # seconds until something is due, below which it does not look for long
_LOOK_EVERY = 32        # calls between two looks at the console and at the network
_FOREVER = 3600.0       # seconds
_END_TIMEOUT = 10.0     # seconds in which all threads have left the guest at the end
_LOOK_AT_END = 0.02     # seconds between two looks whether all have


class Host(Protocol):
    """The vCPU thread that runs it (workers/vcpu.py)."""

    def wait_for(self, poll: select.poll, seconds: float) -> None:
        """Until something happens at one of these descriptors, or a kick comes."""

    def wait_for_reset(self, state: VcpuState) -> None:
        """The ring is full: until it has been reset, or somebody wants something, which is attended to."""

    def stay_paused(self, state: VcpuState) -> None:
        """As long as it is to be."""

    @property
    def is_to_end(self) -> bool: ...

    def say(self, message: Notification) -> None:
        """To the coordinator."""


class _Stopped(Exception):
    """The vCPU is to end in the middle of a call."""


class SystemAccelerator:
    """See workers/accel/base.py for the contract."""

    def __init__(self, spec: WorkerSpec, memory: GuestMemory, control: VcpuControl, ports: PortBus, host: Host, *,
                 host_tsc: bool, sees_holes: bool) -> None:
        """``host_tsc``: programs read the host's time stamp counter; else each look at a clock is a system call.
        ``sees_holes``: of their vCPUs (workers/accel/base.py)."""
        assert spec.program is not None
        self.vcpu_fd, self.kvm_run_size = -1, 0
        self._spec, self._program, self._control, self._host = spec, spec.program, control, host
        self._log = WriteLog(spec, memory, control, self._make_room)
        system = memory.slots[spec.system_slot.id]
        slots = [memory.slots[slot.id] for slot in spec.slots]
        self._ram = Ram(memory, slots, self._log)
        self._bell = Bell(system.segment.buf)
        self._directory = directory = Path(spec.fd_socket).parent
        self._doorbell = Doorbell(directory, PROGRAM_CALL)
        self._poll = select.poll()
        self._poll.register(self._doorbell.fd, select.POLLIN)
        self._stream: StreamConsole | TerminalConsole | None = None
        console: Console = LineConsole(ports.say)
        if spec.program.console == "terminal":
            console = self._stream = TerminalConsole(directory, self._send_signal, time.monotonic_ns)
        elif spec.program.console == "streams":
            console = self._stream = StreamConsole(directory, self._send_signal)
        self._console = console
        self._boxes = [Mailbox(system.segment.buf, system.host_address, spec.threads, i) for i in range(spec.threads)]
        self._said_missing = 0
        self._end_by = 0.0
        self._look_at = 0       # when so many calls have been served
        self._tsc = counter() if host_tsc else None
        self._sees_holes = sees_holes
        self._frames = Frames(spec.slots[0].gpa // PAGE_SIZE, spec.slots[0].size // PAGE_SIZE)
        page = tables_page(spec.threads)
        words = memoryview(system.segment.buf)[page * PAGE_SIZE:].cast("Q")
        self._tables = Tables(words, spec.system_slot.gpa + page * PAGE_SIZE)
        self._map_system()
        self._is_there = False      # its state is still to come
        if not spec.program.arrives:
            self._begin()

    # --- set-up -----------------------------------------------------------------------------------------------------

    def _map_system(self) -> None:
        """What every program has above its own addresses. The mailboxes are nowhere."""
        root, gpa, threads = self._tables.new_root(), self._spec.system_slot.gpa, self._spec.threads
        supervisor = PRESENT | WRITE | ACCESSED
        entry = PRESENT | USER | ACCESSED
        pages = {SYSTEM_ADDRESS // PAGE_SIZE + page: gpa + page * PAGE_SIZE | supervisor
                 for page in (IDT_PAGE, *range(VCPU_PAGE, gate_page(threads, 0)))}
        gates = [gate_page(threads, index) for index in range(threads)]
        for page in (ENTRY_PAGE, *gates):
            pages[SYSTEM_ADDRESS // PAGE_SIZE + page] = gpa + page * PAGE_SIZE | entry
        pages[SYSTEM_ADDRESS // PAGE_SIZE + WAITS_PAGE] = gpa + WAITS_PAGE * PAGE_SIZE | entry | NO_EXECUTE
        for page in (BELL_PAGE, *(each + 1 for each in gates)):     # dirty: KVM is not to write it down
            pages[SYSTEM_ADDRESS // PAGE_SIZE + page] = gpa + page * PAGE_SIZE | entry | WRITE | DIRTY | NO_EXECUTE
        pages[VSYSCALL_ADDRESS // PAGE_SIZE] = gpa + VSYSCALL_PAGE * PAGE_SIZE | entry
        for page, value in pages.items():
            (_, word, _), = self._tables.chunks(root, page & (1 << 36) - 1, 1, make=True)
            self._tables.set(word, value)
        self._tables.have_in_common(root, SYSTEM_ADDRESS // PAGE_SIZE & (1 << 36) - 1)

    def _begin(self) -> None:
        """With the program at its beginning. Raises AccelError."""
        program = self._program
        files = FileSystem(self._ram, self._frames, clock=time.time_ns,
                           random=os.urandom if program.seed is None else Chance(program.seed),
                           blocks=self._spec.slots[0].size // PAGE_SIZE)
        try:
            fill(files, program)
            vdso = Vdso(self._ram, self._frames, realtime=time.time_ns, monotonic=time.monotonic_ns, tsc=self._tsc)
            self._take_up(System(self._ram, self._frames, self._tables, files, self._console, realtime=time.time_ns,
                                 monotonic=time.monotonic_ns, threads_max=self._spec.threads, vdso=vdso,
                                 processors=min(len(os.sched_getaffinity(0)), self._spec.threads)))
            self._spawn()
        except (NoFrames, NoTables):
            raise AccelError("memory: is too small for the program") from None

    def _take_up(self, system: System) -> None:
        self.system = system
        self._dispatcher = system.launcher = Dispatcher(system, self._boxes, self._ram, self._check)
        if not self._sees_holes:
            self._ram.forget = self._dispatcher.forget_frames
        self._forwarding = Forwarding(self._directory, system)
        self._tracer = Tracer(system.call)
        self._is_there = True

    def _require(self) -> None:
        """Raises AccelError."""
        if not self._is_there:
            raise AccelError("the system of a program was not given its state")

    def _spawn(self) -> None:
        program = self._program
        try:
            thread, started = self.system.spawn(
                os.fsencode(program.path), [os.fsencode(each) for each in program.args],
                [os.fsencode(each) for each in program.env], os.fsencode(program.directory))
        except OSError as exc:
            what = f"guest.directory: {program.directory}" if exc.filename else f"guest.program: {program.path}"
            raise AccelError(f"{what}: {os.strerror(exc.errno or 0)}") from None
        self._dispatcher.start(thread, started)

    # --- the vCPU ---------------------------------------------------------------------------------------------------

    def clear_immediate_exit(self) -> None:
        self._control.immediate_exit = 0

    def interrupt(self) -> None:
        self._control.immediate_exit = 1
        self._doorbell.ring()

    def run(self) -> Exit:
        self._require()
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
        self._bell.lower_flag()
        found = self._dispatcher.serve_asked(lambda: bool(self._control.immediate_exit) or self._log.full)
        if self._dispatcher.served >= self._look_at:
            self._look_at = self._dispatcher.served + _LOOK_EVERY
            self._pump()
        elif self._forwarding.busy:
            self._forwarding.pump()
        self.system.expire()
        return self._dispatcher.serve_others() or found

    def _sleep(self) -> None:
        dispatcher = self._dispatcher
        if self._patience() > _SPIN_FROM and self._bell.spin():
            return
        self._bell.set_asleep(True)
        try:
            if dispatcher.is_asked or self._forwarding.busy:
                return
            self._watch()
            self._host.wait_for(self._poll, self._patience())
        finally:
            self._bell.set_asleep(False)
        self._doorbell.silence()
        self._pump()

    def _patience(self) -> float:
        """Seconds until something is due."""
        if self.system.code is not None:
            return _LOOK_AT_END
        deadlines = [at for at in (self._dispatcher.deadline, self.system.next_timer()) if at is not None]
        if not deadlines:
            return _FOREVER
        return max(0.0, (min(deadlines) - self.system.monotonic()) / 1e9)

    # --- the console, the network -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        for each in (self._stream, self._forwarding):
            if each is not None:
                self._poll.register(each.input_fd, select.POLLIN)
                self._poll.register(each.output_fd, select.POLLOUT if each.pending else 0)

    def _pump(self) -> None:
        if self._stream is not None and self._stream.pump():
            self.system.notify(Terminal)
        self._forwarding.pump()

    @property
    def _has_shown(self) -> bool:
        """Nothing is on its way out."""
        return not (self._forwarding.pending or self._forwarding.busy
                    or (self._stream is not None and self._stream.pending))

    def _send_signal(self, group: int, number: int) -> None:
        """``group``: 0 for the first process alone."""
        first = self.system.processes.get(FIRST_PID)
        if group:
            self.system.signal_group(group, number)
        elif first is not None:
            self.system.signal_process(first, SignalInfo(number))

    # --- the end ----------------------------------------------------------------------------------------------------

    def _end_all(self) -> bool:
        """Have every thread leave the guest; whether all have, and everything has been shown."""
        now = time.monotonic()
        if not self._end_by:
            self._end_by = now + _END_TIMEOUT
            if self._stream is not None:
                self._stream.say_ended()
        self._dispatcher.end_all()
        self._pump()
        return (self._dispatcher.all_ended and self._has_shown) or now > self._end_by

    def _check(self) -> None:
        """In the middle of a call: whether it can still come to its end."""
        if self._host.is_to_end:
            raise _Stopped

    def _make_room(self) -> None:
        """Nothing is written while the machine stands still, in the middle of a call either."""
        self._check()
        self._host.wait_for_reset(VcpuState.IN_CALL)
        self._host.stay_paused(VcpuState.IN_CALL)
        self._control.state = VcpuState.RUNNING

    # --- for the worker ---------------------------------------------------------------------------------------------

    def maps(self, bitmaps: dict[int, BitmapPlace]) -> dict[str, Any]:
        """See survey.py. Raises SegmentError and OSError."""
        self._require()
        slot = self._spec.slots[0]
        place = bitmaps.get(slot.id)
        dirtied = None if place is None else Dirtied.read(place, slot.gpa // PAGE_SIZE, slot.size // PAGE_SIZE)
        return survey(self.system, self._dispatcher.vcpus, dirtied)

    def trace(self, client: str, on: bool, after: int) -> dict[str, Any]:
        """See tracing.py."""
        self._require()
        found = self._tracer.ask(client, on, after)
        self._dispatcher.tracer = self._tracer if self._tracer.wanted else None
        return found

    def registers(self) -> dict[str, int]:
        """It has none."""
        return {}

    def _say_calls(self) -> None:
        self._said_missing = len(self.system.missing)
        self._host.say(ProgramCalls(self._spec.index, self._dispatcher.served, {
            CALLS.get(number, str(number)): count for number, count in self.system.missing.items()},
            self.system.refused))

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

    def get_state(self) -> SystemSaved:
        """All workers stand still. Raises AccelError in the middle of a call."""
        self._require()
        if self._control.state == VcpuState.IN_CALL:
            raise AccelError("the system of a program cannot be saved in the middle of a call")
        dispatcher = self._dispatcher
        return SystemSaved(system=pack({
            "system": self.system.save(), "threads": dispatcher.save(), "ended": dispatcher.ended,
            "served": dispatcher.served}))

    def set_state(self, state: SystemSaved) -> None:
        """Over the memory as it was. Raises AccelError and StateError."""
        if self._is_there:
            raise AccelError("the system of a program has begun already, and cannot be given a state")
        saved = unpack(state.system)
        try:
            system = System.load(
                saved["system"], self._ram, self._frames, self._tables, self._console, realtime=time.time_ns,
                monotonic=time.monotonic_ns, tsc=self._tsc, sources=sources(self._program))
        except NoTables:
            raise AccelError("memory: is too small for the program") from None
        self._take_up(system)
        self._dispatcher.load(saved["threads"], saved["ended"])
        self._dispatcher.served = saved["served"]

    def close(self) -> None:
        """Idempotent."""
        if self._doorbell.fd >= 0:
            self._doorbell.close()
            if self._is_there:
                self._forwarding.close()
        self._ram.close()
        self._log.close()


def _exit_status(code: int) -> int:
    """Of what wait(2) gives: as a shell has it."""
    return code >> 8 if not code & 0x7F else 128 + (code & 0x7F)
