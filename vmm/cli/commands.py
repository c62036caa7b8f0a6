"""``vmm``: every verb is a few lines over :class:`vmm.client.machine.Machine`.

Imports that cost time (numpy, pydantic, ZeroMQ) are made by the verbs that need them, and a verb of another module
is imported when it is named.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from ..errors import ExitCode, VmmError
from .common import json_option, on_machine, print_json
from .forward import forward, forwarding, note_forward
from .run import Interrupted, run_or_leave

if TYPE_CHECKING:
    from ..client.machine import Machine

__all__ = ["run"]


#: {module: {verb: its name there}}
_MODULES = {
    "clients": {"client": "client"},
    "compare": {"compare": "compare"},
    "demo": {"demo": "demo"},
    "dirty": {"dirty-limit": "dirty_limit", "dirty-rate": "dirty_rate", "tracking": "tracking",
              "working-set": "working_set"},
    "exporter": {"exporter": "exporter"},
    "events": {"events": "events"},
    "fleet": {"fleet": "fleet"},
    "machines": {"list": "list_", "logs": "logs", "status": "status", "stop": "stop",
                 "upgrade": "upgrade", "wait": "wait"},
    "migrate": {"migrate": "migrate"},
    "predict": {"predict": "predict"},
    "program": {"root": "make_root", "run": "run_program"},
    "programs": {"maps": "maps", "strace": "strace"},
    "report": {"report": "report"},
    "qmp": {"qmp": "qmp"},
    "receive": {"keys": "keys", "receive": "receive"},
    "snapshot": {"snapshot": "snapshot"},
    "stats": {"stats": "stats"},
    "stress": {"stress": "stress"},
    "top": {"top": "top"},
    "trace": {"trace": "trace"},
    "watch": {"watch": "watch"}}
_ELSEWHERE = {verb: (module, name) for module, verbs in _MODULES.items() for verb, name in verbs.items()}


class _Verbs(click.Group):
    """Those of this module, and those that are elsewhere."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.commands, *_ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands and cmd_name in _ELSEWHERE:
            module, name = _ELSEWHERE[cmd_name]
            self.add_command(getattr(importlib.import_module(f".{module}", __package__), name), cmd_name)
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="shardvmm")
def cli() -> None:
    """Run virtual machines whose vCPUs are processes, and track every page they dirty."""


# --- launch ------------------------------------------------------------------------------------------


@cli.command()
@click.argument("config", type=click.Path())
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
              help="Override a key of CONFIG, for example vcpus=8 or memory.0.size=1GiB.")
@click.option("--name", help="Name of the machine (default: the name in CONFIG, else its file name).")
@click.option("--detach", is_flag=True, help="Leave the machine running in the background.")
@click.option("--trace", "trace", multiple=True, metavar="PATTERN",
              help="Enable the trace events that match, for example 'kvm_dirty_ring_*'. (For dirty traces, see vmm "
                   "trace.)")
@click.option("--trace-file", type=click.Path(dir_okay=False), default="",
              help="Write trace events to this file instead of standard error.")
@click.option("--metrics", metavar="ADDRESS",
              help="Serve metrics for Prometheus until the machine ends, at PORT (of 127.0.0.1), HOST:PORT, :PORT or "
                   "unix:PATH.")
@click.option("--dirty-rate", "dirty_rate", is_flag=True,
              help="With --metrics: also measure the dirty rate. The machine logs for it, and each scrape flushes.")
@click.option("--qmp", "qmp_socket", type=click.Path(dir_okay=False),
              help="Serve QMP at this Unix socket, as vmm qmp does.")
@json_option
def launch(config: str, overrides: tuple[str, ...], name: str | None, detach: bool, trace: tuple[str, ...],
           trace_file: str, metrics: str | None, dirty_rate: bool, qmp_socket: str | None, as_json: bool) -> int:
    """Launch a machine and run it until it ends. CONFIG is a YAML file, or the name of an example (quickstart, for
    one); - reads standard input."""
    from ..client.config import load_config
    from ..client.forwarding import HostPorts
    from ..client.machine import Machine
    from .exporter import MetricsPort

    if trace and detach and not trace_file:
        raise VmmError("--trace with --detach needs --trace-file: a detached machine has no terminal to write to")
    if dirty_rate and metrics is None:
        raise VmmError("--dirty-rate is measured for metrics: give --metrics ADDRESS, too")
    machine_config = load_config(config, list(overrides), name=name)
    wanted = [] if machine_config.guest is None else machine_config.guest.forward
    with HostPorts([] if detach else wanted) as ports, MetricsPort(metrics, dirty_rate=dirty_rate) as port:
        machine = Machine.launch(machine_config, trace=list(trace),
                                 trace_file=os.path.abspath(trace_file) if trace_file else "", detach=detach,
                                 start=False)
        try:
            if qmp_socket is not None:
                from .qmp import start_qmp

                start_qmp(machine.name, qmp_socket)
            if detach:
                machine.start()
        except BaseException:
            machine.close()
            raise
        if not detach:
            with machine, forwarding(machine.name, ports), port.serving(machine.name):
                return run_or_leave(machine, False, as_json)
        port.leave(machine.name)
        status = run_or_leave(machine, True, as_json)
        note_forward(machine.name, wanted)
        return status


# --- running machines ------------------------------------------------------------------------------------


def _simple(name: str, help_text: str, act: Callable[[Machine], None], done: str) -> None:
    """A verb that does one thing to a machine and says so."""

    @cli.command(name, help=help_text)
    @on_machine
    @json_option
    def verb(machine: Machine, as_json: bool) -> None:
        act(machine)
        if as_json:
            print_json({"name": machine.name, "done": name})
        else:
            click.echo(f"{machine.name} {done}")


_simple("pause", "Pause a machine. Every vCPU leaves the guest and stays out until vmm resume.",
        lambda m: m.pause(), "is paused")


@cli.command()
@on_machine
@click.option("--force", is_flag=True, help="Also resume a machine that was handed over to a migration target and "
                                            "lost there. It continues here from the moment of the hand-over.")
@json_option
def resume(machine: Machine, force: bool, as_json: bool) -> None:
    """Undo vmm pause. The machine continues unless something else, such as a snapshot, keeps it paused."""
    held_by = machine.resume(force=force)
    if as_json:
        print_json({"name": machine.name, "done": "resume", "held_by": held_by})
    elif held_by:
        click.echo(f"{machine.name} stays paused: {', '.join(held_by)}")
    else:
        click.echo(f"{machine.name} is running")


@cli.group()
def log() -> None:
    """Start or stop dirty logging of a memory slot."""


def _log_verb(name: str, help_text: str) -> None:
    @log.command(name, help=help_text)
    @on_machine
    @click.argument("slot", type=int)
    @json_option
    def verb(machine: Machine, slot: int, as_json: bool) -> None:
        if name == "start":
            machine.log_start(slot)
        else:
            machine.log_stop(slot)
        if as_json:
            print_json({"name": machine.name, "slot": slot, "logged": name == "start"})
        else:
            click.echo(f"{machine.name}: slot {slot} is {'logged' if name == 'start' else 'not logged'}")


_log_verb("start", "Start logging the pages dirtied in SLOT.")
_log_verb("stop", "Stop logging SLOT; the pages logged so far are kept.")


@cli.command()
@on_machine
@click.option("--client", default="cli", show_default=True, help="Client whose last sync to count from.")
@json_option
def sync(machine: Machine, client: str, as_json: bool) -> None:
    """Flush the dirty log and show dirty pages. These are the pages of each slot dirtied since this client's last
    sync; the first sync registers the client, and counting starts there."""
    machine.register(client)
    result = machine.sync(client)
    if as_json:
        print_json({"name": machine.name, "client": client, "pages": result.pages,
                     "slots": {str(i): [list(r) for r in ranges] for i, ranges in result.slots.items()}})
        return
    for slot_id, ranges in result.slots.items():
        click.echo(f"slot {slot_id}: {sum(n for _, n in ranges)} pages dirty")
        for first, count in ranges:
            pages = f"{first:#x}" if count == 1 else f"{first:#x}-{first + count - 1:#x}"
            click.echo(f"    {pages} ({count} page{'s' if count > 1 else ''})")


@cli.group()
def memory() -> None:
    """Hot-plug and unplug memory slots of a running machine."""


@memory.command("add")
@on_machine
@click.argument("slot", type=int)
@click.argument("gpa")
@click.argument("size")
@click.option("--no-log", is_flag=True, help="Add the slot without dirty logging.")
@json_option
def memory_add(machine: Machine, slot: int, gpa: str, size: str, no_log: bool, as_json: bool) -> None:
    """Add memory slot SLOT of SIZE at guest physical address GPA (bytes, 0x…, KiB, MiB, GiB)."""
    from ..client.units import parse_size

    try:
        address, length = parse_size(_number(gpa)), parse_size(_number(size))
    except ValueError as exc:
        raise VmmError(str(exc)) from None
    machine.memory_add(slot, address, length, log=not no_log)
    _memory_done(machine, slot, "added", as_json)


@memory.command("remove")
@on_machine
@click.argument("slot", type=int)
@click.option("--force", is_flag=True, help="Remove it even if it holds the guest's image or stacks.")
@json_option
def memory_remove(machine: Machine, slot: int, force: bool, as_json: bool) -> None:
    """Remove memory slot SLOT: pause the vCPUs, reap the rings, sync the bitmap, remove the slot, resume the
    vCPUs."""
    machine.memory_remove(slot, force=force)
    _memory_done(machine, slot, "removed", as_json)


def _number(text: str) -> int | str:
    """``4096`` is bytes; everything else is for parse_size."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else text


def _memory_done(machine: Machine, slot: int, what: str, as_json: bool) -> None:
    if as_json:
        print_json({"name": machine.name, "slot": slot, "done": what})
    else:
        click.echo(f"{machine.name}: slot {slot} {what}")


cli.add_command(forward)


# --- the host ----------------------------------------------------------------------------------------------


@cli.command()
@json_option
def doctor(as_json: bool) -> int:
    """Check what this host supports: KVM, dirty rings, shared memory, limits, leftovers."""
    from ..client.doctor import examine, healthy

    findings = examine()
    if as_json:
        print_json([f.as_dict() for f in findings])
    else:
        from ..tables import print_table, screen
        from .text import doctor_table

        print_table(doctor_table([f.as_dict() for f in findings]), screen())
    return ExitCode.OK if healthy(findings) else 1


@cli.command()
@click.argument("name", required=False)
@click.option("--logs", is_flag=True, help="Also remove logs and reports of machines that have ended.")
@json_option
def gc(name: str | None, logs: bool, as_json: bool) -> None:
    """Remove what crashed machines left behind. With NAME, only what that machine left."""
    from ..machine.records import remove_records
    from ..machine.runtime import collect_garbage

    removed = collect_garbage(name)
    if logs:
        try:
            removed += remove_records(name)
        except OSError as exc:
            raise VmmError(f"cannot remove the logs: {exc}") from None
    if as_json:
        print_json({"removed": removed})
    else:
        for each in removed:
            click.echo(f"removed {each}")
        click.echo(f"{len(removed)} removed" if removed else "nothing was left behind")


@cli.command()
@click.argument("what", type=click.Choice(["config", "report", "stats"]), default="config")
def schema(what: str) -> None:
    """Print a JSON schema. It is that of the configuration file, of a machine's report (vmm status --json), or of a
    sample (vmm stats --json-lines)."""
    if what == "report":
        from ..machine.report import report_schema

        print_json(report_schema())
    elif what == "stats":
        from ..consumers.stats import stats_schema

        print_json(stats_schema())
    else:
        from ..client.config import config_schema

        print_json(config_schema())


@cli.command()
@json_option
def guests(as_json: bool) -> None:
    """List the sample guests and their parameters."""
    from ..guests import WORKLOADS

    if as_json:
        print_json({w.name: {"description": w.description,
                              "params": {p.name: {"default": p.default, "minimum": p.minimum,
                                                  "maximum": p.maximum, "help": p.help} for p in w.params}}
                     for w in WORKLOADS.values()})
        return
    for w in WORKLOADS.values():
        click.echo(f"{w.name}: {w.description}")
        for p in w.params:
            click.echo(f"    {p.name} (default {p.default}): {p.help}")
    click.echo("accel: replay runs no guest: it dirties pages in a pattern (sequential, strided, random, zipf) or "
               "from a trace; vmm schema lists its keys")


def run() -> int:
    """Carry out the command line; its exit status. Whatever goes wrong is said on standard error, but for what
    becomes of standard output (vmm/cli/main.py)."""
    try:
        return int(cli.main(standalone_mode=False) or 0)
    except VmmError as exc:
        for line in str(exc).splitlines():
            _say(f"vmm: error: {line}")
        return int(exc.exit_code)
    except click.ClickException as exc:
        with contextlib.suppress(OSError):
            exc.show()
        return exc.exit_code
    except Interrupted as exc:
        return 128 + exc.signum
    except (click.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except MemoryError:
        _say("vmm: error: not enough memory")
        return ExitCode.BAD_INPUT
    except Exception as exc:
        if os.environ.get("VMM_DEBUG"):
            raise
        _say(f"vmm: {type(exc).__name__}: {exc} (this is a bug; set VMM_DEBUG=1 for a traceback)")
        return ExitCode.BUG


def _say(text: str) -> None:
    """On standard error, which may be closed or full: then there is nobody to tell."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)
