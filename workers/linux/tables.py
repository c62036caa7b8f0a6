"""x86-64 page tables with four levels, in memory of their own that no dirty log covers: what they say follows from the
mappings (space.py), so nothing of them is saved or moved.

An entry that becomes present, or gets rights, is seen by every vCPU at its next access. One that loses any must be
followed by an invalidation in each worker: a CPU keeps what it has read (space.py says which ranges).

That goes for links between tables too, and what drops the translations of a frame does not drop these. A KVM that has
page tables alone keeps a copy of each table by its address, with the links; a page that has become another table, or
the same one elsewhere, would be found through an old link, or with what another table had at its place. So **a table
that has once been linked stays where it is**: an address space that ends leaves its tables to the next, empty. Only
when there are no others are those that are empty taken away, and then every vCPU forgets all tables
(``Tables.forget``).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

__all__ = ["ACCESSED", "COPY", "DIRTY", "FRAME", "HELD", "NO_EXECUTE", "PRESENT", "USER", "WRITE", "NoTables", "Tables"]

PRESENT, WRITE, USER, ACCESSED, DIRTY, NO_EXECUTE = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 63 # SDM 3A, 4.5.4
#: Bits that the processor leaves alone. HELD: there is a frame, which the program has no right to look at. COPY: it
#: may write to the page, and gets one of its own when it does.
HELD, COPY = 1 << 9, 1 << 10
FRAME = 0x000F_FFFF_FFFF_F000

#: Accessed is set: a processor that sets it would write to the table. Rights are those of the last level.
_TABLE = PRESENT | WRITE | USER | ACCESSED

_ENTRIES = 512
_PAGE = 4096
_EMPTY = bytes(_PAGE)


class NoTables(Exception):
    """The memory of the tables is used up."""


class Tables:
    """``entries``: the memory, as 64-bit words. ``address``: of its first byte, as the guest's processor has it (GPA).
    ``forget``: no vCPU keeps anything that it has read of tables."""

    def __init__(self, entries: memoryview, address: int, forget: Callable[[], None] = lambda: None) -> None:
        self.forget = forget
        self._entries = entries
        self._address = address
        self._free = list(range(len(entries) // _ENTRIES))[::-1]
        self._leaves: dict[int, int] = {}   # {root and place: word of a last level}: until tables are gathered
        self._roots: set[int] = set()       # those that somebody has
        self._left: list[int] = []          # and that nobody has: no entry of the last level says anything
        self._common: dict[int, int] = {}   # {index: entry} of a root, whose tables are another root's

    def new_root(self) -> int:
        """An empty address space; the address (GPA) of its first table, for CR3. Raises NoTables."""
        if self._left:
            root = self._left.pop()
        else:
            self._gather(1)
            root = self._new()
            for index, entry in self._common.items():
                self._entries[self._word(root) + index] = entry
        self._roots.add(root)
        return root

    def drop_root(self, root: int) -> None:
        """No vCPU uses it any more."""
        self._roots.remove(root)
        self._left.append(root)
        self._clear(root, 4)

    def have_in_common(self, source: int, page: int) -> None:
        """Roots that are made from now on have the tables of ``source`` for the 512 GiB around a page."""
        index = page >> 27 & 511
        self._common[index] = self._entries[self._word(source) + index]

    def chunks(self, root: int, page: int, count: int, *, make: bool = False) -> Iterator[tuple[int, int, int]]:
        """(page, word, number): the entries of consecutive pages are ``entries[word:word + number]``, table by table.
        Where there is no table one is made, or with ``make`` unset nothing is yielded. Raises NoTables."""
        end = page + count
        while page < end:
            number = min(end, (page | 511) + 1) - page
            word = self._leaf(root, page, make)
            if word is not None:
                yield page, word, number
            page += number

    def get(self, root: int, page: int) -> int:
        """The entry of a page, 0 where there is none."""
        word = self._leaf(root, page, make=False)
        return 0 if word is None else int(self._entries[word])

    def set(self, word: int, entry: int) -> None:
        self._entries[word] = entry

    def entries(self, word: int, number: int) -> array[int]:
        """A copy of entries."""
        return array("Q", self._entries[word:word + number].tobytes())

    def put(self, word: int, entries: array[int]) -> None:
        self._entries[word:word + len(entries)] = memoryview(entries)

    def _leaf(self, root: int, page: int, make: bool) -> int | None:
        place = (root - self._address) << 15 | page >> 9
        leaf = self._leaves.get(place)
        if leaf is not None:
            return leaf + (page & 511)
        entries, table = self._entries, root
        for shift in (27, 18, 9):
            at = (table - self._address >> 3) + (page >> shift & 511)
            entry = entries[at]
            if not entry & PRESENT:
                if not make:
                    return None
                if self._gather(shift // 9):
                    return self._leaf(root, page, make)     # what was there may have been taken away
                entry = self._new() | _TABLE
                entries[at] = entry
            table = entry & FRAME
        self._leaves[place] = leaf = table - self._address >> 3
        return leaf + (page & 511)

    def _new(self) -> int:
        return self._address + self._free.pop() * _PAGE

    def _gather(self, count: int) -> bool:
        """See that there are so many free tables; whether empty ones had to be taken away for that. Raises NoTables."""
        if len(self._free) >= count:
            return False
        free = [table for root in (*self._left, *self._roots) for table in self._take_empty(root, 4)]
        free += self._left
        for root in self._left:
            self._put_empty(root)
        self._left.clear()
        self._leaves.clear()
        self.forget()
        self._free += [(table - self._address) // _PAGE for table in free]
        if len(self._free) < count:
            raise NoTables
        return True

    def _take_empty(self, table: int, level: int) -> list[int]:
        """Tables below it that are empty are so no more below it."""
        taken = []
        for word, below in self._below(table, level):
            if level > 2:
                taken += self._take_empty(below, level - 1)
            start = self._word(below)
            if self._entries[start:start + _ENTRIES].tobytes() == _EMPTY:
                self._entries[word] = 0
                taken.append(below)
        return taken

    def _clear(self, table: int, level: int) -> None:
        """Of the last level."""
        if level == 1:
            self._put_empty(table)
        else:
            for _, below in self._below(table, level):
                self._clear(below, level - 1)

    def _below(self, table: int, level: int) -> Iterator[tuple[int, int]]:
        """The tables that it leads to, but for those in common, and the words that do."""
        word = self._word(table)
        for index, entry in enumerate(self._entries[word:word + _ENTRIES]):
            if entry & PRESENT and (level < 4 or index not in self._common):
                yield word + index, entry & FRAME

    def _put_empty(self, table: int) -> None:
        word = self._word(table)
        self._entries[word:word + _ENTRIES] = memoryview(array("Q", _EMPTY))

    def _word(self, table: int) -> int:
        return table - self._address >> 3
