"""The coordinator process: one loop, one thread, which is the machine's big lock.

The loop sleeps in one poll: on notifications (above all ring-full), on the control socket, on the
workers' pidfds, on its own signals, until the reaper, the verifier or the timeout is due.
Run by the keeper (vmm/keeper.py) as ``python -m vmm.coordinator``.
"""

from __future__ import annotations

import base64
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import zmq

from ipc import channel, process
from ipc.layout import MAX_SLOTS, ReaperState, VcpuRequest, VcpuState
from ipc.messages import (
    AnyNotification,
    Console,
    Exited,
    ExitReason,
    GetState,
    RemoveMemslot,
    RingFull,
    SetMemslot,
    SetState,
    Userfault,
)
from ipc.shm import SegmentError, segment_name, unlink_segment
from workers.zygote import Zygote

from . import boot, build, control, retrack
from .autotrack import AutoTracking
from .errors import ExitCode, VmmError, no_memory
from .reaper import Reaper
from .record import QUEUE, Recorder
from .runtime import machine_dir
from .shards import Shard, Shards
from .spec import MachineSpec, RamSlot, decode_spec
from .trace import Tracer
from .tracking import check_tracking, not_logged
from .verify import CLIENT as VERIFY_CLIENT
from .verify import AnyVerifier, Verification, make_verifier

__all__ = ["Coordinator", "main"]

_CRASHES = frozenset({ExitReason.TRIPLE_FAULT, ExitReason.EXCEPTION, ExitReason.BAD_ADDRESS,
                      ExitReason.UNKNOWN_PORT, ExitReason.INTERNAL_ERROR, ExitReason.HALT})


class Saved(msgspec.Struct):
    """What a replacement coordinator must know beyond the shared memory (state.json)."""

    slots: list[RamSlot]
    clients: list[str]
    elapsed: float
    started: bool
    user_paused: bool
    verification: Verification | None
    exits: dict[int, Exited]
    restarts: int
    owners: dict[str, int]
    pause_owner: int
    incoming: int
    tracking: str               # one of vmm.tracking.MODES
    asked_tracking: str         # one of vmm.tracking.CHOICES


class Coordinator:
    def __init__(self, spec: MachineSpec, directory: Path, keeper_fd: int, zygote: Zygote | None) -> None:
        recover = zygote is None
        # The machine keeps its image: a snapshot holds a copy, and a file that it came from may go.
        if spec.image:
            image = directory / "image"
            if not recover:
                build.copy_image(spec.image, image)
            spec = msgspec.structs.replace(spec, image=str(image))
        self.spec = spec
        self.directory = directory
        self._keeper_fd = keeper_fd
        self._followers: set[bytes] = set()
        self._started = 0.0
        self._state = "starting"
        self._user_paused = False
        self._stop_asked = False
        self._done = False
        self._linger = spec.linger
        self._final: dict[str, Any] | None = None
        self._restarts = 0
        self._switches = 0
        self._next_round = 0.0
        self._round = 0
        #: {client: (pid, pidfd)} of clients that go when their process does.
        self._owners: dict[str, tuple[int, int]] = {}
        self._pause_owner = (0, -1)
        #: Post-copy: who fills in the missing pages.
        self._incoming = (0, -1)
        self._record_owner = -1     # pidfd
        self.tracer = Tracer(spec.trace, spec.trace_file)
        saved = self._load() if recover else None
        self._asked_tracking = spec.asked_tracking if saved is None else saved.asked_tracking
        self._auto = AutoTracking()
        if saved is None:
            tracking = spec.asked_tracking
            if tracking == "auto":
                tracking = self._auto.first(logged=spec.verify is not None, limited=spec.dirty_quota > 0)
            self.parts = build.make_parts(spec, tracking)
        else:
            self.parts = build.adopt_parts(spec, saved.slots, saved.clients, saved.tracking)
        self.log = self.parts.log
        self.block = self.parts.control
        self.block.coordinator_pid = os.getpid()
        self.shards = Shards(directory, zygote, self._on_notification, self._on_death)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._control = channel.bind(self._context, zmq.ROUTER, channel.endpoint(directory, "control"))
        self._signal_fd, self._signal_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.reaper = Reaper(spec.reaper, self.shards, self.log, self.block, self.tracer, self._on_rebuild,
                             tracking=self.parts.tracking)
        self.verifier: AnyVerifier | None = None
        if saved is None:
            self._create()
        else:
            self._recover(saved)

    # --- set-up ------------------------------------------------------------------------------

    def _create(self) -> None:
        for shard in build.make_shards(self.parts):
            self.shards.spawn(shard, build.worker_spec(self.parts, shard.index, self.directory,
                                                       self._keeper_fd))
        self.shards.start_paused()
        self.shards.await_hello()
        if self.spec.verify is not None:
            self.verifier = make_verifier(self.spec.accel, self.spec.verify, self.log, self.shards.all,
                                          self.block, self.parts.usable)
        self._state = "ready"
        self._save()

    def _start(self) -> None:
        """Let the vCPUs enter the guest for the first time."""
        if self._state != "ready":
            return
        self._state = "running"
        now = time.monotonic()
        self._started = now
        if self.spec.verify is not None:
            self._next_round = now + self.spec.verify.interval
        self.reaper.schedule.plan(now, {s.index: s.soft_limit for s in self.shards.all})
        self.shards.resume_all()
        self.log.load_kernels()     # the guest runs already, and no ring is full so soon
        self._save()

    def _recover(self, saved: Saved) -> None:
        """Carry on where a coordinator that died left off (invariant 5).

        Its harvest may have stopped anywhere. What it had harvested lies in staging, what it had not
        is still in the rings; entries it had harvested and not reset are counted by the difference of
        the two totals. So one ordinary reap, of every ring, puts all of it right.
        """
        self._restarts = saved.restarts + 1
        unlink_segment(segment_name(self.spec.name, QUEUE))     # a recording ends with its coordinator
        self._started = time.monotonic() - saved.elapsed if saved.started else 0.0
        for shard in build.make_shards(self.parts):
            shard.exited = saved.exits.get(shard.index)
            self.shards.all.append(shard)
            try:
                if shard.control.state == VcpuState.DEAD:
                    raise ProcessLookupError
                shard.watch(shard.control.pid)
            except ProcessLookupError:
                shard.bury()
        if retrack.unfinished(self.parts, self.shards):
            # The vCPUs stand still. They stay so with what is set here, until resume_all below.
            self.shards.pause(self.shards.all)
            retrack.fulfil(self.parts, self.shards)
        elif self.spec.accel == "kvm":
            self.shards.adopt_fds([s for s in self.shards.all if s.alive])
        # Whatever the predecessor was in the middle of, everybody is stopped first.
        self.shards.pause_all()
        if self.spec.verify is not None:
            self.verifier = make_verifier(self.spec.accel, self.spec.verify, self.log, self.shards.all,
                                          self.block, self.parts.usable, saved.verification or Verification())
            self._next_round = time.monotonic()
        for shard in self.shards.all:
            # A message that the predecessor took with it: the control block still says so.
            if shard.control.state == VcpuState.EXITED and shard.exited is None:
                shard.exited = Exited(shard.index, ExitReason(shard.control.exit_reason),
                                      shard.control.exit_code)
            if self.parts.ring_entries:
                self.reaper.full.add(shard.index)
        self.reaper.drain()
        self.log.publish()
        for client, owner in saved.owners.items():
            self._own(client, owner)
        if saved.incoming:
            try:
                self._pages_missing(saved.incoming)
            except ProcessLookupError:
                self._incoming_lost()
        self._state = "running" if saved.started else "ready"
        self._user_paused = saved.user_paused
        if self._user_paused and saved.pause_owner:
            try:
                self._pause_owner = (saved.pause_owner, os.pidfd_open(saved.pause_owner))
            except ProcessLookupError:
                self._user_paused = False
        if saved.started and not self._user_paused:
            self.shards.resume_all()
        self._save()

    def _save(self) -> None:
        """Write state.json aside and rename it over."""
        saved = Saved(slots=[self._slot_spec(i) for i in self.log.slots], clients=self.log.clients,
                      elapsed=self._elapsed(), started=self._started > 0, user_paused=self._user_paused,
                      verification=self.verifier.result if self.verifier else None,
                      exits={s.index: s.exited for s in self.shards.all if s.exited is not None},
                      restarts=self._restarts, owners={c: pid for c, (pid, _) in self._owners.items()},
                      pause_owner=self._pause_owner[0], incoming=self._incoming[0],
                      tracking=self.parts.tracking, asked_tracking=self._asked_tracking)
        aside = self.directory / "state.json.new"
        aside.write_bytes(msgspec.json.encode(saved))
        aside.rename(self.directory / "state.json")

    def _load(self) -> Saved | None:
        try:
            return msgspec.json.decode((self.directory / "state.json").read_bytes(), type=Saved)
        except FileNotFoundError:
            return None  # died before the machine was ready: the keeper does not ask for that

    def _slot_spec(self, slot_id: int) -> RamSlot:
        slot = self.log.slots[slot_id]
        return RamSlot(slot_id, slot.spec.gpa, slot.spec.size, slot.logged, slot.spec.born)

    # --- the loop -----------------------------------------------------------------------------

    def run(self) -> int:
        """Serve the machine until it is over and released; its exit code."""
        while not self._done:
            now = time.monotonic()
            if self._running():
                self._run_due(now)
            # Not by the control block: its state says so before the notification with the reason comes.
            if self._state == "running" and not any(s.alive and s.exited is None for s in self.shards.all):
                self._finish()
                continue
            self.reaper.wait()
            self._wait(time.monotonic())
        return int(self._report()["exit_code"])

    def _verifying(self) -> bool:
        """The verifier reads all memory; not before all of it is there. And it looks into the log."""
        return self.verifier is not None and not self._incoming[0] and self.parts.tracking != "none"

    def _running(self) -> bool:
        return self._state == "running" and not self._user_paused

    def _run_due(self, now: float) -> None:
        """What is due in time, or asked for by a full ring."""
        if self.spec.timeout is not None and now - self._started >= self.spec.timeout:
            self._stop(ExitReason.TIMEOUT)
        if self.reaper.full:
            self.reaper.wake("ring-full")
        elif self.parts.ring_entries and self.reaper.schedule.left(now) == 0:
            self.reaper.wake()
        if self._verifying() and now >= self._next_round:
            self._verify_round()
        if self._asked_tracking == "auto":
            try:
                self._choose_tracking()
            except (VmmError, SegmentError) as exc:     # it stays as it is, and for good
                self._asked_tracking = self.parts.tracking
                self._save()
                print(f"vmm: machine '{self.spec.name}': tracking is {self.parts.tracking} from now on: {exc}",
                      file=sys.stderr)

    def _wait(self, now: float) -> None:
        poller = zmq.Poller()
        poller.register(self.shards.notify, zmq.POLLIN)
        poller.register(self._control, zmq.POLLIN)
        poller.register(self._signal_fd, zmq.POLLIN)
        by_fd = {s.pidfd: s for s in self.shards.all if s.alive}
        owners = {pidfd: client for client, (_, pidfd) in self._owners.items()}
        single = [fd for fd in (self._pause_owner[1], self._incoming[1], self._record_owner) if fd >= 0]
        for fd in (*by_fd, *owners, *single):
            poller.register(fd, zmq.POLLIN)
        for ready, _ in poller.poll(self._poll_ms(now)):
            if ready is self.shards.notify:
                self.shards.drain_notifications()
            elif ready is self._control:
                self._serve_control()
            elif ready == self._signal_fd:
                os.read(self._signal_fd, 4096)
                self._linger = False
                self._stop(ExitReason.STOPPED)
                self._done = self._done or self._state in ("ready", "ended")
            elif ready in by_fd:
                self.shards.bury(by_fd[ready])
            elif ready in owners:
                self._unregister(owners[ready])
            elif ready == self._incoming[1]:
                self._incoming_lost()
            elif ready == self._record_owner:
                self._record_stop()
            elif ready == self._pause_owner[1] and self._state == "running":
                self._resume()

    def _poll_ms(self, now: float) -> int | None:
        """Time until something is due; None while nothing can be."""
        if not self._running():
            return None
        waits = []
        if self.parts.ring_entries:
            waits.append(0.0 if self.reaper.full else self.reaper.schedule.left(now))
        if self._verifying():
            waits.append(self._next_round - now)
        idle = self._auto.left(now)
        if idle is not None:
            waits.append(idle)
        if self.spec.timeout is not None and not self._stop_asked:
            waits.append(self._started + self.spec.timeout - now)
        return max(0, -int(-min(waits) * 1000 // 1)) if waits else None

    def catch_signals(self) -> None:
        """SIGTERM wakes the loop, which stops the machine in order. Through the wakeup fd: a handler in
        Python would not run while the poll is being entered."""
        signal.set_wakeup_fd(self._signal_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda signum, frame: None)

    # --- events from workers ---------------------------------------------------------------------

    def _on_notification(self, message: AnyNotification) -> None:
        if isinstance(message, RingFull):
            if self.tracer.full:
                self.tracer.full(message.vcpu)
            if self.parts.ring_entries:     # else it comes from before the last switch
                self.reaper.full.add(message.vcpu)
        elif isinstance(message, Console):
            self._tell({"event": "console", "vcpu": message.vcpu,
                        "data": message.data.decode("utf-8", "replace")})
        elif isinstance(message, Exited):
            self.shards.all[message.vcpu].exited = message
            self._tell({"event": "exit", "vcpu": message.vcpu, "reason": _reason(message.reason),
                        "code": message.code, "detail": message.detail})

    def _on_death(self, shard: Shard) -> None:
        """A worker's process ended. Its ring is still mapped here and will be harvested; a plain
        bitmap died with it."""
        if self._done or self._state == "ended":
            return
        self.reaper.full.discard(shard.index)
        if not self.parts.ring_entries:
            self.log.mark_logged_slots()
        self._tell({"event": "exit", "vcpu": shard.index, "reason": _reason(ExitReason.WORKER_DIED),
                    "code": 0, "detail": f"its worker process (pid {shard.control.pid}) ended"})

    def _on_rebuild(self, vcpu: int, owed: int, reset: int, pages: int) -> None:
        if self.verifier is not None:
            self.verifier.blind_to_surplus = True
        self._tell({"event": "ring-rebuilt", "vcpu": vcpu, "harvested": owed, "reset": reset,
                    "pages_marked": pages})

    def _tell(self, event: dict[str, Any]) -> None:
        """To every follower; one that lags too far behind loses events, never holds the machine."""
        frame = msgspec.json.encode(event)
        for follower in list(self._followers):
            try:
                self._control.send_multipart([follower, frame], zmq.DONTWAIT)
            except zmq.ZMQError as exc:
                if exc.errno == zmq.EHOSTUNREACH:
                    self._followers.discard(follower)

    # --- verification, end ------------------------------------------------------------------------

    def _verify_round(self) -> None:
        assert self.verifier is not None
        assert self.spec.verify is not None
        with self.shards.all_paused():
            self._drain_and_verify()
            self._round += 1
            boot.set_round(memoryview(self.parts.system.buf), self._round)
        self._next_round = time.monotonic() + self.spec.verify.interval

    def _drain_and_verify(self) -> None:
        assert self.verifier is not None
        self.reaper.drain()
        self.verifier.round()
        self._save()

    def _stop(self, reason: ExitReason) -> None:
        """Ask every vCPU to end. They do so at once, paused or not."""
        if self._stop_asked or self._state != "running":
            return
        self._stop_asked = True
        for shard in self.shards.all:
            if shard.running:
                shard.control.stop_reason = reason
                shard.control.request |= VcpuRequest.STOP
                shard.kick()
                if self._incoming[0]:       # it may wait for a page that never comes, and its memory is not whole
                    shard.signal(signal.SIGKILL)

    def _finish(self) -> None:
        """Every vCPU has ended: what their rings still hold is reaped and checked."""
        self.shards.drain_notifications()
        if self._verifying():
            self._drain_and_verify()
        else:
            self.reaper.drain()
        self._elapsed_at_end = self._elapsed()
        self._state = "ended"
        self._final = self._report()
        self._tell({"event": "ended", "exit_code": self._final["exit_code"]})
        self._done = not self._linger

    # --- report ---------------------------------------------------------------------------------------

    _elapsed_at_end: float | None = None

    def _elapsed(self) -> float:
        if self._elapsed_at_end is not None:
            return self._elapsed_at_end
        return time.monotonic() - self._started if self._started else 0.0

    def _report(self) -> dict[str, Any]:
        spec, block = self.spec, self.block
        state = "paused" if self._user_paused and self._state == "running" else self._state
        verification: dict[str, Any] | None = None
        if self.verifier is not None:
            verification = {**msgspec.to_builtins(self.verifier.result), "ok": self.verifier.result.ok}
        return {
            "name": spec.name, "state": state, "elapsed_s": round(self._elapsed(), 6),
            "exit_code": int(self._exit_code()), "accelerator": spec.accel,
            "tracking": self.parts.tracking, "tracking_asked": self._asked_tracking,
            "tracking_switches": self._switches, "ring_entries": self.parts.ring_entries,
            "can_limit": spec.ring_entries > 0 and self._asked_tracking in ("ring", "auto"),
            "coordinator": {"pid": os.getpid(), "restarts": self._restarts},
            "vcpus": [self._vcpu_report(s) for s in self.shards.all],
            "reaper": {"mode": spec.reaper.mode, "state": ReaperState(block.reaper_state).name,
                       "iterations": block.reaper_iteration, "pages": block.reaped_pages,
                       "microseconds": block.reap_ns // 1000, "flushes": block.flushes},
            "slots": [{"id": i, "gpa": s.spec.gpa, "size": s.spec.size, "pages": s.pages,
                       "dirty": self.log.dirty_pages(i), "logged": s.logged, "born": s.spec.born}
                      for i, s in self.log.slots.items()],
            "clients": self.log.clients, "incoming": bool(self._incoming[0]),
            "verification": verification,
        }

    def _vcpu_report(self, shard: Shard) -> dict[str, Any]:
        block, exited = shard.control, shard.exited
        return {
            "index": shard.index, "pid": block.pid, "accelerator": self.spec.accel,
            "state": VcpuState(block.state).name.lower().replace("_", "-"),
            "exit_reason": _reason(ExitReason(block.exit_reason)), "exit_code": block.exit_code,
            "detail": exited.detail if exited else "", "registers": exited.registers if exited else None,
            "dirty_pages": block.dirty_pages, "ring_full_exits": block.ring_full_exits,
            "resets": block.resets, "reset_s": block.reset_ns / 1e9, "ring_rebuilds": block.ring_rebuilds,
            "bad_entries": block.bad_entries, "guest_entries": block.guest_entries,
            "guest_s": block.guest_ns / 1e9, "stalled_s": block.stalled_ns / 1e9,
            "dirty_limit_pages_per_s": block.dirty_quota, "throttled_s": block.throttled_ns / 1e9,
        }

    def _exit_code(self) -> ExitCode:
        """The worst of what happened, in the order of what a user must know first."""
        reasons = {ExitReason(s.control.exit_reason) for s in self.shards.all}
        if self.verifier is not None and not self.verifier.result.ok:
            return ExitCode.VERIFY_FAILED
        if ExitReason.WORKER_DIED in reasons:
            return ExitCode.WORKER_DIED
        if reasons & _CRASHES:
            return ExitCode.GUEST_CRASHED
        if ExitReason.TIMEOUT in reasons:
            return ExitCode.TIMEOUT
        if ExitReason.STOPPED in reasons:
            return ExitCode.STOPPED
        if any(s.control.exit_code for s in self.shards.all):
            return ExitCode.GUEST_FAILED
        return ExitCode.OK

    # --- control socket ---------------------------------------------------------------------------------

    def _serve_control(self) -> None:
        while True:
            try:
                client, frame = self._control.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            except ValueError:
                continue  # not a message of two frames: not from a client of ours
            number = 0
            try:
                verb = control.decode_verb(frame)
                number = verb.id
                answer: dict[str, Any] = {"id": number, "result": self._serve(verb, client)}
            except VmmError as exc:
                answer = {"id": getattr(exc, "request_id", number), "error": str(exc),
                          "code": int(exc.exit_code)}
            except SegmentError as exc:
                answer = {"id": number, "error": str(exc), "code": int(ExitCode.BAD_INPUT)}
            try:
                self._control.send_multipart([client, msgspec.json.encode(answer)], zmq.DONTWAIT)
            except zmq.ZMQError:
                pass  # the client has gone

    def _serve(self, verb: control.Verb, client: bytes) -> dict[str, Any]:
        match verb:
            case control.Follow():
                self._followers.add(client)
            case control.Start():
                self._start()
            case control.Status():
                return self._final if self._final is not None else self._report()
            case control.State():
                return self._machine_state()
            case control.SetState(vcpus=vcpus):
                self._set_states(vcpus)
            case control.Incoming(socket=socket, owner=owner):
                return {"addresses": self._expect_pages(socket, owner)}
            case control.Arrived():
                self._arrived()
            case control.Pause(owner=owner):
                self._pause(owner)
            case control.Resume():
                self._resume()
            case control.Stop():
                self._stop(ExitReason.STOPPED)
                self._done = self._done or self._state in ("ready", "ended")
            case control.Release():
                self._done = self._done or self._state in ("ready", "ended")
            case control.Register(client=name, owner=owner, like=like):
                self._register(name, owner, like)
            case control.Unregister(client=name):
                self._unregister(name)
            case control.DirtyLimit(pages_per_s=pages, vcpu=vcpu):
                self._limit(pages, vcpu)
            case control.SetTracking(tracking=tracking):
                return self._ask_tracking(tracking)
            case control.Sync(client=name, again=again):
                return self._sync(name, again)
            case control.Mark(slot=slot, first=first, count=count):
                self.log.mark(slot, first, count)
            case control.LogStart(slot=slot):
                self._set_logging(slot, True)
            case control.LogStop(slot=slot):
                self._set_logging(slot, False)
            case control.RecordStart(owner=owner):
                self._record_start(owner)
            case control.RecordStep():
                return {"going_on": self._record_step()}
            case control.RecordStop():
                self._recording()
                self._flush()
                self._record_stop()
            case control.MemoryAdd(slot=slot, gpa=gpa, size=size, log=log):
                self._add_slot(RamSlot(slot, gpa, size, log, born=time.time_ns()))
            case control.MemoryRemove(slot=slot):
                self._remove_slot(slot)
        return {}

    def _alive_running(self) -> None:
        if self._state == "ended":
            raise VmmError(f"machine '{self.spec.name}' has ended", ExitCode.NO_MACHINE)

    def _all_here(self) -> None:
        if self._incoming[0]:
            raise VmmError(f"machine '{self.spec.name}': its memory is still on its way here (post-copy)")

    def _has_memory(self) -> None:
        if self.spec.accel == "replay":
            raise VmmError(no_memory(self.spec.name))

    def _pause(self, owner: int = 0) -> None:
        self._alive_running()
        if self._user_paused:
            if not owner:
                self._disown_pause()    # somebody wants it paused for good
                self._save()
            return
        self._user_paused = True
        self.shards.pause_all()
        if owner:
            try:
                self._pause_owner = (owner, os.pidfd_open(owner))
            except ProcessLookupError:
                self._resume()
        self._save()

    def _disown_pause(self) -> None:
        _, pidfd = self._pause_owner
        self._pause_owner = (0, -1)
        if pidfd >= 0:
            os.close(pidfd)

    def _resume(self) -> None:
        self._alive_running()
        self._disown_pause()
        if self._user_paused:
            self._user_paused = False
            self.shards.resume_all()
            self._save()

    def _machine_state(self) -> dict[str, Any]:
        """What a snapshot keeps beside the memory."""
        self._has_memory()
        if self._state != "running" or not self._user_paused:
            raise VmmError(f"machine '{self.spec.name}' is not paused")
        self._all_here()
        dead = [str(s.index) for s in self.shards.all if not s.alive]
        if dead:
            raise VmmError(f"vCPU {', '.join(dead)}: its worker is gone, and its state with it",
                           ExitCode.WORKER_DIED)
        replies = self.shards.request(self.shards.all, lambda seq, s: GetState(seq))
        spec = msgspec.structs.replace(self.spec, slots=[self._slot_spec(i) for i in self.log.slots],
                                       tracking=self._asked_tracking)
        vcpus = []
        for shard in self.shards.all:
            state = dict(replies[shard.index].data or {})
            if shard.exited is not None:
                state["exit"] = {"reason": int(shard.exited.reason), "code": shard.exited.code,
                                 "detail": shard.exited.detail}
            vcpus.append(state)
        return {"spec": msgspec.to_builtins(spec), "vcpus": vcpus}

    def _set_states(self, vcpus: list[dict[str, Any]]) -> None:
        if self._state != "ready":
            raise VmmError(f"machine '{self.spec.name}' has started already")
        if len(vcpus) != len(self.shards.all):
            raise VmmError(f"states of {len(vcpus)} vCPUs for a machine of {len(self.shards.all)}")
        try:
            states = [{**v, "xsave": base64.b64decode(v["xsave"], validate=True)} for v in vcpus]
        except (KeyError, TypeError, ValueError) as exc:
            raise VmmError(f"not the state of a vCPU: {exc}") from None
        self.shards.request(self.shards.all, lambda seq, s: SetState(seq, states[s.index]))
        if self._verifying():
            self._verify_from_here()

    def _verify_from_here(self) -> None:
        """The memory was replaced: this is what it begins with."""
        assert self.verifier is not None
        for slot_id in self.log.slots:
            self.verifier.forget(slot_id)
            self.verifier.adopt(slot_id)

    def _expect_pages(self, socket: str, owner: int) -> list[dict[str, Any]]:
        if self._state != "ready":
            raise VmmError(f"machine '{self.spec.name}' has started already")
        try:
            self._pages_missing(owner)
        except ProcessLookupError:
            raise VmmError(f"process {owner}, which is to fill in the memory, is not there") from None
        if self.parts.tracking == "uffd":
            self._switch_tracking("bitmap")     # a mapping has one userfaultfd; back when all has arrived
        replies = self.shards.request(self.shards.all, lambda seq, s: Userfault(seq, socket))
        self._save()
        return [replies[s.index].data or {} for s in self.shards.all]

    def _pages_missing(self, owner: int) -> None:
        """Raises ProcessLookupError."""
        self._incoming = (owner, os.pidfd_open(owner))
        self.shards.pages_missing = True
        self.reaper.only_full = self.spec.accel != "kvm"    # KVM_RUN is interrupted while it waits for a page

    def _arrived(self) -> None:
        _, pidfd = self._incoming
        if pidfd < 0:
            return
        self._incoming = (0, -1)
        os.close(pidfd)
        self.shards.pages_missing = self.reaper.only_full = False
        self.shards.request(self._live(), lambda seq, s: Userfault(seq, ""))
        if self.verifier is not None and self._state == "running":
            with self.shards.all_paused():
                self.reaper.drain()
                self.log.take(VERIFY_CLIENT)
                self.verifier.blind_to_surplus = True
                self._verify_from_here()
        if self._asked_tracking == "uffd":
            self._switch_tracking("uffd")
        self._save()

    def _incoming_lost(self) -> None:
        """Who fills in the memory has gone: the guest can never go on, and must not with zeros instead."""
        self._tell({"event": "incoming-lost", "detail": "the process that received this machine's memory ended "
                                                        "before all of it was here"})
        if self._incoming[1] >= 0:
            os.close(self._incoming[1])
        self._incoming = (self._incoming[0], -1)
        for shard in self.shards.all:
            shard.signal(signal.SIGKILL)

    # --- tracking -------------------------------------------------------------------------------------

    def _ask_tracking(self, asked: str) -> dict[str, Any]:
        self._alive_running()
        self._all_here()
        check_tracking(asked, self.spec.accel, self.spec.ring_entries)
        if asked not in ("ring", "auto") and self._limited():
            raise VmmError(f"machine '{self.spec.name}' has a dirty limit, which needs dirty rings: cancel it first"
                           f" (vmm dirty-limit cancel {self.spec.name})")
        before = self.parts.tracking
        mode = asked
        if asked == "auto":
            self._auto = AutoTracking()
            mode = self._auto.first(logged=bool(self.log.clients), limited=self._limited())
        seconds = self._switch_tracking(mode)
        self._asked_tracking = asked
        self._save()
        return {"before": before, "tracking": self.parts.tracking, "asked": asked, "seconds": seconds}

    def _switch_tracking(self, mode: str) -> float:
        """Seconds that it took, the vCPUs standing still; 0 when it is so already."""
        before = self.parts.tracking
        if mode == before:
            return 0.0
        began = time.monotonic()
        with self.shards.all_paused():
            retrack.switch(self.parts, self.shards, self.reaper, mode, self._save)
            self._switches += 1
            if self.verifier is not None:
                self.verifier.switched(blind=before == "none")
        now = time.monotonic()
        if self.parts.ring_entries:
            self.reaper.schedule.plan(now, {s.index: s.soft_limit for s in self.shards.all})
        self._tell({"event": "tracking", "before": before, "tracking": mode, "seconds": round(now - began, 6)})
        return now - began

    def _limited(self) -> bool:
        return any(s.control.dirty_quota for s in self.shards.all)

    def _choose_tracking(self, *, logged: bool = False, limited: bool = False) -> None:
        """Tracking auto: as it is best now, or with a client or a dirty limit that is about to come."""
        if self._asked_tracking == "auto" and not self._incoming[0]:
            self._switch_tracking(self._auto.choose(time.monotonic(), self.parts.tracking,
                                                    logged=logged or bool(self.log.clients),
                                                    limited=limited or self._limited()))

    def _logged(self) -> None:
        if self.parts.tracking == "none":
            raise not_logged(self.spec.name)

    def _flush(self) -> None:
        if self._state == "running":
            self.reaper.flush()

    def _sync(self, client: str, again: bool) -> dict[str, Any]:
        if client not in self.log.clients:
            raise VmmError(f"there is no client '{client}' of the dirty log: register it first")
        if client == VERIFY_CLIENT:
            raise VmmError(f"client '{client}' is the verifier's own")
        self._logged()
        self._flush()
        if again:
            self.log.give_back(client)
        taken = self.log.take(client)
        return {"slots": {str(i): {"dirty": n, "pages": self.log.front(client, i).front.pages}
                          for i, n in taken.items()}}

    def _register(self, client: str, owner: int, like: str) -> None:
        if client not in self.log.clients:
            self._choose_tracking(logged=True)
            self._logged()
            self._flush()
            if like and like not in self.log.clients:
                raise VmmError(f"there is no client '{like}' of the dirty log")
            self.log.register(client)
            if like:
                self.log.copy_client(client, like)
            self._own(client, owner)
            self._save()

    def _own(self, client: str, owner: int) -> None:
        """Have the client go when the process does that registered it."""
        if owner:
            try:
                self._owners[client] = (owner, os.pidfd_open(owner))
            except ProcessLookupError:
                self.log.unregister(client)

    def _unregister(self, client: str) -> None:
        self.log.unregister(client)
        _, pidfd = self._owners.pop(client, (0, -1))
        if pidfd >= 0:
            os.close(pidfd)
        self._save()

    def _limit(self, pages_per_s: int, vcpu: int) -> None:
        self._alive_running()
        if pages_per_s and self.spec.ring_entries:  # auto: to a ring
            self._choose_tracking(limited=True)
        if pages_per_s and not self.parts.ring_entries:
            raise VmmError("a dirty limit needs dirty rings: this machine has "
                           f"tracking {self.parts.tracking}")
        if not -1 <= vcpu < len(self.shards.all):
            raise VmmError(f"there is no vCPU {vcpu} (there are 0 to {len(self.shards.all) - 1})")
        for shard in self.shards.all:
            if vcpu in (-1, shard.index):
                shard.control.dirty_quota = pages_per_s
                if shard.running:
                    shard.kick()    # out of the guest, or out of its wait: the new quota counts at once

    def _record_start(self, owner: int) -> None:
        self._alive_running()
        if not self.spec.ring_entries:
            raise VmmError(f"machine '{self.spec.name}' has plain dirty bitmaps, which do not say which "
                           "page came after which: a trace needs rings (dirty_ring_size)")
        if self.reaper.recorder is not None:
            raise VmmError(f"machine '{self.spec.name}' is being recorded already")
        self._flush()       # what was dirtied before does not belong to it
        self.reaper.recorder = Recorder(self.spec.name, self.log.tables[0])
        try:
            self._record_owner = os.pidfd_open(owner)
        except ProcessLookupError:
            self._record_stop()

    def _recording(self) -> None:
        if self.reaper.recorder is None:
            raise VmmError(f"machine '{self.spec.name}' is not being recorded (any more)")

    def _record_step(self) -> bool:
        self._recording()
        if self._running():
            self.reaper.reap()
        return self._state != "ended"

    def _record_stop(self) -> None:
        if self._record_owner >= 0:
            os.close(self._record_owner)
            self._record_owner = -1
        if self.reaper.recorder is not None:
            self.reaper.recorder.close()
            self.reaper.recorder = None

    def _live(self) -> list[Shard]:
        return [s for s in self.shards.all if s.alive]

    def _slot(self, slot_id: int) -> Any:
        if slot_id not in self.log.slots:
            there = ", ".join(str(i) for i in self.log.slots)
            raise VmmError(f"there is no memory slot {slot_id} (there are: {there})")
        return self.log.slots[slot_id]

    def _set_logging(self, slot_id: int, on: bool) -> None:
        """Switch dirty logging of one slot. Switching it off reaps first: what was written while it
        was on is in the log."""
        self._alive_running()
        self._all_here()
        slot = self._slot(slot_id)
        if slot.logged == on:
            return
        with self.shards.all_paused():
            self.reaper.drain()
            slot.logged = on
            self.shards.request(self._live(), lambda seq, s: SetMemslot(seq, slot.worker_spec(s.index)))
            if on and self.verifier is not None:
                self.verifier.forget(slot_id)
                self.verifier.adopt(slot_id)
            self._save()

    def _add_slot(self, spec: RamSlot) -> None:
        self._alive_running()
        self._all_here()
        self._check_new_slot(spec)
        slot = self.parts.new_slot(spec, create=True)
        try:
            with self.shards.all_paused():
                self.shards.request(self._live(), lambda seq, s: SetMemslot(seq, slot.worker_spec(s.index)))
                self.log.add_slot(slot)
                if self.verifier is not None:
                    self.verifier.adopt(spec.id)
                self._save()
        except BaseException:
            if spec.id not in self.log.slots:
                slot.close()
            raise

    def _check_new_slot(self, spec: RamSlot) -> None:
        where = f"slot {spec.id}"
        if not 0 <= spec.id < MAX_SLOTS:
            raise VmmError(f"{where}: slot ids are 0 to {MAX_SLOTS - 1}")
        if spec.id in self.log.slots:
            raise VmmError(f"{where}: there is one already")
        if spec.size <= 0 or spec.size % 4096 or spec.gpa % 4096 or spec.gpa < 0:
            raise VmmError(f"{where}: gpa {spec.gpa:#x} and size {spec.size:#x} must be multiples of 4096")
        taken = [(f"slot {i}", s.spec.gpa, s.spec.size) for i, s in self.log.slots.items()]
        if self.spec.accel != "replay":
            top = boot.mapped_top(max(s.gpa + s.size for s in self.spec.slots))
            if spec.gpa + spec.size > top:
                raise VmmError(f"{where}: ends at {spec.gpa + spec.size:#x}, the machine maps up to {top:#x}")
            taken.append(("the system area", boot.SYSTEM_GPA, max(self.parts.system.size, 0x100_0000)))
        for what, gpa, size in taken:
            if spec.gpa < gpa + size and gpa < spec.gpa + spec.size:
                raise VmmError(f"{where}: [{spec.gpa:#x}, {spec.gpa + spec.size:#x}) overlaps {what} "
                               f"[{gpa:#x}, {gpa + size:#x})")

    def _remove_slot(self, slot_id: int) -> None:
        """Invariant 6: stop the vCPUs, reap, sync the bitmap, remove in every shard, resume. Nothing
        can be dirtied between the last reap and the removal."""
        self._alive_running()
        self._all_here()
        self._slot(slot_id)
        if len(self.log.slots) == 1:
            raise VmmError(f"slot {slot_id} is the machine's only memory")
        with self.shards.all_paused():
            if self.verifier is not None:
                self._drain_and_verify()
                self.verifier.forget(slot_id)
            self.reaper.drain()
            slot = self.log.remove_slot(slot_id)
            self.shards.request(self._live(), lambda seq, s: RemoveMemslot(seq, slot_id))
            slot.close()
            self._save()

    # --- tear-down ---------------------------------------------------------------------------------

    def close(self) -> None:
        self._done = True
        self._record_stop()
        self.shards.shut_down()
        self.reaper.close()
        self.shards.close()
        if self.verifier is not None:
            self.verifier.close()
        for _, pidfd in (*self._owners.values(), self._incoming):
            if pidfd >= 0:
                os.close(pidfd)
        self.parts.close()
        self._control.close()
        self._context.term()
        signal.set_wakeup_fd(-1)
        os.close(self._signal_fd)
        os.close(self._signal_write)
        self.tracer.close()


def _reason(reason: ExitReason) -> str:
    return reason.name.lower().replace("_", "-")


def _answer(status_fd: int, **fields: Any) -> None:
    """One JSON line to whoever launches the machine (it may have gone)."""
    try:
        os.write(status_fd, msgspec.json.encode(fields) + b"\n")
        os.close(status_fd)
    except OSError:
        pass


def main(argv: list[str]) -> int:
    """``python -m vmm.coordinator STATUS_FD KEEPER_FD KEEPER_PID ZYGOTE_FD``; the specification is on standard
    input. ZYGOTE_FD is -1 for one that takes over from another: the workers are there."""
    status_fd, keeper_fd, keeper_pid, zygote_fd = (int(a) for a in argv[:4])
    process.set_name("vmm-coordinator")
    process.set_time_slice(process.SERVICE_SLICE)
    process.die_with_parent(signal.SIGTERM, keeper_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = decode_spec(sys.stdin.buffer.read())
    coordinator: Coordinator | None = None

    def early_stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, early_stop)
    try:
        coordinator = Coordinator(spec, machine_dir(spec.name), keeper_fd,
                                  Zygote(zygote_fd) if zygote_fd >= 0 else None)
    except (VmmError, SegmentError) as exc:
        _answer(status_fd, error=str(exc), code=int(getattr(exc, "exit_code", ExitCode.BAD_INPUT)))
        return int(getattr(exc, "exit_code", ExitCode.BAD_INPUT))
    coordinator.catch_signals()
    try:
        _answer(status_fd, ready=True, pid=os.getpid())
        return coordinator.run()
    except VmmError as exc:
        print(f"vmm: error: machine '{spec.name}': {exc}", file=sys.stderr)
        return int(exc.exit_code)
    finally:
        coordinator.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
