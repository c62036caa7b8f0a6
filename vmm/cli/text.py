"""What a person sees: the report as tables, the live progress line, lists of machines.

Nothing is cut, however narrow the terminal: a table of which not every column fits is printed in parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Column, Table

__all__ = ["doctor_table", "machines_table", "print_report", "print_table", "progress_text", "screen", "size_text",
           "table"]

_PLAIN_WIDTH = 120
_FRAME = 3                  # characters of a column besides its text: a line, a blank at each side


def screen() -> Console:
    """Standard output; wide enough for a table where it is not a terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return console


def table(*columns: str, numbers: Sequence[str] = (), texts: Sequence[str] = (), title: str | None = None) -> Table:
    """A table of these columns, then ``numbers``, then ``texts``. Only texts may be broken over several lines."""
    made = Table(title=title, title_justify="left")
    for name in columns:
        made.add_column(name, no_wrap=True)
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    for name in texts:
        made.add_column(name, overflow="fold")
    return made


def print_table(whole: Table, console: Console, keys: int = 1) -> None:
    """Print a table so that nothing in it is cut: where the console is too narrow for all of its columns, in parts
    one below the other, each of them with the first ``keys`` columns."""
    for part in _parts(whole, console, keys):
        console.print(part)


def _parts(whole: Table, console: Console, keys: int) -> list[Table]:
    widths = [_least_width(column, console) for column in whole.columns]
    room = console.width - 1        # the last line of the frame
    if sum(widths) <= room:
        return [whole]
    groups: list[list[int]] = [[]]
    for at in range(keys, len(widths)):
        if groups[-1] and sum(widths[i] for i in (*range(keys), *groups[-1], at)) > room:
            groups.append([])
        groups[-1].append(at)
    return [_some_columns(whole, [*range(keys), *group], whole.title if not number else None)
            for number, group in enumerate(groups)]


def _least_width(column: Column, console: Console) -> int:
    """What a column takes if nothing in it is cut: its longest line, or (of a text) its longest word."""
    unlimited = console.options.update(width=1 << 16)
    found = [Measurement.get(console, unlimited, cell) for cell in (column.header, *column.cells)]
    return max(m.maximum if column.no_wrap else m.minimum for m in found) + _FRAME


def _some_columns(whole: Table, chosen: list[int], title: Any) -> Table:
    part = Table(title=title, title_justify="left")
    for at in chosen:
        column = whole.columns[at]
        part.add_column(column.header, justify=column.justify, no_wrap=column.no_wrap, overflow=column.overflow)
    for row in zip(*(whole.columns[at].cells for at in chosen), strict=True):
        part.add_row(*row)
    return part


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
    if "vcpus" not in report:       # nobody was left to make a whole one (vmm/machine/records.py)
        console.print(f"[bold]{report['name']}[/bold]  {report['state']} at {report['ended_at']}, exit code "
                      f"{report['exit_code']}: {escape(report['cause'])}")
        return
    outcome = "running" if report["state"] != "ended" else f"exit code {report['exit_code']}"
    console.print(f"[bold]{report['name']}[/bold]  {report['state']}, {report['elapsed_s']:.3f} s, "
                  f"{report['accelerator']}, dirty {report['tracking']}"
                  + (f" of {report['ring_entries']} entries" if report["ring_entries"] else "")
                  + f", {outcome}")
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
    if report["cause"]:
        console.print(f"ended at {report['ended_at']}: {report['cause']}", markup=False)


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
    if vcpu["registers"] and vcpu["exit_reason"] != "stopped":      # who stopped it does not ask where it was
        names = [f"{name} {value:016x}" for name, value in vcpu["registers"].items()]
        longest = max(map(len, names))
        each = max(1, (console.width - 2) // (longest + 2))
        for at in range(0, len(names), each):
            console.print("  " + "".join(f"  {n:>{longest}}" for n in names[at:at + each]), markup=False)


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
        console.print(f"    {finding}", markup=False)


def progress_text(report: dict[str, Any], rate: float) -> str:
    """One line: what a running machine is doing. ``rate`` in pages a second."""
    vcpus = report["vcpus"]
    running = sum(v["state"] not in ("exited", "dead") for v in vcpus)
    text = (f"{report['elapsed_s']:6.1f} s  {running}/{len(vcpus)} vCPUs running  "
            f"{sum(v['dirty_pages'] for v in vcpus):,} pages dirtied ({rate:,.0f}/s)  "
            f"{sum(v['ring_full_exits'] for v in vcpus):,} ring full")
    if report["verification"]:
        text += f"  {report['verification']['rounds']} rounds verified"
    return text


def doctor_table(findings: list[dict[str, str]]) -> Table:
    found = table("check", "", texts=("finding", "what to do"))
    colour = {"ok": "green", "warn": "yellow", "fail": "red", "absent": "yellow"}
    for f in findings:
        found.add_row(f["name"], f"[{colour[f['status']]}]{f['status']}[/]", escape(f["finding"]),
                      escape(f["advice"]))
    return found


def machines_table(machines: list[dict[str, Any]]) -> Table:
    """Reports, whole or not."""
    ended = any(m.get("ended_at") for m in machines)
    found = table("name", "state", "accelerator", numbers=("vCPUs", "memory", "elapsed"),
                  texts=("ended", "why") if ended else ())
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


def _state_text(machine: dict[str, Any]) -> str:
    if machine.get("ended_at"):
        return f"{machine['state']} ({machine['exit_code']})"
    dead = sum(v["state"] == "dead" for v in machine.get("vcpus", []))
    return machine["state"] + (f" ({dead} vCPU{'s' if dead > 1 else ''} dead)" if dead else "")
