"""Page tables as a KVM keeps them that copies tables by their address: what it has seen once must stay true until it is
told to forget."""

from __future__ import annotations

from array import array
from random import Random

import pytest

from workers.linux.tables import FRAME, PRESENT, NoTables, Tables

_ADDRESS, _PAGE, _COMMON = 1 << 40, 4096, 511 << 27
_ENTRY = 77 << 12 | PRESENT


class _Machine:
    """Tables, what each root should say, and what somebody remembers of the links between tables."""

    def __init__(self, pages: int) -> None:
        self.words = memoryview(array("Q", bytes(pages * _PAGE)))
        self.tables = Tables(self.words, _ADDRESS, self._forget)
        self.roots: dict[int, set[int]] = {}
        self.links: dict[int, int] = {}         # table, by the word that leads to it
        self.places: dict[int, int] = {}        # the word, by table; of a root, 0
        self.forgotten = 0
        common = self.tables.new_root()
        self.set(common, _COMMON)
        self.tables.have_in_common(common, _COMMON)

    def _forget(self) -> None:
        self.links.clear()
        self.places.clear()
        self.forgotten += 1

    def set(self, root: int, page: int, entry: int = _ENTRY) -> None:
        (_, word, _), = self.tables.chunks(root, page, 1, make=True)
        self.tables.set(word, entry)

    def look(self) -> None:
        """As all vCPUs together see it: every root is as it should be, and no link is other than before."""
        for root, pages in self.roots.items():
            found: set[int] = set()
            assert self.places.setdefault(root, 0) == 0
            self._look(root, 4, 0, found)
            assert found == pages | {_COMMON}

    def _look(self, table: int, level: int, page: int, found: set[int]) -> None:
        at = (table - _ADDRESS) // 8
        for index, entry in enumerate(self.words[at:at + 512]):
            if not entry & PRESENT:
                continue
            below = page | index << 9 * (level - 1)
            if level == 1:
                found.add(below)
                continue
            assert self.links.setdefault(at + index, entry & FRAME) == entry & FRAME
            if below != _COMMON & -1 << 27:
                assert self.places.setdefault(entry & FRAME, at + index) == at + index
            self._look(entry & FRAME, level - 1, below, found)


@pytest.mark.parametrize(("seed", "pages", "many"), [(1, 400, 2), (2, 400, 8), (3, 60, 3), (4, 40, 30)])
def test_what_was_seen_of_tables_stays_true(seed: int, pages: int, many: int) -> None:
    random, machine = Random(seed), _Machine(pages)
    for _ in range(250):
        step = random.random()
        try:
            if step < 0.2 or not machine.roots:
                machine.roots[machine.tables.new_root()] = set()
            elif step < 0.35:
                root = random.choice(list(machine.roots))
                machine.tables.drop_root(root)
                del machine.roots[root]
            elif step < 0.5:
                root = random.choice(list(machine.roots))
                for page in machine.roots[root]:
                    machine.set(root, page, 0)
                machine.roots[root].clear()
            else:
                root = random.choice(list(machine.roots))
                page = random.randrange(many) << 27 | random.randrange(many) << 18 | random.randrange(many) << 9
                machine.set(root, page)
                machine.roots[root].add(page)
        except NoTables:
            root = random.choice(list(machine.roots))
            machine.tables.drop_root(root)
            del machine.roots[root]
        machine.look()
    assert bool(machine.forgotten) == (pages < 400)


def _fill(machine: _Machine, root: int, turn: int) -> None:
    for page in range(40):
        machine.set(root, page + turn << 27)


def test_all_tables_can_be_had_again() -> None:
    machine = _Machine(40)
    for turn in range(3):
        root = machine.tables.new_root()
        with pytest.raises(NoTables):
            _fill(machine, root, turn)
        machine.tables.drop_root(root)
    assert machine.forgotten >= 2
