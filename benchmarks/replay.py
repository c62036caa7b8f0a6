"""Entries per second of the whole path, from 1 to 64 rings.
``python -m benchmarks replay [--rings 1,64] [--json FILE]``

Producers (accel: replay) push, the coordinator harvests, each worker resets its ring, the pages are published;
every run makes the same number of entries in all. Runs of all ring counts are made in turns, round after round, so
that each ratio to one ring is of runs made side by side. Time is from the start of the vCPUs until the last entry
was published, as the machine's report has it.

Columns: entries a second and cost per entry (median, least and most of the rounds), the same against one ring,
entries a reset, the producers' time and the coordinator's time in reaps per entry.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ipc.messages import ReplayPhase, ReplaySpec
from vmm.client.machine import Machine
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec

from .common import arguments_parser

_TIMEOUT = 120.0


def machine_spec(rings: int, arguments: argparse.Namespace) -> MachineSpec:
    phase = ReplayPhase(arguments.pattern, arguments.entries // rings, stride=4099, exponent=1.1)
    return MachineSpec(
        name="bench-replay", accel="replay", vcpus=rings, privilege="user", ring_entries=arguments.ring,
        slots=[RamSlot(0, 0, arguments.gib << 30)], image="", load_address=None, params=[], cmdline="",
        stack_size=16384, reaper=ReaperSpec(min_interval=arguments.min_interval), verify=None, timeout=_TIMEOUT,
        trace=[], trace_file="", linger=True, replay=ReplaySpec([phase], repeat=arguments.repeat))


def run(rings: int, arguments: argparse.Namespace) -> dict[str, Any]:
    with Machine.launch(machine_spec(rings, arguments), start=False) as machine:
        machine.start()
        report = machine.wait(_TIMEOUT)
    vcpus = report["vcpus"]
    entries = sum(v["dirty_pages"] for v in vcpus)
    assert report["exit_code"] == 0, report
    assert not any(v["ring_rebuilds"] or v["bad_entries"] for v in vcpus), report
    return {"rings": rings, "entries": entries, "seconds": report["elapsed_s"],
            "ns_per_entry": report["elapsed_s"] / entries * 1e9, "resets": sum(v["resets"] for v in vcpus),
            "full_exits": sum(v["ring_full_exits"] for v in vcpus),
            "produce_ns": sum(v["guest_s"] for v in vcpus) / entries * 1e9,
            "reap_ns": report["reaper"]["microseconds"] * 1e3 / entries}


def summary(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    costs = [r["ns_per_entry"] for r in runs]
    ratios = [r["ns_per_entry"] / b["ns_per_entry"] for r, b in zip(runs, base, strict=True)]
    middle = statistics.median(costs)
    return {"rings": runs[0]["rings"], "million_per_s": 1e3 / middle, "ns_per_entry": middle,
            "least": min(costs), "most": max(costs), "ratio": statistics.median(ratios),
            "ratio_least": min(ratios), "ratio_most": max(ratios),
            **{key: statistics.median(r[key] for r in runs) for key in ("produce_ns", "reap_ns", "full_exits")},
            "entries_per_reset": statistics.median(r["entries"] / max(1, r["resets"]) for r in runs)}


def main() -> None:
    parser = arguments_parser("replay", __doc__)
    parser.add_argument("--rings", help="for example 1,64")
    parser.add_argument("--entries", type=int, help="of all rings together")
    parser.add_argument("--ring", type=int, default=65536, help="entries of one ring")
    parser.add_argument("--gib", type=int, default=16, help="size of the memory slot")
    parser.add_argument("--pattern", default="sequential", choices=["sequential", "strided", "random", "zipf"])
    parser.add_argument("--repeat", action="store_true", help="every write makes an entry")
    parser.add_argument("--min-interval", type=float, default=0.001, help="of the reaper, seconds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    quick = arguments.quick
    arguments.entries = arguments.entries or (1 << 18 if quick else 1 << 27)
    arguments.rounds = arguments.rounds or (1 if quick else 5)
    counts = [int(n) for n in (arguments.rings or ("1,2" if quick else "1,2,4,8,16,32,64")).split(",")]
    run(counts[0], arguments)       # caches warm
    runs: dict[int, list[dict[str, Any]]] = {n: [] for n in counts}
    for _ in range(arguments.rounds):
        for n in counts:
            runs[n].append(run(n, arguments))
    rows = [summary(runs[n], runs[counts[0]]) for n in counts]
    table = Table("rings", title=f"{arguments.pattern}, ring {arguments.ring}, {arguments.entries:,} entries, "
                                 f"{len(os.sched_getaffinity(0))} cores, {arguments.rounds} rounds")
    for column in ("M entries/s", "ns/entry", "least-most", f"against {counts[0]}", "entries/reset", "full exits",
                   "produce ns", "reap ns"):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(str(r["rings"]), f"{r['million_per_s']:.1f}", f"{r['ns_per_entry']:.2f}",
                      f"{r['least']:.2f}-{r['most']:.2f}", f"{r['ratio']:.2f} ({r['ratio_least']:.2f}-"
                      f"{r['ratio_most']:.2f})", f"{r['entries_per_reset']:,.0f}", f"{r['full_exits']:,.0f}",
                      f"{r['produce_ns']:.2f}", f"{r['reap_ns']:.2f}")
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(arguments).items()},
                                              "summary": rows, "runs": runs}, indent=2))


if __name__ == "__main__":
    main()
