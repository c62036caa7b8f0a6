"""Helpers for end-to-end tests: specs without YAML, accelerators to run on, process look-ups."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from needs import missing
from numpy.typing import NDArray

from ipc.linux.libc import SYS_FUTEX
from vmm.client.machine import Machine
from vmm.errors import ExitCode, VmmError
from vmm.guests import WORKLOADS, resolve_params
from vmm.machine.names import belongings
from vmm.machine.runtime import is_running
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec, VerifySpec

#: Parametrisation over both accelerators.
ACCELS = [pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("unicorn")]

#: For what does not depend on the accelerator: KVM where it can be used, the other in the long set.
ANY = [ACCELS[0], pytest.param("unicorn", marks=[] if missing("kvm") else pytest.mark.long)]

#: Guests that go on for ever leave more of the processor to whoever has something to do.
NICE = 3

#: RAM that is no multiple of 64 pages, as the kernel's dirty_log_test has it.
ODD = 3 * 4096


def spec(workload: str, *, accel: str, name: str = "t", vcpus: int = 2, ring: int = 4096,
         mib: int = 16, slots: list[RamSlot] | None = None, verify: VerifySpec | None = None,
         timeout: float | None = 60.0, reaper: ReaperSpec | None = None, privilege: str = "user",
         image: Path | None = None, params: Iterable[int] | None = None, trace: list[str] | None = None,
         trace_file: str = "", load_address: int | None = None, log: str = "auto",
         **workload_params: int) -> MachineSpec:
    """A machine that runs one of the sample guests (or ``image``), with short defaults."""
    guest = WORKLOADS.get(workload)
    return MachineSpec(
        name=name, accel=accel, vcpus=vcpus, privilege=privilege, ring_entries=ring,
        nice=NICE if timeout is None else 0,
        slots=slots or [RamSlot(0, 0, (mib << 20) + ODD)],
        image=str(image or (guest.image if guest else "")), load_address=load_address,
        params=list(params) if params is not None else resolve_params(workload, workload_params),
        cmdline=workload, stack_size=16384, reaper=reaper or ReaperSpec(),
        verify=verify, timeout=timeout, trace=trace or [], trace_file=trace_file, log=log, linger=True)


def exact(interval: float = 0.05, inject: str = "none") -> VerifySpec:
    return VerifySpec(interval=interval, inject=inject, surplus_is_failure=True)


def replace(base: MachineSpec, **changes: Any) -> MachineSpec:
    return msgspec.structs.replace(base, **changes)


def changed_pages(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> set[int]:
    """Pages whose content differs."""
    return set(np.flatnonzero((before.reshape(-1, 4096) != after.reshape(-1, 4096)).any(axis=1)).tolist())


def until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Wait for it, with a deadline. Looks less often by and by: a look may cost the machine something."""
    deadline, pause = time.monotonic() + seconds, 0.002
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(pause)
        pause = min(pause * 1.3, 0.05)


def asleep(thread: threading.Thread) -> bool:
    """This thread of this process sleeps in futex(2)."""
    number = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().split()[0]     # proc_pid_syscall(5)
    return number == str(SYS_FUTEX)


def _entries(machine: Machine) -> list[int]:
    return [v["guest_entries"] for v in machine.status()["vcpus"]]


def runs(machine: Machine) -> bool:
    """Every vCPU enters the guest again, as a flush has it do; True, or it fails."""
    machine.register("flush")
    before = _entries(machine)

    def entered() -> bool:
        machine.sync("flush")
        return all(now > then for now, then in zip(_entries(machine), before, strict=True))

    until(entered, "every vCPU enters the guest")
    return True


def stands_still(machine: Machine) -> bool:
    """No vCPU enters the guest, whatever asks for it: several flushes kick all of them."""
    machine.register("flush")
    before = _entries(machine)
    for _ in range(5):
        machine.sync("flush")
    return _entries(machine) == before


def alive(pid: int) -> bool:
    """The process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _environment(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return []


def machine_processes(name: str) -> list[int]:
    """Live processes whose command line or ancestry says that they belong to machine ``name`` of this runtime
    directory: its keeper, and everything below it."""
    ours = f"XDG_RUNTIME_DIR={os.environ.get('XDG_RUNTIME_DIR')}".encode()
    children: dict[int, list[int]] = {}
    roots: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(int(entry.name))
        if b"vmm.coordinator.keeper" in command and name.encode() in command and ours in _environment(entry):
            roots.append(int(entry.name))
    found: list[int] = []
    while roots:
        pid = roots.pop()
        if alive(pid):
            found.append(pid)
        roots += children.get(pid, [])
    return [pid for pid in found if pid != os.getpid()]


def nothing_left(name: str = "t") -> bool:
    """No process, segment, lock or directory of the machine."""
    return not machine_processes(name) and not belongings(name).left()


def end(name: str) -> None:
    """The machine of that name, if there is one and it has not ended by then; nothing of it is left."""
    if is_running(name):
        try:
            with Machine.attach_pinned(name) as machine:
                machine.stop()
        except VmmError as exc:
            if exc.exit_code is not ExitCode.NO_MACHINE:    # it had been told to, and was about to go
                raise
        until(lambda: nothing_left(name), "nothing is left")
