"""A machine's life: ready, running, ended; why it is to end, and the report that it leaves."""

from __future__ import annotations

import signal
import time
from typing import Any

from ipc.layout import ExitReason, VcpuRequest
from ipc.steps import step

from ..errors import ExitCode, VmmError
from ..machine import records
from .core import Core
from .outcome import cause_of, exit_code

__all__ = ["ON_REQUEST", "Life"]

ON_REQUEST = "stopped on request"


class Life:
    """``done``: the machine is over and released, and the coordinator may end. ``final``: its last report, once it
    has ended. ``stopping``: why it is to end, if it is; ``stopped_by``: the same for people, if it was stopped."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.started: float | None = None           # seconds of CLOCK_MONOTONIC
        self.elapsed_at_end: float | None = None    # seconds
        self.stopping = ExitReason.NONE
        self.done = False
        self.final: dict[str, Any] | None = None
        self.stopped_by = ON_REQUEST
        self._linger = core.spec.linger

    def adopt(self, started: float | None, elapsed: float | None, stopping: int, stopped_by: str) -> None:
        """As a coordinator that died has left it."""
        self.stopped_by = stopped_by
        self.started, self.elapsed_at_end, self.stopping = started, elapsed, ExitReason(stopping)
        self._core.state = "ready" if started is None else "running"

    @property
    def elapsed(self) -> float:
        """Seconds since the start, of a machine that was upgraded the first one."""
        if self.elapsed_at_end is not None:
            return self.elapsed_at_end
        before = self._core.spec.elapsed
        return before + time.monotonic() - self.started if self.started is not None else before

    @property
    def timeout_left(self) -> float | None:
        """Seconds until it is ended because of its timeout; None: that does not happen."""
        timeout = self._core.spec.timeout
        return None if timeout is None or self.stopping != ExitReason.NONE else timeout - self.elapsed

    def start(self, held_by: str = "") -> None:
        """Let the vCPUs enter the guest for the first time. Nothing, if they have already. ``held_by``: who keeps it
        paused all the same, for people. Raises VmmError."""
        core = self._core
        if core.state != "ready":
            return
        self.started = time.monotonic()
        try:
            core.save()
        except VmmError:
            self.started = None
            raise
        step("start-committed")
        core.take_memory()
        step("start-taken")
        core.state = "running"
        core.reaper.schedule.plan(self.started, core.reaper.room())
        core.vcpus.resume_all()
        core.tell({"event": "started", "held_by": held_by})
        step("start-resumed")

    def stop(self, reason: ExitReason) -> None:
        """Ask every vCPU to end. They do so at once, paused or not."""
        if self.stopping != ExitReason.NONE or self._core.state != "running":
            return
        self.stopping = reason
        self._core.save_if_possible()
        step("stop-saved")
        self.ask_to_end()

    def ask_to_end(self) -> None:
        """Again, where a coordinator that died may not have come to it."""
        for vcpu in self._core.vcpus.all:
            if vcpu.running:
                vcpu.control.stop_reason = self.stopping
                vcpu.control.request |= VcpuRequest.STOP
                vcpu.kick()
                if self._core.pages_missing:    # it may wait for a page that never comes
                    self._core.killed_for = self.stopping
                    vcpu.signal(signal.SIGKILL)
                step("stop-asked")

    def stop_or_go(self, stopped_by: str = ON_REQUEST) -> None:
        """``vmm stop``: of a running machine, and of one that has ended or never started. ``stopped_by``: its cause,
        for people."""
        if self.stopping == ExitReason.NONE:
            self.stopped_by = stopped_by
        self.stop(ExitReason.STOPPED)
        self.go()

    def terminate(self) -> None:
        """SIGTERM: as ``stop_or_go``, and it does not linger."""
        self._linger = False
        self.stop_or_go(records.BY_SIGTERM)

    def go(self) -> None:
        """Let a machine go that does not run."""
        if self._core.state == "ready" and not self.done:
            self._keep_report(ExitCode.STOPPED, f"{self.stopped_by}, before it was started")
        self.done = self.done or self._core.state == "ended"

    def finish(self) -> None:
        """Every vCPU has ended: what their rings still hold is reaped and checked."""
        core = self._core
        core.vcpus.drain_notifications(everything=True)
        if core.verifying and not core.given_away:
            core.drain_and_verify()
        else:
            core.reaper.drain()
        self._keep_report(exit_code(core), cause_of(core, self.stopped_by))
        self.done = not self._linger

    def _keep_report(self, code: ExitCode, cause: str) -> None:
        """The machine has ended: its report stays, here while the machine lingers, and on disk."""
        core = self._core
        self.elapsed_at_end = self.elapsed
        core.state = "ended"
        core.save_if_possible()
        self.final = {**core.report(), "exit_code": int(code), "cause": cause, "ended_at": records.now()}
        try:
            records.write_report(core.spec.name, self.final)
        except OSError as exc:
            core.warn(f"cannot save its report: {exc}")
        step("report-kept")
        core.tell({"event": "ended", "exit_code": int(code), "cause": cause})
