"""``vmm predict``: what a live migration would take."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ipc.shm import PAGE_SIZE

from .. import optional
from ..errors import VmmError
from .common import Duration, Rate, Size, json_option, print_json, progress_bar, recording
from .completion import complete_machines

if TYPE_CHECKING:
    from ..consumers.predict.costs import Costs
    from ..consumers.predict.dirtying import Guest, Memory
    from ..consumers.predict.grid import Cell, Remedy
    from ..consumers.predict.rings import RingFit

__all__ = ["predict"]

_BANDWIDTHS = ("1Gbit/s", "2.5Gbit/s", "10Gbit/s", "25Gbit/s")
_LOOKS = (0.1, 1.0)         # seconds between two looks at the log, for the ring


@click.command()
@click.argument("name", required=False, shell_complete=complete_machines)
@click.option("--trace", "trace", type=click.Path(path_type=Path, exists=False),
              help="Predict from this dirty trace, instead of from machine NAME.")
@click.option("--pid", "target", help="Predict for a process of this host, or for the VM that it runs: its id, a VM's "
                                      "name, or the path of a VM's QMP socket (see vmm watch).")
@click.option("--ram", "what", flag_value="ram", help="With --pid: only the memory of the VM that it runs.")
@click.option("--time", "seconds", type=Duration(), default="5s", show_default=True,
              help="How long to record what machine NAME, or the process, dirties.")
@click.option("--interval", type=Duration(least=0.001), default="50ms", show_default=True,
              help="Between two harvests of that recording.")
@click.option("--bandwidth", "bandwidths", type=Rate(), multiple=True,
              help=f"Bandwidth to try, for example 10Gbit/s; may be repeated.  [default: {', '.join(_BANDWIDTHS)}]")
@click.option("--downtime", "downtimes", type=Duration(), multiple=True,
              help="Downtime limit to try; may be repeated.  [default: 300ms]")
@click.option("--latency", type=Duration(), default=None, help="Time that a message takes to the target.")
@click.option("--channels", type=click.IntRange(1, 16), default=2, show_default=True, help="As for vmm migrate.")
@click.option("--ratio", type=click.FloatRange(min=1.0), default=1.0, show_default=True,
              help="Of compression: bytes before by bytes after. More than 1 means that pages are compressed.")
@click.option("--max-rounds", type=click.IntRange(1, 1000), default=30, show_default=True, help="As for vmm migrate.")
@click.option("--no-converge", is_flag=True, help="Do not throttle the vCPUs that dirty most.")
@click.option("--postcopy", is_flag=True, help="Go over to post-copy if pre-copy does not converge at once.")
@click.option("--postcopy-after", type=click.IntRange(1, 1000), default=1, show_default=True, metavar="ROUNDS",
              help="As for vmm migrate.")
@click.option("--dirty-limit", type=Rate(), default=None, help="Limit to which each vCPU is held meanwhile.")
@click.option("--filled", type=Size(), default=None,
              help="With --trace and --pid: memory that has bytes; the rest is zero.  [default: all]")
@click.option("--png", type=click.Path(path_type=Path), help="Write a plot to this file.")
@click.option("--cluster", metavar="ADDRESS",
              help="Predict on the nodes of a Ray cluster, a core for each bandwidth and limit: auto, HOST:PORT, or "
                   "local for one on this host.")
@json_option
def predict(name: str | None, trace: Path | None, target: str | None, what: str | None, seconds: float,
            interval: float, bandwidths: tuple[float, ...], downtimes: tuple[float, ...], latency: float | None,
            ratio: float, dirty_limit: float | None, filled: int | None, png: Path | None, cluster: str | None,
            as_json: bool, **asked: Any) -> None:
    """Predict what a live migration would take. It is that of machine NAME, of the guest of a dirty trace, or of
    another VMM's VM: time, downtime, bytes and rounds at several bandwidths and downtime limits; from which bandwidth
    on it converges, and what helps where it does not. Nothing is migrated."""
    from ..client.units import parse_rate
    from ..consumers.migration.report import Options
    from ..consumers.predict.dirtying import from_trace
    from ..consumers.predict.grid import Study
    from ..consumers.predict.rings import fit
    from ..consumers.predict.simulate import Way
    from ..lab.predictions import predict_grid
    from ..outputs import open_output

    if sum(each is not None for each in (name, trace, target)) != 1:
        raise VmmError("say what to predict from: the NAME of a machine, --trace FILE, or --pid PID")
    if filled is not None and name is not None:
        raise VmmError("--filled is for --trace and --pid: of a machine it is known")
    if what and not target:
        raise VmmError(f"--{what}: is for --pid")
    if png:
        optional.figure()       # what draws it is there, or that is said before the work begins
    with contextlib.ExitStack() as stack:
        drawn = stack.enter_context(open_output(png)) if png else None
        of = str(trace or target or name)
        if name is not None:
            guest, memory, costs = _from_machine(name, seconds, interval)
        else:
            costs = None
            guest, sizes = (from_trace(trace) if trace is not None else
                            _from_process(str(target), what, seconds, interval))
            memory = _memory(sizes, filled)
        options = Options(converge=not asked.pop("no_converge"), compression="zstd" if ratio > 1 else "none", **asked)
        limits = None if dirty_limit is None else dict.fromkeys(range(len(guest.vcpus)), dirty_limit / PAGE_SIZE)
        study = Study(guest, memory, options, Way(latency or 0.0, ratio), costs, limits)
        tried = sorted(bandwidths or [parse_rate(text) for text in _BANDWIDTHS])
        allowed = sorted(downtimes or [options.downtime])
        with progress_bar() as bar:
            task = bar.add_task("predicting", total=(len(tried) + 1) * len(allowed))
            cells = predict_grid(study, tried, allowed, cluster=cluster, progress=lambda: bar.advance(task))
            least: dict[float, float | None] = {}
            for limit in allowed:
                least[limit] = study.having(downtime=limit).least_bandwidth(tried)
                bar.advance(task)
        remedies = study.having(bandwidth=tried[0], downtime=allowed[0]).remedies(least[allowed[0]])
        rings = [fit(guest, each) for each in _LOOKS if each <= guest.seconds]
        if drawn is not None:
            from ..consumers.predict.plot import draw

            drawn.write(draw(cells, f"migrations of {of}, foretold"))
    if as_json:
        print_json({"from": of, "vcpus": len(guest.vcpus), "seconds": guest.seconds,
                    "memory": sum(memory.sizes.values()) * PAGE_SIZE, "filled": memory.filled * PAGE_SIZE,
                    "grid": [cell.as_dict() for cell in cells], "least_bandwidth": least[allowed[0]],
                    "least_bandwidths": [{"downtime_limit": limit * 1000, "bandwidth": bandwidth}
                                         for limit, bandwidth in least.items()],
                    "remedies": [each.as_dict() for each in remedies], "rings": [each.as_dict() for each in rings]})
        return
    _print(guest, memory, cells, least)
    _print_remedies(remedies, cells[0])
    for each in rings:
        _print_ring(each)


def _memory(sizes: dict[int, int], filled: int | None) -> Memory:
    from ..consumers.predict.dirtying import Memory

    total = sum(sizes.values())
    pages = total if filled is None else filled // PAGE_SIZE
    if pages > total:
        raise VmmError(f"--filled: the guest has {total * PAGE_SIZE >> 20} MiB of memory in all")
    return Memory.whole(sizes, pages / total)


def _from_process(target: str, what: str | None, seconds: float, interval: float) -> tuple[Guest, dict[int, int]]:
    from ..consumers.predict.recorded import watch_process
    from .watch import LEAST_INTERVAL, watching

    with watching(target, what) as (_, source, _), recording() as (interrupts, progress):
        return watch_process(source, seconds, max(interval, LEAST_INTERVAL), progress, interrupts.wait)


def _from_machine(name: str, seconds: float, interval: float) -> tuple[Guest, Memory, Costs]:
    from ..client.machine import Machine
    from ..consumers.predict.recorded import costs_of, watch

    with Machine.attach(name) as machine:
        machine.require_state()
        with recording() as (interrupts, progress):
            return *watch(machine, seconds, interval, progress, interrupts.wait), costs_of(machine)


def _rate(value: float) -> str:
    from ..tables import digits_text

    return f"{digits_text(value * 8 / 1e9)} Gbit/s ({digits_text(value / 1e6, 6)} MB/s)"


def _print(guest: Guest, memory: Memory, cells: list[Cell], least: dict[float, float | None]) -> None:
    """``least``: {downtime limit: bandwidth from which on it converges by itself}"""
    from ..consumers.predict.simulate import outcome_text
    from ..tables import digits_text, print_table, screen, table

    total = sum(memory.sizes.values())
    click.echo(f"{total * PAGE_SIZE >> 20:,} MiB of memory, {memory.filled * PAGE_SIZE >> 20:,} MiB of it filled; "
               f"{len(guest.vcpus)} vCPUs, which dirtied {len(guest.pages):,} pages in {guest.seconds:.1f} s")
    shown = table("bandwidth", "limit", "outcome", numbers=("total s", "downtime ms", "MB sent", "rounds", "throttled"))
    for cell in cells:
        found = cell.found
        quota = min(found.throttled.values(), default=0) * PAGE_SIZE / 1e6
        shown.add_row(f"{digits_text(cell.bandwidth * 8 / 1e9)} Gbit/s", f"{cell.downtime * 1000:g} ms",
                      outcome_text(found.outcome, found.throttled), f"{found.total:,.2f}",
                      f"{found.downtime * 1000:,.0f}", f"{found.transferred / 1e6:,.0f}",
                      str(len(found.rounds)), f"{quota:,.1f} MB/s" if quota else "")
    print_table(shown, screen(), keys=2)
    if any(cell.found.short for cell in cells):
        click.echo(f"Some rounds take longer than the {guest.seconds:.1f} s that were recorded: more pages may get "
                   "dirty in them. Record for longer.")
    for limit, bandwidth in least.items():
        where = "no bandwidth" if bandwidth is None else f"{_rate(bandwidth)} and above"
        click.echo(f"It converges by itself at {where}, with a downtime limit of {limit * 1000:g} ms.")


def _print_remedies(remedies: list[Remedy], cell: Cell) -> None:
    from ..tables import digits_text

    if not remedies:
        return
    click.echo(f"At {digits_text(cell.bandwidth * 8 / 1e9)} Gbit/s and {cell.downtime * 1000:g} ms it does not. What "
               "helps:")
    for each in remedies:
        found = each.found
        takes = f"total {found.total:,.2f} s, downtime {found.downtime * 1000:,.0f} ms"
        limit = digits_text(each.value * 1000).replace(",", "")
        how = {"bandwidth": f"{_rate(each.value)}",
               "downtime": f"--downtime {limit}ms, after {len(found.rounds)} rounds",
               "dirty-limit": f"vmm dirty-limit set NAME {digits_text(each.value / 1e6, 4).replace(',', '')}MB/s",
               "converge": "the migration throttles vCPUs" + (
                   f", to {min(found.throttled.values()) * PAGE_SIZE / 1e6:,.1f} MB/s" if found.throttled else ""),
               "postcopy": f"--postcopy, {found.pending:,} pages of it after the hand-over"}[each.what]
        click.echo(f"  {how}: {takes}" + (" (still over the limit)" if found.outcome == "forced" else ""))


def _print_ring(ring: RingFit) -> None:
    click.echo(f"Asked every {ring.interval * 1000:g} ms, the busiest vCPU has {ring.median:,} pages in the median, "
               f"{ring.most:,} at most: " + ("more than any ring holds, so track with bitmaps"
                                             if ring.entries is None else
                                             f"a ring of {ring.entries:,} entries holds that"))
