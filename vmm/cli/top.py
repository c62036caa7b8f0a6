"""``vmm top``: a machine as it runs, on a terminal."""

from __future__ import annotations

import sys

import click

from .. import optional
from ..errors import VmmError
from .completion import complete_machines
from .stats import dirty_rate_option, interval_option

__all__ = ["top"]


@click.command()
@click.argument("name", shell_complete=complete_machines)
@interval_option
@dirty_rate_option
def top(name: str, interval: float, dirty_rate: bool) -> int:
    """Watch a machine on the terminal: vCPUs, dirty rate, rings, reaper, slots, and what is under way. Keys pause and
    resume it, sync its dirty log, limit its dirty rate and take a snapshot. Nothing else changes for the machine: it
    is not made to log unless the dirty rate is asked for. vmm stats has the same for scripts.

    \b
    vmm top quickstart --interval 5s
    """
    from ..machine.records import no_machine
    from ..machine.runtime import await_upgrade

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise VmmError(f"vmm top needs a terminal; for a file or a pipe: vmm stats {name}")
    optional.textual()
    if not await_upgrade(name):
        raise no_machine(name)
    from ..top.app import TopApp

    app = TopApp(name, interval=interval, dirty_rate=dirty_rate)
    app.run(mouse=False)
    return app.return_code or 0
