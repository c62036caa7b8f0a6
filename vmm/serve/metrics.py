"""The metrics: names, types and where each value comes from. docs/metrics.md is made of this table.

Names follow Prometheus' conventions (https://prometheus.io/docs/practices/naming/): base units, ``_total`` for what is
counted, ``_ratio`` from 0 to 1. Labels are few and bounded: a machine has at most 256 vCPUs and 500 slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ipc.layout import VcpuState
from ipc.shm import PAGE_SIZE

from ..consumers.stats import Sample

__all__ = ["METRICS", "UP", "Metric", "Value", "table"]

#: The values of a metric's labels after the machine's name, and its value. Of ``info``, the value is 1.
Value = tuple[tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class Metric:
    """``name``: without what OpenMetrics adds (``_total``, ``_info``). ``labels``: after ``machine``."""

    name: str
    kind: Literal["counter", "gauge", "info"]
    labels: tuple[str, ...]
    help: str
    values: Callable[[Sample], Iterator[Value]]

    @property
    def full_name(self) -> str:
        """As Prometheus stores it."""
        return self.name + {"counter": "_total", "gauge": "", "info": "_info"}[self.kind]


def _report(of: Callable[[dict[str, Any]], float | None]) -> Callable[[Sample], Iterator[Value]]:
    """One value of the report, or none."""
    def values(sample: Sample) -> Iterator[Value]:
        value = of(sample.report)
        if value is not None:
            yield (), float(value)

    return values


def _each(what: str, key: str, of: Callable[[dict[str, Any]], float | None]) -> Callable[[Sample], Iterator[Value]]:
    """A value for each of the report's vCPUs or slots."""
    def values(sample: Sample) -> Iterator[Value]:
        for each in sample.report[what]:
            value = of(each)
            if value is not None:
                yield (str(each[key]),), float(value)

    return values


def _vcpu(name: str, kind: Literal["counter", "gauge"], text: str,
          of: Callable[[dict[str, Any]], float | None]) -> Metric:
    return Metric(f"shardvmm_vcpu_{name}", kind, ("vcpu",), text, _each("vcpus", "index", of))


def _slot(name: str, text: str, of: Callable[[dict[str, Any]], float | None]) -> Metric:
    return Metric(f"shardvmm_slot_{name}", "gauge", ("slot",), text, _each("slots", "id", of))


def _migration(name: str, text: str, of: Callable[[Any], float | None]) -> Metric:
    def values(sample: Sample) -> Iterator[Value]:
        found = sample.stats.migration
        value = None if found is None else of(found)
        if found is not None and value is not None:
            yield (found.direction,), float(value)

    return Metric(f"shardvmm_migration_{name}", "gauge", ("direction",), text, values)


def _info(sample: Sample) -> Iterator[Value]:
    report = sample.report
    yield (report["accelerator"], report["tracking"], report["coordinator"]["program"]), 1.0


def _states(sample: Sample) -> Iterator[Value]:
    counted = Counter(vcpu["state"] for vcpu in sample.report["vcpus"])
    for state in VcpuState:
        name = state.name.lower().replace("_", "-")
        yield (name,), float(counted[name])


def _fills(sample: Sample) -> Iterator[Value]:
    for vcpu in sample.stats.vcpus:
        if vcpu.ring_fill is not None:
            yield (str(vcpu.index),), vcpu.ring_fill


def _distinct(sample: Sample) -> Iterator[Value]:
    if sample.distinct_pages is not None:
        yield (), float(sample.distinct_pages * PAGE_SIZE)


def _snapshots(of: Callable[[Any], float]) -> Callable[[Sample], Iterator[Value]]:
    """The sum of all that are being taken; none while none is."""
    def values(sample: Sample) -> Iterator[Value]:
        if sample.stats.snapshots:
            yield (), float(sum(map(of, sample.stats.snapshots)))

    return values


#: Given for every machine, also for one that does not answer.
UP = Metric("shardvmm_machine_up", "gauge", (), "1 if the machine has answered, 0 if not.",
            lambda sample: iter([((), 1.0)]))

METRICS: tuple[Metric, ...] = (
    UP,
    Metric("shardvmm_machine", "info", ("accelerator", "tracking", "version"),
           "What the machine runs on, how it tracks dirty pages, and which version of this program it is of.", _info),
    Metric("shardvmm_machine_elapsed_seconds", "gauge", (), "Time since the machine was started.",
           _report(lambda r: r["elapsed_s"])),
    Metric("shardvmm_machine_paused", "gauge", (), "1 while somebody keeps the machine paused.",
           _report(lambda r: r["state"] == "paused")),
    Metric("shardvmm_machine_logging", "gauge", (),
           "1 while the vCPUs log what they write. While it is 0, what they dirty is not counted.",
           _report(lambda r: r["logging"])),
    Metric("shardvmm_machine_vcpus", "gauge", ("state",), "vCPUs in each state.", _states),
    Metric("shardvmm_machine_dirtied_bytes", "counter", (),
           "Distinct pages dirtied between two samples, summed up. Only with --dirty-rate. Its rate is the machine's "
           "dirty rate.", _distinct),
    Metric("shardvmm_coordinator_restarts", "counter", (), "Coordinators that have died and were replaced.",
           _report(lambda r: r["coordinator"]["restarts"])),
    _vcpu("dirtied_bytes", "counter", "Pages that this vCPU was the first to write since they were last protected.",
          lambda v: v["dirty_pages"] * PAGE_SIZE),
    _vcpu("guest_entries", "counter", "Times that the guest was entered (each ends with an exit).",
          lambda v: v["guest_entries"]),
    _vcpu("guest_seconds", "counter", "Time in the guest.", lambda v: v["guest_s"]),
    _vcpu("stalled_seconds", "counter", "Time out of the guest because the ring was full.", lambda v: v["stalled_s"]),
    _vcpu("throttled_seconds", "counter", "Time out of the guest because of the dirty limit.",
          lambda v: v["throttled_s"]),
    _vcpu("dirty_limit_bytes_per_second", "gauge", "The dirty limit; absent without one.",
          lambda v: v["dirty_limit_pages_per_s"] * PAGE_SIZE or None),
    Metric("shardvmm_vcpu_ring_fill_ratio", "gauge", ("vcpu",),
           "Share of the dirty ring's entries that are not free; absent without a ring.", _fills),
    _vcpu("ring_full_exits", "counter", "Exits because the ring was full.", lambda v: v["ring_full_exits"]),
    _vcpu("ring_resets", "counter", "Resets of the ring.", lambda v: v["resets"]),
    _vcpu("ring_reset_seconds", "counter", "Time in resets of the ring.", lambda v: v["reset_s"]),
    _vcpu("ring_rebuilds", "counter", "Rings replaced because their counts did not match.",
          lambda v: v["ring_rebuilds"]),
    _vcpu("bad_ring_entries", "counter", "Ring entries dropped because they name no page.",
          lambda v: v["bad_entries"]),
    Metric("shardvmm_reaper_iterations", "counter", (), "Reaps by the reaper itself (QEMU: reaper_iteration).",
           _report(lambda r: r["reaper"]["iterations"])),
    Metric("shardvmm_reaper_flushes", "counter", (), "Flushes of the dirty log that clients have asked for.",
           _report(lambda r: r["reaper"]["flushes"])),
    Metric("shardvmm_reaper_reap_seconds", "counter", (), "Time in reaps.",
           _report(lambda r: r["reaper"]["microseconds"] / 1e6)),
    Metric("shardvmm_reaper_interval_seconds", "gauge", (),
           "Time from one reap to the next, as chosen last; absent while nothing is reaped.",
           _report(lambda r: r["reaper"]["interval_s"])),
    _slot("size_bytes", "Size of the memory slot.", lambda s: s["size"]),
    _slot("dirty_bytes", "Pages of the slot that were dirtied since the last sync of any client.",
          lambda s: s["dirty"] * PAGE_SIZE),
    _slot("logging", "1 if what is written to the slot is logged whenever the machine logs.", lambda s: s["logged"]),
    _migration("rounds", "Rounds that the migration under way has completed.", lambda m: m.rounds),
    _migration("transferred_bytes", "Bytes that the migration under way has transferred.", lambda m: m.transferred),
    _migration("remaining_bytes", "Bytes that remain in this round of it.", lambda m: m.remaining),
    _migration("dirtied_bytes_per_second", "Dirty rate in its last round.",
               lambda m: m.dirty_pages_per_s * PAGE_SIZE),
    _migration("expected_downtime_seconds", "Downtime to expect if it ended now; absent while unknown.",
               lambda m: m.expected_downtime_s),
    Metric("shardvmm_snapshot_rounds", "gauge", (), "Rounds of copying that the snapshot under way has begun.",
           _snapshots(lambda s: s.rounds)),
    Metric("shardvmm_snapshot_copied_bytes", "gauge", (), "Bytes that the snapshot under way has copied.",
           _snapshots(lambda s: s.done)),
    Metric("shardvmm_snapshot_known_bytes", "gauge", (), "Bytes that it has to copy, as far as is known yet.",
           _snapshots(lambda s: s.total)),
)


def table() -> str:
    """The table of docs/metrics.md."""
    rows = [f"| `{m.full_name}` | {m.kind} | {', '.join(f'`{each}`' for each in ('machine', *m.labels))} | {m.help} |"
            for m in METRICS]
    return "\n".join(["| metric | type | labels | what it says |", "| --- | --- | --- | --- |", *rows]) + "\n"
