"""Events as text for people and as lines of JSON for programs, and from such lines again."""

from __future__ import annotations

import datetime
import json
from typing import Any

import msgspec

from ...errors import VmmError, one_line
from .event import Event

__all__ = ["json_line", "read_json_lines", "text_line"]

_OWN = ("time", "at", "source", "event", "took_us")


def _iso(at: float, offset: float) -> str:
    """``offset``: what CLOCK_REALTIME is ahead of CLOCK_MONOTONIC, seconds."""
    moment = datetime.datetime.fromtimestamp(at + offset, datetime.UTC)
    return moment.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def text_line(event: Event, offset: float) -> str:
    """``<time> <source> <event> key=value …``, as a machine's log has it."""
    parts = [_iso(event.at, offset), event.source, event.name]
    if event.took and "t" not in event.fields:      # QEMU's own name for it
        parts.append(f"took={event.took * 1e6:.0f}us")
    parts += [f"{key}={one_line(str(value))}" for key, value in event.fields.items() if value != ""]
    return " ".join(parts)


def json_line(event: Event, offset: float) -> str:
    """``at`` and ``took_us`` are of CLOCK_MONOTONIC, ``time`` is when that was."""
    took = {"took_us": round(event.took * 1e6, 3)} if event.took else {}
    return json.dumps({"time": _iso(event.at, offset), "at": round(event.at, 9), "source": event.source,
                       "event": event.name, **took, **event.fields})


def read_json_lines(data: bytes, name: str) -> list[Event]:
    """What ``json_line`` has written; ``name``: of its file. Raises VmmError."""
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            found.append(_event(json.loads(line)))
        except (ValueError, LookupError, TypeError, RecursionError) as exc:
            raise VmmError(f"{name}:{number}: is not an event of vmm events --format jsonl "
                           f"({one_line(str(exc))})") from None
    return found


def _event(line: dict[str, Any]) -> Event:
    return msgspec.convert({"at": line["at"], "source": line["source"], "name": line["event"],
                            "took": line.get("took_us", 0) / 1e6,
                            "fields": {k: v for k, v in line.items() if k not in _OWN}}, Event)
