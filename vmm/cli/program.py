"""``vmm run``: a Linux program in a machine of its own, as if it ran here."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ..errors import ExitCode, VmmError
from .common import Duration, Size
from .run import Interrupted, run_or_leave

if TYPE_CHECKING:
    from ..client.machine import Machine
    from ..machine.spec import MachineSpec

__all__ = ["run_program"]

_PAIR = re.compile(r"([^=]+)=(.*)", re.DOTALL)


@click.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--root", type=click.Path(exists=True), help="Directory or tar file that is the program's root; it is "
                                                            "read, and never written to.")
@click.option("--file", "files", multiple=True, metavar="INSIDE=OUTSIDE",
              help="Give the program this file or directory of the host, copied when it is used.")
@click.option("--env", "environment", multiple=True, metavar="NAME=VALUE", help="Set a variable of its environment.")
@click.option("--directory", default="/", show_default=True, help="Directory in which it starts.")
@click.option("--threads", type=int, help="Threads that it and its children may have at once (default: 8).")
@click.option("--memory", type=Size(), default="256MiB", show_default=True, help="Memory of the machine.")
@click.option("--seed", type=int, help="Make its random numbers the same in each run.")
@click.option("--ring", type=int, default=4096, show_default=True, help="Entries of each dirty ring.")
@click.option("--verify", is_flag=True, help="Check the dirty log against the memory while it runs.")
@click.option("--timeout", type=Duration(), help="End it after this time.")
@click.option("--name", help="Name of the machine (default: that of the program, and a number).")
@click.option("--detach", is_flag=True, help="Leave it running in the background; what it writes is in vmm logs.")
@click.option("--report", "shown", is_flag=True, help="Show the machine's report at the end, on standard error.")
@click.option("--report-json", type=click.Path(dir_okay=False), help="Write the machine's report to this file.")
@click.argument("program")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run_program(program: str, args: tuple[str, ...], name: str | None, shown: bool,
                report_json: str | None, **options: Any) -> int:
    """Run an unmodified Linux program in a machine. Each of its threads is a vCPU process with a dirty ring of its own.
    Input and output are those of this command, and so is the exit status. Without --root and --file the program itself
    is all that there is in the machine (see docs/linux.md)."""
    from ..client.machine import Machine

    console = "lines" if options["detach"] else "streams"
    spec = _machine(program, args, name or _name(program), options, console)
    if options["detach"]:
        return run_or_leave(Machine.launch(spec, detach=True), True, False)
    with Machine.launch(spec, start=False) as machine:
        for warning in machine.warnings:
            click.echo(f"vmm: warning: {warning}", err=True)
        report = _follow(machine)
    _show(report, shown, report_json)
    program_report = report.get("program") or {}
    status = program_report.get("exit_status")
    return int(report["exit_code"] if status is None or report["exit_code"] > ExitCode.GUEST_FAILED else status)


def _machine(program: str, args: tuple[str, ...], name: str, options: dict[str, Any], console: str) -> MachineSpec:
    """Raises VmmError."""
    from ..client.programs import THREADS, program_machine, program_spec

    for text in (program, *args, *options["environment"]):
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise VmmError(f"{text!a}: is not UTF-8 text")
    asked = program_spec(program, args, root=options["root"] or "", env=_pairs("--env", options["environment"]),
                         files=_pairs("--file", options["files"]), directory=options["directory"],
                         seed=options["seed"], console=console)
    return program_machine(name, asked, memory=options["memory"], threads=options["threads"] or THREADS,
                           ring_entries=options["ring"], verify=options["verify"], timeout=options["timeout"],
                           linger=not options["detach"])


def _pairs(option: str, texts: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in texts:
        match = _PAIR.fullmatch(text)
        if match is None:
            raise VmmError(f"{option} {text}: write NAME=VALUE")
        found[match[1]] = match[2]
    return found


def _name(program: str) -> str:
    base = re.sub(r"[^a-z0-9]+", "-", os.path.basename(program).lower()).strip("-")[:20].strip("-")
    return f"{base or 'program'}-{os.getpid()}"


def _follow(machine: Machine) -> dict[str, Any]:
    """Its report, once it has ended. A signal stops it."""
    from ..client.console import ConsoleFollower
    from ..machine.runtime import machine_dir

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, interrupt)
    source = -1 if sys.stdin is None or sys.stdin.closed else sys.stdin.fileno()
    try:
        with ConsoleFollower(machine_dir(machine.name)) as console:
            machine.start()
            console.follow(source, sys.stdout.buffer, sys.stderr.buffer, lambda: _is_over(machine))
    except Interrupted as exc:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_IGN)       # one is enough
        with contextlib.suppress(VmmError):
            machine.stop()
            machine.wait(60.0)
        raise exc from None
    return machine.wait(60.0)


def _is_over(machine: Machine) -> bool:
    try:
        return bool(machine.status()["state"] == "ended")
    except VmmError:
        return True


def _show(report: dict[str, Any], shown: bool, path: str | None) -> None:
    if path is not None:
        import json

        from ..outputs import open_output

        with open_output(path) as output:
            output.file.write(json.dumps(report, indent=2).encode() + b"\n")
    if shown:
        from rich.console import Console

        from .text import print_report

        print_report(report, Console(stderr=True))
    for name, count in ((report.get("program") or {}).get("missing_calls") or {}).items():
        click.echo(f"vmm: note: the program made a system call that is not served: {name} ({count} times)", err=True)
