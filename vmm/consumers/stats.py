"""How a running machine is doing: samples of its counters, and rates between two of them. ``vmm stats``, ``vmm top``
and the metrics all look through this.

A sample asks the coordinator one question (``Machine.status``), which it answers from its control blocks. Nothing
changes by it: no client of the dirty log is registered, so a machine that does not log (``log: auto``, and nobody needs
it) does not begin to, and how fast it dirties memory is not known then (None).

With ``dirty_rate`` a sampler has a client of its own and flushes at each sample. So the machine logs, and every page
that is written between two samples counts, once. Without, a page counts when it is first written after its last
reset, and when that was is up to others (docs/decisions/0019).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import dataclass
from typing import Any

import msgspec

from ipc.shm import PAGE_SIZE

from ..client.machine import Machine
from ..errors import ExitCode, VmmError
from ..machine.records import now

__all__ = ["MigrationStats", "ReaperStats", "Sample", "Sampler", "SlotStats", "SnapshotStats", "Stats", "VcpuStats",
           "stats_schema"]

VERSION = 1

_PATIENCE = 10.0        # seconds for a coordinator's answer
_CLOSING = 1.0          # and for one that is no longer of interest
_OVER = ("exited", "dead")

_numbers = itertools.count()


class VcpuStats(msgspec.Struct, frozen=True, kw_only=True):
    """One vCPU: counts since its start; rates and shares (0 to 1, of the time) since the last sample."""

    index: int
    accelerator: str            # system: that of a Linux program
    state: str
    exits: int                  # times the guest was left
    exits_per_s: float | None
    dirty_pages: int
    dirty_pages_per_s: float | None     # None: not logged
    ring_fill: float | None     # of the ring's entries, those that are not free (0 to 1); None: without a ring
    ring_full_exits: int
    ring_full_exits_per_s: float | None
    stalled: float | None       # at ring-full
    throttled: float | None     # for its dirty limit
    dirty_limit_pages_per_s: int | None     # None: no limit


class ReaperStats(msgspec.Struct, frozen=True, kw_only=True):
    """The reaper; as above."""

    mode: str                   # adaptive, fixed
    state: str                  # NONE, WAIT, REAPING
    iterations: int
    iterations_per_s: float | None
    interval_s: float | None    # that it has chosen; None: it does not reap now
    reap_s: float | None        # one reap, on average since the last sample; None: there was none
    reaping: float | None       # share of the time
    flushes: int


class SlotStats(msgspec.Struct, frozen=True, kw_only=True):
    """One memory slot."""

    id: int
    size: int                   # bytes
    pages: int
    dirty: int                  # pages dirtied since the clients' last sync
    logged: bool


class MigrationStats(msgspec.Struct, frozen=True, kw_only=True):
    """A migration under way (vmm/consumers/migration/report.py)."""

    direction: str              # outgoing, incoming
    status: str
    peer: str                   # address
    rounds: int                 # complete ones
    elapsed_s: float
    transferred: int            # bytes
    remaining: int              # bytes of this round
    dirty_pages_per_s: int      # in the last round
    expected_downtime_s: float | None   # None: not known yet


class SnapshotStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot that is being taken (vmm/consumers/snapshot/underway.py)."""

    pid: int
    directory: str
    rounds: int                 # the one under way among them; 0: it has not begun to copy
    done: int                   # bytes
    total: int                  # bytes, as far as is known yet


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """One sample. Rates are over ``seconds``, and None in the first."""

    version: int = VERSION
    name: str
    time: str                   # ISO 8601, UTC
    state: str                  # ready, running, paused, ended
    elapsed_s: float            # since the machine's start
    seconds: float              # since the last sample
    tracking: str
    logging: bool
    ring_entries: int           # of each vCPU; 0: without rings
    exits_per_s: float | None   # of all vCPUs
    dirty_pages_per_s: float | None     # entries of all rings; None: not logged
    distinct_pages_per_s: float | None  # pages written since the last sample, each once; None: not measured
    ring_full_exits_per_s: float | None
    stalled: float | None       # share of the time, on average over the vCPUs that have not ended
    throttled: float | None
    vcpus: list[VcpuStats]
    reaper: ReaperStats
    slots: list[SlotStats]
    migration: MigrationStats | None
    snapshots: list[SnapshotStats]


@dataclass(frozen=True, slots=True)
class Sample:
    """``report``: all that the coordinator has said (vmm/machine/report.py). ``distinct_pages``: pages written between
    two samples, summed up since the first; None: not measured."""

    stats: Stats
    report: dict[str, Any]
    distinct_pages: int | None


class Sampler:
    """Samples of one machine, for one thread. ``dirty_rate`` may be changed between two. ``timeout``: seconds for each
    answer of its coordinator. Close it."""

    def __init__(self, machine: Machine, *, dirty_rate: bool = False, timeout: float = _PATIENCE) -> None:
        self.machine = machine
        self.dirty_rate = dirty_rate
        self._timeout = timeout
        self._client = ""               # of the dirty log; it may have been asked for, and not answered
        self._gathers = False           # it has been flushed for
        self._distinct = self._sampled = 0      # pages: of all flushes, and of those up to the last sample
        self._before: dict[str, Any] | None = None

    def sample(self) -> Sample:
        """Raises VmmError when the machine is gone, or has not answered in time."""
        measured = self._flush()
        report = self.machine.status(self._timeout)
        before, self._before = self._before, report
        distinct = self._distinct - self._sampled if measured else None
        self._sampled = self._distinct
        return Sample(_stats(report, before, distinct, _underway(report)), report,
                      self._distinct if self.dirty_rate else None)

    def _flush(self) -> bool:
        """Pages dirtied since the last time are counted; False: not measured, or not now (while a machine is arriving,
        say). Raises VmmError as ``sample`` does."""
        if not self.dirty_rate:
            self.close()
            return False
        self._client = self._client or f"stats_{os.getpid()}_{next(_numbers)}"
        try:
            if not self._gathers:
                self.machine.register(self._client, mine=True, timeout=self._timeout)
            pages = self.machine.take(self._client, self._timeout)
        except VmmError as exc:
            if exc.exit_code is ExitCode.NO_MACHINE:
                raise
            self.close()
            return False
        before, self._gathers = self._gathers, True
        self._distinct += pages if before else 0
        return before

    def close(self) -> None:
        """The machine logs for it no longer: at the latest when this process ends, where its coordinator does not
        answer. Idempotent."""
        client, self._client, self._gathers = self._client, "", False
        if client:
            with contextlib.suppress(VmmError):     # with the machine, it has gone
                self.machine.unregister(client, min(self._timeout, _CLOSING))


def stats_schema() -> dict[str, Any]:
    """JSON schema of ``Stats``."""
    return msgspec.json.schema(Stats)


def _stats(report: dict[str, Any], before: dict[str, Any] | None, distinct: int | None,
           underway: tuple[MigrationStats | None, list[SnapshotStats]]) -> Stats:
    """``distinct``: pages since the last sample."""
    since = _Since(report, before)
    vcpus = [_vcpu(report, since, each) for each in report["vcpus"]]
    live = [each for each in vcpus if each.state not in _OVER]
    return Stats(
        name=report["name"], time=now(), state=report["state"], elapsed_s=report["elapsed_s"], seconds=since.seconds,
        tracking=report["tracking"], logging=report["logging"], ring_entries=report["ring_entries"],
        exits_per_s=_sum([v.exits_per_s for v in vcpus]), dirty_pages_per_s=_sum([v.dirty_pages_per_s for v in vcpus]),
        distinct_pages_per_s=distinct / since.seconds if distinct is not None and since.seconds else None,
        ring_full_exits_per_s=_sum([v.ring_full_exits_per_s for v in vcpus]),
        stalled=_mean([v.stalled for v in live]), throttled=_mean([v.throttled for v in live]),
        vcpus=vcpus, reaper=_reaper(report, since),
        slots=[SlotStats(id=s["id"], size=s["size"], pages=s["pages"], dirty=s["dirty"], logged=s["logged"])
               for s in report["slots"]],
        migration=underway[0], snapshots=underway[1])


class _Since:
    """From one report to the next, by the coordinator's own clock. ``logged``: throughout."""

    def __init__(self, report: dict[str, Any], before: dict[str, Any] | None) -> None:
        self.seconds = 0.0 if before is None else max(0.0, report["elapsed_s"] - before["elapsed_s"])
        self.before = before
        self.logged = before is not None and before["logging"] and report["logging"]
        self._vcpus = {} if before is None else {v["index"]: v for v in before["vcpus"]}

    def rate(self, now: dict[str, Any], before: dict[str, Any] | None, key: str) -> float | None:
        """Of what is counted, per second; None: not known. (Counts begin anew in a machine that was upgraded.)"""
        if not self.seconds or before is None:
            return None
        return max(0.0, float(now[key] - before[key])) / self.seconds

    def vcpu(self, now: dict[str, Any], key: str) -> float | None:
        return self.rate(now, self._vcpus.get(now["index"]), key)

    def share(self, now: dict[str, Any], key: str) -> float | None:
        """Of the time, in seconds that are counted when they are over: so they may come late, and all at once."""
        rate = self.vcpu(now, key)
        return None if rate is None else min(1.0, rate)


def _vcpu(report: dict[str, Any], since: _Since, vcpu: dict[str, Any]) -> VcpuStats:
    entries = report["ring_entries"]
    return VcpuStats(
        index=vcpu["index"], accelerator=vcpu["accelerator"], state=vcpu["state"], exits=vcpu["guest_entries"],
        exits_per_s=since.vcpu(vcpu, "guest_entries"), dirty_pages=vcpu["dirty_pages"],
        dirty_pages_per_s=since.vcpu(vcpu, "dirty_pages") if since.logged else None,
        ring_fill=vcpu["ring_used"] / entries if entries else None, ring_full_exits=vcpu["ring_full_exits"],
        ring_full_exits_per_s=since.vcpu(vcpu, "ring_full_exits"), stalled=since.share(vcpu, "stalled_s"),
        throttled=since.share(vcpu, "throttled_s"), dirty_limit_pages_per_s=vcpu["dirty_limit_pages_per_s"] or None)


def _reaper(report: dict[str, Any], since: _Since) -> ReaperStats:
    reaper = report["reaper"]
    before = since.before and since.before["reaper"]
    busy = since.rate(reaper, before, "microseconds")
    counts = [since.rate(reaper, before, key) for key in ("iterations", "flushes")]
    reaps = _sum(counts)
    return ReaperStats(
        mode=reaper["mode"], state=reaper["state"], iterations=reaper["iterations"], iterations_per_s=counts[0],
        interval_s=reaper["interval_s"], reap_s=busy / 1e6 / reaps if busy and reaps else None,
        reaping=None if busy is None else min(1.0, busy / 1e6), flushes=reaper["flushes"])


def _sum(values: list[float | None]) -> float | None:
    """None where one is not known, and of none."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _mean(values: list[float | None]) -> float | None:
    total = _sum(values)
    return None if total is None else total / len(values)


def _underway(report: dict[str, Any]) -> tuple[MigrationStats | None, list[SnapshotStats]]:
    """What the processes that have a lease of the machine say of what they do. Nothing is looked up without one."""
    migration, snapshots = None, []
    for holder in report["holders"]:
        kind = holder["why"].partition(" ")[0] if holder["what"] == "lease" else ""
        if kind == "snapshot":
            snapshots.append(_snapshot(report["name"], holder["pid"]))
        elif kind in ("migration", "incoming"):
            migration = _migration(report["name"])
    return migration, snapshots


def _snapshot(name: str, pid: int) -> SnapshotStats:
    from .snapshot.underway import snapshot_underway  # late: what copies pages takes long to import

    found = snapshot_underway(name, pid)
    if found is None:
        return SnapshotStats(pid=pid, directory="", rounds=0, done=0, total=0)
    return SnapshotStats(pid=pid, directory=found.directory, rounds=found.rounds,
                         done=found.done_pages * PAGE_SIZE, total=found.total_pages * PAGE_SIZE)


def _migration(name: str) -> MigrationStats | None:
    from .migration.report import OVER  # late, too
    from .migration.status import load_status

    try:
        found = load_status(name)
    except VmmError:        # it has not begun to tell
        return None
    if found["status"] in OVER:
        return None
    ram, downtime = found["ram"], found["expected_downtime"]
    return MigrationStats(
        direction=found["direction"], status=found["status"], peer=found["target"], rounds=len(found["rounds"]),
        elapsed_s=found["total_time"] / 1000, transferred=ram["transferred"], remaining=ram["remaining"],
        dirty_pages_per_s=ram["dirty_pages_rate"], expected_downtime_s=None if downtime is None else downtime / 1000)
