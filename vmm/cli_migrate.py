"""``vmm migrate``, ``migrate status``, ``migrate cancel``, ``receive``, ``keys``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ipc.process import python_module

from .cli_common import Duration, Rate, json_option, print_json
from .cli_run import run_or_leave
from .errors import ExitCode, VmmError

if TYPE_CHECKING:
    from .migrate import Report

__all__ = ["keys", "migrate", "receive"]

_STATUS_FILE = "migrate.json"
_BACKGROUND_PATIENCE = 60.0
_MIB = 1 << 20

_key = click.option("--key", type=click.Path(), default="", help="Own secret key file (vmm keys), for CURVE.")
_peer = click.option("--peer", type=click.Path(), default="", help="The other end's public key file.")
_insecure = click.option("--insecure", is_flag=True, help="Allow tcp without encryption.")


class _Migrate(click.Group):
    """``vmm migrate NAME ADDRESS`` is ``vmm migrate start NAME ADDRESS``."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["start", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_Migrate)
def migrate() -> None:
    """Move a running machine to another host (or name): vmm migrate NAME ADDRESS, where a vmm receive waits."""


@migrate.command()
@click.argument("name")
@click.argument("address")
@click.option("--compress", "compression", type=click.Choice(["none", "zstd", "lz4"]), default="none",
              show_default=True)
@click.option("--channels", type=click.IntRange(1, 16), default=2, show_default=True)
@click.option("--bandwidth", type=Rate(), default=None, help="Cap, for example 1GB/s.")
@click.option("--downtime", type=Duration(), default="300ms", show_default=True, help="Limit of the guest's pause.")
@click.option("--max-rounds", type=click.IntRange(1, 1000), default=30, show_default=True,
              help="Rounds after which the guest is stopped whatever is left.")
@click.option("--no-converge", is_flag=True, help="Do not hold back the vCPUs that dirty most.")
@click.option("--postcopy", is_flag=True, help="Let the guest go on at the target before all memory is there, if "
                                               "pre-copy does not converge at once.")
@click.option("--postcopy-after", type=click.IntRange(1, 1000), default=1, show_default=True, metavar="ROUNDS",
              help="Rounds of pre-copy before that.")
@click.option("--recover", is_flag=True, help="Go on with a post-copy whose source was lost.")
@_key
@_peer
@_insecure
@click.option("--background", is_flag=True, help="Return at once, with an id.")
@click.option("--report", "report_path", type=click.Path(path_type=Path), help="Write the final report there.")
@click.option("--id", "migration_id", default="", hidden=True)
@json_option
def start(name: str, address: str, compression: Any, channels: int, bandwidth: float | None, downtime: float,
          max_rounds: int, no_converge: bool, postcopy: bool, postcopy_after: int, recover: bool, key: str,
          peer: str, insecure: bool, background: bool, report_path: Path | None, migration_id: str,
          as_json: bool) -> None:
    """Move machine NAME to ADDRESS (tcp://HOST:PORT or ipc://PATH). It goes on here if that fails."""
    from . import migrate as migration
    from .machine import Machine
    from .wire import check_address

    check_address(address, keys=bool(key and peer), insecure=insecure)
    if background:
        _start_in_background(name, address, as_json)
        return
    options = migration.Options(
        compression=compression, channels=channels, bandwidth=bandwidth or 0.0, downtime=downtime,
        max_rounds=max_rounds, converge=not no_converge, postcopy=postcopy, postcopy_after=postcopy_after, key=key,
        peer=peer, insecure=insecure)
    run = migration.recover if recover else migration.migrate
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _cancel)
    with Machine.attach(name) as machine, _Shown(name, report_path) as shown:
        report = run(machine, address, options, migration_id=migration_id, progress=shown.tell)
    if as_json:
        print_json(report.as_dict())
    else:
        _print_report(report)


def _cancel(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _start_in_background(name: str, address: str, as_json: bool) -> None:
    """The same command again, without --background, on its own; until it has something to say."""
    migration_id = uuid.uuid4().hex[:8]
    arguments = [a for a in sys.argv[1:] if a not in ("--background", "--json")]
    errors = subprocess.PIPE
    process = subprocess.Popen(python_module("vmm", *arguments, "--id", migration_id),
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                               start_new_session=True)
    deadline = time.monotonic() + _BACKGROUND_PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(VmmError):
            if _read_status(name)["id"] == migration_id:
                break
        time.sleep(0.02)
    if process.poll():
        assert process.stderr is not None
        said = process.stderr.read().decode().strip().removeprefix("vmm: error: ")
        raise VmmError(said or "the migration could not be started")
    if as_json:
        print_json({"id": migration_id, "name": name, "target": address})
    else:
        click.echo(f"{migration_id}: {name} is on its way to {address}: vmm migrate status {name}, "
                   f"vmm migrate cancel {name}")


class _Shown:
    """Keeps the status file up to date, and a line on a terminal."""

    def __init__(self, name: str, report_path: Path | None) -> None:
        from rich.console import Console
        from rich.live import Live

        from .runtime import machine_dir

        self._path = machine_dir(name) / _STATUS_FILE
        self._report_path = report_path
        self._console = Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, transient=True, auto_refresh=False, redirect_stdout=False,
                          redirect_stderr=False)

    def tell(self, report: Report) -> None:
        text = json.dumps(report.as_dict())
        with contextlib.suppress(OSError):      # the machine has gone, and its directory with it
            aside = self._path.with_suffix(".new")
            aside.write_text(text)
            aside.rename(self._path)
        if self._report_path is not None and report.status in ("completed", "failed", "cancelled"):
            try:
                self._report_path.write_text(text + "\n")
            except OSError as exc:
                raise VmmError(f"{self._report_path}: cannot be written: {exc.strerror}") from None
        if self._console.is_terminal:
            from rich.text import Text

            ram = report.ram
            left = f", {ram.remaining / (ram.mbps * 1e6 / 8):,.0f} s" if ram.mbps else ""
            self._live.update(Text(
                f"{report.status}: round {ram.dirty_sync_count}, {ram.remaining / _MIB:,.0f} MiB{left} left, "
                f"{ram.mbps / 8:,.0f} MB/s, dirtied {ram.dirty_pages_rate * 4096 / 1e6:,.0f} MB/s, "
                f"expected downtime {report.expected_downtime:,.0f} ms"), refresh=True)

    def __enter__(self) -> _Shown:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)


def _print_report(report: Report) -> None:
    ram = report.ram
    click.echo(f"{report.machine} is at {report.target}: total {report.total_time:,.0f} ms, downtime "
               f"{report.downtime:,.1f} ms, {ram.dirty_sync_count} rounds")
    click.echo(f"ram: {ram.transferred / _MIB:,.1f} MiB transferred, {ram.normal:,} pages, {ram.duplicate:,} zero "
               f"pages, {ram.mbps:,.0f} Mbit/s in the last round, compression {report.compression} "
               f"{report.compression_ratio:.2f}")
    if report.ram.postcopy_pages:
        click.echo(f"post-copy: {ram.postcopy_pages:,} pages, {ram.postcopy_requests:,} of them asked for; vCPUs "
                   f"waited {', '.join(f'{ms:,.1f}' for ms in report.postcopy_blocktime)} ms")
    for vcpu, quota in report.throttled.items():
        click.echo(f"vCPU {vcpu} was held back to {quota:,.1f} MB/s")


def _read_status(name: str) -> dict[str, Any]:
    from .runtime import is_running, machine_dir

    if not is_running(name):
        raise VmmError(f"no machine named '{name}' (one that was moved is at its target)", ExitCode.NO_MACHINE)
    try:
        return dict(json.loads((machine_dir(name) / _STATUS_FILE).read_text()))
    except (OSError, ValueError):
        raise VmmError(f"machine '{name}' is not being moved") from None


@migrate.command()
@click.argument("name")
@json_option
def status(name: str, as_json: bool) -> None:
    """Show how far the last migration of machine NAME is."""
    found = _read_status(name)
    if as_json:
        print_json(found)
        return
    ram = found["ram"]
    click.echo(f"{found['id']}: {found['status']}" + (f" ({found['error']})" if found["error"] else ""))
    click.echo(f"to {found['target']}, {found['total_time'] / 1000:,.1f} s, {ram['dirty_sync_count']} rounds, "
               f"{ram['remaining'] / _MIB:,.1f} MiB remaining, {ram['mbps']:,.0f} Mbit/s, expected downtime "
               f"{found['expected_downtime']:,.0f} ms")


@migrate.command()
@click.argument("name")
@json_option
def cancel(name: str, as_json: bool) -> None:
    """Cancel the migration of machine NAME; it runs on here."""
    found = _read_status(name)
    running = ("setup", "active", "device")
    if found["status"].startswith("postcopy"):
        raise VmmError(f"machine '{name}' runs at {found['target']} already; its last pages are on their way, and "
                       "that cannot be cancelled")
    if found["status"] in running:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(found["pid"])
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            os.close(pidfd)
    deadline = time.monotonic() + _BACKGROUND_PATIENCE
    while found["status"] in running:
        if time.monotonic() > deadline:
            raise VmmError(f"the migration of '{name}' did not end within {_BACKGROUND_PATIENCE:.0f} s")
        time.sleep(0.05)
        found = _read_status(name)
    if as_json:
        print_json({"name": name, "status": found["status"]})
    else:
        click.echo(f"{name}: migration {found['status']}")


@click.command()
@click.argument("address")
@click.option("--name", help="Name of the machine here (default: the one it comes with).")
@click.option("--accel", type=click.Choice(["auto", "kvm", "unicorn"]), default="auto", show_default=True)
@click.option("--detach", is_flag=True, help="Leave it running in the background when it has come.")
@click.option("--timeout", type=Duration(), default=None, help="How long to wait for a source.")
@_key
@_peer
@_insecure
@json_option
def receive(address: str, name: str | None, accel: str, detach: bool, timeout: float | None, key: str, peer: str,
            insecure: bool, as_json: bool) -> int:
    """Wait at ADDRESS for one machine to be migrated here, and run it."""
    from .receive import receive as run

    machine = run(address, name=name, accel=accel, detach=detach, key=key, peer=peer, insecure=insecure,
                  timeout=timeout, waiting=lambda at: click.echo(f"waiting at {at}", err=True))
    return run_or_leave(machine, detach, as_json)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("name")
@json_option
def keys(directory: Path, name: str, as_json: bool) -> None:
    """Make a pair of CURVE keys: DIRECTORY/NAME.key to give away, NAME.key_secret to keep."""
    import zmq.auth

    try:
        directory.mkdir(parents=True, exist_ok=True)
        old = os.umask(0o077)
        try:
            public, secret = zmq.auth.create_certificates(directory, name)
        finally:
            os.umask(old)
    except OSError as exc:
        raise VmmError(f"{directory}: keys cannot be written: {exc.strerror}") from None
    if as_json:
        print_json({"public": str(public), "secret": str(secret)})
    else:
        click.echo(f"{public}\n{secret}")
