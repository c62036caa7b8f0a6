"""The replay accelerator: no CPU, but a producer that dirties pages by a pattern, or as a trace recorded it.

It keeps to what a vCPU with write protection does: a page that is written for the first time since it was last
reset makes a ring entry, a full ring (KVM's reserve kept free) takes it out of the guest, and a kick does. The
memory itself is never touched. With the pages of all slots numbered through, in the order of the machine's
file, a vCPU writes to its own share of them, or to all.

Which page is written is a function of seed, vCPU and number of the write alone; which writes make an entry
depends on when the ring is reset, unless ``repeat`` has each one make one.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipc.layout import MAX_SLOTS, RING_RESERVE, VcpuControl
from ipc.linux import futex
from ipc.messages import ExitReason, ReplayPhase, ReplaySpec, SlotSpec, WorkerSpec
from ipc.shm import PAGE_SIZE, Segment
from ipc.traces.segment import TraceSegment

from ...memory import GuestMemory
from ...ports import PortBus
from ...state import VcpuSaved
from ..base import AccelError, Exit, ExitKind
from . import calls
from .layout import PRODUCER, QUANTILES, SLOT, Left, Pattern

__all__ = ["ReplayAccelerator", "share_of", "vcpu_seed", "zipf_quantiles"]

_NO_LIMIT = (1 << 64) - 1
_FOR_EVER = 1 << 62
_BURST = 0.02           # seconds of its rate that a producer makes good after it was kept from writing
_SHORTEST_WAIT = 0.0005
_EXACT_RANKS = 1 << 16  # of a Zipf distribution; the sum over those behind is an integral
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E37_79B9_7F4A_7C15


def vcpu_seed(seed: int, vcpu: int) -> int:
    """Where a vCPU's counter begins: SplitMix64's number ``vcpu + 1`` from ``seed``."""
    z = (seed + _GOLDEN * (vcpu + 1)) & _MASK
    z = (z ^ z >> 30) * 0xBF58_476D_1CE4_E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D0_49BB_1331_11EB & _MASK
    return z ^ z >> 31


def share_of(pages: int, vcpu: int, vcpus: int) -> tuple[int, int]:
    """(first page, pages) of a vCPU's share of ``pages``."""
    first, end = vcpu * pages // vcpus, (vcpu + 1) * pages // vcpus
    return first, end - first


def zipf_quantiles(pages: int, exponent: float) -> NDArray[np.float64]:
    """Quantiles of the Zipf distribution over ``pages`` ranks, shape [QUANTILES + 1], from 0 to ``pages``: with
    *u* uniform in [0, 1), the whole part of what lies between them at *u* is a rank; rank 0 is the likeliest."""
    exact = min(pages, _EXACT_RANKS)
    sums = np.concatenate([[0.0], np.cumsum(np.arange(1, exact + 1, dtype=np.float64) ** -exponent)])
    start, power = exact + 0.5, 1.0 - exponent      # sum over k > exact of k**-s: integral from exact + 1/2
    flat = abs(power) < 1e-9
    tail = (math.log((pages + 0.5) / start) if flat else ((pages + 0.5) ** power - start ** power) / power)
    wanted = np.linspace(0.0, 1.0, QUANTILES + 1) * (sums[-1] + tail)
    found = np.interp(wanted, sums, np.arange(exact + 1, dtype=np.float64))
    behind = np.maximum(wanted - sums[-1], 0.0)
    ranks = start * np.exp(behind) if flat else np.maximum(start ** power + power * behind, 1e-300) ** (1 / power)
    return np.minimum(np.where(behind > 0, ranks - 0.5, found), pages)


class ReplayAccelerator:
    """See workers/accel/base.py for the contract."""

    def __init__(self, spec: WorkerSpec, memory: GuestMemory, control: VcpuControl, ports: PortBus) -> None:
        if spec.replay is None or not spec.ring_entries:
            raise AccelError("the replay accelerator needs a dirty ring and a specification of what to replay")
        self.vcpu_fd = -1
        self.kvm_run_size = 0
        self._spec = spec
        self._replay: ReplaySpec = spec.replay
        self._memory = memory
        self._control = control
        self._ring = Segment.open(spec.ring_segment)
        self._trace: TraceSegment | None = None
        self._reset: NDArray[np.uint64] = np.zeros(1, np.uint64)
        self._state: NDArray[Any] = np.zeros(1, PRODUCER)
        self._c: Any = self._state.view(np.recarray)[0]
        self._quantiles: NDArray[np.float64] = np.zeros(0)
        self._rows: dict[int, int] = {slot.id: i for i, slot in enumerate(spec.slots)}
        self._slots: NDArray[Any] = np.zeros(len(spec.slots), SLOT)
        self._bases: NDArray[np.int64] = np.full(MAX_SLOTS, -(1 << 62), np.int64)
        #: Writes that the phases before the present one, and it, make in all.
        self._phase_end = 0
        self._phase = -1
        self._began = 0.0       # the time at which, at its rate, the producer would have made no write
        try:
            if self._replay.trace_segment:
                self._trace = TraceSegment.open(self._replay.trace_segment)
            self._fill_state()
            self._next_phase()
        except BaseException:
            self.close()
            raise

    # --- set-up ----------------------------------------------------------------------------------

    def _fill_state(self) -> None:
        c, spec, block = self._c, self._spec, ctypes.addressof(self._control)
        c.ring, c.entries = self._ring.address, spec.ring_entries
        c.soft_limit = spec.ring_entries - RING_RESERVE
        c.push_limit = _NO_LIMIT
        c.reset = self._reset.ctypes.data
        c.immediate_exit = block + VcpuControl.immediate_exit.offset
        c.pushed_total = block + VcpuControl.pushed_total.offset
        ends = list(itertools.accumulate(slot.size // PAGE_SIZE for slot in spec.slots))
        for row, (slot, end) in enumerate(zip(spec.slots, ends, strict=True)):
            self._slots[row]["first"], self._slots[row]["end"] = end - slot.size // PAGE_SIZE, end
            self._write_slot(row, slot)
        c.slots, c.slot_count = self._slots.ctypes.data, len(self._slots)
        first, pages = 0, ends[-1]
        if not (self._replay.shared or self._trace):
            first, pages = share_of(ends[-1], spec.index, spec.vcpu_count)
        if not pages:
            raise AccelError(f"its share of {ends[-1]} pages is empty: use fewer vCPUs, more memory or shared: true")
        c.first, c.pages = first, pages
        for slot in spec.slots:
            self._bases[slot.id] = int(self._slots[self._rows[slot.id]]["first"]) - first
        c.seed = vcpu_seed(self._replay.seed, spec.index)
        self._protect_all()

    def _write_slot(self, row: int, slot: SlotSpec) -> None:
        mapped = self._memory.slots[slot.id]
        words = -(-slot.size // PAGE_SIZE // 64)
        self._slots[row]["id"], self._slots[row]["logged"] = slot.id, slot.log
        self._slots[row]["record"] = mapped.log_address if slot.log_segment else 0
        self._slots[row]["summary"] = mapped.log_address + 8 * words if slot.log_segment else 0

    def _protect_all(self) -> None:
        """Every page's next write makes an entry. The producer stands still, and its ring is empty."""
        if self._replay.repeat:
            return
        words = -(-int(self._c.pages) // 64)
        # Fresh memory rather than zeros over the old: nothing is touched that never was.
        self._bits: NDArray[np.uint64] = np.zeros(words, np.uint64)
        self._reset_bits: NDArray[np.uint64] = np.zeros(words, np.uint64)
        self._c.pushed_bits, self._c.reset_bits = self._bits.ctypes.data, self._reset_bits.ctypes.data

    def _next_phase(self) -> bool:
        """False when there is none any more."""
        c = self._c
        if self._trace is not None:
            self._phase_end = len(self._trace.entries)
            c.pattern, c.trace = Pattern.TRACE, self._trace.entries.ctypes.data
            self._phase += 1
            return self._phase == 0
        if self._phase + 1 == len(self._replay.phases):
            return False
        self._phase += 1
        phase: ReplayPhase = self._replay.phases[self._phase]
        self._phase_end = self._phase_end + phase.writes if phase.writes else _FOR_EVER
        c.pattern = Pattern[phase.pattern.upper()]
        c.cursor = 0
        c.stride = phase.stride % int(c.pages)
        if c.pattern == Pattern.ZIPF:
            self._quantiles = zipf_quantiles(int(c.pages), phase.exponent)
            c.quantiles = self._quantiles.ctypes.data
        return True

    # --- the guest -------------------------------------------------------------------------------

    def clear_immediate_exit(self) -> None:
        self._control.immediate_exit = 0

    def interrupt(self) -> None:
        self._control.immediate_exit = 1
        futex.wake(int(self._c.immediate_exit), 1)

    def run(self) -> Exit:
        c = self._c
        while True:
            if int(c.written) >= self._phase_end and not self._next_phase():
                return Exit(ExitKind.END, reason=ExitReason.CODE)
            count, wait = self._due()
            if count:
                left = calls.produce(self._state, count)
                if left == Left.FULL:
                    return Exit(ExitKind.RING_FULL)
                if left == Left.KICKED:
                    return Exit(ExitKind.KICKED)
            elif self._control.immediate_exit:
                return Exit(ExitKind.KICKED)
            else:
                # A kick sets the flag before its signal comes: it is seen, or the signal ends the wait.
                futex.wait(int(c.immediate_exit), 0, wait)

    def _due(self) -> tuple[int, float]:
        """Writes that may be made by now, of this phase; without any, the seconds until there is one."""
        written = int(self._c.written)
        if self._trace is not None and self._replay.speed:
            return self._due_of_trace(written)
        left = self._phase_end - written
        rate = self._replay.rate
        if not rate:
            return left, 0.0
        now = time.monotonic()
        earliest = now - (written + max(2.0, rate * _BURST)) / rate   # what was missed before is not made good
        self._began = max(self._began, earliest) if self._began else now - written / rate
        due = int((now - self._began) * rate) - written
        if due > 0:
            return min(due, left), 0.0
        return 0, max(_SHORTEST_WAIT, self._began + (written + 1) / rate - now)

    def _due_of_trace(self, written: int) -> tuple[int, float]:
        """At the trace's own times, ``speed`` times as fast. What is late is made good at once."""
        assert self._trace is not None
        now = time.monotonic()
        if not self._began:
            self._began = now
        ends, times = self._trace.ends, self._trace.times
        elapsed = (now - self._began) * 1e9 * self._replay.speed
        by_now = int(np.searchsorted(times, elapsed, "right"))
        end = int(ends[by_now - 1]) if by_now else 0
        if end > written:
            return end - written, 0.0
        return 0, max(_SHORTEST_WAIT, (float(times[by_now]) - elapsed) / 1e9 / self._replay.speed)

    def hypercall_args(self) -> tuple[int, int, int]:
        raise AccelError("a replayed vCPU does not make hypercalls")

    def set_hypercall_result(self, value: int) -> None:
        raise AccelError("a replayed vCPU does not make hypercalls")

    def registers(self) -> dict[str, int]:
        """It has none; ``writes`` made is what there is to say of it."""
        return {"writes": int(self._c.written)}

    # --- ring, slots: by the service thread ------------------------------------------------------

    def pushed(self) -> int:
        return int(self._c.pushed)

    def limit_pushes(self, count: int | None) -> None:
        self._c.push_limit = _NO_LIMIT if count is None else int(self._c.pushed) + count

    def reset_ring(self, expected: int) -> int:
        return calls.reset(self._state, self._bases)

    def rebuild_ring(self) -> None:
        ctypes.memset(self._ring.address, 0, self._spec.ring_entries * 16)
        self._reset[0] = 0
        self._c.pushed = 0
        self._protect_all()

    def set_tracking(self, spec: WorkerSpec) -> None:
        raise AccelError(f"tracking {spec.tracking}: replay drives dirty rings and supports no other mode")

    def set_memslot(self, slot: SlotSpec) -> None:
        """What is written was settled at the start: a slot added later is not, but one that was there then."""
        row = self._rows.get(slot.id)
        if row is None or slot.size // PAGE_SIZE != self._slots[row]["end"] - self._slots[row]["first"]:
            return
        if slot.log and not self._slots[row]["logged"] and self._c.pushed == self._reset[0]:
            self._protect_all()     # whoever switches logging has drained the rings
        self._write_slot(row, slot)

    def remove_memslot(self, slot_id: int) -> None:
        """Writes to it are not made any more, but counted."""
        row = self._rows.get(slot_id)
        if row is not None:
            self._slots[row]["logged"] = 0

    def get_dirty_log(self, slot_id: int) -> int:
        raise AccelError("the replay accelerator has dirty rings, not a plain bitmap")

    def clear_dirty_log(self, slot_id: int) -> None:
        raise AccelError("the replay accelerator has dirty rings, not a plain bitmap")

    def get_state(self) -> VcpuSaved:
        raise AccelError("a replayed vCPU has no state to save")

    def set_state(self, state: VcpuSaved) -> None:
        raise AccelError("a replayed vCPU has no state to restore")

    def close(self) -> None:
        """Idempotent."""
        self._ring.close()
        if self._trace is not None:
            self._trace.close()
            self._trace = None
