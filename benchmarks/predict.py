"""Migrations foretold (vmm predict) against real ones: each guest is recorded for some seconds, its migration at each
bandwidth is foretold from that, and then it is migrated, over a Unix socket with that cap, on the same host.

``ours`` is what was foretold, the peer what came: ratios of total time and downtime should be 1. The guests: those of
this program, at several rates over 512 MiB; with ``--root`` (a folder made by vmm root) programs of Linux, too; and,
where QEMU is installed, guests of QEMU, which are watched from outside (as by ``vmm predict --pid``) and migrated by
QEMU itself, without throttling: what is foretold is our migration's rounds, what comes are QEMU's.
Errors (of the ratio from 1) over all guests and bandwidths are printed at the end: targets are a median of 15 % of the
total time and 30 % of the downtime.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vmm.cli.watch import watching
from vmm.client.config import load_config
from vmm.client.machine import Machine
from vmm.consumers.predict.dirtying import Memory
from vmm.consumers.predict.recorded import costs_of, memory_of, watch, watch_process
from vmm.consumers.predict.simulate import simulate
from vmm.migrate import Options, migrate

from .common import CONSOLE, Case, Results, arguments_parser, quiet, warm
from .migration import DOWNTIME, RING, receiver
from .peer.qemu import Qemu, missing

NAME = "predict"
SOURCE = "bench-predict"
BANDWIDTHS = (100, 200, 400, 800)       # MB/s
RECORDED = 4.0      # seconds
WARM_UP = 15.0      # seconds at most until a guest has touched what it uses
INTERVAL = 0.05


class Workload(NamedTuple):
    """``guest``: of the configuration; of QEMU's guests the pauses after each write of their walk."""

    guest: str
    vcpus: int = 2
    program: bool = False       # of a root
    qemu: bool = False


WORKLOADS = {
    "walk, slow": Workload("{workload: sequential, params: {passes: 0, spin: 6000}}"),
    "walk, fast": Workload("{workload: sequential, params: {passes: 0, spin: 800}}"),
    "random, slow": Workload("{workload: random, params: {writes: 0, spin: 6000}}"),
    "random, fast": Workload("{workload: random, params: {writes: 0, spin: 1000}}"),
    "hot spot": Workload("{workload: hotspot, params: {writes: 0, spin: 1000, hot_percent: 5}}"),
    "one vCPU, stamps": Workload("{workload: stamp, params: {writes: 0, spin: 2000, pages: 20000}}", 1),
    "redis": Workload("{program: /bin/sh, args: [-c, 'redis-server --save \"\" --port 7 & sleep 1; while :; do "
                      "redis-benchmark -p 7 -t set -r 200000 -d 200 -n 1000000 -q; done'], root: ROOT, threads: 16}",
                      2, True),
    "java": Workload("{program: JAVA, args: [-Xmx128m, -XX:+UseParallelGC, /root/Churn.java], root: ROOT, "
                     "threads: 40}", 2, True),
    "QEMU, walk, slow": Workload("6000", qemu=True),     # a faster one never ends: QEMU counts no rounds
}


def java_in(root: Path) -> str:
    """Its path there; empty where there is none."""
    return next((f"/{each.relative_to(root)}" for each in root.glob("usr/lib/jvm/*/bin/java")), "")


@contextlib.contextmanager
def machine(workload: Workload, root: Path | None, mib: int) -> Iterator[Machine]:
    """It runs, and has touched the memory that it uses."""
    vcpus = "" if workload.program else f"vcpus: {workload.vcpus}\n"
    guest = workload.guest.replace("ROOT", str(root)).replace("JAVA", java_in(root) if root is not None else "")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(f"name: {SOURCE}\n{vcpus}accel: kvm\nmemory: [{{size: {mib}MiB}}]\nguest: {guest}\n")
        file.flush()
        config = load_config(file.name)
    with Machine.launch(config) as running:
        touched, until = -1, time.monotonic() + WARM_UP
        while (now := running_pages(running)) > touched and time.monotonic() < until:
            touched = now
            time.sleep(1.0)
        yield running


def running_pages(running: Machine) -> int:
    """Pages of it that were ever touched."""
    return sum(len(each) for each in memory_of(running).touched.values())


def measure(workload: Workload, bandwidth: float, root: Path | None, mib: int,
            patience: float) -> tuple[dict[str, float], dict[str, float]]:
    """Foretold, and as it came."""
    quiet(patience)
    options = Options(bandwidth=bandwidth)
    with machine(workload, root, mib) as running, tempfile.TemporaryDirectory() as folder:
        guest, memory = watch(running, RECORDED, INTERVAL, lambda part, entries: None,
                              lambda seconds: time.sleep(seconds) or False)
        said = simulate(guest, memory, options, costs=costs_of(running))
        address = f"ipc://{folder}/socket"
        more = ["--root", str(root)] if workload.program else []
        with receiver(address, *more):
            report = migrate(running, address, options)
    return ({"total": said.total, "downtime": said.downtime, "rounds": len(said.rounds), "bytes": said.transferred},
            {"total": report.total_time / 1000, "downtime": report.downtime / 1000,
             "rounds": report.ram.dirty_sync_count - 1, "bytes": report.ram.transferred})


def measure_qemu(workload: Workload, bandwidth: float, mib: int, patience: float) -> tuple[dict[str, float],
                                                                                           dict[str, float]]:
    """The same, of a guest of QEMU that QEMU migrates."""
    quiet(patience)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        uri = f"unix:{folder}/socket"
        source, target = (stack.enter_context(Qemu(mib=mib, vcpus=workload.vcpus, ring=RING, spin=int(workload.guest),
                                                   shared=True, incoming=incoming)) for incoming in (False, True))
        target.receive(uri)
        source.walked()
        with watching(str(source.pid), "ram") as (_, watched, _):
            guest, sizes = watch_process(watched, RECORDED, INTERVAL, lambda seconds, entries: None,
                                         lambda seconds: time.sleep(seconds) or False)
        said = simulate(guest, Memory.whole(sizes, 1.0), Options(bandwidth=bandwidth, downtime=DOWNTIME,
                                                                 converge=False, max_rounds=1000))
        began = time.time()
        report = source.migrate(uri, downtime=DOWNTIME, bandwidth=round(bandwidth))
        stopped, resumed = source.event("STOP"), target.event("RESUME")
    return ({"total": said.total, "downtime": said.downtime, "rounds": len(said.rounds), "bytes": said.transferred},
            {"total": max(report["total-time"] / 1000, resumed - began), "downtime": resumed - stopped,
             "rounds": report["ram"]["dirty-sync-count"] - 1, "bytes": report["ram"]["transferred"]})


def errors(results: Results, quantity: str) -> list[float]:
    """Of each run: how far what was foretold is from what came, as a part of that."""
    return [abs(a[quantity] / b[quantity] - 1) for case in results.cases
            for a, b in zip(case.ours, case.peer, strict=True)]


def main() -> None:
    parser = arguments_parser(NAME, __doc__)
    parser.add_argument("--mib", type=int, default=512, help="RAM of the guests of this program")
    parser.add_argument("--root", type=Path, help="root with redis-server, redis-tools, dash, coreutils, "
                                                  "openjdk-17-jre-headless (as of vmm root)")
    parser.add_argument("--only", nargs="*", choices=[*WORKLOADS])
    parser.add_argument("--bandwidths", type=float, nargs="*", default=BANDWIDTHS, help="MB/s")
    options = parser.parse_args()
    results = Results(NAME, "Migrations foretold, and as they came", "as it came", {
        "total": ("total (ms)", 1e3, ".0f"), "downtime": ("downtime (ms)", 1e3, ".0f"),
        "rounds": ("rounds", 1.0, ".0f"), "bytes": ("sent (MiB)", 2.0**-20, ".0f")})
    rounds = options.rounds or (1 if options.quick else 3)
    warm(2 * options.mib)
    if options.root is not None:
        shutil.copy(Path(__file__).parent / "programs" / "scripts" / "Churn.java", options.root / "root")
    wanted = options.only or ([*WORKLOADS][:1] if options.quick else [*WORKLOADS])
    for name, workload in WORKLOADS.items():
        if name not in wanted or (workload.program and options.root is None) or (
                workload.qemu and missing()):
            continue
        for bandwidth in options.bandwidths[:1 if options.quick else None]:
            pairs = [measure_qemu(workload, bandwidth * 1e6, options.mib, options.patience) if workload.qemu else
                     measure(workload, bandwidth * 1e6, options.root, options.mib, options.patience)
                     for _ in range(rounds)]
            results.cases.append(Case(f"{name}, {bandwidth:g} MB/s", [a for a, _ in pairs], [b for _, b in pairs]))
            CONSOLE.print(f"{name}, {bandwidth:g} MB/s: " + "; ".join(
                f"{a['total']:.2f} s, {a['downtime'] * 1000:.0f} ms, {a['rounds']:.0f} rounds; came {b['total']:.2f} "
                f"s, {b['downtime'] * 1000:.0f} ms, {b['rounds']:.0f}" for a, b in pairs))
    results.save(options.output)
    results.show()
    for quantity, target in (("total", 0.15), ("downtime", 0.3)):
        middle = statistics.median(errors(results, quantity))
        CONSOLE.print(f"{quantity}: median error {middle:.1%} (target {target:.0%}): "
                      f"{'met' if middle <= target else 'not met'}")


if __name__ == "__main__":
    main()
