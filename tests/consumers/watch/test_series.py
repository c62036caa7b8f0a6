"""Rates and working sets of the last second, against sets of page numbers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vmm.consumers.watch.series import Series
from vmm.consumers.watch.watcher import Area, Turn

CHUNK = 1 << 16     # about its ends, something may go wrong
PAGES = st.sets(st.one_of(st.integers(0, 40), st.integers(CHUNK - 20, CHUNK + 20), st.integers(0, 1 << 35)),
                max_size=60)
TURNS = st.lists(st.tuples(st.floats(0.01, 1.5), st.dictionaries(st.integers(0, 2), PAGES, max_size=3)), min_size=1,
                 max_size=25)


class Told:
    """A source that says what it is told to."""

    def __init__(self) -> None:
        self.areas = [Area(number, f"area {number}", 0, (1 << 35) * 4096, False) for number in range(3)]
        self.forked: set[int] = set()

    def collect(self) -> Turn:
        return Turn(100.0, 0.0)


@given(TURNS)
def test_of_the_last_second_each_page_counts_once_in_the_working_set(turns: list[tuple[float, dict[int, set[int]]]]
                                                                     ) -> None:
    series, at = Series(Told()), 100.0
    seen: list[tuple[float, dict[int, set[int]]]] = []
    for after, pages in turns:
        at += after
        seen.append((at, pages))
        series.add(Turn(at, 0.001, {area: np.array(sorted(found), np.int64) for area, found in pages.items() if found}))
        now = series.now()
        recent = {f"area {area}": [found.get(area, set()) for when, found in seen if at - when < 1.0]
                  for area in range(3)}
        expected = {name: (sum(map(len, sets)), len(set().union(*sets))) for name, sets in recent.items()}
        assert {each.name: (each.pages, each.distinct) for each in now.areas} == {
            name: counts for name, counts in expected.items() if counts[0]}
        assert now.working_set == sum(distinct for _, distinct in expected.values())
        assert now.intervals == len(recent["area 0"])
    total = series.total()
    every = {area: set().union(*(found.get(area, set()) for _, found in seen)) for area in range(3)}
    assert {each.name: each.distinct for each in total.areas} == {
        f"area {area}": len(pages) for area, pages in every.items() if pages}
