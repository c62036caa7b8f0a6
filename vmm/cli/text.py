"""What a person sees: the report as tables, the live progress line, lists of machines."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..tables import print_table, size_text, table

__all__ = ["doctor_table", "machines_table", "print_report", "progress_text", "unchanged_text"]

def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as tables."""
    if "vcpus" not in report:       # nobody was left to make a whole one (vmm/machine/records.py)
        console.print(f"[bold]{report['name']}[/bold]  {report['state']} at {report['ended_at']}, exit code "
                      f"{report['exit_code']}: {escape(report['cause'])}")
        return
    console.print(f"[bold]{report['name']}[/bold]  {_life_text(report)}, {report['elapsed_s']:.3f} s, "
                  f"{report['accelerator']}, tracking {report['tracking']}"
                  + (f" ({report['ring_entries']} entries)" if report["ring_entries"] else "")
                  + ("" if _logs(report) or report["state"] == "ended" else ", not logged: nobody needs it")
                  + (f", exit code {report['exit_code']}" if report["state"] == "ended" else ""))
    vcpus = table("vCPU", "pid", "state", "exit", "code", title="vCPUs",
                  numbers=("dirtied", "ring full", "resets", "guest s", "stalled s"))
    for v in report["vcpus"]:
        vcpus.add_row(str(v["index"]), str(v["pid"]), v["state"], v["exit_reason"] or "",
                      "" if v["exit_code"] is None else str(v["exit_code"]),
                      f"{v['dirty_pages']:,}", f"{v['ring_full_exits']:,}", f"{v['resets']:,}",
                      f"{v['guest_s']:.3f}", f"{v['stalled_s']:.3f}")
    print_table(vcpus, console)
    for v in report["vcpus"]:
        _print_trouble(v, console)
    slots = table("slot", "gpa", "size", "logged", title="memory slots", numbers=("pages", "dirty"))
    for s in report["slots"]:
        slots.add_row(str(s["id"]), f"{s['gpa']:#x}", size_text(s["size"]), "yes" if s["logged"] else "no",
                      f"{s['pages']:,}", f"{s['dirty']:,}")
    print_table(slots, console)
    r = report["reaper"]
    console.print(f"reaper       {r['mode']}, {r['state']}: {r['iterations']} iterations, "
                  f"{r['pages']:,} pages, {r['microseconds']:,} us; {r['flushes']} flushes")
    if report["handed_over"]:
        console.print(f"handed over to {report['handed_over']}", markup=False)
    for what in ("pause", "limit", "lease", "client", "recording"):
        of = [h["why"] + (f" (pid {h['pid']})" if h["pid"] else "") for h in report["holders"] if h["what"] == what]
        if of:
            console.print(f"{what:<12} {', '.join(of)}", markup=False)
    if report["coordinator"]["restarts"]:
        console.print(f"coordinator replaced {report['coordinator']['restarts']} times")
    _print_verification(report["verification"], console)
    program = report.get("program")
    if program is not None:
        command = " ".join(" ".join(program["args"]).split())
        command = command if len(command) <= 60 else f"{command[:59]}…"
        console.print(f"program      {command}: {program['calls']:,} calls and faults served", markup=False)
        if program["refused_threads"]:
            console.print(f"    threads or processes that there was no vCPU for: {program['refused_threads']}")
        for name, count in program["missing_calls"].items():
            console.print(f"    not served: {name} ({count}, see docs/linux.md)", markup=False)
    if report["cause"]:
        console.print(f"ended at {report['ended_at']}: {report['cause']}", markup=False)


def _logs(report: dict[str, Any]) -> bool:
    """Its vCPUs log what they write, or never do (tracking none)."""
    return bool(report["tracking"] == "none" or report.get("logging", True))


def _print_trouble(vcpu: dict[str, Any], console: Console) -> None:
    notes = []
    if vcpu["detail"]:
        notes.append(vcpu["detail"])
    if vcpu["bad_entries"]:
        notes.append(f"{vcpu['bad_entries']} bad ring entries dropped")
    if vcpu["ring_rebuilds"]:
        notes.append(f"its ring overflowed, or its counts did not match; it was rebuilt {vcpu['ring_rebuilds']} "
                     f"time{'s' if vcpu['ring_rebuilds'] > 1 else ''} (all logged pages were marked dirty)")
    for note in notes:
        console.print(f"vCPU {vcpu['index']}: {note}", markup=False)
    if vcpu["registers"] and vcpu["exit_reason"] != "stopped":      # who stopped it does not ask where it was
        names = [f"{name} {value:016x}" for name, value in vcpu["registers"].items()]
        longest = max(map(len, names))
        each = max(1, (console.width - 2) // (longest + 2))
        for at in range(0, len(names), each):
            console.print("  " + "".join(f"  {n:>{longest}}" for n in names[at:at + each]), markup=False)


def _print_verification(result: dict[str, Any] | None, console: Console) -> None:
    if result is None:
        return
    is_failure = result.get("surplus_is_failure", True)
    verdict = "[green]passed[/green]" if result["ok"] else "[red]FAILED[/red]"
    console.print(f"verification {verdict}: {result['rounds']} rounds, "
                  f"{result['checked_pages']:,} pages checked, {result['dirty_pages']:,} dirty, "
                  f"{result['lost_pages']} lost"
                  + (f", {result['surplus_pages']} surplus" if is_failure else "")
                  + (f" (injected: {result['injected']})" if result["injected"] != "none" else ""))
    if not is_failure:
        console.print("    " + unchanged_text(result["surplus_pages"] + result["excused_pages"], result["dirty_pages"]))
    for finding in result["first_findings"]:
        console.print(f"    {finding}", markup=False)


def unchanged_text(pages: int, dirty: int) -> str:
    """How many of the dirty pages were as they had been."""
    return f"of the dirty pages, {pages:,} ({pages / max(1, dirty):.1%}) had the content they had before"


def progress_text(report: dict[str, Any], rate: float) -> str:
    """One line: what a running machine is doing. ``rate`` in pages per second."""
    vcpus = report["vcpus"]
    running = sum(v["state"] not in ("exited", "dead") for v in vcpus)
    text = (f"{report['elapsed_s']:6.1f} s  {running}/{len(vcpus)} vCPUs running  "
            + (f"{sum(v['dirty_pages'] for v in vcpus):,} pages dirtied ({rate:,.0f}/s)  "
               f"{sum(v['ring_full_exits'] for v in vcpus):,} ring full" if _logs(report) else "not logged"))
    if report["verification"]:
        text += f"  {report['verification']['rounds']} rounds verified"
    return text


def doctor_table(findings: list[dict[str, str]]) -> Table:
    found = table("check", "status", texts=("finding", "what to do"))
    colour = {"ok": "green", "warn": "yellow", "fail": "red", "absent": "yellow"}
    for f in findings:
        found.add_row(f["name"], f"[{colour[f['status']]}]{f['status']}[/]", escape(f["finding"]),
                      escape(f["advice"]))
    return found


def machines_table(machines: list[dict[str, Any]]) -> Table:
    """Reports, whole or not."""
    ended = any(m.get("ended_at") for m in machines)
    found = table("name", "state", "accelerator",
                  numbers=("vCPUs", "memory", "elapsed", *(["ended"] if ended else [])),
                  texts=("cause",) if ended else ())
    for m in machines:
        row = [m["name"], _state_text(m)]
        if "vcpus" in m:
            row += [m["accelerator"], str(len(m["vcpus"])), size_text(sum(s["size"] for s in m["slots"])),
                    f"{m['elapsed_s']:.1f} s"]
        elif ended:
            row += [""] * 4
        if m.get("ended_at"):
            row += [m["ended_at"], m["cause"]]
        found.add_row(*map(escape, row))
    return found


def _life_text(machine: dict[str, Any]) -> str:
    """Running, paused, …; a machine that was handed over is paused for good."""
    return "handed over" if machine["state"] == "paused" and machine.get("handed_over") else str(machine["state"])


def _state_text(machine: dict[str, Any]) -> str:
    if machine.get("ended_at"):
        return f"{machine['state']} ({machine['exit_code']})"
    dead = sum(v["state"] == "dead" for v in machine.get("vcpus", []))
    return _life_text(machine) + (f" ({dead} vCPU{'s' if dead > 1 else ''} dead)" if dead else "")
