"""Guest RAM and its bitmaps: which segments a machine has, who is the owner, what they are called.

Segment names after the machine's prefix (no dashes within): ``control``, ``journal0``, ``journal1``, ``system``,
``ring<vcpu>`` (software rings); and of what may go and come again under the same number or name, with its
generation: ``ram<slot>.<born>``, ``log<slot>.<born>`` (staging and slot bitmap), ``vlog<vcpu>.<slot>.<born>``
(bitmap mode, a vCPU's own log buffer; replay with verification, its record), ``copy<slot>.<born>``
(vmm/dirty/verify.py), ``client.<client>.<generation>.<slot>.<born>``. Generations are hexadecimal. So nobody who
has an earlier one open can take it for the present one, and one that was not finished is never in the way of the
next.

Only the coordinator makes these names; consumers and workers are told them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ipc.bitmap import Bitmap, bitmap_bytes, word_count
from ipc.messages import SlotSpec
from ipc.shm import Segment

from .names import segment_name, slot_segment
from .spec import RamSlot

__all__ = ["ClientBitmaps", "MemorySlot", "make_or_open"]

_CACHE_LINE, _CACHE_SETS = 64, 64   # of a first-level cache on x86-64: sets are as many lines as make a page


def make_or_open(name: str, size: int, create: bool, *, reserve: bool = True) -> Segment:
    """A new segment, or the one that a coordinator that died has left; owned either way. ``reserve=False``: what
    is not touched takes no memory (ipc/shm.py). Raises SegmentError."""
    if create:
        return Segment.create(name, size, reserve=reserve)
    segment = Segment.open(name)
    segment.own()
    return segment


class MemorySlot:
    """One RAM slot: its memory, a staging bitmap for each reaper's harvests, and the slot bitmap that
    consumers' bitmaps are folded from.

    ``replay``: the memory is never touched, and its segment sparse; ``vcpu_logs`` are records (with a summary,
    sparse too) of the pages that each vCPU wrote. ``incoming``: sparse until it is filled."""

    def __init__(self, machine: str, spec: RamSlot, *, vcpu_logs: int, create: bool, replay: bool = False,
                 incoming: bool = False, reapers: int = 1) -> None:
        self.machine = machine
        self.spec = spec
        self.pages = spec.pages
        self.logged = spec.log
        self._open: list[Segment] = []
        try:
            self.ram = self._segment("ram", spec.size, create, reserve=not (replay or incoming))
            # Not all slots' bitmaps at the start of a page: a harvest that goes from slot to slot would need the
            # same few lines of the processor's cache for all of them.
            start = spec.id % _CACHE_SETS * _CACHE_LINE
            size = bitmap_bytes(self.pages)
            log = self._segment("log", start + (reapers + 1) * size, create)
            self.bitmap = Bitmap(log, start, self.pages)
            self.staging = [Bitmap(log, start + size * (i + 1), self.pages) for i in range(reapers)]
            self.vcpu_logs: list[NDArray[np.uint64]] = []
            self.records: list[Bitmap] = []
            self._vlog_names: list[str] = []
            if replay:
                for vcpu in range(vcpu_logs):
                    segment = self._segment(f"vlog{vcpu}.", size, create, reserve=False)
                    self._vlog_names.append(segment.name)
                    self.records.append(Bitmap(segment, 0, self.pages))
            else:
                self.need_vcpu_logs(vcpu_logs)
        except BaseException:
            self.close()
            raise

    def need_vcpu_logs(self, vcpus: int) -> None:
        """The vCPUs' own log buffers, if they are not there yet."""
        for vcpu in range(len(self.vcpu_logs), vcpus):
            name = slot_segment(self.machine, f"vlog{vcpu}.", self.spec)
            segment, _ = Segment.adopt(name, 8 * word_count(self.pages))
            self._open.append(segment)
            self._vlog_names.append(segment.name)
            self.vcpu_logs.append(np.frombuffer(segment.buf, np.uint64, word_count(self.pages)))

    def _segment(self, kind: str, size: int, create: bool, *, reserve: bool = True) -> Segment:
        segment = make_or_open(slot_segment(self.machine, kind, self.spec), size, create, reserve=reserve)
        self._open.append(segment)
        return segment

    @property
    def segments(self) -> list[str]:
        """Names of all that are its."""
        return [segment.name for segment in self._open]

    @property
    def now(self) -> RamSlot:
        """Its specification, with the logging as it is."""
        return RamSlot(self.spec.id, self.spec.gpa, self.spec.size, self.logged, self.spec.born)

    def worker_spec(self, vcpu: int, *, log: bool) -> SlotSpec:
        """``log``: the vCPU is to log what it writes to it."""
        return SlotSpec(id=self.spec.id, gpa=self.spec.gpa, size=self.spec.size, segment=self.ram.name,
                        log=log, log_segment=self._vlog_names[vcpu] if self._vlog_names else "")

    def log_segment(self, vcpu: int) -> str:
        """Name of the vCPU's log buffer."""
        return self._vlog_names[vcpu]

    @property
    def memory(self) -> NDArray[np.uint8]:
        """The slot's bytes, shape [size], no copy."""
        return np.frombuffer(self.ram.buf, np.uint8, self.spec.size)

    def close(self) -> None:
        """Drop the views and the mappings; a created segment's name goes too."""
        self.__dict__.pop("staging", None)
        self.__dict__.pop("bitmap", None)
        self.__dict__.pop("vcpu_logs", None)
        self.__dict__.pop("records", None)
        for segment in self._open:
            segment.close()
        self._open.clear()


class ClientBitmaps:
    """A consumer's two bitmaps of one slot, in one segment: ``pending``, which every sync of any
    client folds into, and ``synced``, what the client's own last sync took: stable until its next."""

    def __init__(self, segment: Segment, pages: int) -> None:
        self.segment = segment
        self.pending = Bitmap(self.segment, 0, pages)
        #: First byte of ``synced``.
        self.synced_at = bitmap_bytes(pages)
        self.synced = Bitmap(self.segment, self.synced_at, pages)

    @classmethod
    def make(cls, machine: str, client: str, generation: int, slot: RamSlot, *,
             adopt: bool = False) -> ClientBitmaps:
        """The coordinator's: owned, made anew, or (``adopt``) taken over from one that died. Where that one's are
        not there, nobody knows what was gathered: all is marked. Raises SegmentError."""
        name = segment_name(machine, f"client.{client}.{generation:x}.{slot.id}.{slot.born:x}")
        size = 2 * bitmap_bytes(slot.pages)
        if not adopt:
            return cls(Segment.create(name, size), slot.pages)
        segment, fresh = Segment.adopt(name, size)
        made = cls(segment, slot.pages)
        if fresh:
            made.pending.mark_range(0, slot.pages)
        return made

    def close(self) -> None:
        self.__dict__.pop("pending", None)
        self.__dict__.pop("synced", None)
        self.segment.close()
