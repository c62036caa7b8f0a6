"""A machine in the foreground: console, progress, signals, report."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ..errors import ExitCode, VmmError
from .common import print_json
from .signals import raise_on

if TYPE_CHECKING:
    from ..client.machine import Machine

__all__ = ["Interrupted", "follow_machine", "run_or_leave"]

_PROGRESS_S = 0.25
_NOTES = {
    "ring-rebuilt": "vCPU {vcpu}: {why}; the ring was rebuilt, {pages_marked} pages were marked dirty",
    "warning": "vmm: warning: {text}",
    "dropped": "{count} events, some of them console output, were dropped because they were not read in time (vmm "
               "logs {name} may have them)",
    "incoming-lost": "{detail}",
}


class Interrupted(Exception):
    """SIGINT or SIGTERM came."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def run_or_leave(machine: Machine, detach: bool, as_json: bool) -> int:
    """With ``detach`` leave the machine running (it has been started), else run it to its end; exit status."""
    for warning in machine.warnings:
        click.echo(f"vmm: warning: {warning}", err=True)
    if not detach:
        with machine:
            return _run_in_foreground(machine, as_json)
    machine.detach()
    if as_json:
        print_json({"name": machine.name})
    else:
        verbs = ("status", "attach", "logs", "wait", "stop")
        click.echo(f"{machine.name} is running: {', '.join(f'vmm {verb} {machine.name}' for verb in verbs)}")
    return ExitCode.OK


def _run_in_foreground(machine: Machine, as_json: bool) -> int:
    """Show the machine until it ends; a signal stops it in order, and the report is still printed."""
    stopped_by = 0

    for signum in (signal.SIGINT, signal.SIGTERM):
        raise_on(signum, Interrupted)
    try:
        machine.start()
        follow_machine(machine, as_json, ", which end with this one only if it is interrupted")
    except Interrupted as exc:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)   # one is enough
        stopped_by = exc.signum
        machine.stop()
    report = machine.wait(60.0)
    if as_json:
        print_json(report)
    else:
        from ..tables import screen
        from .text import print_report

        print_report(report, screen())
    return 128 + stopped_by if stopped_by else int(report["exit_code"])


def follow_machine(machine: Machine, as_json: bool, upgraded: str = "") -> None:
    """Show it until it ends, in whichever processes; ``upgraded``: what else there is to say of new ones."""
    def goes_on() -> None:
        click.echo(f"vmm: machine '{machine.name}' was upgraded; it goes on in new processes{upgraded}", err=True)

    while True:
        try:
            if _follow(machine, as_json, goes_on) != ExitCode.STOPPED:
                return
        except VmmError as exc:     # its last event was not heard: it has gone, and left its report, or goes on
            if exc.exit_code is not ExitCode.NO_MACHINE:
                raise
        if not machine.goes_on():
            return
        goes_on()


def _note(name: str, event: dict[str, Any]) -> str:
    """In words."""
    why = ""
    if event["event"] == "ring-rebuilt":
        counts = event["harvested"], event["reset"]
        why = ("its ring overflowed, or stayed full with nothing in it" if counts[0] == counts[1] else
               "the counts of its ring did not match ({} harvested, {} reset)".format(*counts))
    return _NOTES[event["event"]].format(name=name, why=why, **event)


def _follow(machine: Machine, as_json: bool, upgraded: Callable[[], None]) -> int:
    """Console output as it comes, a progress line on a terminal, until the end; the exit status. ``upgraded`` is called
    when its new processes answer, and no event has said so."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from .text import progress_text

    screen = Console(stderr=True, highlight=False)
    with Live(console=screen, transient=True, auto_refresh=False, redirect_stdout=False,
              redirect_stderr=False) as live:
        shown, dirtied, keeper = time.monotonic(), 0, machine.keeper
        while True:
            for event in machine.events(_PROGRESS_S):
                if event["event"] == "console":
                    # Only these end a line; splitlines() knows many more characters that do.
                    for line in event["data"].removesuffix("\n").split("\n"):
                        click.echo(f"[vcpu {event['vcpu']}] {line}", err=as_json)
                elif event["event"] == "ended":
                    return int(event["exit_code"])
                elif event["event"] in _NOTES:
                    screen.print(_note(machine.name, event), markup=False, soft_wrap=True)
                if time.monotonic() - shown >= _PROGRESS_S:
                    break
            if keeper not in (None, machine.keeper):
                upgraded()
            keeper = machine.keeper
            if screen.is_terminal:
                report = machine.status()
                now, total = time.monotonic(), sum(v["dirty_pages"] for v in report["vcpus"])
                live.update(Text(progress_text(report, (total - dirtied) / (now - shown))), refresh=True)
                shown, dirtied = now, total
            else:
                shown = time.monotonic()
