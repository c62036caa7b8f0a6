"""Files that hold some pages of a memory slot: which, and their bytes.

``<name>.map``
    Which pages are in the snapshot, which of them are not zero, and a checksum of each block of 64
    (vmm/consumers/snapshot/pagemap.py).
``<name>.mem``
    As long as the slot; page *p* at byte ``4096 p``. Holes where a page is zero, or not in the snapshot.
``<name>.zst``
    Instead of it: a skippable zstd frame with the size of each frame that follows (uint32), then a zstd frame for
    each block that has pages which are not zero, with these pages in their order.

Checksums find damage, at the speed of memory; they are no signatures.

What is held in memory does not grow with the pages' bytes: a few bytes per page of the slot, and a block per thread.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray

from ipc.linux.files import write_at, write_back
from ipc.shm import data_extents

from ...inputs import open_input
from ..pages import is_filled
from .pagemap import (
    BLOCK_PAGES,
    PAGE,
    PageFileError,
    PageMap,
    Words,
    all_pages,
    bit_runs,
    checksum_of,
    page_numbers,
    refuse,
)
from .threads import in_order, in_threads

__all__ = ["PAGE", "PageFile", "PageFileError", "PageWriter", "Scratch", "compress", "iter_pages", "read_pages",
           "touched_pages"]

_LEVEL = 1              # zstd's fastest ordinary level: the disk is rarely faster
_WINDOW_MAX = 1 << 23   # bytes that a zstd frame may ask its reader to keep; our own ask for less
_FRAME_MAX = BLOCK_PAGES * PAGE + (1 << 14)     # bytes: what cannot be compressed is a little longer
_RUNS = 8               # of pages in a block that are more work than the whole block
_AHEAD = 32             # blocks, 8 MiB, whose way to the disk begins at once
_INDEX = struct.Struct("<II")       # zstd's number of a skippable frame, bytes that follow
_SKIPPABLE = 0x184D2A50

Pages = NDArray[np.int64]
Data = NDArray[np.uint8]


class Scratch:
    """What one thread needs to read blocks: ``pages`` (uint8 [64, 4096]), and a decompressor."""

    def __init__(self) -> None:
        self.pages = np.empty((BLOCK_PAGES, PAGE), np.uint8)
        self.unpacker = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX)


def touched_pages(fd: int, total: int) -> Words:
    """The pages of a segment that may be other than zero."""
    bits = np.zeros(len(all_pages(total)) * BLOCK_PAGES, bool)
    for start, end in data_extents(fd, total * PAGE):
        bits[start // PAGE:end // PAGE] = True
    return np.packbits(bits, bitorder="little").view(np.uint64)


class PageWriter:
    """Writes a ``.mem`` and its ``.map``; pages may be written again. ``passing``: the ``.mem`` is to be compressed
    next, and need never be on the disk. ``with`` it."""

    def __init__(self, directory: Path, name: str, pages: int, *, passing: bool = False) -> None:
        self._path = directory / name
        self._passing = passing
        self._total = pages
        self._map = PageMap.empty(pages)
        self._written = np.zeros(len(self._map.present), np.uint64)     # not a hole
        self._stale = np.zeros(len(self._map.present), bool)    # blocks whose checksum is of what was there before
        self._file = open(self._path.with_suffix(".mem"), "wb+", buffering=0)  # noqa: SIM115, closed by close()
        os.ftruncate(self._file.fileno(), pages * PAGE)

    def write(self, memory: Data, pages: Pages) -> None:
        """Put these pages of the slot's memory (uint8, [pages * 4096]) into the file; ``pages`` ascend. Raises
        OSError."""
        self.put_pages(pages, memory.reshape(-1, PAGE)[pages])

    def put_pages(self, pages: Pages, data: Data, done: Callable[[int], None] = lambda pages: None) -> None:
        """Put these pages into the file: ``data`` [n, 4096]; ``pages`` ascend. ``done`` is told how many there
        are so far. Raises OSError."""
        starts = [0, *(np.flatnonzero(np.diff(pages // BLOCK_PAGES)) + 1).tolist(), len(pages)]

        def one(at: int, scratch: None) -> int:
            part = slice(starts[at], starts[at + 1])
            mask = sum(1 << page for page in (pages[part] % BLOCK_PAGES).tolist())
            self._put(int(pages[part][0]) // BLOCK_PAGES, mask, data[part])
            return len(pages[part])

        if len(pages):
            in_threads(range(len(starts) - 1), lambda: None, one, done)

    def put(self, first: int, data: Data) -> None:
        """Put pages ``first``, ``first + 1``, … into the file, uint8 [pages * 4096]. Raises OSError."""
        count = len(data) // PAGE
        view = data.reshape(-1, PAGE)
        at = 0
        while at < count:
            block, start = divmod(first + at, BLOCK_PAGES)
            size = min(BLOCK_PAGES - start, count - at)
            self._put(block, ((1 << size) - 1) << start, view[at:at + size])
            at += size

    def copy(self, fd: int, words: Words, done: Callable[[int], None] = lambda pages: None) -> None:
        """Put these pages of the slot's memory into the file; ``fd``: its segment. What somebody writes there
        meanwhile is in the file as it was or as it is, and its checksum is of what is in the file. ``done`` is told
        how many pages there are so far. Raises OSError."""
        unread = words & (touched_pages(fd, self._total) | self._written) == 0      # blocks that are zero, as they were
        self._map.present[unread] |= words[unread]

        size = BLOCK_PAGES * PAGE

        def one(block: int, scratch: Data) -> int:
            mask = int(words[block])
            if (mask & ~(mask << 1)).bit_count() >= _RUNS:
                mask |= int(self._map.present[block])       # as they are now: it is less work than each by itself
            self._put(block, mask, _read_block(fd, block, mask, scratch))
            if block % _AHEAD == _AHEAD - 1 and not self._passing:
                write_back(self._file.fileno(), max(0, block + 1 - 2 * _AHEAD) * size, _AHEAD * size)
            return int(words[block]).bit_count()

        before = int(np.bitwise_count(words[unread]).sum())
        in_threads(np.flatnonzero(words * ~unread).tolist(), lambda: np.empty((BLOCK_PAGES, PAGE), np.uint8), one,
                   lambda pages: done(before + pages), threads=1)

    def put_block(self, block: int, mask: int, filled: int, data: Data) -> None:
        """Put the pages ``mask`` of a block into the file: ``data`` [n, 4096] of those that are not zero
        (``filled``). Raises OSError."""
        start, fd = block * BLOCK_PAGES, self._file.fileno()
        at = 0
        for first, count in bit_runs(filled):
            write_at(fd, data[at:at + count].reshape(-1).data, (start + first) * PAGE)
            at += count
        written = int(self._written[block])
        for first, count in bit_runs(written & mask & ~filled):     # else the hole says the same
            write_at(fd, memoryview(bytes(count * PAGE)), (start + first) * PAGE)
        before = int(self._map.filled[block])
        self._written[block] = written | filled
        self._map.present[block] = int(self._map.present[block]) | mask
        self._map.filled[block] = before & ~mask | filled
        if not before & ~mask:
            self._map.sums[block] = checksum_of(data)
            self._stale[block] = False
        elif filled or before & mask:
            self._stale[block] = True

    def _put(self, block: int, mask: int, data: Data) -> None:
        solid = is_filled(data)
        if solid.all():
            self.put_block(block, mask, mask, data)
        else:
            pages = page_numbers(mask)[solid]
            self.put_block(block, mask, sum(1 << page for page in pages.tolist()), data[solid])

    def finish(self) -> dict[str, int | str]:
        """Write the map, sync both (``passing``: the map); {pages, zero_pages, checksum}. Raises OSError."""
        fd = self._file.fileno()

        def again(block: int, scratch: Data) -> int:
            self._map.sums[block] = checksum_of(_read_block(fd, block, int(self._map.filled[block]), scratch))
            return 1

        in_threads(np.flatnonzero(self._stale).tolist(), lambda: np.empty((BLOCK_PAGES, PAGE), np.uint8), again)
        self._stale[:] = False
        self._map.save(self._path.with_suffix(".map"))
        if not self._passing:
            os.fsync(fd)
        return {"pages": self._map.pages, "zero_pages": self._map.zero_pages, "checksum": self._map.checksum()}

    def close(self) -> None:
        """Idempotent. What was not finished is not whole."""
        self._file.close()

    def __enter__(self) -> PageWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read_all(fd: int, data: Data, at: int) -> None:
    """Raises OSError, also when there is less."""
    view = data.reshape(-1).data
    while view:
        done = os.preadv(fd, [view], at)
        if not done:
            raise OSError(f"it ends before byte {at + len(view):#x}")
        view, at = view[done:], at + done


def _read_block(fd: int, block: int, filled: int, scratch: Data) -> Data:
    """The pages ``filled`` of a block, of a segment or a ``.mem``. Raises OSError."""
    at = 0
    for first, count in bit_runs(filled):
        _read_all(fd, scratch[at:at + count], (block * BLOCK_PAGES + first) * PAGE)
        at += count
    return scratch[:at]


def compress(directory: Path, name: str) -> None:
    """Replace ``name.mem`` by ``name.zst``. Raises OSError and PageFileError."""
    source, target = directory / f"{name}.mem", directory / f"{name}.zst"
    there = PageMap.load(directory / f"{name}.map", os.stat(source).st_size // PAGE, None)
    blocks = np.flatnonzero(there.filled)
    sizes = np.zeros(len(blocks), "<u4")
    with source.open("rb", buffering=0) as raw, target.open("wb", buffering=0) as file:
        fd, out, at = raw.fileno(), file.fileno(), _INDEX.size + sizes.nbytes
        begun, ahead = 0, _AHEAD * BLOCK_PAGES * PAGE      # bytes that are on their way to the disk

        def pack(block: int, tools: tuple[zstandard.ZstdCompressor, Data]) -> bytes:
            packer, scratch = tools
            return packer.compress(_read_block(fd, block, int(there.filled[block]), scratch).data)

        with contextlib.closing(in_order(blocks.tolist(), lambda: (zstandard.ZstdCompressor(_LEVEL),
                                         np.empty((BLOCK_PAGES, PAGE), np.uint8)), pack)) as frames:
            for number, frame in enumerate(frames):
                write_at(out, memoryview(frame), at)
                sizes[number] = len(frame)
                at += len(frame)
                if at - begun >= 2 * ahead:
                    write_back(out, begun, ahead)
                    begun += ahead
        write_at(out, memoryview(_INDEX.pack(_SKIPPABLE, sizes.nbytes) + sizes.tobytes()), 0)
        os.fsync(out)
    source.unlink()


class PageFile:
    """A ``.map`` and its ``.mem`` or ``.zst``, blocks of which are read in any order, by any number of threads.
    ``with`` it. ``map``: its PageMap."""

    def __init__(self, directory: Path, name: str, total: int, checksum: str) -> None:
        """Of a slot of ``total`` pages. Raises PageFileError."""
        path = directory / name
        self._path = path
        self.map = PageMap.load(path.with_suffix(".map"), total, checksum)
        packed = path.with_suffix(".zst")
        self._starts: NDArray[np.int64] | None = None       # of each block's frame, and one more
        self._open = packed if packed.exists() else path.with_suffix(".mem")
        self._file = open_input(self._open, refuse)
        try:
            size = os.fstat(self._file.fileno()).st_size
            if self._open == packed:
                self._starts = self._frames(size)
            elif size != total * PAGE:
                raise refuse(self._open, f"has {size} bytes, expected {total * PAGE}")
        except BaseException:
            self._file.close()
            raise

    def _frames(self, size: int) -> NDArray[np.int64]:
        filled = self.map.filled != 0
        count = int(filled.sum())
        first = _INDEX.size + 4 * count
        try:
            head = os.pread(self._file.fileno(), first, 0)
        except OSError as exc:
            raise refuse(self._open, f"cannot be read: {exc.strerror}") from None
        if len(head) != first or _INDEX.unpack_from(head) != (_SKIPPABLE, 4 * count):
            raise refuse(self._open, "is damaged (it does not begin with the sizes of its frames)")
        sizes = np.zeros(len(filled), np.int64)
        sizes[filled] = np.frombuffer(head, "<u4", offset=_INDEX.size)
        starts = np.concatenate(([first], first + np.cumsum(sizes)))
        if (sizes > _FRAME_MAX).any() or starts[-1] > size:
            raise refuse(self._open, "is damaged: it ends too early, or the sizes of its frames are not right")
        return starts

    @property
    def packed(self) -> bool:
        """It is a ``.zst``."""
        return self._starts is not None

    def read(self, block: int, scratch: Scratch) -> Data:
        """The block's pages that are not zero (``map.filled``), [n, 4096], as they were saved; they are good until
        ``scratch`` is used again. Raises PageFileError."""
        filled = int(self.map.filled[block])
        try:
            data = self._read(block, filled, scratch)
        except (OSError, zstandard.ZstdError) as exc:
            raise refuse(self._path, f"cannot be read: {exc}") from None
        if checksum_of(data) != int(self.map.sums[block]):
            raise refuse(self._path, f"is damaged (the checksum of pages {block * BLOCK_PAGES} to "
                                     f"{(block + 1) * BLOCK_PAGES - 1} does not match)")
        return data

    def _read(self, block: int, filled: int, scratch: Scratch) -> Data:
        fd = self._file.fileno()
        if self._starts is None:
            return _read_block(fd, block, filled, scratch.pages)
        if not filled:
            return scratch.pages[:0]
        start, end = int(self._starts[block]), int(self._starts[block + 1])
        frame = os.pread(fd, end - start, start)
        size = filled.bit_count() * PAGE
        if zstandard.frame_content_size(frame) != size:     # or it would be given as much memory as it says
            raise zstandard.ZstdError("a frame does not have as many bytes as it should")
        return np.frombuffer(scratch.unpacker.decompress(frame), np.uint8).reshape(-1, PAGE)

    def verify(self, done: Callable[[int], None] = lambda pages: None) -> int:
        """Read everything; the pages in it, as ``done`` is told them by and by. Raises PageFileError."""
        zeros = self.map.zero_pages
        blocks = np.flatnonzero(self.map.filled | (self.map.sums != 0)).tolist()
        return zeros + in_threads(blocks, Scratch, lambda block, scratch: len(self.read(block, scratch)),
                                  lambda pages: done(zeros + pages))

    def close(self) -> None:
        """Idempotent."""
        self._file.close()

    def __enter__(self) -> PageFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_pages(directory: Path, name: str, total: int, checksum: str,
               memory: NDArray[np.uint8] | None = None) -> Iterator[tuple[int, int]]:
    """Read every page in the file into its place in ``memory`` (uint8, [total * 4096]; None: only to look at it),
    piece by piece, and yield (first page, pages) of each. Raises PageFileError, when it comes to what is damaged:
    what was read before it is right."""
    for first, data in iter_pages(directory, name, total, checksum):
        if memory is not None:
            memory[first * PAGE:first * PAGE + len(data)] = data
        yield first, len(data) // PAGE


def iter_pages(directory: Path, name: str, total: int, checksum: str) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """As ``read_pages``, and yield each piece's bytes, which are good until the next. Raises PageFileError as that
    does."""
    scratch, pages = Scratch(), np.empty((BLOCK_PAGES, PAGE), np.uint8)
    with PageFile(directory, name, total, checksum) as file:
        for block in np.flatnonzero(file.map.present | (file.map.sums != 0)).tolist():
            pages[:] = 0
            pages[page_numbers(int(file.map.filled[block]))] = file.read(block, scratch)
            for first, count in bit_runs(int(file.map.present[block])):
                yield block * BLOCK_PAGES + first, pages[first:first + count].reshape(-1)
