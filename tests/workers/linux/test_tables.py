"""Page tables that one address space leaves to the next."""

from __future__ import annotations

from array import array

from workers.linux.tables import PRESENT, Tables

PLACES = (5, 3 << 9, 7 << 18, 2 << 27)      # pages, each with a table of its own at another level


def words(tables: Tables, root: int, places: tuple[int, ...]) -> dict[int, int]:
    """Where the entry of each page is."""
    return {page: word for page in places for _, word, _ in tables.chunks(root, page, 1, make=True)}


def test_a_table_stays_at_its_place() -> None:
    """A KVM with shadow page tables knows it by its address, and keeps what it has read above it."""
    tables = Tables(memoryview(array("Q", bytes(64 << 12))), 0xF000_0000)
    root = tables.new_root()
    before = words(tables, root, PLACES)
    for word in before.values():
        tables.set(word, PRESENT)
    tables.drop_root(root)
    assert tables.new_root() == root
    assert not any(tables.get(root, page) for page in PLACES)
    other = tables.new_root()
    found = words(tables, other, PLACES)
    assert not set(found.values()) & set(before.values())
    assert words(tables, root, PLACES[::-1]) == before
