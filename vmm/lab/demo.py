"""All of it once, in half a minute: a machine is launched, its dirty rate shown, limited, a snapshot taken, the machine
migrated to another one of this host, and the verifier asked at both ends. (What a person sees is vmm/cli/demo.py.)

The machine is small, its limit and the migration's bandwidth are in proportion to its memory: so a run takes as long,
and has as many rounds, on a fast host as on a slow one.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ipc.linux.process import die_with_parent
from ipc.run import python_module
from ipc.shm import PAGE_SIZE

from .. import migrate, snapshot
from ..client.config import MachineConfig
from ..client.machine import Flushed, Machine
from ..errors import ExitCode, VmmError
from ..machine import records
from ..machine.runtime import runtime_root

__all__ = ["MEMORY_MIN", "STEPS", "Demo", "Seen"]

#: In this order; ``Seen.step`` is one of them, or "" when all is over.
STEPS = ("launch", "dirty rate", "dirty limit", "snapshot", "migration", "verifier")
MEMORY_MIN = 1 << 20        # bytes
_VCPUS = 2
_PREFIX = "shardvmm-demo-"
_CLIENT = "demo"            # of the dirty log
_LOOK = 0.5                 # seconds between two looks at the dirty rate
_LOOKS = {"dirty rate": 6, "dirty limit": 5, "snapshot": 2, "verifier": 3}
_VERIFY = 0.1               # seconds between two rounds of the verifier: several in each look
_LIMIT = 1 / 4              # of its memory, that a vCPU may dirty in a second
_BANDWIDTH = 2.0            # times its memory, that the migration sends in a second
_DOWNTIME = 0.05            # seconds
_LISTENS_IN = 60.0          # seconds: the first process ever compiles the loops
_PATIENCE = 30.0


@dataclass
class Taken:
    """A snapshot."""

    id: str
    pages: int
    incremental: bool
    seconds: float


@dataclass
class Seen:
    """What there was so far; rates in bytes per second, memory in bytes."""

    name: str
    memory: int
    step: str = STEPS[0]
    seconds: float = 0.0            # since the beginning
    accelerator: str = ""
    tracking: str = ""
    pids: list[int] = field(default_factory=list)
    launch_seconds: float = 0.0
    rates: list[float] = field(default_factory=list)        # of the machine, at each look
    vcpu_rates: list[float] = field(default_factory=list)   # at the last one
    unlimited: float = 0.0          # mean of the rates before the limit
    limited: float = 0.0            # and after it
    limit: float | None = None      # of each vCPU
    limit_missing: bool = False     # this host has no rings to limit vCPUs by
    snapshots: list[Taken] = field(default_factory=list)
    migration: dict[str, Any] | None = None     # vmm.migrate.Report
    moved_to: str = ""
    here: dict[str, Any] | None = None          # the verifier's words, of the report (vmm/machine/report.py)
    there: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        """The verifier found nothing at either end."""
        return all(found is not None and found["ok"] and found["rounds"] for found in (self.here, self.there))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


class Demo:
    """One run. ``tell`` is called whenever there is something new, several times a second."""

    def __init__(self, *, memory: int, accel: str, tell: Callable[[Seen], None]) -> None:
        """``memory`` in bytes. Raises VmmError."""
        if memory < MEMORY_MIN or memory % PAGE_SIZE:
            raise VmmError(f"--memory: must be at least {MEMORY_MIN >> 20} MiB, and whole pages of {PAGE_SIZE} bytes")
        self._accel = accel
        self._seen = Seen(f"demo-{os.getpid()}", memory)
        self._tell = tell
        self._began = time.monotonic()
        self._counted: Flushed | None = None    # at the look before

    def run(self) -> Seen:
        """Nothing of it is left afterwards, also when it is left by an exception. Raises VmmError."""
        try:
            return self._run()
        except VmmError:
            raise
        except OSError as exc:      # no room for its folder, no descriptor, no process
            raise VmmError(f"the demo cannot go on: {exc}") from None

    def _run(self) -> Seen:
        seen, there = self._seen, f"{self._seen.name}-there"
        with contextlib.ExitStack() as stack:
            stack.callback(_forget, seen.name, there)
            folder = stack.enter_context(_folder())
            (folder / "door").mkdir()       # of its own: whoever listens there locks it
            address = f"ipc://{folder}/door/there"
            stack.enter_context(_receiver(address, there, self._accel))
            machine = stack.enter_context(self._launch())
            self._look(machine, "dirty rate")
            seen.unlimited = _mean(seen.rates)
            self._limit(machine)
            self._take(machine, folder / "snapshots", incremental=False)
            self._look(machine, "snapshot")
            self._take(machine, folder / "snapshots", incremental=True)
            self._move(machine, address)
            seen.here = machine.wait(_PATIENCE)["verification"]
            moved = stack.enter_context(Machine.attach(there))
            seen.moved_to = there
            self._look(moved, "verifier")
            moved.stop()
            seen.there = moved.wait(_PATIENCE)["verification"]
        self._say("")
        return seen

    def _say(self, step: str) -> None:
        self._seen.step, self._seen.seconds = step, time.monotonic() - self._began
        self._tell(self._seen)

    def _launch(self) -> Machine:
        self._say("launch")
        began = time.monotonic()
        seen = self._seen
        machine = Machine.launch(MachineConfig.model_validate({
            "name": seen.name, "accel": self._accel, "vcpus": _VCPUS, "dirty_ring_size": 4096, "timeout": "10m",
            "memory": [{"size": seen.memory}], "verify": {"interval": _VERIFY},
            "guest": {"workload": "hotspot", "params": {"writes": 0, "hot_percent": 20, "spin": 100}}}))
        seen.launch_seconds = time.monotonic() - began
        report = machine.status()
        seen.accelerator, seen.tracking = report["accelerator"], report["tracking"]
        seen.pids = [vcpu["pid"] for vcpu in report["vcpus"]]
        return machine

    def _look(self, machine: Machine, step: str) -> None:
        """At what it dirties, for a while."""
        machine.register(_CLIENT, mine=True)
        self._counted = None
        self._count(machine)
        for _ in range(_LOOKS[step]):
            self._say(step)
            time.sleep(_LOOK)
            self._count(machine)
        machine.unregister(_CLIENT)
        self._say(step)

    def _count(self, machine: Machine) -> None:
        """What was dirtied before a flush is counted by then: nothing that was written before a limit is after it."""
        now, before = machine.flush(_CLIENT), self._counted
        if before is not None:
            self._seen.vcpu_rates = [(pages - then) * PAGE_SIZE / (now.at - before.at)
                                     for pages, then in zip(now.vcpu_pages, before.vcpu_pages, strict=True)]
            self._seen.rates.append(sum(self._seen.vcpu_rates))
        self._counted = now

    def _limit(self, machine: Machine) -> None:
        seen = self._seen
        if not machine.status()["can_limit"]:
            seen.limit_missing = True
            return
        pages = int(seen.memory * _LIMIT) // PAGE_SIZE
        machine.dirty_limit(pages)
        seen.limit = float(pages * PAGE_SIZE)
        before = len(seen.rates)
        self._look(machine, "dirty limit")
        seen.limited = _mean(seen.rates[before:])

    def _take(self, machine: Machine, directory: Path, *, incremental: bool) -> None:
        self._say("snapshot")
        began = time.monotonic()
        manifest = snapshot.create(machine, directory, incremental=incremental, live=True)
        self._seen.snapshots.append(Taken(manifest.id, manifest.pages, incremental, time.monotonic() - began))
        self._say("snapshot")

    def _move(self, machine: Machine, address: str) -> None:
        self._say("migration")

        def progress(report: migrate.Report) -> None:
            self._seen.migration = report.as_dict()
            self._say("migration")

        options = migrate.Options(bandwidth=self._seen.memory * _BANDWIDTH, downtime=_DOWNTIME)
        progress(migrate.migrate(machine, address, options, progress=progress))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """For snapshots and a socket; where sockets of machines are, whose paths are short enough. Locked, so that those of
    a run that was killed can be told, and are removed by the next one."""
    root = runtime_root().parent
    for left in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(left):
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=root) as name, _locked(Path(name)):
        yield Path(name)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises OSError where another process has it, or it is another user's."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _mean(rates: list[float]) -> float:
    return sum(rates) / len(rates) if rates else 0.0


@contextlib.contextmanager
def _receiver(address: str, name: str, accel: str) -> Iterator[None]:
    """``vmm receive``, which waits for a machine, runs it, and ends it at the latest when this does: another process
    of another session, as on another host. Raises VmmError."""
    process = subprocess.Popen(
        python_module("vmm", "receive", address, "--name", name, "--accel", accel, "--timeout", "10m"),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=functools.partial(die_with_parent, signal.SIGTERM, os.getpid()))
    try:
        assert process.stderr is not None
        said, deadline = b"", time.monotonic() + _LISTENS_IN
        while b"waiting at" not in said:
            if not select.select([process.stderr], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise VmmError(f"vmm receive was not ready within {_LISTENS_IN:.0f} s", ExitCode.TIMEOUT)
            piece = os.read(process.stderr.fileno(), 4096)
            if not piece:
                text = said.decode(errors="replace").strip().removeprefix("vmm: error: ")
                raise VmmError(f"vmm receive: {text or 'ended at once'}")
            said += piece
        yield
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()      # its machine's keeper sees that, and ends the machine
            process.communicate()


def _forget(*names: str) -> None:
    """The logs and reports of its machines."""
    for name in names:
        with contextlib.suppress(OSError):
            records.remove_records(name)
