"""Which pages of a memory slot a page file holds, and what they must be: ``<name>.map``.

Pages go in blocks of 64. Of each block three uint64, little-endian: which of its pages are in the snapshot (page *p*
at bit ``p % 64``), which of these are not zero, and XXH3-64 of the bytes of those that are not zero, in their order
(0: there are none). So a block can be read, and known to be whole, without the rest of the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from ipc.bitmap import word_count
from ipc.shm import PAGE_SIZE

from ...errors import VmmError
from ...inputs import input_name, open_input

__all__ = ["BLOCK_PAGES", "PAGE", "PageFileError", "PageMap", "Words", "all_pages", "bit_runs", "checksum_of",
           "page_numbers", "refuse"]

PAGE = PAGE_SIZE
BLOCK_PAGES = 64

Words = NDArray[np.uint64]      # a bit for each page of a slot

_EVERY = np.arange(BLOCK_PAGES)
_FULL = (1 << BLOCK_PAGES) - 1


class PageFileError(VmmError):
    """A file that is damaged, or not one of these."""


def refuse(path: Path, what: str) -> PageFileError:
    """The error that says this of the file."""
    return PageFileError(f"{input_name(path)}: {what}")


def all_pages(total: int) -> Words:
    """The bits of a slot's ``total`` pages, all set."""
    words = np.full(word_count(total), _FULL, np.uint64)
    if total % BLOCK_PAGES:
        words[-1] = (1 << total % BLOCK_PAGES) - 1
    return words


def bit_runs(mask: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of set bits."""
    at = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask, at = mask >> skip, at + skip
        count = (~mask & (mask + 1)).bit_length() - 1
        yield at, count
        mask, at = mask >> count, at + count


def page_numbers(mask: int) -> NDArray[np.int64]:
    """The set bits, ascending."""
    if mask == _FULL:
        return _EVERY
    return np.flatnonzero(np.unpackbits(np.frombuffer(mask.to_bytes(8, "little"), np.uint8), bitorder="little"))


def checksum_of(data: NDArray[np.uint8]) -> int:
    """Of a block's pages that are not zero, [n, 4096], C-contiguous."""
    return xxhash.xxh3_64_intdigest(data.reshape(-1).data) if len(data) else 0


class PageMap:
    """``present``, ``filled`` and ``sums``: uint64 [blocks], views of one table."""

    def __init__(self, table: Words) -> None:
        self.table = table      # [blocks, 3], C-contiguous
        self.present, self.filled, self.sums = table.T

    @classmethod
    def empty(cls, total: int) -> PageMap:
        """Of a slot of ``total`` pages, none of which is there yet."""
        return cls(np.zeros((word_count(total), 3), np.uint64))

    @classmethod
    def load(cls, path: Path, total: int, checksum: str | None) -> PageMap:
        """``checksum``: what it must have; None: it was written a moment ago. Raises PageFileError."""
        shape = word_count(total), 3
        size = 8 * shape[0] * shape[1]
        with open_input(path, refuse) as file:
            try:
                data = file.read(size + 1)
            except OSError as exc:
                raise refuse(path, f"cannot be read: {exc.strerror}") from None
        if len(data) != size:
            raise refuse(path, f"has {f'more than {size}' if len(data) > size else len(data)} bytes, expected {size}")
        found = cls(np.frombuffer(data, "<u8").reshape(shape))
        if checksum is not None and found.checksum() != checksum:
            raise refuse(path, "is damaged (its checksum does not match)")
        if (found.present & ~all_pages(total)).any():
            raise refuse(path, f"lists a page beyond the slot's {total} pages")
        if (found.filled & ~found.present).any():
            raise refuse(path, "says what a page is that it does not have")
        return found

    def checksum(self) -> str:
        """XXH3-128 of the file: with it, everything that is in the snapshot of this slot is fixed."""
        return str(xxhash.xxh3_128_hexdigest(self.table.data))

    def save(self, path: Path) -> None:
        """Raises OSError."""
        with open(path, "wb") as file:
            file.write(self.table.tobytes())
            file.flush()
            os.fsync(file.fileno())

    @property
    def pages(self) -> int:
        """That are in the snapshot."""
        return int(np.bitwise_count(self.present).sum())

    @property
    def zero_pages(self) -> int:
        """Those of them that are zero."""
        return self.pages - int(np.bitwise_count(self.filled).sum())
