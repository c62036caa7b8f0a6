"""An event of a machine: what happened, when, how long it took, and of which of its processes it is.

Where QEMU's dirty-ring support has a trace event for it, it has that name (vmm/machine/events.py).
"""

from __future__ import annotations

from typing import Any

import msgspec

from ipc.lanes import Kind, Mark

from ...machine.verbs import VERB_NAMES

__all__ = ["BEGINNINGS", "COORDINATOR", "Event", "of_mark", "of_news", "overwritten"]

COORDINATOR = "coordinator"

#: What begins with such an event is over with that one, which says how long it took.
BEGINNINGS = {"kvm_dirty_ring_full": "stall", "pause-begin": "pause", "throttle-begin": "throttle"}

_NAMES = {
    Kind.RING_FULL: "kvm_dirty_ring_full", Kind.STALL: "stall", Kind.PAUSE_BEGIN: "pause-begin", Kind.PAUSE: "pause",
    Kind.THROTTLE_BEGIN: "throttle-begin", Kind.THROTTLE: "throttle", Kind.KICK: "kvm_dirty_ring_reaper_kick",
    Kind.REAP_VCPU: "kvm_dirty_ring_reap_vcpu", Kind.RESET: "reset", Kind.REAP: "kvm_dirty_ring_reap",
    Kind.FLUSH: "kvm_dirty_ring_flush", Kind.VERIFY: "verify-round", Kind.VERB: "verb"}

_LOW32 = (1 << 32) - 1


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """``at``: CLOCK_MONOTONIC of the machine's host, in seconds, when it was over; ``took``: so long before it had
    begun, 0 for what takes no time. ``source``: coordinator, vcpu<N>, client<process id>."""

    at: float
    source: str
    name: str
    took: float = 0.0
    fields: dict[str, Any] = {}


def of_mark(source: str, mark: Mark) -> Event:
    """``source``: whose lane it is from."""
    kind = mark.kind
    fields: dict[str, Any] = {}
    if kind is Kind.RING_FULL:
        fields = {"id": int(source.removeprefix("vcpu"))}
    elif kind is Kind.REAP_VCPU:
        fields = {"id": mark.who, "count": mark.value & _LOW32, "outstanding": mark.value >> 32}
    elif kind is Kind.RESET:
        fields = {"entries": mark.value}
    elif kind is Kind.KICK:
        fields = {"reason": "ring-full"}
    elif kind is Kind.REAP:
        fields = {"count": mark.value, "t": mark.took // 1000, "next_us": mark.who}
    elif kind is Kind.FLUSH:
        fields = {"finished": 1, "count": mark.value}
    elif kind is Kind.VERB:
        known = mark.value < len(VERB_NAMES)
        fields = {"verb": _dashed(VERB_NAMES[mark.value]) if known else "unknown", "pid": mark.who}
        source = f"client{mark.who}"
    return Event(at=mark.at / 1e9, source=source, name=_NAMES[kind], took=mark.took / 1e9, fields=fields)


def _dashed(name: str) -> str:
    """``LogStart`` -> ``log-start``, as in a request."""
    return "".join("-" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))


def of_news(news: dict[str, Any], now: float) -> Event:
    """One of ``Machine.events``. ``now``: when it came, for one that does not say when it was."""
    fields = {k: v for k, v in news.items() if k not in ("event", "at", "vcpu")}
    source = f"vcpu{news['vcpu']}" if "vcpu" in news else COORDINATOR
    return Event(at=float(news.get("at", now)), source=source, name=str(news["event"]), fields=fields)


def overwritten(source: str, count: int, at: float) -> Event:
    """So many of this source are not known: newer ones have taken their place."""
    return Event(at=at, source=source, name="dropped", fields={"count": count})
