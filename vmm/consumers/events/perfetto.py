"""Events as a trace that Perfetto (https://ui.perfetto.dev) opens, as older Chromiums do: the Trace Event Format's JSON
object (Google, "Trace Event Format", the one of catapult), in which times are microseconds.

What takes time is a slice, what does not an instant; entries in a ring and the reaper's interval are counters. Three
processes stand for three groups of tracks: vCPUs, the coordinator, clients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from .event import BEGINNINGS, COORDINATOR, Event

__all__ = ["Tracks"]

_COORDINATOR, _VCPUS, _CLIENTS = 1, 2, 3
_TITLES = {"kvm_dirty_ring_reap": "reap", "kvm_dirty_ring_flush": "flush", "stall": "ring full"}


class Tracks:
    """Makes the text of a trace, piece by piece: ``begin``, ``add`` any number of times, ``end``. In order, so that
    nothing is kept but the tracks there are and what has begun."""

    def __init__(self, machine: str, process_name: Callable[[int], str] = lambda pid: "") -> None:
        """``process_name``: of a client, by its process id; "" where it has gone."""
        self._machine = machine
        self._process_name = process_name
        self._groups: set[int] = set()
        self._known: set[tuple[int, int]] = set()
        self._begun: dict[tuple[str, str], Event] = {}      # by source and what it will be called
        self._filled: set[int] = set()                      # vCPUs whose rings await their reset
        self._first = True

    def begin(self) -> str:
        """The head."""
        return '{"displayTimeUnit": "ms", "traceEvents": [\n'

    def add(self, event: Event) -> str:
        """Nothing yet for what has only begun."""
        if event.name in BEGINNINGS:
            self._begun[event.source, BEGINNINGS[event.name]] = event
            return ""
        self._begun.pop((event.source, event.name), None)
        return "".join(map(self._text, self._entries(event)))

    def end(self) -> str:
        """The tail: what has begun is going on still."""
        left = []
        for (source, name), event in self._begun.items():
            left += [*self._track(source), {"ph": "B", **self._place(source), "ts": _micro(event.at),
                                            "name": _TITLES.get(name, name)}]
        return "".join(map(self._text, left)) + "\n]}\n"

    def _text(self, entry: dict[str, Any]) -> str:
        comma, self._first = "" if self._first else ",\n", False
        return comma + json.dumps(entry)

    def _entries(self, event: Event) -> Iterator[dict[str, Any]]:
        yield from self._track(event.source)
        place = self._place(event.source)
        if event.name == "kvm_dirty_ring_reap_vcpu":    # what is harvested stays in a ring until it is reset
            yield self._ring(event.fields["id"], event.at, event.fields["outstanding"])
            self._filled.add(event.fields["id"])
            return
        name = event.fields["verb"] if event.name == "verb" else _TITLES.get(event.name, event.name)
        if event.took:
            yield {"ph": "X", **place, "ts": _micro(event.at - event.took), "dur": _micro(event.took), "name": name,
                   "args": event.fields}
        else:
            yield {"ph": "i", "s": "t", **place, "ts": _micro(event.at), "name": name, "args": event.fields}
        if event.name == "reset":
            yield from (self._ring(vcpu, event.at, 0) for vcpu in sorted(self._filled))
            self._filled.clear()
        if event.name == "kvm_dirty_ring_reap":
            yield {"ph": "C", "pid": _COORDINATOR, "tid": 0, "name": "reaper interval (us)", "ts": _micro(event.at),
                   "args": {"us": event.fields["next_us"]}}

    @staticmethod
    def _ring(vcpu: int, at: float, entries: int) -> dict[str, Any]:
        return {"ph": "C", "pid": _VCPUS, "tid": 0, "name": f"vCPU {vcpu} ring entries", "ts": _micro(at),
                "args": {"entries": entries}}

    def _track(self, source: str) -> Iterator[dict[str, Any]]:
        """Its names, before its first entry."""
        place = self._place(source)
        pid, tid = place["pid"], place["tid"]
        if pid not in self._groups:
            self._groups.add(pid)
            group = {_COORDINATOR: "coordinator", _VCPUS: "vCPUs", _CLIENTS: "clients"}[pid]
            yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_name",
                   "args": {"name": f"{self._machine}: {group}"}}
            yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_sort_index", "args": {"sort_index": pid}}
        if (pid, tid) not in self._known:
            self._known.add((pid, tid))
            title = {_COORDINATOR: "coordinator", _VCPUS: f"vCPU {tid - 1}", _CLIENTS: f"client {tid}"}[pid]
            if pid == _CLIENTS and (name := self._process_name(tid)):
                title += f" ({name})"
            yield {"ph": "M", **place, "name": "thread_name", "args": {"name": title}}
            yield {"ph": "M", **place, "name": "thread_sort_index", "args": {"sort_index": tid}}

    @staticmethod
    def _place(source: str) -> dict[str, int]:
        if source.startswith("vcpu"):
            return {"pid": _VCPUS, "tid": 1 + int(source.removeprefix("vcpu"))}
        if source.startswith("client"):
            return {"pid": _CLIENTS, "tid": int(source.removeprefix("client"))}
        assert source == COORDINATOR
        return {"pid": _COORDINATOR, "tid": 1}


def _micro(seconds: float) -> float:
    return round(seconds * 1e6, 3)
