"""``vmm migrate``, and what is said to a migration that is under way or has ended."""

from __future__ import annotations

import contextlib
import signal
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ipc.run import python_module

from ..errors import ExitCode, VmmError
from .common import Duration, Rate, json_option, print_json
from .completion import complete_ended, complete_machines
from .migrating import MigrationLines, Shown, key_options, print_report, print_status
from .run import Interrupted
from .signals import raise_on

if TYPE_CHECKING:
    from ..client.machine import Machine
    from ..migrate import Options

__all__ = ["migrate"]

_ANSWERS_IN = 5.0           # seconds
_LATE = click.Choice(["cancel", "force", "postcopy"])


class _RateOrNone(Rate):
    """And ``none``, which is 0."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return 0.0 if value == "none" else super().convert(value, param, ctx)


class _Migrate(click.Group):
    """``vmm migrate NAME ADDRESS`` is ``vmm migrate start NAME ADDRESS``."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["start", *args]
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """And those of ``start``, which are also this verb's."""
        begin = self.commands["start"]
        records = [record for each in begin.get_params(ctx)
                   if isinstance(each, click.Option) and (record := each.get_help_record(ctx))]
        with formatter.section("Options of vmm migrate NAME ADDRESS"):
            formatter.write_dl(records)
        self.format_commands(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """What ``start`` begins with, too."""
        begin = self.commands["start"]
        if incomplete.startswith("-"):
            return begin.shell_complete(click.Context(begin, parent=ctx), incomplete)
        named = begin.params[0].shell_complete(ctx, incomplete)
        return [*named, *super().shell_complete(ctx, incomplete)]


@click.group(cls=_Migrate, subcommand_metavar="NAME ADDRESS | COMMAND NAME [ARGS]...")
def migrate() -> None:
    """Migrate a running machine to another host or name. At ADDRESS (tcp://HOST:PORT or ipc://PATH), vmm receive is
    waiting. A machine that is called like one of the commands is migrated by vmm migrate start NAME ADDRESS."""


@migrate.command()
@click.argument("name", shell_complete=complete_machines)
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
@click.option("--wait", type=Duration(), help="How long to try again while the target is busy with another machine.")
@click.option("--timeout", type=Duration(), help="How long it may take until the hand-over.")
@click.option("--stall", type=Duration(), help="How long rounds may leave no less than one before them.")
@click.option("--on-timeout", type=_LATE, default="cancel", show_default=True,
              help="What comes then: the migration is given up; the guest is stopped until the rest has been sent; or "
                   "post-copy.")
@click.option("--paused", is_flag=True, help="Leave the guest paused at the target, until vmm resume there.")
@click.option("--keep-source", is_flag=True, help="Keep the machine here, paused, as a copy that only vmm resume "
                                                   "--force runs.")
@click.option("--check", is_flag=True, help="Only ask whether the target can run it; exit status 9 if not.")
@click.option("--recover", is_flag=True, help="Finish a migration whose source was lost after the "
                                               "hand-over.")
@key_options
@click.option("--background", is_flag=True, help="Return at once and print the migration's id.")
@click.option("--report", "report_path", type=click.Path(path_type=Path),
              help="Write the final report to this file.")
@click.option("--json-lines", is_flag=True,
              help="Print progress, each round and the end as JSON, a document a line.")
@click.option("--id", "migration_id", default="", hidden=True)
@json_option
def start(name: str, address: str, check: bool, recover: bool, background: bool, report_path: Path | None,
          migration_id: str, as_json: bool, json_lines: bool, **asked: Any) -> int:
    """Migrate machine NAME to ADDRESS (tcp://HOST:PORT or ipc://PATH). If that fails, it keeps running here."""
    from .. import migrate as migration
    from ..client.machine import Machine
    from ..consumers.migration.addresses import parse_address
    from ..consumers.migration.keys import load_keys
    from ..outputs import open_output

    # Before anything else, to say what is wrong.
    load_keys(asked["key"], asked["peer"], parse_address(address), insecure=asked["insecure"])
    if background:
        _start_in_background(name, address, as_json or json_lines)
        return ExitCode.OK
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    options = migration.Options(converge=not given.pop("no_converge"), **given)
    if check:
        return _check(name, address, options, as_json)
    run = migration.recover if recover else migration.migrate
    raise_on(signal.SIGTERM, lambda number: KeyboardInterrupt())
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(Machine.attach(name))
        output = None if report_path is None else stack.enter_context(contextlib.closing(open_output(report_path)))
        shown = stack.enter_context(Shown(output, stack.enter_context(MigrationLines()) if json_lines else None))
        try:
            report = run(machine, address, options, migration_id=migration_id, progress=shown.tell)
        except KeyboardInterrupt:
            click.echo(_how_it_stands(machine), err=True)
            raise Interrupted(signal.SIGINT) from None
    if as_json:
        print_json(report.as_dict())
    elif not json_lines:
        print_report(report)
        if options.keep_source:
            click.echo(f"{name} stays paused here, as it was handed over: vmm stop {name} ends it; vmm resume {name} "
                       "--force runs it here, which is for when the other does not")
    return ExitCode.OK


def _how_it_stands(machine: Machine) -> str:
    """After a migration that was interrupted; in a line."""
    try:
        found = machine.status(_ANSWERS_IN)
    except VmmError as exc:
        return f"vmm: interrupted: {exc}"
    if to := found["handed_over"]:
        return (f"vmm: interrupted: {machine.name} stays paused here, since it was handed over to {to}; vmm migrate "
                f"{machine.name} ADDRESS --recover tries again")
    return f"vmm: the migration was cancelled: {machine.name} " + (
        "runs on here" if found["state"] == "running" else f"is still here ({found['state']})")


def _check(name: str, address: str, options: Options, as_json: bool) -> int:
    from .. import migrate as migration
    from ..client.machine import Machine

    with Machine.attach(name) as machine:
        found = migration.check(machine, address, options)
    if as_json:
        print_json({"name": name, "target": address, "problems": found.problems, "notes": found.notes,
                    "there": {"name": found.name, "accel": found.accel}})
    else:
        for text in found.notes:
            click.echo(f"vmm: note: {text}", err=True)
        for text in found.problems:
            click.echo(text)
        click.echo(f"{name} cannot be migrated to {address}" if found.problems else
                   f"{name} can be migrated to {address}, as {found.name} with accel {found.accel}")
    return ExitCode.MIGRATION_FAILED if found.problems else ExitCode.OK


def _start_in_background(name: str, address: str, as_json: bool) -> None:
    """The same command again, without --background, on its own; until it has something to say."""
    from ..consumers.migration.background import begin_command

    migration_id = uuid.uuid4().hex[:8]
    arguments = [a for a in sys.argv[1:] if a not in ("--background", "--json", "--json-lines")]
    begin_command(name, python_module("vmm", *arguments, "--id", migration_id), migration_id)
    if as_json:
        print_json({"id": migration_id, "name": name, "target": address})
    else:
        click.echo(f"{migration_id}: {name} is being migrated to {address} (see vmm migrate status {name}, "
                   f"vmm migrate cancel {name})")


@migrate.command()
@click.argument("name", shell_complete=complete_ended)
@json_option
def status(name: str, as_json: bool) -> None:
    """Show the progress or outcome of the last migration of machine NAME, which left this host or came to it; with the
    figures of each round. It is kept with the machine's record."""
    import msgspec

    from ..consumers.migration.report import Report
    from ..consumers.migration.status import load_status

    found = load_status(name)
    if as_json:
        print_json(found)
        return
    print_status(msgspec.convert(found, Report))


@migrate.command("set")
@click.argument("name", shell_complete=complete_machines)
@click.option("--bandwidth", type=_RateOrNone(), help="Bandwidth limit, or none.")
@click.option("--downtime", type=Duration(), help="Maximum downtime of the guest.")
@click.option("--compress", "compression", type=click.Choice(["none", "zstd", "lz4"]),
              help="Compression of memory pages.")
@click.option("--channels", type=click.IntRange(1, 16), help="Number of parallel channels for memory pages.")
@click.option("--max-rounds", type=click.IntRange(1, 1000), help="Rounds after which the guest is stopped.")
@click.option("--timeout", type=Duration(), help="How long it may take until the hand-over, from its beginning.")
@click.option("--stall", type=Duration(), help="How long rounds may leave no less than one before them.")
@click.option("--on-timeout", type=_LATE, help="What comes then.")
@click.option("--converge/--no-converge", default=None, help="Throttle the vCPUs that dirty most, or no others.")
@json_option
def set_(name: str, as_json: bool, **wanted: Any) -> None:
    """Change how the migration of machine NAME goes on. The round under way ends for it, and the rest of its pages goes
    as is asked here."""
    if all(value is None for value in wanted.values()):
        raise VmmError("say what is to change: see vmm migrate set --help")
    _change(name, as_json, **wanted)


@migrate.command()
@click.argument("name", shell_complete=complete_machines)
@json_option
def postcopy(name: str, as_json: bool) -> None:
    """Have the migration of machine NAME go over to post-copy now. The guest resumes at the target, and the rest of its
    memory follows."""
    _change(name, as_json, postcopy=True)


def _change(name: str, as_json: bool, **changes: Any) -> None:
    from ..consumers.migration.control import change
    from ..consumers.migration.steering import Changes

    settings = change(name, Changes(**changes))
    if as_json:
        print_json({"name": name, "settings": settings})
    elif changes.get("postcopy"):
        click.echo(f"{name}: goes over to post-copy")
    else:
        click.echo(f"{name}: {', '.join(_text(key, value) for key, value in settings.items())}")


def _text(key: str, value: Any) -> str:
    """A setting as it is given on the command line."""
    if key in ("bandwidth", "timeout", "stall") and not value:
        text = "none"
    elif key == "bandwidth":
        text = f"{value / 1e6:,.3f} MB/s"
    elif key in ("timeout", "stall"):
        text = f"{value:g} s"
    elif key == "downtime":
        text = f"{value:g} ms"
    else:
        text = ("yes" if value else "no") if isinstance(value, bool) else str(value)
    return f"{'compress' if key == 'compression' else key.replace('_', '-')} {text}"


@migrate.command()
@click.argument("name", shell_complete=complete_machines)
@json_option
def cancel(name: str, as_json: bool) -> None:
    """Cancel the migration of machine NAME; it keeps running here."""
    from ..consumers.migration.background import cancel as end

    found = end(name)
    if as_json:
        print_json({"name": name, "status": found["status"]})
    else:
        click.echo(f"{name}: migration {found['status']}")
