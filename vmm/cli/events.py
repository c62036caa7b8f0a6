"""``vmm events``: what a machine did of late, and does, event by event."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..client.interrupts import Interrupts
from ..errors import ExitCode, VmmError
from ..outputs import Output, open_output
from .common import Duration, json_option
from .completion import complete_machines

if TYPE_CHECKING:
    from ..consumers.events.event import Event
    from ..consumers.events.stream import Stream

__all__ = ["events"]

_STEP = 0.1     # seconds between two looks


@click.command()
@click.argument("name", shell_complete=complete_machines)
@click.option("--since", type=Duration(), default="10s", show_default=True, help="How far back to begin.")
@click.option("--follow", "-f", is_flag=True, help="Keep printing until the machine has ended, or until Ctrl-C.")
@click.option("--time", "seconds", type=Duration(), default=None, help="With --follow: for so long at most.")
@click.option("--format", "kind", type=click.Choice(["text", "jsonl", "perfetto"]), default=None,
              help="As text, jsonl (a JSON document per line) or perfetto (a trace to open in ui.perfetto.dev).  "
                   "[default: text]")
@click.option("--output", type=click.Path(path_type=Path),
              help="File to write, which is there when all of it is.  [default: standard output]")
@json_option
def events(name: str, since: float, follow: bool, seconds: float | None, kind: str | None, output: Path | None,
           as_json: bool) -> int:
    """Show what a machine did of late, event by event: full rings and how long vCPUs stalled, reaps, resets, flushes,
    pauses, verbs of its clients, and what it told. Its processes always write that down; the newest 16,000 of the
    coordinator and 4,000 of each vCPU are kept.

    \b
    For example, why vCPUs stalled in the last second:
        vmm events NAME --since 1s
        vmm events NAME --since 1s --format perfetto --output stalls.json
    """
    from ..client.machine import Machine
    from ..consumers.events.stream import Stream

    if seconds is not None and not follow:
        raise VmmError("--time is for --follow")
    if as_json and kind not in (None, "jsonl"):
        raise VmmError(f"--json prints lines of JSON, but --format is {kind}: give one of the two")
    head, line, tail = _format("jsonl" if as_json else kind or "text", name)
    with contextlib.ExitStack() as stack:
        machine = stack.enter_context(Machine.attach(name, past=True))
        interrupts = stack.enter_context(Interrupts())      # from here on, what there is is kept
        write = _writer(stack.enter_context(open_output(output)) if output is not None else None)
        stream = stack.enter_context(contextlib.closing(Stream(machine, since)))
        write(head)
        for batch in _batches(stream, follow, seconds, interrupts):
            write("".join(map(line, batch)))
        write(tail())
    return 128 + interrupts.came if interrupts.came else ExitCode.OK


def _batches(stream: Stream, follow: bool, seconds: float | None, interrupts: Interrupts) -> Iterator[list[Event]]:
    """What there is, then what comes."""
    deadline = None if seconds is None else time.monotonic() + seconds
    yield stream.next(_STEP)
    while follow and not stream.ended and not interrupts.came:
        left = _STEP if deadline is None else deadline - time.monotonic()
        if left <= 0:
            return
        yield stream.next(min(_STEP, left))


def _writer(output: Output | None) -> Callable[[str], None]:
    """To this file, or to standard output."""
    def write(text: str) -> None:
        if output is not None:
            output.write(text.encode("utf-8", "replace"))
        else:
            click.echo(text, nl=False)
            sys.stdout.flush()

    return write


def _process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _format(kind: str, name: str) -> tuple[str, Callable[[Event], str], Callable[[], str]]:
    """The head, what makes a line of an event, what makes the tail."""
    from ..consumers.events.lines import json_line, text_line
    from ..consumers.events.perfetto import Tracks

    if kind == "perfetto":
        tracks = Tracks(name, _process_name)
        return tracks.begin(), tracks.add, tracks.end
    offset = time.time() - time.monotonic()
    make = json_line if kind == "jsonl" else text_line
    return "", lambda event: make(event, offset) + "\n", lambda: ""
