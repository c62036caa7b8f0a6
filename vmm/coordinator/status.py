"""The report of a machine, and the exit code that its end means."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from ipc.layout import ReaperState, VcpuState
from ipc.messages import ExitReason

from ..errors import ExitCode
from ..machine.report import (
    CoordinatorReport,
    Holder,
    ReaperReport,
    Report,
    SlotReport,
    VcpuReport,
    VerificationReport,
)
from ..vcpus.handle import VcpuHandle
from .core import Core

__all__ = ["cause_of", "exit_code", "machine_report", "machine_slots", "reason_text"]

_CRASHES = frozenset({ExitReason.TRIPLE_FAULT, ExitReason.EXCEPTION, ExitReason.BAD_ADDRESS,
                      ExitReason.UNKNOWN_PORT, ExitReason.INTERNAL_ERROR, ExitReason.HALT})


def reason_text(reason: ExitReason) -> str:
    return reason.name.lower().replace("_", "-")


def machine_report(core: Core, *, paused: bool, elapsed: float, asked_tracking: str, switches: int,
                   restarts: int, turns: int, holders: list[Holder], handed_over: str) -> Report:
    """``elapsed``: seconds; ``turns``: of the coordinator's loop. What is not over has no exit code: None, of the
    machine and of each vCPU."""
    spec, log, block = core.spec, core.parts.log, core.parts.control
    verification = None
    if core.verifier is not None:
        result = core.verifier.result
        verification = VerificationReport(**msgspec.structs.asdict(result), ok=result.ok)
    return Report(
        name=spec.name, state="paused" if paused and core.state == "running" else core.state,
        elapsed_s=round(elapsed, 6),
        exit_code=int(exit_code(core)) if core.state == "ended" else None, cause=None, ended_at=None,
        accelerator=spec.accel, tracking=core.parts.tracking, tracking_asked=asked_tracking,
        tracking_switches=switches, ring_entries=core.parts.ring_entries,
        can_limit=spec.ring_entries > 0 and asked_tracking in ("ring", "auto"),
        coordinator=CoordinatorReport(pid=os.getpid(), restarts=restarts, turns=turns,
                                      bad_messages=core.vcpus.dropped),
        vcpus=[_vcpu_report(core, each) for each in core.vcpus.all],
        reaper=ReaperReport(mode=spec.reaper.mode, state=ReaperState(block.reaper_state).name,
                            iterations=block.reaper_iteration, pages=block.reaped_pages,
                            microseconds=block.reap_ns // 1000, flushes=block.flushes),
        slots=[SlotReport(id=i, gpa=s.spec.gpa, size=s.spec.size, pages=s.pages, dirty=log.dirty_pages(i),
                          logged=s.logged, born=s.spec.born) for i, s in log.slots.items()],
        clients=log.clients, holders=holders, handed_over=handed_over, incoming=core.pages_missing,
        verification=verification)


def machine_slots(core: Core) -> dict[str, Any]:
    """The memory as it is now, for whoever is going to look at it."""
    return {"slots": {str(i): {"gpa": s.spec.gpa, "size": s.spec.size, "born": s.spec.born, "logged": s.logged,
                               "ram": s.ram.name} for i, s in core.parts.log.slots.items()},
            "accelerator": core.spec.accel, "incoming": core.pages_missing}


def _vcpu_report(core: Core, vcpu: VcpuHandle) -> VcpuReport:
    block, exited = vcpu.control, vcpu.exited
    reason = ExitReason(block.exit_reason)
    over = reason != ExitReason.NONE
    return VcpuReport(
        index=vcpu.index, pid=vcpu.pid, accelerator=core.spec.accel,
        state=VcpuState(block.state).name.lower().replace("_", "-"),
        exit_reason=reason_text(reason) if over else None, exit_code=block.exit_code if over else None,
        detail=exited.detail if exited else "", registers=exited.registers if exited else None,
        dirty_pages=block.dirty_pages, ring_full_exits=block.ring_full_exits, resets=block.resets,
        reset_s=block.reset_ns / 1e9, ring_rebuilds=block.ring_rebuilds, bad_entries=block.bad_entries,
        guest_entries=block.guest_entries, guest_s=block.guest_ns / 1e9, stalled_s=block.stalled_ns / 1e9,
        dirty_limit_pages_per_s=block.dirty_quota, throttled_s=block.throttled_ns / 1e9)


def exit_code(core: Core) -> ExitCode:
    """The worst of what happened, in the order of what a user must know first."""
    reasons = {ExitReason(s.control.exit_reason) for s in core.vcpus.all}
    if core.verifier is not None and not core.verifier.result.ok:
        return ExitCode.VERIFY_FAILED
    if reasons & {ExitReason.WORKER_DIED, ExitReason.UNKNOWN}:
        return ExitCode.WORKER_DIED
    if reasons & _CRASHES:
        return ExitCode.GUEST_CRASHED
    if ExitReason.TIMEOUT in reasons:
        return ExitCode.TIMEOUT
    if ExitReason.STOPPED in reasons:
        return ExitCode.STOPPED
    if any(s.control.exit_code for s in core.vcpus.all):
        return ExitCode.GUEST_FAILED
    return ExitCode.OK


def cause_of(core: Core, stopped_by: str) -> str:
    """Why the machine has ended, for people: what its exit code is about. ``stopped_by``: if it was stopped."""
    code = exit_code(core)
    if code is ExitCode.VERIFY_FAILED:
        assert core.verifier is not None
        result = core.verifier.result
        return f"verification failed: {result.lost_pages} pages lost, {result.surplus_pages} surplus"
    if code in (ExitCode.WORKER_DIED, ExitCode.GUEST_CRASHED):
        return "; ".join(f"vCPU {s.index}: {reason_text(reason)}" for s in core.vcpus.all
                         if (reason := ExitReason(s.control.exit_reason)) in _CRASHES | {ExitReason.WORKER_DIED})
    if code is ExitCode.GUEST_FAILED:
        return "; ".join(f"vCPU {s.index} ended with code {s.control.exit_code}" for s in core.vcpus.all
                         if s.control.exit_code)
    return {ExitCode.TIMEOUT: "timeout", ExitCode.STOPPED: stopped_by}.get(code, "every vCPU ended with code 0")
