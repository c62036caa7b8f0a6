"""The verifier: proof, while the machine runs, that no dirtied page was lost.

After the kernel's dirty_log_test, with an oracle that shares nothing with the log: a copy of RAM. A
round ends with every vCPU paused and every ring drained. Then, for each page of each logged slot:

* clean means unchanged since the last round. A changed clean page is **lost**.
* dirty means changed. An unchanged dirty page is **surplus**, but for one per vCPU: the store that it
  had logged and not yet retired when it was stopped, the last entry of its ring. That store may come
  first in the next round, or never (the vCPU ended): the entry before the round is excused too. A plain
  bitmap has no last entry: there as many pages are excused, whichever they are.
  Nor is a page surplus that was marked without a write of the guest's (:attr:`DirtyLog.on_mark`): by the host,
  after a lost count, or where a log has died with its worker.
  Only pages that are the guest's to use are held to this, not its image and stacks: a return address
  is often the one that was there, and KVM logs a page when it first maps it writable, which the first
  read or instruction fetch may do (arch/x86/kvm/mmu/spte.c, make_spte).

The copy lies in shared memory, so that a coordinator that replaces one that died continues with
the same reference and proves that the crash lost nothing. The dirty pages are copied after each round; a
lost page is counted once and then copied too.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from ipc.bitmap import GROUP_WORDS, set_bit_indices, words_of_groups
from ipc.layout import MachineControl
from ipc.shm import PAGE_SIZE, Segment
from ipc.steps import step

from ..distinct import distinct
from ..machine.names import VERIFIER, slot_segment
from ..machine.spec import VerifySpec
from ..vcpus.handle import VcpuHandle
from .log import DirtyLog

__all__ = ["AnyVerifier", "Verification", "Verifier", "make_verifier"]

_WORDS = PAGE_SIZE // 8
_FINDINGS = 10      # that are told in full
_CHUNK = 4096       # pages compared at a time: 16 MiB, within the caches' reach


class Verification(msgspec.Struct):
    """What a machine's report says of it."""

    rounds: int = 0
    checked_pages: int = 0
    dirty_pages: int = 0
    lost_pages: int = 0
    surplus_pages: int = 0
    excused_pages: int = 0
    injected: str = "none"
    first_findings: list[str] = []
    surplus_is_failure: bool = True

    @property
    def unchanged_pages(self) -> int:
        """Dirty pages whose content was what it had been."""
        return self.surplus_pages + self.excused_pages

    @property
    def ok(self) -> bool:
        return self.lost_pages == 0 and (self.surplus_pages == 0 or not self.surplus_is_failure)

    def add(self, slot_id: int, checked: int, dirty: int, lost: list[int], surplus: list[int],
            excused: list[int]) -> None:
        """What a round has found in a slot: counts of pages, and page numbers; ``excused`` are some of ``surplus``."""
        self.checked_pages += checked
        self.dirty_pages += dirty
        self.lost_pages += len(lost)
        self.excused_pages += len(excused)
        self.surplus_pages += len(surplus) - len(excused)
        failed = sorted({*surplus} - {*excused}) if self.surplus_is_failure else []
        for kind, pages in (("lost", lost), ("surplus", failed)):
            for page in pages[:_FINDINGS - len(self.first_findings)]:
                self.first_findings.append(f"round {self.rounds}: slot {slot_id} page {page:#x} {kind}")


class _Rounds:
    """What a round is, whatever proves it: the log is taken, compared, and counted."""

    def __init__(self, log: DirtyLog, control: MachineControl, result: Verification | None) -> None:
        """``result``: what a predecessor had found, if there was one."""
        self._log = log
        self._control = control
        #: Surplus pages are not held against this round: it is the first of a replacement, which may find
        #: pages that its predecessor had copied already.
        self.blind_to_surplus = result is not None
        #: What a predecessor had taken for a round that it did not finish.
        self._again = result is not None and bool(control.verify_in_round)

    def _take(self) -> None:
        """What the log has. From before it is taken until the copy is up to date, a successor is to take it
        again."""
        self._control.verify_in_round = 1
        step("verify-take")
        self._log.take(VERIFIER, again=self._again)
        self._again = False
        step("verify-taken")

    def _over(self) -> None:
        """What was taken has been checked, and is what the next round begins with."""
        self._control.verify_in_round = 0
        self.blind_to_surplus = False


class Verifier(_Rounds):
    """One round at a time, called by the coordinator with the guest stopped and the log drained."""

    def __init__(self, spec: VerifySpec, log: DirtyLog, vcpus: list[VcpuHandle], control: MachineControl,
                 usable: dict[int, tuple[int, int]], resume: Verification | None = None) -> None:
        self.result = Verification(surplus_is_failure=spec.surplus_is_failure)
        super().__init__(log, control, resume)
        self._inject = spec.inject
        self._injected = (-1, -1)
        self._vcpus = vcpus
        self._copies: dict[int, Segment] = {}
        self._previous_last: set[tuple[int, int]] = set()
        self._usable = usable
        #: {slot: pages that are no surplus in this round}
        self._marked: dict[int, NDArray[np.bool_]] = {}
        log.on_mark = self._on_mark
        #: Switches of the mode of dirty tracking, in this round and the one before.
        self._switches = [0, 0]
        if resume is not None:
            self.result = resume
            self._inject = "none" if resume.injected != "none" else spec.inject
            for slot_id, slot in log.slots.items():
                self._copies[slot_id], fresh = Segment.adopt(self._name(slot_id), slot.spec.size)
                if fresh:
                    log.mark_client(VERIFIER, slot_id)
            return
        log.register(VERIFIER, 0)
        for slot_id in log.slots:
            self.adopt(slot_id)
            self._copy(slot_id)[:] = self._pages(slot_id)

    def _name(self, slot_id: int) -> str:
        return slot_segment(self._log.machine, "copy", self._log.slots[slot_id].spec)

    def adopt(self, slot_id: int) -> None:
        """Begin to watch a slot of which nothing has been written yet: all zero, as its copy is. Raises
        SegmentError."""
        self._copies[slot_id] = Segment.create(self._name(slot_id), self._log.slots[slot_id].spec.size)

    def restart(self) -> None:
        """The memory has been replaced (guest stopped, log drained): this is what it begins with. Until the copy is
        the same, all of it counts as dirty: whoever takes over in between finds no page changed that is clean."""
        for slot_id in self._copies:
            self._log.mark_client(VERIFIER, slot_id)
            self._copy(slot_id)[:] = self._pages(slot_id)
        self._log.take(VERIFIER)

    @property
    def segments(self) -> list[str]:
        """Names of all that are its."""
        return [copy.name for copy in self._copies.values()]

    def forget(self, slot_id: int) -> None:
        if slot_id in self._copies:
            self._copies.pop(slot_id).close()

    def _on_mark(self, slot_id: int, first: int, count: int) -> None:
        self._marks(slot_id)[first:first + count] = True

    def _marks(self, slot_id: int) -> NDArray[np.bool_]:
        """Pages of the slot that are no surplus in this round."""
        pages = self._log.slots[slot_id].pages
        if len(self._marked.get(slot_id, ())) != pages:
            self._marked[slot_id] = np.zeros(pages, bool)
        return self._marked[slot_id]

    def _copy(self, slot_id: int) -> NDArray[np.uint64]:
        segment = self._copies[slot_id]
        return np.frombuffer(segment.buf, np.uint64).reshape(-1, _WORDS)

    def close(self) -> None:
        for slot_id in list(self._copies):
            self.forget(slot_id)

    def _pages(self, slot_id: int) -> NDArray[np.uint64]:
        """The slot's memory, shape [pages, 512], dtype uint64, no copy."""
        return self._log.slots[slot_id].memory.view(np.uint64).reshape(-1, _WORDS)

    def _last_entries(self) -> set[tuple[int, int]]:
        return {(s.control.last_slot & 0xFFFF, s.control.last_offset) for s in self._vcpus
                if s.control.dirty_pages and s.ring.entries}

    def switched(self) -> None:
        """The mode of dirty tracking was switched: what was logged last before it, and had not been written yet,
        no longer has a name."""
        self._switches[0] += 1

    def round(self) -> None:
        result = self.result
        result.rounds += 1
        rings = any(s.ring.entries for s in self._vcpus)
        # A plain bitmap does not say which page was logged last: any one per vCPU, of this round or the one before.
        unnamed = (sum(self._switches) + (0 if rings else 2)) * len(self._vcpus)
        self._switches = [0, self._switches[0]]
        last = self._last_entries()
        excused = last | self._previous_last
        self._previous_last = last
        self._take()
        for slot_id in self._copies:
            slot = self._log.slots[slot_id]
            copy = self._copy(slot_id)
            if not slot.logged:
                continue
            marked = self._marks(slot_id)
            now = self._pages(slot_id)
            dirty = self._log.synced(VERIFIER, slot_id).synced.bools()
            changed = np.empty(slot.pages, bool)
            for at in range(0, slot.pages, _CHUNK):
                part = slice(at, at + _CHUNK)
                changed[part] = (now[part] != copy[part]).any(axis=1)
            self._injection(slot_id, dirty, changed, marked)
            lost = np.flatnonzero(changed & ~dirty)
            surplus = np.flatnonzero(dirty & ~changed & ~marked & (not self.blind_to_surplus))
            first, end = self._usable.get(slot_id, (0, slot.pages))
            excused_here = [p for p in surplus.tolist()
                            if (slot_id, p) in excused or not first <= p < end]
            if unnamed:
                nameless = [p for p in surplus.tolist()
                            if p not in excused_here and (slot_id, p) != self._injected][:unnamed]
                unnamed -= len(nameless)
                excused_here += nameless
            result.add(slot_id, slot.pages, int(dirty.sum()), lost.tolist(), surplus.tolist(), excused_here)
            update = dirty | changed
            copy[update] = now[update]
            step("verify-copied")
        self._marked.clear()
        self._over()

    def _injection(self, slot_id: int, dirty: NDArray[np.bool_], changed: NDArray[np.bool_],
                   marked: NDArray[np.bool_]) -> None:
        """The verifier's own test: falsify one bit, once, and be caught."""
        if self._inject == "none" or self.result.injected != "none":
            return
        want = changed & dirty if self._inject == "lost" else ~changed & ~dirty & ~marked
        first, end = self._usable.get(slot_id, (0, len(dirty)))
        pages = first + np.flatnonzero(want[first:end])
        if len(pages):
            dirty[pages[0]] = self._inject == "extra"
            self._injected = (slot_id, int(pages[0]))
            self.result.injected = self._inject


class ReplayVerifier(_Rounds):
    """The same proof for machines that replay: they have no memory to compare, but each producer keeps a record,
    a bitmap of its own in shared memory, of the pages that it wrote.

    Rounds and findings are those of :class:`Verifier`: written and not in the log is lost, in the log and not
    written is surplus. Excused is the last entry of a vCPU whose worker was killed, before it could record it.
    """

    def __init__(self, spec: VerifySpec, log: DirtyLog, vcpus: list[VcpuHandle], control: MachineControl,
                 resume: Verification | None = None) -> None:
        self.result = Verification(surplus_is_failure=spec.surplus_is_failure) if resume is None else resume
        super().__init__(log, control, resume)
        self._inject = spec.inject
        self._vcpus = vcpus
        self._marked: set[int] = set()
        log.on_mark = lambda slot_id, first, count: self._marked.add(slot_id)
        if resume is None:
            log.register(VERIFIER, 0)

    def switched(self) -> None:
        """Replay has rings alone (vmm/machine/trackings.py)."""

    def adopt(self, slot_id: int) -> None:
        """The slot's records begin with it, and a page that was not logged is in neither record nor log."""

    def restart(self) -> None:
        """It has no memory that could be replaced."""

    @property
    def segments(self) -> list[str]:
        """None: the records are the slots'."""
        return []

    def forget(self, slot_id: int) -> None:
        """Its records go with it."""

    def close(self) -> None:
        pass

    def round(self) -> None:
        result = self.result
        result.rounds += 1
        self._take()
        for slot_id, slot in self._log.slots.items():
            synced = self._log.synced(VERIFIER, slot_id).synced
            groups = distinct(np.concatenate([set_bit_indices(m.summary) for m in (synced, *slot.records)]))
            if len(groups) == 0:
                groups = np.zeros(1, np.int64)      # where a surplus page may be injected
            at = words_of_groups(groups, len(synced.words))
            dirty, written = synced.words[at], np.zeros(len(at), np.uint64)
            for record in slot.records:
                there = np.isin(at // GROUP_WORDS, set_bit_indices(record.summary))
                written[there] |= record.words[at[there]]
            self._injection(dirty, written, at, slot.pages)
            lost = _pages(at, written & ~dirty)
            surplus = [] if self.blind_to_surplus or slot_id in self._marked else _pages(at, dirty & ~written)
            last = {s.control.last_offset for s in self._vcpus if not s.alive and s.control.last_slot == slot_id}
            excused = [p for p in surplus if p in last]
            result.add(slot_id, slot.pages, int(np.bitwise_count(dirty).sum()), lost, surplus, excused)
            for record in slot.records:
                record.words[record.filled_words()] = 0
                record.summary[:] = 0
        self._marked.clear()
        self._over()

    def _injection(self, dirty: NDArray[np.uint64], written: NDArray[np.uint64], at: NDArray[np.int64],
                   pages: int) -> None:
        """As in Verifier: falsify one bit, once, and be caught."""
        if self._inject == "none" or self.result.injected != "none":
            return
        found = _pages(at, written & dirty if self._inject == "lost" else ~(written | dirty))
        if found and found[0] < pages:
            dirty[np.searchsorted(at, found[0] // 64)] ^= np.uint64(1 << found[0] % 64)
            self.result.injected = self._inject


def _pages(at: NDArray[np.int64], words: NDArray[np.uint64]) -> list[int]:
    """Pages whose bits are set, ascending; ``at`` are the words' numbers within the slot."""
    bits = set_bit_indices(words)
    return (at[bits // 64] * 64 + bits % 64).tolist()


AnyVerifier = Verifier | ReplayVerifier


def make_verifier(spec: VerifySpec, log: DirtyLog, vcpus: list[VcpuHandle], control: MachineControl,
                  usable: dict[int, tuple[int, int]], resume: Verification | None = None, *,
                  memory: bool) -> AnyVerifier:
    """``memory``: the machine has some, to be compared with the log. ``resume``: continue where a predecessor's left
    off."""
    if not memory:
        return ReplayVerifier(spec, log, vcpus, control, resume)
    return Verifier(spec, log, vcpus, control, usable, resume)
