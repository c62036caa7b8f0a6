"""What ``vmm watch`` costs the process that is watched, by that process's own benchmark: watched against left alone, in
turns, for each interval. And what it finds of what was written, beside QEMU's own measurements.

Rates are operations per second of the process's own processor time, so other work on the host takes no part in them
(nor does the watcher, which has a process of its own: "watcher", in results.json, is the share of a core that it
takes).

* redis: redis-benchmark SETs random keys of a million, 16 in a pipeline;
* stress-ng: its worker ``vm`` writes and checks 64 MiB (its rate is of its whole run, which is not watched from the
  first second on);
* PostgreSQL: pgbench with one client, whose server process is watched, with the memory that all of them share (of its
  whole run, too);
* a guest of QEMU that writes to all of its pages in turn, as fast as it can or with pauses.

What is found is compared with words that the guest counts in each of its pages: of the pages whose word changed between
two moments, the share that was found (with the guest paused at both), for QEMU's dirty-bitmap and page-sampling (of
calc-dirty-rate, which cannot be asked while the guest is paused) by rates."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ipc.linux.foreign import children, status, threads
from ipc.writelog import watching_missing
from vmm.consumers.watch.attach import attach, check_target
from vmm.consumers.watch.blocks import MemorySize, chooser
from vmm.consumers.watch.watcher import Watcher

from .common import Case, Results, arguments_parser, in_turns
from .peer import qemu as peer

NAME = "watch"
_PATIENCE = 60.0
_MIB = 1 << 20
_BEGIN = 5.0            # seconds of stress-ng's run that go by before it is watched, at most
_AT_WORK = 0.1          # seconds of processor time
_PAUSES = 1000          # after each write of a guest


def spent(pid: int) -> float:
    """Seconds of processor time of all threads of a process, and of those it had."""
    with open(f"/proc/{pid}/schedstat") as file:
        alone = int(file.read().split()[0]) / 1e9
    tids = [t for t in threads(pid) if t != pid]
    for tid in tids:
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/task/{tid}/schedstat") as file:
            alone += int(file.read().split()[0]) / 1e9
    return alone


@contextlib.contextmanager
def watched(pid: int, interval: float | None, told: dict[str, float]) -> Iterator[None]:
    """By a command of its own, whose share of a core is ``told``; None: left alone."""
    if interval is None:
        yield
        return
    with subprocess.Popen([sys.executable, "-m", "vmm", "watch", str(pid), "--interval", f"{interval * 1000:g}ms",
                           "--json-lines"], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        if not command.stdout.readline():       # of the first interval
            raise RuntimeError(f"vmm watch ended with {command.wait()}")
        read = subprocess.Popen(["cat"], stdin=command.stdout, stdout=subprocess.DEVNULL)
        try:
            before, began = spent(command.pid), time.monotonic()
            yield
            with contextlib.suppress(FileNotFoundError):    # it has ended, with what it watched
                told["watcher"] = (spent(command.pid) - before) / (time.monotonic() - began)
        finally:
            with contextlib.suppress(ProcessLookupError):
                command.send_signal(signal.SIGINT)
            command.wait(_PATIENCE)
            read.wait(_PATIENCE)


Measure = Callable[[float | None, float], dict[str, float]]     # (interval, seconds)


@contextlib.contextmanager
def redis() -> Iterator[Measure]:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/socket"
        with subprocess.Popen(["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--dir", folder],
                              stdout=subprocess.DEVNULL) as server:
            deadline = time.monotonic() + _PATIENCE
            while not os.path.exists(path) and time.monotonic() < deadline:
                time.sleep(0.05)

            def requests(count: int) -> float:
                before = spent(server.pid)
                subprocess.run(["redis-benchmark", "-s", path, "-t", "set", "-r", "1000000", "-n", str(count), "-P",
                                "16", "--csv"], stdout=subprocess.DEVNULL, check=True)
                return count / (spent(server.pid) - before)

            rate = requests(1_500_000)          # its keys are there, and about how fast it is

            def measure(interval: float | None, seconds: float) -> dict[str, float]:
                found: dict[str, float] = {}
                with watched(server.pid, interval, found):
                    found["rate"] = requests(round(rate * seconds))
                return found

            try:
                yield measure
            finally:
                server.terminate()


@contextlib.contextmanager
def stress() -> Iterator[Measure]:
    def measure(interval: float | None, seconds: float) -> dict[str, float]:
        found: dict[str, float] = {}
        with tempfile.NamedTemporaryFile("r") as report, subprocess.Popen(
                ["stress-ng", "--vm", "1", "--vm-bytes", "64M", "--vm-keep", "--vm-method", "rand-set", "--timeout",
                 f"{seconds + _BEGIN:.0f}", "--metrics", "--yaml", report.name],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as command:
            try:
                with watched(_worker(command.pid), interval, found):
                    command.wait(_PATIENCE)
            finally:
                command.terminate()
            key = "bogo-ops-per-second-usr-sys-time:"
            return {**found, "rate": float(next(line for line in report if key in line).split()[-1])}

    yield measure


def _worker(pid: int) -> int:
    """The process that has the memory."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, KeyError):
            there = {pid}
            for _ in range(3):
                there |= {c for p in there for c in children(p)}
            for each in there:
                if int(status(each)["VmRSS"].split()[0]) << 10 >= 64 * _MIB:
                    return each
        time.sleep(0.02)
    raise RuntimeError("stress-ng has no worker")


@contextlib.contextmanager
def postgres(programs: Path) -> Iterator[Measure]:
    as_user = ["runuser", "-u", "postgres", "--"]       # it does not run as root
    with tempfile.TemporaryDirectory() as folder:
        shutil.chown(folder, "postgres")
        there = ["-h", folder, "-U", "postgres", "bench"]
        subprocess.run([*as_user, programs / "initdb", "-A", "trust", "-N", "-D", f"{folder}/data"],
                       stdout=subprocess.DEVNULL, check=True)
        with subprocess.Popen([*as_user, programs / "postgres", "-D", f"{folder}/data", "-c", "listen_addresses=",
                               "-c", f"unix_socket_directories={folder}"], stderr=subprocess.DEVNULL) as server:
            deadline = time.monotonic() + _PATIENCE
            while subprocess.run([programs / "createdb", *there], stderr=subprocess.DEVNULL, check=False).returncode:
                if time.monotonic() > deadline:
                    raise RuntimeError("PostgreSQL does not answer")
                time.sleep(0.1)
            subprocess.run([programs / "pgbench", "-i", "-q", "-s", "5", *there], stderr=subprocess.DEVNULL, check=True)

            def measure(interval: float | None, seconds: float) -> dict[str, float]:
                found: dict[str, float] = {}
                with subprocess.Popen([programs / "pgbench", "-n", "-T", f"{seconds + _BEGIN:.0f}", *there], text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
                    pid = _backend(server.pid)
                    with watched(pid, interval, found):
                        used = 0.0
                        while client.poll() is None:
                            with contextlib.suppress(FileNotFoundError):    # it goes with the client
                                used = spent(pid)
                            time.sleep(0.05)
                    assert client.stdout is not None
                    done = next(line for line in client.stdout if "transactions actually processed" in line)
                return {**found, "rate": int(done.split(":")[1].split("/")[0]) / used}

            try:
                yield measure
            finally:
                server.terminate()


def _backend(pid: int) -> int:
    """The process that serves pgbench; runuser may be between. That of its first connection ends at once, and has done
    nothing."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            for each in [c for p in (pid, *children(pid)) for c in children(p)]:
                if b"postgres bench" in Path(f"/proc/{each}/cmdline").read_bytes() and spent(each) > _AT_WORK:
                    return each
        time.sleep(0.02)
    raise RuntimeError("PostgreSQL serves no client")


@contextlib.contextmanager
def guest(mib: int, spin: int) -> Iterator[peer.Qemu]:
    made = peer.Qemu(mib=mib, vcpus=1, ring=0, spin=spin, shared=True)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not all(made.word(first + peer.PAGE * (pages - 1)) for first, pages in made.shares):
            if time.monotonic() > deadline:
                raise RuntimeError("the guest does not write")
            time.sleep(0.05)
        yield made
    finally:
        made.close()


def words(of: peer.Qemu) -> Any:
    """What the guest has counted, by page."""
    first, pages = of.shares[0]
    assert of._words is not None
    return of._words.reshape(-1, 512)[first // peer.PAGE:first // peer.PAGE + pages, 0].copy()


@contextlib.contextmanager
def qemu(spin: int) -> Iterator[Measure]:
    with guest(256, spin) as made:
        def measure(interval: float | None, seconds: float) -> dict[str, float]:
            found: dict[str, float] = {}
            with watched(made.pid, interval, found):
                before, began = int(words(made).sum()), spent(made.pid)
                time.sleep(seconds)
                found["rate"] = (int(words(made).sum()) - before) / (spent(made.pid) - began)
            return found

        yield measure


def found_by_us(made: peer.Qemu, seconds: float) -> dict[str, float]:
    """The share of the pages that were written which was found, and of those that were found which were written."""
    size = [MemorySize("ram", made._words.nbytes)]    # type: ignore[union-attr]
    with Watcher(attach(check_target(made.pid)), chooser("ram", True, size)) as watching:
        made.pause()
        watching.collect()
        before = words(made)
        made.resume()
        time.sleep(seconds)
        made.pause()
        turn, after = watching.collect(), words(made)
        made.resume()
        (area,) = watching.areas
    first = made.shares[0][0] // peer.PAGE
    pages = np.concatenate([np.zeros(0, np.int64), *turn.pages.values()]) - area.start // peer.PAGE - first
    written = set(np.flatnonzero(after != before).tolist())
    mine = {p for p in pages.tolist() if 0 <= p < len(after)}
    return {"found": len(written & mine) / max(1, len(written)), "right": len(written & mine) / max(1, len(mine))}


def found_by_qemu(made: peer.Qemu, mode: str, seconds: float) -> dict[str, float]:
    """The rate that it says against that of the guest's words."""
    before, began = words(made), time.monotonic()
    made.ask("calc-dirty-rate", calc_time=max(1, round(seconds)), mode=mode)
    while (answer := made.ask("query-dirty-rate"))["status"] != "measured":
        time.sleep(0.005)
    changed, took = int((words(made) != before).sum()), time.monotonic() - began
    told = answer["dirty-rate"] * _MIB / peer.PAGE
    return {"found": told / (changed / took), "right": min(1.0, (changed / took) / max(told, 1e-9))}


def cases(quick: bool, intervals: list[float], rounds: int, seconds: float, patience: float) -> Iterator[Case]:
    targets: dict[str, Callable[[], contextlib.AbstractContextManager[Measure]]] = {}
    if shutil.which("redis-server") and shutil.which("redis-benchmark"):
        targets["redis, SET, 16 in a pipeline"] = redis
    if shutil.which("stress-ng"):
        targets["stress-ng vm, 64 MiB"] = stress
    if programs := sorted(Path("/usr/lib/postgresql").glob("*/bin")):
        targets["PostgreSQL, pgbench"] = lambda: postgres(programs[-1])
    if not peer.missing():
        targets["a guest of QEMU, 256 MiB, with pauses"] = lambda: qemu(_PAUSES)
        targets["a guest of QEMU, 256 MiB, as fast as it can"] = lambda: qemu(0)
    for name, make in list(targets.items())[-1:] if quick else targets.items():
        waits = 0.0 if "guest" in name else patience    # a guest runs in between, too
        with make() as measure:
            for every in intervals[:2] if quick else intervals:
                found = in_turns({"watched": lambda e=every, m=measure: m(e, seconds),      # type: ignore[misc]
                                  "alone": lambda m=measure: m(None, seconds)},             # type: ignore[misc]
                                 rounds, patience=waits)
                yield Case(f"{name}, every {every * 1000:g} ms", found["watched"], found["alone"])
    if not peer.missing() and not quick:
        with guest(256, _PAUSES) as made:
            for mode in ("dirty-bitmap", "page-sampling"):
                found = in_turns({"ours": lambda: found_by_us(made, 1.0),
                                  "theirs": lambda m=mode: found_by_qemu(made, m, 1.0)},    # type: ignore[misc]
                                 rounds)
                yield Case(f"what is found in 1 s, beside calc-dirty-rate with {mode}", found["ours"], found["theirs"])


def main() -> None:
    parser = arguments_parser(NAME, __doc__)
    parser.add_argument("--intervals", type=float, nargs="*", default=[0.01, 0.1, 1.0], help="seconds")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a run")
    options = parser.parse_args()
    results = Results(NAME, "What watching costs a process, and what it finds", "left alone, or calc-dirty-rate",
                      {"rate": ("operations/s of its time", 1.0, ",.0f"), "found": ("found / written", 1.0, ".3f"),
                       "right": ("written / found", 1.0, ".3f")})
    results.skipped = watching_missing()
    if not results.skipped:
        for case in cases(options.quick, options.intervals, options.rounds or (1 if options.quick else 5),
                          1.0 if options.quick else options.seconds, options.patience):
            results.cases.append(case)
            results.save(options.output)
        if not results.cases:
            results.skipped = f"neither redis nor stress-ng is installed, and {peer.missing()}"
    results.save(options.output)
    results.show()


if __name__ == "__main__":
    main()
