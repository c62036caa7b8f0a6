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

from ipc.layout import VcpuRequest, VcpuState
from ipc.linux.processid import ProcessId
from ipc.messages import AnyNotification, Console, Exited, ExitReason, RingFull, SetMemslots
from ipc.shm import SegmentError, list_segments, unlink_segment
from ipc.steps import step
from workers.zygote import Zygote

from ..dirty.reaper import Reaper
from ..dirty.tracking import switch
from ..dirty.verify import Verification, make_verifier
from ..errors import ExitCode, VmmError
from ..machine import boot, records, verbs
from ..machine.events import Tracer
from ..machine.names import machine_prefix
from ..machine.report import Holder
from ..machine.spec import MachineSpec, RamSlot
from ..vcpus.handle import VcpuHandle
from ..vcpus.pool import VcpuPool
from . import hotplug, segments, vcpu_states
from .clients import Clients
from .consoles import Consoles
from .core import Core
from .events import EventLog
from .incoming import Incoming
from .journal import Holds, Journal, Saved
from .leases import Change, Lease, Leases
from .limits import Limit, Limits, with_limits
from .owners import Hold, unseen
from .pauses import Pauses
from .recording import Recording
from .recovery import Recovery
from .server import ControlServer, Handler
from .status import cause_of, exit_code, machine_report, machine_slots, reason_text
from .tracking import TrackingSwitch
from .writes import HostWrite, HostWrites

__all__ = ["STOP_TIMEOUT", "Coordinator"]

STOP_TIMEOUT = 25      # seconds after SIGTERM in which it is gone, whatever it is doing

_log = logging.getLogger(__name__)


class Coordinator:
    """A machine from its making (``zygote``: makes the workers), or from where one that died has left it (None), to
    its end. ``terminal``: a descriptor for trace events without a file.

    Raises VmmError, SegmentError and OSError when it cannot be had. What was made of a new machine is gone then; of
    one that there is, all stays as it was, for another coordinator."""

    def __init__(self, spec: MachineSpec, directory: Path, keeper_fd: int, zygote: Zygote | None,
                 terminal: int) -> None:
        self._closing = contextlib.ExitStack()
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
        self.spec = spec
        self._started: float | None = None      # seconds of CLOCK_MONOTONIC
        self._elapsed_at_end: float | None = None
        self._stopping = ExitReason.NONE        # why it is to end, if it is
        self._stopped_by = "stopped on request"
        self._done = False
        self._turns = 0
        self._linger = spec.linger
        self._final: dict[str, Any] | None = None
        self._restarts = 0
        self._next_round = 0.0
        self._round = 0
        tracer = Tracer(spec.trace, spec.trace_file, terminal, self._warn)
        self._closing.callback(tracer.close)
        core = self.core = Core(spec, directory, tracer)
        self._closing.callback(core.owners.close)
        core.tell = self._tell
        self.tracking = TrackingSwitch(core, spec.asked_tracking if saved is None else saved.asked_tracking)
        self.pauses = Pauses(core)
        self.leases = Leases(core, self.pauses, self._go, Recovery(spec.name).begin)
        self.limits = Limits(core, self.tracking)
        self.clients = Clients(core, self.tracking)
        self.recording = Recording(core, self.tracking)
        self.writes = HostWrites(core)
        self.incoming = Incoming(core, self.tracking)
        if saved is None:
            core.parts = segments.make_parts(spec, self.tracking.first())
        else:
            core.parts = segments.adopt_parts(spec, saved.slots, saved.reused, saved.clients, saved.tracking)
        self._closing.callback(core.parts.close)
        self._block = core.parts.control
        self._block.coordinator_pid = os.getpid()
        self._events = EventLog(self._block)
        self._consoles = Consoles(self._on_console)
        self.vcpus = core.vcpus = VcpuPool(directory, zygote, self._on_notification, self._on_death)
        self._closing.callback(self.vcpus.close)
        self._server = ControlServer(spec.name, directory, self._verbs(), core.owners.look, self._events)
        self._closing.callback(self._server.close)
        self._signal_fd, self._signal_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._closing.callback(self._close_signals)
        self.reaper = core.reaper = Reaper(spec.reaper, self.vcpus, core.parts.log, self._block, core.tracer,
                                           self._on_rebuild, mode=core.parts.mode)
        self._closing.callback(self.reaper.close)
        self._closing.callback(self.vcpus.shut_down)
        self._closing.callback(self.recording.close)
        if saved is None:
            self._create(keeper_fd)
        else:
            self._recover(saved)
        self._catch_signals()

    def _verbs(self) -> dict[type[verbs.Verb], Handler]:
        """Every verb of the control socket, and what it calls."""
        core = self.core

        def allowed(change: Change, then: Handler) -> Handler:
            """Unless somebody has a lease that keeps it out."""
            def handler(verb: Any) -> dict[str, Any] | None:
                self.leases.require(change, verb.lease)
                return then(verb)
            return handler

        def once(then: Handler) -> Handler:
            """Of a verb that must not be carried out twice when a client asks again (it did not get the answer)."""
            def handler(verb: verbs.Verb) -> dict[str, Any] | None:
                if verb.request and verb.request in core.requests:
                    return None
                core.request = verb.request
                return then(verb)
            return handler

        return {
            verbs.Start: allowed(Change.START, lambda v: self._start()),
            verbs.Status: lambda v: self._final if self._final is not None else self._report(),
            verbs.Stop: lambda v: self._stop_or_go(),
            verbs.Release: lambda v: self._go(),
            verbs.State: lambda v: self._state(),
            verbs.SetState: allowed(Change.STATE, lambda v: vcpu_states.set_states(core, v.vcpus)),
            verbs.Incoming: allowed(Change.STATE, lambda v: {"addresses": self.incoming.expect(v.socket,
                                                                                                 self._asker(v))}),
            verbs.Arrived: allowed(Change.STATE, lambda v: self.incoming.arrived()),
            verbs.Pause: lambda v: self.pauses.pause(Hold(v.token, v.why, self._asker(v)) if v.token else None),
            verbs.Resume: lambda v: {"held_by": self.pauses.resume(force=v.force, held=self.leases.at_hand_over)},
            verbs.TakeLease: lambda v: self.leases.take(Lease(v.token, v.why, self._asker(v), v.kind),
                                                          recover=v.recover),
            verbs.Freeze: lambda v: self._freeze(v.token),
            verbs.Thaw: lambda v: self.leases.thaw(v.token),
            verbs.HandOver: lambda v: self.leases.hand_over(v.token, v.to),
            verbs.TakeBack: lambda v: self.leases.take_back(v.token),
            verbs.GiveBack: lambda v: self._give_back(v.token),
            verbs.Register: allowed(Change.REGISTER, lambda v: self.clients.register(
                v.client, self._asker(v) if v.owner_start else None, v.like)),
            verbs.Unregister: lambda v: self.clients.unregister(v.client, self._server.asker),
            verbs.Sync: lambda v: self.clients.sync(v.client, v.again, self._server.asker),
            verbs.Slots: lambda v: machine_slots(core),
            verbs.Mark: lambda v: self._mark(v),
            verbs.DirtyLimit: lambda v: self.limits.set(
                v.pages_per_s, v.vcpu, Limit(v.token, v.why, self._asker(v)) if v.token else None),
            verbs.SetTracking: lambda v: self._set_tracking(v.tracking),
            verbs.LogStart: lambda v: hotplug.set_logging(core, v.slot, True),
            verbs.LogStop: allowed(Change.UNLOG, lambda v: hotplug.set_logging(core, v.slot, False)),
            verbs.RecordStart: once(lambda v: self.recording.start(self._asker(v))),
            verbs.RecordStep: lambda v: {"going_on": self.recording.step(self._running(), self._server.asker)},
            verbs.RecordStop: once(lambda v: self.recording.stop(self._server.asker)),
            verbs.MemoryAdd: once(allowed(Change.SLOTS, lambda v: hotplug.add_slot(
                core, RamSlot(v.slot, v.gpa, v.size, v.log, born=core.new_generation())))),
            verbs.MemoryRemove: once(allowed(Change.SLOTS, lambda v: hotplug.remove_slot(
                core, v.slot, force=v.force))),
        }

    # --- verbs that concern several of the parts ---------------------------------------------------

    def _asker(self, verb: verbs.Owned) -> ProcessId:
        """Who sent it: the pid is seen, the start time told; they must fit together (vmm/coordinator/owners.py).
        Raises VmmError."""
        process = ProcessId(self._server.asker, verb.owner_start)
        if not (process.pid and process.start > 0):
            raise unseen(process)
        return process

    def _give_back(self, token: str) -> None:
        """Whatever it is that this token holds; nothing, if it was given back before."""
        if not self.leases.end(token) and not self.limits.give_back(token):
            self.pauses.give_back(token)

    def _freeze(self, token: str) -> dict[str, Any]:
        self.leases.freeze(token)
        return {"writing": [write.who for write in self.writes.held]}

    def _mark(self, verb: verbs.Mark) -> None:
        if verb.when == "after":        # one that began before a freeze is over before what is dirty is looked at
            return self.writes.end(verb.token)
        self.leases.require(Change.HOST_WRITE, verb.lease)
        if verb.when == "made":
            return self.core.parts.log.mark(verb.slot, verb.first, verb.count, verb.born)
        if verb.born is None:
            raise VmmError("a write begins in a slot with its born")
        self.writes.begin(HostWrite(verb.token, verb.why, self._asker(verb), verb.slot, verb.born, verb.first,
                                    verb.count))

    def _set_tracking(self, asked: str) -> dict[str, Any]:
        if asked == "none":
            self.leases.require(Change.UNLOG)
        return self.tracking.ask(asked, [limit.who for limit in self.limits.held])

    def _state(self) -> dict[str, Any]:
        spec = with_limits(msgspec.structs.replace(self.spec, tracking=self.tracking.asked), self.limits.user)
        return {**vcpu_states.take_states(self.core, spec, paused=self.pauses.paused), "paused": self.pauses.user}

    # --- set-up ------------------------------------------------------------------------------

    def _create(self, keeper_fd: int) -> None:
        core = self.core
        core.write_journal = self._write_journal
        for vcpu in segments.make_handles(core.parts):
            self.vcpus.spawn(vcpu, segments.worker_spec(core.parts, vcpu.index, core.directory, keeper_fd))
        self.vcpus.start_paused()
        self.vcpus.await_hello()
        if self.spec.verify is not None:
            core.verifier = make_verifier(self.spec.verify, core.parts.log, self.vcpus.all, self._block,
                                          core.parts.usable, memory=self.spec.can.guests)
            self._closing.callback(core.verifier.close)
        core.state = "ready"
        core.save()
        _log.info("%d vCPUs (%s) are ready", self.spec.vcpus, self.spec.accel)

    def _start(self) -> None:
        """Let the vCPUs enter the guest for the first time."""
        if self.core.state != "ready":
            return
        now = time.monotonic()
        self._started = now
        try:
            self.core.save()
        except VmmError:
            self._started = None
            raise
        step("start-committed")
        self.core.state = "running"
        if self.spec.verify is not None:
            self._next_round = now + self.spec.verify.interval
        self.reaper.schedule.plan(now, {s.index: s.ring.soft_limit for s in self.vcpus.all})
        self.vcpus.resume_all()
        step("start-resumed")
        self.core.parts.log.load_loops()      # the guest runs already, and no ring is full so soon

    def _recover(self, saved: Saved) -> None:
        """Carry on where a coordinator that died left off (invariant 5).

        Its harvest may have stopped anywhere. What it had harvested lies in staging, what it had not
        is still in the rings; entries it had harvested and not reset are counted by the difference of
        the two totals. So one ordinary reap, of every ring, puts all of it right.
        """
        core, holds = self.core, saved.holds
        self._restarts = saved.restarts + 1
        self._started, self._elapsed_at_end = saved.started, saved.elapsed
        self._stopping = ExitReason(saved.stopping)
        core.generation = saved.generation
        core.requests.extend(saved.requests)
        for vcpu, process in zip(segments.make_handles(core.parts), saved.workers, strict=True):
            vcpu.exited = saved.exits.get(vcpu.index)
            self.vcpus.all.append(vcpu)
            try:
                if vcpu.control.state == VcpuState.DEAD:
                    raise ProcessLookupError
                vcpu.adopt(process)
            except ProcessLookupError:
                vcpu.mark_dead()
                self.reaper.worker_died(vcpu)
        # Before anybody is waited for: a vCPU may be waiting for a page.
        self.incoming.adopt(holds.incoming)
        if core.reaper.only_full:
            self._leave_alone()
        else:
            self._bring_into_line()
        if self.spec.verify is not None:
            core.verifier = make_verifier(self.spec.verify, core.parts.log, self.vcpus.all, self._block,
                                          core.parts.usable, saved.verification or Verification(),
                                          memory=self.spec.can.guests)
            self._closing.callback(core.verifier.close)
            self._next_round = time.monotonic()
        for vcpu in self.vcpus.all:
            # A message that the predecessor took with it: the control block still says so.
            if vcpu.control.state == VcpuState.EXITED and vcpu.exited is None:
                vcpu.exited = Exited(vcpu.index, ExitReason(vcpu.control.exit_reason),
                                      vcpu.control.exit_code)
        core.parts.log.publish()
        self.clients.adopt(holds.clients)
        self.writes.adopt(holds.writes)
        core.state = "ready" if saved.started is None else "running"
        self.pauses.adopt(holds.user_paused, holds.pauses, holds.handed_over)
        self.leases.adopt(holds.leases)
        self.limits.adopt(holds.user_limits, holds.limits)
        step("take-over")
        core.write_journal = self._write_journal
        core.save()         # from here on it is this one's machine
        step("take-over-committed")
        self._sweep()
        if self._stopping != ExitReason.NONE:
            self._ask_to_end()
        if saved.started is not None:
            self.vcpus.resume_all()    # those who want it to stand still have their own pause by now
        _log.info("has taken over, for the %d. time", self._restarts)

    def _bring_into_line(self) -> None:
        """Whatever the predecessor was in the middle of, everybody is stopped first. The workers are given the
        slots and the tracking that the journal has, and what they have logged is reaped."""
        core = self.core
        if switch.unfinished(core.parts, self.vcpus):
            # The vCPUs stand still. They stay so with what is set here, until they are resumed.
            self.vcpus.pause(self.vcpus.all)
            switch.fulfil(core.parts, self.vcpus)
        elif self.spec.can.kernel_ring:
            self.vcpus.adopt_fds(core.live)
        self.vcpus.pause_all()
        slots = core.parts.log.slots.values()
        self.vcpus.request(core.live, lambda seq, s: SetMemslots(seq, [m.worker_spec(s.index) for m in slots]))
        if core.parts.ring_entries:
            self.reaper.full.update(s.index for s in self.vcpus.all)
        self.reaper.drain()

    def _leave_alone(self) -> None:
        """Post-copy on a software CPU: a vCPU that waits for a page does nothing else, for as long as that takes.
        Nor can the predecessor have been in the middle of anything that concerns them, but a pause."""
        self.vcpus.expect_paused()
        self.reaper.full.update(s.index for s in self.vcpus.all if s.control.state == VcpuState.RING_FULL)

    def _sweep(self) -> None:
        """Unlink what nobody has: segments that a predecessor had made and not written down, or struck out and not
        removed."""
        known = {*self._journal.segments, *self.core.parts.segments,
                 *(self.core.verifier.segments if self.core.verifier is not None else ())}
        for name in list_segments(machine_prefix(self.spec.name)):
            if name not in known:
                unlink_segment(name)
                step("take-over-swept")

    def _write_journal(self) -> None:
        """Raises VmmError."""
        core = self.core
        log = core.parts.log
        self._journal.write(Saved(
            restarts=self._restarts, generation=core.generation, requests=list(core.requests),
            slots=[slot.now for slot in log.slots.values()], reused=sorted(log.reused), clients=log.saved_clients(),
            holds=self._holds(), workers=[s.process for s in self.vcpus.all],
            exits={s.index: s.exited for s in self.vcpus.all if s.exited is not None},
            started=self._started, elapsed=self._elapsed_at_end, stopping=self._stopping,
            tracking=core.parts.tracking, asked_tracking=self.tracking.asked,
            verification=core.verifier.result if core.verifier else None))

    def _holds(self) -> Holds:
        pauses, limits = self.pauses, self.limits
        return Holds(user_paused=pauses.user, pauses=list(pauses.held), handed_over=pauses.handed_over,
                     leases=list(self.leases.held), user_limits=limits.user, limits=list(limits.held),
                     clients=list(self.clients.held), writes=list(self.writes.held), incoming=self.incoming.owner)

    # --- the loop -----------------------------------------------------------------------------

    def run(self) -> int:
        """Serve the machine until it is over and released; its exit code."""
        while not self._done:
            self._turns += 1
            step("turn")
            if self.core.unsaved:
                self.core.save_if_possible()
            now = time.monotonic()
            if self._running():
                self._run_due(now)
            # Not by the control block: its state says so before the notification with the reason comes.
            if self.core.state == "running" and not any(s.alive and s.exited is None for s in self.vcpus.all):
                self._finish()
                continue
            self.reaper.wait()
            self._wait(time.monotonic())
        assert self._final is not None
        return int(self._final["exit_code"])

    def _running(self) -> bool:
        return self.core.state == "running" and not self.pauses.paused

    def _run_due(self, now: float) -> None:
        """What is due in time, or asked for by a full ring."""
        if self.spec.timeout is not None and self._elapsed() >= self.spec.timeout:
            self._stop(ExitReason.TIMEOUT)
        if self.reaper.full:
            self.reaper.wake("ring-full")
        elif self.core.parts.ring_entries and self.reaper.schedule.left(now) == 0:
            self.reaper.wake()
        if self.core.verifying and now >= self._next_round:
            self._verify_round()
        self.tracking.choose_or_keep()

    def _wait(self, now: float) -> None:
        poller = zmq.Poller()
        poller.register(self.vcpus.notify, zmq.POLLIN)
        poller.register(self._signal_fd, zmq.POLLIN)
        by_fd = {s.pidfd: s for s in self.vcpus.all if s.alive}
        owners = self.core.owners.watched
        for fd in (*by_fd, *owners):
            poller.register(fd, zmq.POLLIN)
        self._server.answer_waiting()
        clients = self._server.interests()
        for fd, events in clients.items():
            poller.register(fd, events)
        ended, asking = [], {}
        for ready, happened in poller.poll(0 if self._server.behind else self._poll_ms(now)):
            if ready is self.vcpus.notify:
                self.vcpus.drain_notifications()
            elif ready == self._signal_fd:
                os.read(self._signal_fd, 4096)
                self._linger = False
                if self._stopping == ExitReason.NONE:
                    self._stopped_by = records.BY_SIGTERM
                self._stop_or_go()
            elif ready in by_fd:
                self.vcpus.mark_dead(by_fd[ready])
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
            _log.exception("something that a process held could not be given back")
            self._warn(f"what a process held that has ended could not be given back: {exc}")

    def _poll_ms(self, now: float) -> int | None:
        """Time until something is due; None while nothing can be."""
        if not self._running():
            return None
        waits = []
        if self.core.parts.ring_entries:
            waits.append(0.0 if self.reaper.full else self.reaper.schedule.left(now))
        if self.core.verifying:
            waits.append(self._next_round - now)
        idle = self.tracking.left(now)
        if idle is not None:
            waits.append(idle)
        if self.spec.timeout is not None and self._stopping == ExitReason.NONE:
            waits.append(self.spec.timeout - self._elapsed())
        return max(0, -int(-min(waits) * 1000 // 1)) if waits else None

    def _catch_signals(self) -> None:
        """SIGTERM wakes the loop, which stops the machine in order. Through the wakeup fd: a handler in
        Python would not run while the poll is being entered. One that is stuck is ended by SIGALRM."""
        signal.set_wakeup_fd(self._signal_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, _on_term)

    # --- events from workers ---------------------------------------------------------------------

    def _on_notification(self, message: AnyNotification) -> None:
        if isinstance(message, RingFull):
            if self.core.tracer.full:
                self.core.tracer.full(message.vcpu)
            if self.core.parts.ring_entries:    # else it comes from before the last switch
                self.reaper.full.add(message.vcpu)
        elif isinstance(message, Console):
            self._consoles.write(message.vcpu, message.data)
        elif isinstance(message, Exited):
            self._consoles.write(message.vcpu, b"", final=True)
            self.vcpus.all[message.vcpu].exited = message
            self.core.tell({"event": "exit", "vcpu": message.vcpu, "reason": reason_text(message.reason),
                            "code": message.code, "detail": message.detail})

    def _on_death(self, vcpu: VcpuHandle) -> None:
        """A worker's process has ended."""
        if self._done or self.core.state == "ended":
            return
        self._consoles.write(vcpu.index, b"", final=True)
        self.reaper.worker_died(vcpu)
        self.core.tell({"event": "exit", "vcpu": vcpu.index, "reason": reason_text(ExitReason.WORKER_DIED),
                        "code": 0, "detail": f"its worker (process {vcpu.pid}) {vcpu.fate or 'ended'}"})

    def _on_rebuild(self, vcpu: int, owed: int, reset: int, pages: int) -> None:
        if self.reaper.recorder is not None:
            self.reaper.recorder.miss()
        self.core.tell({"event": "ring-rebuilt", "vcpu": vcpu, "harvested": owed, "reset": reset,
                        "pages_marked": pages})

    # --- what is said -----------------------------------------------------------------------------

    def _tell(self, event: dict[str, Any]) -> None:
        """To every client that wants events, and to the log."""
        self._events.add(event)
        kind = event["event"]
        if kind == "warning":
            _log.warning("%s", event["text"])
        elif kind != "console":
            _log.info("%s %s", kind, " ".join(f"{k}={v}" for k, v in event.items() if k != "event" and v != ""))

    def _on_console(self, vcpu: int, text: str) -> None:
        self._tell({"event": "console", "vcpu": vcpu, "data": text})
        _log.info("%s", text.removesuffix("\n"), extra={"source": f"vcpu{vcpu}", "level": "console"})

    def _warn(self, text: str) -> None:
        """Something that a user should know, and the machine runs on."""
        self._tell({"event": "warning", "text": text})

    # --- verification, end ------------------------------------------------------------------------

    def _verify_round(self) -> None:
        assert self.spec.verify is not None
        with self.vcpus.all_paused():
            self.core.drain_and_verify()
            self.core.save_if_possible()
            self._round += 1
            boot.set_round(memoryview(self.core.parts.system.buf), self._round)
        self._next_round = time.monotonic() + self.spec.verify.interval

    def _stop(self, reason: ExitReason) -> None:
        """Ask every vCPU to end. They do so at once, paused or not."""
        if self._stopping != ExitReason.NONE or self.core.state != "running":
            return
        self._stopping = reason
        self.core.save_if_possible()
        step("stop-saved")
        self._ask_to_end()

    def _ask_to_end(self) -> None:
        for vcpu in self.vcpus.all:
            if vcpu.running:
                vcpu.control.stop_reason = self._stopping
                vcpu.control.request |= VcpuRequest.STOP
                vcpu.kick()
                if self.core.pages_missing:     # it may wait for a page that never comes
                    vcpu.signal(signal.SIGKILL)
                step("stop-asked")

    def _stop_or_go(self) -> None:
        self._stop(ExitReason.STOPPED)
        self._go()

    def _go(self) -> None:
        """Let a machine go that does not run."""
        if self.core.state == "ready" and not self._done:
            self._keep_report(ExitCode.STOPPED, f"{self._stopped_by}, before it was started")
        self._done = self._done or self.core.state == "ended"

    def _finish(self) -> None:
        """Every vCPU has ended: what their rings still hold is reaped and checked."""
        self.vcpus.drain_notifications(everything=True)
        if self.core.verifying:
            self.core.drain_and_verify()
        else:
            self.reaper.drain()
        self._keep_report(exit_code(self.core), cause_of(self.core, self._stopped_by))
        self._done = not self._linger

    def _keep_report(self, code: ExitCode, cause: str) -> None:
        """The machine has ended: its report stays, here while the machine lingers, and on disk."""
        self._elapsed_at_end = self._elapsed()
        self.core.state = "ended"
        self.core.save_if_possible()
        self._final = {**self._report(), "exit_code": int(code), "cause": cause, "ended_at": records.now()}
        try:
            records.write_report(self.spec.name, self._final)
        except OSError as exc:
            self._warn(f"its report cannot be kept: {exc}")
        step("report-kept")
        self._tell({"event": "ended", "exit_code": int(code), "cause": cause})

    def _elapsed(self) -> float:
        """Seconds since the start."""
        if self._elapsed_at_end is not None:
            return self._elapsed_at_end
        return time.monotonic() - self._started if self._started is not None else 0.0

    def _report(self) -> dict[str, Any]:
        """As vmm/machine/report.py has it."""
        return dict(msgspec.to_builtins(machine_report(
            self.core, paused=self.pauses.paused, elapsed=self._elapsed(), asked_tracking=self.tracking.asked,
            switches=self.tracking.switches, restarts=self._restarts, turns=self._turns, holders=self._holders(),
            handed_over=self.pauses.handed_over.to if self.pauses.handed_over else "")))

    def _holders(self) -> list[Holder]:
        """Who has what of the machine; pid 0: the user."""
        pauses, limits, recorder = self.pauses, self.limits, self.recording.owner
        holders: list[tuple[str, str, int]] = []
        if pauses.user:
            holders.append(("pause", "user", 0))
        if any(limits.user):
            holders.append(("limit", "user", 0))
        for what, held in (("pause", pauses.held), ("limit", limits.held)):
            holders += [(what, hold.why, hold.owner.pid) for hold in held]
        for client in self.core.parts.log.clients:
            owned = self.clients.held.get(client)
            holders.append(("client", client, owned.owner.pid if owned else 0))
        holders += [("lease", f"{lease.kind} {lease.why}", lease.owner.pid) for lease in self.leases.held]
        if recorder is not None:
            holders.append(("recording", "trace", recorder.pid))
        return [Holder(what=what, why=why, pid=pid) for what, why, pid in holders]

    # --- tear-down ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Nothing is left of the machine; of one that was never whole, of what there was. Idempotent."""
        self._done = True
        self._closing.close()

    def _close_signals(self) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._signal_fd)
        os.close(self._signal_write)


def _on_term(signum: int, frame: FrameType | None) -> None:
    signal.alarm(STOP_TIMEOUT)
