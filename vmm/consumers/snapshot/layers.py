"""What a chain holds of one slot: each page as the newest of its page files that has it, read block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ipc.linux.files import write_at

from .pagefile import PAGE, PageFile, PageWriter, Scratch
from .pagemap import BLOCK_PAGES, bit_runs, page_numbers
from .threads import THREADS, behind, in_threads

__all__ = ["Block", "SlotPages"]

_NOBODY: Callable[[int], None] = lambda pages: None     # noqa: E731


class Block(NamedTuple):
    """Pages that are read together: a block of one of the files."""

    file: int       # 0 is the newest
    number: int


class SlotPages:
    """The slot's pages, in the page files ``files`` ((directory, name, checksum), the oldest first) of ``total`` pages
    each. ``with`` it; several threads may read."""

    def __init__(self, files: list[tuple[Path, str, str]], total: int) -> None:
        """Raises PageFileError."""
        self.total = total
        self._open = contextlib.ExitStack()
        self._files: list[PageFile] = []
        self._have: list[NDArray[np.uint64]] = []       # of each file, the pages that no newer one has
        try:
            for directory, name, checksum in reversed(files):
                self._files.append(self._open.enter_context(PageFile(directory, name, total, checksum)))
        except BaseException:
            self._open.close()
            raise
        seen = np.zeros(-(-total // BLOCK_PAGES), np.uint64)
        #: Pages that are not zero, uint64, a bit each.
        self.filled = seen.copy()
        for file in self._files:
            self._have.append(file.map.present & ~seen)
            self.filled |= self._have[-1] & file.map.filled
            seen |= file.map.present

    @property
    def pages(self) -> int:
        """That are not zero."""
        return int(np.bitwise_count(self.filled).sum())

    def blocks(self) -> list[Block]:
        """What has to be read to have every page once, the newest file first."""
        return [Block(file, number) for file in range(self.files) for number in self.numbers(file).tolist()]

    @property
    def files(self) -> int:
        """How many there are; 0 is the newest."""
        return len(self._files)

    def numbers(self, file: int) -> NDArray[np.int64]:
        """The blocks to be read of this file, ascending."""
        return np.flatnonzero(self._have[file] & self._files[file].map.filled)

    def find(self, page: int) -> Block | None:
        """The block that this page is read with; None: it is zero."""
        number, bit = divmod(page, BLOCK_PAGES)
        return next((block for file in range(self.files) if self.mask(block := Block(file, number)) >> bit & 1), None)

    def mask(self, block: Block) -> int:
        """The pages that ``read`` gives of it, a bit each."""
        return int(self._have[block.file][block.number]) & int(self._files[block.file].map.filled[block.number])

    def read(self, block: Block, scratch: Scratch) -> NDArray[np.uint8]:
        """Its pages that belong to the slot as it was (``mask``), [n, 4096], good until ``scratch`` is used again.
        Raises PageFileError."""
        file = self._files[block.file]
        data = file.read(block.number, scratch)
        filled, wanted = int(file.map.filled[block.number]), self.mask(block)
        return data if filled == wanted else data[np.isin(page_numbers(filled), page_numbers(wanted))]

    def read_into(self, memory: NDArray[np.uint8]) -> None:
        """``memory``: zero, uint8 [bytes]. Raises PageFileError."""
        view = memory.reshape(-1, PAGE)

        def one(block: Block, scratch: Scratch) -> int:
            data = self.read(block, scratch)
            view[page_numbers(self.mask(block)) + block.number * BLOCK_PAGES] = data
            return len(data)

        in_threads(self.blocks(), Scratch, one)

    def copy_to(self, fds: list[int], done: Callable[[int], None] = _NOBODY) -> None:
        """Into these segments, which are zero. Each page is read once. Written through a descriptor it costs no page
        fault, and where there is no room, that is an error. ``done`` is told how many pages there are so far. Raises
        PageFileError and OSError."""
        def one(block: Block, scratch: Scratch) -> int:
            data = self.read(block, scratch)
            start, at = block.number * BLOCK_PAGES, 0
            for first, count in bit_runs(self.mask(block)):
                for fd in fds:
                    write_at(fd, data[at:at + count].reshape(-1).data, (start + first) * PAGE)
                at += count
            return at

        in_threads(self.blocks(), Scratch, one, done,
                   threads=THREADS if any(file.packed for file in self._files) else 1)

    def merge_into(self, writer: PageWriter, done: Callable[[int], None] = _NOBODY) -> None:
        """Every page that is in one of the files, as it is in the newest that has it. Raises PageFileError and
        OSError."""
        before = 0
        for index, have in enumerate(self._have):
            def one(number: int, scratch: Scratch, index: int = index, have: NDArray[np.uint64] = have) -> int:
                block, mask = Block(index, number), int(have[number])
                writer.put_block(number, mask, self.mask(block), self.read(block, scratch))
                return mask.bit_count()

            before += in_threads(np.flatnonzero(have).tolist(), Scratch, one,
                                 behind(lambda count, total: done(count), before, 0))

    def close(self) -> None:
        """Idempotent."""
        self._open.close()

    def __enter__(self) -> SlotPages:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
