"""A coordinator that carries on where one that died left off (docs/protocol.md, invariant 5).

Its predecessor's harvest may have stopped anywhere. What it had harvested lies in staging, what it had not is
still in the rings; entries it had harvested and not reset are counted by the difference of the two totals. So one
ordinary reap, of every ring, puts all of it right.
"""

from __future__ import annotations

import logging

from ipc.layout import ExitReason, VcpuState
from ipc.messages import Exited
from ipc.shm import list_segments, unlink_segment
from ipc.steps import step

from ..dirty.tracking import switch
from ..dirty.verify import Verification
from ..machine.names import machine_prefix
from . import hotplug, segments
from .core import Core
from .families import Families
from .journal import Saved
from .rounds import Rounds

__all__ = ["commit", "take_over"]

_log = logging.getLogger(__name__)


def take_over(machine: Families, saved: Saved, rounds: Rounds) -> None:
    """All that the predecessor has left. The vCPUs stand still afterwards (post-copy on a software CPU excepted),
    and nothing has been written down. Raises VmmError, SegmentError, OSError."""
    core, holds = machine.core, saved.holds
    core.restarts = saved.restarts + 1
    core.generation = saved.generation
    core.requests.extend(saved.requests)
    _adopt_vcpus(core, saved)
    # Before anything is waited for: a vCPU may be waiting for a page.
    machine.incoming.adopt(holds.incoming)
    if core.reaper.only_full:
        _leave_alone(core)
    else:
        _bring_into_line(core)
    rounds.begin(saved.verification or Verification(), started=saved.started is not None)
    for vcpu in core.vcpus.all:
        # A message that the predecessor took with it: the control block still says so.
        if vcpu.control.state == VcpuState.EXITED and vcpu.exited is None:
            vcpu.exited = Exited(vcpu.index, ExitReason(vcpu.control.exit_reason), vcpu.control.exit_code)
    core.parts.log.publish()
    machine.clients.adopt(holds.clients)
    machine.writes.adopt(holds.writes)
    machine.life.adopt(saved.started, saved.elapsed, saved.stopping, saved.stopped_by)
    machine.pauses.adopt(holds.user_paused, holds.pauses, holds.handed_over)
    machine.leases.adopt(holds.leases)
    machine.limits.adopt(holds.user_limits, holds.limits)
    step("take-over")


def commit(machine: Families, known: set[str]) -> None:
    """From here on it is this coordinator's machine. ``known``: segments that are in use. Raises VmmError."""
    core, life = machine.core, machine.life
    core.save()
    step("take-over-committed")
    _sweep(core, known)
    if life.stopping != ExitReason.NONE:
        life.ask_to_end()
    if life.started is not None:
        core.take_memory()
        core.vcpus.resume_all()     # those who want it to stand still have their own pause by now
        machine.pauses.tell_if_running()
    _log.info("took over the machine (restart %d)", core.restarts)


def _adopt_vcpus(core: Core, saved: Saved) -> None:
    for vcpu, process in zip(segments.make_handles(core.parts), saved.workers, strict=True):
        vcpu.exited = saved.exits.get(vcpu.index)
        core.vcpus.all.append(vcpu)
        try:
            if vcpu.control.state == VcpuState.DEAD:
                raise ProcessLookupError
            vcpu.adopt(process)
        except ProcessLookupError:
            vcpu.mark_dead()
            core.reaper.worker_died(vcpu)


def _bring_into_line(core: Core) -> None:
    """Whatever the predecessor was in the middle of, every vCPU is stopped first. The workers are given the slots
    and the tracking that the journal has, and what they have logged is reaped."""
    if switch.unfinished(core.parts, core.vcpus):
        # The vCPUs stand still. They stay so with what is set here, until they are resumed.
        core.vcpus.pause(core.vcpus.all)
        switch.align_workers(core.parts, core.vcpus)
    elif core.spec.can.kernel_ring:
        core.vcpus.adopt_fds(core.live)
    core.vcpus.pause_all()
    hotplug.tell_slots(core)
    if core.parts.ring_entries:
        core.reaper.full.update(s.index for s in core.vcpus.all)
    core.reaper.drain()


def _leave_alone(core: Core) -> None:
    """Post-copy on a software CPU: a vCPU that waits for a page does nothing else, for as long as that takes. Nor
    can the predecessor have been in the middle of anything that concerns them, but a pause."""
    core.vcpus.expect_paused()
    core.reaper.full.update(s.index for s in core.vcpus.all
                            if s.control.state in (VcpuState.RING_FULL, VcpuState.IN_CALL))


def _sweep(core: Core, known: set[str]) -> None:
    """Unlink what is not in use: segments that a predecessor had made and not written down, or struck out and not
    removed."""
    for name in list_segments(machine_prefix(core.spec.name)):
        if name not in known:
            unlink_segment(name)
            step("take-over-swept")
