"""``vmm migrate``, ``migrate status``, ``migrate cancel``, ``receive``, ``keys``."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ipc.run import python_module
from ipc.shm import PAGE_SIZE
from workers.accel import registry

from ..errors import ExitCode, VmmError
from .common import Duration, Rate, json_option, print_json
from .program import run_arrived, trees_options

if TYPE_CHECKING:
    from ..machine.rules import Trees
    from ..migrate import Report
    from ..outputs import Output

__all__ = ["keys", "migrate", "receive"]

_BACKGROUND_PATIENCE = 60.0
_CANCEL_PATIENCE = 15.0
_MIB = 1 << 20

_key = click.option("--key", type=click.Path(), default="",
                    help="This end's secret key file, for CURVE (see vmm keys).")
_peer = click.option("--peer", type=click.Path(), default="", help="The other end's public key file.")
_insecure = click.option("--insecure", is_flag=True, help="Allow tcp:// without encryption.")


class _Migrate(click.Group):
    """``vmm migrate NAME ADDRESS`` is ``vmm migrate start NAME ADDRESS``."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["start", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_Migrate)
def migrate() -> None:
    """Migrate a running machine to another host or name. Usage: vmm migrate NAME ADDRESS, where vmm receive is
    waiting at ADDRESS."""


@migrate.command()
@click.argument("name")
@click.argument("address")
@click.option("--compress", "compression", type=click.Choice(["none", "zstd", "lz4"]), default="none",
              show_default=True, help="Compression of memory pages.")
@click.option("--channels", type=click.IntRange(1, 16), default=2, show_default=True,
              help="Number of parallel channels for memory pages.")
@click.option("--bandwidth", type=Rate(), default=None, help="Bandwidth limit, for example 1GB/s.")
@click.option("--downtime", type=Duration(), default="300ms", show_default=True,
              help="Maximum downtime of the guest.")
@click.option("--max-rounds", type=click.IntRange(1, 1000), default=30, show_default=True,
              help="Rounds after which the guest is stopped, however much memory is left.")
@click.option("--no-converge", is_flag=True, help="Do not throttle the vCPUs that dirty most.")
@click.option("--postcopy", is_flag=True, help="Resume the guest at the target before all of its memory has "
                                               "arrived, if pre-copy does not converge at once.")
@click.option("--postcopy-after", type=click.IntRange(1, 1000), default=1, show_default=True, metavar="ROUNDS",
              help="Pre-copy rounds before switching to post-copy.")
@click.option("--in-place", is_flag=True, help="Do not copy: hand the memory itself over, to a target on this host "
                                               "(ipc://PATH).")
@click.option("--recover", is_flag=True, help="Finish a migration whose source was lost after the "
                                               "hand-over.")
@_key
@_peer
@_insecure
@click.option("--background", is_flag=True, help="Return at once and print the migration's id.")
@click.option("--report", "report_path", type=click.Path(path_type=Path),
              help="Write the final report to this file.")
@click.option("--id", "migration_id", default="", hidden=True)
@json_option
def start(name: str, address: str, compression: Any, channels: int, bandwidth: float | None, downtime: float,
          max_rounds: int, no_converge: bool, postcopy: bool, postcopy_after: int, in_place: bool, recover: bool,
          key: str, peer: str, insecure: bool, background: bool, report_path: Path | None, migration_id: str,
          as_json: bool) -> None:
    """Migrate machine NAME to ADDRESS (tcp://HOST:PORT or ipc://PATH). If that fails, it keeps running here."""
    from .. import migrate as migration
    from ..client.machine import Machine
    from ..consumers.migration.addresses import parse_address
    from ..consumers.migration.keys import load_keys
    from ..outputs import open_output

    load_keys(key, peer, parse_address(address), insecure=insecure)     # before anything else, to say what is wrong
    if background:
        _start_in_background(name, address, as_json)
        return
    options = migration.Options(
        compression=compression, channels=channels, bandwidth=bandwidth or 0.0, downtime=downtime,
        max_rounds=max_rounds, converge=not no_converge, postcopy=postcopy, postcopy_after=postcopy_after, key=key,
        peer=peer, insecure=insecure, in_place=in_place)
    run = migration.recover if recover else migration.migrate
    signal.signal(signal.SIGTERM, _cancel)
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(Machine.attach(name))
        output = None if report_path is None else stack.enter_context(contextlib.closing(open_output(report_path)))
        shown = stack.enter_context(_Shown(output))
        report = run(machine, address, options, migration_id=migration_id, progress=shown.tell)
    if as_json:
        print_json(report.as_dict())
    else:
        _print_report(report)


def _cancel(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _start_in_background(name: str, address: str, as_json: bool) -> None:
    """The same command again, without --background, on its own; until it has something to say."""
    from ..consumers.migration.status import load_status

    migration_id = uuid.uuid4().hex[:8]
    arguments = [a for a in sys.argv[1:] if a not in ("--background", "--json")]
    with tempfile.TemporaryFile() as errors:    # a pipe would break when this process has gone
        process = subprocess.Popen(python_module("vmm", *arguments, "--id", migration_id),
                                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                                   start_new_session=True)
        deadline = time.monotonic() + _BACKGROUND_PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(VmmError):
                if load_status(name)["id"] == migration_id:
                    break
            time.sleep(0.02)
        if process.poll():
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().removeprefix("vmm: error: ")
            raise VmmError(said or "the migration could not be started", _exit_code(process.returncode))
    if as_json:
        print_json({"id": migration_id, "name": name, "target": address})
    else:
        click.echo(f"{migration_id}: {name} is being migrated to {address} (see vmm migrate status {name}, "
                   f"vmm migrate cancel {name})")


def _exit_code(status: int) -> ExitCode:
    return ExitCode(status) if status in list(ExitCode) else ExitCode.MIGRATION_FAILED


class _Shown:
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

            self._live.update(Text(_progress_text(report.as_dict())), refresh=True)

    @staticmethod
    def _write(output: Output, report: Report) -> None:
        """The migration ended as it did: a report that cannot be written does not make it a failure."""
        try:
            output.write(json.dumps(report.as_dict()).encode() + b"\n")
            output.commit()
        except VmmError as exc:
            report.warnings.append(f"the report was not written: {exc}")

    def __enter__(self) -> _Shown:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)


def _progress_text(report: dict[str, Any]) -> str:
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


def _print_report(report: Report) -> None:
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


@migrate.command()
@click.argument("name")
@json_option
def status(name: str, as_json: bool) -> None:
    """Show the progress or outcome of the last migration of machine NAME."""
    from ..consumers.migration.status import load_status

    found = load_status(name)
    if as_json:
        print_json(found)
        return
    click.echo(f"{found['id']}: {name} to {found['target']}, {found['total_time'] / 1000:,.1f} s"
               + (f": {found['error']}" if found["error"] else ""))
    click.echo(_progress_text(found))


@migrate.command()
@click.argument("name")
@json_option
def cancel(name: str, as_json: bool) -> None:
    """Cancel the migration of machine NAME; it keeps running here."""
    from ..consumers.migration.report import COMMITTED, OVER
    from ..consumers.migration.status import interrupt, load_status

    found = load_status(name)
    _refuse_to_cancel(found)
    if found["status"] in OVER:
        raise VmmError(f"no migration of machine '{name}' is in progress (last one: {found['status']})")
    interrupt(found)
    deadline = time.monotonic() + _CANCEL_PATIENCE
    while found["status"] not in OVER and found["status"] not in COMMITTED:
        if time.monotonic() > deadline:
            raise VmmError(f"the migration of '{name}' did not end within {_CANCEL_PATIENCE:.0f} s",
                           ExitCode.MIGRATION_FAILED)
        time.sleep(0.05)
        found = load_status(name)
    _refuse_to_cancel(found)
    if as_json:
        print_json({"name": name, "status": found["status"]})
    else:
        click.echo(f"{name}: migration {found['status']}")


def _refuse_to_cancel(report: dict[str, Any]) -> None:
    from ..consumers.migration.report import COMMITTED

    name, target = report["machine"], report["target"]
    if report["status"] == "completed":
        raise VmmError(f"machine '{name}' has already been migrated to {target}")
    if report["status"] in COMMITTED:
        raise VmmError(f"machine '{name}' has already been handed over to {target}: the migration can no longer be "
                       "cancelled")


@click.command()
@click.argument("address")
@click.option("--name", help="Name of the machine here (default: its name at the source).")
@click.option("--accel", type=click.Choice(["auto", *registry.names("guest")]), default="auto", show_default=True,
              help="Accelerator to use here.")
@click.option("--detach", is_flag=True, help="Leave the machine running in the background once it has arrived.")
@click.option("--timeout", type=Duration(), default=None, help="How long to wait for a source.")
@trees_options
@_key
@_peer
@_insecure
@json_option
def receive(address: str, name: str | None, accel: str, detach: bool, timeout: float | None, trees: Trees, key: str,
            peer: str, insecure: bool, as_json: bool) -> int:
    """Wait at ADDRESS for one incoming machine and run it."""
    from ..receive import receive as run

    signal.signal(signal.SIGTERM, _cancel)
    machine = run(address, name=name, accel=accel, detach=detach, key=key, peer=peer, insecure=insecure,
                  timeout=timeout, trees=trees, waiting=lambda at: click.echo(f"waiting at {at}", err=True),
                  refused=lambda why: click.echo(f"refused an offer: {why}", err=True))
    return run_arrived(machine, detach, as_json)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--force", is_flag=True, help="Replace an existing pair of that name.")
@json_option
def keys(directory: Path, name: str, force: bool, as_json: bool) -> None:
    """Create a pair of CURVE keys. DIRECTORY/NAME.key is to be shared, DIRECTORY/NAME.key_secret to be kept
    private."""
    from ..consumers.migration.keys import make_keys

    public, secret = make_keys(directory, name, force=force)
    if as_json:
        print_json({"public": str(public), "secret": str(secret)})
    else:
        click.echo(f"{public}\n{secret}")
