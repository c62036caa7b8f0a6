"""Pages that the guest writes in every round: sent before the end, they would be sent in vain. No I/O."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Hot", "Todo", "joined", "pages"]

Todo = dict[int, NDArray[np.int64]]     # {slot: pages, ascending}

_HOT = 2                    # rounds one after the other in which a page was dirtied, from which on it is hot

_NONE = np.zeros(0, np.int64)


def joined(one: Todo, other: Todo) -> Todo:
    """What is in either."""
    return {slot: _union(one.get(slot, _NONE), other.get(slot, _NONE)) for slot in {*one, *other}}


def _union(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of two that ascend. The guest may stand still meanwhile: numpy's union1d, which does not know that they do, takes
    up to ten times as long."""
    if not len(one) or not len(other):
        return one if len(one) else other
    both = np.concatenate([one, other])
    both.sort(kind="stable")        # two runs, which it merges
    again = np.zeros(len(both), bool)
    again[1:] = both[1:] == both[:-1]
    return both[~again]


def pages(todo: Todo) -> int:
    """How many."""
    return sum(len(each) for each in todo.values())


class Hot:
    """How often each page of a slot was dirtied of late."""

    def __init__(self) -> None:
        self._rounds: dict[int, NDArray[np.uint8]] = {}     # {slot: rounds up to the last, without a break}

    def look(self, dirty: Todo, sizes: dict[int, int]) -> None:
        """These pages have been dirtied in the last round; ``sizes``: {slot: its pages}."""
        for slot, size in sizes.items():
            before = self._rounds.get(slot)
            now = np.zeros(size, np.uint8)
            found = dirty.get(slot, _NONE)
            now[found] = 1 if before is None else np.minimum(before[found], 254) + 1
            self._rounds[slot] = now

    def split(self, left: Todo, most: float) -> tuple[Todo, Todo]:
        """What is left: to be sent now, and kept until the end. None is kept where those that are hot are more than
        ``most``: they will not fit into the downtime anyway."""
        hot = {slot: self._rounds[slot][each] >= _HOT for slot, each in left.items() if slot in self._rounds}
        if sum(int(each.sum()) for each in hot.values()) > most:
            return left, {}
        return ({slot: each[~hot[slot]] if slot in hot else each for slot, each in left.items()},
                {slot: left[slot][each] for slot, each in hot.items()})
