"""What the coordinator costs and how soon it answers: the targets that are no comparison with a peer.

Each figure is the median of its runs (and their least and most), on KVM, the sample guest ``sequential`` at full
rate over 256 MiB unless said otherwise:

* **exits**: ring-full exits with the adaptive reaper, in per cent of those with the 1 s reaper, run in turns.
* **cpu**: the coordinator's share of a core, guests idle and one vCPU at full rate.
* **flush**: a sync's round trip at the client less that of a request that asks for nothing, the guest running.
* **stall**: from ring-full exit to re-entry, less the time in the reset ioctl: the median of the exits, each read from
  the vCPU's control block (1 s reaper, so that every full ring is met by its exit; what the harvest takes, 5 to 20
  microseconds, is not taken off).
* **launch**: from the call of Machine.launch to the last vCPU's first guest instruction.
* **pss**: a worker's memory beyond guest RAM.
* **marks**: the part of a process's CPU time that goes into its marks (ipc/lanes.py), reckoned: those that it wrote,
  by what one costs in a loop. The vCPU fills a ring of 1,024 entries under the 1 s reaper, so that each is a stall.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time

from ipc.lanes import Kind, Lane
from ipc.layout import VcpuControl, vcpu_control
from ipc.shm import Segment
from vmm.client.accelerators import choose_accelerator
from vmm.client.machine import Machine
from vmm.errors import VmmError
from vmm.guests import WORKLOADS, resolve_params
from vmm.lab.hoststat import cpu_time
from vmm.lab.stress.measure import Figures, measure
from vmm.machine.names import segment_name
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec

from .common import CONSOLE, Targets, arguments_parser

NAME = "coordinator"
_LOOK = 0.0002      # seconds between two looks at a control block: less than from one ring-full exit to the next


def spec(vcpus: int, ring: int, *, load: str = "sequential", spin: int = 0, fixed: bool = False,
         mib: int = 256) -> MachineSpec:
    params = {"passes": 0, "spin": spin} if load == "sequential" else {"milliseconds": 0}
    return MachineSpec(
        name="bench-coordinator", accel="kvm", vcpus=vcpus, privilege="user", ring_entries=ring,
        slots=[RamSlot(0, 0, mib << 20)], image=str(WORKLOADS[load].image), load_address=None,
        params=resolve_params(load, params), cmdline=load, stack_size=16384,
        reaper=ReaperSpec("fixed" if fixed else "adaptive"), verify=None, timeout=None, trace=[], trace_file="",
        log="always", linger=True)


def figures(machine: MachineSpec, seconds: float, flushes: int = 0) -> Figures:
    found, _ = measure([machine], [], seconds=seconds, warm_up=min(0.5, seconds), flushes=flushes,
                       stop=lambda: False, progress=lambda text: None)
    return found[0]


def stall_beyond_reset(ring: int, seconds: float) -> float:
    """Microseconds."""
    with Machine.launch(spec(1, ring, fixed=True)), \
         Segment.open(segment_name("bench-coordinator", "control")) as segment:
        block = vcpu_control(segment.address, 0)
        stalls, before = [], _totals(block)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(_LOOK)
            after = _totals(block)
            exits, resets, stalled, in_reset = (b - a for a, b in zip(before, after, strict=True))
            if stalled and exits == resets == 1:
                stalls.append((stalled - in_reset) / 1e3)
            if stalled:
                before = after
        del block
    return statistics.median(stalls)


def one_mark() -> float:
    """Seconds."""
    lane, count = Lane(bytearray(1 << 17)), 20_000
    began = time.perf_counter()
    for number in range(count):
        lane.put(Kind.STALL, took=number, value=number)
    return (time.perf_counter() - began) / count


def marks_shares(seconds: float) -> tuple[float, float]:
    """Of the coordinator's CPU time and of the worker's, in per cent."""
    with Machine.launch(spec(1, 1024, fixed=True)) as machine, contextlib.closing(machine.lanes()) as lanes:
        status = machine.status()
        both = [(status["coordinator"]["pid"], lanes.coordinator), (status["vcpus"][0]["pid"], lanes.vcpus[0])]
        before = [(lane.read(0)[1], cpu_time(pid).used) for pid, lane in both]
        time.sleep(seconds)
        after = [(lane.read(0)[1], cpu_time(pid).used) for pid, lane in both]
        cost = one_mark()
    coordinator, worker = (100 * cost * (marks - m) / (used - u)
                           for (m, u), (marks, used) in zip(before, after, strict=True))
    return coordinator, worker


def _totals(block: VcpuControl) -> tuple[int, int, int, int]:
    """Exits, resets, nanoseconds stalled and in resets, while the vCPU is in the guest: the same twice."""
    first = None
    while True:
        found = (block.ring_full_exits, block.resets, block.stalled_ns, block.reset_ns)
        if found == first:
            return found
        first = found


def main() -> None:
    parser = arguments_parser(NAME, __doc__)
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)     # or each launch would compile every module
    try:
        choose_accelerator("kvm")
    except VmmError as exc:
        CONSOLE.print(f"{NAME}: skipped: {exc}")
        return
    quick = options.quick
    seconds, flushes = (0.2, 6) if quick else (3.0, 60)
    report = Targets(NAME, options.rounds or (1 if quick else 5), options.patience)
    cores = len(os.sched_getaffinity(0))

    def exits(vcpus: int, ring: int, spin: int = 0) -> float:
        adaptive, fixed = (figures(spec(vcpus, ring, spin=spin, fixed=f), seconds).ring_full_per_s
                           for f in (False, True))
        return 100 * adaptive / fixed if fixed else 100 * adaptive

    for vcpus in (1,) if quick else (1, 2):
        for ring in (1024,) if quick else (1024, 4096):
            report.add(f"ring-full exits, {vcpus} vCPU, ring {ring:,}",
                      lambda v=vcpus, r=ring: exits(v, r), "% of the 1 s reaper's", 2)
    report.add("ring-full exits at a steady rate (137,000 pages/s), ring 4,096",
              lambda: figures(spec(1, 4096, spin=200), seconds).ring_full_per_s, "/s", 0)
    report.add("CPU, guests idle", lambda: 100 * figures(spec(2, 4096, load="idle"), seconds).coordinator_cpu,
              "% of a core", 0.5)
    report.add("CPU, 1 vCPU at full rate", lambda: 100 * figures(spec(1, 4096), seconds).coordinator_cpu,
              "% of a core", 10)
    for vcpus in (1, 4) if quick else (1, 2, 4, 8, 16):
        # Busy vCPUs where each has a core; beyond that sleeping ones, which a kick has to wake.
        load = "sequential" if vcpus <= cores else "idle"
        extra = max(0, vcpus - 2) * 0.1
        report.add(f"flush, {vcpus} vCPU{'s' if vcpus > 1 else ''}, {'busy' if load == 'sequential' else 'idle'}",
                  lambda v=vcpus, w=load: statistics.median(
                      us for us, _ in figures(spec(v, 4096, load=w), 0.5, flushes=flushes).flushes) / 1000,
                  "ms", 1 + extra, ".3f")
    for ring in (1024,) if quick else (1024, 4096):
        report.add(f"stall beyond reset, ring {ring:,}", lambda r=ring: stall_beyond_reset(r, seconds), "us", 100,
                   ".0f")
    for vcpus, target in ((2, 0.3),) if quick else ((2, 0.3), (16, 1.0)):
        for mib in (64,) if quick else (64, 256):       # to reserve 256 MiB takes 60 ms
            report.add(f"launch, {vcpus} vCPUs, {mib} MiB", lambda v=vcpus, m=mib: figures(
                spec(v, 4096, load="idle", mib=m), 0.1).launch_s, "s", target)
    for vcpus in (1,) if quick else (1, 16):
        report.add(f"worker's memory, {vcpus} vCPU{'s' if vcpus > 1 else ''}",
                  lambda v=vcpus: figures(spec(v, 4096, load="idle"), 0.1).worker_pss_mib, "MiB", 20, ".1f")
    report.add("a mark", lambda: 1e6 * one_mark(), "us", 1)
    for which, process in enumerate(("coordinator", "vCPU")):
        report.add(f"marks of a vCPU that always stalls, of the {process}'s CPU time",
                   lambda w=which: marks_shares(seconds)[w], "%", 5, ".3f")
    report.save(options.output)


if __name__ == "__main__":
    main()
