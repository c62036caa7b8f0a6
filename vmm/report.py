"""What a person sees: the report as tables, the live progress line, lists of machines."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["doctor_table", "machines_table", "print_report", "progress_text", "screen", "size_text"]

_PLAIN_WIDTH = 120


def screen() -> Console:
    """Standard output; wide enough for a table where it is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return console


def size_text(size: int) -> str:
    """``64 MiB`` where it is whole, else exact bytes with the next unit: ``64 MiB + 3 pages``."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            rest = size % unit
            if rest % 4096:
                break
            return f"{size // unit} {name}" + (f" + {rest // 4096} pages" if rest else "")
    return f"{size} B"


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as tables."""
    outcome = "running" if report["state"] != "ended" else f"exit code {report['exit_code']}"
    console.print(f"[bold]{report['name']}[/bold]  {report['state']}, {report['elapsed_s']:.3f} s, "
                  f"{report['accelerator']}, dirty {report['tracking']}"
                  + (f" of {report['ring_entries']} entries" if report["ring_entries"] else "")
                  + f", {outcome}")
    table = Table("vCPU", "pid", "state", "exit", "code", title="vCPUs", title_justify="left")
    for column in ("dirtied", "ring full", "resets", "guest s", "stalled s"):
        table.add_column(column, justify="right")
    for v in report["vcpus"]:
        table.add_row(str(v["index"]), str(v["pid"]), v["state"], v["exit_reason"], str(v["exit_code"]),
                      f"{v['dirty_pages']:,}", str(v["ring_full_exits"]), str(v["resets"]),
                      f"{v['guest_s']:.3f}", f"{v['stalled_s']:.3f}")
    console.print(table)
    for v in report["vcpus"]:
        _print_trouble(v, console)
    table = Table("slot", "gpa", "size", "logged", title="memory slots", title_justify="left")
    for column in ("pages", "dirty"):
        table.add_column(column, justify="right")
    for s in report["slots"]:
        table.add_row(str(s["id"]), f"{s['gpa']:#x}", size_text(s["size"]), "yes" if s["logged"] else "no",
                      f"{s['pages']:,}", f"{s['dirty']:,}")
    console.print(table)
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


def _print_trouble(vcpu: dict[str, Any], console: Console) -> None:
    notes = []
    if vcpu["detail"]:
        notes.append(vcpu["detail"])
    if vcpu["bad_entries"]:
        notes.append(f"{vcpu['bad_entries']} bad ring entries dropped")
    if vcpu["ring_rebuilds"]:
        notes.append(f"ring lost count and was rebuilt {vcpu['ring_rebuilds']} times (all logged pages "
                     "marked)")
    for note in notes:
        console.print(f"vCPU {vcpu['index']}: {note}", markup=False)
    if vcpu["registers"]:
        names = [f"{name} {value:016x}" for name, value in vcpu["registers"].items()]
        for at in range(0, len(names), 4):
            console.print("    " + "  ".join(f"{n:>24}" for n in names[at:at + 4]), markup=False)


def _print_verification(result: dict[str, Any] | None, console: Console) -> None:
    if result is None:
        return
    verdict = "[green]passed[/green]" if result["ok"] else "[red]FAILED[/red]"
    console.print(f"verification {verdict}: {result['rounds']} rounds, "
                  f"{result['checked_pages']:,} pages checked, {result['dirty_pages']:,} dirty, "
                  f"{result['lost_pages']} lost, "
                  f"{result['surplus_pages']} surplus"
                  + (f" (injected: {result['injected']})" if result["injected"] != "none" else ""))
    for finding in result["first_findings"]:
        console.print(f"    {finding}")


def progress_text(report: dict[str, Any], rate: float) -> str:
    """One line: what a running machine is doing. ``rate`` in pages a second."""
    vcpus = report["vcpus"]
    running = sum(v["state"] not in ("exited", "dead") for v in vcpus)
    text = (f"{report['elapsed_s']:6.1f} s  {running}/{len(vcpus)} vCPUs running  "
            f"{sum(v['dirty_pages'] for v in vcpus):,} pages dirtied ({rate:,.0f}/s)  "
            f"{sum(v['ring_full_exits'] for v in vcpus)} ring full")
    if report["verification"]:
        text += f"  {report['verification']['rounds']} rounds verified"
    return text


def doctor_table(findings: list[dict[str, str]]) -> Table:
    table = Table("check", "", "finding", "what to do")
    colour = {"ok": "green", "warn": "yellow", "fail": "red", "absent": "yellow"}
    for f in findings:
        table.add_row(f["name"], f"[{colour[f['status']]}]{f['status']}[/]", f["finding"], f["advice"])
    return table


def machines_table(machines: list[dict[str, Any]]) -> Table:
    table = Table("name", "state", "accelerator", "vCPUs", "memory", "elapsed")
    for m in machines:
        if "vcpus" not in m:
            table.add_row(m["name"], m["state"])
            continue
        table.add_row(m["name"], m["state"], m["accelerator"], str(len(m["vcpus"])),
                      size_text(sum(s["size"] for s in m["slots"])), f"{m['elapsed_s']:.1f} s")
    return table
