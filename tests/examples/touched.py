"""A consumer in one file: which pages were dirtied most often, over some syncs."""

from __future__ import annotations

from collections import Counter

from vmm import Machine


def most_dirtied(machine: Machine, syncs: int, top: int = 5) -> list[tuple[tuple[int, int], int]]:
    """[((slot, page), in how many of the syncs it was dirty)], the most frequent first. Raises VmmError."""
    counts: Counter[tuple[int, int]] = Counter()
    machine.register("most_dirtied")
    try:
        for _ in range(syncs):
            for slot, ranges in machine.sync("most_dirtied").slots.items():
                counts.update((slot, page) for first, count in ranges for page in range(first, first + count))
    finally:
        machine.unregister("most_dirtied")
    return counts.most_common(top)
