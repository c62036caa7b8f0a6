"""Files that hold some pages of a memory slot: which, and their bytes.

``<name>.map``
    A bitmap of the pages that are in the file, uint64 words, page *p* at word ``p // 64`` bit ``p % 64``.
``<name>.mem``
    As long as the slot; page *p* at byte ``4096 p``. Holes where a page is zero, or not in the file.
``<name>.zst``
    Instead of it: the pages of the map, in their order, as one zstd stream.

The checksum is XXH3-128 of the map followed by the pages in their order, whatever the file's form: it finds
damage, at the speed of memory; it is no signature.

What is held in memory does not grow with the pages' bytes: a few bytes per page of the slot, and a piece.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from ipc.bitmap import word_count
from ipc.shm import PAGE_SIZE

from ...errors import VmmError
from ...inputs import input_name, open_input

__all__ = ["PAGE", "PageFileError", "PageWriter", "compress", "iter_pages", "read_pages"]

PAGE = PAGE_SIZE
_CHUNK = 1024       # pages at a time: 4 MiB
_LEVEL = 1          # zstd's fastest ordinary level: the disk is rarely faster
_WINDOW_MAX = 1 << 23   # bytes that a zstd frame may ask its reader to keep; our own ask for less

Pages = NDArray[np.int64]
Present = NDArray[np.bool_]     # one per page of the slot


class PageFileError(VmmError):
    """A file that is damaged, or not one of these."""


def _refuse(path: Path, what: str) -> PageFileError:
    return PageFileError(f"{input_name(path)}: {what}")


class PageWriter:
    """Writes a ``.mem`` and its ``.map``; pages may be written again. ``with`` it."""

    def __init__(self, directory: Path, name: str, pages: int) -> None:
        self._path = directory / name
        self._words = np.zeros(word_count(pages), np.uint64)
        self._present = np.zeros(pages, bool)
        self._written = np.zeros(pages, bool)       # not a hole
        self._zero = np.zeros(pages, bool)
        self._file = open(self._path.with_suffix(".mem"), "wb+", buffering=0)  # noqa: SIM115, closed by close()
        os.ftruncate(self._file.fileno(), pages * PAGE)

    def write(self, memory: NDArray[np.uint8], pages: Pages) -> None:
        """Put these pages of the slot's memory (uint8, [pages * 4096]) into the file; ``pages`` ascend. Raises
        OSError."""
        view = memory.reshape(-1, PAGE)
        for at in range(0, len(pages), _CHUNK):
            self._put(pages[at:at + _CHUNK], view[pages[at:at + _CHUNK]])

    def put(self, first: int, data: NDArray[np.uint8]) -> None:
        """Put pages ``first``, ``first + 1``, … into the file, uint8 [pages * 4096]. Raises OSError."""
        view = data.reshape(-1, PAGE)
        self._put(np.arange(first, first + len(view)), view)

    def _put(self, pages: Pages, data: NDArray[np.uint8]) -> None:
        filled = data.view(np.uint64).any(axis=1)
        # A zero page over one that was not must be written; else its hole says the same.
        solid = np.flatnonzero(filled | self._written[pages])
        breaks = np.flatnonzero(np.diff(pages[solid]) != 1) + 1
        for run in np.split(solid, breaks):
            if len(run):
                _write_all(self._file.fileno(), data[run[0]:run[-1] + 1].reshape(-1).data,
                           int(pages[run[0]]) * PAGE)
        self._written[pages[solid]] = True
        self._zero[pages] = ~filled
        self._present[pages] = True

    def finish(self) -> dict[str, int | str]:
        """Write the map, sync both; {pages, zero_pages, checksum}."""
        bits = np.packbits(self._present, bitorder="little")
        self._words.view(np.uint8)[:len(bits)] = bits
        digest = xxhash.xxh3_128(self._words.data)
        fd = self._file.fileno()
        for _, data in _read_plain(fd, self._present, np.empty(_CHUNK * PAGE, np.uint8)):
            digest.update(data.data)
        with open(self._path.with_suffix(".map"), "wb") as file:
            file.write(self._words.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.fsync(fd)
        return {"pages": int(self._present.sum()), "zero_pages": int(self._zero.sum()),
                "checksum": digest.hexdigest()}

    def close(self) -> None:
        """Idempotent. What was not finished is not whole."""
        self._file.close()

    def __enter__(self) -> PageWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _write_all(fd: int, data: memoryview, at: int) -> None:
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done


def _pieces(present: Present) -> Iterator[tuple[int, int]]:
    """The pages that are there as (first, count) of neighbours, in pieces of at most a chunk."""
    for at in range(0, len(present), _CHUNK):
        part = present[at:at + _CHUNK]
        if part.all():
            yield at, len(part)
            continue
        pages = np.flatnonzero(part)
        for run in np.split(pages, np.flatnonzero(np.diff(pages) != 1) + 1):
            if len(run):
                yield at + int(run[0]), len(run)


def compress(directory: Path, name: str) -> None:
    """Replace ``name.mem`` by ``name.zst``."""
    source, target = directory / f"{name}.mem", directory / f"{name}.zst"
    present = np.unpackbits(np.fromfile(directory / f"{name}.map", np.uint8), bitorder="little").view(np.bool_)
    with source.open("rb", buffering=0) as raw, target.open("wb") as file:
        with zstandard.ZstdCompressor(_LEVEL, threads=-1).stream_writer(file, closefd=False) as stream:
            for first, count in _pieces(present):
                stream.write(os.pread(raw.fileno(), count * PAGE, first * PAGE))
        file.flush()
        os.fsync(file.fileno())
    source.unlink()


def read_pages(directory: Path, name: str, total: int, checksum: str,
               memory: NDArray[np.uint8] | None = None) -> Iterator[tuple[int, int]]:
    """Read every page in the file into its place in ``memory`` (uint8, [total * 4096]; None: only to look at it),
    piece by piece, and yield (first page, pages) of each. Raises PageFileError, at the latest when the last piece
    was read and the checksum does not match: what is in memory is not to be trusted before the end."""
    for first, data in iter_pages(directory, name, total, checksum, memory):
        yield first, len(data) // PAGE


def iter_pages(directory: Path, name: str, total: int, checksum: str,
               memory: NDArray[np.uint8] | None = None) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """As ``read_pages``, and yield each piece's bytes, which are good until the next. Raises PageFileError, for
    a wrong checksum after the last piece."""
    path = directory / name
    try:
        words, present = _read_map(path.with_suffix(".map"), total)
        digest = xxhash.xxh3_128(words)
        for first, data in _read(path, present, memory):
            digest.update(data.data)
            yield first, data
    except (OSError, zstandard.ZstdError) as exc:
        raise PageFileError(f"{input_name(path)}: cannot be read: {exc}") from None
    if digest.hexdigest() != checksum:
        raise PageFileError(f"{input_name(path)}: is damaged (its checksum does not match)")


def _read_map(path: Path, total: int) -> tuple[bytes, Present]:
    size = 8 * word_count(total)
    with open_input(path, _refuse) as file:
        words = file.read(size + 1)
    if len(words) != size:
        raise _refuse(path, f"has {f'more than {size}' if len(words) > size else len(words)} bytes, expected {size}")
    present = np.unpackbits(np.frombuffer(words, np.uint8), bitorder="little").view(np.bool_)
    if present[total:].any():
        raise _refuse(path, f"lists a page beyond the slot's {total} pages")
    return words, present[:total]


def _read(path: Path, present: Present,
          memory: NDArray[np.uint8] | None) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    scratch = np.empty(_CHUNK * PAGE, np.uint8) if memory is None else None
    packed = path.with_suffix(".zst")
    if packed.exists():
        unpacker = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX)
        with open_input(packed, _refuse) as file, unpacker.stream_reader(file) as stream:
            for first, count in _pieces(present):
                data = _place(first, count, memory, scratch)
                if stream.readinto(data.data) != len(data):
                    raise _refuse(packed, "is damaged: it ends too early")
                yield first, data
        return
    plain = path.with_suffix(".mem")
    with open_input(plain, _refuse) as raw:
        size = os.fstat(raw.fileno()).st_size
        if size != len(present) * PAGE:
            raise _refuse(plain, f"has {size} bytes, expected {len(present) * PAGE}")
        yield from _read_plain(raw.fileno(), present, scratch, memory)


def _read_plain(fd: int, present: Present, scratch: NDArray[np.uint8] | None,
                memory: NDArray[np.uint8] | None = None) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    for first, count in _pieces(present):
        data = _place(first, count, memory, scratch)
        if os.preadv(fd, [data.data], first * PAGE) != len(data):
            raise OSError(f"{count} pages at {first:#x} could not be read completely")
        yield first, data


def _place(first: int, count: int, memory: NDArray[np.uint8] | None,
           scratch: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    """Where these pages go: their place in memory, or the beginning of the scratch buffer."""
    if memory is not None:
        return memory[first * PAGE:(first + count) * PAGE]
    assert scratch is not None
    return scratch[:count * PAGE]
