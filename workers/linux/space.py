"""An address space: what a program has mapped where, and the frames behind it.

A mapping (`Mapping`) says what may be there; a page gets a frame when it is first touched (``fault``), together with
its neighbours, and the page tables say so. Addresses are in bytes where a program gives them, page numbers elsewhere.

A processor keeps what it has read in the tables. What loses a right, or gets another frame than before, is therefore
put into ``stale``: the frames concerned, of which every worker must drop its own mapping (madvise(2), MADV_DONTNEED: it
takes the guest's along) before the program goes on. Frames that nobody uses any more are cleared (``Memory.clear``),
which sees to it by itself.
"""

from __future__ import annotations

import errno
import itertools
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from .frames import Frames, Run, runs_of
from .tables import ACCESSED, COPY, FRAME, HELD, NO_EXECUTE, PRESENT, USER, WRITE, Tables

if TYPE_CHECKING:
    from .state import Loading, Saving

__all__ = ["COPIED", "LEFT", "WIPED", "Backing", "Beginning", "Mapping", "Memory", "SegmentationFault", "Space"]

PAGE = 4096
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4              # uapi/asm-generic/mman-common.h
LOWEST = 0x10                                           # page; vm.mmap_min_addr
HIGHEST = 0x7FFF_FFFF_F                                 # the first page that is no program's
TOP = 0x7FFF_F7FF_F                                     # the page below which mappings are placed
STACK_MOST = 2048                                       # pages of a stack (RLIMIT_STACK, as usual)
STACK_GAP = 256                                         # pages between a stack and what is below it

#: Pages that get a frame with the one that was touched.
FAULT_AROUND = 16

#: What a child has of a mapping (madvise(2)): the same, zeros, nothing.
COPIED, WIPED, LEFT = 0, 1, 2

_FAULT_AHEAD = 512      # at most, where one follows the other

# Of a page fault's error code (Intel SDM 3A, 4.7).
_FAULT_PRESENT, _FAULT_WRITE, _FAULT_FETCH = 1, 2, 16


class SegmentationFault(Exception):
    """SIGSEGV, or with ``bus`` SIGBUS, at ``address``; ``mapped``: it is a matter of rights (SEGV_ACCERR)."""

    def __init__(self, address: int, *, mapped: bool = False, bus: bool = False) -> None:
        super().__init__(f"{address:#x}")
        self.address, self.mapped, self.bus = address, mapped, bus


class Memory(Protocol):
    """The machine's memory, in frames. What is changed is logged as dirtied by the system."""

    def read(self, frame: int, offset: int, count: int) -> bytes: ...

    def write(self, frame: int, offset: int, data: bytes | memoryview) -> None: ...

    def copy(self, source: int, target: int) -> None:
        """One frame."""

    def clear(self, runs: list[Run], visitors: Iterable[int] = ()) -> None:
        """They hold zeros, and no worker has a translation to them. ``visitors``: vCPUs that may have had one."""


class Backing(Protocol):
    """A file, as far as it can be mapped. ``frame`` gives the frame that holds one of its pages, without a use more.
    Raises IndexError behind its end, and NoFrames."""

    def frame(self, page: int) -> int: ...

    def keep_mapped(self) -> None:
        """One address space more has it mapped."""

    def let_go_mapped(self) -> None:
        """One less."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """What execve(2) has put there: the program (None: the address space is closed), its auxiliary vector; (first, end)
    of its arguments and environment, and the stack pointer, as addresses."""

    file: Backing | None
    auxiliary: bytes
    arguments: tuple[int, int]
    environment: tuple[int, int]
    stack: int


@dataclass(frozen=True, slots=True)
class Mapping:
    """Pages ``start`` to ``end``. ``offset``: the page of ``backing`` that is the first one's; without a backing the
    pages are zero at first. ``shared``: writes go to the backing. ``name``: for people (heap, stack)."""

    start: int
    end: int
    prot: int
    shared: bool = False
    backing: Backing | None = None
    offset: int = 0
    name: str = ""
    grows: bool = False             # a stack: downwards
    read_only: bool = False         # shared, of a file that is not open for writing
    at_fork: int = COPIED

    @property
    def entry(self) -> int:
        """What the entry of a page of its own has beside the frame."""
        found = USER | ACCESSED | (PRESENT if self.prot else HELD)
        if self.prot & PROT_WRITE:
            found |= WRITE
        return found if self.prot & PROT_EXEC else found | NO_EXECUTE

    def part(self, start: int, end: int) -> Mapping:
        return replace(self, start=start, end=end, offset=self.offset + (start - self.start if self.backing else 0))

    def continues(self, other: Mapping) -> bool:
        """``other``, which comes next, is more of the same."""
        return (self.end == other.start and not self.grows and not other.grows
                and (self.prot, self.shared, self.backing, self.name, self.read_only, self.at_fork) == (
                    other.prot, other.shared, other.backing, other.name, other.read_only, other.at_fork)
                and (self.backing is None or self.offset + self.end - self.start == other.offset))


class Space:
    """``root`` is the address of its page tables. ``limit``: pages that may be promised: private ones that may be
    written to, whether they have a frame or not."""

    def __init__(self, memory: Memory, frames: Frames, tables: Tables, limit: int) -> None:
        """Raises NoTables."""
        self._memory, self._frames, self._tables = memory, frames, tables
        self._limit = limit
        self._mappings: list[Mapping] = []      # by address; no two overlap
        self.root = tables.new_root()
        #: Frames of which every worker must drop its mapping.
        self.stale: list[int] = []
        self.promised = 0
        self._backed: dict[Backing, int] = {}       # how many pages are mapped of it
        self._heap = self._heap_end = 0         # pages; bytes
        self._ahead = -1, FAULT_AROUND          # the page behind those that got a frame last, and how many they were
        self.beginning: Beginning | None = None
        #: Processes that have it: a child that was made by vfork(2) has its parent's.
        self.users = 1
        #: vCPUs that may have translations of it.
        self.visitors: set[int] = set()

    # --- what there is ---------------------------------------------------------------------------------------------

    @property
    def mappings(self) -> list[Mapping]:
        return list(self._mappings)

    def find(self, page: int) -> Mapping | None:
        at = bisect_right(self._mappings, page, key=_start) - 1
        return self._mappings[at] if at >= 0 and page < self._mappings[at].end else None

    def resident(self, mapping: Mapping) -> int:
        """Pages of it that have a frame."""
        return sum(number - self._tables.entries(word, number).count(0) for _, word, number in self._tables.chunks(
            self.root, mapping.start, mapping.end - mapping.start))

    def frames_of(self, mapping: Mapping) -> list[int]:
        """Of its pages that have one."""
        return [(entry & FRAME) >> 12 for _, word, number in self._tables.chunks(
            self.root, mapping.start, mapping.end - mapping.start)
            for entry in self._tables.entries(word, number) if entry]

    @property
    def heap(self) -> int:
        """The page at which it begins."""
        return self._heap

    # --- system calls ----------------------------------------------------------------------------------------------

    def map(self, address: int, length: int, prot: int, *, fixed: bool = False, replace_there: bool = True,
            shared: bool = False, backing: Backing | None = None, offset: int = 0, name: str = "",
            grows: bool = False, reserve: bool = True, read_only: bool = False) -> int:
        """mmap(2): the address. ``address`` is a wish, or with ``fixed`` where it must be; what is there goes, or
        without ``replace_there`` is EEXIST. ``offset`` in pages. Raises OSError."""
        count = _pages(length)
        if not count or address < 0:
            raise OSError(errno.EINVAL, "")
        if fixed:
            if address % PAGE:
                raise OSError(errno.EINVAL, "")
            start = address // PAGE
            if start + count > HIGHEST:
                raise OSError(errno.ENOMEM, "")
            if start < LOWEST:
                raise OSError(errno.EPERM, "")
            if not replace_there and self._within(start, start + count):
                raise OSError(errno.EEXIST, "")
        else:
            start = self._place(-(-address // PAGE), count)
        new = Mapping(start, start + count, prot, shared, backing, offset, name, grows, read_only)
        self._promise(_promised(new), gone=self._parts(start, start + count), refuse=reserve)
        self._unmap(start, start + count)
        self._insert(new)
        return start * PAGE

    def unmap(self, address: int, length: int) -> None:
        """munmap(2). Raises OSError."""
        start, end = self._range(address, length)
        if start == end:
            raise OSError(errno.EINVAL, "")
        self._unmap(start, end)

    def protect(self, address: int, length: int, prot: int) -> None:
        """mprotect(2): up to the first page that is not mapped, or cannot have the right. Raises OSError."""
        start, end = self._range(address, length)
        hole = self._hole(start, end)
        refused = next((each for each in self._parts(start, hole) if each.read_only and prot & PROT_WRITE), None)
        hole = hole if refused is None else refused.start
        for each in self._cut(start, hole):
            changed = replace(each, prot=prot)
            self._promise(_promised(changed) - _promised(each))
            self._mappings[self._mappings.index(each)] = changed
            self._set_rights(changed)
        self._join(start, hole)
        if hole < end:
            raise OSError(errno.ENOMEM if refused is None else errno.EACCES, "")

    def check_mapped(self, address: int, length: int) -> None:
        """All of it is. Raises OSError."""
        start, end = self._range(address, length)
        if self._hole(start, end) < end:
            raise OSError(errno.ENOMEM, "")

    def remap(self, address: int, old: int, new: int, *, may_move: bool, to: int | None = None) -> int:
        """mremap(2): ``to``: where it must be. What is shared and 0 bytes long is mapped once more. Raises OSError."""
        if address % PAGE or not new or (to is not None and to % PAGE):
            raise OSError(errno.EINVAL, "")
        start, count, wanted = address // PAGE, _pages(old), _pages(new)
        if to is not None and not (to // PAGE + wanted <= start or start + count <= to // PAGE):
            raise OSError(errno.EINVAL, "")
        if to is not None and (to // PAGE < LOWEST or to // PAGE + wanted > HIGHEST):
            raise OSError(errno.EINVAL, "")
        found = self.find(start)
        if found is None:
            raise OSError(errno.EFAULT, "")
        if not count and not found.shared:
            raise OSError(errno.EINVAL, "")
        if not count and to == address:     # what is there goes first
            self._unmap(start, start + wanted)
            raise OSError(errno.EFAULT, "")
        if to is None and count and wanted <= count:
            if wanted < count:
                self._unmap(start + wanted, start + count)
            return address
        if wanted < count:
            self._unmap(start + wanted, start + count)
            count = wanted
        if found.end < start + count:
            raise OSError(errno.EFAULT, "")
        if to is None and count and found.end == start + count and not self._within(found.end, start + wanted) \
                and start + wanted <= HIGHEST:
            more = found.part(found.end, start + wanted)
            self._promise(_promised(more))
            self._insert(more)
            return address
        if not may_move:
            raise OSError(errno.ENOMEM, "")
        return self._move(start, count, wanted, to)

    def advise_unneeded(self, address: int, length: int) -> None:
        """madvise(2), MADV_DONTNEED: zero, or as the file, when next touched. Raises OSError."""
        start, end = self._range(address, length)
        for each in self._parts(start, end):
            self._drop_pages(each.start, each.end)
        if self._hole(start, end) < end:
            raise OSError(errno.ENOMEM, "")

    def advise_free(self, address: int, length: int) -> None:
        """madvise(2), MADV_FREE: the same, of what is no file's. Raises OSError."""
        start, end = self._range(address, length)
        if any(each.shared or each.backing for each in self._parts(start, end)):
            raise OSError(errno.EINVAL, "")
        self.advise_unneeded(address, length)

    def advise_fork(self, address: int, length: int, at_fork: int) -> None:
        """madvise(2), MADV_WIPEONFORK and its like. Raises OSError."""
        start, end = self._range(address, length)
        for each in self._cut(start, end):
            if at_fork == WIPED and (each.shared or each.backing):
                self._join(start, end)
                raise OSError(errno.EINVAL, "")
            self._mappings[self._mappings.index(each)] = replace(each, at_fork=at_fork)
        self._join(start, end)
        if self._hole(start, end) < end:
            raise OSError(errno.ENOMEM, "")

    def parts(self, address: int, length: int) -> list[Mapping]:
        """All that is mapped there. Raises OSError."""
        return self._parts(*self._range(address, length))

    def in_memory(self, address: int, length: int) -> bytes:
        """mincore(2). Files are. Raises OSError."""
        self.check_mapped(address, length)
        found = bytearray()
        for part in self.parts(address, length):
            if part.shared or part.backing:
                found += b"\1" * (part.end - part.start)
                continue
            there = bytearray(part.end - part.start)
            for page, word, number in self._tables.chunks(self.root, part.start, part.end - part.start):
                at = page - part.start
                there[at:at + number] = bytes(map(bool, self._tables.entries(word, number)))
            found += there
        return bytes(found)

    def begin(self, beginning: Beginning) -> None:
        """What execve(2) has put there. The program lives as long as this, mapped or not."""
        self.beginning = beginning
        if beginning.file is not None:
            beginning.file.keep_mapped()

    def set_heap(self, page: int) -> None:
        """Where the heap begins, empty."""
        self._heap, self._heap_end = page, page * PAGE

    def set_break(self, address: int) -> int:
        """brk(2): where the heap ends, changed or not."""
        old, new = _pages(self._heap_end), _pages(address)
        if address < self._heap * PAGE or new > HIGHEST:
            return self._heap_end
        if new > old:
            more = Mapping(old, new, PROT_READ | PROT_WRITE, name="heap")
            if self._within(old, new):
                return self._heap_end
            try:
                self._promise(new - old)
            except OSError:
                return self._heap_end
            self._insert(more)
        elif new < old:
            self._unmap(new, old)
        self._heap_end = address
        return address

    # --- touching --------------------------------------------------------------------------------------------------

    def fault(self, address: int, error: int) -> None:
        """A page fault with this error code: the access is possible when this returns. Raises SegmentationFault,
        NoFrames and NoTables."""
        need = PROT_WRITE if error & _FAULT_WRITE else PROT_EXEC if error & _FAULT_FETCH else PROT_READ
        self._touch(address, need, FAULT_AROUND)

    def read(self, address: int, count: int) -> bytes:
        """As the program would. Raises SegmentationFault, NoFrames and NoTables."""
        if 0 < count <= PAGE - address % PAGE:      # as most are
            return self._memory.read(self._touch(address, PROT_READ, 1), address % PAGE, count)
        parts = []
        for frame, offset, part in self._each(address, count, PROT_READ):
            parts.append(self._memory.read(frame, offset, part))
        return b"".join(parts)

    def write(self, address: int, data: bytes | memoryview) -> None:
        """As the program would; what comes before a page that it may not write to is written. Raises
        SegmentationFault, NoFrames and NoTables."""
        if 0 < len(data) <= PAGE - address % PAGE:
            self._memory.write(self._touch(address, PROT_WRITE, 1), address % PAGE, data)
            return
        done = 0
        for frame, offset, part in self._each(address, len(data), PROT_WRITE):
            self._memory.write(frame, offset, data[done:done + part])
            done += part

    def text(self, address: int, most: int = PAGE) -> bytes:
        """Up to the first zero byte, which must come within ``most`` bytes. Raises SegmentationFault, and OSError
        (ENAMETOOLONG)."""
        found = b""
        while len(found) < most:
            found += self.read(address + len(found), min(PAGE - (address + len(found)) % PAGE, most - len(found)))
            text, end, _ = found.partition(b"\0")
            if end:
                return text
        raise OSError(errno.ENAMETOOLONG, "")

    def own(self, address: int) -> None:
        """The page can be written to, in a frame that it keeps. Raises as ``write``."""
        self._touch(address, PROT_WRITE, 1)

    def place_of(self, address: int) -> tuple[int, int]:
        """(frame, offset) behind an address that can be read. Raises as ``read``."""
        return self._touch(address, PROT_READ, 1), address % PAGE

    def fork(self) -> Space:
        """The same for another process. Pages that are its own are shared until one of the two writes to them. Raises
        NoFrames and NoTables, with nothing of it left."""
        other = Space(self._memory, self._frames, self._tables, self._limit)
        try:
            other._mappings = [mapping for mapping in self._mappings if mapping.at_fork != LEFT]
            other.promised = sum(map(_promised, other._mappings))
            for mapping in other._mappings:
                other._back(mapping)
            other._heap, other._heap_end = self._heap, self._heap_end
            if self.beginning is not None:
                other.begin(self.beginning)
            for mapping in other._mappings:
                if mapping.at_fork == COPIED:
                    self._fork_pages(other, mapping)
        except BaseException:
            other.close()
            raise
        return other

    def _fork_pages(self, other: Space, mapping: Mapping) -> None:
        for page, word, number in self._tables.chunks(self.root, mapping.start, mapping.end - mapping.start):
            entries = self._tables.entries(word, number)
            if not any(entries):
                continue
            (_, place, _), = other._tables.chunks(other.root, page, number, make=True)      # before a use is counted
            for index, entry in enumerate(entries):
                if not entry:
                    continue
                frame = (entry & FRAME) >> 12
                self._frames.share(frame)
                if entry & WRITE and not mapping.shared:
                    entries[index] = entry & ~WRITE | COPY
                    self.stale.append(frame)
            other._tables.put(place, entries)
            self._tables.put(word, entries)

    def lose(self, backing: Backing, first: int, end: int, frames: Collection[int] | None) -> None:
        """Of these pages of a file, those that have one of the frames, or all that have any: they are looked for in the
        file again when they are touched."""
        if backing not in self._backed:
            return
        for each in self._mappings:
            low, high = each.start + first - each.offset, each.start + end - each.offset
            if each.backing is backing and low < each.end and each.start < high:
                self._drop_pages(max(low, each.start), min(high, each.end), frames)

    def close(self) -> None:
        """Nothing is mapped, and there are no tables: no vCPU uses it any more."""
        self._unmap(0, HIGHEST)
        self._tables.drop_root(self.root)
        if self.beginning is not None and self.beginning.file is not None:
            self.beginning.file.let_go_mapped()
            self.beginning = replace(self.beginning, file=None)

    def _each(self, address: int, count: int, need: int) -> Iterator[tuple[int, int, int]]:
        while count > 0:
            offset = address % PAGE
            part = min(count, PAGE - offset)
            yield self._touch(address, need, 1), offset, part
            address += part
            count -= part

    def _touch(self, address: int, need: int, around: int) -> int:
        """The frame behind an address to which the program may do that. Raises SegmentationFault, NoFrames,
        NoTables."""
        page = address // PAGE
        entry = self._tables.get(self.root, page) if 0 <= page < HIGHEST else 0
        if entry & PRESENT and (need == PROT_READ or (need == PROT_WRITE and entry & WRITE)):
            return (entry & FRAME) >> 12
        mapping = self.find(page) or self._grown(page)
        if mapping is None:
            raise SegmentationFault(address)
        if not mapping.prot & need and not (need == PROT_READ and mapping.prot):     # x86 has no execute-only pages
            raise SegmentationFault(address, mapped=True)
        if entry & COPY and need == PROT_WRITE:
            return self._copy(page, mapping, entry)
        if not entry:
            self._populate(mapping, page, around, address)
            if need == PROT_WRITE:
                entry = self._tables.get(self.root, page)
                if entry & COPY:
                    return self._copy(page, mapping, entry)
        return (self._tables.get(self.root, page) & FRAME) >> 12

    def _populate(self, mapping: Mapping, page: int, around: int, address: int) -> None:
        """Frames for ``page`` and for those of its neighbours that have none."""
        if mapping.backing is None:
            self._populate_own(mapping, page, around)
            return
        first, last = page, page + 1
        for at, word, number in self._tables.chunks(self.root, first, last - first, make=True):
            for index, entry in enumerate(self._tables.entries(word, number)):
                if entry:
                    continue
                try:
                    new = self._new_entry(mapping, at + index)
                except IndexError:
                    raise SegmentationFault(address, bus=True) from None
                self._tables.set(word + index, new)

    def _populate_own(self, mapping: Mapping, page: int, around: int) -> None:
        """Memory without a backing: more at a time as long as it is touched in ascending order. Raises NoFrames."""
        if around > 1:
            expected, window = self._ahead
            around = min(2 * window, _FAULT_AHEAD) if page == expected else around
        first = max(mapping.start, page - page % around)
        last = min(mapping.end, first + around)
        if around > 1:
            self._ahead = last, around
        if last - first > self._frames.free:
            first, last = page, page + 1
        rights = mapping.entry
        for _, word, number in self._tables.chunks(self.root, first, last - first, make=True):
            entries = self._tables.entries(word, number)
            places = [index for index, entry in enumerate(entries) if not entry]
            frames = (frame << 12 | rights for start, length in self._frames.take(len(places))
                      for frame in range(start, start + length))
            for index, entry in zip(places, frames, strict=True):
                entries[index] = entry
            self._tables.put(word, entries)

    def _new_entry(self, mapping: Mapping, page: int) -> int:
        """Raises NoFrames and IndexError."""
        assert mapping.backing is not None
        frame = mapping.backing.frame(mapping.offset + page - mapping.start)
        if not mapping.shared and mapping.prot & PROT_WRITE:
            (own, _), = self._frames.take(1)        # now, and no other frame later
            self._memory.copy(frame, own)
            return own << 12 | mapping.entry
        self._frames.share(frame)
        return frame << 12 | mapping.entry

    def _copy(self, page: int, mapping: Mapping, entry: int) -> int:
        """A frame of its own. Raises NoFrames."""
        frame = (entry & FRAME) >> 12
        word = next(self._tables.chunks(self.root, page, 1))[1]
        if self._frames.uses(frame) > 1 or mapping.backing is not None:
            (own, _), = self._frames.take(1)
            self._memory.copy(frame, own)
            self._tables.set(word, own << 12 | mapping.entry)
            self.stale.append(frame)
            self._release([frame])
            return own
        self._tables.set(word, frame << 12 | mapping.entry)
        if mapping.prot & PROT_EXEC:
            self.stale.append(frame)        # as in `_set_rights`
        return frame

    # --- mappings --------------------------------------------------------------------------------------------------

    def _range(self, address: int, length: int) -> tuple[int, int]:
        """Raises OSError."""
        start, count = address // PAGE, _pages(length)
        if address % PAGE or start + count > HIGHEST:
            raise OSError(errno.EINVAL, "")
        return start, start + count

    def _promise(self, more: int, gone: Iterable[Mapping] = (), *, refuse: bool = True) -> None:
        """``gone``: will be unmapped at once. Raises OSError."""
        left = self.promised - sum(map(_promised, gone))
        if refuse and left + more > max(self._limit, self.promised):
            raise OSError(errno.ENOMEM, "")
        self.promised += more

    def _indices(self, start: int, end: int) -> tuple[int, int]:
        """Of the mappings that have pages in the range."""
        first = bisect_right(self._mappings, start, key=_end)
        last = first
        while last < len(self._mappings) and self._mappings[last].start < end:
            last += 1
        return first, last

    def _within(self, start: int, end: int) -> bool:
        first, last = self._indices(start, end)
        return first < last

    def _parts(self, start: int, end: int) -> list[Mapping]:
        """What lies in the range, without what reaches beyond it. Nothing is changed."""
        first, last = self._indices(start, end)
        return [each.part(max(each.start, start), min(each.end, end)) for each in self._mappings[first:last]]

    def _cut(self, start: int, end: int) -> list[Mapping]:
        """The same; and mappings that reach beyond the range have become two."""
        if start >= end:
            return []
        first, last = self._indices(start, end)
        pieces = []
        for each in self._mappings[first:last]:
            edges = sorted({each.start, max(each.start, start), min(each.end, end), each.end})
            pieces += [each.part(low, high) for low, high in itertools.pairwise(edges)]
        self._mappings[first:last] = pieces
        return [each for each in pieces if start <= each.start and each.end <= end]

    def _insert(self, mapping: Mapping) -> None:
        self._back(mapping)
        self._mappings.insert(bisect_right(self._mappings, mapping.start, key=_start), mapping)
        self._join(mapping.start, mapping.end)

    def _join(self, start: int, end: int) -> None:
        """Neighbours in and around the range that are more of the same become one."""
        first, last = self._indices(max(0, start - 1), end + 1)
        joined: list[Mapping] = []
        for each in self._mappings[first:last]:
            if joined and joined[-1].continues(each):
                joined[-1] = replace(joined[-1], end=each.end)
            else:
                joined.append(each)
        self._mappings[first:last] = joined

    def _hole(self, start: int, end: int) -> int:
        """The first page of the range that is not mapped; ``end`` where all are."""
        at = start
        for each in self._parts(start, end):
            if each.start > at:
                break
            at = each.end
        return at

    def _place(self, wish: int, count: int) -> int:
        """A free range: where it is wished, else as high as there is room. Raises OSError."""
        if wish >= LOWEST and wish + count <= HIGHEST and not self._within(wish, wish + count):
            return wish
        end = TOP
        for each in reversed(self._mappings):
            if each.end <= end - count:
                break
            low = each.start - (STACK_GAP if each.grows else 0)
            end = min(end, low)
        if end - count < LOWEST:
            raise OSError(errno.ENOMEM, "")
        return end - count

    def _grown(self, page: int) -> Mapping | None:
        """The stack above the page, grown to it."""
        at = bisect_right(self._mappings, page, key=_start)
        if at == len(self._mappings) or not self._mappings[at].grows or page < LOWEST:
            return None
        stack = self._mappings[at]
        if stack.end - page > STACK_MOST:
            return None
        below = self._mappings[at - 1] if at else None
        if below is not None and page - below.end < STACK_GAP and below.prot:
            return None
        try:
            self._promise(stack.start - page)
        except OSError:
            return None
        self._mappings[at] = grown = replace(stack, start=page)
        return grown

    def _move(self, start: int, count: int, wanted: int, to: int | None) -> int:
        """Raises OSError."""
        found = self.find(start)
        assert found is not None
        target = self._place(0, wanted) if to is None else to // PAGE
        old = found.part(start, start + count)
        new = replace(old, start=target, end=target + wanted)
        self._promise(_promised(new), gone=[*self._parts(target, target + wanted), old])
        self._unmap(target, target + wanted)
        moved: list[tuple[int, int]] = []
        for at, word, number in self._tables.chunks(self.root, start, count):
            entries = self._tables.entries(word, number)
            moved += [(at + index, entry) for index, entry in enumerate(entries) if entry]
            self._tables.put(word, array("Q", bytes(8 * number)))
        for page, entry in moved:
            _, word, _ = next(self._tables.chunks(self.root, page - start + target, 1, make=True))
            self._tables.set(word, entry)
            self.stale.append((entry & FRAME) >> 12)
        self._insert(new)
        for each in self._cut(start, start + count):
            self._remove(each)
        return target * PAGE

    def _unmap(self, start: int, end: int) -> None:
        for each in self._cut(start, end):
            self._drop_pages(each.start, each.end)
            self._remove(each)

    def _remove(self, mapping: Mapping) -> None:
        self._mappings.remove(mapping)
        self.promised -= _promised(mapping)
        backing = mapping.backing
        if backing is not None:
            self._backed[backing] -= mapping.end - mapping.start
            if not self._backed[backing]:
                del self._backed[backing]
                backing.let_go_mapped()

    def _back(self, mapping: Mapping) -> None:
        """It is one of those that keep what they are backed by."""
        backing = mapping.backing
        if backing is not None:
            if backing not in self._backed:
                backing.keep_mapped()
                self._backed[backing] = 0
            self._backed[backing] += mapping.end - mapping.start

    def _drop_pages(self, start: int, end: int, frames: Collection[int] | None = None) -> None:
        dropped = []
        for _, word, number in self._tables.chunks(self.root, start, end - start):
            entries = self._tables.entries(word, number)
            found = [at for at, entry in enumerate(entries)
                     if entry and (frames is None or (entry & FRAME) >> 12 in frames)]
            for at in found:
                dropped.append((entries[at] & FRAME) >> 12)
                entries[at] = 0
            if found:
                self._tables.put(word, entries)
        self.stale += [frame for frame in dropped if self._frames.uses(frame) > 1]
        self._release(dropped)

    def _release(self, frames: list[int]) -> None:
        runs = self._frames.drop(frames)
        if runs:
            self._memory.clear(runs, self.visitors)
            self._frames.give(runs)

    def _set_rights(self, mapping: Mapping) -> None:
        """Of pages that have a frame."""
        for _, word, number in self._tables.chunks(self.root, mapping.start, mapping.end - mapping.start):
            entries = self._tables.entries(word, number)
            for index, entry in enumerate(entries):
                if not entry:
                    continue
                frame = (entry & FRAME) >> 12
                new = frame << 12 | mapping.entry
                if new & WRITE and not mapping.shared and (entry & COPY or self._frames.uses(frame) > 1):
                    new = new & ~WRITE | COPY
                lost = (entry & ~new) & (PRESENT | WRITE) or (new & ~entry) & NO_EXECUTE
                if new & ~entry & WRITE and not new & NO_EXECUTE:
                    lost = True     # a software CPU has taken it for code that nobody changes
                if lost and entry & PRESENT:
                    self.stale.append(frame)
                entries[index] = new
            self._tables.put(word, entries)

    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self, saving: Saving) -> dict[str, Any]:
        """Without its tables and its users, which follow; what is stale is so in no worker that comes later."""
        beginning = self.beginning
        return {
            "closed": not self.users, "limit": self._limit, "heap": [self._heap, self._heap_end],
            "ahead": list(self._ahead),
            "beginning": beginning and [
                saving.backing(beginning.file), beginning.auxiliary, list(beginning.arguments),
                list(beginning.environment), beginning.stack],
            "mappings": [[each.start, each.end, each.prot, each.shared, saving.backing(each.backing), each.offset,
                          each.name, each.grows, each.read_only, each.at_fork] for each in self._mappings],
            "pages": [run for each in self._mappings for run in self._page_runs(each)]}

    def _page_runs(self, mapping: Mapping) -> list[list[int]]:
        """[page, frame, how many, whether they are copied when they are written to]: what else their entries say
        follows from the mapping."""
        runs: list[list[int]] = []
        for at, word, number in self._tables.chunks(self.root, mapping.start, mapping.end - mapping.start):
            for page, entry in enumerate(self._tables.entries(word, number), at):
                if not entry:
                    continue
                frame, copy = (entry & FRAME) >> 12, int(bool(entry & COPY))
                if runs and (page, frame, copy) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2], runs[-1][3]):
                    runs[-1][2] += 1
                else:
                    runs.append([page, frame, 1, copy])
        return runs

    @classmethod
    def load(cls, loading: Loading, saved: dict[str, Any], memory: Memory, frames: Frames, tables: Tables) -> Space:
        """Who uses it comes later. Its files know already that they are mapped. Raises NoTables and ValueError."""
        found = cls.__new__(cls)
        found._memory, found._frames, found._tables, found._limit = memory, frames, tables, saved["limit"]
        found._heap, found._heap_end = saved["heap"]
        page, window = saved["ahead"]
        found._ahead = page, window
        found.stale, found.visitors, found.users, found._backed, found.beginning = [], set(), 0, {}, None
        found.root = 0 if saved["closed"] else tables.new_root()
        found._mappings = [
            Mapping(start, end, prot, shared, loading.backing(backing), offset, name, grows, read_only, at_fork)
            for start, end, prot, shared, backing, offset, name, grows, read_only, at_fork in saved["mappings"]]
        for before, each in itertools.pairwise([Mapping(0, LOWEST, 0), *found._mappings, Mapping(HIGHEST, HIGHEST, 0)]):
            if not before.start <= before.end <= each.start:
                raise ValueError(f"mappings are not in order at page {each.start}")
        found.promised = sum(map(_promised, found._mappings))
        for each in found._mappings:
            if each.backing is not None:
                found._backed[each.backing] = found._backed.get(each.backing, 0) + each.end - each.start
        if saved["beginning"] is not None:
            file, auxiliary, arguments, environment, stack = saved["beginning"]
            found.beginning = Beginning(loading.backing(file), auxiliary, (arguments[0], arguments[1]),
                                        (environment[0], environment[1]), stack)
        for page, frame, count, copy in saved["pages"]:
            found._load_pages(page, frame, count, copy)
        return found

    def _load_pages(self, page: int, frame: int, count: int, copy: int) -> None:
        """Raises NoTables and ValueError."""
        mapping = self.find(page)
        if mapping is None or page + count > mapping.end:
            raise ValueError(f"{count} pages from {page} on are not mapped")
        bits = mapping.entry & ~WRITE | COPY if copy else mapping.entry
        for at, word, number in self._tables.chunks(self.root, page, count, make=True):
            first = frame + at - page
            self._tables.put(word, array("Q", [each << 12 | bits for each in range(first, first + number)]))

    def take_stale(self) -> list[Run]:
        """And forget them."""
        stale, self.stale = self.stale, []
        return runs_of(set(stale))


def _start(mapping: Mapping) -> int:
    return mapping.start


def _end(mapping: Mapping) -> int:
    return mapping.end


def _pages(length: int) -> int:
    return -(-length // PAGE)


def _promised(mapping: Mapping) -> int:
    """Pages that may each need a frame of their own."""
    return mapping.end - mapping.start if mapping.prot & PROT_WRITE and not mapping.shared else 0
