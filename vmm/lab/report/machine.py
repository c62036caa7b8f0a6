"""The report of a machine (vmm/machine/report.py): where its vCPUs' time went, and what its rings had to do."""

from __future__ import annotations

from typing import Any

from ipc.shm import PAGE_SIZE

from .document import (
    Figure,
    Section,
    Table,
    busiest,
    bytes_text,
    count_text,
    left_out_text,
    percent_text,
    seconds_text,
)
from .style import COLOURS, bars

__all__ = ["section"]

_SHOWN = 32         # vCPUs of a figure; the tables have all
_PARTS = (("in the guest", "guest_s"), ("stalled at a full ring", "stalled_s"), ("throttled", "throttled_s"))
_ELSE = "else: paused, waiting, without a processor"


def section(report: dict[str, Any]) -> Section:
    """Raises LookupError, TypeError, ValueError for what is no such report."""
    name = report["name"]
    found = Section("machine", f"Machine {name}", _outcome(report))
    if report.get("cause"):
        found.facts.append(("ended", f"{report['ended_at']}: {report['cause']}"))
    if "vcpus" not in report:
        return found
    vcpus = report["vcpus"]
    dirtied, stalled = sum(v["dirty_pages"] for v in vcpus), sum(v["stalled_s"] for v in vcpus)
    elapsed = max(report["elapsed_s"], 1e-9)
    reaper = report["reaper"]
    found.facts += [
        ("ran for", seconds_text(report["elapsed_s"])),
        ("vCPUs", f"{len(vcpus)}, {report['accelerator']}"),
        ("memory", bytes_text(sum(s["size"] for s in report["slots"]))),
        ("dirty tracking", report["tracking"] + (f", {report['ring_entries']:,} entries per ring"
                                                 if report["ring_entries"] else "")),
        ("dirtied", f"{dirtied:,} entries, {bytes_text(dirtied * PAGE_SIZE / elapsed)}/s"),
        ("full rings", f"{sum(v['ring_full_exits'] for v in vcpus):,} exits, vCPUs stalled for "
                       f"{seconds_text(stalled)} in all"),
        ("reaper", f"{reaper['mode']}, {reaper['iterations']:,} iterations, "
                   f"{seconds_text(reaper['microseconds'] / 1e6)} in reaps; {reaper['flushes']:,} flushes"),
    ]
    _judge(report, found)
    table = _table(vcpus)
    if any(v[key] for v in vcpus for _, key in _PARTS):
        shown = _busiest(vcpus, "stalled_s")
        share = percent_text(stalled, sum(v[key] for v in vcpus for _, key in _PARTS))
        found.figures.append(Figure(
            "machine-vcpu-time", "Where the vCPUs' time went",
            f"Of the time that vCPUs were in the guest or held out of it, {share} were stalls at full rings."
            + left_out_text(len(shown), len(vcpus), "stalled longest"),
            lambda figure: _draw_time(figure, shown, elapsed), table, (8.0, 1.3 + 0.28 * len(shown))))
    if dirtied:
        dirtiest = _busiest(vcpus, "dirty_pages")
        most = max(dirtiest, key=lambda v: v["dirty_pages"])
        found.figures.append(Figure(
            "machine-dirtied", "Ring entries by vCPU",
            f"vCPU {most['index']} dirtied most: {most['dirty_pages']:,} of {dirtied:,} entries."
            + left_out_text(len(dirtiest), len(vcpus), "dirtied most"),
            lambda figure: _draw_dirtied(figure, dirtiest), table, (8.0, 1.3 + 0.28 * len(dirtiest))))
    found.tables = [table, Table(
        "Memory slots", ["slot", "GPA", "size", "pages", "dirty pages", "logged"],
        [[str(s["id"]), f"{s['gpa']:#x}", bytes_text(s["size"]), f"{s['pages']:,}", f"{s['dirty']:,}",
          "yes" if s["logged"] else "no"] for s in report["slots"]])]
    return found


def _busiest(vcpus: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    shown = busiest({v["index"]: v[key] for v in vcpus}, _SHOWN)
    return sorted((v for v in vcpus if v["index"] in shown), key=lambda v: v["index"])


def _outcome(report: dict[str, Any]) -> str:
    if report["state"] != "ended" and report.get("exit_code") is None:
        return f"It is {report['state']}."
    return f"It ended with status {report['exit_code']}{_proof(report.get('verification'))}."


def _proof(verified: dict[str, Any] | None) -> str:
    if verified is None:
        return ""
    if not verified["ok"]:
        return f", but verification failed: {_failures(verified)}"
    return ", and every write was found in the log" if verified["rounds"] else ", but nothing was verified"


def _failures(verified: dict[str, Any]) -> str:
    """As the machine's own cause has it (vmm/coordinator/outcome.py)."""
    surplus = f", {verified['surplus_pages']:,} surplus" if verified.get("surplus_is_failure", True) else ""
    return f"{verified['lost_pages']:,} pages lost{surplus}"


def _judge(report: dict[str, Any], found: Section) -> None:
    """What somebody should look into."""
    for vcpu in report["vcpus"]:
        who = f"vCPU {vcpu['index']}"
        if vcpu["detail"]:
            found.warnings.append(f"{who}: {vcpu['detail']}")
        if vcpu["ring_rebuilds"]:
            found.warnings.append(f"{who}: its ring lost count {vcpu['ring_rebuilds']} times: every logged page was "
                                  "marked dirty each time")
        if vcpu["bad_entries"]:
            found.warnings.append(f"{who}: {vcpu['bad_entries']:,} bad ring entries were dropped")
    verified = report["verification"]
    if verified is not None:
        verdict = "failed" if not verified["ok"] else "passed" if verified["rounds"] else "nothing was verified"
        found.facts.append(("verification", f"{verdict}: {verified['rounds']:,} rounds, "
                            f"{verified['dirty_pages']:,} dirty pages, {_failures(verified)}"))
        found.warnings += verified["first_findings"]
    restarts = report["coordinator"]["restarts"]
    if restarts:
        found.warnings.append(f"its coordinator was replaced {restarts} times")


def _table(vcpus: list[dict[str, Any]]) -> Table:
    rows = [[f"vCPU {v['index']}", v["state"], f"{v['dirty_pages']:,}", f"{v['ring_full_exits']:,}",
             f"{v['stalled_s']:.3f}",
             seconds_text(v["stalled_s"] / v["ring_full_exits"]) if v["ring_full_exits"] else "-",
             f"{v['guest_s']:.3f}", f"{v['throttled_s']:.3f}", f"{v['resets']:,}", count_text(v["reset_s"] * 1e3)]
            for v in vcpus]
    return Table("vCPUs", ["vCPU", "state", "entries dirtied", "full-ring exits", "stalled (s)", "mean stall",
                           "in the guest (s)", "throttled (s)", "ring resets", "in resets (ms)"], rows)


def _draw_time(figure: Any, vcpus: list[dict[str, Any]], elapsed: float) -> None:
    axes = figure.subplots()
    left = [max(0.0, elapsed - sum(v[key] for _, key in _PARTS)) for v in vcpus]
    bars(axes, [f"vCPU {v['index']}" for v in vcpus],
         [*((name, [v[key] for v in vcpus]) for name, key in _PARTS if any(v[key] for v in vcpus)), (_ELSE, left)])
    axes.set(xlabel="time (s)")
    figure.legend(loc="outside upper left", ncols=4)


def _draw_dirtied(figure: Any, vcpus: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    axes.barh([f"vCPU {v['index']}" for v in vcpus], [v["dirty_pages"] for v in vcpus], color=COLOURS[0], height=0.7)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="ring entries (pages dirtied, again after each reset)")
