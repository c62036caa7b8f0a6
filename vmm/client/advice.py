"""Choices that work, but badly: what somebody should know before a machine is launched."""

from __future__ import annotations

import os
from collections.abc import Callable

from ipc.layout import RING_RESERVE
from ipc.shm import PAGE_SIZE
from workers.accel import registry

from ..machine.spec import MachineSpec
from .models import MachineConfig
from .origins import Problem

__all__ = ["advice"]


def advice(config: MachineConfig, spec: MachineSpec, *, sharing: bool = True) -> list[Problem]:
    """About a configuration and the machine that was planned from it; with the place of the key. ``sharing``: also that
    vCPUs share cores, which is often meant."""
    found: list[Problem] = []

    def note(key: str, text: str) -> None:
        found.extend(config.error(key, text).problems)

    cores = len(os.sched_getaffinity(0))
    if sharing and spec.can.guests and spec.program is None and spec.vcpus > cores:
        note("vcpus", f"{spec.vcpus} vCPUs share {cores} core{'s' if cores > 1 else ''}")
    if spec.privilege == "kernel" and registry.available(spec.accel).emulates_kernel:
        note("privilege", "kernel: this host's KVM has no hardware virtualisation and emulates CPL 0, about a million "
                          "instructions per second; user (CPL 3) runs natively")
    _note_ring(config, spec, note)
    return found


def _note_ring(config: MachineConfig, spec: MachineSpec, note: Callable[[str, str], None]) -> None:
    """A ring that fills up before it is reaped stops its vCPU each time."""
    room = spec.ring_entries - RING_RESERVE
    pages = sum(slot.pages for slot in spec.slots if slot.log)
    repeats = spec.replay is not None and spec.replay.repeat
    if not spec.ring_entries or (pages <= room and not repeats):
        return
    rate, what = _rate(spec)
    fixed = spec.reaper.mode == "fixed"
    interval = spec.reaper.interval if fixed else spec.reaper.min_interval
    bearable = max(0, room) / interval
    key = "dirty_ring_size" if config.dirty_ring_size != "auto" else "reaper"
    if rate > bearable:
        note(key, f"a ring of {spec.ring_entries} entries is full {rate * interval / max(1, room):.3g} times between "
                  f"two reaps ({interval * 1000:g} ms) at {what}: the vCPU waits each time; a larger ring"
                  f"{', a shorter interval or mode: adaptive' if fixed else ''} helps")
    elif fixed and not rate:
        note(key, f"a ring of {spec.ring_entries} entries that is reaped every {interval:g} s is full before that at "
                  f"more than {bearable:,.0f} pages/s ({bearable * PAGE_SIZE / 1e6:,.3g} MB/s): the vCPU waits then; "
                  "mode: adaptive reaps in time")


def _rate(spec: MachineSpec) -> tuple[float, str]:
    """Pages per second that a vCPU dirties at most, as far as that is known; 0: it is not."""
    if spec.replay is not None and spec.replay.rate:
        return spec.replay.rate, f"replay.rate {spec.replay.rate:g}"
    if spec.dirty_quota:
        return spec.dirty_quota, f"dirty_limit {spec.dirty_quota * PAGE_SIZE / 1e6:,.4g} MB/s"
    return 0.0, ""
