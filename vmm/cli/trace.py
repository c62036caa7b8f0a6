"""``vmm trace``: dirty traces, files of which page was dirtied when and by which vCPU.

(The option ``--trace`` of ``vmm launch`` is about trace *events*, lines of text on what the reaper does.)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ipc.shm import PAGE_SIZE

from ..errors import VmmError
from .common import Duration, json_option, on_machine, print_json, progress_bar

if TYPE_CHECKING:
    from ..client.machine import Machine

__all__ = ["trace"]


@click.group()
def trace() -> None:
    """Record and inspect dirty traces, for accel: replay. (For trace events, see vmm launch --trace.)"""


@trace.command("record")
@on_machine
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--time", "seconds", type=Duration(), default="10s", show_default=True,
              help="How long to record; shorter if the machine ends.")
@click.option("--interval", type=Duration(least=0.001), default="10ms", show_default=True,
              help="Longest time between two harvests of the rings: the resolution of the times in the trace.")
@json_option
def trace_record(machine: Machine, file: Path, seconds: float, interval: float, as_json: bool) -> int:
    """Record into FILE which pages each vCPU dirties, in order and with times. Ctrl-C stops early and keeps what
    was recorded."""
    from ..client.interrupts import Interrupts
    from ..consumers.trace import record

    with Interrupts() as interrupts, progress_bar() as bar:
        task = bar.add_task("recording", total=1.0)
        end = record(machine, file, seconds, interval, lambda part, entries: bar.update(task, completed=part),
                     interrupts.wait)
    size = file.stat().st_size if file.is_file() else None      # None: it went into a pipe
    if as_json:
        print_json({"name": machine.name, "file": str(file), "bytes": size, "entries": end.entries,
                    "seconds": end.seconds, "lost": end.lost, "reason": end.reason, "complete": end.complete})
    else:
        click.echo(f"{file}: {end.entries:,} entries in {end.seconds:.2f} s"
                   + (f", {size:,} bytes" if size is not None else "")
                   + (f"; incomplete: {end.reason}" if end.reason else ""))
    if end.lost:
        raise VmmError(f"{file} is incomplete: {end.lost:,} entries came faster than they could be written")
    if interrupts.came:
        return 128 + interrupts.came
    if end.reason:
        raise VmmError(f"{file} is incomplete: {end.reason}")
    return 0


@trace.command("info")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def trace_info(file: Path, as_json: bool) -> None:
    """Show the contents of the dirty trace FILE and whether it is complete."""
    found = _summary(file)
    if as_json:
        print_json(found)
        return
    click.echo(f"{file}: recorded {found['recorded']} from '{found['machine']}' ({found['accelerator']}), "
               f"{found['seconds']:.2f} s, {found['bytes']:,} bytes, "
               f"{found['bytes_per_entry']:.2f} per entry")
    for slot in found["slots"]:
        click.echo(f"slot {slot['id']} at {slot['gpa']:#x}: {slot['size'] // PAGE_SIZE:,} pages, "
                   f"{slot['dirtied']:,} of them dirtied")
    for vcpu in found["vcpus"]:
        name = f" ({vcpu['thread']})" if vcpu["thread"] else ""
        click.echo(f"vCPU {vcpu['index']}{name}: {vcpu['entries']:,} entries, {vcpu['pages']:,} distinct pages")
    if not found["complete"]:
        click.echo(f"incomplete: {found['reason'] or str(found['lost']) + ' entries lost'}")


class _Distinct:
    """How many different values there were. Memory grows with these, not with all that were seen."""

    def __init__(self) -> None:
        import numpy as np

        self._np = np
        self._known = np.zeros(0, np.uint64)
        self._fresh: list[Any] = []
        self._waiting = 0

    def add(self, values: Any) -> None:
        self._fresh.append(self._np.unique(values))
        self._waiting += len(self._fresh[-1])
        if self._waiting > max(1 << 20, len(self._known)):
            self.values()

    def values(self) -> Any:
        self._known = self._np.unique(self._np.concatenate([self._known, *self._fresh]))
        self._fresh.clear()
        self._waiting = 0
        return self._known


def _summary(file: Path) -> dict[str, Any]:
    import msgspec
    import numpy as np

    from ..errors import one_line
    from ..machine.tracefile import TraceReader, unpack

    with TraceReader(file) as reader:
        header = reader.header
        records = np.zeros(header.vcpus, np.int64)
        entries = np.zeros(header.vcpus, np.int64)
        distinct = [_Distinct() for _ in range(header.vcpus)]
        for found, packed in reader.blocks():
            owner = np.repeat(found["vcpu"], found["count"])
            records += np.bincount(found["vcpu"], minlength=header.vcpus)
            entries += np.bincount(owner, minlength=header.vcpus)
            for vcpu in np.unique(owner).tolist():
                distinct[vcpu].add(packed[owner == vcpu])
        end = reader.end
        assert end is not None
    everywhere = _Distinct()
    for each in distinct:
        everywhere.add(each.values())
    slots, _ = unpack(everywhere.values())
    size = file.stat().st_size
    words = {name: one_line(getattr(header, name), 60) for name in ("machine", "accelerator", "recorded")}
    threads = [one_line(name, 60) for name in header.threads[:header.vcpus]]
    threads += [""] * (header.vcpus - len(threads))
    return {
        "file": str(file), **msgspec.to_builtins(header), **words, "threads": threads, **msgspec.to_builtins(end),
        "reason": one_line(end.reason), "complete": end.complete,
        "bytes": size, "bytes_per_entry": size / max(1, end.entries),
        "slots": [{**msgspec.to_builtins(s), "dirtied": int((slots == s.id).sum())} for s in header.slots],
        "vcpus": [{"index": i, "thread": threads[i], "entries": int(entries[i]), "records": int(records[i]),
                   "pages": len(d.values())} for i, d in enumerate(distinct)],
    }
