"""``vmm stats``: samples of a machine as it runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ipc.shm import PAGE_SIZE

from ..errors import ExitCode, VmmError
from .common import Duration, json_option, on_machine, print_json

if TYPE_CHECKING:
    from ..client.machine import Machine
    from ..consumers.stats import Sampler, Stats

__all__ = ["dirty_rate_option", "interval_option", "stats"]

_LEAST_S = 0.05

interval_option = click.option("--interval", type=Duration(_LEAST_S), default="1s", show_default=True,
                               help="Time from one sample to the next.")
dirty_rate_option = click.option(
    "--dirty-rate", "dirty_rate", is_flag=True,
    help="Also measure the distinct pages that are dirtied between samples. The machine logs for it, and each sample "
         "flushes.")


@click.command()
@on_machine
@interval_option
@click.option("--count", type=click.IntRange(min=1), metavar="N",
              help="End after N samples (default: when interrupted, or with the machine).")
@dirty_rate_option
@click.option("--json-lines", "lines", is_flag=True, help="Print each sample as a JSON document on one line.")
@json_option
def stats(machine: Machine, interval: float, count: int | None, dirty_rate: bool, lines: bool, as_json: bool) -> int:
    """Show what a machine does, sample by sample. That is vCPUs, dirty rate, rings, reaper, slots, and migration and
    snapshots under way. Nothing changes for the machine: it is not made to log unless --dirty-rate is given. With
    --json, one sample.

    \b
    vmm stats quickstart --json-lines | jq .dirty_pages_per_s
    """
    from ..client.interrupts import Interrupts
    from ..consumers.stats import Sampler

    if lines and as_json:
        raise VmmError("--json is one document, --json-lines one for each sample: give one of the two")
    left = 1 if as_json else count
    sampler = Sampler(machine, dirty_rate=dirty_rate)
    try:
        with Interrupts() as interrupts:
            sampler.sample()        # rates begin here
            due = time.monotonic()
            while left is None or left:
                due = max(due + interval, time.monotonic())
                if interrupts.wait(due - time.monotonic()):
                    return 128 + interrupts.came if count is not None or as_json else ExitCode.OK
                if (sample := _next(sampler)) is None:
                    break
                _print(sample, lines, as_json)
                left = None if left is None else left - 1
    finally:
        sampler.close()
    return ExitCode.OK


def _next(sampler: Sampler) -> Stats | None:
    """None: the machine has ended."""
    try:
        sample = sampler.sample()
    except VmmError as exc:
        from ..machine.runtime import is_running

        if exc.exit_code is ExitCode.NO_MACHINE and not is_running(sampler.machine.name):
            return None
        raise
    return None if sample.stats.state == "ended" else sample.stats


def _print(sample: Stats, lines: bool, as_json: bool) -> None:
    import msgspec

    if as_json:
        print_json(msgspec.to_builtins(sample))
    elif lines:
        click.echo(msgspec.json.encode(sample).decode())
    else:
        click.echo(_line(sample))


def _line(sample: Stats) -> str:
    running = sum(v.state not in ("exited", "dead") for v in sample.vcpus)
    fills = [v.ring_fill for v in sample.vcpus if v.ring_fill is not None]
    parts = [f"{sample.elapsed_s:9.1f} s  {sample.state}, {running}/{len(sample.vcpus)} vCPUs",
             f"{_count(sample.exits_per_s)} exits/s",
             f"{_megabytes(sample.dirty_pages_per_s)} logged" if sample.logging else "not logged"]
    if sample.distinct_pages_per_s is not None:
        parts.append(f"{_megabytes(sample.distinct_pages_per_s)} dirtied")
    if fills:
        parts.append(f"rings at most {max(fills):.0%} full, {_count(sample.ring_full_exits_per_s)} full/s")
    for what, share in (("stalled", sample.stalled), ("throttled", sample.throttled),
                        ("reaping", sample.reaper.reaping)):
        if share:
            parts.append(f"{share:.1%} {what}")
    if sample.migration is not None:
        parts.append(f"migration {sample.migration.status}, rounds {sample.migration.rounds}, "
                     f"{sample.migration.remaining / 1e6:,.1f} MB left")
    parts += [f"snapshot into {each.directory}, rounds {each.rounds}, {each.done / 1e6:,.1f} of "
              f"{each.total / 1e6:,.1f} MB" for each in sample.snapshots]
    return "  ".join(parts)


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _megabytes(pages_per_s: float | None) -> str:
    return "-" if pages_per_s is None else f"{pages_per_s * PAGE_SIZE / 1e6:,.1f} MB/s"
