"""The vCPU thread of a worker, which is its process's main thread: the guest is entered and left here.

No lost kick. The coordinator sets the request, then the immediate-exit flag, then signals. This loop clears the
flag, then looks at the request. Whatever the order of the two, either the look sees the request or the entry sees
the flag. A parked vCPU (paused, ring full, waiting) sleeps on a pipe that the other threads and, through
``signal.set_wakeup_fd``, the signal itself write to (a handler in Python would be too late: it runs between
bytecodes, not while select is being entered). The coordinator repeats an unacknowledged kick, which covers the one
wait that has no such fd, the futex of the wait hypercall.

At a full ring it waits at first where the reset of its ring is asked for, in the control block (ipc/ring.py), and
resets it itself. There a kick or ``wake_up`` can come too early, just before it sleeps: it looks around again after
``_LOOK_AROUND`` at the latest, and waits at its pipe from then on.

Other threads ask this one for something by ``wake_up`` and ``do``; what they may change of it has no underscore.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from ipc.bell import Doorbell
from ipc.lanes import Kind, Lane
from ipc.layout import KICK_SIGNAL, VcpuControl, VcpuRequest, VcpuState
from ipc.messages import DETAIL_MAX, Exited, ExitReason, KickAck, Notification, RingFull

from . import hypercalls
from .accel.base import Accelerator, AccelError, Exit, ExitKind
from .memory import GuestMemory
from .ports import PortBus, PortEventKind
from .resets import Resets
from .state import ExitState
from .throttle import SliceTimer, TokenBucket

if TYPE_CHECKING:
    from .programs import ProgramThread

__all__ = ["VcpuThread"]

_THROTTLE_STEP = 0.1        # seconds after which a long wait shows in the statistics
_LOOK_AROUND = 0.01         # seconds at a full ring until it is said by a message too, and kicks come by the pipe
_JOB_TIMEOUT = 20.0         # seconds for the vCPU thread, which is parked, to begin a job


class VcpuThread:
    """``accel`` and ``bell`` are there before ``run``. ``close`` it when the thread has ended. ``lane``: where it
    writes down when it was out of the guest, and why."""

    accel: Accelerator
    bell: Doorbell

    def __init__(self, index: int, control: VcpuControl, memory: GuestMemory, ports: PortBus,
                 say: Callable[[Notification], None], lane: Lane | None = None) -> None:
        self.index = index
        self._lane = lane or Lane.of_nobody()
        self.control = control
        self.memory = memory
        self.ports = ports
        self.say = say
        self.resets = Resets(index, control)
        self._wake, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        #: The process is to end.
        self.shutdown = False
        #: It waits for the reset of its ring.
        self.ring_full = False
        #: Of a thread of a Linux program: who knows how long it waits.
        self.away: ProgramThread | None = None
        self._was_away = 0
        #: Of a vCPU that had ended when it was saved: how.
        self.restored_exit: ExitState | None = None
        self.bucket = TokenBucket()
        self._timer: SliceTimer | None = None
        self._ended: Exited | None = None
        self._ran = 0.0     # seconds in the guest since the bucket was last told
        self._job: Callable[[], None] | None = None     # that it is to do for the service thread
        self._job_lock = threading.Lock()
        self._job_done = threading.Event()
        self._job_error: Exception | None = None

    def close(self) -> None:
        if self._timer is not None:
            self._timer.close()
        signal.set_wakeup_fd(-1)
        os.close(self._wake)
        os.close(self._wake_write)

    def catch_kicks(self) -> None:
        """Have the kick signal interrupt this thread (the main one) and fill the wake pipe."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(KICK_SIGNAL, _on_kick)

    @property
    def exit(self) -> ExitState | None:
        """How the guest ended on this vCPU, here or before it was saved; no later than its control block says that it
        has."""
        ended = self._ended
        return self.restored_exit if ended is None else ExitState(ended.reason, ended.code, ended.detail)

    def wake_up(self) -> None:
        """From the service thread: let the vCPU thread look around."""
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass  # a full pipe wakes as well
        self.resets.requests.end_look()

    def run(self) -> None:
        """Run the guest to its end, then stay at the coordinator's service until Shutdown."""
        try:
            self._run_guest()
        except Exception as exc:    # a fault of this program: the vCPU ends, its log and its state are still served
            traceback.print_exc()
            self._end(Exit(ExitKind.END, reason=ExitReason.INTERNAL_ERROR,
                           detail=f"its worker failed: {type(exc).__name__}: {exc}"))
        while not self.shutdown:
            self.sleep()
            self._attend()
            self._say_end()

    def _run_guest(self) -> None:
        accel = self.accel
        control = self.control
        while not self.shutdown:
            accel.clear_immediate_exit()
            if self._attend():
                if control.request & VcpuRequest.STOP:
                    self._end(Exit(ExitKind.END, reason=ExitReason(control.stop_reason),
                                   registers=accel.registers()))
                    break
                self.stay_paused()
                continue
            if self.restored_exit is not None:
                was = self.restored_exit
                self._end(Exit(ExitKind.END, reason=was.reason, detail=was.detail), was.code)
                break
            quota = control.dirty_quota
            if quota and self._in_debt(quota):
                continue
            control.state = VcpuState.RUNNING
            control.guest_entries += 1
            entered = time.perf_counter_ns()
            leave = self._run_slice() if quota else accel.run()
            spent = time.perf_counter_ns() - entered - self._away()
            control.guest_ns += spent
            self._ran += spent / 1e9
            if leave.kind is ExitKind.RING_FULL:
                self.wait_for_reset()
            elif leave.kind is ExitKind.PORT:
                if not self._port_event(leave):
                    break
            elif leave.kind is ExitKind.END:
                self._end(leave, leave.code)
                break

    def _away(self) -> int:
        """Nanoseconds of ``run`` in which the guest waited for its system."""
        if self.away is None:
            return 0
        before, self._was_away = self._was_away, self.away.away_ns
        return self._was_away - before

    # --- dirty limit ---------------------------------------------------------------------------

    def _in_debt(self, quota: int) -> bool:
        """Count what the last slice dirtied, and stay out until the quota has paid for it, or somebody wants
        something; True when that took time."""
        control = self.control
        began = time.monotonic()
        debt = self.bucket.account(quota, began, self.accel.pushed(), self._ran)
        self._ran = 0.0
        if not debt:
            return False
        counted = began
        self._lane.put(Kind.THROTTLE_BEGIN)
        while (left := began + debt - time.monotonic()) > 0:
            if self._attend() or control.dirty_quota != quota:
                break
            control.state = VcpuState.THROTTLED
            self.sleep(min(left, _THROTTLE_STEP))
            now = time.monotonic()
            control.throttled_ns += int((now - counted) * 1e9)
            counted = now
        self._lane.put(Kind.THROTTLE, int((time.monotonic() - began) * 1e9))
        return True

    def _run_slice(self) -> Exit:
        if self._timer is None:
            self._timer = SliceTimer(self.accel.interrupt, threading.get_ident(), KICK_SIGNAL)
        pages, seconds = self.bucket.slice()
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
            if control.request & VcpuRequest.PAUSE and control.state == VcpuState.RUNNING:
                control.state = VcpuState.PAUSED    # before whoever asked for it goes on, and looks
            control.kick_ack = kick
            self.say(KickAck(self.index, kick))
        if self._job is not None:
            self._do_job()
        return control.request != 0 or self.shutdown

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

    def do(self, job: Callable[[], None], *, running: bool = False) -> None:
        """From the service thread: have it done where nobody else uses the accelerator. The vCPU is paused, or else
        (``running``) is interrupted for it. Raises what the job does, and AccelError."""
        self._job_error = None
        self._job_done.clear()
        self._job = job
        self.wake_up()
        if running:
            self.accel.interrupt()
        if not self._job_done.wait(_JOB_TIMEOUT):
            with self._job_lock:
                begun, self._job = self._job is None, None
            if not begun:
                raise AccelError(f"vCPU {self.index} is not out of the guest")
            self._job_done.wait()
        if self._job_error is not None:
            raise self._job_error

    def sleep(self, seconds: float | None = None) -> None:
        """Until woken by the service thread, a kick, or the time."""
        ready, _, _ = select.select([self._wake], [], [], seconds)
        if ready:
            os.read(self._wake, 4096)

    def stay_paused(self, state: VcpuState = VcpuState.PAUSED) -> None:
        """``state``: in which it does."""
        control = self.control
        began = 0
        while self._attend() and not self.shutdown and not control.request & VcpuRequest.STOP:
            control.state = state
            if not began:
                began = time.monotonic_ns()
                self._lane.put(Kind.PAUSE_BEGIN)
            self.sleep()
        if began:
            self._lane.put(Kind.PAUSE, time.monotonic_ns() - began, began=began)

    def wait_for(self, poll: select.poll, seconds: float) -> None:
        """Until something happens at one of these descriptors, as at ``sleep``."""
        poll.register(self._wake, select.POLLIN)
        if any(fd == self._wake for fd, _ in poll.poll(seconds * 1000)):
            os.read(self._wake, 4096)

    @property
    def is_to_end(self) -> bool:
        return self.shutdown or bool(self.control.request & VcpuRequest.STOP)

    def wait_for_reset(self, state: VcpuState = VcpuState.RING_FULL) -> None:
        """KVM_EXIT_DIRTY_RING_FULL: tell the coordinator, stay out until the ring has been reset."""
        control, resets = self.control, self.resets
        began = time.perf_counter_ns()
        control.state = state
        self.ring_full = True
        resets.requests.begin_looking()
        control.ring_full_exits += 1
        self._lane.put(Kind.RING_FULL)      # before anybody can do anything about it
        self.bell.ring()
        left = _LOOK_AROUND
        while self.ring_full and left > 0 and not self._attend():
            resets.requests.look(left)
            if resets.carry_out(self.accel):
                self.ring_full = False
            left = _LOOK_AROUND - (time.perf_counter_ns() - began) / 1e9
        resets.requests.end_looking()
        if self.ring_full and left <= 0:
            self.say(RingFull(self.index))
            while self.ring_full and not self._attend():
                self.sleep()
        took = time.perf_counter_ns() - began
        control.stalled_ns += took
        self._lane.put(Kind.STALL, took, began=began)

    def _port_event(self, leave: Exit) -> bool:
        """Act on a port write; False when it ended the vCPU."""
        event = leave.event
        assert event is not None
        if event.kind is PortEventKind.EXIT:
            code = event.value - (1 << 32) if event.value >> 31 else event.value
            self._end(Exit(ExitKind.END, reason=ExitReason.CODE), code)
            return False
        if event.kind is PortEventKind.HYPERCALL:
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
            self.stay_paused()
        return self.shutdown or bool(self.control.request & VcpuRequest.STOP)

    def _end(self, leave: Exit, code: int = 0) -> None:
        self.ports.flush()
        self._ended = Exited(self.index, leave.reason, code, leave.detail[:DETAIL_MAX], leave.registers)
        self._say_end()

    def _say_end(self) -> None:
        """Say, and write down, how the vCPU ended: again where the control block has been written over."""
        ended, control = self._ended, self.control
        if ended is not None and control.state != VcpuState.EXITED:
            control.exit_reason, control.exit_code = ended.reason, ended.code
            control.state = VcpuState.EXITED
            self.say(ended)


def _on_kick(signum: int, frame: FrameType | None) -> None:
    """Nothing to do: the signal has interrupted KVM_RUN and filled the wake pipe."""
