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
from typing import TYPE_CHECKING, Any

import click

from ..errors import ExitCode, VmmError, one_line
from .common import Size, confirm, json_option, on_machine, print_json
from .completion import complete_ended, complete_slots
from .examples import EXAMPLES
from .forward import forward
from .run import Interrupted

if TYPE_CHECKING:
    from ..client.machine import Machine

__all__ = ["run"]


_RANGES = 10        # of a slot that sync prints, unless asked for others
_PAGE_KIB = 4
_SENTENCE = 200     # characters of the first sentence of a help text: all of it

#: {module: {verb: its name there}}
_MODULES = {
    "clients": {"client": "client"},
    "compare": {"compare": "compare"},
    "completion": {"completion": "completion"},
    "config": {"config": "config"},
    "console": {"attach": "attach", "console": "console"},
    "demo": {"demo": "demo"},
    "dirty": {"dirty-limit": "dirty_limit", "dirty-rate": "dirty_rate", "tracking": "tracking",
              "working-set": "working_set"},
    "events": {"events": "events"},
    "exporter": {"exporter": "exporter"},
    "fleet": {"fleet": "fleet"},
    "launch": {"launch": "launch"},
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
#: In which order help lists the verbs; the others come last.
_SECTIONS = {
    "Machines": ("demo", "launch", "list", "status", "top", "attach", "console", "logs", "events", "stats", "pause",
                 "resume", "wait", "stop", "upgrade"),
    "Configuration": ("config", "guests", "schema"),
    "Linux programs": ("run", "root", "forward", "maps", "strace"),
    "Dirty pages": ("sync", "client", "log", "tracking", "dirty-rate", "dirty-limit", "working-set", "trace", "watch"),
    "Memory, snapshots, migration": ("memory", "snapshot", "migrate", "receive", "predict", "keys"),
    "Measurements": ("compare", "stress", "report"),
    "Hosts": ("doctor", "gc", "fleet", "exporter", "qmp", "completion")}
_ELSEWHERE = {verb: (module, name) for module, verbs in _MODULES.items() for verb, name in verbs.items()}


class _Verbs(click.Group):
    """Those of this module, and those that are elsewhere."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.commands, *_ELSEWHERE})

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        left = {name: each for name in self.list_commands(ctx) if (each := self.get_command(ctx, name)) is not None}
        for title, verbs in _SECTIONS.items():
            _write_verbs(formatter, title, {name: left.pop(name) for name in verbs if name in left})
        _write_verbs(formatter, "More", left)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as exc:
            import difflib

            # Click knows only those that have been imported.
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if args[0].startswith("-") or not near:
                raise
            raise click.UsageError(f"{exc.message} Did you mean '{near[0]}'?", ctx) from None

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands and cmd_name in _ELSEWHERE:
            module, name = _ELSEWHERE[cmd_name]
            self.add_command(getattr(importlib.import_module(f".{module}", __package__), name), cmd_name)
        found = super().get_command(ctx, cmd_name)
        if found is not None and found.epilog is None:
            _add_examples(found, cmd_name)
        return found


def _write_verbs(formatter: click.HelpFormatter, title: str, verbs: dict[str, click.Command]) -> None:
    if verbs:
        with formatter.section(title):
            formatter.write_dl([(f"{name:<11}", each.get_short_help_str(_SENTENCE)) for name, each in verbs.items()])


def _add_examples(command: click.Command, words: str) -> None:
    """To its help, and to that of the verbs below it."""
    if words in EXAMPLES:
        command.epilog = "\b\n" + "\n".join(["Examples:", *(f"  {each}" for each in EXAMPLES[words])])
    for name, each in getattr(command, "commands", {}).items():
        _add_examples(each, f"{words} {name}")


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
             epilog="\b\nExamples:\n  vmm launch quickstart\n  vmm config new guest --output vm.yaml\n"
                    "  vmm launch --help          each verb has examples in its help")
@click.version_option(package_name="shardvmm")
def cli() -> None:
    """Run virtual machines whose vCPUs are processes, and track every page they dirty."""


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
    @click.argument("slot", type=int, shell_complete=complete_slots)
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
@click.option("--ranges", type=click.IntRange(0), default=_RANGES, show_default=True, metavar="N",
              help="Print at most so many ranges of each slot.")
@click.option("--all", "everything", is_flag=True, help="Print all ranges.")
@json_option
def sync(machine: Machine, client: str, ranges: int, everything: bool, as_json: bool) -> None:
    """Flush the dirty log and show dirty pages. These are the pages of each slot dirtied since this client's last
    sync; the first sync registers the client, and counting starts there. Ranges are of page numbers within the slot.
    With --json, all ranges are there, as first page and number of pages."""
    is_new = client not in machine.status()["clients"]
    machine.register(client)
    result = machine.sync(client)
    if as_json:
        print_json({"name": machine.name, "client": client, "pages": result.pages,
                     "slots": {str(i): [list(r) for r in ranges] for i, ranges in result.slots.items()}})
        return
    if is_new:
        click.echo(f"{machine.name}: client {client} is new: what is dirtied is gathered for it from now on")
    kib = result.pages * _PAGE_KIB
    click.echo(f"{machine.name}, client {client}: {result.pages:,} pages dirty "
               f"({f'{kib / 1024:,.1f} MiB' if kib >= 1024 else f'{kib} KiB'}), "
               f"in {sum(map(len, result.slots.values())):,} ranges")
    for slot_id, found in result.slots.items():
        click.echo(f"slot {slot_id}: {sum(n for _, n in found):,} pages dirty")
        shown = found if everything else found[:ranges]
        for first, count in shown:
            pages = f"{first:#x}" if count == 1 else f"{first:#x}-{first + count - 1:#x}"
            click.echo(f"    {pages} ({count:,} page{'s' if count > 1 else ''})")
        if len(shown) < len(found):
            click.echo(f"    and {len(found) - len(shown):,} more ranges (--all prints them)")


@cli.group()
def memory() -> None:
    """Hot-plug and unplug memory slots of a running machine."""


@memory.command("add")
@on_machine
@click.argument("slot", type=int)
@click.argument("gpa", type=Size())
@click.argument("size", type=Size())
@click.option("--no-log", is_flag=True, help="Add the slot without dirty logging.")
@json_option
def memory_add(machine: Machine, slot: int, gpa: int, size: int, no_log: bool, as_json: bool) -> None:
    """Add memory slot SLOT of SIZE at guest physical address GPA. Both are bytes, 0x…, or a number with a unit (64MiB,
    64MB, 4099 pages), and multiples of 4096 bytes."""
    machine.memory_add(slot, gpa, size, log=not no_log)
    _memory_done(machine, slot, "added", as_json)


@memory.command("remove")
@on_machine
@click.argument("slot", type=int, shell_complete=complete_slots)
@click.option("--force", is_flag=True, help="Remove it even if it holds the guest's image or stacks.")
@json_option
def memory_remove(machine: Machine, slot: int, force: bool, as_json: bool) -> None:
    """Remove memory slot SLOT: pause the vCPUs, reap the rings, sync the bitmap, remove the slot, resume the
    vCPUs."""
    machine.memory_remove(slot, force=force)
    _memory_done(machine, slot, "removed", as_json)


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
@click.argument("name", required=False, shell_complete=complete_ended)
@click.option("--logs", is_flag=True, help="Also remove logs and reports of machines that have ended.")
@click.option("--force", is_flag=True, help="With --logs and without NAME: do not ask.")
@json_option
def gc(name: str | None, logs: bool, force: bool, as_json: bool) -> None:
    """Remove what crashed machines left behind. With NAME, only what that machine left."""
    from ..machine.records import ended_names, remove_records
    from ..machine.runtime import collect_garbage

    if logs and name is None and (ended := ended_names()):
        confirm(f"Remove the logs and reports of {len(ended)} machines?", force=force)
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
@click.argument("what", type=click.Choice(["config", "fleet", "report", "stats", "sweep"]), default="config")
def schema(what: str) -> None:
    """Print a JSON schema. It is that of the configuration file, of a machine's report (vmm status --json), of a sample
    (vmm stats --json-lines), or of the file of a sweep (vmm stress) or of a fleet."""
    if what == "fleet":
        from ..fleet.config import fleet_schema

        print_json(fleet_schema())
    elif what == "report":
        from ..machine.report import report_schema

        print_json(report_schema())
    elif what == "stats":
        from ..consumers.stats import stats_schema

        print_json(stats_schema())
    elif what == "sweep":
        from ..lab.stress.schema import sweep_schema

        print_json(sweep_schema())
    else:
        from ..client.schema import config_schema

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
        return int(cli.main(prog_name="vmm", standalone_mode=False) or 0)
    except VmmError as exc:
        for line in exc.told():
            _say(line if line.startswith(" ") else f"vmm: {line}")
        return int(exc.exit_code)
    except click.exceptions.NoArgsIsHelpError as exc:
        with contextlib.suppress(OSError):
            exc.show()
        return exc.exit_code
    except click.ClickException as exc:
        path = exc.ctx.command_path if isinstance(exc, click.UsageError) and exc.ctx is not None else "vmm"
        _say(f"vmm: error: {one_line(exc.format_message(), 500).rstrip('.')} (see {path} --help)")
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
