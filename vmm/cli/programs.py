"""``vmm maps`` and ``vmm strace``: the Linux programs of a machine, from outside."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from .common import Duration, json_option, on_machine, print_json

if TYPE_CHECKING:
    from ..client.machine import Machine

__all__ = ["maps", "strace"]

_RATES = ("dirtied", "pages/s", "MiB/s")


@click.command()
@on_machine
@click.option("--rate", "seconds", type=Duration(),
              help="Measure for this time, 50ms to 60s, which mappings and threads dirty memory, and how fast.")
@json_option
def maps(machine: Machine, seconds: float | None, as_json: bool) -> None:
    """Show the processes of a machine's Linux program, their threads and what they have mapped. With --rate, pages of a
    mapping are distinct ones; those of a thread are entries of its vCPU's dirty ring, in which a page may come again.
    The system serves calls: what it writes for the program (a read into a buffer, a new page of zeros) is its own."""
    if seconds is None:
        found = machine.program_maps()
    else:
        from ..consumers.programs import map_rates

        found = map_rates(machine, seconds)
    if as_json:
        print_json({"name": machine.name, **found})
    else:
        _print_maps(found)


def _print_maps(found: dict[str, Any]) -> None:
    from rich.markup import escape

    from ..tables import print_table, screen, table

    console, rates = screen(), _RATES if "seconds" in found else ()
    for process in found["processes"]:
        console.print(f"{process['name']} (process {process['pid']})", markup=False)
        threads = table("tid", "name", "vCPU", numbers=rates, title="threads")
        for each in process["threads"]:
            vcpu = "" if each["vcpu"] is None else str(each["vcpu"])
            threads.add_row(str(each["tid"]), escape(each["name"]), vcpu + ("*" if each.get("changed") else ""),
                            *_rate_cells(each, rates))
        print_table(threads, console)
        mappings = table("addresses", "rights", numbers=("resident", *rates), texts=("what",), title="mappings")
        shown = [each for each in process["mappings"] if not rates or each["dirty_pages"]]
        for each in shown:
            mappings.add_row(f"{each['start']:x}-{each['end']:x}", each["rights"], f"{each['resident_pages']:,}",
                             *_rate_cells(each, rates), escape(each["what"]))
        if shown:
            print_table(mappings, console)
        if len(shown) < len(process["mappings"]):
            console.print(f"{len(process['mappings']) - len(shown)} mappings in which nothing was dirtied")
    if "seconds" in found:
        _print_others(found)


def _rate_cells(each: dict[str, Any], rates: tuple[str, ...]) -> tuple[str, ...]:
    if not rates or each["dirty_pages"] is None:
        return ("",) * len(rates)
    return f"{each['dirty_pages']:,}", f"{each['pages_per_s']:,.0f}", f"{each['mib_per_s']:.1f}"


def _print_others(found: dict[str, Any]) -> None:
    """What is of no process, and all of it."""
    from ..tables import print_table, screen, table

    console = screen()
    others = table("", numbers=_RATES, title="others")
    for each in found["other_vcpus"]:
        what = "system" if each["system"] else f"vCPU {each['vcpu']}, whose thread has ended"
        others.add_row(what, *_rate_cells(each, _RATES))
    print_table(others, console)
    if any(thread["changed"] for process in found["processes"] for thread in process["threads"]):
        console.print("* another thread was on this vCPU before, and is counted with it", markup=False)
    console.print(f"machine: {found['mib_per_s']:.1f} MiB/s, {found['pages_per_s']:,.0f} pages/s "
                  f"({found['dirty_pages']:,} distinct pages in {found['seconds']:.2f} s); in no mapping: "
                  f"{found['cached_pages']:,} of files and buffers, {found['free_pages']:,} free", markup=False)


@click.command()
@on_machine
@click.option("--time", "--duration", "duration", type=Duration(),
              help="Stop after this time.  [default: when the machine ends]")
@click.option("--process", type=int, metavar="PID", help="Only calls of this process, as vmm maps numbers it.")
@click.option("--count", is_flag=True, help="Print a table at the end: calls, errors and mean time of each.")
@json_option
def strace(machine: Machine, duration: float | None, process: int | None, count: bool, as_json: bool) -> int:
    """Print the system calls of a machine's Linux program as they are made. Each is a line: [thread] name(arguments) =
    result <seconds>. The time is from when the system took the call until it was answered. Not seen are calls
    that a vCPU serves by itself: gettid, sched_yield, and most of futex; nor clocks that are read without a call. With
    --json, one document per line. Ctrl-C stops; the program is not disturbed."""
    from ..client.interrupts import Interrupts
    from ..consumers.programs import system_calls

    counts: dict[str, list[float]] = {}
    lost: int | None = 0
    with Interrupts() as interrupts, contextlib.closing(
            system_calls(machine, duration, process, interrupts.wait)) as calls:
        for call in calls:
            if "lost" in call:
                lost = None if lost is None or call["lost"] is None else lost + call["lost"]
                click.echo(f"vmm: warning: {_lost_text(call['lost'])}", err=True)
            elif count:
                of = counts.setdefault(call["name"], [0, 0, 0.0])
                of[0] += 1
                of[1] += bool(call["error"])
                of[2] += call["seconds"]
            else:
                click.echo(json.dumps(call) if as_json else _line(call))
                sys.stdout.flush()
    if count:
        _print_counts(machine.name, counts, lost, as_json)
    return 128 + interrupts.came if interrupts.came else 0


def _line(call: dict[str, Any]) -> str:
    return f"[{call['tid']}] {call['name']}({call['arguments']}) = {call['result']} <{call['seconds']:.6f}>"


def _lost_text(lost: int | None) -> str:
    return (f"{lost:,} calls are not shown: they came too fast" if lost is not None else
            "calls are missing: they were asked for too late")


def _print_counts(name: str, counts: dict[str, list[float]], lost: int | None, as_json: bool) -> None:
    found: list[dict[str, Any]] = [
        {"name": call, "calls": int(calls), "errors": int(errors), "mean_s": seconds / calls}
        for call, (calls, errors, seconds) in sorted(counts.items(), key=lambda item: (-item[1][0], item[0]))]
    if as_json:
        print_json({"name": name, "calls": found, "lost": lost})
        return
    from ..tables import print_table, screen, table

    shown = table("call", numbers=("calls", "errors", "mean us"))
    for each in found:
        shown.add_row(each["name"], f"{each['calls']:,}", f"{each['errors']:,}" if each["errors"] else "",
                      f"{each['mean_s'] * 1e6:,.1f}")
    print_table(shown, screen())
