"""Different values among many: pages that were dirtied more than once count once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Distinct", "distinct"]

_FRESH = 1 << 20        # values that are kept as they came, at least


def distinct(values: NDArray[Any]) -> NDArray[Any]:
    """Each value once, ascending. As np.unique, which hashes integers (numpy 2.4) and takes 8 to 20 times as long."""
    ordered = np.sort(values)
    first = np.ones(len(ordered), bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return ordered[first]


class Distinct:
    """Those that there have been so far. Memory grows with these, not with all that were seen."""

    def __init__(self, dtype: type[np.integer[Any]]) -> None:
        self._known: NDArray[Any] = np.zeros(0, dtype)
        self._fresh: list[NDArray[Any]] = []
        self._waiting = 0

    def add(self, values: NDArray[Any]) -> None:
        """In any order, of that type. They are kept: nobody changes them any more."""
        self._fresh.append(values)
        self._waiting += len(values)
        if self._waiting > max(_FRESH, len(self._known)):
            self.values()

    def values(self) -> NDArray[Any]:
        """Ascending."""
        if self._fresh:
            self._known = distinct(np.concatenate([self._known, *self._fresh]))
            self._fresh.clear()
            self._waiting = 0
        return self._known
