"""``vmm demo``: all of it on one screen (vmm/lab/demo.py is what happens)."""

from __future__ import annotations

import io
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from workers.accel import registry

from ..errors import ExitCode
from .common import Size, json_option, print_json
from .run import Interrupted
from .signals import raise_on

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ..lab.demo import Seen

__all__ = ["demo"]

_BARS, _PLAIN_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
_WIDTH = 80             # of a picture; what is shown fits into it
_BAR = 24
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MIB = 1 << 20


@click.command()
@click.option("--memory", type=Size(), default="8MiB", show_default=True, help="Memory of the machine.")
@click.option("--accel", type=click.Choice(["auto", *registry.names("guest")]), default="auto", show_default=True,
              help="Accelerator; auto takes kvm where it can be used.")
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw the last screen (SVG).")
@json_option
def demo(memory: int, accel: str, picture: Path | None, as_json: bool) -> int:
    """Show all of it on one screen, in half a minute. A machine of two vCPUs is launched, its dirty rate shown and
    limited, a snapshot taken, the machine migrated to a second one on this host, and the verifier asked at both ends.
    Nothing is left of it. Exit status 3 if the verifier found a page lost."""
    from ..lab.demo import Demo
    from ..outputs import open_output

    output = None if picture is None else open_output(picture)
    try:
        for number in _ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                raise_on(number, _interrupted)
        screen = _Screen(quiet=as_json)
        with screen:
            seen = Demo(memory=memory, accel=accel, tell=screen.show).run()
        if output is not None:
            output.write(_picture(seen).encode())
            output.commit()
    finally:
        if output is not None:
            output.close()
    if as_json:
        print_json(seen.as_dict())
    return ExitCode.OK if seen.ok else ExitCode.VERIFY_FAILED


def _interrupted(number: int) -> Interrupted:
    """One is enough: what there is, is cleared away."""
    for each in _ENDING:
        signal.signal(each, signal.SIG_IGN)
    return Interrupted(number)


class _Screen:
    """One board that changes in place on a terminal; elsewhere a line for what is done. ``with`` it."""

    def __init__(self, *, quiet: bool) -> None:
        """``quiet``: on standard error, if that is a terminal, and else nowhere."""
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=quiet, highlight=False)
        self._in_place = self._console.is_terminal and not self._console.is_dumb_terminal
        self._quiet = quiet
        self._live = Live(console=self._console, auto_refresh=False, transient=quiet, redirect_stdout=False,
                          redirect_stderr=False)
        self._shown = 0

    def show(self, seen: Seen) -> None:
        if self._in_place:
            self._live.update(_board(seen, self._console), refresh=True)
        elif not self._quiet:
            self._print_lines(seen)

    def _print_lines(self, seen: Seen) -> None:
        """Those of steps that are over."""
        from ..lab.demo import STEPS

        over = len(STEPS) if not seen.step else STEPS.index(seen.step)
        for title in STEPS[self._shown:over]:
            for at, line in enumerate(_lines(title, seen, _PLAIN_BARS)):
                click.echo(f"{title if not at else '':<12} {line}")
        self._shown = max(self._shown, over)
        if not seen.step:
            click.echo(_last(seen))

    def __enter__(self) -> _Screen:
        if self._in_place:
            self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._in_place:
            self._live.__exit__(*error)


def _board(seen: Seen, console: Console) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ..lab.demo import STEPS

    bars = _PLAIN_BARS if console.options.ascii_only else _BARS
    done, now = ("*", ">") if console.options.ascii_only else ("✓", "▸")
    board = Table.grid(padding=(0, 1))
    for width in (1, 11, None):
        board.add_column(width=width, no_wrap=width is not None)
    reached = len(STEPS) if not seen.step else STEPS.index(seen.step)
    for at, title in enumerate(STEPS):
        text = "\n".join(_lines(title, seen, bars)) if at <= reached else ""
        mark, style = (done, "green") if at < reached else (now, "bold") if at == reached else (" ", "dim")
        if title == "verifier" and not seen.step and not seen.ok:
            style = "red"
        board.add_row(Text(mark, style), Text(title, style), Text(text, overflow="fold"))
    head = Text(f"{seen.name}: a machine whose vCPUs are processes", "bold")
    foot = Text(_last(seen) if not seen.step else f"{seen.seconds:.0f} s; Ctrl-C ends it, and nothing is left",
                "dim" if seen.step else "bold green" if seen.ok else "bold red")
    return Group(head, board, foot)


def _lines(title: str, seen: Seen, bars: str) -> list[str]:
    """What there is to say of a step, so far; lines of at most 66 characters."""
    if title == "launch":
        if not seen.accelerator:
            return ["…"] if bars == _BARS else ["..."]
        return [f"{seen.accelerator}, {seen.memory / _MIB:,.0f} MiB, tracking {seen.tracking}; processes "
                f"{', '.join(map(str, seen.pids))}; {seen.launch_seconds:.1f} s"]
    if title == "dirty rate":
        return _rate_lines(seen, bars)
    if title == "dirty limit":
        return _limit_lines(seen)
    if title == "snapshot":
        return [f"{each.id}: {'what changed since' if each.incremental else 'whole, while the guest ran'}, "
                f"{each.pages:,} pages in {each.seconds:.2f} s" for each in seen.snapshots] or [""]
    if title == "migration":
        return _migration_lines(seen)
    return _verifier_lines(seen)


def _rate(rate: float) -> str:
    return f"{rate / 1e6:,.1f} MB/s"


def _rate_lines(seen: Seen, bars: str) -> list[str]:
    if not seen.rates:
        return [""]
    highest = max(seen.rates) or 1.0
    curve = "".join(bars[1 + round(rate / highest * (len(bars) - 2))] for rate in seen.rates)
    lines = [f"{_rate(seen.rates[-1]):>12}  {curve}"]
    if bars == _PLAIN_BARS:     # nothing moves there: what it was is said below
        return [f"{_rate(seen.unlimited or seen.rates[-1])} ({len(seen.pids)} vCPUs)"]
    each = max(*seen.vcpu_rates, highest / 2)
    for index, rate in enumerate(seen.vcpu_rates):
        lines.append(f"{_rate(rate):>12}  vCPU {index} {bars[-1] * round(rate / each * _BAR)}")
    return lines


def _limit_lines(seen: Seen) -> list[str]:
    if seen.limit_missing:
        return ["not on this host, which has no dirty rings"]
    if seen.limit is None:
        return [""]
    return [f"{_rate(seen.limit)} a vCPU: {_rate(seen.unlimited)} became "
            f"{_rate(seen.limited or seen.rates[-1])}"]


def _migration_lines(seen: Seen) -> list[str]:
    report = seen.migration
    if report is None:
        return [""]
    lines = [f"round {number}: {each['pages']:,} pages in {each['seconds']:.2f} s"
             + (f", {each['left']:,} dirty by then" if each["left"] is not None else " while the guest stood still")
             for number, each in enumerate(report["rounds"], 1)]
    if len(lines) > 5:
        lines = [*lines[:2], f"... {len(lines) - 4} more ...", *lines[-2:]]
    if report["status"] == "completed":
        lines.append(f"downtime {report['downtime']:,.0f} ms, {report['total_time'] / 1000:,.1f} s in all")
    else:
        lines.append(f"{report['status']}, {report['ram']['remaining'] / _MIB:,.1f} MiB left of this round")
    return lines


def _verifier_lines(seen: Seen) -> list[str]:
    lines = [f"{where}: {'passed' if found['ok'] else 'FAILED'}, {found['rounds']:,} rounds, "
             f"{found['dirty_pages']:,} dirty pages, {found['lost_pages']:,} lost"
             for where, found in (("source", seen.here), ("target", seen.there)) if found is not None]
    return lines or [""]


def _last(seen: Seen) -> str:
    if not seen.ok:
        return "the verifier found something wrong: please report it"
    return f"{seen.seconds:.0f} s, no page lost, nothing left behind. Next: vmm launch quickstart"


def _picture(seen: Seen) -> str:
    """The last screen as an SVG. It fetches nothing: whoever shows it has a font."""
    from rich.console import Console

    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor",
                      highlight=False)
    console.print("[bold]$[/bold] vmm demo")
    console.print(_board(seen, console))
    return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="vmm demo"), flags=re.DOTALL)
