"""Pages on their way: packed, checked, unpacked; and bitmaps of pages that are missing.

The bytes of pages are not copied where they lie one after the other: the kernel sends them from guest memory itself
(streams.py). A page that the guest writes meanwhile arrives half old, half new. It is dirty then, and comes again.

Over a network that nothing else protects pages have a sum (``sums``; a Unix socket's bytes do not leave the kernel, and
what is encrypted cannot be damaged unseen). It is wrong for a page that was written meanwhile, as for a damaged one.
So the target sums up what it got instead, page by page, and the source, when it knows which pages are dirty,
compares those that are not with its own (``changed``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from ipc.shm import PAGE_SIZE

from ...optional import lz4_block
from ..pages import is_filled, runs
from .wire import Buffer, Gathered, Missing, Pages, Torn, Want, WireError

__all__ = ["CHUNK_PAGES", "PAGE", "Encoding", "Packer", "Runs", "changed", "missing", "missing_pages", "packed_bits",
           "page_numbers", "torn", "unpack", "want"]

PAGE = PAGE_SIZE
CHUNK_PAGES = 256           # pages of a message at most: 1 MiB

Encoding = Literal["none", "zstd", "lz4"]


_RUN = 4                    # pages that must follow one another, on average, for them to be sent from where they lie


@dataclass(frozen=True, slots=True)
class Runs:
    """Bytes of a slot that are sent from where they lie: (first byte, bytes) of each run."""

    runs: list[tuple[int, int]]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(count for _, count in self.runs)


class Packer:
    """Encodes pages. One for each thread. ``sums``: what is sent has a sum."""

    def __init__(self, encoding: Encoding, *, sums: bool) -> None:
        """Raises MissingPackage."""
        self._encoding = encoding
        self._sums = sums
        self._zstd = zstandard.ZstdCompressor(level=1)
        self._lz4 = lz4_block() if encoding == "lz4" else None

    def pack(self, round_: int, slot: int, memory: NDArray[np.uint8],
             pages: NDArray[np.int64]) -> list[tuple[Pages, Buffer | Runs]]:
        """The messages for these pages (ascending, at most CHUNK_PAGES) of the slot's memory, as it is now."""
        memory = memory.reshape(-1, PAGE)
        first, end = int(pages[0]), int(pages[-1]) + 1
        data = memory[first:end] if end - first == len(pages) else memory[pages]
        solid = is_filled(data)
        found: list[tuple[Pages, Buffer | Runs]] = []
        if not solid.all():
            found.append((Pages(round_, slot, _numbers(pages[~solid]), "zero"), b""))
            pages = pages[solid]
        if len(pages):
            packed, encoding = self._encode(memory, pages)
            sum_ = _sum(memory, packed) if self._sums else b""
            found.append((Pages(round_, slot, _numbers(pages), encoding, sum_), packed))
        return found

    def _encode(self, memory: NDArray[np.uint8], pages: NDArray[np.int64]) -> tuple[Buffer | Runs, Encoding]:
        """What does not get smaller is sent as it is. A compressor reads more than once, and must not see the
        guest's writes in between: it is given a copy."""
        if self._encoding == "none":
            found = [(first * PAGE, count * PAGE) for first, count, _ in runs(pages)]
            if len(found) <= len(pages) // _RUN:
                return Runs(found), "none"
            return memory[pages].reshape(-1).data, "none"
        raw = memory[pages].tobytes()
        packed = self._zstd.compress(raw) if self._lz4 is None else bytes(self._lz4.compress(raw, store_size=False))
        return (packed, self._encoding) if len(packed) < len(raw) else (raw, "none")


def _sum(memory: NDArray[np.uint8], data: Buffer | Runs) -> bytes:
    if not isinstance(data, Runs):
        return xxhash.xxh3_64_digest(data)
    flat, found = memory.reshape(-1), xxhash.xxh3_64()
    for first, count in data.runs:
        found.update(flat[first:first + count].data)
    return found.digest()


def _numbers(pages: NDArray[np.int64]) -> bytes:
    return pages.astype("<u4").tobytes()


def want(slot: int, pages: list[int]) -> Want:
    """The message that asks for these pages."""
    return Want(slot, _numbers(np.array(sorted(pages))))


def page_numbers(message: Pages | Want | Torn, total: int) -> NDArray[np.int64]:
    """Ascending, of a slot of ``total`` pages. Raises WireError."""
    if len(message.numbers) % 4 or not 0 < len(message.numbers) <= 4 * CHUNK_PAGES:
        raise WireError(f"the other end sent page numbers of an invalid size ({len(message.numbers)} bytes)")
    numbers = np.frombuffer(message.numbers, "<u4").astype(np.int64)
    if numbers[-1] >= total or (np.diff(numbers) <= 0).any():
        raise WireError(f"the other end sent page numbers that slot {message.slot} does not have, or unordered ones")
    return numbers


def unpack(message: Pages, data: Buffer, total: int) -> tuple[NDArray[np.int64], NDArray[np.uint8] | None, bool]:
    """(page numbers, their bytes [n, 4096] or None for zero pages, intact), for a slot of ``total`` pages; the
    bytes may be a view of ``data``. Not intact: the bytes have another sum than they were sent with; there are none
    then of pages that were compressed. Raises WireError for anything that does not fit."""
    numbers = page_numbers(message, total)
    size = len(numbers) * PAGE
    if message.encoding == "zero":
        if len(data):
            raise WireError("the source sent data for zero pages")
        return numbers, None, True
    intact = not message.sum or xxhash.xxh3_64_digest(data) == message.sum
    if not intact and message.encoding != "none":
        return numbers, None, False
    raw = data
    try:
        if message.encoding == "zstd":
            # Not the size that the frame claims, which is the sender's word: never more than was announced.
            raw = zstandard.ZstdDecompressor().decompressobj().decompress(raw) if _claims(raw, size) else b""
        elif message.encoding == "lz4":
            raw = _unpack_lz4(raw, size)
    except zstandard.ZstdError as exc:
        raise WireError(f"the source sent pages that cannot be decompressed: {exc}") from None
    if len(raw) != size:
        raise WireError(f"the source sent {len(raw)} bytes for {len(numbers)} pages")
    return numbers, np.frombuffer(raw, np.uint8).reshape(-1, PAGE), intact


def _unpack_lz4(packed: Buffer, size: int) -> Buffer:
    """Raises WireError, MissingPackage."""
    lz4 = lz4_block()
    try:
        return bytes(lz4.decompress(packed, uncompressed_size=size))
    except lz4.LZ4BlockError as exc:
        raise WireError(f"the source sent pages that cannot be decompressed: {exc}") from None


def _claims(frame: Buffer, size: int) -> bool:
    """The zstd frame says that it holds exactly ``size`` bytes (the decoder then holds it to that)."""
    return bool(zstandard.frame_content_size(frame) == size)


# --- pages that arrived otherwise than they were sent -----------------------------------------------------------


def _sums(data: NDArray[np.uint8]) -> bytes:
    """Of pages [n, 4096], 8 bytes each."""
    return b"".join([xxhash.xxh3_64_digest(page) for page in np.ascontiguousarray(data)])


def torn(message: Pages, data: NDArray[np.uint8] | None) -> Torn:
    """The target's word on pages that were not intact, with the sums of those it has (``data`` [n, 4096])."""
    return Torn(message.slot, message.numbers, b"" if data is None else _sums(data))


def changed(message: Torn, memory: NDArray[np.uint8], dirty: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of these pages, those to be sent again: neither ``dirty`` (bool[pages], they come again in any case), nor at
    the target what they are in the slot's ``memory``. Raises WireError."""
    numbers = page_numbers(message, len(dirty))
    if len(message.sums) not in (0, 8 * len(numbers)):
        raise WireError(f"the target sent {len(message.sums)} bytes of checksums for {len(numbers)} pages")
    clean = ~dirty[numbers]
    if message.sums and clean.any():
        there = np.frombuffer(message.sums, "V8")[clean]
        clean[clean] = there != np.frombuffer(_sums(memory.reshape(-1, PAGE)[numbers[clean]]), "V8")
    return numbers[clean]


# --- post-copy: what is missing ----------------------------------------------------------------------------------


def missing(slot: int, bits: NDArray[np.bool_]) -> Missing:
    """The message that says which pages are missing: ``bits``, bool [pages]."""
    return Missing(slot, packed_bits(np.packbits(bits, bitorder="little")))


def packed_bits(bits: NDArray[np.uint8]) -> bytes:
    """A bit for each page, for a message."""
    return zstandard.ZstdCompressor(level=1).compress(bits.tobytes())


def missing_pages(message: Missing | Gathered, total: int) -> NDArray[np.bool_]:
    """bool[total]. Raises WireError."""
    size = -(-total // 8)
    try:
        raw = zstandard.ZstdDecompressor().decompress(message.bits) if _claims(message.bits, size) else b""
    except zstandard.ZstdError as exc:
        raise WireError(f"the other end sent a bitmap that cannot be decompressed: {exc}") from None
    if len(raw) != size:
        raise WireError(f"the other end sent a bitmap of the wrong size for slot {message.slot}")
    return np.unpackbits(np.frombuffer(raw, np.uint8), count=total, bitorder="little").astype(bool)
