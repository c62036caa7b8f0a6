"""What the verbs of a migration share: the options of its keys, and how it is shown while it goes on and when it has
ended."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ipc.shm import PAGE_SIZE

from ..errors import VmmError
from .lines import JsonLines

if TYPE_CHECKING:
    from ..migrate import Report
    from ..outputs import Output

__all__ = ["MigrationLines", "Shown", "key_options", "print_report", "print_status"]

_MIB = 1 << 20


def key_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``key``, ``peer``, ``insecure``."""
    for option in (click.option("--insecure", is_flag=True, help="Allow tcp:// without encryption."),
                   click.option("--peer", type=click.Path(), default="", help="The other end's public key file."),
                   click.option("--key", type=click.Path(), default="",
                                help="This end's secret key file, for CURVE (see vmm keys).")):
        command = option(command)
    return command


class MigrationLines:
    """JSON lines of a migration. ``event``: progress (the report without its rounds), round (``round``: its number, and
    what it was), end (the whole report). ``with`` it."""

    def __init__(self) -> None:
        self._rounds = 0
        self._lines = JsonLines()

    def tell(self, report: Report) -> None:
        """Where it is."""
        from ..consumers.migration.report import OVER

        said = report.as_dict()
        if report.status in OVER:
            return self._lines.put("end", said)
        for number, each in enumerate(said.pop("rounds")[self._rounds:], self._rounds):
            self._lines.put("round", {"round": number, **each})
            self._rounds = number + 1
        self._lines.put("progress", said)

    def __enter__(self) -> MigrationLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._lines.__exit__(kind, *error)


class Shown:
    """Keeps a line on a terminal up to date; writes ``output`` when all is over."""

    def __init__(self, output: Output | None, lines: MigrationLines | None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._output = output
        self._lines = lines
        self._console = Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, transient=True, auto_refresh=False, redirect_stdout=False,
                          redirect_stderr=False)
        self._warned: set[str] = set()

    def tell(self, report: Report) -> None:
        from ..consumers.migration.report import OVER
        if self._lines is not None:
            self._lines.tell(report)
        if self._output is not None and report.status in OVER:
            self._write(self._output, report)
        for text in report.warnings:
            if text not in self._warned:
                self._warned.add(text)
                with contextlib.suppress(OSError):      # nobody reads it: that is no reason to stop here
                    click.echo(f"vmm: warning: {text}", err=True)
        if self._console.is_terminal:
            from rich.text import Text

            self._live.update(Text(_progress_text(report.as_dict())), refresh=True)

    @staticmethod
    def _write(output: Output, report: Report) -> None:
        """The migration ended as it did: a report that cannot be written does not make it a failure."""
        try:
            output.write(json.dumps(report.as_dict()).encode() + b"\n")
            output.commit()
        except VmmError as exc:
            report.warnings.append(f"the report was not written: {exc}")

    def __enter__(self) -> Shown:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)


def _progress_text(report: dict[str, Any]) -> str:
    """One line of a migration under way, or as it ended."""
    from ..consumers.migration.report import OVER

    ram = report["ram"]
    if report["status"] == "setup":
        return f"setup: {report['total_time'] / 1000:,.0f} s"
    share = f"{100 * (1 - ram['remaining'] / ram['total']):.0f} % of memory is there, " if ram["total"] else ""
    foreseen = ram["mbps"] and report["status"] not in OVER
    left = f", {ram['remaining'] * 8 / (ram['mbps'] * 1e6):,.0f} s" if foreseen else ""
    rounds = ram["dirty_sync_count"]
    where = f"round {rounds + 1}" if report["status"] == "active" else f"{rounds} round{'s' * (rounds != 1)}"
    text = (f"{report['status']}: {where}: {share}{ram['remaining'] / _MIB:,.0f} MiB{left} left, "
            f"{ram['mbps'] / 8:,.1f} MB/s")
    if rounds and report["direction"] == "outgoing":
        text += f", dirty rate {ram['dirty_pages_rate'] * PAGE_SIZE / 1e6:,.1f} MB/s"
        if report["expected_downtime"] is not None:
            text += f", expected downtime {report['expected_downtime']:,.0f} ms"
        if report["forecast"] is not None and report["status"] == "active":
            text += f"; {_forecast_text(report)}"
    return text


def _forecast_text(report: dict[str, Any]) -> str:
    found = report["forecast"]
    if found["converges"]:
        left = max(0.0, found["seconds"] - (report["total_time"] - found["at"]) / 1000)
        return f"converges in about {left:,.0f} s"
    return (f"does not converge: {found['dirtied']:,.1f} MB/s get dirty, {found['rate']:,.1f} MB/s can be sent; "
            f"{found['downtime'] / 1000:,.1f} s of downtime otherwise")


def print_report(report: Report) -> None:
    ram = report.ram
    moved = (f"{report.machine} was migrated to {report.target}" if report.direction == "outgoing" else
             f"{report.machine} has come from {report.source} at {report.target}")
    downtime = f"{report.downtime:,.1f} ms" if report.downtime else "not known"
    click.echo(f"{moved}: total {report.total_time:,.0f} ms, downtime {downtime}, {ram.dirty_sync_count} rounds")
    if report.downtime_parts:
        click.echo(f"downtime: {', '.join(_part(*each) for each in report.downtime_parts.items())}")
    click.echo(f"ram: {ram.transferred / _MIB:,.1f} MiB transferred, {ram.normal:,} pages, {ram.duplicate:,} zero "
               f"pages, {ram.mbps:,.1f} Mbit/s on average, compression {report.compression} "
               f"{report.compression_ratio:.2f}")
    if report.ram.postcopy_pages:
        click.echo(f"post-copy: {ram.postcopy_pages:,} pages, {ram.postcopy_requests:,} of them requested; vCPUs "
                   f"waited {', '.join(f'{ms:,.1f}' for ms in report.postcopy_blocktime)} ms")
    if waits := report.postcopy_latency:
        click.echo(f"a page that was waited for took {waits['median_us']:,.0f} us (median), {waits['p99_us']:,.0f} us "
                   f"(99 %), {waits['max_us']:,.0f} us at most")
    for vcpu, quota in report.throttled.items():
        click.echo(f"vCPU {vcpu} was throttled to {quota:,.1f} MB/s")


def _part(name: str, ms: float) -> str:
    return f"{name.replace('_', '-')} {ms:,.1f} ms"


def print_status(report: Report) -> None:
    """Of a migration that is under way, or has ended; with its rounds."""
    from ..tables import print_table, screen, table

    way = (f"{report.machine} to {report.target}" if report.direction == "outgoing" else
           f"{report.machine} from {report.source} at {report.target}")
    error = f": {report.error}" if report.error else ""
    click.echo(f"{report.id}: {way}, begun {report.began_at}, {report.total_time / 1000:,.1f} s{error}")
    click.echo(_progress_text(report.as_dict()))
    if report.status == "completed":
        print_report(report)
    if not report.rounds:
        return
    shown = table("round", numbers=("pages", "zero", "MB", "s", "MB/s", "dirtied MB/s", "left"))
    for number, each in enumerate(report.rounds, 1):
        shown.add_row(str(number), f"{each.pages:,}", f"{each.zero:,}", f"{each.transferred / 1e6:,.1f}",
                      f"{each.seconds:,.3f}", f"{each.transferred / 1e6 / max(each.seconds, 1e-6):,.1f}",
                      "" if each.dirtied is None else f"{each.dirtied * PAGE_SIZE / 1e6:,.1f}",
                      "" if each.left is None else f"{each.left:,}")
    print_table(shown, screen())
