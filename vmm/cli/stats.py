"""``vmm stats``: samples of a machine as it runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ..errors import ExitCode, VmmError
from .common import Duration, json_option, on_machine, print_json

if TYPE_CHECKING:
    from ..client.machine import Machine
    from ..consumers.stats import Sampler, Stats

__all__ = ["dirty_rate_option", "interval_option", "stats"]

_LEAST_S = 0.05
_HEAD_EVERY = 20        # lines, as vmstat(8)

#: And their widths: 79 characters in all. The fullest ring; shares of the time.
_COLUMNS = (("seconds", 7), ("state", 8), ("vCPUs", 8), ("exits/s", 8), ("log MB/s", 9), ("dirty MB/s", 11),
            ("ring", 5), ("full/s", 7), ("stalled", 8), ("limited", 8))

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
    left, number = 1 if as_json else count, 0
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
                _print(sample, number, lines, as_json)
                number += 1
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


def _print(sample: Stats, number: int, lines: bool, as_json: bool) -> None:
    import msgspec

    if as_json:
        print_json(msgspec.to_builtins(sample))
    elif lines:
        click.echo(msgspec.json.encode(sample).decode())
    else:
        from ..top.text import activity

        if number % _HEAD_EVERY == 0:
            click.echo("".join(f"{name:>{width}}" for name, width in _COLUMNS))
        click.echo("".join(f"{cell:>{width}}" for cell, (_, width) in zip(_cells(sample), _COLUMNS, strict=True)))
        for each in activity(sample):
            click.echo(f"          {each}")


def _cells(sample: Stats) -> tuple[str, ...]:
    """In the order of _COLUMNS."""
    from ..top.text import megabytes, percent, short

    running = sum(v.state not in ("exited", "dead") for v in sample.vcpus)
    fills = [v.ring_fill for v in sample.vcpus if v.ring_fill is not None]
    return (f"{sample.elapsed_s:.1f}", sample.state, f"{running}/{len(sample.vcpus)}", short(sample.exits_per_s),
            megabytes(sample.dirty_pages_per_s), megabytes(sample.distinct_pages_per_s),
            percent(max(fills, default=None)), short(sample.ring_full_exits_per_s), percent(sample.stalled),
            percent(sample.throttled))
