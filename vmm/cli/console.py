"""``vmm console`` and ``vmm attach``: a machine in the background, watched as if it were in the foreground."""

from __future__ import annotations

import signal

import click

from .common import json_option
from .completion import complete_ended, complete_machines
from .machines import print_log, show_report
from .run import Interrupted, follow_machine
from .signals import raise_on

__all__ = ["attach", "console"]


@click.command()
@click.argument("name", shell_complete=complete_ended)
@click.option("--no-follow", is_flag=True, help="Print what there is and end.")
@json_option
def console(name: str, no_follow: bool, as_json: bool) -> int:
    """Print what a machine's guest has printed, and prints. It goes on until the machine ends, or Ctrl-C. The newest 2
    to 4 MiB are kept; those of a machine that has ended, too. With --json, one document per line."""
    return print_log(name, follow=not no_follow, console=True, as_json=as_json)


@click.command()
@click.argument("name", shell_complete=complete_machines)
@json_option
def attach(name: str, as_json: bool) -> int:
    """Bring a machine to the foreground. As vmm launch does, it shows what the guest prints from now on, progress, and
    the report at the end; the exit status is the machine's. Ctrl-C leaves it running (vmm console shows what was
    printed before)."""
    from ..client.machine import Machine

    with Machine.attach(name) as machine:
        for signum in (signal.SIGINT, signal.SIGTERM):
            raise_on(signum, Interrupted)
        try:
            follow_machine(machine, as_json)
            report = machine.wait(60.0)
        except Interrupted as exc:
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, signal.SIG_IGN)       # one is enough
            click.echo(f"vmm: {name} keeps running: vmm attach {name}, vmm stop {name}", err=True)
            return 128 + exc.signum
    show_report(report, as_json)
    return int(report["exit_code"])
