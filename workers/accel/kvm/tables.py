"""Page tables of a KVM vCPU's own, by which KVM logs what the guest writes and nothing that it only reads.

KVM on shadow page tables looks at the dirty bit of the guest's page-table entry when it maps a page: where the bit
is set, the page is mapped writable at once, and so logged, though the guest has only read it (arch/x86/kvm/mmu,
FNAME(fetch) and make_spte). The tables in the system slot (vmm/machine/boot.py) have all bits set, and entries of 2
MiB. So each KVM worker has tables of its own instead: a private copy of the directories, and under it a table of 4
KiB entries, accessed and not dirty, for each 2 MiB in which there is RAM. The walker sets a dirty bit at the first
write, in memory that nobody logs. They must not be shared: what one vCPU has written would be mapped writable, and
logged, when another reads it.

Tables take 1/512 of the RAM. Beyond ``TABLES_MAX`` the entries stay as large as they are, with the dirty bit clear:
exact until the first write within their 2 MiB.

With nested paging (EPT, NPT) KVM does not look at the guest's tables, and may log the first read of a page whatever
they say.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import NamedTuple

from ipc.layout import SYSTEM_SLOT
from ipc.messages import SlotSpec
from ipc.shm import PAGE_SIZE, open_fd

__all__ = ["TABLES_MAX", "PageTables", "Region"]

#: Bytes of 4 KiB tables that a vCPU may have: those of 32 GiB of RAM.
TABLES_MAX = 64 << 20

_DIRECTORIES_SLOT = SYSTEM_SLOT + 1     # KVM's slot ids; those of tables come behind
_POOL_MIN = 64                          # tables by which a pool grows at least: 128 MiB of RAM

_ENTRIES = PAGE_SIZE // 8
_LARGE = _ENTRIES * PAGE_SIZE           # 2 MiB
# Intel SDM vol. 3, 4.5
_PRESENT, _WRITE, _USER, _ACCESSED, _DIRTY, _LARGE_PAGE = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7
_ADDRESS = 0x000F_FFFF_FFFF_F000
_RAM = _PRESENT | _WRITE | _USER | _ACCESSED

# A table is made as one number of 4,096 bytes, which takes microseconds; numpy would do as well, but costs a worker
# 10 MiB of memory.
_ONES = sum(1 << 64 * i for i in range(_ENTRIES))                               # 1 in each entry
_FIRST_TABLE = sum((i * PAGE_SIZE | _RAM) << 64 * i for i in range(_ENTRIES))   # of the addresses from 0


class Region(NamedTuple):
    """Memory that the VM must have in its physical address space, never logged."""

    slot_id: int        # KVM's
    gpa: int
    size: int           # bytes
    host_address: int


class _Memory:
    """A private mapping, and it as words."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self.size = len(mapping)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self.bytes = memoryview(mapping)
        self.words = self.bytes.cast("Q")

    def close(self) -> None:
        self.words.release()
        self.bytes.release()
        self._mapping.close()


class PageTables:
    """Those of one vCPU. ``cr3`` is where the system slot has the first of its own; its others lie behind."""

    def __init__(self, system: SlotSpec, cr3: int) -> None:
        """Raises SegmentError and OSError."""
        self._root = cr3
        fd = open_fd(system.segment)
        try:
            self._directories = _Memory(mmap.mmap(
                fd, system.size - (cr3 - system.gpa), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE,
                offset=cr3 - system.gpa))
        finally:
            os.close(fd)
        self._pools: list[tuple[int, _Memory]] = []         # (GPA, memory)
        self._next_gpa = self._end                          # of a pool: behind all that is mapped
        self._free: list[tuple[_Memory, int, int]] = []     # (memory, offset, GPA) of tables not in use yet
        self._tables: dict[int, tuple[_Memory, int]] = {}   # {address of the 2 MiB: its table}
        self._large: dict[int, int] = {}                    # {address of the 2 MiB: index of its directory entry}

    @property
    def regions(self) -> list[Region]:
        """The directories lie where the system slot has its own."""
        return [Region(_DIRECTORIES_SLOT, self._root, self._directories.size, self._directories.address),
                *(Region(_DIRECTORIES_SLOT + 1 + i, gpa, memory.size, memory.address)
                  for i, (gpa, memory) in enumerate(self._pools))]

    @property
    def _end(self) -> int:
        """First guest address that is not mapped."""
        words = self._directories.words
        pml4 = max(i for i in range(_ENTRIES) if words[i] & _PRESENT)
        pointers = self._index(words[pml4])
        pdpt = max(i for i in range(_ENTRIES) if words[pointers + i] & _PRESENT)
        return (pml4 * _ENTRIES + pdpt + 1) * _ENTRIES * _LARGE

    def _index(self, entry: int) -> int:
        """Where in the directories' words the table begins that this entry points to."""
        return ((entry & _ADDRESS) - self._root) // 8

    def _directory_entry(self, address: int) -> int:
        """Where in the directories' words the entry of these 2 MiB is."""
        words, table = self._directories.words, 0
        for shift in (39, 30):
            table = self._index(words[table + (address >> shift) % _ENTRIES])
        return table + (address >> 21) % _ENTRIES

    def cover(self, slot: SlotSpec) -> bool:
        """RAM will be there. True when there are new regions for the VM. Repeatable. Raises OSError."""
        known = self._tables.keys() | self._large.keys()
        fresh = [a for a in range(slot.gpa // _LARGE * _LARGE, slot.gpa + slot.size, _LARGE) if a not in known]
        grown = self._grow(len(fresh))
        words = self._directories.words
        for address in fresh:
            at = self._directory_entry(address)
            if not self._free:
                self._large[address] = at
                words[at] &= ~_DIRTY
                continue
            memory, offset, gpa = self._free.pop()
            self._tables[address] = (memory, offset)
            self._fill(address)
            words[at] = gpa | _RAM
        return grown

    def _grow(self, tables: int) -> bool:
        room = TABLES_MAX // PAGE_SIZE - sum(memory.size // PAGE_SIZE for _, memory in self._pools)
        count = min(max(tables - len(self._free), _POOL_MIN), room)
        if tables <= len(self._free) or count <= 0:
            return False
        memory = _Memory(mmap.mmap(-1, count * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        gpa = self._next_gpa
        self._next_gpa += memory.size
        self._pools.append((gpa, memory))
        self._free += [(memory, at, gpa + at) for at in range(memory.size - PAGE_SIZE, -1, -PAGE_SIZE)]
        return True

    def _fill(self, address: int) -> None:
        memory, offset = self._tables[address]
        memory.bytes[offset:offset + PAGE_SIZE] = (_FIRST_TABLE + address * _ONES).to_bytes(PAGE_SIZE, "little")

    def forget_writes(self) -> None:
        """No page has been written. For a VM that maps every page anew, because it is a new one, or since a slot
        was taken away: a page that was written before would else be logged when it is read."""
        for address in self._tables:
            self._fill(address)
        for at in self._large.values():
            self._directories.words[at] &= ~_DIRTY

    def close(self) -> None:
        """The VM is gone."""
        for memory in (self._directories, *(memory for _, memory in self._pools)):
            memory.close()
