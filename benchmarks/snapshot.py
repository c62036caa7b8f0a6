"""Snapshot write and restore beside ``cp`` of the same bytes, and with zstd beside ``zstd -1 -T2``, in turns.
``python -m benchmarks snapshot [--mib N]``

A machine whose RAM is filled (with noise; for zstd with bytes of four bits) is saved (full, guest stopped) and
restored; the peer makes a file on the same disk of the memory's own file in /dev/shm, and brings it back. All write
to the page cache and sync; reads come from the page cache. "read back" is a restore without what a machine of 16 MiB
takes to launch: taking the memory counts, as it does for the peer. A lazy restore, of a guest that stands still, is
begun when the guest may run; "lazy, set-up" is that without the launch.

"At work": a guest that writes to a page in each 2 MiB of its RAM, round and round, is saved in the middle of it. From
the beginning of a restore until it has done the rest, less what that takes where nothing is restored: after another
restore, a lazy one, and a lazy one of a snapshot that knows what the guest had in use.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from vmm.client.accelerators import choose_accelerator
from vmm.client.machine import Machine
from vmm.consumers import snapshot
from vmm.consumers.snapshot.manifest import Compression, write_manifest
from vmm.guests import WORKLOADS, resolve_params
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec

from .common import arguments_parser, quartiles, quiet


def machine_spec(mib: int, workload: str = "idle", **params: int) -> MachineSpec:
    return MachineSpec(
        name="bench-snapshot", accel=choose_accelerator("auto"), vcpus=1, privilege="user", ring_entries=4096,
        slots=[RamSlot(0, 0, mib << 20)], image=str(WORKLOADS[workload].image), load_address=None,
        params=resolve_params(workload, params or {"milliseconds": 0}), cmdline=workload, stack_size=16384,
        reaper=ReaperSpec(), verify=None, timeout=None, trace=[], trace_file="", linger=True)


def taken(command: list[str], target: Path) -> float:
    """Seconds that a command takes to make this file, and to sync it."""
    began = time.perf_counter()
    subprocess.run(command, check=True)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return time.perf_counter() - began


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


#: How pages are kept: what a byte of memory may be (fewer values can be compressed), the peer that writes the memory's
#: file to the disk, and the one that brings it back.
KINDS: dict[Compression, tuple[int, list[str], list[str]]] = {
    "none": (256, ["cp"], ["cp"]),
    "zstd": (16, ["zstd", "-q", "-f", "-1", "-T2", "-o"], ["zstd", "-q", "-f", "-d", "-T2", "-o"])}


def main() -> None:
    parser = arguments_parser("snapshot", __doc__)
    parser.add_argument("--mib", type=int, help="RAM of the guest")
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to write to")
    arguments = parser.parse_args()
    arguments.mib = arguments.mib or (16 if arguments.quick else 1024)
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder, Machine.launch(
            machine_spec(arguments.mib)) as machine:
        machine.pause()
        memory = machine.ram(0, writable=True)
        for kind, (values, *peers) in KINDS.items():
            if shutil.which(peers[0][0]) is None:
                print(f"{kind}: skipped: {peers[0][0]} is not installed")
                continue
            memory[2 << 20:] = np.random.default_rng(0).integers(0, values, len(memory) - (2 << 20), np.uint8)
            ram = Path("/dev/shm") / machine.ram_segment(0)[1:]
            compare(machine, ram, Path(folder), kind, peers, rounds, arguments)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        at_work(Path(folder), rounds, arguments)


def at_work(folder: Path, rounds: int, arguments: argparse.Namespace) -> None:
    with Machine.launch(machine_spec(arguments.mib, "sequential", stride=512, passes=40_000 // arguments.mib * 2,
                                     spin=4000), start=False) as machine:
        memory = machine.ram(0, writable=True)
        memory[2 << 20:] = np.random.default_rng(0).integers(0, 256, len(memory) - (2 << 20), np.uint8)
        machine.start()
        taken = snapshot.create(machine, folder / "known", working_set=0.3)
        alone = seconds(machine.wait)
    shutil.copytree(folder / "known", folder / "unknown")
    write_manifest(folder / "unknown" / taken.id, msgspec.structs.replace(taken, slots=[
        msgspec.structs.replace(slot, working_set="") for slot in taken.slots]))
    ways = {"another": ("unknown", False), "lazy": ("unknown", True), "lazy, in use first": ("known", True)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        quiet(arguments.patience)
        for name in list(ways)[::-1 if number % 2 else 1]:
            chain, lazy = ways[name]
            began = time.perf_counter()
            with snapshot.restore(folder / chain, machine_name="bench-restored", lazy=lazy) as restored:
                restored.wait()
                times[name].append(time.perf_counter() - began - alone)
    for name, values in times.items():
        low, middle, high = quartiles(a / b for a, b in zip(values, times["another"], strict=True))
        print(f"at work: {name:19} {statistics.median(values):6.2f} s; {middle:.2f} x the time of another restore "
              f"({low:.2f} to {high:.2f})")


def compare(machine: Machine, ram: Path, folder: Path, kind: Compression, peers: list[list[str]], rounds: int,
            arguments: argparse.Namespace) -> None:
    times: dict[str, list[float]] = {name: [] for name in ("create", "peer to disk", "restore", "launch",
                                                           "peer to memory", "lazy, begun", "lazy, all")}
    chain, copy, back = folder / "chain", folder / "copy", Path("/dev/shm/shardvmm-bench-copy")
    small = msgspec.structs.replace(machine_spec(16), name="bench-restored")

    def launched(launch: Callable[[], Machine]) -> float:
        """Seconds until it stands before its first instruction."""
        began = time.perf_counter()
        launched = launch()
        took = time.perf_counter() - began
        launched.close()
        return took

    def lazily() -> float:
        """Seconds until the memory is there; those until the guest may run are kept."""
        began = time.perf_counter()
        with snapshot.restore(chain, machine_name=small.name, start=False, lazy=True) as restored:
            times["lazy, begun"].append(time.perf_counter() - began)
            while restored.status()["incoming"]:
                time.sleep(0.001)
            return time.perf_counter() - began

    for number in range(rounds):
        quiet(arguments.patience)
        write = {"create": lambda: seconds(lambda: snapshot.create(machine, chain, compression=kind)),
                 "peer to disk": lambda: taken(ordered(peers[0], ram, copy), copy)}
        read = {"restore": lambda: launched(lambda: snapshot.restore(chain, machine_name=small.name, start=False)),
                "lazy, all": lazily, "launch": lambda: launched(lambda: Machine.launch(small, start=False)),
                "peer to memory": lambda: taken(ordered(peers[1], copy, back), back)}
        for measures in (write, read):
            for name in list(measures)[::-1 if number % 2 else 1]:
                times[name].append(measures[name]())
        back.unlink()
        copy.unlink()
        shutil.rmtree(chain)
    times["read back"] = [a - b for a, b in zip(times["restore"], times["launch"], strict=True)]
    times["lazy, set-up"] = [a - b for a, b in zip(times["lazy, begun"], times["launch"], strict=True)]
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{kind}: {name:14} {middle:6.2f} s  {arguments.mib / middle:8.0f} MiB/s")
    low, middle, high = quartiles(a / b for a, b in zip(times["lazy, all"], times["restore"], strict=True))
    print(f"{kind}: a lazy restore has all memory after {middle:.2f} x the time of another ({low:.2f} to {high:.2f})")
    for ours, theirs, note in (("create", "peer to disk", ""), ("read back", "peer to memory", ""),
                               ("restore", "peer to memory", ", and the launch of a machine")):
        low, middle, high = quartiles(a / b for a, b in zip(times[theirs], times[ours], strict=True))
        print(f"{kind}: {ours} has {middle:.2f} x the speed of {' '.join(peers[ours != 'create'])} "
              f"({low:.2f} to {high:.2f}) with the checksum{note}")


def ordered(command: list[str], source: Path, target: Path) -> list[str]:
    """zstd names its output first."""
    return [*command, str(target), str(source)] if command[-1] == "-o" else [*command, str(source), str(target)]


if __name__ == "__main__":
    main()
