"""The coordinator process: one loop, one thread, which is the machine's big lock.

The loop sleeps in one poll: on notifications (above all ring-full), on the control socket, on the pidfds of workers
and owners, on its own signals, until the reaper, the verifier or the timeout is due.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import zmq

from ipc.bell import Doorbell
from ipc.lanes import Kind, Lane
from ipc.messages import AnyNotification, Console, Exited, ExitReason, ProgramCalls, RingFull
from ipc.shm import Segment, SegmentError
from ipc.steps import step
from workers.zygote import Zygote

from ..dirty.reaper import Reaper
from ..dirty.tracking.modes import tracking_mode
from ..errors import VmmError
from ..machine.events import Tracer
from ..machine.spec import MachineSpec
from ..vcpus.handle import VcpuHandle
from ..vcpus.pool import VcpuPool
from . import STOP_TIMEOUT, segments
from .consoles import Consoles
from .core import Core
from .events import EventLog
from .families import Families
from .journal import Journal, Saved
from .outcome import reason_text
from .rounds import Rounds
from .server import ControlServer
from .status import machine_report
from .table import handlers
from .takeover import commit, take_over

__all__ = ["Coordinator"]

_log = logging.getLogger(__name__)

_RETRY = 1.0        # seconds after which a journal that could not be written is written again, if nothing else comes


class Coordinator:
    """A machine from its making (``zygote``: makes the workers), or from where one that died has left it (None), to
    its end. ``terminal``: a descriptor for trace events without a file.

    Raises VmmError, SegmentError and OSError when it cannot be created or taken over. What was made of a new machine
    is removed then; of an existing one all stays as it was, for another coordinator."""

    def __init__(self, spec: MachineSpec, directory: Path, keeper_fd: int, zygote: Zygote | None,
                 terminal: int) -> None:
        self._closing = contextlib.ExitStack()
        self._closed = False
        try:
            self._set_up(spec, directory, keeper_fd, zygote, terminal)
        except BaseException:
            if zygote is not None:
                self.close()
            raise

    def _set_up(self, spec: MachineSpec, directory: Path, keeper_fd: int, zygote: Zygote | None,
                terminal: int) -> None:
        saved: Saved | None = None
        if zygote is None:
            self._journal, saved = Journal.adopt(spec.name)
        else:
            self._journal = Journal.create(spec.name, spec.vcpus)
        self._closing.callback(self._journal.close)
        # The machine keeps its image: a snapshot holds a copy, and a file that it came from may go.
        if spec.image:
            image = directory / "image"
            if zygote is not None:
                segments.copy_image(spec.image, image)
            spec = msgspec.structs.replace(spec, image=str(image))
        incoming, links = spec.incoming, spec.links
        spec = msgspec.structs.replace(spec, incoming=False, links={})      # it is so once
        self.spec = spec
        tracer = Tracer(spec.trace, spec.trace_file, terminal, self._warn)
        self._closing.callback(tracer.close)
        core = self.core = Core(spec, directory, tracer)
        core.incoming = incoming if saved is None else saved.incoming
        core.links = links
        self._closing.callback(core.owners.close)
        core.tell, core.report = self._tell, self._report
        machine = self.machine = Families(core, spec.asked_tracking if saved is None else saved.asked_tracking)
        if saved is None:
            core.parts = segments.make_parts(spec, machine.tracking.first(), logging=machine.tracking.logs_first,
                                             incoming=incoming)
        else:
            core.parts = segments.adopt_parts(spec, saved.slots, saved.reused, saved.clients, saved.tracking,
                                              logging=saved.logging)
        self._closing.callback(core.parts.close)
        self._block = core.parts.control
        self._block.coordinator_pid = os.getpid()
        self._events = EventLog(self._block)
        self._lane = Lane.of_coordinator(core.parts.control_segment.address, spec.vcpus)
        self._consoles = Consoles(self._on_console)
        core.vcpus = VcpuPool(directory, zygote, self._on_notification, self._on_death)
        self._closing.callback(core.vcpus.close)
        self._server = ControlServer(spec.name, directory, handlers(machine), self._before_verb, self._events,
                                     self._lane)
        self._closing.callback(self._server.close)
        self._signal_fd, self._signal_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._closing.callback(self._close_signals)
        core.reaper = Reaper(spec.reaper, core.vcpus, core.parts.log, self._block, core.tracer, self._on_rebuild,
                             mode=tracking_mode(core.parts.tracking), lane=self._lane)
        self._closing.callback(core.reaper.close)
        self._closing.callback(core.vcpus.shut_down)
        self._closing.callback(machine.recording.close)
        self._rounds = Rounds(core)
        self._closing.callback(self._rounds.close)
        if saved is None:
            core.write_journal = self._write_journal
            self._create(keeper_fd)
            self._open_bell()
        else:
            self._open_bell()
            take_over(machine, saved, self._rounds)
            core.write_journal = self._write_journal
            commit(machine, self._segments())
        self._catch_signals()

    def _create(self, keeper_fd: int) -> None:
        """Start the workers."""
        core = self.core
        segments.make_pipes(self.spec, core.directory)
        for vcpu in segments.make_handles(core.parts):
            core.vcpus.spawn(vcpu, segments.worker_spec(
                core.parts, vcpu.index, core.directory, core.vcpus.endpoints, keeper_fd))
        core.vcpus.start_paused()
        core.parts.log.load_loops()     # while the workers are set up
        try:
            core.vcpus.await_hello()
        finally:
            Segment.settle()        # a worker that has died of memory which there is none of is not what has gone wrong
        self._rounds.begin()
        core.state = "ready"
        core.save()
        _log.info("%d vCPUs (%s) are ready", self.spec.vcpus, self.spec.accel)

    def _open_bell(self) -> None:
        """Raises OSError."""
        self._bell = Doorbell(self.core.directory)
        self._closing.callback(self._bell.close)

    def _write_journal(self) -> None:
        """Raises VmmError."""
        self._journal.write(self.machine.saved())

    def _segments(self) -> set[str]:
        """Names of all that this machine has."""
        verifier = self.core.verifier
        return {*self._journal.segments, *self.core.parts.segments, *(verifier.segments if verifier else ())}

    # --- the loop -----------------------------------------------------------------------------

    def run(self) -> int:
        """Serve the machine until it is over and released; its exit code."""
        core, life = self.core, self.machine.life
        while not life.done:
            core.turns += 1
            step("turn")
            if core.unsaved:
                core.save_if_possible()
            now = time.monotonic()
            if self.machine.pauses.running:
                self._run_due(now)
            # Not by the control block: its state says so before the notification with the reason comes.
            if core.state == "running" and not any(s.alive and s.exited is None for s in core.vcpus.all):
                life.finish()
                continue
            core.reaper.wait()
            self._wait(time.monotonic())
        assert life.final is not None
        return int(life.final["exit_code"])

    def _run_due(self, now: float) -> None:
        """What is due in time, or asked for by a full ring."""
        timeout = self.machine.life.timeout_left
        if timeout is not None and timeout <= 0:
            self.machine.life.stop(ExitReason.TIMEOUT)
        if self.core.reaper.full:
            self.core.reaper.wake("ring-full")
        elif self.core.parts.reaps and self.core.reaper.schedule.left(now) == 0:
            self.core.reaper.wake()
        round_left = self._rounds.left(now)
        if round_left is not None and round_left <= 0:
            began = time.perf_counter_ns()
            self._rounds.run()
            self._lane.put(Kind.VERIFY, time.perf_counter_ns() - began, began=began)
        self.machine.tracking.choose_or_keep()

    def _wait(self, now: float) -> None:
        poller = zmq.Poller()
        poller.register(self._bell.fd, zmq.POLLIN)
        poller.register(self.core.vcpus.notify, zmq.POLLIN)
        poller.register(self._signal_fd, zmq.POLLIN)
        by_fd = {s.pidfd: s for s in self.core.vcpus.all if s.alive}
        owners = self.core.owners.watched
        for fd in (*by_fd, *owners):
            poller.register(fd, zmq.POLLIN)
        self._server.answer_waiting()
        clients = self._server.interests()
        for fd, events in clients.items():
            poller.register(fd, events)
        ended, asking = [], {}
        for ready, happened in poller.poll(0 if self._server.behind else self._poll_ms(now)):
            if ready == self._bell.fd:
                self._bell.silence()
                if self.machine.pauses.running:     # before all else: a vCPU waits
                    self.core.reaper.let_go()
            elif ready is self.core.vcpus.notify:
                self.core.vcpus.drain_notifications()
            elif ready == self._signal_fd:
                os.read(self._signal_fd, 4096)
                self.machine.life.terminate()
            elif ready in by_fd:
                self.core.vcpus.mark_dead(by_fd[ready])
            elif ready in clients:
                asking[ready] = happened
            else:
                ended.append(ready)
        self._server.serve(asking)
        self._let_go(ended)

    def _let_go(self, ended: list[int]) -> None:
        """Of what these processes held."""
        try:
            self.core.owners.ended(ended)
        except (VmmError, SegmentError, OSError) as exc:
            _log.exception("something held by a process that has ended could not be released")
            self._warn(f"something held by a process that has ended could not be released: {exc}")

    def _poll_ms(self, now: float) -> int | None:
        """Time until something is due; None while nothing can be."""
        if not self.machine.pauses.running:
            return None
        dues = [self._rounds.left(now), self.machine.tracking.left(now), self.machine.life.timeout_left]
        if self.core.reaper.full or self.core.parts.reaps:
            dues.append(0.0 if self.core.reaper.full else self.core.reaper.schedule.left(now))
        if self.core.unsaved:
            dues.append(_RETRY)
        waits = [due for due in dues if due is not None]
        return max(0, -int(-min(waits) * 1000 // 1)) if waits else None

    def _catch_signals(self) -> None:
        """SIGTERM wakes the loop, which stops the machine in order. Through the wakeup fd: a handler in
        Python would not run while the poll is being entered. One that is stuck is ended by SIGALRM."""
        signal.set_wakeup_fd(self._signal_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, _on_term)

    # --- events from workers ---------------------------------------------------------------------

    def _on_notification(self, message: AnyNotification) -> None:
        if isinstance(message, RingFull):
            self.core.reaper.look_for_full()
        elif isinstance(message, Console):
            self._consoles.write(message.vcpu, message.data)
        elif isinstance(message, ProgramCalls):
            if self.spec.is_system(message.vcpu):
                self.core.program_calls = message
        elif isinstance(message, Exited):
            self._consoles.write(message.vcpu, b"", final=True)
            self.core.vcpus.all[message.vcpu].exited = message
            self.core.tell({"event": "exit", "vcpu": message.vcpu, "reason": reason_text(message.reason),
                            "code": message.code, "detail": message.detail})
            if self.spec.program is not None and message.reason not in (ExitReason.CODE, ExitReason.STOPPED):
                self._give_up_program()

    def _on_death(self, vcpu: VcpuHandle) -> None:
        """A worker's process has ended."""
        if self._closed or self.core.state == "ended":
            return
        self._consoles.write(vcpu.index, b"", final=True)
        self.core.reaper.worker_died(vcpu)
        self.core.tell({"event": "exit", "vcpu": vcpu.index, "reason": reason_text(ExitReason.WORKER_DIED),
                        "code": 0, "detail": f"its worker (process {vcpu.pid}) {vcpu.fate or 'ended'}"})
        if self.spec.program is not None:
            self._give_up_program()

    def _give_up_program(self) -> None:
        """With a thread, or its system, missing it would wait for ever."""
        self.machine.life.stop(ExitReason.STOPPED)

    def _on_rebuild(self, vcpu: int, owed: int, reset: int, pages: int) -> None:
        if self.core.reaper.recorder is not None:
            self.core.reaper.recorder.miss()
        self.core.tell({"event": "ring-rebuilt", "vcpu": vcpu, "harvested": owed, "reset": reset,
                        "pages_marked": pages})

    # --- what is said -----------------------------------------------------------------------------

    def _tell(self, event: dict[str, Any]) -> None:
        """To every client that wants events, and to the log."""
        self._events.add({**event, "at": round(time.monotonic(), 6)})
        kind = event["event"]
        if kind == "warning":
            _log.warning("%s", event["text"])
        elif kind != "console":
            _log.info("%s %s", kind, " ".join(f"{k}={v}" for k, v in event.items() if k != "event" and v != ""))

    def _on_console(self, vcpu: int, text: str) -> None:
        self._tell({"event": "console", "vcpu": vcpu, "data": text})
        _log.info("%s", text.removesuffix("\n"), extra={"source": f"vcpu{vcpu}", "level": "console"})

    def _warn(self, text: str) -> None:
        self.core.warn(text)

    def _before_verb(self, asker: int) -> None:
        self.core.asker = asker
        self.core.owners.look()

    def _report(self) -> dict[str, Any]:
        return dict(msgspec.to_builtins(machine_report(self.machine)))

    # --- tear-down ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Nothing is left of the machine; of one that was never whole, of what there was. Idempotent."""
        self._closed = True         # a worker that ends now is no news
        self._closing.close()

    def _close_signals(self) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._signal_fd)
        os.close(self._signal_write)


def _on_term(signum: int, frame: FrameType | None) -> None:
    signal.alarm(STOP_TIMEOUT)
