"""How fast a guest goes that somebody asks for its dirty pages each second, beside QEMU, in turns.

Both guests run the same loop (one ``incq`` in each page of their memory, over and over, at CPL 3), with one vCPU, over
the same amount of RAM (shared memory on both sides), and count by what they write. Ours, as a configuration without
``tracking:`` makes it (``tracking: auto``, the largest rings), is asked by a client that syncs each second. QEMU is
asked by ``calc-dirty-rate`` of one second, again and again: with its bitmap, and with a ring of 4,096 entries, which
its documentation advises. Both machines are there all the time, the one that is not measured is paused.

Targets: at least as fast as QEMU's bitmap, and ten times as fast as its ring with 64 MiB.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from .common import Case, Results, arguments_parser, in_turns
from .dirtying import first_pass
from .peer.ours import Guest, Ours, written
from .peer.qemu import Qemu, missing, version

NAME = "tracked"
EACH = 1.0              # seconds between two times that it is asked
RING, ADVISED = 65536, 4096
SETTLE = 3              # times that it is asked before it is measured: ``auto`` takes as long to choose


def speed(guest: Guest, ask: Callable[[], None], seconds: float) -> dict[str, float]:
    """Writes a second, while it is asked."""
    guest.resume()
    try:
        for _ in range(SETTLE):
            ask()
        before, deadline = written(guest, 0), time.monotonic() + seconds
        while time.monotonic() < deadline:
            ask()
        after = written(guest, 0)
    finally:
        guest.pause()
    return {"speed": (after[1] - before[1]) / (after[0] - before[0])}


def case(mib: int, ring: int, rounds: int, seconds: float, patience: float) -> Case:
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(Ours(mib=mib, vcpus=1, ring=RING, tracking="auto"))
        first_pass(ours, 2)
        ours.pause()
        ours.machine.register("bench", mine=True)
        qemu = stack.enter_context(Qemu(mib=mib, vcpus=1, ring=ring, shared=True))
        first_pass(qemu, 1)
        qemu.pause()

        def sync() -> None:
            time.sleep(EACH)
            ours.machine.take("bench")

        def calculate() -> None:
            qemu.start_logging(round(EACH), "dirty-ring" if ring else "dirty-bitmap")
            qemu.finish_logging()

        found = in_turns({"ours": lambda: speed(ours, sync, seconds),
                          "qemu": lambda: speed(qemu, calculate, seconds)}, rounds, patience=patience)
    target = 1.0 if not ring else 10.0 if mib == 64 else 1.0
    return Case(f"{mib} MiB, beside {f'a ring of {ring:,}' if ring else 'the bitmap'}", found["ours"], found["qemu"],
                at_least={"speed": target})


def main() -> None:
    parser = arguments_parser(NAME, __doc__)
    parser.add_argument("--mib", type=int, nargs="*", default=[64, 200, 512])
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    results = Results(NAME, "Speed of a guest whose log is asked for each second", version() if not missing() else
                      "QEMU", {"speed": ("writes/s", 1.0, ",.0f")})
    results.skipped = missing()
    if not results.skipped:
        for mib in options.mib:
            for ring in (0, ADVISED):
                results.cases.append(case(mib, ring, options.rounds or (1 if options.quick else 5),
                                          2.0 if options.quick else options.seconds, options.patience))
                results.save(options.output)
    results.save(options.output)
    results.show()


if __name__ == "__main__":
    main()
