"""Guest pages dirtied a second while they are logged, beside QEMU, in turns.

Both guests run the same loop (one ``incq`` in each page of the vCPU's share, over and over, at CPL 3) over the same
amount of RAM (shared memory on both sides), and count by what they write: the words that the guest has
incremented are read at both ends of a window in which logging is on. Both machines are there all the time, the one
that is not measured is paused.

Rings: QEMU's are reaped as in a migration that is between two syncs, by the vCPU that finds its ring full, and once
a second by the reaper thread; logging is held on by ``calc-dirty-rate`` in mode ``dirty-ring``, which does nothing
else until its time is over. Ours are logged while a client is registered, and reaped as ever. A share is larger than a
ring, so that every write is to a page that is protected again.

Bitmaps: the window begins after all pages were protected (for QEMU by ``calc-dirty-rate`` in mode
``dirty-bitmap``, for us by a client's sync), and ends before the walk has come round, so that every write is the
first to its page.
"""

from __future__ import annotations

import contextlib
import time

from .common import Case, Results, arguments_parser, in_turns
from .peer.ours import Guest, Ours, written
from .peer.qemu import PAGE, Qemu, missing, version

NAME = "dirtying"
TARGET = 1.05
RING_MIB, BITMAP_MIB = 1024, 3072
SETTLE = 0.3            # seconds from the start of logging to the window
PATIENCE = 60.0         # seconds for a guest to go over its memory once
BITMAP_WINDOW = 0.5
UNLOGGED = 4e6          # pages a second of one vCPU that no logged guest reaches


def first_pass(guest: Guest, passes: int) -> None:
    """Until every page was written by the guest: the first write to a page has KVM map it, which takes longer."""
    deadline = time.monotonic() + PATIENCE
    for first, pages in guest.shares:
        while guest.word(first + (pages - 1) * PAGE) < passes:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{type(guest).__name__}: a vCPU has not come round in {PATIENCE:.0f} s")
            time.sleep(0.05)


def rate(guest: Guest, seconds: float) -> float:
    """Pages a second of all vCPUs together."""
    vcpus = range(len(guest.shares))
    before = [written(guest, vcpu) for vcpu in vcpus]
    time.sleep(seconds)
    after = [written(guest, vcpu) for vcpu in vcpus]
    rates = [(n - m) / (u - t) for (t, m), (u, n) in zip(before, after, strict=True)]
    if max(rates) > UNLOGGED:
        raise RuntimeError(f"{type(guest).__name__}: not every write was logged: {max(rates):.0f} pages a second")
    return sum(rates)


def measure_ours(guest: Ours, ring: int, seconds: float) -> dict[str, float]:
    guest.resume()
    try:
        if not ring:
            guest.machine.sync("bench")
        time.sleep(SETTLE)
        before, began = guest.usage(), time.perf_counter()
        found = rate(guest, seconds)
        after, took = guest.usage(), time.perf_counter() - began
    finally:
        guest.pause()
    return {"rate": found, **{name: (after[name] - before[name]) / took for name in before}}


def measure_qemu(guest: Qemu, ring: int, seconds: float) -> dict[str, float]:
    guest.resume()
    try:
        guest.start_logging(int(SETTLE + seconds) + 1, "dirty-ring" if ring else "dirty-bitmap")
        time.sleep(SETTLE)
        found = rate(guest, seconds)
        guest.finish_logging()
    finally:
        guest.pause()
    return {"rate": found}


def case(vcpus: int, ring: int, rounds: int, seconds: float, patience: float) -> Case:
    mib = RING_MIB if ring else BITMAP_MIB
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Ours(mib=mib, vcpus=vcpus, ring=ring))
        first_pass(ours, 2)         # its memory has been written once, by the host
        ours.pause()
        ours.machine.register("bench", mine=True)
        qemu = stack.enter_context(Qemu(mib=mib, vcpus=vcpus, ring=ring, shared=True))
        first_pass(qemu, 1)
        qemu.pause()
        found = in_turns({"ours": lambda: measure_ours(ours, ring, seconds),
                          "qemu": lambda: measure_qemu(qemu, ring, seconds)}, rounds, patience=patience)
    return Case(f"{'ring ' + format(ring, ',') if ring else 'bitmap'}, {vcpus} vCPU{'s' * (vcpus > 1)}",
                found["ours"], found["qemu"], at_least={"rate": TARGET} if ring else {})


def main() -> None:
    parser = arguments_parser(NAME, __doc__)
    parser.add_argument("--rings", type=int, nargs="*", default=[1024, 4096, 65536, 0], help="entries; 0: bitmap")
    parser.add_argument("--vcpus", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="of a window (rings)")
    options = parser.parse_args()
    results = Results(NAME, "Guest pages dirtied a second while logged", version() if not missing() else "QEMU",
                      {"rate": ("pages/s", 1.0, ",.0f")})
    results.skipped = missing()
    if not results.skipped:
        for ring in options.rings:
            seconds = BITMAP_WINDOW if not ring else 0.5 if options.quick else options.seconds
            for vcpus in options.vcpus:
                results.cases.append(case(vcpus, ring, options.rounds or (1 if options.quick else 7), seconds,
                                          options.patience))
                results.save(options.output)
    results.save(options.output)
    results.show()


if __name__ == "__main__":
    main()
