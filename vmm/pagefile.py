"""Files that hold some pages of a memory slot: which, and their bytes.

``<name>.map``
    A bitmap of the pages that are in the file, uint64 words, page *p* at word ``p // 64`` bit ``p % 64``.
``<name>.mem``
    As long as the slot; page *p* at byte ``4096 p``. Holes where a page is zero, or not in the file.
``<name>.zst``
    Instead of it: the pages of the map, in their order, as one zstd stream.

The checksum is XXH3-128 of the map followed by the pages in their order, whatever the file's form: it finds
damage, at the speed of memory; it is no signature.
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

from .errors import VmmError

__all__ = ["PageFileError", "PageWriter", "compress", "read_pages"]

PAGE = 4096
_CHUNK = 1024       # pages at a time: 4 MiB
_LEVEL = 1          # zstd's fastest ordinary level: the disk is rarely faster

Pages = NDArray[np.int64]


class PageFileError(VmmError):
    """A file that is damaged, or not one of these."""


def runs(pages: Pages) -> Iterator[tuple[int, int]]:
    """Ascending page numbers as (first, count) of neighbours."""
    if len(pages) == 0:
        return
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    for part in np.split(pages, breaks):
        yield int(part[0]), len(part)


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
        """Put these pages of the slot's memory (uint8, [pages * 4096]) into the file. Raises OSError."""
        view = memory.reshape(-1, PAGE)
        for at in range(0, len(pages), _CHUNK):
            chunk = pages[at:at + _CHUNK]
            filled = view[chunk].view(np.uint64).any(axis=1)
            # A zero page over one that was not must be written; else its hole says the same.
            solid = chunk[filled | self._written[chunk]]
            for first, count in runs(solid):
                _write_all(self._file.fileno(), memory[first * PAGE:(first + count) * PAGE].data, first * PAGE)
            self._written[solid] = True
            self._zero[chunk] = ~filled
        self._present[pages] = True

    def finish(self) -> dict[str, int | str]:
        """Write the map, sync both; {pages, zero_pages, checksum}."""
        bits = np.packbits(self._present, bitorder="little")
        self._words.view(np.uint8)[:len(bits)] = bits
        digest = xxhash.xxh3_128(self._words.data)
        fd = self._file.fileno()
        for _, data in _read_plain(fd, np.flatnonzero(self._present), np.empty(_CHUNK * PAGE, np.uint8)):
            digest.update(data.data)
        with open(self._path.with_suffix(".map"), "wb") as file:
            file.write(self._words.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.fsync(fd)
        return {"pages": int(self._present.sum()), "zero_pages": int(self._zero.sum()),
                "checksum": digest.hexdigest()}

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> PageWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _write_all(fd: int, data: memoryview, at: int) -> None:
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done


def _pieces(pages: Pages) -> Iterator[tuple[int, int]]:
    """Runs, in pieces of at most a chunk."""
    for first, count in runs(pages):
        for at in range(0, count, _CHUNK):
            yield first + at, min(_CHUNK, count - at)


def compress(directory: Path, name: str) -> None:
    """Replace ``name.mem`` by ``name.zst``."""
    source, target = directory / f"{name}.mem", directory / f"{name}.zst"
    pages = _present(directory / f"{name}.map")
    with source.open("rb", buffering=0) as raw, target.open("wb") as file:
        with zstandard.ZstdCompressor(_LEVEL, threads=-1).stream_writer(file, closefd=False) as stream:
            for first, count in _pieces(pages):
                stream.write(os.pread(raw.fileno(), count * PAGE, first * PAGE))
        file.flush()
        os.fsync(file.fileno())
    source.unlink()


def _present(path: Path) -> Pages:
    return np.flatnonzero(np.unpackbits(np.fromfile(path, np.uint8), bitorder="little"))


def read_pages(directory: Path, name: str, total: int, checksum: str,
               memory: NDArray[np.uint8] | None = None) -> Iterator[tuple[int, int]]:
    """Read every page in the file into its place in ``memory`` (uint8, [total * 4096]; None: only to look at it),
    piece by piece, and yield (first page, pages) of each. Raises PageFileError, at the latest when the last piece
    was read and the checksum does not match: what is in memory is not to be trusted before the end."""
    path = directory / name
    try:
        words = np.fromfile(path.with_suffix(".map"), np.uint8)
        if len(words) != 8 * word_count(total):
            raise PageFileError(f"{path}.map: has {len(words)} bytes, {8 * word_count(total)} were expected")
        pages = np.flatnonzero(np.unpackbits(words, bitorder="little"))
        if len(pages) and pages[-1] >= total:
            raise PageFileError(f"{path}.map: names page {pages[-1]:#x} of a slot of {total} pages")
        digest = xxhash.xxh3_128(words.data)
        for first, data in _read(path, pages, total, memory):
            digest.update(data.data)
            yield first, len(data) // PAGE
    except FileNotFoundError as exc:
        raise PageFileError(f"{exc.filename}: is missing") from None
    except (OSError, zstandard.ZstdError) as exc:
        raise PageFileError(f"{path}: cannot be read: {exc}") from None
    if digest.hexdigest() != checksum:
        raise PageFileError(f"{path}: is damaged (its checksum does not match)")


def _read(path: Path, pages: Pages, total: int,
          memory: NDArray[np.uint8] | None) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    scratch = np.empty(_CHUNK * PAGE, np.uint8) if memory is None else None
    packed = path.with_suffix(".zst")
    if packed.exists():
        with packed.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
            for first, count in _pieces(pages):
                data = _place(first, count, memory, scratch)
                if stream.readinto(data.data) != len(data):
                    raise PageFileError(f"{packed}: ends too early")
                yield first, data
        return
    plain = path.with_suffix(".mem")
    with plain.open("rb", buffering=0) as raw:
        size = os.fstat(raw.fileno()).st_size
        if size != total * PAGE:
            raise PageFileError(f"{plain}: has {size} bytes, {total * PAGE} were expected")
        yield from _read_plain(raw.fileno(), pages, scratch, memory)


def _read_plain(fd: int, pages: Pages, scratch: NDArray[np.uint8] | None,
                memory: NDArray[np.uint8] | None = None) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    for first, count in _pieces(pages):
        data = _place(first, count, memory, scratch)
        if os.preadv(fd, [data.data], first * PAGE) != len(data):
            raise OSError(f"{count} pages at {first:#x} could not be read whole")
        yield first, data


def _place(first: int, count: int, memory: NDArray[np.uint8] | None,
           scratch: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
    """Where these pages go: their place in memory, or the beginning of the scratch buffer."""
    if memory is not None:
        return memory[first * PAGE:(first + count) * PAGE]
    assert scratch is not None
    return scratch[:count * PAGE]
