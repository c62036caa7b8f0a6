"""``vmm dirty-rate``, ``dirty-limit``, ``working-set``."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ipc.shm import PAGE_SIZE

from .. import optional
from ..errors import VmmError, one_line
from .common import Duration, Rate, json_option, on_machine, print_json, recording, text_aside

if TYPE_CHECKING:
    from ..client.machine import Machine
    from ..consumers.rate import DirtyRate

__all__ = ["dirty_limit", "dirty_rate", "tracking", "working_set"]

_MIB = 1 << 20


@click.command("dirty-rate")
@on_machine
@click.option("--time", "seconds", type=Duration(), default="1s", show_default=True,
              help="How long to measure, 50ms to 60s.")
@click.option("--mode", type=click.Choice(["ring", "bitmap", "sampling"]), default=None,
              help="Per vCPU and in total (ring), in total (bitmap), or estimated without the dirty log (sampling).  "
                   "[default: ring where the machine has rings]")
@click.option("--unchanged", is_flag=True,
              help="Also count dirtied pages whose content is what it was. The machine stands still while its memory "
                   "is copied, and again while it is compared.")
@click.option("--watch", is_flag=True, help="Repeat the measurement until interrupted or until the machine ends.")
@json_option
def dirty_rate(machine: Machine, seconds: float, mode: Any, unchanged: bool, watch: bool, as_json: bool) -> None:
    """Measure how fast the guest dirties memory. Other users of the dirty log are not affected.

    A page counts once in the time that is measured, however often it is written: the longer that is, the lower the rate
    of a guest that writes to the same pages again. The machine's rate is of distinct pages; the rates of the vCPUs are
    of their ring entries, and two vCPUs may dirty the same page. With --watch and --json, one document per line.
    """
    from ..consumers.rate import best_mode, check_time, measure
    from ..machine.records import now

    check_time(seconds)
    mode = mode or best_mode(machine)
    while True:
        rate = measure(machine, seconds, mode, unchanged=unchanged)
        if as_json and watch:
            click.echo(json.dumps({"name": machine.name, "time": now(), **rate.as_dict()}))
            sys.stdout.flush()
        elif as_json:
            print_json({"name": machine.name, **rate.as_dict()})
        else:
            if watch:
                click.echo(f"{now()}:")
            _print_rate(rate)
            sys.stdout.flush()
        if not watch or machine.status()["state"] == "ended":
            return


def _print_rate(rate: DirtyRate) -> None:
    for vcpu in rate.vcpus:
        click.echo(f"vCPU {vcpu.index}: {vcpu.mib_per_s:10.1f} MiB/s {vcpu.pages_per_s:12,.0f} pages/s")
    repeated = f", {rate.repeated:,} repeated entries" if rate.repeated else ""
    click.echo(f"machine: {rate.mib_per_s:9.1f} MiB/s {rate.pages_per_s:12,.0f} pages/s "
               f"({rate.pages:,} distinct pages{repeated}, in {rate.seconds:.2f} s, {rate.mode})")
    if rate.unchanged is not None:
        from .text import unchanged_text

        click.echo(f"    {unchanged_text(rate.unchanged, rate.pages)}")


@click.command()
@on_machine
@click.argument("mode", type=click.Choice(["ring", "bitmap", "uffd", "none", "auto"]))
@json_option
def tracking(machine: Machine, mode: str, as_json: bool) -> None:
    """Switch to another dirty-tracking mode. The vCPUs are paused for the switch; no dirty page is lost."""
    done = machine.set_tracking(mode)
    if as_json:
        print_json({"name": machine.name, **done})
    else:
        chosen = f" (currently {done['tracking']})" if mode == "auto" else ""
        click.echo(f"{machine.name}: tracking {mode}{chosen}, was {done['before']} (paused for "
                   f"{done['seconds'] * 1000:.1f} ms)")


@click.group("dirty-limit")
def dirty_limit() -> None:
    """Limit how fast vCPUs may dirty memory."""


_vcpu_option = click.option("--vcpu", type=click.IntRange(min=0), default=None,
                            help="Only this vCPU (default: every vCPU).")


class _Limit(Rate):
    """Not 0, for which there is another verb."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from ..client.units import RATE

        if isinstance(value, str) and (match := re.match(RATE, value)) and not match[1].strip("0."):
            raise VmmError(f"RATE: {one_line(value, 20)} is not a limit: vmm dirty-limit cancel NAME removes one")
        return super().convert(value, param, ctx)


@dirty_limit.command("set", context_settings={"ignore_unknown_options": True})    # -5MB/s is a rate that cannot be
@on_machine
@click.argument("rate", type=_Limit())
@_vcpu_option
@json_option
def limit_set(machine: Machine, rate: float, vcpu: int | None, as_json: bool) -> None:
    """Limit the rate at which each vCPU (or one of them) dirties memory to RATE, for example 100MB/s."""
    pages = round(rate / PAGE_SIZE)
    if pages < 1:
        raise VmmError(f"RATE: {rate:g} bytes per second is less than one page per second")
    machine.dirty_limit(pages, vcpu)
    _limit_done(machine, vcpu, pages, as_json)


@dirty_limit.command("cancel")
@on_machine
@_vcpu_option
@json_option
def limit_cancel(machine: Machine, vcpu: int | None, as_json: bool) -> None:
    """Remove the limit immediately."""
    machine.dirty_limit(0, vcpu)
    _limit_done(machine, vcpu, 0, as_json)


def _limit_done(machine: Machine, vcpu: int | None, pages: int, as_json: bool) -> None:
    if as_json:
        print_json({"name": machine.name, "vcpu": vcpu, "pages_per_s": pages})
        return
    who = "each vCPU" if vcpu is None else f"vCPU {vcpu}"
    what = f"limited to {_rate_text(pages)}, {pages:,} pages/s" if pages else "unlimited"
    click.echo(f"{machine.name}: {who} {what}")


def _rate_text(pages: float) -> str:
    """In the unit of limits, and in that of vmm dirty-rate."""
    return f"{pages * PAGE_SIZE / 1e6:.1f} MB/s ({pages * PAGE_SIZE / _MIB:.1f} MiB/s)"


@dirty_limit.command("query")
@on_machine
@_vcpu_option
@click.option("--time", "seconds", type=Duration(), default="1s", show_default=True, help="How long to measure.")
@json_option
def limit_query(machine: Machine, vcpu: int | None, seconds: float, as_json: bool) -> None:
    """Show the limits and the current dirty rates."""
    from ..consumers.rate import measure

    rates = measure(machine, seconds, "ring").vcpus
    found = [{"index": v["index"], "limit_mb_per_s": v["dirty_limit_pages_per_s"] * PAGE_SIZE / 1e6 or None,
              "current_mb_per_s": r.pages_per_s * PAGE_SIZE / 1e6, "throttled_s": v["throttled_s"]}
             for v, r in zip(machine.status()["vcpus"], rates, strict=True) if vcpu in (None, v["index"])]
    if not found:
        raise VmmError(f"there is no vCPU {vcpu}")
    if as_json:
        print_json({"name": machine.name, "vcpus": found})
        return
    for each in found:
        limit = f"{each['limit_mb_per_s']:.1f} MB/s" if each["limit_mb_per_s"] else "none"
        click.echo(f"vCPU {each['index']}: limit {limit}, now {each['current_mb_per_s']:.1f} MB/s, "
                   f"throttled for {each['throttled_s']:.2f} s in total")


@click.command("working-set")
@on_machine
@click.option("--interval", type=Duration(least=0.001), default="100ms", show_default=True,
              help="Length of an interval.")
@click.option("--time", "seconds", type=Duration(), default="10s", show_default=True, help="How long to record.")
@click.option("--output", type=click.Path(path_type=Path), required=True,
              help="Output path of the recording (.npz).")
@click.option("--png", type=click.Path(path_type=Path), help="Write a plot to this file.")
@click.option("--html", "html_path", type=click.Path(path_type=Path),
              help="Write a self-contained HTML page to this file.")
@json_option
def working_set(machine: Machine, interval: float, seconds: float, output: Path, png: Path | None,
                html_path: Path | None, as_json: bool) -> int:
    """Record which pages are dirtied per interval. They can be plotted over time, by address and by window. Ctrl-C
    stops early and keeps what was recorded."""
    from ..consumers import workingset
    from ..outputs import open_output

    if interval > seconds:
        raise VmmError(f"--interval {interval:g} s is longer than --time {seconds:g} s")
    aside = text_aside(output, as_json)
    title = f"{machine.name}: pages dirtied per {interval * 1000:g} ms interval"
    if png or html_path:
        optional.figure()       # what draws it is there, or that is said before the work begins
    with contextlib.ExitStack() as stack:       # and every file is tried
        kept = stack.enter_context(open_output(output))
        drawn = stack.enter_context(open_output(png)) if png else None
        page = stack.enter_context(open_output(html_path)) if html_path else None
        with recording() as (interrupts, progress):
            found = workingset.record(machine, interval, seconds, progress, interrupts.wait)
        if not found.intervals:
            raise VmmError(f"machine '{machine.name}' ended before the first interval was complete")
        found.write(kept.file)
        kept.commit()       # whatever comes of the pictures
        if drawn is not None:
            drawn.write(workingset.draw(found, title))
        if page is not None:
            page.write(workingset.page(found, title).encode())
    counts, took = found.dirty_pages(), float(found.times[-1])
    summary = {"name": machine.name, "intervals": found.intervals, "seconds": round(took, 3),
               "mean_interval_s": round(took / found.intervals, 6), "mean_pages": float(counts.mean()),
               "most_pages": int(counts.max()), "output": str(output), "reason": found.reason,
               "complete": not found.reason}
    if as_json:
        print_json(summary)
    else:
        mean = took / found.intervals
        click.echo(f"{output}: {found.intervals} intervals of {mean * 1000:.4g} ms, {counts.mean():,.0f} dirty "
                   f"pages per interval on average, {counts.max():,} at most"
                   + (f"; incomplete: {found.reason}" if found.reason else ""), err=aside)
    if interrupts.came:
        return 128 + interrupts.came
    if found.reason:
        raise VmmError(f"{output} is incomplete: {found.reason}")
    return 0
