"""One vCPU's part of a recorded trace, as its replay worker finds it in shared memory.

Made by the coordinator from a trace file (vmm/machine/tracefile.py); never written afterwards. A header of two u64,
the number of records and of entries, then three arrays of u64: ``times``, nanoseconds from the start of the
recording, [records]; ``ends``, the entries up to and with a record, [records]; ``entries``, slot id << 48 | page,
[entries].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..shm import Segment, SegmentError

__all__ = ["TraceSegment", "trace_segment_bytes"]

U64 = NDArray[np.uint64]
_HEADER = 2


def trace_segment_bytes(records: int, entries: int) -> int:
    return 8 * (_HEADER + 2 * records + entries)


class TraceSegment:
    """Owns its segment; views of it die with ``close``."""

    def __init__(self, segment: Segment) -> None:
        """The segment is closed with it. Raises SegmentError for one that is not a part of a trace."""
        self.segment = segment
        words = np.frombuffer(segment.buf, np.uint64)
        records, entries = int(words[0]), int(words[1])
        if trace_segment_bytes(records, entries) > segment.size:
            segment.close()
            raise SegmentError(f"shared-memory segment {segment.name} is not part of a trace")
        parts = np.split(words[_HEADER:], [records, 2 * records, 2 * records + entries])
        self.times: U64 = parts[0]
        self.ends: U64 = parts[1]
        self.entries: U64 = parts[2]

    @classmethod
    def create(cls, name: str, records: int, entries: int) -> TraceSegment:
        """To be filled in. Raises SegmentError."""
        segment = Segment.create(name, trace_segment_bytes(records, entries))
        words = np.frombuffer(segment.buf, np.uint64)
        words[:_HEADER] = records, entries
        return cls(segment)

    @classmethod
    def open(cls, name: str) -> TraceSegment:
        """Raises SegmentError."""
        return cls(Segment.open(name))

    def close(self) -> None:
        self.__dict__.pop("times", None)
        self.__dict__.pop("ends", None)
        self.__dict__.pop("entries", None)
        self.segment.close()
