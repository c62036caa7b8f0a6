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

if TYPE_CHECKING:
    from ..migrate import Report
    from ..outputs import Output

__all__ = ["Shown", "key_options", "print_report", "progress_text"]

_MIB = 1 << 20


def key_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``key``, ``peer``, ``insecure``."""
    for option in (click.option("--insecure", is_flag=True, help="Allow tcp:// without encryption."),
                   click.option("--peer", type=click.Path(), default="", help="The other end's public key file."),
                   click.option("--key", type=click.Path(), default="",
                                help="This end's secret key file, for CURVE (see vmm keys).")):
        command = option(command)
    return command


class Shown:
    """Keeps the status file up to date, and a line on a terminal; writes ``output`` when all is over."""

    def __init__(self, output: Output | None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._output = output
        self._console = Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, transient=True, auto_refresh=False, redirect_stdout=False,
                          redirect_stderr=False)
        self._warned: set[str] = set()

    def tell(self, report: Report) -> None:
        from ..consumers.migration.report import OVER
        from ..consumers.migration.status import save_status

        save_status(report)
        if self._output is not None and report.status in OVER:
            self._write(self._output, report)
        for text in report.warnings:
            if text not in self._warned:
                self._warned.add(text)
                with contextlib.suppress(OSError):      # nobody reads it: that is no reason to stop here
                    click.echo(f"vmm: warning: {text}", err=True)
        if self._console.is_terminal:
            from rich.text import Text

            self._live.update(Text(progress_text(report.as_dict())), refresh=True)

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


def progress_text(report: dict[str, Any]) -> str:
    """One line of a migration under way."""
    ram = report["ram"]
    share = f"{100 * (1 - ram['remaining'] / ram['total']):.0f} %, " if ram["total"] else ""
    left = f", {ram['remaining'] * 8 / (ram['mbps'] * 1e6):,.0f} s" if ram["mbps"] else ""
    rounds = ram["dirty_sync_count"]
    text = (f"{report['status']}: round {rounds}, {share}{ram['remaining'] / _MIB:,.0f} MiB{left} left, "
            f"{ram['mbps'] / 8:,.1f} MB/s")
    if rounds:
        text += f", dirty rate {ram['dirty_pages_rate'] * PAGE_SIZE / 1e6:,.1f} MB/s"
        if report["expected_downtime"] is not None:
            text += f", expected downtime {report['expected_downtime']:,.0f} ms"
    return text


def print_report(report: Report) -> None:
    ram = report.ram
    click.echo(f"{report.machine} was migrated to {report.target}: total {report.total_time:,.0f} ms, downtime "
               f"{report.downtime:,.1f} ms, {ram.dirty_sync_count} rounds")
    click.echo(f"ram: {ram.transferred / _MIB:,.1f} MiB transferred, {ram.normal:,} pages, {ram.duplicate:,} zero "
               f"pages, {ram.mbps:,.0f} Mbit/s in the last round, compression {report.compression} "
               f"{report.compression_ratio:.2f}")
    if report.ram.postcopy_pages:
        click.echo(f"post-copy: {ram.postcopy_pages:,} pages, {ram.postcopy_requests:,} of them requested; vCPUs "
                   f"waited {', '.join(f'{ms:,.1f}' for ms in report.postcopy_blocktime)} ms")
    for vcpu, quota in report.throttled.items():
        click.echo(f"vCPU {vcpu} was throttled to {quota:,.1f} MB/s")
