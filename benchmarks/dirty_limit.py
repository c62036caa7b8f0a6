"""The dirty limit, and the dirty rate as it is measured: how exact they are.
``python -m benchmarks dirty_limit [--accel kvm] [--plot FILE]``

* **off the limit**: by how much the rate of a limited vCPU that walks over its memory at full speed differs from
  its limit, a second and a half long, half a second after it was set; in per cent.
* **held back below the limit**: how long a vCPU that dirties a tenth of what it may is kept out of the guest.
* **off the guest's own count**: by how much ``vmm dirty-rate`` differs from what the guest has counted; in per
  cent.

With ``--plot``: one limit after another over time, another vCPU left alone; printed for each step, and drawn.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vmm.client.accelerators import choose_accelerator
from vmm.client.machine import Machine
from vmm.consumers.rate import measure
from vmm.errors import VmmError
from vmm.guests import WORKLOADS, resolve_params
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec

from .common import Targets, arguments_parser

NAME = "dirty_limit"
PAGE = 4096
SAMPLE = 0.25       # seconds
QUOTAS = (0, 100, 10, 1, 400, 1000, 50, 0)      # MB/s; 0: none


def machine_spec(accel: str, ring: int) -> MachineSpec:
    return MachineSpec(
        name="bench-dirty-limit", accel=accel, vcpus=2, privilege="user", ring_entries=ring,
        slots=[RamSlot(0, 0, 512 << 20)], image=str(WORKLOADS["sequential"].image), load_address=None,
        params=resolve_params("sequential", {"passes": 0}), cmdline="sequential", stack_size=16384,
        reaper=ReaperSpec(), verify=None, timeout=None, trace=[], trace_file="", log="always", linger=True)


def run(accel: str, ring: int, seconds: float) -> list[tuple[float, float, float, float]]:
    """(time, quota, vCPU 0, vCPU 1) in seconds and MB/s."""
    found = []
    with Machine.launch(machine_spec(accel, ring)) as machine:
        machine.register("bench", mine=True)

        def entries() -> tuple[float, list[int]]:
            machine.sync("bench")
            return time.monotonic(), [v["dirty_pages"] for v in machine.status()["vcpus"]]

        began, before = entries()
        last = began
        for quota in QUOTAS:
            machine.dirty_limit(round(quota * 1e6 / PAGE), 0)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(SAMPLE)
                now, counts = entries()
                rates = [(n - o) * PAGE / 1e6 / (now - last) for n, o in zip(counts, before, strict=True)]
                found.append((now - began, float(quota), *rates))
                last, before = now, counts
    return found  # type: ignore[return-value]


def report(samples: list[tuple[float, float, float, float]]) -> None:
    steps: list[list[tuple[float, float, float, float]]] = [[]]
    for sample in samples:
        if steps[-1] and steps[-1][-1][1] != sample[1]:
            steps.append([])
        steps[-1].append(sample)
    for step in steps:
        rates = [s[2] for s in step[1:]]
        mean = statistics.fmean(rates)
        quota = step[0][1]
        off = f", {100 * (mean / quota - 1):+.1f} %" if quota else ""
        print(f"quota {quota:6.0f} MB/s: vCPU 0 {mean:8.1f}{off} (in {SAMPLE} s: {min(rates):.1f} to "
              f"{max(rates):.1f}); vCPU 1 {statistics.fmean(s[3] for s in step[1:]):8.1f}")


def calm_vcpu_loses(accel: str, rounds: int = 5) -> float:
    """Median ratio of the time that the same work takes a vCPU that dirties little, with a quota far above it and
    without one; runs in turns."""
    def seconds(quota: int) -> float:
        spec = msgspec.structs.replace(machine_spec(accel, 4096), vcpus=1, dirty_quota=quota, linger=True, params=(
            resolve_params("sequential", {"passes": 1, "pages": 20_000, "spin": 2_000})))
        with Machine.launch(spec) as machine:
            return float(machine.wait()["elapsed_s"])

    return statistics.median(seconds(200_000) / seconds(0) for _ in range(rounds))


def draw(samples: list[tuple[float, float, float, float]], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    times = [s[0] for s in samples]
    axes.step(times, [s[1] or float("nan") for s in samples], "k--", where="pre", label="quota of vCPU 0")
    axes.plot(times, [s[2] for s in samples], label="vCPU 0, limited")
    axes.plot(times, [s[3] for s in samples], label="vCPU 1, left alone", alpha=0.6)
    axes.set(xlabel="time (s)", ylabel="dirtied (MB/s)", yscale="log", ylim=(0.3, 3000), title=title)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def off_the_limit(accel: str, ring: int, megabytes: int, seconds: float) -> float:
    """Per cent."""
    quota = round(megabytes * 1e6 / PAGE)
    with Machine.launch(machine_spec(accel, ring)) as machine:
        machine.dirty_limit(quota, 0)
        measure(machine, seconds / 3)
        return 100 * abs(measure(machine, seconds).vcpus[0].pages_per_s / quota - 1)


def held_back_below_the_limit(accel: str, seconds: float) -> float:
    """Milliseconds in this time."""
    params = resolve_params("sequential", {"passes": 0, "spin": 20_000})
    spec = msgspec.structs.replace(machine_spec(accel, 4096), vcpus=1, params=params, dirty_quota=200_000)
    with Machine.launch(spec) as machine:
        measure(machine, seconds)
        return float(machine.status()["vcpus"][0]["throttled_s"]) * 1000


def off_the_guests_count(accel: str, seconds: float) -> float:
    """Per cent. A guest that walks over more pages than its limit lets it dirty in this time dirties each of them
    once, and its own counters say how many."""
    spec = msgspec.structs.replace(machine_spec(accel, 4096), vcpus=1, dirty_quota=20_000)

    def counted(machine: Machine) -> int:
        return int(machine.ram(0).view(np.uint64).reshape(-1, 512)[512:-16, 0].sum())

    with Machine.launch(spec) as machine:
        measure(machine, 0.2)
        machine.pause()
        before, began = counted(machine), time.monotonic()
        machine.resume()
        rate = measure(machine, seconds)
        machine.pause()
        return 100 * abs(rate.pages_per_s / ((counted(machine) - before) / (time.monotonic() - began)) - 1)


def main() -> None:
    parser = arguments_parser(NAME, __doc__)
    parser.add_argument("--accel", default="auto", choices=["auto", "kvm", "unicorn"])
    parser.add_argument("--ring", type=int, default=4096, help="of the plot")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each step of the plot")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    try:
        accel = choose_accelerator(options.accel)
    except VmmError as exc:
        parser.error(str(exc))
    if options.plot:
        samples = run(accel, options.ring, options.seconds)
        print(f"{accel}, ring of {options.ring} entries")
        report(samples)
        draw(samples, f"Dirty limit: {accel}, ring of {options.ring} entries", options.plot)
        print(f"a vCPU that stays below its quota takes {calm_vcpu_loses(accel):.3f} of the time it takes without")
        return
    quick = options.quick
    seconds = 0.3 if quick else 1.5
    targets = Targets(NAME, options.rounds or (1 if quick else 5), options.patience)
    for ring in (4096,) if quick else (1024, 65536):
        for megabytes in (10,) if quick else (1, 10, 300):
            targets.add(f"{accel}, ring {ring:,}, {megabytes} MB/s: off the limit",
                        lambda r=ring, m=megabytes: off_the_limit(accel, r, m, seconds), "%", 5)
    targets.add(f"{accel}: held back below the limit", lambda: held_back_below_the_limit(accel, seconds), "ms", 20)
    targets.add(f"{accel}: off the guest's own count", lambda: off_the_guests_count(accel, seconds), "%", 5)
    targets.save(options.output)


if __name__ == "__main__":
    main()
