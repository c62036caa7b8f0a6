"""The report of a machine (vmm/machine/report.py)."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from ipc.layout import ReaperState, VcpuState
from ipc.messages import ExitReason

from ..machine.report import (
    CoordinatorReport,
    ProgramReport,
    ReaperReport,
    Report,
    SlotReport,
    VcpuReport,
    VerificationReport,
)
from ..vcpus.handle import VcpuHandle
from ..version import VERSION
from .core import Core
from .families import Families
from .outcome import exit_code, reason_text

__all__ = ["machine_report", "machine_slots"]


def machine_report(machine: Families) -> Report:
    """What is not over has no exit code: None, of the machine and of each vCPU."""
    core, pauses, asked = machine.core, machine.pauses, machine.tracking.asked
    spec, log, block = core.spec, core.parts.log, core.parts.control
    verification = None
    if core.verifier is not None:
        result = core.verifier.result
        verification = VerificationReport(**msgspec.structs.asdict(result), ok=result.ok)
    return Report(
        name=spec.name, state="paused" if pauses.paused and core.state == "running" else core.state,
        elapsed_s=round(machine.life.elapsed, 6),
        exit_code=int(exit_code(core)) if core.state == "ended" else None, cause=None, ended_at=None,
        accelerator=spec.accel, tracking=core.parts.tracking, tracking_asked=asked,
        tracking_switches=machine.tracking.switches, logging=core.parts.mode.logged and log.on,
        ring_entries=core.parts.ring_entries, can_limit=spec.ring_entries > 0 and asked in ("ring", "auto"),
        coordinator=CoordinatorReport(pid=os.getpid(), restarts=core.restarts, turns=core.turns,
                                      bad_messages=core.vcpus.dropped, program=VERSION),
        vcpus=[_vcpu_report(core, each) for each in core.vcpus.all],
        reaper=ReaperReport(mode=spec.reaper.mode, state=ReaperState(block.reaper_state).name,
                            iterations=block.reaper_iteration, pages=block.reaped_pages,
                            microseconds=block.reap_ns // 1000, flushes=block.flushes,
                            interval_s=core.reaper.schedule.interval if core.parts.reaps else None),
        slots=[SlotReport(id=i, gpa=s.spec.gpa, size=s.spec.size, pages=s.pages, dirty=log.dirty_pages(i),
                          logged=s.logged, born=s.spec.born) for i, s in log.slots.items()],
        clients=log.clients, holders=machine.holders(),
        handed_over=pauses.handed_over.to if pauses.handed_over else "", incoming=core.pages_missing,
        verification=verification, program=_program_report(core))


def machine_slots(core: Core) -> dict[str, Any]:
    """The memory as it is now, for whoever is going to look at it."""
    return {"slots": {str(i): {"gpa": s.spec.gpa, "size": s.spec.size, "born": s.spec.born, "logged": s.logged,
                               "ram": s.ram.name} for i, s in core.parts.log.slots.items()},
            "accelerator": core.spec.accel, "incoming": core.pages_missing}


def _program_report(core: Core) -> ProgramReport | None:
    spec, calls = core.spec, core.program_calls
    if spec.program is None:
        return None
    block = core.vcpus.all[spec.threads].control
    return ProgramReport(
        args=spec.program.args,
        exit_status=block.exit_code if ExitReason(block.exit_reason) == ExitReason.CODE else None,
        calls=calls.served if calls else 0, missing_calls=calls.missing if calls else {},
        refused_threads=calls.refused if calls else 0,
        unchanged_dirty_pages=core.verifier.result.unchanged_pages if core.verifier is not None else None)


def _vcpu_report(core: Core, vcpu: VcpuHandle) -> VcpuReport:
    block, exited = vcpu.control, vcpu.exited
    reason = ExitReason(block.exit_reason)
    over = reason != ExitReason.NONE
    return VcpuReport(
        index=vcpu.index, pid=vcpu.pid,
        accelerator="system" if core.spec.is_system(vcpu.index) else core.spec.accel,
        state=VcpuState(block.state).name.lower().replace("_", "-"),
        exit_reason=reason_text(reason) if over else None, exit_code=block.exit_code if over else None,
        detail=exited.detail if exited else "", registers=exited.registers if exited else None,
        dirty_pages=block.dirty_pages, ring_used=vcpu.ring.filled, ring_full_exits=block.ring_full_exits,
        resets=block.resets, reset_s=block.reset_ns / 1e9, ring_rebuilds=block.ring_rebuilds,
        bad_entries=block.bad_entries,
        guest_entries=block.guest_entries, guest_s=block.guest_ns / 1e9, stalled_s=block.stalled_ns / 1e9,
        dirty_limit_pages_per_s=block.dirty_quota, throttled_s=block.throttled_ns / 1e9)
