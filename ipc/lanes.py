"""Lanes: what each process of a machine has done of late, written down for whoever looks.

    vCPU worker i --- lane i ----.
                                  >--- the control segment, behind the control blocks ---> vmm events, a report
    coordinator ----- its lane --'

A lane has one writer and any number of readers, and nobody waits for anybody. It is a ring of marks of 32 bytes, of
which the newest overwrite the oldest, and a count of all that were ever written, in front of them. A mark is stored
before the count, and x86 keeps the order of stores: what the count covers is whole. A reader copies, reads the count
again, and drops what may have been overwritten meanwhile. So marks are always on: one costs its writer less than a
microsecond, and memory is bounded.

What a worker that went wild has written over a lane is no mark: a reader drops what cannot be there.
"""

from __future__ import annotations

import ctypes
import struct
import time
from enum import IntEnum
from typing import NamedTuple

from .layout import coordinator_lane, vcpu_lane

__all__ = ["COORDINATOR_KINDS", "VCPU_KINDS", "Kind", "Lane", "Mark"]

_MARK = struct.Struct("@QQIIQ")     # at, took, kind, who, value; native: the count is one store
_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1


class Kind(IntEnum):
    """What a mark says. ``took`` is the time of what is over with it; what is still going on has a mark of its
    beginning."""

    # of a worker
    RING_FULL = 1       # the vCPU has left the guest for a full ring
    STALL = 2           # and goes on
    PAUSE_BEGIN = 3     # it stays out of the guest, because it was asked to
    PAUSE = 4
    THROTTLE_BEGIN = 5  # for its dirty limit
    THROTTLE = 6
    # of the coordinator (16: of earlier versions)
    REAP_VCPU = 17      # who: vCPU; value: entries harvested, and << 32 those in its ring that await their reset
    RESET = 18          # value: entries that the rings were asked to free
    REAP = 19           # who: microseconds until the next one is due; value: entries
    FLUSH = 20          # value: entries, or pages
    VERIFY = 21         # a round of the verifier
    VERB = 22           # who: process id of the client; value: number of the verb (vmm/machine/verbs.py)
    KICK = 23           # a full ring has kicked the reaper


#: Those of each writer.
VCPU_KINDS = frozenset(kind for kind in Kind if kind < Kind.REAP_VCPU)
COORDINATOR_KINDS = frozenset(Kind) - VCPU_KINDS


class Mark(NamedTuple):
    """``at``: CLOCK_MONOTONIC when it was written, and what it is about was over; ``took``: so long before it had
    begun; both in nanoseconds."""

    at: int
    took: int
    kind: Kind
    who: int
    value: int


class Lane:
    """A lane in ``memory``, a writable buffer: a multiple of 32 bytes, the first 32 of which hold the count. ``kinds``:
    its writer's."""

    def __init__(self, memory: bytearray | ctypes.Array[ctypes.c_char], kinds: frozenset[Kind] = frozenset(Kind)
                 ) -> None:
        self._memory = memory
        self._kinds = kinds
        self._count = ctypes.c_uint64.from_buffer(memory)
        self._capacity = len(memory) // _MARK.size - 1

    @classmethod
    def of_coordinator(cls, control: int, vcpus: int) -> Lane:
        """In the control segment that is mapped at address ``control``. Keep the mapping alive."""
        return cls._at(control, coordinator_lane(vcpus), COORDINATOR_KINDS)

    @classmethod
    def of_vcpu(cls, control: int, vcpus: int, index: int) -> Lane:
        """The same."""
        return cls._at(control, vcpu_lane(vcpus, index), VCPU_KINDS)

    @classmethod
    def _at(cls, control: int, place: tuple[int, int], kinds: frozenset[Kind]) -> Lane:
        offset, size = place
        return cls((ctypes.c_char * size).from_address(control + offset), kinds)

    @classmethod
    def of_nobody(cls) -> Lane:
        """Nobody can look at it."""
        return cls(bytearray(2 * _MARK.size))

    def put(self, kind: Kind, took: int = 0, who: int = 0, value: int = 0, began: int = 0) -> None:
        """``took`` in nanoseconds, since ``began`` (of CLOCK_MONOTONIC); if that is not given, until now: who is
        interrupted before this writes it down later than it was, and what lies within something would not seem to.
        Of one thread."""
        count = self._count.value
        at = began + took if began else time.monotonic_ns()
        _MARK.pack_into(self._memory, (1 + count % self._capacity) * _MARK.size, at,
                        took & _MASK64, kind, who & _MASK32, value & _MASK64)
        self._count.value = count + 1

    def read(self, after: int) -> tuple[list[Mark], int, int]:
        """The marks after the first ``after`` that were ever written; how many there are by now; and how many of those
        asked for have been overwritten. What is no mark is left out."""
        end = self._count.value
        if not 0 <= after <= end:       # somebody has written over the count
            return [], end, 0
        first = max(after, end - self._capacity)
        whole = memoryview(self._memory)
        data = b"".join(whole[begin:stop] for begin, stop in self._spans(first, end))
        # The writer may be in the middle of the one that follows, which lies where the oldest did.
        kept = max(first, min(self._count.value + 1 - self._capacity, end))
        now = time.monotonic_ns()
        found = [Mark(at, took, Kind(kind), who, value)
                 for at, took, kind, who, value in _MARK.iter_unpack(data[(kept - first) * _MARK.size:])
                 if kind in self._kinds and took <= at <= now]
        return found, end, kept - after

    def _spans(self, first: int, end: int) -> list[tuple[int, int]]:
        """Where marks ``first`` to ``end`` lie, in bytes."""
        size, count = _MARK.size, end - first
        begin = first % self._capacity
        head = min(count, self._capacity - begin)
        return [((1 + begin) * size, (1 + begin + head) * size), (size, (1 + count - head) * size)]
