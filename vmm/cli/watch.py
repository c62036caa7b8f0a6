"""``vmm watch``: the dirty pages of a process that is none of ours."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ipc.linux.foreign import mappings

from .. import optional
from ..errors import VmmError
from .common import Duration, json_option, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from ..consumers.watch.series import Now, Series, Source
    from ..consumers.watch.targets import Target
    from ..consumers.watch.watcher import Area

__all__ = ["LEAST_INTERVAL", "watch", "watching"]

LEAST_INTERVAL = 0.01   # seconds
_SHOWN_S = 0.25         # between two pictures on a terminal
_LINE_S = 1.0           # and two lines elsewhere
_ROWS = 15
_NAME = 48              # characters of a mapping's name
_MIB = 1 << 20


@click.command()
@click.argument("target")
@click.option("--interval", type=Duration(least=LEAST_INTERVAL), default="100ms", show_default=True,
              help="Time between two collections.")
@click.option("--time", "seconds", type=Duration(), default=None,
              help="How long to watch. [default: until the process ends, or Ctrl-C]")
@click.option("--ram", "what", flag_value="ram", help="Only the memory of the VM that the process runs. [default for "
                                                      "QEMU, Firecracker, Cloud Hypervisor]")
@click.option("--all", "what", flag_value="all", help="All that the process can write, with mappings that come and "
                                                      "go. [default for others]")
@click.option("--output", type=click.Path(path_type=Path), help="Write the recording to this file (.npz), as vmm "
                                                                "working-set does.")
@click.option("--png", type=click.Path(path_type=Path), help="Write a plot to this file.")
@click.option("--html", "html_path", type=click.Path(path_type=Path),
              help="Write a self-contained HTML page to this file.")
@click.option("--sample", is_flag=True, help="Estimate from checksums of some pages, without a call in the process and "
                                             "without protection.")
@click.option("--pages", type=click.IntRange(16, 1 << 20), default=None,
              help="With --sample: how many pages. [default: 2048]")
@click.option("--collapse", is_flag=True, help="Afterwards, have the kernel make huge pages of those that were split.")
@click.option("--json-lines", is_flag=True, help="Print a line of JSON for each interval.")
@json_option
def watch(target: str, interval: float, seconds: float | None, what: str | None, output: Path | None,
          png: Path | None, html_path: Path | None, sample: bool, pages: int | None, collapse: bool, json_lines: bool,
          as_json: bool) -> int:
    """Show which pages a running process of this host dirties, from outside. TARGET is a process id, the name of a VM
    or program, or the path of a VM's QMP socket. The process is made to call userfaultfd(2) once and goes on; nothing
    of it is changed. docs/watch.md says what it costs the process, and which processes are refused."""
    from ..client.interrupts import Interrupts
    from ..consumers.watch import series as of

    if seconds is not None and interval > seconds:
        raise VmmError(f"--interval {interval:g} s is longer than --time {seconds:g} s")
    if pages and not sample:
        raise VmmError("--pages: is for --sample")
    if sample:
        from .sampling import watch_samples

        if output or png or html_path or collapse:
            raise VmmError("--sample: knows how many pages are dirtied, not which: no --output, --png, --html or "
                           "--collapse")
        return watch_samples(target, what, pages, interval, seconds, json_lines=json_lines, as_json=as_json)
    if png or html_path:
        optional.figure()
    with contextlib.ExitStack() as stack:
        files = _files(stack, output, png, html_path)
        interrupts = stack.enter_context(Interrupts())
        found, source, began = stack.enter_context(watching(target, what, again := Collapse() if collapse else None))
        shown = _Shown(found, source, began, quiet=as_json, lines=json_lines)
        series = of.Series(source, keep=bool(files))
        with shown:
            reason = of.follow(source, series, interval, seconds, interrupts.wait, lambda turn: shown.update(series))
        ended = reason if reason != of.INTERRUPTED else ""
        if not series.intervals:
            raise VmmError(ended or "interrupted before the first interval was complete")
        if files:
            _write(files, series, reason if seconds is not None else "", f"{found.name} ({found.pid}): pages dirtied "
                                                                         f"per {interval * 1000:g} ms interval")
    total = series.total()
    if again is not None:
        began |= {"huge_split": again.split, "huge_restored": again.done}
    if as_json or json_lines:
        done = {"pid": found.pid, "name": found.name, "interval_s": interval, **began, **total.as_dict(),
                "most_pages": series.most, "not_watched": _refused(source.areas), "forked": sorted(source.forked),
                "ended": ended}
        click.echo(json.dumps(done)) if json_lines else print_json(done)
    else:
        _print_total(found, total, series, ended)
        if source.forked:
            click.echo(f"it has forked {len(source.forked)} processes ({', '.join(map(str, sorted(source.forked)[:5]))}"
                       f"{', ...' if len(source.forked) > 5 else ''}): what these write is not counted")
        if again is not None:
            click.echo(f"huge pages: {again.split:,} were split, {again.done:,} of them are huge again")
    return 128 + interrupts.came if interrupts.came and seconds is not None else 0


def _files(stack: contextlib.ExitStack, *paths: Path | None) -> list[Any]:
    """Every file is tried before anything is done. [] where none is wanted."""
    from ..outputs import open_output

    return [stack.enter_context(open_output(path)) if path else None for path in paths] if any(paths) else []


def _write(files: list[Any], series: Series, reason: str, title: str) -> None:
    from ..consumers import workingset

    recording = series.recording(reason)
    kept, drawn, page = files
    if kept is not None:
        recording.write(kept.file)
        kept.commit()
    if drawn is not None:
        drawn.write(workingset.draw(recording, title))
    if page is not None:
        page.write(workingset.page(recording, title).encode())


@dataclass
class Collapse:
    """Huge pages that watching has split: how many, and how many of them are huge again."""

    split: int = 0
    done: int = 0


@contextlib.contextmanager
def watching(text: str, what: str | None, collapse: Collapse | None = None) -> Iterator[tuple[Target, Source,
                                                                                              dict[str, Any]]]:
    """Of the process that ``text`` names: who collects, and what is said of how it began; ``what``: "ram", "all", or
    None. ``collapse`` is filled in at the end. Raises VmmError."""
    from ..consumers.watch.attach import attach, check_target
    from ..consumers.watch.blocks import chooser
    from ..consumers.watch.huge import collapse_again, huge_pages
    from ..consumers.watch.targets import find_target
    from ..consumers.watch.watcher import Ended, Watcher

    target = find_target(text)
    choose = chooser(what, target.vmm, target.sizes)
    process = check_target(target.pid)
    huge = set() if collapse is None else huge_pages(target.pid, ((b.start, b.end) for b in choose(
        mappings(target.pid))))
    attached = attach(process)
    try:
        watcher = Watcher(attached, choose)
    except Ended as exc:
        raise VmmError(str(exc)) from None
    with watcher:
        yield target, watcher, {"thread": attached.tid, "thread_was": attached.doing,
                                "interrupted": attached.interrupted, "stopped_s": attached.stopped}
    if collapse is not None:
        collapse.split, collapse.done = collapse_again(process, huge)


def _refused(areas: list[Area]) -> list[dict[str, Any]]:
    return [{"name": a.name, "address": a.start, "size": a.end - a.start, "reason": a.refused}
            for a in areas if a.refused]


class _Shown:
    """What there is to see while it goes on: a picture on a terminal, a line a second elsewhere."""

    def __init__(self, target: Target, source: Source, began: dict[str, Any], *, quiet: bool, lines: bool) -> None:
        from ..tables import screen

        self._target, self._source = target, source
        self._quiet, self._lines = quiet, lines
        self._next = 0.0
        self._live: Any = None
        self._console = screen()
        if not quiet and not lines:
            self._say_begin(began)

    def _say_begin(self, began: dict[str, Any]) -> None:
        size = sum(end - start for a in self._source.areas for start, end in a.watched)
        click.echo(f"watching {self._target.name} ({self._target.pid}): {size / _MIB:,.0f} MiB in "
                   f"{sum(bool(a.watched) for a in self._source.areas)} mappings")
        if began:
            click.echo(f"thread {began['thread']} ({began['thread_was']}) stood still for "
                       f"{began['stopped_s'] * 1000:.1f} ms" + (", and its call ended with EINTR"
                                                                if began["interrupted"] else ""))
        for area in self._source.areas:
            if area.refused:
                click.echo(f"not watched: {area.name} at {area.start:#x} {area.refused}")

    def __enter__(self) -> _Shown:
        if self._console.is_terminal and not self._quiet and not self._lines:
            from rich.live import Live

            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, series: Series) -> None:
        """After each turn."""
        if self._lines:
            click.echo(json.dumps(series.now().as_dict()))
            return
        now = time.monotonic()
        if self._quiet or now < self._next:
            return
        self._next = now + (_SHOWN_S if self._live is not None else _LINE_S)
        found = series.now()
        if self._live is not None:
            self._live.update(_table(found, self._console.size.height - 6), refresh=True)
        else:
            click.echo(_line(found))


def _line(now: Now) -> str:
    from ..tables import digits_text

    return (f"{now.seconds:8.1f} s {now.mib_per_s:10.1f} MiB/s {now.pages_per_s:12,.0f} pages/s, working set "
            f"{now.working_set:,} pages in {digits_text(now.over, 2)} s")


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"…{name[1 - _NAME:]}"


def _table(now: Now, rows: int, *, titled: bool = True) -> Table:
    from rich.markup import escape

    from ..tables import size_text, table

    found = table("mapping", title=_line(now) if titled else None, numbers=("size", "MiB/s", "pages/s", "distinct"))
    shown = now.areas[:max(1, min(_ROWS, rows))]
    for area in shown:
        found.add_row(escape(_short(area.name)), size_text(area.size), f"{area.mib_per_s:,.1f}",
                      f"{area.pages_per_s:,.0f}", f"{area.distinct:,}")
    if len(now.areas) > len(shown):
        rest = now.areas[len(shown):]
        found.add_row(f"{len(rest)} others", "", f"{sum(a.mib_per_s for a in rest):,.1f}",
                      f"{sum(a.pages_per_s for a in rest):,.0f}", f"{sum(a.distinct for a in rest):,}")
    return found


def _print_total(target: Target, total: Now, series: Series, ended: str) -> None:
    from ..tables import print_table, screen

    if total.areas:
        print_table(_table(total, _ROWS, titled=False), screen())
    click.echo(f"{target.name} ({target.pid}): {total.intervals} intervals in {total.seconds:.2f} s, "
               f"{total.pages_per_s:,.0f} pages/s ({total.mib_per_s:.1f} MiB/s), {series.most:,} pages in an interval "
               f"at most, {total.working_set:,} distinct"
               + (f"; {ended}" if ended else ""))
