"""The seven trace events of QEMU's dirty-ring support, as one structured line each.

Names and arguments are those of accel/kvm/trace-events in the seed; ``kvm_dirty_ring_page`` calls
its second argument ``slot`` there but passes the fetch index, and so it is named here. A line is
``<seconds since start> <event> key=value …``. Events are switched on by shell patterns
(``kvm_dirty_ring_*``); one that is off is a ``None`` attribute, and its call site a test of it.
"""

from __future__ import annotations

import fnmatch
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from .errors import VmmError

__all__ = ["EVENTS", "Tracer", "check_patterns"]

EVENTS: dict[str, tuple[str, ...]] = {
    "kvm_dirty_ring_full": ("id",),
    "kvm_dirty_ring_reap_vcpu": ("id",),
    "kvm_dirty_ring_page": ("vcpu", "fetch", "offset"),
    "kvm_dirty_ring_reaper": ("s",),
    "kvm_dirty_ring_reap": ("count", "t"),
    "kvm_dirty_ring_reaper_kick": ("reason",),
    "kvm_dirty_ring_flush": ("finished",),
}

Emit = Callable[..., None]


def check_patterns(patterns: Sequence[str]) -> None:
    """Raises VmmError for a pattern that matches no event."""
    for pattern in patterns:
        if not fnmatch.filter(EVENTS, pattern):
            raise VmmError(f"--trace {pattern}: no such event; there are: {', '.join(EVENTS)}")


class Tracer:
    """One attribute an event: a callable when it is on, None when it is off."""

    full: Emit | None
    reap_vcpu: Emit | None
    page: Emit | None
    reaper: Emit | None
    reap: Emit | None
    reaper_kick: Emit | None
    flush: Emit | None

    def __init__(self, patterns: Sequence[str], path: str = "") -> None:
        self._start = time.monotonic()
        wanted = {event for event in EVENTS for p in patterns if fnmatch.fnmatch(event, p)}
        self._out: IO[str] | None = None
        if wanted:
            # Held for the tracer's life and closed by close().
            self._out = Path(path).open("a", buffering=1) if path else sys.stderr  # noqa: SIM115
        for event in EVENTS:
            short = event.removeprefix("kvm_dirty_ring_")
            setattr(self, short, self._emitter(event) if event in wanted else None)

    def _emitter(self, event: str) -> Emit:
        names = EVENTS[event]

        def emit(*values: object) -> None:
            fields = " ".join(f"{n}={v:#x}" if n == "offset" else f"{n}={v}"
                              for n, v in zip(names, values, strict=True))
            assert self._out is not None
            self._out.write(f"{time.monotonic() - self._start:.6f} {event} {fields}\n")

        return emit

    def close(self) -> None:
        if self._out not in (None, sys.stderr):
            assert self._out is not None
            self._out.close()
