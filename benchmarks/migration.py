"""Live migration of a guest on one host, beside QEMU: total time and downtime, in turns.

The same on both sides: RAM size, every page's first word not zero, one vCPU, a dirty ring of 4,096 entries, a Unix
socket (``multifd``: QEMU with two channels; ours has two always) or TLS over loopback tcp, the downtime limit, no
bandwidth cap (QEMU's is set out of reach), no compression. The guest is idle (it
halts or sleeps), or walks over all its memory and writes a word in each page, with as many ``pause`` instructions
after each as make the wanted rate; the rate that each guest had before the migration, logged, is reported.

``total``: from the request until the source says that it is done. ``downtime``: from the guest's stop until it
runs at the target: for QEMU the time between its events STOP (source) and RESUME (target), for us what we report,
which ends with the target's word that it runs. ``said downtime`` is what each reports; QEMU's ends before the
target has taken the last of it. QEMU's target was started before, with its memory set up, and ours makes the
machine within the total time, since only the offer says what it must be: ``set-up`` is what of that comes before the
first page.

QEMU's RAM is shared memory of small pages, which is what our machines have. ``huge``: anonymous memory with huge
pages, as it is by default. Where the host has none at hand, the target waits for them to be put together: that takes
longer than the rest, and comes and goes from run to run.

``postcopy``: ours goes over after the first round, and what is left comes slowly but for the pages that the guest waits
for; how long that is for one of them, from when its fault is read at the target until the vCPU is told to go on, is
reported. QEMU's is a migration as otherwise.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ipc.linux.process import die_with_parent
from vmm.client.machine import Machine
from vmm.consumers.migration.keys import make_keys
from vmm.migrate import Options, migrate

from .common import Case, Results, arguments_parser, in_turns, quiet, warm
from .peer.ours import Guest, Ours, written
from .peer.qemu import PAGE, Qemu, make_key, missing, version

NAME = "migration"
RING = 4096
DOWNTIME = 0.3
BEHIND = 50e6       # bytes per second of post-copy, but for what is asked for
WRITE_US = 2.3      # about what a first write to a logged page takes
SOURCE, TARGET = "bench-source", "bench-target"


@contextlib.contextmanager
def receiver(address: str, *more: str) -> Iterator[None]:
    """A ``vmm receive`` that waits; what it received goes with it."""
    parent = os.getpid()
    process = subprocess.Popen([sys.executable, "-m", "vmm", "receive", address, "--name", TARGET, *more],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               preexec_fn=lambda: die_with_parent(signal.SIGTERM, parent))
    try:
        assert process.stdout is not None
        process.stdout.readline()       # waits at ...
        yield
    finally:
        process.terminate()
        process.communicate()


def rate(guest: Guest, seconds: float) -> float:
    """Bytes dirtied a second."""
    (t0, before), (t1, after) = written(guest, 0), (time.sleep(seconds), written(guest, 0))[1]
    return (after - before) * PAGE / (t1 - t0)


class Way(NamedTuple):
    """How memory goes. ``name``: in the table, behind the guest's."""

    name: str = ""
    tcp: bool = False           # encrypted; else a Unix socket
    channels: int = 1           # of QEMU's; more than one is multifd
    shared: bool = False        # QEMU's RAM is shared memory
    in_place: bool = False      # ours is handed over, not copied
    postcopy: bool = False      # ours: what the first round leaves comes after the start


def ours(mib: int, spin: int, idle: bool, seconds: float, way: Way) -> dict[str, float]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardvmm-bench-")))
        address, options, there = f"ipc://{folder}/here", Options(downtime=DOWNTIME, in_place=way.in_place), []
        if way.postcopy:    # slowly but for what is asked for, so that much is
            options = replace(options, postcopy=True, downtime=1e-6, bandwidth=BEHIND)
        if way.tcp:
            for name in ("source", "target"):
                make_keys(folder, name)
            address = f"tcp://127.0.0.1:{free_port()}"
            there = ["--key", f"{folder}/target.key_secret", "--peer", f"{folder}/source.key"]
            options = replace(options, key=f"{folder}/source.key_secret", peer=f"{folder}/target.key")
        guest = stack.enter_context(Ours(mib=mib, vcpus=1, ring=RING, spin=spin, idle=idle, name=SOURCE))
        stack.enter_context(receiver(address, *there))
        dirtied = 0.0 if idle else rate(guest, seconds)
        report = migrate(guest.machine, address, options)
        target = Machine.attach(TARGET)
        try:
            assert target.status()["state"] == "running"
        finally:
            target.detach()
    return {"total": report.total_time / 1000, "downtime": report.downtime / 1000,
            "said downtime": report.downtime / 1000, "set-up": report.setup_time / 1000,
            "rounds": report.ram.dirty_sync_count, "bytes": report.ram.transferred, "rate": dirtied,
            "throttled": float(bool(report.throttled))} | (waits(report.postcopy_latency) if way.postcopy else {})


def waits(latency: dict[str, float]) -> dict[str, float]:
    """Seconds that a page took which the guest waited for, and how many there were."""
    return {"wait": latency.get("median_us", 0.0) / 1e6, "wait 99 %": latency.get("p99_us", 0.0) / 1e6,
            "waits": latency.get("pages", 0.0)}


def qemu(mib: int, spin: int, idle: bool, seconds: float, way: Way) -> dict[str, float]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="shardvmm-bench-"))
        uri, keys = f"unix:{folder}/here", ""
        if way.tcp:
            make_key(Path(folder))
            uri, keys = f"tcp:127.0.0.1:{free_port()}", folder
        source, target = [stack.enter_context(Qemu(mib=mib, vcpus=1, ring=RING, spin=spin, idle=idle, shared=way.shared,
                                                   incoming=incoming, keys=keys)) for incoming in (False, True)]
        target.receive(uri, channels=way.channels)
        source.walked()
        dirtied = 0.0
        if not idle:
            source.start_logging(int(seconds) + 2, "dirty-ring")     # as ours is, and as in a migration
            time.sleep(0.3)
            dirtied = rate(source, seconds)
            source.finish_logging()
        began = time.time()
        report = source.migrate(uri, downtime=DOWNTIME, channels=way.channels)
        stopped, resumed = source.event("STOP"), target.event("RESUME")
        assert target.ask("query-status")["status"] == "running"
    ram = report["ram"]
    return {"total": max(report["total-time"] / 1000, resumed - began), "downtime": resumed - stopped,
            "said downtime": report["downtime"] / 1000, "set-up": report["setup-time"] / 1000,
            "rounds": ram["dirty-sync-count"], "bytes": ram["transferred"], "rate": dirtied} | (
                waits({}) if way.postcopy else {})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def calibrate(mib: int, wanted: float, patience: float) -> int:
    """Pauses after each write with which a guest dirties so many bytes a second, while it is logged."""
    wanted_us = 1e6 * PAGE / wanted
    spin = 300
    for _ in range(3):
        with Ours(mib=mib, vcpus=1, ring=RING, spin=spin) as guest:
            quiet(patience)
            # The least disturbed of several short ones.
            took_us = 1e6 * PAGE / max(rate(guest, 0.2) for _ in range(5))
        spin = max(1, round(spin * (wanted_us - WRITE_US) / max(took_us - WRITE_US, 0.1)))
    return spin


#: {case: how it is wanted to compare; the least of these is the target}.
WAYS = {
    "unix": Way(", Unix socket", shared=True),
    "multifd": Way(", Unix socket, QEMU with multifd", shared=True, channels=2),
    "tcp": Way(", tcp, encrypted", shared=True, tcp=True), "huge": Way(", Unix socket, QEMU with huge pages"),
    "in-place": Way(", ours in place", shared=True, in_place=True),
    "postcopy": Way(", ours post-copy", shared=True, postcopy=True),
}
TOTAL = {0: 0.5, 100: 0.6, 400: 0.7}    # at most, of QEMU's, by MB/s


def run(results: Results, *, mib: int, rates: list[int], ways: list[str], rounds: int, seconds: float,
        patience: float, output: Path) -> None:
    for wanted in rates:
        idle = wanted == 0
        spin = 0 if idle else calibrate(mib, wanted * 1e6, patience)
        for way in (WAYS[name] for name in ways):
            def measured(of: Callable[..., dict[str, float]], way: Way = way, spin: int = spin,
                         idle: bool = idle) -> dict[str, float]:
                warm(3 * mib)
                return of(mib, spin, idle, seconds, way)

            found = in_turns({"ours": lambda: measured(ours), "qemu": lambda: measured(qemu)}, rounds,
                             patience=patience)
            label = f"{mib} MiB, " + ("idle" if idle else f"{wanted} MB/s") + way.name
            results.cases.append(Case(label, found["ours"], found["qemu"], at_most={} if way.postcopy else {
                "total": 0.7 if way.tcp else TOTAL.get(wanted, 1.0), "downtime": 1.0}))
            results.save(output)


def main() -> None:
    parser = arguments_parser(NAME, __doc__)
    parser.add_argument("--mib", type=int, default=1024, help="RAM of the guest")
    parser.add_argument("--rates", type=int, nargs="*", help="MB/s; 0 is an idle guest (default: 0 100 400; quick: 0)")
    parser.add_argument("--ways", nargs="*", choices=[*WAYS], default=["unix", "multifd", "tcp", "in-place"])
    options = parser.parse_args()
    results = Results(NAME, "Live migration", version() if not missing() else "QEMU", {
        "total": ("total (ms)", 1e3, ".0f"), "downtime": ("downtime (ms)", 1e3, ".0f"),
        "said downtime": ("said downtime (ms)", 1e3, ".0f"), "set-up": ("set-up (ms)", 1e3, ".0f"),
        "rounds": ("rounds", 1.0, ".0f"), "bytes": ("sent (MiB)", 2.0**-20, ".0f"),
        "rate": ("dirtied before (MB/s)", 1e-6, ".0f"), "wait": ("wait for a page, median (us)", 1e6, ".0f"),
        "wait 99 %": ("99 % (us)", 1e6, ".0f"), "waits": ("pages waited for", 1.0, ".0f")})
    results.skipped = missing()
    if not results.skipped:
        rates = options.rates or ([0] if options.quick else [0, 100, 400])
        run(results, mib=options.mib, rates=rates, rounds=options.rounds or (1 if options.quick else 5),
            seconds=0.3 if options.quick else 1.0, patience=options.patience, output=options.output,
            ways=options.ways)
    results.save(options.output)
    results.show()


if __name__ == "__main__":
    main()
