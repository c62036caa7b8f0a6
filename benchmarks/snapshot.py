"""Snapshot write and restore beside ``cp`` of the same bytes, in turns. ``python -m benchmarks snapshot [--mib N]``

A machine whose RAM is filled with noise is saved (full, guest stopped) and restored; cp copies the memory's own
file in /dev/shm to the same disk, and back. Both write to the page cache and sync; reads come from the page cache.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np

from vmm.client.accelerators import choose_accelerator
from vmm.client.machine import Machine
from vmm.consumers import snapshot
from vmm.guests import WORKLOADS, resolve_params
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec

from .common import arguments_parser, quiet


def machine_spec(mib: int) -> MachineSpec:
    return MachineSpec(
        name="bench-snapshot", accel=choose_accelerator("auto"), vcpus=1, privilege="user", ring_entries=4096,
        slots=[RamSlot(0, 0, mib << 20)], image=str(WORKLOADS["idle"].image), load_address=None,
        params=resolve_params("idle", {"milliseconds": 0}), cmdline="idle", stack_size=16384, reaper=ReaperSpec(),
        verify=None, timeout=None, trace=[], trace_file="", linger=True)


def copy(source: Path, target: Path) -> float:
    began = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    fd = os.open(target, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return time.perf_counter() - began


def main() -> None:
    parser = arguments_parser("snapshot", __doc__)
    parser.add_argument("--mib", type=int, help="RAM of the guest")
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to write to")
    arguments = parser.parse_args()
    arguments.mib = arguments.mib or (16 if arguments.quick else 512)
    times: dict[str, list[float]] = {"create": [], "cp to disk": [], "restore": [], "cp to memory": [],
                                     "launch, end": []}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder, Machine.launch(
            machine_spec(arguments.mib)) as machine:
        machine.pause()
        memory = machine.ram(0, writable=True)
        memory[2 << 20:] = np.random.default_rng(0).integers(0, 256, len(memory) - (2 << 20), np.uint8)
        ram = Path("/dev/shm") / machine.ram_segment(0)[1:]
        for _ in range(arguments.rounds or (1 if arguments.quick else 5)):
            quiet(arguments.patience)
            chain = Path(folder) / "chain"
            began = time.perf_counter()
            snapshot.create(machine, chain)
            times["create"].append(time.perf_counter() - began)
            times["cp to disk"].append(copy(ram, Path(folder) / "copy"))
            began = time.perf_counter()
            snapshot.restore(chain, machine_name="bench-restored", start=False).close()
            times["restore"].append(time.perf_counter() - began)
            began = time.perf_counter()
            Machine.launch(msgspec.structs.replace(machine_spec(arguments.mib), name="bench-restored"),
                           start=False).close()
            times["launch, end"].append(time.perf_counter() - began)
            times["cp to memory"].append(copy(Path(folder) / "copy", Path("/dev/shm/shardvmm-bench-copy")))
            os.unlink("/dev/shm/shardvmm-bench-copy")
            shutil.rmtree(chain)
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{name:14} {middle:6.2f} s  {arguments.mib / middle:8.0f} MiB/s")
    times["read back"] = [a - b for a, b in zip(times["restore"], times["launch, end"], strict=True)]
    for ours, theirs, note in (("create", "cp to disk", ""), ("read back", "cp to memory", ""),
                               ("restore", "cp to memory", ", launch and end of a machine")):
        ratio = statistics.median(a / b for a, b in zip(times[ours], times[theirs], strict=True))
        print(f"{ours} takes {ratio:.2f} x the time of cp with the checksum" + note)


if __name__ == "__main__":
    main()
