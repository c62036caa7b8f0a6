"""One point of a sweep: machines side by side, measured over a steady window, then proved.

Two runs. The first is without the verifier, whose rounds stop the guest: launch, warm-up, the timed window, and
after it flushes one by one while the guest runs on. The second has the verifier on, and proves that under the same
load no page is lost. Both runs end their machines, however they end.

A flush is timed at the client: the round trip of a sync (kick, reap, bitmaps to this client's own) less the median
round trip of a request that asks for nothing (to register a client that is registered).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ...client.machine import Machine
from ...errors import ExitCode, VmmError
from ...machine.spec import MachineSpec
from ..cluster.points import Stopped
from ..hoststat import CpuTime, cpu_time, pss_beyond_ram

__all__ = ["Figures", "Proof", "measure"]

_STEP = 0.05                # seconds between two looks at ``stop``
_ENTRY_TIMEOUT = 60.0       # seconds for every vCPU to enter the guest
_PROOF_ROUNDS = 3
_PROOF_TIMEOUT = 120.0
_END_TIMEOUT = 60.0
_CLIENT = "stress"
#: Seconds between flushes: short and long ones, so that they find few and many dirty pages.
_GAPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Figures:
    """One machine over the timed window. CPU shares in cores (1.0 is one core)."""

    seconds: float
    pages_per_s: float          # pages dirtied: ring entries of all vCPUs; distinct pages in bitmap mode
    reaped_per_s: float         # entries published by the reaper
    ring_full_exits: int
    ring_full_per_s: float
    stalled_share: float        # of the vCPUs' time in the guest and at ring-full
    stall_us: float             # mean of one ring-full exit, until re-entry
    resets: int
    reaps: int                  # the last one is the flush at the end of the window
    reap_us: float              # mean
    entries_per_reap: float
    coordinator_cpu: float
    coordinator_waited: float   # ready to run, without a core
    workers_cpu: float
    workers_waited: float
    launch_s: float             # from the call to the last vCPU's first guest entry
    worker_pss_mib: float       # the largest worker's, beyond guest RAM
    coordinator_pss_mib: float
    pss_mib: float              # coordinator and workers together
    empty_us: float             # median round trip of a request that asks for nothing
    #: (microseconds less ``empty_us``, dirty pages found) of each flush.
    flushes: list[tuple[float, int]]


@dataclass(frozen=True, slots=True)
class Proof:
    """What the verifier of one machine found."""

    rounds: int
    checked: int
    dirty: int
    lost: int
    surplus: int
    ok: bool
    findings: list[str]


class _Bench:
    """The machines of one run."""

    def __init__(self, stack: ExitStack, stop: Callable[[], bool]) -> None:
        self._stack = stack
        self._stop = stop
        self.machines: list[Machine] = []
        self.launch_s: list[float] = []

    def check(self) -> None:
        if self._stop():
            raise Stopped

    def sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, _STEP))
        self.check()

    def launch(self, specs: list[MachineSpec]) -> None:
        """One after the other; then all start together."""
        ready = []
        for spec in specs:
            self.check()
            began = time.perf_counter()
            self.machines.append(self._stack.enter_context(Machine.launch(spec, start=False)))
            ready.append(time.perf_counter() - began)
        began = time.perf_counter()
        for machine in self.machines:
            machine.start()
        deadline = time.monotonic() + _ENTRY_TIMEOUT
        for machine, took in zip(self.machines, ready, strict=True):
            while not all(v["guest_entries"] for v in machine.status()["vcpus"]):
                self.check()
                if time.monotonic() > deadline:
                    raise VmmError(f"machine '{machine.name}': not every vCPU entered the guest within "
                                   f"{_ENTRY_TIMEOUT:.0f} s", ExitCode.TIMEOUT)
                time.sleep(0.001)
            self.launch_s.append(took + time.perf_counter() - began)

    def statuses(self) -> list[dict[str, Any]]:
        """Raises VmmError when a machine has ended: its load was to go on."""
        found = [m.status() for m in self.machines]
        for status in found:
            if status["state"] == "ended":
                ends = {f"{v['exit_reason']} {v['detail']}".strip() for v in status["vcpus"]}
                raise VmmError(f"the machine ended during the measurement: {', '.join(sorted(ends))}",
                               ExitCode(status["exit_code"] or ExitCode.GUEST_FAILED))
        return found


@dataclass(frozen=True, slots=True)
class _Sample:
    """A machine's totals at one moment."""

    at: float
    status: dict[str, Any]
    coordinator: CpuTime
    workers: CpuTime

    def total(self, key: str) -> float:
        return sum(v[key] for v in self.status["vcpus"])


def measure(specs: list[MachineSpec], proof_specs: list[MachineSpec], *, seconds: float, warm_up: float,
            flushes: int, stop: Callable[[], bool], progress: Callable[[str], None],
            ) -> tuple[list[Figures], list[Proof]]:
    """Figures of the machines ``specs`` side by side, and what their verifiers find (``proof_specs``; may be
    empty). Raises VmmError, Stopped; nothing is left behind."""
    with ExitStack() as stack:
        bench = _Bench(stack, stop)
        progress("launching")
        bench.launch(specs)
        progress("warming up")
        bench.sleep(warm_up)
        progress("measuring")
        figures = _window(bench, seconds, flushes, progress)
    progress("verifying")
    return figures, _prove(proof_specs, seconds, stop)


def _window(bench: _Bench, seconds: float, flushes: int, progress: Callable[[str], None]) -> list[Figures]:
    for machine in bench.machines:
        machine.register(_CLIENT, mine=True)
    # A flush at either end: what was dirtied in the window is counted in it, however seldom the reaper comes.
    for machine in bench.machines:
        machine.take(_CLIENT)
    before = _samples(bench)
    bench.sleep(seconds)
    distinct = [m.take(_CLIENT) for m in bench.machines]
    after = _samples(bench)
    progress("flushing")
    timed = _flushes(bench, flushes)
    memory = [_memory(s) for s in bench.statuses()]
    return [_figures(*each) for each in zip(before, after, distinct, bench.launch_s, memory, timed, strict=True)]


def _samples(bench: _Bench) -> list[_Sample]:
    found = []
    for status in bench.statuses():
        try:
            coordinator = cpu_time(status["coordinator"]["pid"])
            workers = sum((cpu_time(v["pid"]) for v in status["vcpus"]), CpuTime(0.0, 0.0))
        except OSError as exc:
            raise VmmError(f"a process of machine '{status['name']}' ended during the measurement ({exc})",
                           ExitCode.WORKER_DIED) from None
        found.append(_Sample(time.monotonic(), status, coordinator, workers))
    return found


def _flushes(bench: _Bench, count: int) -> list[tuple[float, list[tuple[float, int]]]]:
    """Of each machine: median empty round trip (us), and its flushes. In turns over the machines."""
    empty: list[list[float]] = [[] for _ in bench.machines]
    found: list[list[tuple[float, int]]] = [[] for _ in bench.machines]
    for machine in bench.machines:
        machine.take(_CLIENT)
    for gap in itertools.islice(itertools.cycle(_GAPS), count):
        bench.sleep(gap)
        for i, machine in enumerate(bench.machines):
            began = time.perf_counter()
            machine.register(_CLIENT, mine=True)
            middle = time.perf_counter()
            pages = machine.take(_CLIENT)
            empty[i].append((middle - began) * 1e6)
            found[i].append(((time.perf_counter() - middle) * 1e6, pages))
    out = []
    for trips, flushes in zip(empty, found, strict=True):
        empty_us = statistics.median(trips) if trips else 0.0
        out.append((empty_us, [(us - empty_us, pages) for us, pages in flushes]))
    return out


def _memory(status: dict[str, Any]) -> tuple[float, float, float]:
    """MiB beyond guest RAM: the largest worker, the coordinator, all together."""
    try:
        workers = [pss_beyond_ram(v["pid"]) / _MIB for v in status["vcpus"]]
        coordinator = pss_beyond_ram(status["coordinator"]["pid"]) / _MIB
    except OSError as exc:
        raise VmmError(f"a process of machine '{status['name']}' ended during the measurement ({exc})",
                       ExitCode.WORKER_DIED) from None
    return max(workers), coordinator, sum(workers) + coordinator


def _figures(before: _Sample, after: _Sample, distinct: int, launch_s: float,
             memory: tuple[float, float, float], timed: tuple[float, list[tuple[float, int]]]) -> Figures:
    seconds = after.at - before.at

    def grown(key: str) -> float:
        return after.total(key) - before.total(key)

    def reaper(key: str) -> int:
        return int(after.status["reaper"][key] - before.status["reaper"][key])

    pages = grown("dirty_pages") if after.status["tracking"] == "ring" else float(distinct)
    full = int(grown("ring_full_exits"))
    stalled, inside = grown("stalled_s"), _inside(before, after)
    reaps = reaper("iterations") + 1    # and the flush at the end
    coordinator, workers = after.coordinator - before.coordinator, after.workers - before.workers
    return Figures(
        seconds=seconds, pages_per_s=pages / seconds, reaped_per_s=reaper("pages") / seconds, ring_full_exits=full,
        ring_full_per_s=full / seconds, stalled_share=stalled / (stalled + inside) if stalled else 0.0,
        stall_us=stalled * 1e6 / full if full else 0.0, resets=int(grown("resets")), reaps=reaps,
        reap_us=reaper("microseconds") / reaps, entries_per_reap=reaper("pages") / reaps,
        coordinator_cpu=coordinator.used / seconds, coordinator_waited=coordinator.waited / seconds,
        workers_cpu=workers.used / seconds, workers_waited=workers.waited / seconds, launch_s=launch_s,
        worker_pss_mib=memory[0], coordinator_pss_mib=memory[1], pss_mib=memory[2], empty_us=timed[0],
        flushes=timed[1])


def _inside(before: _Sample, after: _Sample) -> float:
    """Seconds that the vCPUs were in the guest, or ready to be: the window, less their waits. (``guest_s`` counts
    when the guest is left, which one that meets no full ring never does.)"""
    waits = sum(after.total(k) - before.total(k) for k in ("stalled_s", "throttled_s"))
    return max(0.0, (after.at - before.at) * len(after.status["vcpus"]) - waits)


def _prove(specs: list[MachineSpec], seconds: float, stop: Callable[[], bool]) -> list[Proof]:
    """Run with the verifier for half the window, and some rounds at least."""
    if not specs:
        return []
    with ExitStack() as stack:
        bench = _Bench(stack, stop)
        bench.launch(specs)
        began = time.monotonic()
        bench.sleep(seconds / 2)
        while not all(s["verification"]["rounds"] >= _PROOF_ROUNDS for s in bench.statuses()):
            if time.monotonic() - began > _PROOF_TIMEOUT:
                raise VmmError(f"the verifier did not complete {_PROOF_ROUNDS} rounds within {_PROOF_TIMEOUT:.0f} "
                               "s", ExitCode.TIMEOUT)
            bench.sleep(_STEP)
        reports = []
        for machine in bench.machines:
            machine.stop()
        for machine in bench.machines:
            reports.append(machine.wait(_END_TIMEOUT)["verification"])
        return [Proof(r["rounds"], r["checked_pages"], r["dirty_pages"], r["lost_pages"], r["surplus_pages"],
                      r["ok"], r["first_findings"]) for r in reports]
