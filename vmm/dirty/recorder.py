"""The coordinator's end of a recording: what is harvested goes into a queue in shared memory (ipc/traces/queue.py),
and nothing waits for the reader that takes it out (vmm/consumers/trace.py)."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from ipc.traces.queue import TraceQueue

from ..machine.names import record_queue
from ..machine.tracefile import pack

__all__ = ["Recorder"]

_QUEUE_WORDS = 1 << 23      # 64 MiB: 8 million entries


class Recorder:
    """Of a machine that is being recorded; its reaper feeds it."""

    def __init__(self, machine: str, table: NDArray[np.uint64]) -> None:
        self._queue = TraceQueue.create(record_queue(machine), _QUEUE_WORDS)
        self._table = table
        self._began = time.monotonic_ns()

    def put(self, vcpu: int, triples: NDArray[np.uint64]) -> None:
        """What was harvested from one ring: (fetch index, slot word, page) each, uint64 [entries, 3]."""
        slots, pages = triples[:, 1], triples[:, 2]
        good = slots < len(self._table)     # what the harvest has dropped is not recorded either
        good[good] = pages[good] < self._table[slots[good], 2]
        if good.any():
            self._queue.put(time.monotonic_ns() - self._began, vcpu, pack(slots[good], pages[good]))

    def miss(self) -> None:
        """A ring has lost count: what else it held is unknown. The trace is not complete."""
        self._queue.miss(1)

    def close(self) -> None:
        """All of it is in the queue; whoever has it mapped can still read it."""
        self._queue.end()
        self._queue.close()
