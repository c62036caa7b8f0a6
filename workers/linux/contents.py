"""Regular files: their contents, in frames of the machine's memory.

A page of a file is in one of four states: it has a frame; it has one that nobody has written to yet (fallocate(2)),
which reads as zeros and counts as a hole; it is still in the source that the file was imported from; or it is a hole.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from .frames import NoFrames, Run, runs_of
from .inodes import Cut, Inode, Origin, Store, origin_of, read_source
from .sources import Entry
from .space import PAGE

__all__ = ["LARGEST", "Regular"]

#: Bytes of a file.
LARGEST = 2**63 - 1

_AROUND = 32            # pages read from a source at once


class _Pages:
    """Page numbers, as runs (first, end) in ascending order."""

    __slots__ = ("runs",)

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        self.runs = [(first, end) for first, end in runs]

    def __bool__(self) -> bool:
        return bool(self.runs)

    def run(self, page: int) -> tuple[int, int] | None:
        """The one that the page is in."""
        at = bisect_right(self.runs, page, key=lambda run: run[0]) - 1
        return self.runs[at] if at >= 0 and page < self.runs[at][1] else None

    def __contains__(self, page: int) -> bool:
        return bool(self.runs) and self.run(page) is not None

    def count(self, first: int, end: int) -> int:
        return sum(max(0, min(end, high) - max(first, low)) for low, high in self.runs)

    def after(self, page: int) -> int | None:
        """The first of them that is not below ``page``."""
        return next((max(page, low) for low, high in self.runs if high > page), None)

    def remove(self, first: int, end: int) -> None:
        kept = []
        for low, high in self.runs:
            kept += [(low, min(high, first)), (max(low, end), high)] if low < end and first < high else [(low, high)]
        self.runs = [(low, high) for low, high in kept if low < high]


class Regular(Inode):
    """A regular file. It can be mapped (``space.Backing``). ``mapped``: in how many address spaces it is; while it is
    in any, pages that it loses are put into ``Store.cut``."""

    __slots__ = ("_exposed", "_frames", "_origin", "_reserved", "_size", "_source_size", "_unread", "mapped")

    def __init__(self, store: Store, mode: int, uid: int = 0, gid: int = 0, rdev: int = 0, *, number: int = 0) -> None:
        super().__init__(store, mode, uid, gid, number=number)
        self.mapped = 0
        self._size = 0
        self._frames: dict[int, int] = {}       # by page
        self._reserved: dict[int, int] = {}     # those that nobody has written to
        self._unread = _Pages()                 # pages that are still in the source
        self._origin: Origin | None = None
        self._source_size = 0                   # bytes that the source has of it
        self._exposed = False                   # programs may have written behind the end, by a mapping

    @property
    def size(self) -> int:
        return self._size

    @property
    def blocks(self) -> int:
        return len(self._frames) + len(self._reserved) + self._unread.count(0, _pages(self._size))

    @property
    def held(self) -> list[Run]:
        """Frames that it has."""
        return runs_of([*self._frames.values(), *self._reserved.values()])

    # --- mappings --------------------------------------------------------------------------------------------------

    def keep_mapped(self) -> None:
        self.mapped += 1
        self.keep()

    def let_go_mapped(self) -> None:
        self.mapped -= 1
        self.let_go()

    def frame(self, page: int) -> int:
        """Of a page, which gets one where it has none. Raises NoFrames, and IndexError behind the end and where the
        source fails: for a program the two are the same (SIGBUS)."""
        if not 0 <= page < _pages(self._size):
            raise IndexError
        found = self._frames.get(page)
        if found is None:
            try:
                found = self._load(page) if page in self._unread else self._written(page)
            except OSError:
                raise IndexError from None
        self._exposed = True
        return found

    # --- reading ---------------------------------------------------------------------------------------------------

    def read(self, offset: int, count: int) -> bytes:
        """Up to the end. Raises OSError where the source fails."""
        end = min(offset + count, self._size)
        if 0 < end - offset <= PAGE - offset % PAGE:        # as most are
            return self._part(offset // PAGE, offset % PAGE, end - offset)
        parts = []
        while offset < end:
            page, start = divmod(offset, PAGE)
            part = min(PAGE - start, end - offset)
            parts.append(self._part(page, start, part))
            offset += part
        return b"".join(parts)

    def _part(self, page: int, start: int, count: int) -> bytes:
        frame = self._frames.get(page)
        if frame is None:
            if page not in self._unread:
                return bytes(count)
            try:
                frame = self._load(page)
            except NoFrames:
                return self._fetch(page, 1)[start:start + count]
        return self.store.memory.read(frame, start, count)

    def next_data(self, offset: int) -> int:
        """SEEK_DATA. Raises OSError."""
        if 0 <= offset < self._size:
            page = offset // PAGE
            if page in self._frames or page in self._unread:
                return offset
            following = [self._unread.after(page), min((each for each in self._frames if each > page), default=None)]
            found = min((each * PAGE for each in following if each is not None), default=self._size)
            if found < self._size:
                return found
        raise OSError(errno.ENXIO, "")

    def next_hole(self, offset: int) -> int:
        """SEEK_HOLE: there is one at the end at the latest. Raises OSError."""
        if not 0 <= offset < self._size:
            raise OSError(errno.ENXIO, "")
        page = offset // PAGE
        while True:
            run = self._unread.run(page)
            if run is not None:
                page = run[1]
            elif page in self._frames:
                page += 1
            else:
                return min(max(offset, page * PAGE), self._size)

    # --- writing ---------------------------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """How many bytes were written: those for which there are frames. Raises OSError: ENOSPC when there are none,
        EIO where the source fails."""
        end = offset + len(data)
        first, last = offset // PAGE, _pages(end)
        new = [page for page in range(first, last) if page not in self._frames and page not in self._reserved]
        free = self.store.frames.free
        if len(new) > free:
            end = new[free] * PAGE
            if end <= offset:
                raise OSError(errno.ENOSPC, "")
            data = data[:end - offset]
            last = new[free]
            del new[free:]
        if new:
            self._give_frames(new, offset, end)
        if self._reserved:
            for page in range(first, last):
                if page in self._reserved:
                    self._written(page)
        if end > self._size:
            self._grow(end)
        done = 0
        for page in range(first, last):
            start = max(offset - page * PAGE, 0)
            part = min(PAGE - start, len(data) - done)
            self.store.memory.write(self._frames[page], start, data[done:done + part])
            done += part
        return done

    def _give_frames(self, pages: list[int], offset: int, end: int) -> None:
        """To pages that have none, of which bytes ``offset`` to ``end`` will be written. Raises OSError."""
        kept = {page: self._fetch(page, 1) for page in (pages[0], pages[-1]) if page in self._unread
                and (page * PAGE < offset or end < min((page + 1) * PAGE, self._size))}
        for page, frame in zip(pages, self._take(len(pages)), strict=True):
            self._frames[page] = frame
        for page, contents in kept.items():
            self.store.memory.write(self._frames[page], 0, contents)
        if self._unread:
            self._unread.remove(pages[0], pages[-1] + 1)

    def resize(self, size: int) -> None:
        """ftruncate(2). What was allocated behind the end goes unless it grows, and so does what a program has written
        behind the end of its last page."""
        if size > self._size:
            self._grow(size)
        else:
            self._drop(_pages(size), _pages(LARGEST), copies=True)
            self._zero(size, _pages(size) * PAGE)
            self._source_size = min(self._source_size, size)
            self._size = size

    def allocate(self, offset: int, end: int, *, grow: bool) -> None:
        """fallocate(2): frames for all of that range. Those that it has without data count as data now, as in Linux.
        Raises OSError (ENOSPC), and nothing is changed."""
        first, last = offset // PAGE, _pages(end)
        missing = last - first - self._unread.count(first, last) - sum(
            1 for frames in (self._frames, self._reserved) for page in frames if first <= page < last)
        if missing > self.store.frames.free:
            raise OSError(errno.ENOSPC, "")
        for page in [page for page in self._reserved if first <= page < last]:
            self._written(page)
        if missing:
            pages = [page for page in range(first, last)
                     if page not in self._frames and page not in self._reserved and page not in self._unread]
            self._reserved.update(zip(pages, self._take(missing), strict=True))
        if grow and end > self._size:
            self._grow(end)

    def punch(self, offset: int, end: int) -> None:
        """The range is zero, and its whole pages have no frames. Raises OSError, and nothing is changed: what remains
        of a page that is still in the source needs a frame."""
        first, last = _pages(offset), end // PAGE
        edges = {page for page, partly in ((offset // PAGE, offset % PAGE), (last, end % PAGE)) if partly}
        for page in edges:
            if page in self._unread:
                try:
                    self._load(page)
                except NoFrames:
                    raise OSError(errno.ENOSPC, "") from None
        if first > last:        # within a page
            self._zero(offset, end)
            return
        self._zero(offset, first * PAGE)
        self._zero(last * PAGE, end)
        self._drop(first, last)

    def dispose(self) -> None:
        self._drop(0, _pages(LARGEST))

    # --- frames ----------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> list[int]:
        """Raises NoFrames, and none is taken."""
        return [frame for first, length in self.store.frames.take(count) for frame in range(first, first + length)]

    def _written(self, page: int) -> int:
        """The frame of a page that was a hole, and is no more. Raises NoFrames."""
        frame = self._reserved.pop(page, None)
        if frame is None:
            (frame,) = self._take(1)
        self._frames[page] = frame
        return frame

    def _grow(self, size: int) -> None:
        if self._exposed:
            self._zero(self._size, _pages(self._size) * PAGE)
        self._size = size

    def _zero(self, offset: int, end: int) -> None:
        """A part of one page."""
        frame = self._frames.get(offset // PAGE)
        if frame is not None and offset < end:
            self.store.memory.write(frame, offset % PAGE, bytes(end - offset))

    def _drop(self, first: int, end: int, *, copies: bool = False) -> None:
        """They are holes. ``copies``: who has mapped the file loses those too that it has made by writing."""
        dropped = []
        for frames in (self._frames, self._reserved):
            few = range(first, end) if end - first < len(frames) else list(frames)
            dropped += [frames.pop(page) for page in few if first <= page < end and page in frames]
        self._unread.remove(first, end)
        if self.mapped and first < end:
            self.store.cut.append(Cut(self, first, end, None if copies else frozenset(dropped)))
        unused = self.store.frames.drop(dropped)
        if unused:
            self.store.memory.clear(unused)
            self.store.frames.give(unused)

    # --- the source ------------------------------------------------------------------------------------------------

    def _load(self, page: int) -> int:
        """The frame of a page that was still in the source; its neighbours come with it while there is memory enough.
        Raises NoFrames, and OSError where the source fails."""
        low, high = self._unread.run(page) or (page, page + 1)
        first = page - page % _AROUND
        first, end = max(low, first), min(high, first + _AROUND)
        if self.store.frames.free < 4 * _AROUND:
            first, end = page, page + 1
        contents = memoryview(self._fetch(first, end - first))
        for index, frame in enumerate(self._take(end - first)):
            self._frames[first + index] = frame
            self.store.memory.write(frame, 0, contents[index * PAGE:(index + 1) * PAGE])
        self._unread.remove(first, end)
        return self._frames[page]

    def _fetch(self, page: int, count: int) -> bytes:
        """Pages of the source, zero behind its end. Raises OSError."""
        assert self._origin is not None
        name, path = self._origin
        wanted = min(self._source_size - page * PAGE, count * PAGE)
        found: bytes = read_source(lambda: self.store.source(name).read(path, page * PAGE, wanted))
        if len(found) != wanted:
            raise OSError(errno.EIO, "")
        return found + bytes(count * PAGE - wanted)

    @property
    def changed_source(self) -> Origin | None:
        """Somebody has begun to read it, and the rest is not there: where it should be."""
        if self._origin is None or not self._unread.runs or not self._frames:
            return None
        name, path = self._origin
        try:
            return None if self.store.source(name).read(path, self._source_size - 1, 1) else self._origin
        except OSError:
            return self._origin

    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return super().save() | {
            "size": self._size, "mapped": self.mapped, "exposed": self._exposed,
            "frames": _runs(self._frames), "reserved": _runs(self._reserved),
            "unread": [list(run) for run in self._unread.runs], "source_size": self._source_size,
            "origin": list(self._origin) if self._origin else None}

    def load(self, saved: dict[str, Any]) -> None:
        super().load(saved)
        self._size, self.mapped, self._exposed = saved["size"], saved["mapped"], saved["exposed"]
        self._frames, self._reserved = _from_runs(saved["frames"]), _from_runs(saved["reserved"])
        self._unread = _Pages(saved["unread"])
        self._source_size, self._origin = saved["source_size"], origin_of(saved)

    def load_entry(self, entry: Entry, origin: Origin) -> None:
        super().load_entry(entry, origin)
        self._size = self._source_size = entry.size
        if entry.size:
            self._unread = _Pages([(0, _pages(entry.size))])
            self._origin = origin


def _pages(size: int) -> int:
    return -(-size // PAGE)


def _runs(frames: dict[int, int]) -> list[list[int]]:
    """[page, frame, how many]: where both go on together."""
    runs: list[list[int]] = []
    for page, frame in sorted(frames.items()):
        if runs and (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]) == (page, frame):
            runs[-1][2] += 1
        else:
            runs.append([page, frame, 1])
    return runs


def _from_runs(runs: list[list[int]]) -> dict[int, int]:
    return {page + index: frame + index for page, frame, count in runs for index in range(count)}
