"""``vmm compare``: which mode of dirty tracking is best when, on this host."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from ipc.layout import RING_MAX, RING_MIN
from workers.accel import registry

from ..errors import VmmError
from ..optional import MissingPackage
from .common import Duration, json_option, print_json

__all__ = ["compare"]

_VERSION = 2                # of results.json
_RESULTS_MAX = 64 << 20     # bytes of it


class Sizes(click.ParamType):
    """``64MiB,1GiB``: whole MiB."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        from ..client.units import parse_size

        try:
            found = [parse_size(int(part) if part.isdigit() else part) for part in str(value).split(",")]
        except ValueError as exc:
            raise VmmError(f"--ram: {exc}") from None
        if any(size < 8 << 20 or size % (1 << 20) for size in found):
            raise VmmError(f"--ram {value}: must be a comma-separated list of sizes in whole MiB, at least 8MiB each")
        return tuple(size >> 20 for size in found)


class Numbers(click.ParamType):
    """``1,2,4`` from ``minimum`` to ``maximum``."""

    name = "numbers"

    def __init__(self, minimum: int, maximum: int, power: bool = False) -> None:
        self._minimum, self._maximum, self._power = minimum, maximum, power

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        option = param.opts[0] if param else "numbers"
        try:
            found = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            raise VmmError(f"{option} {value}: must be a comma-separated list of numbers") from None
        for number in found:
            if not self._minimum <= number <= self._maximum or (self._power and number & number - 1):
                raise VmmError(f"{option} {number}: must be {'a power of two ' if self._power else ''}from "
                               f"{self._minimum} to {self._maximum}")
        return found


class Intervals(click.ParamType):
    """``10ms,1s``"""

    name = "durations"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        return tuple(Duration().convert(part, param, ctx) for part in str(value).split(","))


@click.command()
@click.option("--ram", type=Sizes(), default="64MiB,512MiB,2GiB", show_default=True, help="Guest RAM sizes.")
@click.option("--vcpus", type=Numbers(1, 256), default="1,2", show_default=True, help="Numbers of vCPUs.")
@click.option("--spin", type=Numbers(0, 1 << 31), default="0,200,5000", show_default=True,
              help="Pause instructions of the guest after each write, which set the dirtying rate.")
@click.option("--ring", type=Numbers(RING_MIN, RING_MAX, power=True), default="4096,1024,65536", show_default=True,
              help="Dirty ring sizes in entries; the first is the default, the others are measured separately.")
@click.option("--interval", type=Intervals(), default="100ms,10ms", show_default=True,
              help="Times between two syncs; the first is the default, the others are measured separately.")
@click.option("--tracking", "modes", default="ring,bitmap,uffd,sampling,auto,idle", show_default=True,
              help="Tracking modes to compare with no tracking. idle: rings while nobody needs a log.")
@click.option("--workload", type=click.Choice(["random", "hotspot", "sequential"]), default="random",
              show_default=True, help="Sample guest to run.")
@click.option("--accel", type=click.Choice(["auto", *registry.names("guest")]), default="auto", show_default=True,
              help="Accelerator to use.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=4, show_default=True,
              help="Measurements of each mode per point.")
@click.option("--window", type=Duration(), default="250ms", show_default=True, help="Duration of a measurement.")
@click.option("--quick", is_flag=True, help="Use a small grid that takes less than a minute.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False),
              help="Directory for results.json and the plots; points already in it are not measured again.")
@click.option("--cluster", metavar="ADDRESS",
              help="Measure the points on the nodes of a Ray cluster: auto, HOST:PORT, or local for one on this host.")
@json_option
def compare(ram: tuple[int, ...], vcpus: tuple[int, ...], spin: tuple[int, ...], ring: tuple[int, ...],
            interval: tuple[float, ...], modes: str, workload: str, accel: str, rounds: int, window: float,
            quick: bool, output: Path | None, cluster: str | None, as_json: bool) -> int:
    """Compare the costs of dirty-tracking modes. The same guest runs in each of them."""
    from rich.console import Console
    from rich.progress import Progress

    from ..client.accelerators import choose_accelerator
    from ..lab.compare.measure import MODES, Grid, Settings, available, summarise
    from ..lab.compare.report import draw, print_rows, verdict
    from ..lab.compare.run import key_of, run

    if quick:
        ram, vcpus, spin, ring, interval, rounds = (64,), (1,), (0, 2000), (4096,), (0.1,), min(rounds, 3)
    asked = tuple(modes.split(","))
    for mode in asked:
        if mode not in MODES[1:]:
            raise VmmError(f"--tracking {mode}: unknown mode; choose from {', '.join(MODES[1:])}")
    settings = Settings(choose_accelerator(accel), workload, rounds, window)
    there, missing = available(["none", *(w for w in MODES if w in asked)], settings.accel)
    named = click.get_current_context().get_parameter_source("modes") is not click.core.ParameterSource.DEFAULT
    for reason in missing.values():
        if named:
            raise VmmError(reason)
        click.echo(f"skipped: {reason}", err=True)
    if len(there) == 1:
        raise VmmError("nothing to compare: none of the tracking modes is available on this host")
    grid = Grid(ram, vcpus, spin, ring, [s * 1000 for s in interval])
    kept = _load(output, settings)      # windows as they were measured, a list per point
    todo = [(point, tuple(w for w in chosen if w in there)) for point, chosen in grid.points()]
    todo = [each for each in todo if len(each[1]) > 1]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(todo))

        def done(number: int) -> None:
            _save(output, kept)
            bar.update(task, completed=number)

        run(todo, settings, kept, cluster=cluster, done=done, progress=lambda text: bar.update(task, description=text))
    rows: list[dict[str, Any]] = [row for point, chosen in todo
                                  for row in summarise(point, kept["points"][key_of(point, chosen)])]
    lines = verdict(rows)
    if output is not None:
        try:
            for path in draw(rows, output):
                click.echo(str(path), err=True)
        except MissingPackage as exc:
            click.echo(f"no plots: {exc}", err=True)
        except OSError as exc:
            raise VmmError(f"{output}: cannot be written: {exc.strerror}") from None
    if as_json:
        print_json({"settings": kept["settings"], "left_out": missing, "rows": rows, "verdict": lines})
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 190
        print_rows(rows, console)
        for line in lines:
            console.print(line)
    return 0


def _load(output: Path | None, settings: Any) -> dict[str, Any]:
    """What an earlier run has left, if it measured in the same way. Raises VmmError."""
    from dataclasses import asdict

    from ..inputs import read_input

    fresh: dict[str, Any] = {"version": _VERSION, "settings": asdict(settings), "points": {}}
    if output is None or not os.path.exists(output / "results.json"):
        return fresh
    path = output / "results.json"
    try:
        found = json.loads(read_input(path, _RESULTS_MAX))
        version, settings = found["version"], found["settings"]
    except (ValueError, KeyError, TypeError, RecursionError):
        version = None
    if version != _VERSION:
        raise VmmError(f"{path}: was not written by this version of vmm compare: remove it, or choose another "
                       "directory")
    if settings != fresh["settings"]:
        raise VmmError(f"{path}: was measured with other settings ({settings}): "
                       "choose another directory")
    return dict(found)


def _save(output: Path | None, kept: dict[str, Any]) -> None:
    if output is None:
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        aside = output / "results.json.new"
        aside.write_text(json.dumps(kept, indent=1))
        aside.rename(output / "results.json")
    except OSError as exc:
        raise VmmError(f"{output}: cannot be written: {exc.strerror}") from None
