"""Verbs about machines as a whole: which there are, how one is, how one has ended, and what it has said."""

from __future__ import annotations

import itertools
import signal
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from ..errors import ExitCode, VmmError
from .common import Duration, json_option, print_json
from .completion import complete_ended, complete_machines
from .signals import raise_on

if TYPE_CHECKING:
    from ..client.machine import Machine
    from ..machine.log import LogLine

__all__ = ["list_", "logs", "print_log", "show_report", "status", "stop", "upgrade", "wait"]

_STOP_TIMEOUT = 30.0        # seconds
_FORCE_TIMEOUT = 15.0


@click.command("list")
@click.option("--all", "everything", is_flag=True, help="Also list machines that have ended and left a report.")
@json_option
def list_(everything: bool, as_json: bool) -> None:
    """List running machines."""
    from ..client.machine import list_machines
    from ..machine.records import ended_names, outcome

    machines = list_machines()
    if everything:
        running = {m["name"] for m in machines}
        ended = [outcome(name) for name in ended_names()]
        machines += sorted((m for m in ended if m is not None and m["name"] not in running),
                           key=lambda m: m["ended_at"] or "")
    if as_json:
        print_json(machines)
    elif machines:
        from ..tables import print_table, screen
        from .text import machines_table

        print_table(machines_table(machines), screen())
    else:
        click.echo("no machine is running" + (", and none has left a report" if everything else ""))


@click.command()
@click.argument("name", shell_complete=complete_ended)
@json_option
def status(name: str, as_json: bool) -> None:
    """Show the status of a machine. It covers vCPUs, reaper, slots and verification; of a machine that has ended,
    the last report is shown."""
    from ..client.machine import Machine
    from ..machine.records import outcome

    report = outcome(name)
    if report is None:
        with Machine.attach(name) as machine:
            report = machine.status()
    show_report(report, as_json)


@click.command()
@click.argument("name", shell_complete=complete_machines)
@click.option("--force", is_flag=True, help="Kill its processes; its last dirty pages and its report are lost.")
@json_option
def stop(name: str, force: bool, as_json: bool) -> int:
    """Stop a machine in an orderly way. Every vCPU is ended, then the machine."""
    from ..client.machine import Machine
    from ..machine.records import outcome

    if force:
        _kill(name)
    else:
        with Machine.attach(name) as machine:
            _stop(machine)
    report = outcome(name)
    if as_json:
        print_json({"name": name, "done": "stop", "report": report})
    elif report is None:
        click.echo(f"{name} has ended")
    else:
        click.echo(f"{name} has ended: {report['cause']} (exit status {report['exit_code']}; see vmm status "
                   f"{name})")
    return ExitCode.OK


def _stop(machine: Machine) -> None:
    from ..machine.runtime import is_running

    machine.stop()
    deadline = time.monotonic() + _STOP_TIMEOUT
    while is_running(machine.name):
        if time.monotonic() > deadline:
            raise VmmError(f"machine '{machine.name}' is still running after {_STOP_TIMEOUT:.0f} s: see vmm logs "
                           f"{machine.name}, or kill it with vmm stop --force {machine.name}", ExitCode.WORKER_DIED)
        try:
            if machine.status()["state"] == "ended":
                machine.release()
        except VmmError:
            pass    # it went away meanwhile, which is what was wanted
        time.sleep(0.02)


def _kill(name: str) -> None:
    from ..client.machine import Machine
    from ..machine.runtime import end_at_once, is_running

    if not is_running(name):
        Machine.attach(name)        # says what there is
    keeper = end_at_once(name)
    deadline = time.monotonic() + _FORCE_TIMEOUT
    while is_running(name):
        if time.monotonic() > deadline:
            raise VmmError(f"machine '{name}' is still running after {_FORCE_TIMEOUT:.0f} s; its keeper is process "
                           f"{keeper}", ExitCode.WORKER_DIED)
        time.sleep(0.02)


@click.command()
@click.argument("name", shell_complete=complete_machines)
@json_option
def upgrade(name: str, as_json: bool) -> None:
    """Give a running machine new processes, of the program that this command is. Its memory stays where it is, and its
    guest stands still for a moment; its name, log, settings and dirty-log clients go on."""
    import dataclasses

    from ..consumers.migration.upgrade import upgrade as carry_out

    raise_on(signal.SIGTERM, lambda number: KeyboardInterrupt())
    done = carry_out(name)
    if as_json:
        print_json(dataclasses.asdict(done))
    else:
        click.echo(f"{name} was upgraded from {done.before} to {done.after} in {done.seconds:.2f} s; its guest stood "
                   f"still for {done.downtime:.1f} ms")


@click.command()
@click.argument("name", shell_complete=complete_ended)
@click.option("--timeout", type=Duration(),
              help="Stop waiting after this time (exit status 5); the machine keeps running.")
@json_option
def wait(name: str, timeout: float | None, as_json: bool) -> int:
    """Wait until a machine has ended. Then show its report; the exit status is the machine's. Returns at once if it
    has already ended."""
    from ..client.machine import Machine
    from ..machine.records import outcome

    report = outcome(name)
    if report is None:
        with Machine.attach(name) as machine:
            report = machine.wait(timeout)
    show_report(report, as_json)
    return int(report["exit_code"])


def show_report(report: dict[str, Any], as_json: bool) -> None:
    """Whole or not (vmm/machine/records.py)."""
    if as_json:
        print_json(report)
    else:
        from ..tables import screen
        from .text import print_report

        print_report(report, screen())


@click.command()
@click.argument("name", shell_complete=complete_ended)
@click.option("--follow", "-f", is_flag=True, help="Keep printing until the machine has ended.")
@click.option("--console", is_flag=True, help="Print only the guest's console output.")
@json_option
def logs(name: str, follow: bool, console: bool, as_json: bool) -> int:
    """Print the log of a machine. It has the console output, events, warnings and errors of the processes of the
    last machine named NAME, running or not. The newest 2 to 4 MiB are kept. With --json, one document per line."""
    return print_log(name, follow=follow, console=console, as_json=as_json)


def print_log(name: str, *, follow: bool, console: bool, as_json: bool) -> int:
    """``console``: only what the guest has printed. Raises VmmError."""
    from ..machine.log import follow_log, read_log
    from ..machine.records import log_path, no_machine
    from ..machine.runtime import is_running

    try:
        path = log_path(name)
        lines = follow_log(path, (is_running(name) for _ in itertools.count())) if follow else read_log(path)
        _print_lines(lines, console, as_json)
    except (FileNotFoundError, NotADirectoryError):
        if is_running(name):
            raise VmmError(f"machine '{name}' has no log: none could be created when it was launched") from None
        raise no_machine(name) from None
    except OSError as exc:
        raise VmmError(f"cannot read the log of machine '{name}': {exc}") from None
    return ExitCode.OK


def _print_lines(lines: Iterable[LogLine], console: bool, as_json: bool) -> None:
    import dataclasses
    import json

    for line in lines:
        vcpu = line.console_of
        if console and vcpu is None:
            continue
        if as_json:
            click.echo(json.dumps(dataclasses.asdict(line)))
        elif console:
            click.echo(f"[vcpu {vcpu}] {line.text}")
        else:
            click.echo(f"{line.time} {line.source} {line.level} {line.text}")
        sys.stdout.flush()

