"""The dirty ring's protocol: both ends, and what lies between them.

A ring is an array of entries (``DirtyGfn``, a power of two of them) that one vCPU fills in and the coordinator
empties, with no lock. An entry goes round::

    free (0) ---- the vCPU stores slot and offset, then releases DIRTY ----> dirty (1)
       ^                                                                        |
       |                                     the coordinator acquires DIRTY, sets the page's bit in staging,
       |                                     then releases RESET
       |                                                                        v
       +---- its owner's reset protects the page again, frees the entry ---- harvested (2)

What holds, and what rests on it:

* **The producer** is KVM, at a write fault (Linux Documentation/virt/kvm/api.rst, 8.29), or compiled code that
  plays it (``publish_entry`` in ipc/compiled/loops.py). Its entries are in sequence: the first that is not DIRTY is
  the end of what there is (QEMU: kvm_dirty_ring_reap_one).
* **Soft-full.** The vCPU is asked out of the guest while ``RING_RESERVE`` entries are free still, so a ring never
  fills up. One that is found without a free entry has been written over: it has lost count.
* **Only its owner resets.** KVM_RESET_DIRTY_RINGS answers to the process that made the VM, so the worker does it
  when the coordinator has raised ``reset_request`` (a futex in the control block); it runs in a thread of its own,
  at any time, also while the vCPU is in the guest. A vCPU that waits at ring-full resets its ring itself: it looks
  at the word already (``awaits_reset`` says so, and whoever is not looking is not woken).
* **A full ring is said in the control block.** The vCPU raises ``ring_full_exits`` and rings a bell (ipc/bell.py).
  The coordinator, and any that takes over, remembers up to where it has seen the count.
* **Both count.** ``fetch_total`` is what was harvested, ``reset_total`` what the resets say they freed; the
  difference is what lies between. Where it is not what was asked for, the ring has lost count (invariant 3).
* **A harvest can be repeated.** Entry, staging bit and ``fetch_total`` are written in this order, and setting a bit
  twice does no harm: whoever takes over from a coordinator that died in between begins at the old ``fetch_total``,
  and counts an entry that it finds in RESET already. ``limit`` keeps it from running into the ring's own RESET
  entries, those that await their reset.
* **Published late.** A page's bit leaves staging when its entry has been reset, so that a consumer never sees a
  page whose next write would go unlogged (invariant 2; vmm/dirty/reaper.py has the order).

:class:`RingReader` is the coordinator's end, :class:`ResetRequests` the worker's.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .layout import DIRTY_GFN_F_DIRTY, MAX_SLOTS, RING_PAGE_OFFSET, RING_RESERVE, DirtyGfn, VcpuControl
from .linux import futex
from .shm import Segment
from .spin import Spin, fence

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ResetRequests", "RingReader"]

# Who waits for reset_request, as futex(2) tells waiters apart.
_THREAD, _VCPU = 1, 2
#: Seconds that a vCPU at ring-full looks for its reset: a coordinator that has to wake up takes up to 200 us.
_ANSWER = 400e-6


class RingReader:
    """The coordinator's end of one vCPU's ring. It is mapped (``address``) while there may be something in it."""

    def __init__(self, control: VcpuControl, entries: int) -> None:
        self._control = control
        self.entries = entries
        self.address = 0
        self._memory: Segment | mmap.mmap | None = None
        self._out = (ctypes.c_uint64 * 4)()
        self._loop: Callable[..., None] | None = None
        block = ctypes.addressof(control)
        self._reset_request_address = block + VcpuControl.reset_request.offset
        self._reset_done_address = block + VcpuControl.reset_done.offset
        #: A harvest found no free entry. Rings keep a reserve free, so that never happens unless entries were
        #: written over (KVM does, where it emulates CPL 0: its soft-full check does not run within a batch).
        self.overflowed = False
        #: Times in a row that the vCPU reported a full ring, and nothing was harvested from it in between.
        self.full_but_empty = 0
        self._harvested_at_full = -1
        self._seen_full = int(control.ring_full_exits)

    # --- where it is ------------------------------------------------------------------------------

    def map_segment(self, segment: Segment) -> None:
        """A software ring. Not that of a worker whose last entries have been collected."""
        if not self._control.collected:
            self._memory = segment
            self.address = segment.address

    def map_kvm(self, fd: int) -> None:
        """The kernel's ring, through the vCPU fd, which stays the caller's. Raises OSError and ValueError where it
        is not that of a vCPU."""
        self.forget()
        if self.entries:
            mapped = mmap.mmap(fd, self.entries * ctypes.sizeof(DirtyGfn), mmap.MAP_SHARED,
                               mmap.PROT_READ | mmap.PROT_WRITE, offset=RING_PAGE_OFFSET * mmap.PAGESIZE)
            byte = ctypes.c_char.from_buffer(mapped)
            self.address = ctypes.addressof(byte)
            del byte
            self._memory = mapped

    def use(self, entries: int) -> None:
        """The worker's ring is another one now, or (0) there is none; it is not mapped yet."""
        self.forget()
        self.entries = entries
        self.begin_anew()

    def begin_anew(self) -> None:
        """It is a fresh one: what was amiss with the last is over, and nobody waits for it to be reset."""
        self.full_but_empty = 0
        self.overflowed = False
        self._seen_full = int(self._control.ring_full_exits)

    def forget(self) -> None:
        """There is nothing in it any more. Idempotent."""
        self.address = 0
        if isinstance(self._memory, mmap.mmap):     # a software ring's segment is its maker's to close
            self._memory.close()
        self._memory = None

    # --- its state ----------------------------------------------------------------------------------

    @property
    def soft_limit(self) -> int:
        """Entries at which the vCPU is asked out of the guest."""
        return max(1, self.entries - RING_RESERVE)

    @property
    def outstanding(self) -> int:
        """Entries harvested and not reset yet. Below 0 or above the ring's size: it has lost count."""
        return int(self._control.fetch_total - self._control.reset_total)

    @property
    def countable(self) -> bool:
        """Its totals are such as can be."""
        return 0 <= self.outstanding <= self.entries

    @property
    def filled(self) -> int:
        """Entries that are not free: those that await their reset, and those that have not been harvested. The latter
        follow one another from the fetch index on, so their end is found by halving; nothing in the ring changes."""
        if not self.address or not self.countable:
            return 0
        outstanding, fetch = self.outstanding, int(self._control.fetch_total)
        first, last = 0, self.entries - outstanding
        while first < last:
            middle = (first + last) // 2
            entry = self.address + (fetch + middle) % self.entries * ctypes.sizeof(DirtyGfn)
            if ctypes.c_uint32.from_address(entry).value & DIRTY_GFN_F_DIRTY:     # DirtyGfn.flags
                first = middle + 1
            else:
                last = middle
        return outstanding + first

    # --- harvest, reset -----------------------------------------------------------------------------

    def harvest(self, table: int, pages: NDArray[np.uint64] | None = None) -> int:
        """Harvest what is there into the staging bitmaps; the number of entries.

        ``table`` is the slot table's address; ``pages`` (uint64 [entries, 3]) takes what was harvested, for
        tracing. The fetch index is stored last: a coordinator that dies before has its successor harvest the
        same entries.
        """
        if not self.address:
            return 0
        if self._loop is None:
            from .compiled.calls import harvest  # late: workers have no use for it

            self._loop = harvest
        control, out = self._control, self._out
        out[2], out[3] = control.last_slot, control.last_offset
        fetch = control.fetch_total
        limit = min(max(0, self.entries - self.outstanding), self.entries)
        self._loop(self.address, self.entries, fetch, limit, table, MAX_SLOTS, ctypes.addressof(out),
                   *((0, 0) if pages is None else (pages.ctypes.data, len(pages))))
        count = int(out[0])
        self.overflowed = self.overflowed or count == limit
        if count:
            control.last_slot, control.last_offset = int(out[2]), int(out[3])
            control.bad_entries += int(out[1])
            control.dirty_pages += count
            control.fetch_total = fetch + count
        return count

    def newly_full(self) -> bool:
        """Its vCPU has left the guest for a full ring since the last time that this was asked."""
        before, self._seen_full = self._seen_full, int(self._control.ring_full_exits)
        return before != self._seen_full

    def reported_full(self) -> None:
        """The vCPU had reported a full ring, and it has been reaped. (Perhaps by a reap that came before the
        report was read: then this one has found nothing, but the ring is not stuck.)"""
        harvested = int(self._control.dirty_pages)
        self.full_but_empty = self.full_but_empty + 1 if harvested == self._harvested_at_full else 0
        self._harvested_at_full = harvested

    def ask_reset(self, expected: int) -> None:
        """Have the worker reset its ring, of which ``expected`` entries have been harvested and not reset yet, and
        its vCPU go on if it waits at ring-full."""
        self._control.reset_expected = expected
        self._control.reset_request = (self._control.reset_request + 1) & 0xFFFF_FFFF
        fence()         # then the look: whoever stops looking says so first, and then looks once more
        futex.wake_as(_VCPU if self._control.awaits_reset else _THREAD, self._reset_request_address, 1)

    def await_reset(self, seconds: float) -> bool:
        """It has done so; False when that takes longer. (Then all that may wait for the request are woken: a worker
        gone wild may have said that its vCPU looks.)"""
        deadline = time.monotonic() + seconds
        while (done := self._control.reset_done) != self._control.reset_request:
            left = deadline - time.monotonic()
            if left <= 0:
                futex.wake(self._reset_request_address, 2)
                return False
            futex.wait(self._reset_done_address, done, left)    # the last answer's wake may come only now
        return True


class ResetRequests:
    """The worker's end: what its ring's reset is asked for, and the answer.

    Its reset thread waits for requests (``wait``). While its vCPU is at ring-full, from ``begin_looking`` to
    ``end_looking``, that looks (``look``), and the thread is not woken. No request is lost between the two:
    the coordinator raises it and then reads ``awaits_reset``, the vCPU lowers that and then reads the request.
    """

    def __init__(self, control: VcpuControl) -> None:
        self._control = control
        block = ctypes.addressof(control)
        self._asked = block + VcpuControl.reset_request.offset
        self._answered = block + VcpuControl.reset_done.offset
        self._word = futex.word(self._asked)
        self._spin = Spin(_ANSWER)

    @property
    def pending(self) -> int | None:
        """The request that is to be answered."""
        request = self._control.reset_request
        return None if request == self._control.reset_done else int(request)

    def wait(self) -> None:
        """By the reset thread: until there is one, or something else ends the wait."""
        done = self._control.reset_done
        if self._control.reset_request == done:
            futex.wait_as(_THREAD, self._asked, done)

    def begin_looking(self) -> None:
        """By the vCPU, before it says that its ring is full."""
        self._control.awaits_reset = 1
        fence()

    def look(self, seconds: float) -> None:
        """By the vCPU: until there is one, or ``end_look`` or a signal, or so many seconds have passed."""
        done = self._control.reset_done
        if not self._spin.until_not(self._word, done):
            futex.wait_as(_VCPU, self._asked, done, seconds)

    def end_look(self) -> None:
        """By other threads: have the vCPU look at what else there is. One that is about to sleep misses it."""
        futex.wake_as(_VCPU, self._asked, 1)

    def end_looking(self) -> None:
        """By the vCPU: requests are the thread's again, with that which may have come just now."""
        self._control.awaits_reset = 0
        fence()
        if self.pending is not None:
            futex.wake_as(_THREAD, self._asked, 1)

    def expected(self) -> int:
        """Entries that await their reset; 0: there is nothing to reset, the vCPU is to go on."""
        return int(self._control.reset_expected)

    def answer(self, request: int) -> None:
        """It has been done. The coordinator compares the totals."""
        self._control.reset_done = request
        futex.wake(self._answered, 1)
