"""Missing pages: the guest runs already, and waits for those that it touches before they have come. Post-copy's, at
the target (vmm/consumers/migration/target.py), and a lazy restore's (vmm/consumers/snapshot/lazy.py).

The pages that are missing are holes in the machine's RAM segments. Every worker has registered its mapping with
a userfaultfd of its own: what touches a hole, the guest or the worker itself, waits. Pages are put in through
a registered mapping of this process, which fills a hole in one step: half a page, or zeros, are never seen.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ipc.shm import PAGE_SIZE as PAGE
from ipc.shm import Segment
from ipc.sockets import FdListener
from ipc.userfault import Userfault, UserfaultError

from ..client.machine import Machine
from ..errors import VmmError
from ..machine.runtime import machine_dir
from .pages import runs

__all__ = ["MissingPages", "Wanted"]

_FD_TIMEOUT = 10.0
_SOCKET = "userfault"      # vmm/machine/runtime.py leaves room for it


@dataclass(frozen=True, slots=True)
class Wanted:
    """A page that a vCPU waits for."""

    slot: int
    page: int


class MissingPages:
    """The missing pages of a machine that has not started yet. ``with`` it; ``pages`` {slot id: bool[pages]}. Threads
    may share it."""

    def __init__(self, machine: Machine, pages: dict[int, NDArray[np.bool_]], *, what: str = "post-copy",
                 empty: bool = False) -> None:
        """``what``: for people. ``empty``: of these slots nothing is there yet, all that is not missing is zero, and
        each page is put once. Raises VmmError, with nothing left open."""
        self._what = what
        self._empty = empty
        self._lock = threading.Lock()
        self._machine = machine
        self._missing = pages
        self.left = sum(int(p.sum()) for p in pages.values())
        self._waiting: dict[Wanted, list[tuple[int, int, float]]] = {}
        self._asked: set[Wanted] = set()
        #: Seconds from when a fault was read until its vCPU was told to go on, of each.
        self.waits: list[float] = []
        #: Seconds that each vCPU has waited for pages.
        self.blocked = [0.0] * len(machine.status()["vcpus"])
        self._open = contextlib.ExitStack()
        self._zeros = np.zeros(PAGE, np.uint8)
        try:
            self._set_up(machine)
        except UserfaultError as exc:
            self.close()
            raise VmmError(f"{self._what}: {exc}") from None
        except BaseException:
            self.close()
            raise

    def _set_up(self, machine: Machine) -> None:
        self._own = self._open.enter_context(Userfault.make())
        self._segments: dict[int, Segment] = {}
        for slot, missing in self._missing.items():
            # A mapping of our own: the machine's views of it may be looked at, this one never is.
            segment = self._open.enter_context(Segment.open(machine.ram_segment(slot)))
            self._segments[slot] = segment
            if self._empty:
                segment.buf.madvise(mmap.MADV_REMOVE, 0, segment.size)
            else:
                self._make_holes(slot, missing)
            self._own.register(segment.address, segment.size)
        listener = FdListener(machine_dir(machine.name) / _SOCKET)
        try:
            self._addresses = machine.incoming(str(listener.path))
            self.faults: dict[int, tuple[int, Userfault]] = {}      # {fd: (vCPU, its userfaultfd)}
            waiting = set(range(len(self._addresses)))
            while waiting:
                index, fd = listener.receive(_FD_TIMEOUT)
                if index in waiting:
                    self.faults[fd] = (index, self._open.enter_context(Userfault(fd)))
                    waiting.discard(index)
                else:       # the same once more: the request was repeated
                    os.close(fd)
        finally:
            listener.close()

    @property
    def slots(self) -> Container[int]:
        """Those that may miss pages."""
        return self._segments

    def segment(self, slot: int) -> str:
        """Name of the slot's segment."""
        return self._segments[slot].name

    def add(self, pages: dict[int, NDArray[np.bool_]]) -> None:
        """These are missing too, since they have changed at the source; before the start. Raises VmmError."""
        for slot, bits in pages.items():
            if slot not in self._segments:
                raise VmmError(f"{self._what}: slot {slot} was complete before")
            self._make_holes(slot, bits)
            self.left += int((bits & ~self._missing[slot]).sum())
            self._missing[slot] |= bits

    def _make_holes(self, slot: int, bits: NDArray[np.bool_]) -> None:
        for first, count in _runs(bits):
            self._segments[slot].buf.madvise(mmap.MADV_REMOVE, first * PAGE, count * PAGE)

    def some(self, count: int) -> list[Wanted]:
        """Some that have not come, so many at most: they may have been lost on their way."""
        for slot, bits in self._missing.items():
            if len(numbers := np.flatnonzero(bits)[:count]):
                return [Wanted(slot, page) for page in numbers.tolist()]
        return []

    def wanted(self, fd: int) -> list[Wanted]:
        """Through ``fd`` (of ``faults``), which may be readable: the pages to ask for, that were not asked for
        yet."""
        vcpu, userfault = self.faults[fd]
        found = []
        for address in userfault.faults():
            want = self._locate(vcpu, address)
            with self._lock:
                if there := not self._missing[want.slot][want.page]:
                    self._fill_hole(want)
                else:
                    self._waiting.setdefault(want, []).append((fd, address, time.monotonic()))
                    if want not in self._asked:
                        self._asked.add(want)
                        found.append(want)
            if there:
                userfault.wake(address)
        return found

    def _fill_hole(self, want: Wanted) -> None:
        """It had come already, or came in between. What was given up since (a program's memory) is zero. Raises
        VmmError."""
        try:
            self._own.fill(self._segments[want.slot].address + want.page * PAGE, self._zeros.ctypes.data, PAGE)
        except OSError as exc:
            raise self._full(want.slot, exc) from None

    def _locate(self, vcpu: int, address: int) -> Wanted:
        for slot, start in self._addresses[vcpu].items():
            offset = address - start
            if slot in self._segments and 0 <= offset < self._segments[slot].size:
                return Wanted(slot, offset // PAGE)
        raise VmmError(f"{self._what}: vCPU {vcpu} accessed {address:#x}, which is not in a slot with missing pages")

    def ask_again(self) -> list[Wanted]:
        """Every page that is waited for: the source is another one now."""
        return list(self._waiting)

    def put(self, slot: int, numbers: NDArray[np.int64], data: NDArray[np.uint8] | None) -> None:
        """These pages have come (``data`` [n, 4096], None: zero pages). One that is there already is left as the
        guest has made it. The same page is not put by two threads at once. Raises VmmError."""
        missing = self._missing[slot]
        fresh = missing[numbers]
        if not fresh.all():
            numbers = numbers[fresh]
            data = None if data is None else data[fresh]
        content = np.zeros((len(numbers), PAGE), np.uint8) if data is None else np.ascontiguousarray(data)
        base = self._segments[slot].address
        for first, count, there in runs(numbers):
            try:
                self._own.fill(base + first * PAGE, content.ctypes.data + there.start * PAGE, count * PAGE,
                               holes=self._empty)
            except OSError as exc:
                raise self._full(slot, exc) from None
        with self._lock:
            missing[numbers] = False
            self.left -= len(numbers)
            if self._waiting:
                self._release(slot, numbers)

    def _release(self, slot: int, numbers: NDArray[np.int64]) -> None:
        came = set(numbers.tolist())
        for want in [w for w in self._waiting if w.slot == slot and w.page in came]:
            for fd, address, since in self._waiting.pop(want):
                vcpu, userfault = self.faults[fd]
                userfault.wake(address)
                waited = time.monotonic() - since
                self.waits.append(waited)
                self.blocked[vcpu] += waited

    def _full(self, slot: int, exc: OSError) -> VmmError:
        return VmmError(f"{self._what}: slot {slot}: pages cannot be filled in: {os.strerror(exc.errno or 0)}"
                        + (" (is /dev/shm full?)" if exc.errno != errno.EEXIST else ""))

    def bitmaps(self) -> dict[int, NDArray[np.bool_]]:
        """What is still missing."""
        return self._missing

    def finish(self) -> None:
        """Everything is there."""
        self._machine.arrived()

    def close(self) -> None:
        """Idempotent. What waits for a page keeps waiting."""
        self._open.close()

    def __enter__(self) -> MissingPages:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _runs(bits: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of set bits."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], bits, [False])).astype(np.int8)))
    for first, end in edges.reshape(-1, 2).tolist():
        yield first, end - first
