"""Reap and flush: the middle of a dirty page's path (QEMU: kvm_dirty_ring_reap and below).

One reap is: harvest every ring into staging; reset in every owner; compare counts; publish staging
into the slot bitmaps. The coordinator's single thread is the slots lock. A vCPU waiting at ring-full
continues as soon as its own ring is reset: whatever it dirties from then on is protected again and
makes new entries, so invariant 2 does not need it to wait for the others.

A reap that nobody waits for only harvests while the rings have room (docs/decisions/0019): a page that is protected
again before somebody has asked for it costs the guest a fault for nothing. What is harvested and not reset stays in
staging, of all rings until all are reset.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from ipc.lanes import Kind, Lane
from ipc.layout import MachineControl, ReaperState
from ipc.steps import step

from ..errors import VmmError
from ..machine.events import Tracer
from ..machine.spec import ReaperSpec
from ..vcpus.handle import VcpuHandle
from ..vcpus.pool import VcpuPool
from .log import DirtyLog
from .recorder import Recorder
from .schedule import Schedule

__all__ = ["Reaper"]

_Harvested = dict[int, int]             # {vCPU index: entries}
_Found = dict[int, tuple[int, int]]     # and those that await their reset

_EMPTY_FULLS = 3        # full-but-empty reports in a row that mean a ring has lost count
_DRAIN_PASSES = 8       # with every vCPU paused the second pass finds nothing


class ReapMode(Protocol):
    """What is asked of a mode of dirty tracking here (vmm/dirty/tracking has the modes)."""

    #: It has a dirty ring of each vCPU.
    rings: bool

    def gather(self, reaper: Reaper) -> int:
        """Into the slot bitmaps: whatever the vCPUs have dirtied by now, who have all been kicked; pages, counted
        once per vCPU. Raises VmmError."""
        ...

    def drain(self, reaper: Reaper) -> int:
        """``gather``, with every vCPU paused, to the last page: before another mode is switched in."""
        ...


class Reaper:
    """``report_rebuild(vcpu, entries owed, entries reset, pages marked)`` is told of invariant 3. ``lane``: where each
    reap is written down."""

    def __init__(self, spec: ReaperSpec, vcpus: VcpuPool, log: DirtyLog, control: MachineControl,
                 tracer: Tracer, report_rebuild: Callable[[int, int, int, int], None], *,
                 mode: ReapMode, lane: Lane | None = None) -> None:
        self.spec = spec
        self._lane = lane or Lane.of_nobody()
        self.schedule = Schedule(spec)
        self.vcpus = vcpus
        self.log = log
        self._control = control
        self._trace = tracer
        self._report_rebuild = report_rebuild
        #: How the machine logs now.
        self.mode = mode
        self._reapers = spec.reapers
        self._threads = ThreadPoolExecutor(spec.reapers, "reaper") if spec.reapers > 1 else None
        self._last: _Harvested = {}     # by the last reap
        #: Is given whatever is harvested, while the machine is being recorded.
        self.recorder: Recorder | None = None
        #: vCPUs that have left the guest for a full ring and must be let go by the next reap.
        self.full: set[int] = set()
        #: Entries of pages that were in the slot bitmaps already: they had been protected again although nobody had
        #: asked, and written again, which cost the guest a fault that a bitmap would not have. (Or a few less: of
        #: several vCPUs that write to one page, each makes an entry.)
        self.repeats = 0
        self._unpublished = 0       # entries
        self._unasked = False       # since somebody last asked, rings have been reset for lack of room
        #: Reap the rings of those alone: the others' vCPUs may not be able to leave the guest now (a software CPU
        #: that waits for a page, in post-copy).
        self.only_full = False
        if self._trace.reaper:
            self._trace.reaper("init")

    def wait(self) -> None:
        """State WAIT: called before the coordinator sleeps in its poll."""
        if self._control.reaper_state != ReaperState.WAIT:
            self._control.reaper_state = ReaperState.WAIT
            if self._trace.reaper:
                self._trace.reaper("wait")

    def let_go(self) -> None:
        """The bell has rung (ipc/bell.py): reap if a vCPU waits for it."""
        found = self._harvest_full()
        if found or self.full:
            self.wake("ring-full", found)

    def wake(self, reason: str = "", found: _Found | None = None) -> None:
        """State REAPING: a timed wake-up, or (``reason``) a kick of the reaper, for which full rings may have been
        ``found`` already."""
        if reason:
            self._lane.put(Kind.KICK)
            if self._trace.reaper_kick:
                self._trace.reaper_kick(reason)
        if self._trace.reaper:
            self._trace.reaper("wakeup")
        self._control.reaper_state = ReaperState.REAPING
        if not reason:
            self.schedule.woken(time.monotonic())
        self.reap(reset=self._resets_early(), found=found, asked=False)
        self._control.reaper_iteration += 1

    def _resets_early(self) -> bool:
        """Whatever is reaped: it was asked for, or each entry counts (a dirty limit, a recording)."""
        return (self.spec.reset == "early" or self.recorder is not None or self.only_full
                or any(s.control.dirty_quota for s in self.vcpus.all))

    def look_for_full(self) -> None:
        """Which vCPUs have left the guest for a full ring by now, as their control blocks say."""
        for vcpu in self.vcpus.all:
            if vcpu.ring.newly_full():
                if self._trace.full:
                    self._trace.full(vcpu.index)
                if self.mode.rings:     # else it is from before the last switch
                    self.full.add(vcpu.index)

    def worker_died(self, vcpu: VcpuHandle) -> None:
        """Its process is gone. What it logged is in its ring, as far as that is mapped here, and harvested by the
        next reap; a plain bitmap has died with it, and so has a ring that only a predecessor had mapped.
        Repeatable."""
        self.full.discard(vcpu.index)
        if not vcpu.ring.address and not vcpu.control.collected:
            self.log.mark_logged_slots()
            vcpu.control.collected = 1

    def reap(self, *, reset: bool = True, found: _Found | None = None, asked: bool = True) -> int:
        """One reap of every ring; the entries harvested (QEMU: kvm_dirty_ring_reap). Without ``reset`` nothing is
        reset or published while no ring is full, or will soon be. ``found``: in full rings, already. ``asked``: by
        somebody who needs the log."""
        if not self.mode.rings:
            return 0
        began = time.perf_counter_ns()
        if found is None:
            found = self._harvest_full()
        self._control.publish_pending = 1
        full, self.full = self.full, set()
        rings = [s for s in self.vcpus.all if s.ring.address and s.alive and (s.index in full or not self.only_full)]
        dead = [s for s in self.vcpus.all if s.ring.address and not s.alive]
        reset = reset or bool(full or dead)
        parts = self._each_reaper([s for s in rings if s.index not in found], full, reset=reset)
        harvested: _Harvested = {}
        owed: dict[int, int] = {}
        for part in (found, *parts):
            for index, (count, outstanding) in part.items():
                harvested[index], owed[index] = count, outstanding
                if count:
                    self._lane.put(Kind.REAP_VCPU, who=index, value=outstanding << 32 | count)
        now = time.monotonic()
        self.schedule.learn(now, harvested)
        if not reset:
            reset = (any(s.ring.overflowed or not s.ring.countable for s in rings)
                     or self.schedule.is_low(self._room_to_fill()))
            if reset:
                for vcpu in rings:
                    if self._to_reset(vcpu, owed[vcpu.index], full):
                        vcpu.ring.ask_reset(owed[vcpu.index])
        self._unpublished += sum(harvested.values())
        if reset:
            self._unasked = self._unasked or not asked
            for index, count in self._reset(rings, owed, full).items():
                harvested[index] = harvested.get(index, 0) + count
            self._unasked = self._unasked and not asked
            resetting = time.monotonic() - now
            self.schedule.was_reset(resetting)
            self._lane.put(Kind.RESET, int(resetting * 1e9), value=sum(owed.values()), began=int(now * 1e9))
        total = sum(harvested.values())
        self._last = harvested
        took = time.perf_counter_ns() - began
        self._control.reaped_pages += total
        self._control.reap_ns += took
        if total and self._trace.reap:
            self._trace.reap(total, took // 1000)
        wait = self.schedule.plan(now, self.room())
        self._lane.put(Kind.REAP, took, int(wait * 1e6), total, began)
        return total

    def room(self) -> dict[int, int]:
        """{vCPU index: entries until its ring is full}"""
        return {s.index: s.ring.soft_limit - s.ring.outstanding for s in self.vcpus.all if s.running}

    def _room_to_fill(self) -> dict[int, int]:
        """``room`` of the rings that may get full before somebody has them reset. One that all logged pages fit into
        does not: a page makes one entry until its reset. (Where KVM has it mapped more than once, it may make more:
        such a ring counts again from where it has more entries than there are pages.)"""
        pages = sum(slot.pages for slot in self.log.slots.values() if self.log.logs(slot))
        rings = {s.index: s.ring for s in self.vcpus.all}
        return {index: room for index, room in self.room().items()
                if room + rings[index].outstanding < pages or rings[index].outstanding > pages}

    def _reset(self, rings: list[VcpuHandle], owed: dict[int, int], full: set[int]) -> _Harvested:
        """The second half of a reap: of all rings, which have been asked to; what was harvested of those whose workers
        have died."""
        self.vcpus.await_resets([s for s in rings if self._to_reset(s, owed[s.index], full)])
        broken = []
        for vcpu in rings:
            if vcpu.alive and vcpu.index in full:
                vcpu.ring.reported_full()
            if vcpu.ring.outstanding or vcpu.ring.overflowed or vcpu.ring.full_but_empty >= _EMPTY_FULLS:
                broken.append(vcpu)
        for vcpu in broken:
            if vcpu.alive:
                self._lost_count(vcpu, owed[vcpu.index])
        dead = [s for s in self.vcpus.all if s.ring.address and not s.alive]
        collected = {s.index: self._collect(s) for s in dead}
        fresh = self.log.publish()
        if self._unasked:
            self.repeats += max(0, self._unpublished - fresh)
        self._unpublished = 0
        self._control.publish_pending = 0
        for vcpu in dead:
            step("dead-ring-published")
            vcpu.ring.forget()
            vcpu.control.collected = 1
        return collected

    def _harvest_full(self) -> _Found:
        """First of all the rings whose vCPUs wait: what is found there, and their resets have been asked for. Nothing
        where several reapers do all at once anyway."""
        self.look_for_full()
        if not self.full or self._threads is not None:
            return {}
        self._control.publish_pending = 1
        return self._harvest_some([s for s in self.vcpus.all if s.index in self.full and s.ring.address and s.alive],
                                  0, self.full, reset=True)

    def _each_reaper(self, rings: list[VcpuHandle], full: set[int], *, reset: bool) -> list[_Found]:
        """``_harvest_some`` of each reaper at the same time, one per thread: the loops over a ring run without the GIL.
        Trace lines and recordings are written in order, by this thread."""
        if self._threads is None or self._trace.reap_vcpu or self._trace.page or self.recorder is not None:
            return [self._harvest_some(rings, 0, full, reset=reset)]
        return list(self._threads.map(lambda i: self._harvest_some(rings[i::self._reapers], i, full, reset=reset),
                                      range(self._reapers)))

    def _harvest_some(self, rings: list[VcpuHandle], reaper: int, full: set[int], *, reset: bool) -> _Found:
        """Some of the rings, into this reaper's own staging bitmaps: {vCPU index: (entries, those that await their
        reset)}. While a ring is reset, the next one is harvested."""
        found = {}
        for vcpu in rings:
            count = self._harvest(vcpu, self.log.table_addresses[reaper])
            owed = vcpu.ring.outstanding
            if reset and self._to_reset(vcpu, owed, full):
                vcpu.ring.ask_reset(owed)
            found[vcpu.index] = (count, owed)
        return found

    @staticmethod
    def _to_reset(vcpu: VcpuHandle, owed: int, full: set[int]) -> bool:
        """There is something to reset, or a vCPU to let go. A ring that has overflowed is not reset: its totals would
        match then, and only this process would know that entries were written over. It is replaced, once all is
        marked."""
        return (owed != 0 or vcpu.index in full) and not vcpu.ring.overflowed

    def _harvest(self, vcpu: VcpuHandle, table: int) -> int:
        if self._trace.reap_vcpu:
            self._trace.reap_vcpu(vcpu.index)
        if not self._trace.page and self.recorder is None:
            return vcpu.ring.harvest(table)
        pages = np.zeros((vcpu.ring.entries, 3), np.uint64)
        count = vcpu.ring.harvest(table, pages)
        if self.recorder is not None:
            self.recorder.put(vcpu.index, pages[:count])
        trace_page = self._trace.page
        if trace_page:
            for fetch, _, offset in pages[:count].tolist():
                trace_page(vcpu.index, fetch, offset)
        return count

    def _collect(self, vcpu: VcpuHandle) -> int:
        """The last harvest of a ring whose worker has died; its entries. Nobody can write through a dead vCPU: its
        pages need no re-protection. And nothing resets its ring, so it must not be looked at again."""
        countable = vcpu.ring.countable
        count = self._harvest(vcpu, self.log.table_addresses[0])
        if vcpu.ring.overflowed or not countable or vcpu.ring.full_but_empty >= _EMPTY_FULLS:
            self.log.mark_logged_slots()
        return count

    def _lost_count(self, vcpu: VcpuHandle, owed: int) -> None:
        """Invariant 3. What the ring held and lost is unknown: every page of every logged slot may be dirty. They
        are marked before the ring, whose totals say that it has lost count, is replaced: a successor that takes over
        in between does the same again. The vCPU stands still meanwhile, so nothing escapes. One whose ring cannot be
        replaced could continue only without a log: it ends."""
        missing = vcpu.ring.outstanding
        self.vcpus.pause([vcpu])
        step("lost-count-seen")
        pages = self.log.mark_logged_slots()
        step("lost-count-marked")
        try:
            self.vcpus.rebuild_ring(vcpu)
        except VmmError as exc:
            self.vcpus.give_up([vcpu], f"could not replace its ring after a ring count mismatch: {exc}")
        step("lost-count-rebuilt")
        if not self.vcpus.paused:
            self.vcpus.resume([vcpu])
        self._report_rebuild(vcpu.index, owed, owed - missing, pages)

    def flush(self) -> int:
        """Every page written before this call is in the slot bitmaps when it returns (QEMU:
        kvm_dirty_ring_flush): kick every vCPU out of the guest, then reap every ring to its end.

        A running vCPU keeps dirtying behind the reap; what it wrote before the kick is behind it. Raises VmmError when
        not every vCPU can be reached.
        """
        if self.only_full:
            raise VmmError("the dirty log cannot be flushed: pages are still arriving (post-copy), and a software CPU "
                           "that waits for one cannot be stopped")
        if self._trace.flush:
            self._trace.flush(0)
        began = time.perf_counter_ns()
        self.vcpus.kick_all()
        total = self.mode.gather(self)
        self._control.flushes += 1
        self._lane.put(Kind.FLUSH, time.perf_counter_ns() - began, value=total, began=began)
        if self._trace.flush:
            self._trace.flush(1)
        return total

    def drain(self) -> int:
        """With every vCPU paused: until there is nothing left to be gathered; what was."""
        return self.mode.drain(self)

    def drain_rings(self) -> int:
        """Reap until a pass finds nothing; entries harvested."""
        total = 0
        for _ in range(_DRAIN_PASSES):
            count = self.reap()
            total += count
            if not count:
                return total
        # A ring that fills while its vCPU stands still is no account of what that has written.
        for vcpu in self.vcpus.all:
            if vcpu.alive and self._last.get(vcpu.index):
                self._lost_count(vcpu, self._last[vcpu.index])
        return total

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
        self._control.reaper_state = ReaperState.NONE
        if self._trace.reaper:
            self._trace.reaper("exit")
