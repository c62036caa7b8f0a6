"""``vmm trace``: dirty traces, files of which page was dirtied when and by which vCPU.

(The option ``--trace`` of ``vmm launch`` is about trace *events*, lines of text on what the reaper does.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ipc.shm import PAGE_SIZE

from ..errors import VmmError
from .common import Duration, json_option, print_json, recording, text_aside
from .completion import complete_recorded

if TYPE_CHECKING:
    from ..machine.tracefile import TraceEnd

__all__ = ["trace"]


@click.group()
def trace() -> None:
    """Record and inspect dirty traces, for accel: replay. (For trace events, see vmm launch --trace.)"""


@trace.command("record")
@click.argument("words", nargs=-1, metavar="[NAME] FILE", shell_complete=complete_recorded)
@click.option("--pid", "target", help="Record a process of this host instead of a machine: its id, a VM's name, or the "
                                      "path of a VM's QMP socket (see vmm watch).")
@click.option("--ram", "what", flag_value="ram", help="With --pid: only the memory of the VM that it runs.")
@click.option("--all", "what", flag_value="all", help="With --pid: all that it can write.")
@click.option("--time", "seconds", type=Duration(), default="10s", show_default=True,
              help="How long to record; shorter if the machine ends.")
@click.option("--interval", type=Duration(least=0.001), default="10ms", show_default=True,
              help="Longest time between two harvests of the rings: the resolution of the times in the trace.")
@json_option
def trace_record(words: tuple[str, ...], target: str | None, what: str | None, seconds: float, interval: float,
                 as_json: bool) -> int:
    """Record into FILE which pages each vCPU of the machine NAME dirties, in order and with times. Ctrl-C stops early
    and keeps what was recorded. With --pid, the pages that a process of this host dirties, which is no machine: in
    which interval, but not by whom, nor in which order within it."""
    if len(words) != (1 if target else 2):
        raise VmmError("vmm trace record takes " + ("a FILE, and no NAME, with --pid" if target else
                                                    "NAME and FILE, or --pid PID and FILE"))
    if what and not target:
        raise VmmError(f"--{what}: is for --pid")
    file = Path(words[-1])
    aside = text_aside(file, as_json)
    with recording() as (interrupts, progress):
        name, end = (_of_process(target, what, file, seconds, interval, progress, interrupts.wait) if target else
                     _of_machine(words[0], file, seconds, interval, progress, interrupts.wait))
    size = file.stat().st_size if file.is_file() else None      # None: it went into a pipe
    if as_json:
        print_json({"name": name, "file": str(file), "bytes": size, "entries": end.entries,
                    "seconds": end.seconds, "lost": end.lost, "reason": end.reason, "complete": end.complete})
    else:
        click.echo(f"{file}: {end.entries:,} entries in {end.seconds:.2f} s"
                   + (f", {size:,} bytes" if size is not None else "")
                   + (f"; incomplete: {end.reason}" if end.reason else ""), err=aside)
    if end.lost:
        raise VmmError(f"{file} is incomplete: {end.lost:,} entries came faster than they could be written")
    if interrupts.came:
        return 128 + interrupts.came
    if end.reason:
        raise VmmError(f"{file} is incomplete: {end.reason}")
    return 0


def _of_machine(name: str, file: Path, seconds: float, interval: float, progress: Callable[[float, int], None],
                wait: Callable[[float], bool]) -> tuple[str, TraceEnd]:
    from ..client.machine import Machine
    from ..consumers.trace import record

    with Machine.attach(name) as machine:
        return machine.name, record(machine, file, seconds, interval, progress, wait)


def _of_process(target: str, what: str | None, file: Path, seconds: float, interval: float,
                progress: Callable[[float, int], None], wait: Callable[[float], bool]) -> tuple[str, TraceEnd]:
    from ..consumers.watch.tracing import record_process
    from .watch import LEAST_INTERVAL, watching

    if interval < LEAST_INTERVAL:
        raise VmmError(f"--interval: {interval * 1000:g} ms is too short: must be at least "
                       f"{LEAST_INTERVAL * 1000:g} ms with --pid")
    with watching(target, what) as (found, source, _):
        return found.name, record_process(source, found.name, file, seconds, interval, progress, wait)


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
    if found["lacking"]:
        click.echo(f"recorded from outside a process: {found['lacking']}")
    for slot in found["slots"]:
        click.echo(f"slot {slot['id']} at {slot['gpa']:#x}: {slot['size'] // PAGE_SIZE:,} pages, "
                   f"{slot['dirtied']:,} of them dirtied" + (f" ({slot['mapping']})" if slot["mapping"] else ""))
    for vcpu in found["vcpus"]:
        name = f" ({vcpu['thread']})" if vcpu["thread"] else ""
        click.echo(f"vCPU {vcpu['index']}{name}: {vcpu['entries']:,} entries, {vcpu['pages']:,} distinct pages")
    if not found["complete"]:
        click.echo(f"incomplete: {found['reason'] or str(found['lost']) + ' entries lost'}")


def _summary(file: Path) -> dict[str, Any]:
    import msgspec
    import numpy as np

    from ..distinct import Distinct
    from ..errors import one_line
    from ..machine.tracefile import TraceReader, unpack

    with TraceReader(file) as reader:
        header = reader.header
        records = np.zeros(header.vcpus, np.int64)
        entries = np.zeros(header.vcpus, np.int64)
        distinct = [Distinct(np.uint64) for _ in range(header.vcpus)]
        for found, packed in reader.blocks():
            owner = np.repeat(found["vcpu"], found["count"])
            records += np.bincount(found["vcpu"], minlength=header.vcpus)
            entries += np.bincount(owner, minlength=header.vcpus)
            for vcpu in np.unique(owner).tolist():
                distinct[vcpu].add(packed[owner == vcpu])
        end = reader.end
        assert end is not None
    everywhere = Distinct(np.uint64)
    for each in distinct:
        everywhere.add(each.values())
    slots, _ = unpack(everywhere.values())
    size = file.stat().st_size
    words = {name: one_line(getattr(header, name), 60) for name in ("machine", "accelerator", "recorded")}
    threads = [one_line(name, 60) for name in header.threads[:header.vcpus]]
    mappings = [one_line(name, 90) for name in header.mappings[:len(header.slots)]]
    mappings += [""] * (len(header.slots) - len(mappings))
    threads += [""] * (header.vcpus - len(threads))
    return {
        "file": str(file), **msgspec.to_builtins(header), **words, "threads": threads, "mappings": mappings,
        **msgspec.to_builtins(end),
        "reason": one_line(end.reason), "complete": end.complete,
        "bytes": size, "bytes_per_entry": size / max(1, end.entries),
        "lacking": header.lacking,
        "slots": [{**msgspec.to_builtins(s), "dirtied": int((slots == s.id).sum()), "mapping": m}
                  for s, m in zip(header.slots, mappings, strict=True)],
        "vcpus": [{"index": i, "thread": threads[i], "entries": int(entries[i]), "records": int(records[i]),
                   "pages": len(d.values())} for i, d in enumerate(distinct)],
    }
