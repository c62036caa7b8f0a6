"""``vmm completion``, and what shells are told of names: machines, slots, clients, snapshots, keys. Whatever goes wrong
here, nothing is offered: a shell shows no errors in the middle of a line."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["complete_clients", "complete_configs", "complete_ended", "complete_keys", "complete_machines",
           "complete_machines_of_file", "complete_recorded", "complete_runs", "complete_settings", "complete_slots",
           "complete_snapshots", "complete_templates", "completion"]

_Complete = Callable[[click.Context, click.Parameter, str], "list[CompletionItem]"]


def _completes(find: Callable[[click.Context], Iterable[tuple[str, str]]]) -> _Complete:
    """``find`` gives (value, what it is), in the order in which they are shown."""
    @functools.wraps(find)
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        with contextlib.suppress(Exception):
            return [CompletionItem(value, help=what or None) for value, what in find(ctx)
                    if value.startswith(incomplete)]
        return []

    return complete


def _machine(ctx: click.Context) -> Any:
    """The machine that has been named."""
    from ..client.machine import Machine

    return Machine.attach(ctx.params["name"])


@_completes
def complete_machines(ctx: click.Context) -> Iterable[tuple[str, str]]:
    """Running machines."""
    from ..machine.runtime import machine_names

    return [(name, "running") for name in machine_names()]


@_completes
def complete_ended(ctx: click.Context) -> Iterable[tuple[str, str]]:
    """Running machines, and those that have ended and left something."""
    from ..machine.records import ended_names
    from ..machine.runtime import machine_names

    return [*((name, "running") for name in machine_names()), *((name, "ended") for name in ended_names())]


@_completes
def complete_slots(ctx: click.Context) -> Iterable[tuple[str, str]]:
    """Memory slots of the machine."""
    from ..tables import size_text

    with _machine(ctx) as machine:
        return [(str(slot["id"]), f"{size_text(slot['size'])} at {slot['gpa']:#x}")
                for slot in machine.status()["slots"]]


@_completes
def complete_clients(ctx: click.Context) -> Iterable[tuple[str, str]]:
    """Clients of the machine's dirty log."""
    with _machine(ctx) as machine:
        return [(name, "") for name in machine.status()["clients"]]


@_completes
def complete_snapshots(ctx: click.Context) -> Iterable[tuple[str, str]]:
    """Snapshots in the directory, the newest first."""
    from ..consumers import snapshot as snapshots

    found = snapshots.survey(ctx.params["directory"])
    return [(each.id, "damaged" if isinstance(each, snapshots.Damaged) else f"{each.created} of {each.spec.name}")
            for each in reversed(found)]


@_completes
def complete_keys(ctx: click.Context) -> Iterable[tuple[str, str]]:
    """Keys of a configuration."""
    from ..client.schema import key_docs

    return [(doc.name, doc.description.partition(". ")[0]) for doc in key_docs().values()]


@_completes
def _examples(ctx: click.Context) -> Iterable[tuple[str, str]]:
    """Example configurations."""
    from ..client.samples import sample_names

    return [(name, "example") for name in sample_names()]


def _or_files(names: _Complete) -> _Complete:
    """And files, which the shell finds."""
    @functools.wraps(names)
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [*names(ctx, param, incomplete), CompletionItem(incomplete, type="file")]

    return complete


complete_runs = _or_files(complete_ended)           # of vmm report
complete_recorded = _or_files(complete_machines)    # of vmm trace record
complete_configs = _or_files(_examples)


@_completes
def complete_settings(ctx: click.Context) -> Iterable[tuple[str, str]]:
    """For ``--set KEY=VALUE``: keys that a value can be given for, with what they have by default, or an example."""
    from ..client.schema import key_docs

    for doc in key_docs().values():
        if not doc.below:
            values = [str(doc.default).lower()] if doc.default is not None else list(doc.examples[:1])
            for value in ("", *values):
                yield f"{doc.name.replace('.N', '.0')}={value}", doc.description.partition(". ")[0]


@_completes
def complete_templates(ctx: click.Context) -> Iterable[tuple[str, str]]:
    """Of ``vmm config new``."""
    from ..client.templates import TEMPLATES

    return [(name, title) for name, (title, *_) in TEMPLATES.items()]


@_completes
def complete_machines_of_file(ctx: click.Context) -> Iterable[tuple[str, str]]:
    """Machines of the configuration that has been named."""
    from ..client.config import load_configs
    from ..client.samples import find_config

    # Behind an option whose value is not there yet, arguments are not parsed.
    file = find_config(ctx.params.get("config") or ctx.args[0])
    if str(file) == "-" or not file.is_file():      # what comes from a terminal or a pipe is for the command itself
        return []
    return [(config.name, "") for config in load_configs(file)]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a script that has SHELL complete vmm. It completes verbs, options, and the names of machines, slots,
    clients and snapshots.

    \b
    bash:  eval "$(vmm completion bash)"        in ~/.bashrc
    zsh:   eval "$(vmm completion zsh)"         in ~/.zshrc, after compinit
    fish:  vmm completion fish | source         in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, "vmm", "_VMM_COMPLETE").source(), nl=False)
