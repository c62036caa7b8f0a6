"""Lazy restore: the guest runs at once, and its pages are read from the page files while it does.

Every page that is not zero is a hole in the machine's RAM at first (vmm/consumers/missing.py). One thread waits for
what is touched and reads the block that it lies in; others read everything: what the snapshot says was in use first
(heat.py), then the newest file of the chain first (what was dirtied last is wanted first), and go on behind what was
touched. Each block is read by one of them, once. A block that is not what was saved ends the machine: it never goes on
with other bytes, or with zeros.

The RAM is not reserved before (it would take as long as reading it). Whether there is room for it is looked at first;
a page for which there is none all the same ends the machine as a damaged one does, and when all pages are there, the
rest, which is zero, is reserved. Until then nobody writes to a hole but this process, which is told ENOMEM.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import select
import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ipc.shm import open_fd, reserve
from ipc.steps import step

from ...client.holds import Lease
from ...client.machine import Machine
from ...errors import ExitCode, VmmError
from ..missing import MissingPages
from .layers import Block, SlotPages
from .pagefile import PAGE, Scratch
from .pagemap import BLOCK_PAGES, page_numbers
from .threads import THREADS, Progress

__all__ = ["Arriving", "Order", "Shared"]

_LOOK_EVERY = 0.2       # seconds between two looks whether the machine is there still
_RESERVED = 64 << 20    # bytes of zeros that are reserved at once
_WHAT = "lazy restore"


class Shared:
    """Files that several machines are restored from: the last that needs them closes them."""

    def __init__(self, files: contextlib.ExitStack) -> None:
        self._files = files
        self._kept: contextlib.ExitStack | None = None
        self._lock = threading.Lock()
        self._users = 0

    def join(self) -> None:
        """One more needs them."""
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        """One less."""
        with self._lock:
            self._users -= 1
            if not self._users and self._kept is not None:
                self._kept.close()

    def keep(self) -> None:
        """Who has opened them closes them no more: whoever needs them does."""
        with self._lock:
            self._kept = self._files.pop_all()
            if not self._users:
                self._kept.close()


class Arriving(threading.Thread):
    """The pages of a machine that has not started yet, on their way as soon as the thread is started. It ends
    ``lease``, and needs ``slots`` (that are of ``shared``) as long as it lives. ``failed``: why pages could not come,
    once it has ended; the machine was stopped for that."""

    def __init__(self, machine: Machine, lease: Lease, slots: dict[int, SlotPages], heat: dict[int, NDArray[np.uint8]],
                 shared: Shared, progress: Progress) -> None:
        """``heat``: of each block of each slot. Raises VmmError, with nothing open that was not before."""
        super().__init__(name=_WHAT)
        self._lease = lease
        self._slots = slots
        self._progress = progress
        self._order = Order(slots, heat)
        self._total = sum(pages.pages for pages in slots.values())
        self._over = threading.Event()
        self._whole = threading.Event()     # every page that is not zero is there, or it is over
        if not self._total:
            self._whole.set()
        self.failed: VmmError | None = None
        self._machine = machine.beside(lease)       # a connection for this thread
        try:
            self._missing = MissingPages(self._machine, {i: _bools(pages.filled, pages.total)
                                                         for i, pages in slots.items()}, what=_WHAT, empty=True)
        except BaseException:
            self._machine.detach()
            raise
        self._wake, self._waker = os.pipe()
        self._ended = False
        self._shared = shared
        shared.join()

    def wait(self) -> None:
        """Until every page is there. Raises VmmError with the reason when they do not come."""
        self.join()
        if self.failed is not None:
            raise VmmError(f"machine '{self._machine.name}' was stopped: {self.failed}", ExitCode.STOPPED)

    def give_up(self) -> None:
        """The machine is no more. Idempotent."""
        self._over.set()
        if self.ident is None:
            if not self._ended:
                self._ended = True
                self._end()
        else:
            self.join()

    def run(self) -> None:
        """The thread."""
        readers = [threading.Thread(target=self._read, name=_WHAT) for _ in range(THREADS)]
        try:
            step("restore-begun")
            for each in readers:
                each.start()
            self._serve(len(readers))
            if not self._over.is_set():
                step("restore-read")
                self._missing.finish()
                self._lease.close()
        except BaseException as exc:
            self._fail(exc)
        finally:
            self._over.set()
            self._whole.set()
            for each in readers:
                if each.ident is not None:
                    each.join()
            self._end()

    def _serve(self, reading: int) -> None:
        """What is touched, until so many readers have nothing left to read. Raises VmmError."""
        scratch, poll = Scratch(), select.poll()
        poll.register(self._wake, select.POLLIN)
        for fd in self._missing.faults:
            poll.register(fd, select.POLLIN)
        while reading:
            ready = poll.poll(_LOOK_EVERY * 1000)
            if self._over.is_set() or (not ready and self._machine.status()["state"] == "ended"):
                self._over.set()        # and nothing more comes
                return
            for fd, _ in ready:
                if fd == self._wake:        # a reader has nothing left to read
                    reading -= len(os.read(fd, 1))
                    continue
                for want in self._missing.wanted(fd):
                    if (found := self._order.take(want.slot, want.page)) is not None:
                        self._bring(want.slot, found, scratch)
            self._progress(self._total - self._missing.left, self._total)

    def _read(self) -> None:
        """One of the threads that read everything; then the zero pages are reserved."""
        scratch = Scratch()
        try:
            while not self._over.is_set() and (found := self._order.next()) is not None:
                self._bring(*found, scratch)
            self._whole.wait()      # before, it would be reserved that what is still to come is zero
            for slot, start in self._order.rest():
                if self._over.is_set():
                    return
                self._reserve(slot, start)
        except BaseException as exc:
            self._fail(exc)
        finally:
            os.write(self._waker, b"x")

    def _bring(self, slot: int, block: Block, scratch: Scratch) -> None:
        """Raises VmmError."""
        pages = self._slots[slot]
        data = pages.read(block, scratch)
        self._missing.put(slot, page_numbers(pages.mask(block)) + block.number * BLOCK_PAGES, data)
        if not self._missing.left:
            self._whole.set()

    def _reserve(self, slot: int, start: int) -> None:
        """What is there stays as it is. Raises VmmError."""
        fd = open_fd(self._missing.segment(slot))
        try:
            reserve(fd, start, min(_RESERVED, self._slots[slot].total * PAGE - start))
        except OSError as exc:
            raise VmmError(f"{_WHAT}: slot {slot}: cannot be reserved: {exc.strerror} (is /dev/shm full?)") from None
        finally:
            os.close(fd)

    def _fail(self, exc: BaseException) -> None:
        """The first reason counts; the machine is ended, if that is not why."""
        if self._over.is_set():
            return
        self._over.set()
        self.failed = exc if isinstance(exc, VmmError) else VmmError(f"{_WHAT}: {exc or type(exc).__name__}")

    def _end(self) -> None:
        try:
            if self.failed is not None:
                self._machine.stop(f"its memory could not be restored: {self.failed}")
        except VmmError:
            pass        # it has gone
        finally:
            self._missing.close()
            os.close(self._wake)
            os.close(self._waker)
            self._shared.leave()
            self._machine.detach()


class Order:
    """Which block is read next, and by whom: each is given to one. Threads share it. ``heat``: {slot: uint8 [blocks]},
    those that are more than 0 come first, the highest of all."""

    def __init__(self, slots: dict[int, SlotPages], heat: dict[int, NDArray[np.uint8]]) -> None:
        self._lock = threading.Lock()
        self._slots = slots
        #: Runs of blocks of one file of one slot: (slot, file, block numbers); the number of each one's first block.
        self._runs: list[tuple[int, int, NDArray[np.int64]]] = []
        self._firsts: list[int] = []
        count = 0
        files = max((pages.files for pages in slots.values()), default=0)
        for file in range(files):
            for slot, pages in slots.items():
                if file < pages.files and len(numbers := pages.numbers(file)):
                    self._runs.append((slot, file, numbers))
                    self._firsts.append(count)
                    count += len(numbers)
        levels = np.concatenate([np.zeros(0, np.uint8), *(heat[slot][numbers] for slot, _, numbers in self._runs)])
        levels = np.frexp(levels)[1]        # in the order of the file, where one is not twice as hot as the other
        coldest_first = np.argsort(levels[::-1], kind="stable")
        self._hot: list[int] = (count - 1 - coldest_first[count - np.count_nonzero(levels):]).tolist()
        self._taken = bytearray(count)
        self._at = 0
        self._rest = ((slot, start) for slot, pages in slots.items()
                      for start in range(0, pages.total * PAGE, _RESERVED))

    def next(self) -> tuple[int, Block] | None:
        """The next block, and its slot; None: all are taken."""
        with self._lock:
            at = self._next_hot()
            if at is None:
                at = self._taken.find(0, self._at)
                if at < 0 and (at := self._taken.find(0)) < 0:
                    return None
                self._at = at + 1
            self._taken[at] = 1
            slot, file, numbers, first = self._run(at)
            return slot, Block(file, int(numbers[at - first]))

    def _next_hot(self) -> int | None:
        while self._hot:
            if not self._taken[at := self._hot.pop()]:
                return at
        return None

    def take(self, slot: int, page: int) -> Block | None:
        """The block that this page is in, if nobody has it yet; what lies behind it is next."""
        block = self._slots[slot].find(page)
        if block is None:
            return None
        with self._lock:
            run = next(i for i, (s, file, _) in enumerate(self._runs) if (s, file) == (slot, block.file))
            at = self._firsts[run] + int(np.searchsorted(self._runs[run][2], block.number))
            if self._taken[at]:
                return None
            self._taken[at], self._at = 1, at + 1
            return block

    def rest(self) -> Iterator[tuple[int, int]]:
        """(slot, first byte) of what is to be reserved; each is given to one."""
        while True:
            with self._lock:
                found = next(self._rest, None)
            if found is None:
                return
            yield found

    def _run(self, at: int) -> tuple[int, int, NDArray[np.int64], int]:
        run = bisect.bisect_right(self._firsts, at) - 1
        return *self._runs[run], self._firsts[run]


def _bools(words: NDArray[np.uint64], total: int) -> NDArray[np.bool_]:
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:total].view(np.bool_)
