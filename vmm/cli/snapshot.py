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
from .common import json_option, on_machine, print_json, progress_bar
from .program import run_arrived, trees_options

if TYPE_CHECKING:
    from ..client.machine import Machine
    from ..consumers.snapshot import Manifest
    from ..machine.rules import Trees

__all__ = ["snapshot"]

_directory = click.argument("directory", type=click.Path(path_type=Path))
_name = click.argument("snapshot_id", required=False)


@click.group()
def snapshot() -> None:
    """Take and manage full and incremental snapshots of a machine."""


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with rate and time left, on a terminal."""
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


def _say(manifest: Manifest, text: str, as_json: bool) -> None:
    if as_json:
        print_json(_summary(manifest))
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
@json_option
def create(machine: Machine, directory: Path, incremental: bool, live: bool, compression: Any,
           as_json: bool) -> None:
    """Take a snapshot of machine NAME into DIRECTORY, which holds one chain of snapshots."""
    from ..consumers import snapshot as snapshots

    with _bar("saving") as progress:
        taken = snapshots.create(machine, directory, incremental=incremental, live=live, compression=compression,
                                 progress=progress)
    _say(taken, f"{directory / taken.id}: {taken.pages:,} pages"
                + (f" since {taken.parent}" if taken.parent else ", full"), as_json)


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
def verify(directory: Path, snapshot_id: str | None, as_json: bool) -> None:
    """Read the whole chain up to SNAPSHOT_ID (default: the newest) and check its checksums."""
    from ..consumers import snapshot as snapshots

    with _bar("verifying") as progress:
        manifests = snapshots.verify(directory, snapshot_id, progress)
    _say(manifests[-1], f"{directory / manifests[-1].id}: verified, {len(manifests)} in the chain", as_json)


@snapshot.command()
@_directory
@_name
@json_option
def merge(directory: Path, snapshot_id: str | None, as_json: bool) -> None:
    """Make SNAPSHOT_ID (default: the newest) a full snapshot and delete those it was built on."""
    from ..consumers import snapshot as snapshots

    with _bar("merging") as progress:
        merged = snapshots.merge(directory, snapshot_id, progress)
    _say(merged, f"{directory / merged.id}: {merged.pages:,} pages, full", as_json)


@snapshot.command()
@_directory
@click.argument("snapshot_id")
@click.option("--fold", is_flag=True, help="Add its pages to the snapshots that build on it, if there are any.")
@json_option
def delete(directory: Path, snapshot_id: str, fold: bool, as_json: bool) -> None:
    """Delete SNAPSHOT_ID; refused while another snapshot builds on it, unless --fold is given."""
    from ..consumers import snapshot as snapshots

    with _bar("deleting") as progress:
        snapshots.delete(directory, snapshot_id, fold=fold, progress=progress)
    if as_json:
        print_json({"id": snapshot_id, "done": "delete"})
    else:
        click.echo(f"{directory / snapshot_id}: deleted")


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
def restore(directory: Path, snapshot_id: str | None, name: str | None, accel: str, detach: bool, lazy: bool,
            count: int | None, trees: Trees, as_json: bool) -> int:
    """Launch a machine from SNAPSHOT_ID (default: the newest) and run it until it ends.

    With --lazy and --detach this command ends when all of the memory is there.
    """
    from ..consumers import snapshot as snapshots

    if count is not None:
        if not detach:
            raise VmmError("--count needs --detach: only one machine can run in the foreground")
        with _bar("loading") as progress:
            machines = snapshots.restore_many(directory, snapshot_id, count=count, machine_name=name, accel=accel,
                                              detach=True, trees=trees, lazy=lazy, progress=progress)
        for each in machines:
            if not as_json:
                run_arrived(each, True, False)
            each.detach()
        if as_json:
            print_json({"names": [each.name for each in machines]})
        return ExitCode.OK
    with _bar("loading") as progress:
        machine = snapshots.restore(directory, snapshot_id, machine_name=name, accel=accel, detach=detach,
                                    start=detach, trees=trees, lazy=lazy, progress=progress)
    return run_arrived(machine, detach, as_json)
