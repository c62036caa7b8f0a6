"""What the dirty log costs a guest: rings against bitmaps while a client syncs, and rings while nobody asks (``log:
auto``) against no tracking. One vCPU writes to random pages of all its memory as fast as it can.

Rates are writes per second of the vCPU thread's own processor time, and syncs come whenever it has had so much of that
time: so other work on the host takes part in neither. What the vCPU waits for (a pause) does not count either; of a
sync that is a millisecond or less. Ring sizes are those of ``dirty_ring_size: auto``. Windows of one machine, in turns;
its guest runs in between too, so a quiet host is not waited for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np

from vmm.client.machine import Machine
from vmm.guests import WORKLOADS, resolve_params
from vmm.machine.rules import fitting_ring
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec

from .common import Case, Results, arguments_parser, in_turns

NAME = "log_cost"
_RING_MAX = 65536
_WARM_UP = 0.3          # seconds of the vCPU's time before a window, at least
_TOUCHED = 0.98         # share of the pages that were written once before the first window
_PATIENCE = 120.0


class Guest:
    """``mib``: of memory, all of which it writes to."""

    def __init__(self, mib: int) -> None:
        slots = [RamSlot(0, 0, mib << 20)]
        self.ring = fitting_ring(slots, _RING_MAX)
        self.machine = Machine.launch(MachineSpec(
            name="bench-log-cost", accel="kvm", vcpus=1, privilege="user", ring_entries=self.ring, slots=slots,
            image=str(WORKLOADS["random"].image), load_address=None, params=resolve_params("random", {"writes": 0}),
            cmdline="random", stack_size=16384, reaper=ReaperSpec(), verify=None, timeout=None, trace=[], trace_file="",
            linger=True))
        self._pid = self.machine.status()["vcpus"][0]["pid"]
        self._words = self.machine.ram(0).view(np.uint64).reshape(-1, 512)[:, 0]
        self._touch()

    def close(self) -> None:
        del self._words     # a view keeps the memory mapped
        self.machine.stop()
        self.machine.close()

    def _touch(self) -> None:
        """Until it has written to its pages: after a switch they are mapped anew, one by one."""
        before, deadline = self._words.copy(), time.monotonic() + _PATIENCE
        while np.count_nonzero(self._words - before) < 0.95 * _TOUCHED * len(before) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _spent(self) -> float:
        """Seconds of processor time of the vCPU."""
        with open(f"/proc/{self._pid}/task/{self._pid}/schedstat") as file:
            return int(file.read().split()[0]) / 1e9

    def _spend(self, until: float) -> None:
        while (left := until - self._spent()) > 0:
            time.sleep(min(0.05, max(0.001, left)))

    def _rate(self, interval: float, seconds: float, *, sync: bool) -> dict[str, float]:
        def run(count: int) -> None:
            due = self._spent()
            for _ in range(count):
                due = max(due + interval, self._spent())
                self._spend(due)
                if sync:
                    self.machine.take("bench")

        run(max(2, round(_WARM_UP / interval)))
        before, began = int(self._words.sum()), self._spent()
        run(max(2, round(seconds / interval)))
        after, ended = int(self._words.sum()), self._spent()
        return {"rate": (after - before) / (ended - began)}

    def synced(self, tracking: str, interval: float, seconds: float) -> dict[str, float]:
        """With a client that syncs."""
        self.machine.set_tracking(tracking)
        self.machine.register("bench", mine=True)
        try:
            return self._rate(interval, seconds, sync=True)
        finally:
            self.machine.unregister("bench")

    def left_alone(self, tracking: str, seconds: float) -> dict[str, float]:
        """With nobody who needs a log."""
        self.machine.set_tracking(tracking)
        deadline = time.monotonic() + _PATIENCE
        while self.machine.status()["logging"] and time.monotonic() < deadline:
            time.sleep(0.01)
        self._touch()
        return self._rate(0.1, seconds, sync=False)


@contextlib.contextmanager
def guest(mib: int) -> Iterator[Guest]:
    made = Guest(mib)
    try:
        yield made
    finally:
        made.close()


def cases(mib: int, intervals: list[float], rounds: int, seconds: float) -> Iterator[Case]:
    with guest(mib) as one:
        found = in_turns({"idle": lambda: one.left_alone("ring", seconds),
                          "none": lambda: one.left_alone("none", seconds)}, rounds)
        yield Case(f"{mib} MiB, ring of {one.ring:,}, nobody asks; against no tracking", found["idle"], found["none"],
                   at_least={"rate": 0.99})
        for every in intervals:
            found = in_turns({"ring": lambda e=every: one.synced("ring", e, seconds),        # type: ignore[misc]
                              "bitmap": lambda e=every: one.synced("bitmap", e, seconds)},   # type: ignore[misc]
                             rounds)
            fits = one.ring < _RING_MAX or mib < 256
            yield Case(f"{mib} MiB, ring of {one.ring:,}, a sync every {every * 1000:g} ms; against bitmaps",
                       found["ring"], found["bitmap"], at_least={"rate": 0.95} if fits else {})


def main() -> None:
    parser = arguments_parser(NAME, __doc__)
    parser.add_argument("--mib", type=int, nargs="*", default=[64, 200, 512])
    parser.add_argument("--intervals", type=float, nargs="*", default=[0.1, 1.0], help="seconds between two syncs")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a window")
    options = parser.parse_args()
    results = Results(NAME, "What the dirty log costs a guest", "bitmaps, or no tracking",
                      {"rate": ("M writes/s of the vCPU's time", 1e-6, ",.3f")})
    for mib in options.mib[:1] if options.quick else options.mib:
        for case in cases(mib, options.intervals[:1] if options.quick else options.intervals,
                          options.rounds or (1 if options.quick else 5), 0.2 if options.quick else options.seconds):
            results.cases.append(case)
            results.save(options.output)
    results.save(options.output)
    results.show()


if __name__ == "__main__":
    main()
