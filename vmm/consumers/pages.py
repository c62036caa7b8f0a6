"""What migrations and snapshots ask of pages: which are zero, which were ever touched, which follow one another."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ipc.shm import PAGE_SIZE, data_extents

__all__ = ["is_filled", "runs", "touched"]


def is_filled(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """bool[n]: which of the pages [n, 4096] are not zero."""
    words = data.view(np.uint64)
    found = words[:, 0] != 0        # most pages are told by their first word, without reading the rest
    if not found.all():
        doubtful = np.flatnonzero(~found)
        found[doubtful] = (words if len(doubtful) == len(words) else words[doubtful]).any(axis=1)
    return found


def runs(numbers: NDArray[np.int64]) -> Iterator[tuple[int, int, slice]]:
    """Of page numbers, which ascend: (first page, pages, where they are in ``numbers``) of those that follow one
    another."""
    bounds = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    for start, end in pairwise(bounds):
        if end > start:
            yield int(numbers[start]), end - start, slice(start, end)


def touched(fd: int, size: int) -> NDArray[np.int64]:
    """The pages of a slot (``fd``: of its segment, ``size``: in bytes) but for those that were never touched, which are
    zero. Ascending."""
    return np.concatenate([np.zeros(0, np.int64),
                           *(np.arange(start // PAGE_SIZE, end // PAGE_SIZE) for start, end in data_extents(fd, size))])
