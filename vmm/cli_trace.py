"""``vmm trace``: dirty traces, files of which page was dirtied when and by which vCPU.

(The option ``--trace`` of ``vmm launch`` is about trace *events*, lines of text on what the reaper does.)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_common import Duration, json_option, on_machine, print_json
from .errors import VmmError

if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["trace"]


@click.group()
def trace() -> None:
    """Record dirty traces, for accel: replay. (Not trace events: those are vmm launch --trace.)"""


@trace.command("record")
@on_machine
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--time", "seconds", type=Duration(), default="10s", show_default=True,
              help="How long to record; less when the machine ends.")
@click.option("--interval", type=Duration(), default="10ms", show_default=True,
              help="Harvest the rings at least so often: how exact the times in the trace are.")
@json_option
def trace_record(machine: Machine, file: Path, seconds: float, interval: float, as_json: bool) -> None:
    """Record into FILE which page each vCPU dirties, in its order, with times."""
    from rich.console import Console
    from rich.progress import Progress

    from .record import record

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("recording", total=1.0)
        end = record(machine, file, seconds, interval, lambda part, entries: bar.update(task, completed=part))
    if as_json:
        print_json({"name": machine.name, "file": str(file), "bytes": file.stat().st_size, "entries": end.entries,
                    "seconds": end.seconds, "lost": end.lost, "reason": end.reason, "complete": end.complete})
    else:
        click.echo(f"{file}: {end.entries:,} entries in {end.seconds:.2f} s, {file.stat().st_size:,} bytes")
    if end.lost:
        raise VmmError(f"{file}: is incomplete: {end.lost:,} entries came faster than they could be written")
    if end.reason:
        raise VmmError(f"{file}: is incomplete: {end.reason}")


@trace.command("info")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def trace_info(file: Path, as_json: bool) -> None:
    """Show what is in the dirty trace FILE, and whether it is whole."""
    found = _summary(file)
    if as_json:
        print_json(found)
        return
    click.echo(f"{file}: recorded {found['recorded']} of '{found['machine']}' ({found['accelerator']}), "
               f"{found['seconds']:.2f} s, {found['bytes']:,} bytes, "
               f"{found['bytes_per_entry']:.2f} an entry")
    for slot in found["slots"]:
        click.echo(f"slot {slot['id']} at {slot['gpa']:#x}: {slot['size'] // 4096:,} pages, "
                   f"{slot['dirtied']:,} of them dirtied")
    for vcpu in found["vcpus"]:
        click.echo(f"vCPU {vcpu['index']}: {vcpu['entries']:,} entries, {vcpu['pages']:,} distinct pages")
    if not found["complete"]:
        click.echo(f"incomplete: {found['reason'] or str(found['lost']) + ' entries lost'}")


def _summary(file: Path) -> dict[str, Any]:
    import msgspec
    import numpy as np

    from .tracefile import TraceReader, unpack

    with TraceReader(file) as reader:
        parts = reader.vcpus()
        header, end = reader.header, reader.end
        assert end is not None
    distinct = [np.unique(p.entries) for p in parts]
    slots, _ = unpack(np.unique(np.concatenate(distinct)))
    size = file.stat().st_size
    return {
        "file": str(file), **msgspec.to_builtins(header), **msgspec.to_builtins(end), "complete": end.complete,
        "bytes": size, "bytes_per_entry": size / max(1, end.entries),
        "slots": [{**msgspec.to_builtins(s), "dirtied": int((slots == s.id).sum())} for s in header.slots],
        "vcpus": [{"index": i, "entries": len(p.entries), "records": len(p.times), "pages": len(d)}
                  for i, (p, d) in enumerate(zip(parts, distinct, strict=True))],
    }
