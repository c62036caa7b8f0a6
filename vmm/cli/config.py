"""``vmm config``: configuration files checked, explained, and begun."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import json_option, print_json
from .completion import complete_configs, complete_keys, complete_settings, complete_templates

if TYPE_CHECKING:
    from ..client.schema import KeyDoc
    from ..machine.spec import MachineSpec

__all__ = ["config"]

#: A file with none of these keys is that of a sweep.
_OF_MACHINES = frozenset({"memory", "guest", "replay", "machines"})


@click.group()
def config() -> None:
    """Check, explain and begin configuration files."""


@config.command()
@click.argument("file", type=click.Path(allow_dash=True), shell_complete=complete_configs)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", shell_complete=complete_settings,
              help="Override a key, as for vmm launch.")
@json_option
def check(file: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check FILE as vmm launch would, and start nothing. It may be the name of an example; - reads standard input. Also
    warns of choices that work badly on this host. The file of a sweep is checked as vmm stress would. Exit status 2: it
    cannot be launched."""
    from ..client.advice import advice
    from ..client.config import configs_of
    from ..client.plan import plan
    from ..client.samples import find_config
    from ..client.yamlfile import read_yaml

    path = find_config(file)
    document, origins = read_yaml(path)     # once: it may be a pipe
    if not overrides and _OF_MACHINES.isdisjoint(document):
        from ..lab.stress.sweep import sweep_of

        points = len(sweep_of(document, origins).points())
        print_json({"file": file, "points": points}) if as_json else click.echo(f"{file}: a sweep of {points:,} points")
        return
    found = [(each, plan(each)) for each in configs_of(path, document, origins, overrides)]
    warnings = {each.name: advice(each, spec) for each, spec in found}
    if as_json:
        print_json({"file": file, "machines": [
            {"name": spec.name, "vcpus": spec.vcpus, "accel": spec.accel, "ring_entries": spec.ring_entries,
             "memory": sum(slot.size for slot in spec.slots), "warnings": [each.text for each in warnings[spec.name]]}
            for _, spec in found]})
        return
    for _, spec in found:
        for text, excerpt in warnings[spec.name]:
            click.echo(f"vmm: warning: {text}", err=True)
            if excerpt:
                click.echo(excerpt, err=True)
        click.echo(f"{spec.name}: {_summary(spec)}")


def _summary(spec: MachineSpec) -> str:
    from ..tables import size_text

    what = spec.program.path if spec.program is not None else spec.cmdline or Path(spec.image).name or "replay"
    vcpus = spec.vcpus if spec.program is None else spec.vcpus - 1
    unit = "vCPU" if spec.program is None else "thread"
    rings = f", rings of {spec.ring_entries} entries" if spec.ring_entries else ", no rings"
    return (f"can be launched: {what} on {vcpus} {unit}{'s' if vcpus > 1 else ''} ({spec.accel}), "
            f"{size_text(sum(slot.size for slot in spec.slots))}{rings}")


@config.command()
@click.argument("key", required=False, shell_complete=complete_keys)
@json_option
def explain(key: str | None, as_json: bool) -> None:
    """Say what KEY means, what may be written, and its default. Without KEY, list all keys."""
    from ..client.schema import find_key, key_docs

    if key is None:
        docs = list(key_docs().values())
        if as_json:
            print_json([doc.as_dict() for doc in docs])
        else:
            _list(docs)
        return
    doc = find_key(key)
    if as_json:
        print_json(doc.as_dict())
        return
    from ..client.templates import value_text

    click.echo(f"{doc.name}: {doc.kind}" + (" (required)" if doc.required else ""))
    _wrapped(doc.description)
    if doc.default is not None:
        click.echo(f"    Default: {value_text(doc.title, doc.default) or 'empty'}")
    if doc.examples:
        click.echo(f"    For example: {', '.join(doc.examples)}")
    if doc.below:
        click.echo()
        _list([key_docs()[each] for each in doc.below])


def _wrapped(text: str) -> None:
    import shutil
    import textwrap

    width = max(40, min(100, shutil.get_terminal_size((100, 24)).columns))
    for line in textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    "):
        click.echo(line)


def _list(docs: list[KeyDoc]) -> None:
    from rich.markup import escape

    from ..tables import print_table, screen, table

    shown = table("key", texts=("what may be written", "what it means"))
    for doc in docs:
        shown.add_row(doc.name, escape(doc.kind), escape(doc.description))
    print_table(shown, screen())


@config.command()
@click.argument("name", metavar="TEMPLATE", required=False, shell_complete=complete_templates)
@click.option("--output", type=click.Path(path_type=Path), help="Write to this file, which must not exist.")
@json_option
def new(name: str | None, output: Path | None, as_json: bool) -> None:
    """Print a commented configuration to begin with. TEMPLATE is guest, image, program, replay or machines; without it,
    the templates are listed."""
    from ..client.templates import TEMPLATES, template

    if name is None:
        if as_json:
            print_json({each: title for each, (title, *_) in TEMPLATES.items()})
        for each, (title, *_) in () if as_json else TEMPLATES.items():
            click.echo(f"{each:<10} {title}")
        return
    text = template(name)
    said: dict[str, Any] = {"template": name, "text": text}
    if output is not None:
        _create(output, text)
        said["output"] = str(output)
    if as_json:
        print_json(said)
    elif output is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"{output}: vmm config check {output}, vmm launch {output}")


def _create(path: Path, text: str) -> None:
    """All of it, or nothing. Raises VmmError where something is there already."""
    from ..errors import VmmError

    try:
        file = path.open("x", encoding="utf-8")
        try:
            with file:
                file.write(text)
        except BaseException:
            path.unlink()
            raise
    except FileExistsError:
        raise VmmError(f"{path}: is there already") from None
    except (OSError, ValueError) as exc:
        raise VmmError(f"{path}: cannot be written: {getattr(exc, 'strerror', None) or exc}") from None
