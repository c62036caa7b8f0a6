"""Dirty traces: reading and writing the files of ``vmm trace record`` (docs/traces.md;
vmm/machine/tracefile.py)."""

from __future__ import annotations

from .machine.tracefile import (
    VERSION,
    Trace,
    TraceEnd,
    TraceError,
    TraceHeader,
    TraceReader,
    TraceRecord,
    TraceWriter,
    check_trace,
    pack,
    unpack,
)

__all__ = ["VERSION", "Trace", "TraceEnd", "TraceError", "TraceHeader", "TraceReader", "TraceRecord",
           "TraceWriter", "check_trace", "pack", "unpack"]
