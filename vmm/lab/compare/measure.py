"""Which mode of dirty tracking is best when: the same guest under each of them, in turn.

A point of the grid is one machine: RAM, vCPUs, dirtying rate (pauses of the guest after each write), ring size,
sync interval. It runs on while the mode of dirty tracking is switched, A B C … C B A …, a window of time each; so
what is compared ran in the same memory, seconds apart. In a window a client syncs at the interval.

==================  ==========================================================================================
``speed``           writes of the guest in the window, of all vCPUs, per second. Counted in its memory (the guest
                    raises a word in each page that it writes), not by any log. Steal time, in which vCPUs were
                    ready but other processes ran, is subtracted: what they waited beyond the processor time of
                    the machine's own other threads and this process (``steal``, a share of the time)
``relative``        ``speed`` divided by that of the same round's window without tracking
``lost_us``         guest-side cost of a dirty page: vCPU time that the window lost against the one without
                    tracking, microseconds, divided by the pages that its syncs reported
``host_us``         the other side's: processor time of the coordinator and the workers' service threads, the same
``collect_ms``      time of a sync as its client sees it, median; also for each MiB of RAM and for each dirty page
                    that it reported
``stale_ms``        a write is known after so long at worst: sync interval and time to collect
==================  ==========================================================================================

``sampling`` hashes some pages at the interval (vmm/consumers/rate.py), and has no log. What it reports is an
estimate of how many pages, not which; its processor time is the client's. ``idle`` is tracking with rings (or, where
there are none, bitmaps) while nobody needs a log (docs/decisions/0020): it differs from none by what is left then.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ipc.shm import PAGE_SIZE

from ...client.accelerators import choose_accelerator
from ...client.machine import Machine
from ...consumers.rate import measure as measure_rate
from ...errors import VmmError
from ...guests import WORKLOADS, resolve_params
from ...machine.spec import MachineSpec, RamSlot, ReaperSpec
from ...machine.trackings import check_tracking
from ..hoststat import CpuTime, thread_times

__all__ = ["FIXED", "MODES", "Grid", "Point", "Settings", "available", "run_point", "summarise"]

#: What is compared, in the order of a round (from one to the next as few pages as can be lose their mapping).
MODES = ("none", "sampling", "idle", "auto", "bitmap", "ring", "uffd")
#: Modes that have a dirty log and do not choose.
FIXED = ("ring", "bitmap", "uffd")

_MIB = 1 << 20
_SETTLE = 0.1           # seconds of a window before its clock starts, at least
_SETTLE_MAX = 3.0       # at most, where the guest takes up speed for so long
_TOUCHED = 0.98         # it has, when it has written this share of its pages
_SLOW = 20_000          # writes per second, of which to map each page anew takes a few per cent of the time
_STRANGERS_MAX = 0.15   # largest share of steal time in a window; above it, the window is measured again,
_TRIES = 3              # this many times in all
_IDLE_TIMEOUT = 20.0    # seconds until a log that nobody needs is switched off
_CLIENT = "compare"
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Point:
    """One machine of the grid."""

    ram_mib: int
    vcpus: int
    spin: int           # pauses after each write: the dirtying rate
    ring: int           # entries
    interval_ms: float  # between two syncs

    @property
    def label(self) -> str:
        return (f"{self.ram_mib} MiB, {self.vcpus} vCPU{'s' if self.vcpus > 1 else ''}, spin {self.spin}, "
                f"ring {self.ring}, every {self.interval_ms:g} ms")


@dataclass(frozen=True, slots=True)
class Grid:
    """Axes. Every RAM size and rate at the first of all else; the other vCPU counts at the second RAM size, the
    other intervals at the first and the last, the other ring sizes (against no tracking) at the first; each with
    every rate."""

    ram_mib: Sequence[int] = (64, 512, 2048)
    vcpus: Sequence[int] = (1, 2)
    spin: Sequence[int] = (0, 200, 5000)
    ring: Sequence[int] = (4096, 1024, 65536)
    interval_ms: Sequence[float] = (100.0, 10.0)

    def points(self) -> Iterator[tuple[Point, tuple[str, ...]]]:
        """Each point, and what to compare there."""
        for ram, spin in itertools.product(self.ram_mib, self.spin):
            yield Point(ram, self.vcpus[0], spin, self.ring[0], self.interval_ms[0]), MODES
        for vcpus, spin in itertools.product(self.vcpus[1:], self.spin):
            yield Point(self.ram_mib[:2][-1], vcpus, spin, self.ring[0], self.interval_ms[0]), MODES
        for interval, ram, spin in itertools.product(self.interval_ms[1:], dict.fromkeys(
                (self.ram_mib[0], self.ram_mib[-1])), self.spin):
            yield Point(ram, self.vcpus[0], spin, self.ring[0], interval), MODES
        for ring, spin in itertools.product(self.ring[1:], self.spin):
            yield Point(self.ram_mib[0], self.vcpus[0], spin, ring, self.interval_ms[0]), ("none", "ring")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a comparison is measured, at each of its points."""

    accel: str = "auto"
    workload: str = "random"    # one whose writes raise a word: random, hotspot, sequential
    rounds: int = 5
    seconds: float = 0.5        # of a window


@dataclass(slots=True)
class Window:
    """What was measured in one window."""

    mode: str
    round: int
    speed: float                # writes per second
    seconds: float
    pages: int                  # dirty pages that the syncs reported
    syncs: int
    host_ns: int                # processor time of coordinator and service threads
    steal_ns: int           # steal time: vCPU threads were ready to run, but other processes ran
    collect_ms: list[float] = field(default_factory=list)
    switch_ms: float = 0.0      # the vCPUs stood still for so long to change to this mode
    tracking: str = ""          # as the machine has it (auto: what was chosen)


def available(modes: Sequence[str], accel: str) -> tuple[list[str], dict[str, str]]:
    """Those of these modes that this host has, and why not for the others."""
    there, missing = [], {}
    for mode in modes:
        try:
            if mode in FIXED:
                check_tracking(mode, accel, 4096)
            there.append(mode)
        except VmmError as exc:
            missing[mode] = str(exc)
    return there, missing


# --- one point --------------------------------------------------------------------------------------------


def run_point(point: Point, modes: Sequence[str], settings: Settings,
              progress: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """All windows of one point, as plain dictionaries. Raises VmmError."""
    def best_of(mode: str, number: int) -> Window:
        tries: list[Window] = []
        while len(tries) < _TRIES and (not tries or min(map(_steal, tries)) > _STRANGERS_MAX):
            tries.append(_window(machine, meter, mode, number, point, settings.seconds, idle))
        found = min(tries, key=_steal)
        if mode == "none" and not found.speed:
            raise VmmError(f"the guest did nothing in {settings.seconds:g} s without tracking, to which the rest is "
                           "compared: other programs use this host's processors (try a longer --window)")
        return found

    def _steal(window: Window) -> float:
        return window.steal_ns / 1e9 / window.seconds / point.vcpus

    windows: list[Window] = []
    idle = "ring" if available(["ring"], settings.accel)[0] else "bitmap"
    with Machine.launch(_spec(point, settings)) as machine:
        with contextlib.ExitStack() as stack:
            meter = stack.enter_context(_Meter(machine))
            # Once round, so that every page is there and every mode has been taken.
            for number in range(-1, settings.rounds):
                for mode in modes if number % 2 == 0 else reversed(modes):
                    progress(mode)
                    if number < 0:
                        _window(machine, meter, mode, number, point, 0.05, idle)
                    else:
                        windows.append(best_of(mode, number))
        machine.stop()
    return [asdict(w) for w in windows]


def _spec(point: Point, settings: Settings) -> MachineSpec:
    workload = WORKLOADS[settings.workload]
    wanted = {"spin": point.spin, ("passes" if settings.workload == "sequential" else "writes"): 0}
    return MachineSpec(
        name=f"compare-{os.getpid()}-{next(_numbers)}", accel=choose_accelerator(settings.accel), vcpus=point.vcpus,
        privilege="user", ring_entries=point.ring, slots=[RamSlot(0, 0, point.ram_mib * _MIB)],
        image=str(workload.image), load_address=None, params=resolve_params(settings.workload, wanted), cmdline="",
        stack_size=16384, reaper=ReaperSpec(), verify=None, timeout=None, trace=[], trace_file="", tracking="none",
        linger=True)


def _window(machine: Machine, meter: _Meter, mode: str, number: int, point: Point, seconds: float,
            idle: str) -> Window:
    """``idle``: the mode of tracking that is idle in ``idle``."""
    logged = mode in (*FIXED, "auto")
    switch = machine.set_tracking(mode if logged else idle if mode == "idle" else "none")
    interval = point.interval_ms / 1000
    if logged:
        machine.register(_CLIENT, mine=True)
        machine.collect(_CLIENT)
    if logged:
        end = time.monotonic() + max(_SETTLE, 1.5 * interval)
        while time.monotonic() < end:
            time.sleep(min(interval, max(0.0, end - time.monotonic())))
            machine.collect(_CLIENT)
    else:
        _log_ends(machine)
        meter.settle()
    window = Window(mode, number, 0.0, 0.0, 0, 0, 0, 0, switch_ms=switch["seconds"] * 1000)
    before = meter.read()
    began = before.at
    due = began
    while time.monotonic() < began + seconds:
        due = max(due + interval, time.monotonic())
        if mode == "sampling":
            rate = measure_rate(machine, max(interval, 0.05), "sampling")
            window.collect_ms.append((rate.seconds - max(interval, 0.05)) * 1000)
            window.pages += rate.pages
            continue
        time.sleep(max(0.0, min(due, began + seconds) - time.monotonic()))
        if logged and time.monotonic() >= due:
            asked = time.perf_counter()
            window.pages += sum(machine.collect(_CLIENT).values())
            window.collect_ms.append((time.perf_counter() - asked) * 1000)
    after = meter.read()
    window.syncs = len(window.collect_ms)
    window.seconds = after.at - before.at
    own_ns = after.own_ns - before.own_ns
    window.host_ns = after.host_ns - before.host_ns
    window.steal_ns = max(0, after.waited_ns - before.waited_ns - window.host_ns - own_ns)
    there = max(0.05, window.seconds - window.steal_ns / 1e9 / point.vcpus)
    window.speed = (after.writes - before.writes) / there
    if mode == "sampling":
        window.host_ns += own_ns
    window.tracking = machine.status()["tracking"]
    if logged:
        machine.unregister(_CLIENT)
    return window


def _log_ends(machine: Machine) -> None:
    """Raises VmmError."""
    deadline = time.monotonic() + _IDLE_TIMEOUT
    while machine.status()["logging"]:
        if time.monotonic() > deadline:
            raise VmmError(f"machine '{machine.name}': its log was not switched off within {_IDLE_TIMEOUT:.0f} s, "
                           "though nobody needs it")
        time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class _Reading:
    at: float
    writes: int
    host_ns: int
    waited_ns: int
    own_ns: int


class _Meter:
    """What the guest has done, and what processor time it took, from outside."""

    def __init__(self, machine: Machine) -> None:
        status = machine.status()
        self._coordinator = status["coordinator"]["pid"]
        self._workers = [v["pid"] for v in status["vcpus"]]
        # The word that the guest raises is the first of a page; image, stacks and tables do not change.
        self._words = machine.ram(0).view(np.uint64).reshape(-1, PAGE_SIZE // 8)[:, 0]

    def read(self) -> _Reading:
        """The count takes milliseconds for each 256 MiB, as long at a window's end as at its beginning."""
        at = time.monotonic()
        writes = int(self._words.sum())
        host = sum(times.used for _, times in _threads(self._coordinator))
        waited = 0.0
        for pid in self._workers:
            for thread, times in _threads(pid):
                if thread == pid:
                    waited += times.waited
                else:
                    host += times.used
        return _Reading(at, writes, int(host * 1e9), int(waited * 1e9), time.process_time_ns())

    def settle(self) -> None:
        """Wait while the guest takes up speed: after a switch its pages are mapped one by one. Not for a slow one,
        which would take too long and loses little."""
        began = time.monotonic()
        before = self._words.copy()
        while (passed := time.monotonic() - began) < _SETTLE_MAX:
            time.sleep(_SETTLE)
            written = self._words - before
            speed = float(written.sum()) / (passed + _SETTLE)
            if np.count_nonzero(written) > _TOUCHED * len(written) or speed < _SLOW:
                return

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._words     # a view keeps the memory mapped


def _threads(pid: int) -> Iterator[tuple[int, CpuTime]]:
    """Of each thread of the process. Raises VmmError when it is gone."""
    try:
        yield from thread_times(pid)
    except OSError:
        raise VmmError(f"process {pid} of the machine ended during the measurement") from None


# --- what it comes to ----------------------------------------------------------------------------------------


def summarise(point: Point, windows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per mode: medians over the rounds, spread as lowest and highest. Ratios are of windows of one round."""
    by_mode: dict[str, dict[int, dict[str, Any]]] = {}
    for w in windows:
        by_mode.setdefault(w["mode"], {})[w["round"]] = w
    base = by_mode["none"]
    rows = []
    for mode, rounds in by_mode.items():
        relative = {n: w["speed"] / base[n]["speed"] for n, w in rounds.items()}
        collect = [ms for w in rounds.values() for ms in w["collect_ms"]]
        median_ms = statistics.median(collect) if collect else None
        per_sync = [w["pages"] / w["syncs"] for w in rounds.values() if w["syncs"]]
        rows.append({
            **asdict(point), "mode": mode, "tracking": sorted({w["tracking"] for w in rounds.values()}),
            "speed": statistics.median(w["speed"] for w in rounds.values()),
            "relative": statistics.median(relative.values()),
            "relative_low": min(relative.values()), "relative_high": max(relative.values()),
            "dirty_per_s": statistics.median(w["pages"] / w["seconds"] for w in rounds.values()),
            "dirty_per_sync": statistics.median(per_sync) if per_sync else None,
            "lost_us": _per_page(rounds, {n: (1 - relative[n]) * w["seconds"] * point.vcpus * 1e6
                                          for n, w in rounds.items()}),
            "host_us": _per_page(rounds, {n: w["host_ns"] / 1000 for n, w in rounds.items()}),
            "host_cpu": statistics.median(w["host_ns"] / 1e9 / w["seconds"] for w in rounds.values()),
            "steal": statistics.median(w["steal_ns"] / 1e9 / w["seconds"] / point.vcpus
                                           for w in rounds.values()),
            "collect_ms": median_ms, "collect_ms_high": max(collect, default=None),
            "collect_us_per_mib": median_ms * 1000 / point.ram_mib if median_ms is not None else None,
            "collect_us_per_page": (median_ms * 1000 / max(1.0, statistics.median(per_sync))
                                    if median_ms is not None else None),
            "stale_ms": (point.interval_ms + median_ms) if median_ms is not None else None,
            "switch_ms": statistics.median(w["switch_ms"] for w in rounds.values()),
        })
    _judge(rows, by_mode)
    return rows


def _per_page(rounds: dict[int, dict[str, Any]], cost: dict[int, float]) -> float | None:
    values = [cost[n] / w["pages"] for n, w in rounds.items() if w["pages"]]
    return statistics.median(values) if values else None


def _judge(rows: list[dict[str, Any]], by_mode: dict[str, dict[int, dict[str, Any]]]) -> None:
    """To the row of ``auto``: the fixed mode that was fastest here, and how fast auto was compared with it (windows
    of one round, median)."""
    fixed = [r for r in rows if r["mode"] in FIXED]
    for row in rows:
        if row["mode"] == "auto" and fixed:
            best = max(fixed, key=lambda r: r["relative"])["mode"]
            row["best_fixed"] = best
            row["of_best"] = statistics.median(w["speed"] / by_mode[best][n]["speed"]
                                               for n, w in by_mode["auto"].items())
