"""The run loop of one vCPU process.

Three threads. The **vCPU thread** is the process's main thread: it enters the guest, because the
kick signal (SIGUSR1) must interrupt exactly that thread. The **reset thread** resets the ring *while the
guest runs*, so that a reap in time costs the guest nothing but a TLB flush; it sleeps on a futex in the control
block. The **service thread** answers the coordinator's requests, which are rare.

No lost kick. The coordinator sets the request, then the immediate-exit flag, then signals. This
loop clears the flag, then looks at the request. Whatever the order of the two, either the look sees
the request or the entry sees the flag. A parked vCPU (paused, ring full, waiting) sleeps on a
pipe that the service thread and, through ``signal.set_wakeup_fd``, the signal itself write to (a
handler in Python would be too late: it runs between bytecodes, not while select is being entered).
The coordinator repeats an unacknowledged kick, which covers the one wait that has no such fd, the
futex of the wait hypercall.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from ipc import sockets, userfault
from ipc.claims import Belongings, ClaimError
from ipc.layout import KICK_SIGNAL, PROTOCOL_VERSION, Tracking, VcpuRequest, VcpuState, control_error, vcpu_control
from ipc.linux import process
from ipc.messages import (
    DETAIL_MAX,
    ClearLog,
    Console,
    Done,
    Exited,
    ExitReason,
    Failed,
    GetLog,
    GetState,
    Hello,
    KickAck,
    MessageError,
    Notification,
    RebuildRing,
    RemoveMemslot,
    RingFull,
    SendFd,
    SetMemslot,
    SetMemslots,
    SetState,
    SetTracking,
    Shutdown,
    SlotSpec,
    Userfault,
    WorkerSpec,
    decode_request,
    encode,
)
from ipc.ring import ResetRequests
from ipc.shm import Segment, SegmentError

from . import hypercalls
from .accel.base import Accelerator, AccelError, Exit, ExitKind
from .accel.registry import load
from .memory import GuestMemory
from .ports import PortBus, PortEventKind
from .slots import Slots
from .state import ExitState, StateError, check_state, plain_state
from .throttle import SliceTimer, TokenBucket

if TYPE_CHECKING:
    from .tracking.uffd import SlotWrites

__all__ = ["Worker", "main"]

_FD_TIMEOUT = 10.0          # seconds to hand the vCPU fd over
_THROTTLE_STEP = 0.1        # seconds after which a long wait shows in the statistics
_JOB_TIMEOUT = 20.0         # seconds for the vCPU thread, which is parked, to begin a job
_ORPHAN_GRACE = 3.0         # seconds an ownerless worker waits for a last Shutdown


class Worker:
    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._notify = sockets.connect(self._context, zmq.PUSH, spec.notify_endpoint)
        self._wake, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._shutdown = False
        self._ring_full = False
        self._control_segment = Segment.open(spec.control_segment)
        self.control = vcpu_control(self._control_segment.address, spec.index)
        self._resets = ResetRequests(self.control)
        self.memory = GuestMemory()
        self.ports = PortBus(lambda data: self._say(Console(spec.index, data)))
        self.accel: Accelerator | None = None
        self._bucket = TokenBucket()
        self._timer: SliceTimer | None = None
        self._restored_exit: ExitState | None = None     # of a vCPU that had ended when it was saved
        self._ended: Exited | None = None
        self._ran = 0.0     # seconds in the guest since the bucket was last told
        self._userfault = userfault.Userfault(-1)   # open during post-copy
        self._writes: SlotWrites | None = None      # with tracking ``uffd``
        self._job: Callable[[], None] | None = None     # that the vCPU thread is to do for the service thread
        self._job_lock = threading.Lock()
        self._job_done = threading.Event()
        self._job_error: Exception | None = None

    # --- set-up ------------------------------------------------------------------------------

    def set_up(self) -> bool:
        """Build the vCPU and say Hello; False (and the reason said) when it cannot be had."""
        spec = self.spec
        try:
            if spec.version != PROTOCOL_VERSION:
                raise AccelError(f"was told to speak protocol {spec.version}: it speaks {PROTOCOL_VERSION}")
            wrong = control_error(self._control_segment.address, self._control_segment.size)
            if wrong:
                raise AccelError(wrong)
            self.control.pid = os.getpid()
            for slot in [*spec.slots, spec.system_slot]:
                self.memory.add(slot)
            if spec.mode is Tracking.UFFD:
                self._writes = _slot_writes(self.memory, spec.slots)
            self.accel = load(spec.accel)(spec, self.memory, self.control, self.ports)
            if self.accel.vcpu_fd >= 0:
                sockets.send_fd(spec.fd_socket, spec.index, self.accel.vcpu_fd, _FD_TIMEOUT)
        except (AccelError, SegmentError, userfault.UserfaultError, OSError) as exc:
            self._say(Hello(spec.index, os.getpid(), error=str(exc)))
            return False
        self.control.tracking = spec.mode
        self.control.state = VcpuState.READY
        self._say(Hello(spec.index, os.getpid(), kvm_run_size=self.accel.kvm_run_size,
                        ring_entries=spec.ring_entries))
        return True

    def _say(self, message: Notification) -> None:
        self._notify.send(encode(message))

    # --- vCPU thread ---------------------------------------------------------------------------

    def catch_kicks(self) -> None:
        """Have the kick signal interrupt this thread (the main one) and fill the wake pipe."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(KICK_SIGNAL, _on_kick)

    def _wake_up(self) -> None:
        """From the service thread: let the vCPU thread look around."""
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass  # a full pipe wakes as well

    def run(self) -> None:
        """Run the guest to its end, then stay at the coordinator's service until Shutdown."""
        try:
            self._run_guest()
        except Exception as exc:    # a fault of this program: the vCPU ends, its log and its state are still served
            traceback.print_exc()
            self._end(Exit(ExitKind.END, reason=ExitReason.INTERNAL_ERROR,
                           detail=f"its worker failed: {type(exc).__name__}: {exc}"))
        while not self._shutdown:
            self.sleep()
            self._attend()
            self._say_end()

    def _run_guest(self) -> None:
        accel = self.accel
        assert accel is not None
        control = self.control
        while not self._shutdown:
            accel.clear_immediate_exit()
            if self._attend():
                if control.request & VcpuRequest.STOP:
                    self._end(Exit(ExitKind.END, reason=ExitReason(control.stop_reason),
                                   registers=accel.registers()))
                    break
                self._stay_paused()
                continue
            if self._restored_exit is not None:
                was = self._restored_exit
                self._end(Exit(ExitKind.END, reason=was.reason, detail=was.detail), was.code)
                break
            quota = control.dirty_quota
            if quota and self._in_debt(quota):
                continue
            control.state = VcpuState.RUNNING
            control.guest_entries += 1
            entered = time.perf_counter_ns()
            leave = self._run_slice() if quota else accel.run()
            spent = time.perf_counter_ns() - entered
            control.guest_ns += spent
            self._ran += spent / 1e9
            if leave.kind is ExitKind.RING_FULL:
                self._wait_for_reset()
            elif leave.kind is ExitKind.PORT:
                if not self._port_event(leave):
                    break
            elif leave.kind is ExitKind.END:
                self._end(leave)
                break

    # --- dirty limit ---------------------------------------------------------------------------

    def _in_debt(self, quota: int) -> bool:
        """Count what the last slice dirtied, and stay out until the quota has paid for it, or somebody wants
        something; True when that took time."""
        assert self.accel is not None
        control = self.control
        began = time.monotonic()
        debt = self._bucket.account(quota, began, self.accel.pushed(), self._ran)
        self._ran = 0.0
        if not debt:
            return False
        counted = began
        while (left := began + debt - time.monotonic()) > 0:
            if self._attend() or control.dirty_quota != quota:
                break
            control.state = VcpuState.THROTTLED
            self.sleep(min(left, _THROTTLE_STEP))
            now = time.monotonic()
            control.throttled_ns += int((now - counted) * 1e9)
            counted = now
        return True

    def _run_slice(self) -> Exit:
        assert self.accel is not None
        if self._timer is None:
            self._timer = SliceTimer(self.accel.interrupt, threading.get_ident(), KICK_SIGNAL)
        pages, seconds = self._bucket.slice()
        self.accel.limit_pushes(pages)
        self._timer.arm(seconds)
        try:
            return self.accel.run()
        finally:
            self._timer.disarm()
            self.accel.limit_pushes(None)

    # --- what the coordinator wants -----------------------------------------------------------------

    def _attend(self) -> bool:
        """Acknowledge a kick; then: does the coordinator want this vCPU to stay out of the guest?

        In this order: the coordinator writes the request before the kick, so whoever acknowledges a
        kick sees the request that came with it. (x86 keeps the order of stores and of loads.)
        """
        control = self.control
        kick = control.kick_request
        if kick != control.kick_ack:
            control.kick_ack = kick
            self._say(KickAck(self.spec.index, kick))
        if self._job is not None:
            self._do_job()
        return control.request != 0 or self._shutdown

    def _do_job(self) -> None:
        with self._job_lock:
            job, self._job = self._job, None
        if job is None:
            return
        try:
            job()
        except Exception as exc:    # the service thread's to report
            self._job_error = exc
        self._job_done.set()

    def _on_vcpu_thread(self, job: Callable[[], None]) -> None:
        """From the service thread, with the vCPU paused: have it done where nobody else uses the accelerator.
        Raises what the job does, and AccelError."""
        self._job_error = None
        self._job_done.clear()
        self._job = job
        self._wake_up()
        if not self._job_done.wait(_JOB_TIMEOUT):
            with self._job_lock:
                begun, self._job = self._job is None, None
            if not begun:
                raise AccelError(f"vCPU {self.spec.index} is not out of the guest")
            self._job_done.wait()
        if self._job_error is not None:
            raise self._job_error

    def sleep(self, seconds: float | None = None) -> None:
        """Until woken by the service thread, a kick, or the time."""
        ready, _, _ = select.select([self._wake], [], [], seconds)
        if ready:
            os.read(self._wake, 4096)

    def _stay_paused(self) -> None:
        control = self.control
        while self._attend() and not self._shutdown and not control.request & VcpuRequest.STOP:
            control.state = VcpuState.PAUSED
            self.sleep()

    def _wait_for_reset(self) -> None:
        """KVM_EXIT_DIRTY_RING_FULL: tell the coordinator, stay out until the ring has been reset."""
        control = self.control
        began = time.perf_counter_ns()
        control.ring_full_exits += 1
        control.state = VcpuState.RING_FULL
        self._ring_full = True
        self._say(RingFull(self.spec.index))
        while self._ring_full and not self._attend():
            self.sleep()
        control.stalled_ns += time.perf_counter_ns() - began

    def _port_event(self, leave: Exit) -> bool:
        """Act on a port write; False when it ended the vCPU."""
        event = leave.event
        assert event is not None
        if event.kind is PortEventKind.EXIT:
            code = event.value - (1 << 32) if event.value >> 31 else event.value
            self._end(Exit(ExitKind.END, reason=ExitReason.CODE), code)
            return False
        if event.kind is PortEventKind.HYPERCALL:
            assert self.accel is not None
            try:
                hypercalls.carry_out(self, self.accel, self.memory, self.control)
            except hypercalls.BadHypercall as exc:
                self._end(Exit(ExitKind.END, reason=ExitReason.BAD_ADDRESS, detail=f"hypercall: {exc}",
                               registers=self.accel.registers()))
                return False
        return True

    def ends_in_hypercall(self) -> bool:
        """Serve kicks and pauses from within a hypercall; True when the vCPU is to end."""
        if self._attend():
            self._stay_paused()
        return self._shutdown or bool(self.control.request & VcpuRequest.STOP)

    def _end(self, leave: Exit, code: int = 0) -> None:
        self.ports.flush()
        self._ended = Exited(self.spec.index, leave.reason, code, leave.detail[:DETAIL_MAX], leave.registers)
        self._say_end()

    def _say_end(self) -> None:
        """Say, and write down, how the vCPU ended: again where the control block has been written over."""
        ended, control = self._ended, self.control
        if ended is not None and control.state != VcpuState.EXITED:
            control.exit_reason, control.exit_code = ended.reason, ended.code
            control.state = VcpuState.EXITED
            self._say(ended)

    # --- service thread --------------------------------------------------------------------------

    def serve(self) -> None:
        """Answer requests until Shutdown, or until nobody owns the machine any more."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        sock = sockets.connect(self._context, zmq.DEALER, self.spec.request_endpoint,
                               identity=str(self.spec.index).encode())
        poller = zmq.Poller()
        poller.register(sock, zmq.POLLIN)
        if self.spec.keeper_fd >= 0:
            poller.register(self.spec.keeper_fd, zmq.POLLIN)
        deadline: float | None = None
        with sock:
            while not self._shutdown:
                timeout = None if deadline is None else int(max(0.0, deadline - time.monotonic()) * 1000)
                events = dict(poller.poll(timeout))
                if sock in events:
                    self._serve_one(sock)
                elif deadline is not None and time.monotonic() >= deadline:
                    self._orphaned()
                elif self.spec.keeper_fd in events:
                    # The keeper is gone. A live coordinator ends the machine in order now.
                    poller.unregister(self.spec.keeper_fd)
                    deadline = time.monotonic() + _ORPHAN_GRACE

    def serve_resets(self) -> None:
        """The reset thread: whenever the coordinator has raised reset_request. A vCPU that waits at ring-full goes
        on then."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        while not self._shutdown:
            request = self._resets.wait()
            if request is None:
                continue
            self._reset(self._resets.expected())
            self._resets.answer(request)
            self._ring_full = False
            self._wake_up()

    def _reset(self, expected: int) -> None:
        """The call is repeated while it is short. What is missing in the end the coordinator sees by the totals."""
        if not expected:
            return
        assert self.accel is not None
        began = time.perf_counter_ns()
        try:
            self.control.reset_total += self.accel.reset_ring(expected)
        except Exception as exc:    # whatever it is, the count does not match then, and the coordinator sees that
            print(f"vcpu {self.spec.index}: reset of its ring: {exc}", file=sys.stderr)
        self.control.resets += 1
        self.control.reset_ns += time.perf_counter_ns() - began

    def _serve_one(self, sock: zmq.Socket[bytes]) -> None:
        try:
            request = decode_request(sock.recv())
        except MessageError as exc:
            print(f"vcpu {self.spec.index}: {exc}", file=sys.stderr)
            return
        accel = self.accel
        assert accel is not None
        control = self.control
        value = 0
        data = None
        try:
            match request:
                case SetMemslot(slot=slot):
                    self._slots(accel).set(slot)
                case SetMemslots(slots=slots):
                    self._slots(accel).set_all(slots)
                case RemoveMemslot(slot_id=slot_id):
                    self._slots(accel).remove(slot_id)
                case GetLog(slot_id=slot_id):
                    value = accel.get_dirty_log(slot_id) if self._writes is None else self._writes.get(slot_id)
                case ClearLog(slot_id=slot_id):
                    accel.clear_dirty_log(slot_id)
                case RebuildRing():
                    self._on_vcpu_thread(accel.rebuild_ring)
                    control.pushed_total = 0
                    control.reset_total = 0
                    control.ring_generation += 1
                    self._ring_full = False
                    self._bucket.forget_ring()
                    if accel.vcpu_fd >= 0:
                        sockets.send_fd(self.spec.fd_socket, self.spec.index, accel.vcpu_fd, _FD_TIMEOUT)
                    self._wake_up()
                case SetTracking():
                    self._set_tracking(request)
                case SendFd():
                    if accel.vcpu_fd >= 0:
                        sockets.send_fd(self.spec.fd_socket, self.spec.index, accel.vcpu_fd, _FD_TIMEOUT)
                        value = accel.kvm_run_size
                case GetState():
                    data = plain_state(accel.get_state())
                case SetState():
                    state = check_state(request.state)
                    accel.set_state(state)
                    self._restored_exit = state.exit
                case Userfault(socket=path):
                    data = self._wait_for_missing(path)
                case Shutdown():
                    self._shutdown = True
        except (AccelError, StateError, SegmentError, userfault.UserfaultError, OSError, KeyError) as exc:
            sock.send(encode(Failed(request.seq, str(exc))))
            return
        except Exception as exc:    # a request may fail, whatever is in it; this thread goes on
            traceback.print_exc()
            sock.send(encode(Failed(request.seq, f"its worker failed: {type(exc).__name__}: {exc}")))
            return
        sock.send(encode(Done(request.seq, value, data)))
        if self._shutdown:
            accel.interrupt()
            self._wake_up()

    def _slots(self, accel: Accelerator) -> Slots:
        return Slots(self.memory, accel, self._writes, self.spec.system_slot.id)

    def _set_tracking(self, request: SetTracking) -> None:
        """Repeated, it does nothing. Where the new way cannot be had, the old one stays in force."""
        spec = msgspec.structs.replace(self.spec, tracking=request.tracking, ring_entries=request.ring_entries,
                                       ring_segment=request.ring_segment)
        accel, control = self.accel, self.control
        assert accel is not None
        if self.spec.mode == spec.mode and self.spec.ring_entries == spec.ring_entries:
            control.tracking = spec.mode
            return
        slots = self.memory.slots
        for slot_id, name in request.log_segments.items():
            slots[slot_id].set_log_segment(name)
        logged = [s.spec for s in slots.values() if s.spec.id != spec.system_slot.id]
        writes = _slot_writes(self.memory, logged) if spec.mode is Tracking.UFFD else None
        try:
            self._on_vcpu_thread(lambda: accel.set_tracking(spec))
        except BaseException:
            if writes is not None:
                writes.close()
            raise
        if self._writes is not None:
            self._writes.close()
        self._writes, self.spec = writes, spec
        self._ring_full = False
        self._bucket.forget_ring()
        control.pushed_total = control.reset_total = 0
        control.ring_entries = spec.ring_entries
        control.tracking = spec.mode
        self._wake_up()

    def _wait_for_missing(self, path: str) -> dict[str, Any]:
        """Post-copy begins (``path``: who fills the pages) or ends. The fd stays open here too: should the other
        end go, nobody gets a zero page for one that is missing."""
        slots = [s for s in self.memory.slots.values() if s.spec.id != self.spec.system_slot.id]
        if not path:
            if self._userfault.fd >= 0:     # the other end may still have its own copy open
                for slot in slots:
                    self._userfault.unregister(slot.host_address, slot.spec.size)
            self._userfault.close()
            return {}
        if self._userfault.fd < 0:      # else the request is repeated, and the other end may have it already
            made = userfault.Userfault.make()
            try:
                for slot in slots:
                    made.register(slot.host_address, slot.spec.size)
            except BaseException:
                made.close()
                raise
            self._userfault = made
        sockets.send_fd(path, self.spec.index, self._userfault.fd, _FD_TIMEOUT)
        return {str(slot.spec.id): slot.host_address for slot in slots}

    def _orphaned(self) -> None:
        """Keeper and coordinator are both gone: leave nothing behind, then go."""
        # A coordinator that lives, or a machine that has the name by now, keeps all that it has.
        with contextlib.suppress(ClaimError):
            Belongings(self.spec.belongings, Path(self.spec.fd_socket).parent).clear()
        os._exit(1)  # the vCPU thread may be deep in the guest; there is nobody left to tell

    def close(self) -> None:
        if self._timer is not None:
            self._timer.close()
        self._userfault.close()
        if self._writes is not None:
            self._writes.close()
        if self.accel is not None:
            self.accel.close()
        self.memory.close()
        self._notify.close()
        self._context.term()
        signal.set_wakeup_fd(-1)
        os.close(self._wake)
        os.close(self._wake_write)


def _slot_writes(memory: GuestMemory, slots: list[SlotSpec]) -> SlotWrites:
    """Imported only now: it brings numpy along, and 10 MiB."""
    from .tracking.uffd import SlotWrites

    return SlotWrites(memory, slots)


def _on_kick(signum: int, frame: FrameType | None) -> None:
    """Nothing to do: the signal has interrupted KVM_RUN and filled the wake pipe."""


def main(spec: WorkerSpec) -> int:
    """The process: 0 after an orderly Shutdown, 1 when the vCPU could not be set up."""
    process.set_name(f"vcpu{spec.index}")
    process.set_time_slice(process.SERVICE_SLICE)   # of all threads but the vCPU's: they inherit it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator decides what a Ctrl-C means
    worker = Worker(spec)
    worker.catch_kicks()
    ok = worker.set_up()
    if ok:
        service = threading.Thread(target=worker.serve, name="service", daemon=True)
        service.start()
        threading.Thread(target=worker.serve_resets, name="reset", daemon=True).start()
        process.set_time_slice(0.0)     # the vCPU's own thread computes: an ordinary one
        if spec.nice:
            process.set_nice(spec.nice)
        worker.run()
        service.join()
    worker.close()
    return 0 if ok else 1
