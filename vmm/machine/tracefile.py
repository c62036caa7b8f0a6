"""Dirty traces: files of what vCPUs dirtied, page by page, in its order. docs/traces.md is the format in prose.

    with TraceWriter(path, header) as writer:
        writer.append(time_ns, vcpu, pack(slots, pages))
        writer.finish(lost=0)

    with TraceReader(path) as reader:
        print(reader.header.vcpus, reader.end.complete)
        for record in reader:
            record.time_ns, record.vcpu, record.slots, record.pages
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from ipc.layout import MAX_VCPUS

from ..errors import VmmError
from ..inputs import decode_json, input_name, open_input
from ..outputs import Output, open_output
from .rules import RuleError, check_slots
from .spec import RamSlot

__all__ = ["LACKS_ORDER", "LACKS_VCPUS", "VERSION", "Trace", "TraceEnd", "TraceError", "TraceHeader", "TraceReader",
           "TraceRecord", "TraceWriter", "check_trace", "pack", "unpack"]

VERSION = 1
_MAGIC = b"SVMTRACE"
_HEAD = struct.Struct("<8sII")          # magic, version, bytes of the header's JSON
_BLOCK = struct.Struct("<4sIII")        # kind, records, entries, bytes that follow the checksum
_CHECKSUM = struct.Struct("<Q")         # XXH3-64 of these and what follows
_DATA, _END = b"DATA", b"END "
_HEADER_MAX = 1 << 20
_BLOCK_ENTRIES = 1 << 18                # a block is written when it has so many
_RECORD_ENTRIES = 1 << 16               # what a harvest has at most: a ring
_ENTRIES_MAX = 1 << 19                  # of a block; more than is ever written into one
_RECORDS_MAX = 1 << 18
_ROWS = 1 << 12
_LEVEL = 3
_SLOT_SHIFT, _PAGE_MASK = np.uint64(48), np.uint64((1 << 48) - 1)
_RECORD = np.dtype([("time_ns", "<u8"), ("vcpu", "<u4"), ("count", "<u4")])

#: Of a process that was watched from outside.
LACKS_VCPUS, LACKS_ORDER = "vcpus", "order"
_LACKING = {LACKS_VCPUS: "one vCPU stands for all threads",
            LACKS_ORDER: "within an interval, pages are in the order of their addresses, not of the writes"}

U64 = NDArray[np.uint64]


class TraceError(VmmError):
    """A file that is damaged, or not a trace; the text names the file and the reason."""


class TraceHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What was recorded."""

    machine: str
    accelerator: str
    vcpus: int
    ring_entries: int
    slots: list[RamSlot]        # as they were when the recording began
    interval: float             # seconds between two harvests, at most: how exact the times are
    recorded: str = ""          # when, ISO 8601
    threads: list[str] = []     # of a Linux program: the thread that each vCPU had then; "": none
    mappings: list[str] = []    # of a process that was watched: address and name of what each slot is
    lacks: list[str] = []       # of LACKS_VCPUS and LACKS_ORDER: what is not known of it

    @property
    def lacking(self) -> str:
        """For a person; "" where nothing is."""
        return "; ".join(text for what, text in _LACKING.items() if what in self.lacks)


class TraceEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The last block's contents. A file without one was not finished."""

    records: int = 0
    entries: int = 0
    lost: int = 0               # entries that were dropped because the recorder lagged
    seconds: float = 0.0
    reason: str = ""            # why it is not complete; "" when it is

    @property
    def complete(self) -> bool:
        return not self.lost and not self.reason


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One harvest of one vCPU's ring."""

    time_ns: int                # from the start of the recording; when it was harvested
    vcpu: int
    slots: NDArray[np.uint16]   # [entries]
    pages: U64                  # [entries], page within the slot


@dataclass(frozen=True, slots=True)
class Trace:
    """A vCPU's part, whole: ``times`` and ``ends`` [records], ``entries`` [entries] (``pack``)."""

    times: U64
    ends: U64
    entries: U64


def pack(slots: NDArray[np.generic], pages: NDArray[np.generic]) -> U64:
    """slot id << 48 | page, uint64."""
    return slots.astype(np.uint64) << _SLOT_SHIFT | pages.astype(np.uint64)


def unpack(entries: U64) -> tuple[NDArray[np.uint16], U64]:
    """Slots and pages of packed entries."""
    return (entries >> _SLOT_SHIFT).astype(np.uint16), entries & _PAGE_MASK


def check_trace(path: Path, header: TraceHeader, vcpus: int, slots: list[RamSlot]) -> None:
    """Whether a machine of so many vCPUs and these slots can replay it. Raises TraceError."""
    if header.vcpus != vcpus:
        raise TraceError(f"{path}: was recorded from {header.vcpus} vCPUs, but the machine has {vcpus} (use vcpus: "
                         f"{header.vcpus})")
    there = {s.id: s for s in slots}
    for slot in header.slots:
        if slot.id not in there or there[slot.id].pages < slot.pages:
            raise TraceError(f"{path}: needs memory slot {slot.id} of {slot.pages} pages or more "
                             f"(use memory: - {{slot: {slot.id}, gpa: {slot.gpa:#x}, size: {slot.pages} pages}})")


def _squeeze(entries: U64) -> bytes:
    """Differences from each entry to the next, signs in the lowest bit, bytes of equal weight side by side: what
    is left of a sequential trace is zeros, for zstd to swallow."""
    with np.errstate(over="ignore"):
        steps = np.diff(entries, prepend=np.uint64(0)).view(np.int64)
    folded = (steps << 1 ^ steps >> 63).astype("<i8")
    return np.ascontiguousarray(folded.view(np.uint8).reshape(-1, 8).T).tobytes()


def _unsqueeze(data: memoryview, count: int) -> U64:
    folded = np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(8, count).T).view("<u8").reshape(-1)
    one = np.uint64(1)
    with np.errstate(over="ignore"):
        steps = folded >> one ^ (np.uint64(0) - (folded & one))
        return np.cumsum(steps, dtype=np.uint64)


def _rows(records: NDArray[np.void]) -> Iterator[tuple[int, int, int]]:
    """Of each (time, vCPU, entries), some at a time: as Python's numbers they take ten times the memory."""
    for at in range(0, len(records), _ROWS):
        yield from records[at:at + _ROWS].tolist()


def _checksum(*parts: bytes) -> bytes:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return _CHECKSUM.pack(digest.intdigest())


class TraceWriter:
    """Writes a file that is there when it is finished (vmm/outputs.py). ``bytes``: written so far. Raises
    OutputError where it cannot."""

    def __init__(self, path: Path, header: TraceHeader) -> None:
        self.path = path
        self.bytes = 0
        self._records: list[tuple[int, int, int]] = []
        self._entries: list[U64] = []
        self._pending = 0
        self._total_records = self._total_entries = 0
        self._last_ns = 0
        self._zstd = zstandard.ZstdCompressor(_LEVEL)
        text = msgspec.json.encode(header)
        self._out: Output = open_output(path)
        head = _HEAD.pack(_MAGIC, VERSION, len(text))
        self._write(head + text + _checksum(head, text))

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self.bytes += len(data)

    def append(self, time_ns: int, vcpu: int, entries: U64) -> None:
        """A record of packed entries; of more than a ring has, several of the same time. Records come in the order of
        their times."""
        for at in range(0, max(len(entries), 1), _RECORD_ENTRIES):
            self._append(time_ns, vcpu, entries[at:at + _RECORD_ENTRIES])

    def _append(self, time_ns: int, vcpu: int, entries: U64) -> None:
        self._records.append((time_ns, vcpu, len(entries)))
        self._entries.append(entries)
        self._pending += len(entries)
        self._last_ns = max(self._last_ns, time_ns)
        if self._pending >= _BLOCK_ENTRIES or len(self._records) >= _RECORDS_MAX:
            self._flush()

    def _flush(self) -> None:
        if not self._records:
            return
        records = np.array(self._records, _RECORD)
        payload = self._zstd.compress(records.tobytes() + _squeeze(np.concatenate(self._entries)))
        self._block(_DATA, len(records), self._pending, payload)
        self._total_records += len(records)
        self._total_entries += self._pending
        self._records.clear()
        self._entries.clear()
        self._pending = 0

    def _block(self, kind: bytes, records: int, entries: int, payload: bytes) -> None:
        head = _BLOCK.pack(kind, records, entries, len(payload))
        self._write(head + _checksum(head, payload) + payload)

    def finish(self, lost: int = 0, reason: str = "", seconds: float | None = None) -> TraceEnd:
        """Write what is left and the end, and give the file its name."""
        self._flush()
        end = TraceEnd(records=self._total_records, entries=self._total_entries, lost=lost, reason=reason,
                       seconds=self._last_ns / 1e9 if seconds is None else seconds)
        self._block(_END, 0, 0, msgspec.json.encode(end))
        self._out.commit()
        return end

    def close(self) -> None:
        """Without ``finish`` nothing is left of it."""
        self._out.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self.close()


class TraceReader:
    """A trace file, checked as it is read: whatever is in it, a block at a time is in memory. Raises TraceError, at
    once when it is none, or where damage is met."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_input(path, lambda path, what: TraceError(f"{input_name(path)}: {what}"))
        try:
            self.header = self._read_header()
            self._start = self._file.tell()
        except BaseException:
            self._file.close()
            raise
        #: None until every record has been read.
        self.end: TraceEnd | None = None

    def _bad(self, why: str) -> TraceError:
        return TraceError(f"{input_name(self.path)}: {why}")

    def _read(self, size: int, what: str) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as exc:
            raise self._bad(f"cannot be read: {exc.strerror}") from None
        if len(data) != size:
            raise self._bad(f"is damaged: it ends within {what}")
        return data

    def _read_header(self) -> TraceHeader:
        try:
            head = self._file.read(_HEAD.size)
        except OSError as exc:
            raise self._bad(f"cannot be read: {exc.strerror}") from None
        if len(head) != _HEAD.size or head[:8] != _MAGIC:
            raise self._bad("is not a dirty trace (vmm trace record writes them)")
        _, version, size = _HEAD.unpack(head)
        if version != VERSION:
            raise self._bad(f"is a dirty trace of version {version}; this program reads version {VERSION}")
        if size > _HEADER_MAX:
            raise self._bad("is damaged: its header is too long")
        text = self._read(size, "its header")
        if self._read(_CHECKSUM.size, "its header") != _checksum(head, text):
            raise self._bad("is damaged: its header's checksum does not match")
        try:
            header = decode_json(text, TraceHeader)
            check_slots(header.slots, mapped=False)
        except RuleError as exc:
            raise self._bad(f"is damaged: its header has an invalid slot: {exc}") from None
        except ValueError as exc:
            raise self._bad(f"is damaged: {exc}") from None
        if not 1 <= header.vcpus <= MAX_VCPUS or not 0 <= header.interval < math.inf:
            raise self._bad("is damaged: its header has invalid values")
        return header

    def blocks(self) -> Iterator[tuple[NDArray[np.void], U64]]:
        """(records, packed entries) of each block: records has the fields ``time_ns``, ``vcpu``, ``count``."""
        self._file.seek(self._start)
        seen_records = seen_entries = last_ns = 0
        while True:
            head = self._read(_BLOCK.size, "a block (not finished?)")
            kind, records, entries, size = _BLOCK.unpack(head)
            if kind not in (_DATA, _END) or records > _RECORDS_MAX or entries > _ENTRIES_MAX or size > (
                    1 << 20) + 16 * records + 9 * entries:
                raise self._bad(f"is damaged: there is no block at byte {self._file.tell() - _BLOCK.size}")
            digest = self._read(_CHECKSUM.size, "a block")
            payload = self._read(size, "a block")
            if _checksum(head, payload) != digest:
                raise self._bad("is damaged: a block's checksum does not match")
            if kind == _END:
                self.end = self._read_end(payload, seen_records, seen_entries)
                return
            found, packed = self._decode(payload, records, entries)
            times = found["time_ns"]
            if len(found) and (int(found["count"].sum(dtype=np.uint64)) != entries
                               or int(found["vcpu"].max()) >= self.header.vcpus):
                raise self._bad("is damaged: a block's records do not match its entries or the vCPUs")
            if len(found) and (int(times[0]) < last_ns or np.any(times[1:] < times[:-1])):
                raise self._bad("is damaged: times go backwards")
            last_ns = int(times[-1]) if len(found) else last_ns
            seen_records, seen_entries = seen_records + records, seen_entries + entries
            yield found, packed

    def _decode(self, payload: bytes, records: int, entries: int) -> tuple[NDArray[np.void], U64]:
        size = _RECORD.itemsize * records + 8 * entries
        try:
            # The decoder makes room for what the frame says, whatever it is told is the most.
            if zstandard.frame_content_size(payload) != size:
                raise self._bad("is damaged: a block does not have the size that it declares")
            data = zstandard.ZstdDecompressor().decompress(payload)
        except zstandard.ZstdError as exc:
            raise self._bad(f"is damaged: {exc}") from None
        cut = _RECORD.itemsize * records
        return np.frombuffer(data, _RECORD, records), _unsqueeze(memoryview(data)[cut:], entries)

    def _read_end(self, payload: bytes, records: int, entries: int) -> TraceEnd:
        try:
            end = decode_json(payload, TraceEnd)
        except ValueError as exc:
            raise self._bad(f"is damaged: {exc}") from None
        if end.lost < 0 or not 0 <= end.seconds < math.inf:
            raise self._bad("is damaged: its end block has invalid values")
        if (end.records, end.entries) != (records, entries):
            raise self._bad(f"is damaged: it has {entries} entries, but its end block says {end.entries}")
        try:
            more = self._file.read(1)
        except OSError as exc:
            raise self._bad(f"cannot be read: {exc.strerror}") from None
        if more:
            raise self._bad("is damaged: there is data after its end block")
        return end

    def __iter__(self) -> Iterator[TraceRecord]:
        for records, entries in self.blocks():
            at = 0
            for time_ns, vcpu, count in _rows(records):
                slots, pages = unpack(entries[at:at + count])
                yield TraceRecord(time_ns, vcpu, slots, pages)
                at += count

    def sizes(self) -> list[tuple[int, int]]:
        """Each vCPU's records and entries. Reads, and checks, the whole file."""
        records = np.zeros(self.header.vcpus, np.int64)
        entries = np.zeros(self.header.vcpus, np.int64)
        for found, _ in self.blocks():
            records += np.bincount(found["vcpu"], minlength=len(records))
            np.add.at(entries, found["vcpu"], found["count"])
        return list(zip(records.tolist(), entries.tolist(), strict=True))

    def read_into(self, parts: list[Trace]) -> None:
        """The whole trace, into arrays of what ``sizes`` gave, a part per vCPU."""
        at = [(0, 0)] * len(parts)
        for records, entries in self.blocks():
            begin = 0
            for time_ns, vcpu, count in _rows(records):
                part, (record, entry) = parts[vcpu], at[vcpu]
                if record == len(part.times) or entry + count > len(part.entries):
                    raise self._bad("was changed while it was being read")
                part.times[record], part.ends[record] = time_ns, entry + count
                part.entries[entry:entry + count] = entries[begin:begin + count]
                at[vcpu] = record + 1, entry + count
                begin += count
        if at != [(len(p.times), len(p.entries)) for p in parts]:
            raise self._bad("was changed while it was being read")

    def vcpus(self) -> list[Trace]:
        """The whole trace, a part per vCPU."""
        parts = [Trace(np.zeros(r, np.uint64), np.zeros(r, np.uint64), np.zeros(e, np.uint64))
                 for r, e in self.sizes()]
        self.read_into(parts)
        return parts

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TraceReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self.close()
