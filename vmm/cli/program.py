"""``vmm run``: a Linux program in a machine of its own, as if it ran here."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ipc.layout import MAX_VCPUS
from workers.accel import registry

from ..errors import ExitCode, VmmError
from .common import Duration, Size, print_json
from .forward import forwarding, note_forward
from .run import Interrupted, run_or_leave

if TYPE_CHECKING:
    from ..client.console import ConsoleFollower
    from ..client.machine import Machine
    from ..machine.spec import MachineSpec

__all__ = ["make_root", "run_arrived", "run_program", "trees_options"]

_PAIR = re.compile(r"([^=]+)=(.*)", re.DOTALL)
#: {key of a configuration: option of this verb that says the same}
_OPTIONS = {"guest.root": "--root", "guest.files": "--file", "guest.env": "--env", "guest.directory": "--directory",
            "guest.seed": "--seed", "guest.forward": "--forward",
            "memory.0.size": "--memory", "dirty_ring_size": "--ring", "timeout": "--timeout"}
_KEY = re.compile("|".join(map(re.escape, _OPTIONS)))
_NOT_THERE = os.strerror(errno.ENOENT)
#: Signals that become the program's.
_PASSED_ON = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_AT_ONCE_S = 1.0


@click.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--root", type=click.Path(exists=True), help="Directory or tar file that is the program's root; it is "
                                                            "read, and never written to.")
@click.option("--file", "files", multiple=True, metavar="INSIDE=OUTSIDE",
              help="Give the program this file or directory of the host, copied when it is used.")
@click.option("--env", "environment", multiple=True, metavar="NAME=VALUE", help="Set a variable of its environment.")
@click.option("--directory", default="/", show_default=True, help="Directory in which it starts.")
@click.option("--forward", multiple=True, metavar="[ADDRESS:]PORT[:INSIDE]",
              help="Lead a port of this host (at 127.0.0.1 if no address is given) to one of the program's.")
@click.option("--accel", type=click.Choice(["auto", *registry.names("guest")]), default="auto", show_default=True,
              help="Accelerator; auto takes kvm where it can be used.")
@click.option("--threads", type=click.IntRange(1, MAX_VCPUS - 1),
              help="Threads that it and its children may have at once (default: 8).")
@click.option("--memory", type=Size(), default="256MiB", show_default=True, help="Memory of the machine.")
@click.option("--seed", type=int, help="Make its random numbers the same in each run.")
@click.option("--ring", type=int, help="Entries of each dirty ring (default: as many as pages, or as are possible).")
@click.option("--verify", is_flag=True, help="Check the dirty log against the memory while it runs.")
@click.option("--timeout", type=Duration(), help="End it after this time.")
@click.option("--name", help="Name of the machine (default: that of the program, and a number).")
@click.option("--terminal/--no-terminal", "terminal", default=None,
              help="Give it a terminal, as is done when standard input and output are one; or else three streams. "
                   "Ctrl-] and then q ends the machine.")
@click.option("--detach", is_flag=True, help="Leave it running in the background; what it writes is in vmm logs.")
@click.option("--report", "shown", is_flag=True, help="Show the machine's report at the end, on standard error.")
@click.option("--report-json", type=click.Path(dir_okay=False), help="Write the machine's report to this file.")
@click.argument("program")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run_program(program: str, args: tuple[str, ...], name: str | None, terminal: bool | None, shown: bool,
                report_json: str | None, **options: Any) -> int:
    """Run an unmodified Linux program in a machine. Each of its threads is a vCPU process with a dirty ring of its own.
    Input and output are those of this command, and so are signals and the exit status; a second Ctrl-C within a
    second ends the machine. Without --root and --file the program itself
    is all that there is in the machine (see docs/linux.md)."""
    from ..client.keeper import KeeperProcess

    detach, name = options["detach"], name or _name(program)
    with contextlib.ExitStack() as stack:
        keeper = KeeperProcess(name, quiet=detach, programs=True, fork=True)    # it begins while this does the rest
        stack.callback(keeper.give_up)
        from ..client.forwarding import HostPorts
        from ..client.machine import Machine

        console = "lines" if detach else "terminal" if _is_terminal(terminal) else "streams"
        with _said_by_option(options):
            spec = _machine(program, args, name, options, console)
            ports = stack.enter_context(HostPorts(() if detach else options["forward"]))
            machine = Machine.launch(spec, detach=detach, start=detach, keeper=keeper)
        if detach:
            status = run_or_leave(machine, True, False)
            note_forward(machine.name, options["forward"])
            return status
        with machine, forwarding(machine.name, ports):
            report = follow_program(machine)
    return _end(report, shown, report_json)


def run_arrived(machine: Machine, detach: bool, as_json: bool) -> int:
    """A machine that was restored, or has come from elsewhere: as ``run_or_leave``; a program that has the console of
    ``vmm run`` has that of this command now."""
    note_forward(machine.name, machine.forward)
    if detach or machine.console == "lines":
        return run_or_leave(machine, detach, as_json)
    with machine:
        report = follow_program(machine)
    if as_json:
        print_json(report)
    return _end(report, False, None)


def _end(report: dict[str, Any], shown: bool, path: str | None) -> int:
    """Say how it was; the exit status."""
    _show(report, shown, path)
    exit_status = (report.get("program") or {}).get("exit_status")
    if report.get("handed_over"):
        click.echo(f"vmm: the program goes on elsewhere: it was migrated to {report['handed_over']}", err=True)
    elif report["exit_code"] > ExitCode.GUEST_FAILED:
        details = "; ".join(each["detail"] for each in report.get("vcpus", []) if each["detail"])
        click.echo(f"vmm: the machine has ended before the program: {report.get('cause', 'unknown')}"
                   f"{details and f' ({details})'}", err=True)
    return int(report["exit_code"] if exit_status is None or report["exit_code"] > ExitCode.GUEST_FAILED
               else exit_status)


def trees_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Of a verb that a machine arrives by: the files of its program, as ``trees``."""
    @click.option("--root", type=click.Path(exists=True),
                  help="Of a Linux program: the directory or tar file that is its root, with the same contents.")
    @click.option("--file", "files", multiple=True, metavar="INSIDE=OUTSIDE",
                  help="Of a Linux program: a directory that it was given, with the same contents.")
    @functools.wraps(command)
    def with_trees(root: str | None, files: tuple[str, ...], **options: Any) -> Any:
        from ..machine.rules import Trees

        there = {inside: os.path.abspath(outside) for inside, outside in _pairs("--file", files).items()}
        return command(trees=Trees(os.path.abspath(root) if root else "", there), **options)

    return with_trees


def _is_terminal(wanted: bool | None) -> bool:
    """Raises VmmError when it is wanted, and cannot be."""
    from ..client.terminal import in_foreground

    there = all(each is not None and not each.closed and each.isatty() for each in (sys.stdin, sys.stdout))
    if wanted and not there:
        raise VmmError("--terminal: standard input and output are not a terminal")
    return wanted is not False and there and in_foreground(sys.stdin.fileno())


def _machine(program: str, args: tuple[str, ...], name: str, options: dict[str, Any], console: str) -> MachineSpec:
    """Raises VmmError."""
    from ..client.programs import THREADS, program_machine, program_spec

    root = options["root"]
    if root is not None and not os.path.isdir(root):
        import tarfile

        if not tarfile.is_tarfile(root):
            raise VmmError(f"--root {root}: is neither a directory nor a tar file")
    for text in (program, *args, *options["environment"]):
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise VmmError(f"{text!a}: is not UTF-8 text")
    environment = {"TERM": os.environ.get("TERM", "linux")} if console == "terminal" else {}
    environment |= _pairs("--env", options["environment"])
    asked = program_spec(program, args, root=root or "", env=environment,
                         files=_pairs("--file", options["files"]), directory=options["directory"],
                         seed=options["seed"], console=console, forward=options["forward"])
    return program_machine(name, asked, memory=options["memory"], accel=options["accel"],
                           threads=options["threads"] or THREADS, ring_entries=options["ring"],
                           verify=options["verify"], timeout=options["timeout"], linger=not options["detach"])


@contextlib.contextmanager
def _said_by_option(options: dict[str, Any]) -> Iterator[None]:
    """Errors name the options of this verb, and not the keys of a configuration."""
    try:
        yield
    except VmmError as exc:
        text = _KEY.sub(lambda match: _OPTIONS[match[0]], re.sub(r"^vcpu \d+: ", "", str(exc)))
        if text.startswith("guest.program: "):
            text = text.removeprefix("guest.program: ")
            if text.endswith(_NOT_THERE) and options["root"] is None and not options["files"]:
                text = f"{text}: it needs more files than itself (with --root / it finds those of this host)"
            elif text.endswith(_NOT_THERE):
                text = f"{text} (or an interpreter that it needs is not there)"
        raise VmmError(text, exc.exit_code) from None


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


def follow_program(machine: Machine) -> dict[str, Any]:
    """Be its console; its report, once it has ended."""
    from ..client.console import ConsoleFollower
    from ..machine.runtime import machine_dir

    for warning in machine.warnings:
        click.echo(f"vmm: warning: {warning}", err=True)
    terminal = machine.console == "terminal" and _is_terminal(None)
    output, error = (None if each is None else each.buffer for each in (sys.stdout, sys.stderr))
    with ConsoleFollower(machine_dir(machine.name), _source(), output, error, lambda: _is_over(machine)) as console, \
            _Signals(console):
        try:
            with console.be_terminal() if terminal else contextlib.nullcontext():
                machine.start()
                if not console.follow():
                    machine.stop()
            return machine.wait(60.0)
        except (Interrupted, BrokenPipeError) as exc:
            with contextlib.suppress(VmmError):
                machine.stop()
                machine.wait(60.0)
            if isinstance(exc, BrokenPipeError):        # whoever read what it says has gone
                raise Interrupted(signal.SIGPIPE) from None
            raise


def _source() -> int:
    """Standard input. A job in the background has none: it would be stopped when it reads from its terminal."""
    from ..client.terminal import in_foreground

    if sys.stdin is None or sys.stdin.closed or (sys.stdin.isatty() and not in_foreground(sys.stdin.fileno())):
        return -1
    return sys.stdin.fileno()


class _Signals:
    """Within the ``with`` signals are the program's. A second one from the keyboard, at once, ends the machine."""

    def __init__(self, console: ConsoleFollower) -> None:
        self._console = console
        self._last = 0.0

    def __enter__(self) -> None:
        for number in _PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._pass_on)
        signal.signal(signal.SIGWINCH, lambda number, frame: self._console.resized())

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if now - self._last < _AT_ONCE_S:
                self._end()
                raise Interrupted(number)
            self._last = now
        self._console.signal(number)

    def _end(self) -> None:
        for number in _PASSED_ON:
            signal.signal(number, signal.SIG_IGN)       # one is enough

    def __exit__(self, *error: object) -> None:
        self._end()
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)


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
    program = report.get("program") or {}
    for name, count in program.get("missing_calls", {}).items():
        click.echo(f"vmm: note: the program made a system call that is not served: {name} ({count} times)", err=True)
    if program.get("refused_threads"):
        click.echo(f"vmm: note: {program['refused_threads']} threads or processes were refused (EAGAIN), because every "
                   "vCPU had one: --threads gives more", err=True)


@click.command("root")
@click.argument("directory", type=click.Path())
@click.argument("packages", nargs=-1, required=True)
def make_root(directory: str, packages: tuple[str, ...]) -> None:
    """Make DIRECTORY a root for programs (vmm run --root). It gets the files of these Debian packages, and of all that
    they need; their scripts are not run."""
    from pathlib import Path

    from ..client import debian

    names = debian.make_root(Path(directory), packages, lambda text: click.echo(text, err=True))
    click.echo(f"{directory} has {len(names)} packages: vmm run --root {directory} -- PROGRAM")
