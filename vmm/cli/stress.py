"""``vmm stress``: the sweep on the command line."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ..errors import ExitCode, VmmError
from .common import Duration, json_option, print_json
from .run import Interrupted

if TYPE_CHECKING:
    from ..lab.stress.sweep import Point, PointResult, Sweep

__all__ = ["stress"]

_TABLE_WIDTH = 180      # columns, where it is not a terminal
PAGE_LOST = 1       # exit status: documented for this verb; elsewhere 1 is a guest's own code


class _Values(click.ParamType):
    """``1,2,4``: values of an axis, as YAML has them."""

    name = "value,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        from ..client.yamlfile import parse_value

        where = param.opts[0] if param else "value"
        return [parse_value(part, where) for part in value.split(",")]


def _axis(name: str, help_text: str) -> Callable[[Any], Any]:
    return click.option(f"--{name.replace('_', '-')}", name, type=_Values(), help=help_text)


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@_axis("vcpus", "Numbers of vCPUs, for example 1,2,4,8.")
@_axis("ring", "Ring sizes in entries; 0 is the plain bitmap.")
@_axis("workload", "Sample guests that run indefinitely (accel replay: patterns).")
@_axis("reaper", "Reaper modes: adaptive,fixed.")
@_axis("accel", "Accelerators, for example kvm,unicorn.")
@_axis("ram", "Guest RAM sizes, for example 256MiB,1GiB.")
@_axis("dirty_limit", "Dirty limits per vCPU, for example none,8MB/s.")
@click.option("--machines", type=int, help="Number of machines that run at once at each point.")
@click.option("--seconds", type=Duration(), help="Length of the timed window of each point.")
@click.option("--repeat", type=int, help="Number of repetitions per point.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False),
              help="Directory for the results (required but with --faults); points already in it are not measured "
                   "again.")
@click.option("--resume", is_flag=True, help="Continue the sweep stored in --output.")
@click.option("--cluster", metavar="ADDRESS",
              help="Measure the points on the nodes of a Ray cluster: auto, HOST:PORT, or local for one on this host.")
@click.option("--faults", type=click.IntRange(1), metavar="N",
              help="Instead of a sweep: kill and stop processes of machines N times while clients use them.")
@click.option("--seed", type=click.IntRange(0), help="Seed of the faults; the same seed plans the same campaign.")
@click.option("--replay", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="With --faults: no random faults, but those that failed in the campaign whose faults.json this is.")
@json_option
def stress(config: Path | None, output: Path | None, resume: bool, cluster: str | None, faults: int | None,
           seed: int | None, replay: Path | None, as_json: bool, **axes: Any) -> int:
    """Measure machines over a parameter sweep. It varies vCPUs, ring sizes, workloads, reapers and accelerators, and
    verifies that no page is lost.

    The sweep is given by the file CONFIG, by options, or by both (options take precedence). To continue an
    interrupted sweep, run the same command again or use --resume. Exit status 1: a page was lost.

    With --faults, random processes of machines are killed and stopped while clients sync, plug memory, switch modes,
    record, take snapshots and migrate; what each client is told is compared with the memory it sees. Only --accel,
    --seed, --replay and --output go with it.
    """
    if faults is not None:
        if cluster is not None:
            raise VmmError("--faults: cannot be used with --cluster")
        return _faults(faults, seed, config, output, resume, replay, axes, as_json)
    if seed is not None or replay is not None:
        raise VmmError(f"--{'replay' if seed is None else 'seed'}: only valid with --faults")
    if output is None:
        raise VmmError("--output: give a directory for the results")
    from ..lab.stress import sweep as sweeps
    from ..lab.stress.report import draw_pictures, write_report
    from ..lab.stress.run import run
    from ..optional import MissingPackage

    flags = {key: (_as_given(key, value), value) for key, value in axes.items() if value is not None}
    if resume:
        config = _stored(config, flags, output / sweeps.SWEEP)
    sweep = sweeps.load_sweep(config, flags, here=cluster is None)
    with _signals() as came, _progress(sweep) as (doing, done):
        results, complete = run(sweep, output, cluster=cluster, stop=lambda: bool(came), progress=doing,
                                done=done)
    document = write_report(sweep, results, complete, output)
    try:
        draw_pictures(results, output)
    except MissingPackage as exc:
        click.echo(f"no plots: {exc}", err=True)
    if as_json:
        print_json(document)
    else:
        _show(sweep, results, complete, output)
    if not complete:
        return 128 + came[0]
    return _exit_status(results)


def _faults(faults: int, seed: int | None, config: Path | None, output: Path | None, resume: bool,
            replay: Path | None, axes: dict[str, Any], as_json: bool) -> int:
    from .faults import run_faults

    accels = axes.pop("accel") or []
    others = [f"--{key.replace('_', '-')}" for key, value in axes.items() if value is not None]
    others += ["--resume"] * resume + ["CONFIG"] * (config is not None)
    if others:
        raise VmmError(f"--faults: cannot be used with {others[0]}")
    if replay is not None and seed is not None:
        raise VmmError("--replay: has a seed of its own")
    with _signals() as came:
        status = run_faults(faults, seed, [str(accel) for accel in accels], output, replay,
                            stop=lambda: bool(came), as_json=as_json)
    return 128 + came[0] if came and not status else status


def _as_given(key: str, value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else f"{value:g}"
    return f"--{key.replace('_', '-')} {text}"


def _stored(config: Path | None, flags: dict[str, Any], stored: Path) -> Path:
    if config is not None or flags:
        raise VmmError("--resume continues the sweep stored in --output: leave out CONFIG and the options of the "
                       "sweep")
    if not os.path.isfile(stored):
        raise VmmError(f"{stored}: not found: there is no sweep to resume")
    return stored


def _exit_status(results: list[PointResult]) -> int:
    """A lost page before all; then what the first bad point had."""
    if any(r.lost for r in results):
        return PAGE_LOST
    if any(not p.ok for r in results for p in r.proof):
        return ExitCode.VERIFY_FAILED
    return next((r.exit_code for r in results if r.error), ExitCode.OK)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM that came. The first one is asked for; the second interrupts whatever is being done."""
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        if len(came) > 1:
            raise Interrupted(signum)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _progress(sweep: Sweep) -> Iterator[tuple[Callable[[Point, str], None], Callable[[PointResult, bool], None]]]:
    """On a terminal a bar: points done, the one at hand, the last one's rate, time left. Else a line per point."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = Console(stderr=True, highlight=False)
    total = len(sweep.points())
    if not screen.is_terminal:
        count = 0

        def said(result: PointResult, fresh: bool) -> None:
            nonlocal count
            count += 1
            there = "" if fresh else " (already measured)"
            click.echo(f"{count}/{total} {result.point}: {_outcome(result)}{there}", err=True)

        yield (lambda point, doing: None), said
        return
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn(),
               TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("", total=total)
        last = ""

        def doing(point: Point, what: str) -> None:
            bar.update(task, description=f"{point}: {what}{last}")

        def done(result: PointResult, fresh: bool) -> None:
            nonlocal last
            last = f" (previous: {_outcome(result)})"
            bar.advance(task)
            if result.error or result.lost:
                bar.console.print(f"{result.point}: {_outcome(result)}", markup=False, soft_wrap=True)

        yield doing, done


def _outcome(result: PointResult) -> str:
    if result.error:
        return result.error
    rate = f"{sum(f.pages_per_s for f in result.figures):,.0f} pages/s"
    if not result.proof:
        return rate
    return f"{rate}, {result.lost} pages lost" + (f", {result.surplus} surplus" if result.surplus else "")


def _show(sweep: Sweep, results: list[PointResult], complete: bool, output: Path) -> None:
    from ..lab.stress.model import fit_all
    from ..lab.stress.report import print_model, print_results
    from ..tables import screen

    console = screen()
    if not console.is_terminal:
        console.width = _TABLE_WIDTH
    if results:
        print_results(results, console)
        print_model(fit_all(results), console)
    lost = sum(r.lost for r in results)
    if lost:
        console.print(f"[red]{lost} dirtied pages were LOST[/red]:")
        for result in results:
            for proof in result.proof:
                for finding in proof.findings:
                    console.print(f"    {result.point}: {finding}", markup=False, soft_wrap=True)
    for result in results:
        if result.error:
            console.print(f"failed: {result.point}: {result.error}", markup=False, soft_wrap=True)
    state = "" if complete else (f"interrupted: {len(results)} of {len(sweep.points())} points are done; run the "
                                 "same command again (or use --resume) to continue. ")
    console.print(f"{state}{output}: results.json, results.jsonl, plots", markup=False, soft_wrap=True)
