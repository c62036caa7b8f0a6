"""``vmm snapshot``: create, list, verify, merge, restore, delete."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ipc.shm import PAGE_SIZE
from workers.accel import registry

from ..errors import ExitCode, VmmError, one_line
from .common import Duration, confirm, json_option, on_machine, print_json, progress_bar
from .completion import complete_snapshots
from .lines import JsonLines
from .program import run_arrived, trees_options

if TYPE_CHECKING:
    from ..client.machine import Machine
    from ..consumers.snapshot import Manifest
    from ..machine.rules import Trees

__all__ = ["snapshot"]

_directory = click.argument("directory", type=click.Path(path_type=Path))
_name = click.argument("snapshot_id", required=False, shell_complete=complete_snapshots)
_force = click.option("--force", is_flag=True, help="Do not ask.")


@click.group()
def snapshot() -> None:
    """Take and manage full and incremental snapshots of a machine."""


def _lines_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json-lines", "lines", is_flag=True,
                        help="Print progress and the result as they come, one JSON document a line.")(command)


@contextlib.contextmanager
def _shown(what: str, lines: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with rate and time left, on a terminal; or ``lines`` of JSON: bytes."""
    if lines:
        with JsonLines() as said:
            yield lambda done, total: said.put("progress", {"done": done * PAGE_SIZE, "total": total * PAGE_SIZE})
        return
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

    with progress_bar(what, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
                      TimeRemainingColumn()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done * PAGE_SIZE, total=total * PAGE_SIZE)


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {"id": manifest.id, "parent": manifest.parent, "damaged": None, "created": manifest.created,
            "machine": manifest.spec.name, "accelerator": manifest.accelerator, "vcpus": len(manifest.vcpus),
            "live": manifest.live,
            "compression": manifest.compression, "pages": manifest.pages,
            "zero_pages": sum(s.zero_pages for s in manifest.slots)}


def _say(document: dict[str, Any], text: str, as_json: bool, lines: bool) -> None:
    if lines:
        with JsonLines() as said:
            said.put("end", document)
    elif as_json:
        print_json(document)
    else:
        click.echo(text)


@snapshot.command()
@on_machine
@_directory
@click.option("--incremental", is_flag=True,
              help="Save only the pages dirtied since the last snapshot in DIRECTORY.")
@click.option("--live", is_flag=True, help="Keep the guest running; pause it only for the last dirty pages.")
@click.option("--compress", "compression", type=click.Choice(["none", "zstd"]), default="none", show_default=True,
              help="Compression of memory pages.")
@click.option("--working-set", type=Duration(), metavar="DURATION",
              help="Before that, record for so long which pages are written: a lazy restore brings these first.")
@json_option
@_lines_option
def create(machine: Machine, directory: Path, incremental: bool, live: bool, compression: Any,
           working_set: float | None, as_json: bool, lines: bool) -> None:
    """Take a snapshot of machine NAME into DIRECTORY, which holds one chain of snapshots."""
    from ..consumers import snapshot as snapshots

    with _shown("saving", lines) as progress:
        taken = snapshots.create(machine, directory, incremental=incremental, live=live, compression=compression,
                                 working_set=working_set or 0.0, progress=progress)
    _say(_summary(taken), f"{directory / taken.id}: {taken.pages:,} pages"
                + (f" since {taken.parent}" if taken.parent else ", full"), as_json, lines)


@snapshot.command("list")
@_directory
@json_option
def list_(directory: Path, as_json: bool) -> None:
    """List the snapshots in DIRECTORY, including those with a damaged manifest."""
    from ..consumers import snapshot as snapshots

    found = snapshots.survey(directory)
    if as_json:
        print_json([{"id": m.id, "damaged": m.reason} if isinstance(m, snapshots.Damaged) else _summary(m)
                    for m in found])
        return
    from rich.text import Text

    from ..tables import print_table, screen, table

    listed = table("id", "parent", "created", "machine", "accelerator", "compression", numbers=("vCPUs", "pages"))
    for m in found:
        if isinstance(m, snapshots.Damaged):
            listed.add_row(m.id, "damaged")
            continue
        listed.add_row(m.id, m.parent or "(full)", Text(one_line(m.created, 40)), m.spec.name, m.accelerator,
                       m.compression, str(len(m.vcpus)), f"{m.pages:,}")
    print_table(listed, screen())
    for m in found:
        if isinstance(m, snapshots.Damaged):
            click.echo(f"damaged: {m.reason}")


@snapshot.command()
@_directory
@_name
@json_option
@_lines_option
def verify(directory: Path, snapshot_id: str | None, as_json: bool, lines: bool) -> None:
    """Read the whole chain up to SNAPSHOT_ID (default: the newest) and check its checksums."""
    from ..consumers import snapshot as snapshots

    with _shown("verifying", lines) as progress:
        manifests = snapshots.verify(directory, snapshot_id, progress)
    _say(_summary(manifests[-1]), f"{directory / manifests[-1].id}: verified, {len(manifests)} in the chain", as_json,
         lines)


@snapshot.command()
@_directory
@_name
@_force
@json_option
@_lines_option
def merge(directory: Path, snapshot_id: str | None, force: bool, as_json: bool, lines: bool) -> None:
    """Make SNAPSHOT_ID (default: the newest) a full snapshot and delete those it was built on."""
    from ..consumers import snapshot as snapshots

    which = "the newest snapshot" if snapshot_id is None else f"snapshot {snapshot_id}"
    confirm(f"Make {which} of {directory} full, and delete those it was built on?", force=force)
    with _shown("merging", lines) as progress:
        merged = snapshots.merge(directory, snapshot_id, progress)
    _say(_summary(merged), f"{directory / merged.id}: {merged.pages:,} pages, full", as_json, lines)


@snapshot.command()
@_directory
@click.argument("snapshot_id", shell_complete=complete_snapshots)
@click.option("--fold", is_flag=True, help="Add its pages to the snapshots that build on it, if there are any.")
@_force
@json_option
@_lines_option
def delete(directory: Path, snapshot_id: str, fold: bool, force: bool, as_json: bool, lines: bool) -> None:
    """Delete SNAPSHOT_ID; refused while another snapshot builds on it, unless --fold is given."""
    from ..consumers import snapshot as snapshots

    confirm(f"Delete snapshot {snapshot_id} of {directory}?", force=force)
    with _shown("deleting", lines) as progress:
        snapshots.delete(directory, snapshot_id, fold=fold, progress=progress)
    _say({"id": snapshot_id, "done": "delete"}, f"{directory / snapshot_id}: deleted", as_json, lines)


@snapshot.command()
@_directory
@_name
@click.option("--name", help="Name of the machine (default: its name in the snapshot).")
@click.option("--accel", type=click.Choice(["auto", *registry.names("guest")]), default="auto", show_default=True,
              help="Accelerator to use.")
@click.option("--detach", is_flag=True, help="Leave the machine running in the background.")
@click.option("--lazy", is_flag=True, help="Let the guest run at once, and read its memory meanwhile.")
@click.option("--count", type=int, metavar="N",
              help="Launch N machines, NAME-0, NAME-1, ... (with --detach).")
@trees_options
@json_option
@_lines_option
def restore(directory: Path, snapshot_id: str | None, name: str | None, accel: str, detach: bool, lazy: bool,
            count: int | None, trees: Trees, as_json: bool, lines: bool) -> int:
    """Launch a machine from SNAPSHOT_ID (default: the newest) and run it until it ends.

    With --lazy and --detach this command ends when all of the memory is there.
    """
    from ..consumers import snapshot as snapshots

    if lines and not detach:
        raise VmmError("--json-lines needs --detach: it is for the restore, not for what the guest prints")
    if count is not None:
        if not detach:
            raise VmmError("--count needs --detach: only one machine can run in the foreground")
        with _shown("loading", lines) as progress:
            machines = snapshots.restore_many(directory, snapshot_id, count=count, machine_name=name, accel=accel,
                                              detach=True, trees=trees, lazy=lazy, progress=progress)
        for each in machines:
            if not (as_json or lines):
                run_arrived(each, True, False)
            each.detach()
        if as_json or lines:
            _say({"names": [each.name for each in machines]}, "", as_json, lines)
        return ExitCode.OK
    with _shown("loading", lines) as progress:
        machine = snapshots.restore(directory, snapshot_id, machine_name=name, accel=accel, detach=detach,
                                    start=detach, trees=trees, lazy=lazy, progress=progress)
    if lines:
        _say({"name": machine.name}, "", as_json, lines)
        machine.detach()
        return ExitCode.OK
    return run_arrived(machine, detach, as_json)
