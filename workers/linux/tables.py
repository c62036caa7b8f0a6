"""x86-64 page tables with four levels, in memory of their own that no dirty log covers: what they say follows from the
mappings (space.py), so nothing of them is saved or moved.

An entry that becomes present, or gets rights, is seen by every vCPU at its next access. One that loses any must be
followed by an invalidation in each worker: a CPU keeps what it has read (space.py says which ranges).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

__all__ = ["ACCESSED", "COPY", "FRAME", "HELD", "NO_EXECUTE", "PRESENT", "USER", "WRITE", "NoTables", "Tables"]

PRESENT, WRITE, USER, ACCESSED, NO_EXECUTE = 1 << 0, 1 << 1, 1 << 2, 1 << 5, 1 << 63     # Intel SDM 3A, 4.5.4
#: Bits that the processor leaves alone. HELD: there is a frame, which the program has no right to look at. COPY: it
#: may write to the page, and gets one of its own when it does.
HELD, COPY = 1 << 9, 1 << 10
FRAME = 0x000F_FFFF_FFFF_F000

#: Accessed is set: a processor that sets it would write to the table. Rights are those of the last level.
_TABLE = PRESENT | WRITE | USER | ACCESSED

_ENTRIES = 512
_PAGE = 4096


class NoTables(Exception):
    """The memory of the tables is used up."""


class Tables:
    """``entries``: the memory, as 64-bit words. ``address``: of its first byte, as the guest's processor has it (GPA).
    A table stays where it is, also when its root goes, which is another's then: what a KVM with shadow page tables has
    read of the upper levels it keeps for good, and it knows a table by its address. One that came to be somewhere else
    would have the pages of where it was."""

    def __init__(self, entries: memoryview, address: int) -> None:
        self._entries = entries
        self._address = address
        self._free = list(range(len(entries) // _ENTRIES))[::-1]
        self._leaves: dict[int, int] = {}   # {root and place: word of a last level}: they stay
        self._roots: list[int] = []         # that nobody has, with the tables below them; no page has an entry
        self._common: dict[int, int] = {}   # {index: entry} of a root, whose tables are another root's

    @property
    def free(self) -> int:
        """Pages."""
        return len(self._free)

    def new_root(self) -> int:
        """An empty address space; the address (GPA) of its first table, for CR3. Raises NoTables."""
        root = self._roots.pop() if self._roots else self._new()
        for index, entry in self._common.items():
            self._entries[self._word(root) + index] = entry
        return root

    def drop_root(self, root: int) -> None:
        """No vCPU uses it any more."""
        word = self._word(root)
        for index in self._common:
            self._entries[word + index] = 0
        self._clear(root, 4)
        self._roots.append(root)

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
                entry = self._new() | _TABLE
                entries[at] = entry
            table = entry & FRAME
        self._leaves[place] = leaf = table - self._address >> 3
        return leaf + (page & 511)

    def _new(self) -> int:
        if not self._free:
            raise NoTables
        return self._address + self._free.pop() * _PAGE

    def _clear(self, table: int, level: int) -> None:
        word = self._word(table)
        if level == 1:
            self._entries[word:word + _ENTRIES] = memoryview(array("Q", bytes(_PAGE)))
            return
        for entry in self._entries[word:word + _ENTRIES]:
            if entry & PRESENT:
                self._clear(entry & FRAME, level - 1)

    def _word(self, table: int) -> int:
        return table - self._address >> 3
