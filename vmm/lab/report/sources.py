"""Which kind of result something is, and its sections: files are known by what is in them, not by their names."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...consumers import workingset
from ...consumers.events.event import Event
from ...consumers.events.lines import read_json_lines
from ...errors import ExitCode, VmmError, one_line
from ...inputs import input_name, open_input, read_input
from ...machine import records
from ...machine.names import is_machine_name
from . import comparison, events, machine, migration, prediction, sweep
from . import workingset as recording
from .document import Section, seconds_text

__all__ = ["sections"]

_DOCUMENT_MAX = 256 << 20       # bytes
_SINCE = 10.0                   # seconds of a running machine's past

_KINDS = ("a machine's report (vmm status --json), a migration's (vmm migrate --report), a prediction (vmm predict "
          "--json), a comparison or a sweep (their folders), a recording (vmm working-set), or events (vmm events "
          "--format jsonl)")


def sections(source: str) -> list[Section]:
    """Of a file, a folder, or a machine that runs or has ended. Raises VmmError."""
    path = Path(source)
    if os.path.isdir(path):
        return [_of_folder(path)]
    if source != "-" and not os.path.exists(path) and is_machine_name(source):
        try:
            return _of_machine(source)
        except VmmError as exc:
            if exc.exit_code is not ExitCode.NO_MACHINE:
                raise
            raise VmmError(f"{exc}, nor a file or folder {source}", ExitCode.NO_MACHINE) from None
    if source != "-" and os.path.isfile(path):      # what is in a pipe can be read once
        with open_input(path) as file:
            head = file.read(4)
        if head.startswith(b"PK"):
            with _told(f"{input_name(path)}: is no recording of vmm working-set"):
                return [recording.section(workingset.load(path), path.name)]
        if not head:
            return [events.section([], path.stem)]
    return [_of_text(path)]


@contextlib.contextmanager
def _told(text: str) -> Iterator[None]:
    """Around what makes sections: of a document that is none, or damaged, or of another version. Raises VmmError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as exc:
        raise VmmError(f"{text} ({type(exc).__name__}: {one_line(str(exc))})") from None


def _of_folder(path: Path) -> Section:
    from ..stress.report import summaries
    from ..stress.sweep import load_results

    if os.path.exists(path / "results.json"):
        return _of_text(path / "results.json")
    results = load_results(path)
    if not results:
        raise VmmError(f"{path}: there are no results in it (of vmm stress or vmm compare)")
    # It was interrupted before it could write more.
    with _told(f"{path}: has no results of this version"):
        rows = json.loads(json.dumps([{**row, "point": asdict(row["point"])} for row in summaries(results)]))
        return sweep.section({
            "summary": rows, "complete": False, "model": [], "host": None,
            "lost_pages": sum(r.lost for r in results), "surplus_pages": sum(r.surplus for r in results)})


def _of_text(path: Path) -> Section:
    name = input_name(path)
    data = read_input(path, _DOCUMENT_MAX, pipes=True)
    with _told(f"{name}: is not {_KINDS}"):
        document = _parsed(data)
        if isinstance(document, dict) and "event" in document and "source" in document:     # a single one
            document = None
        if document is not None:
            return _of_document(document)
        lines = data.splitlines() or [b""]
        last = _parsed(lines[-1])
        if isinstance(last, dict) and last.get("event") == "end":       # vmm migrate --json-lines
            return migration.section(last)
        if isinstance(_parsed(lines[0]), dict) and "source" in _parsed(lines[0]):
            return events.section(read_json_lines(data, name), path.stem)
        raise ValueError("it is neither")


def _parsed(data: bytes) -> Any:
    """None: it is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _of_document(document: Any) -> Section:
    """Raises LookupError, TypeError, ValueError, AttributeError, ArithmeticError for one that is none of these, or is
    damaged."""
    if "grid" in document:
        return prediction.section(document)
    if "summary" in document and "sweep" in document:
        return sweep.section(document)
    if "rows" in document:
        return comparison.section(document["rows"], document["settings"])
    if "points" in document and "settings" in document:
        return comparison.section(comparison.rows_of(document), document["settings"])
    if "rounds" in document and "direction" in document:
        return migration.section(document)
    if "state" in document and "name" in document:
        return machine.section(document)
    raise ValueError("it has none of their keys")


def _of_machine(name: str) -> list[Section]:
    """Raises VmmError where there is none of that name, and was none."""
    from ...client.machine import Machine
    from ...consumers.migration.status import load_status

    report, seen, window = records.outcome(name), list[Event](), (0.0, 0.0)
    if report is None:
        with Machine.attach(name, past=True) as running:
            report = running.status()
            seen, window = _past(running, report["elapsed_s"])
    with _told(f"machine '{name}': its report is of another version"):
        found = [machine.section(report)]
        if seen:
            found.append(events.section(seen, f"the last {seconds_text(window[1] - window[0])}", window))
    try:
        with _told(f"machine '{name}': the report of its migration is of another version"):
            found.append(migration.section(load_status(name)))
    except VmmError as exc:
        if exc.exit_code not in (ExitCode.NO_MACHINE, ExitCode.BAD_INPUT):
            raise       # else it was not migrated
    return found


def _past(running: Any, age: float) -> tuple[list[Event], tuple[float, float]]:
    """Events of late, and the time in which they were, of the clock that they have. ``age``: the machine's, seconds."""
    from ...consumers.events.stream import Stream

    since = time.monotonic() - min(_SINCE, age)
    stream = Stream(running, _SINCE)
    try:
        return stream.next(0.1), (since, time.monotonic())
    finally:
        stream.close()
