"""Carry out an episode: a real machine, real signals to its processes, and clients that hold what they are told
against memory."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
from numpy.typing import NDArray

from ipc.shm import PAGE_SIZE

from ... import snapshot
from ...client.machine import Machine
from ...errors import ExitCode, VmmError
from ...guests import WORKLOADS, resolve_params
from ...machine.names import belongings
from ...machine.spec import MachineSpec, RamSlot, ReaperSpec, VerifySpec
from ...migrate import MigrationError, migrate
from ...receive import receive
from .oracle import Oracle
from .plan import COLD_SLOT, HOT_SLOT, Episode, Event, Fault

__all__ = ["Outcome", "run_episode"]

_HOT_GPA, _HOT_PAGES, _COLD_GPA = 1 << 33, 256, 1 << 32
_PATIENCE = 60.0            # seconds that an event may take
_RUN = 0.03                 # seconds that a guest is left alone
_CLIENTS = ("faults_a", "faults_b")


@dataclass(slots=True)
class Outcome:
    """``problem``: what was wrong; empty: nothing was. ``at``: the number of the event it was found at."""

    problem: str = ""
    at: int = -1
    faults: int = 0
    compared_pages: int = 0
    dirty_pages: int = 0
    takeovers: int = 0
    lost_workers: int = 0
    events: int = 0
    seconds: float = 0.0


class Slow(VmmError):
    """An event has not ended."""


def run_episode(episode: Episode) -> Outcome:
    """What came of it; nothing of it is left. In the main thread (it uses SIGALRM)."""
    outcome = Outcome()
    began = time.monotonic()
    name = f"faults-{os.getpid()}"
    try:
        with tempfile.TemporaryDirectory(prefix="shardvmm-faults-") as folder, _Run(episode, name, Path(folder),
                                                                                   outcome) as run:
            for number, event in enumerate(episode.events):
                outcome.at = number
                with _patience():
                    run.carry_out(event)
                outcome.events += 1
        if run.left:
            raise VmmError(f"left behind: {', '.join(run.left)}")
        outcome.at = -1
    except (VmmError, OSError) as exc:
        outcome.problem = str(exc) or type(exc).__name__
    outcome.seconds = time.monotonic() - began
    return outcome


class _Run:
    """One machine and its clients."""

    def __init__(self, episode: Episode, name: str, folder: Path, outcome: Outcome) -> None:
        """Raises VmmError."""
        self._folder = folder
        self._outcome = outcome
        self._names = [name]                # of the machine, and of where it has moved to
        self._paused = False                # by the user
        self._faulty = False                # something is going wrong in the present event
        self._dead: set[int] = set()        # vCPUs whose workers have been killed
        self._dice = np.random.default_rng(episode.seed * 1_000_003 + episode.number)
        self._open = contextlib.ExitStack()
        self._machine = self._open.enter_context(Machine.launch(_spec(episode, name), start=False))
        try:
            self._oracles = [Oracle(name, client) for client in _CLIENTS]
        except BaseException:
            self._open.close()
            raise

    @property
    def left(self) -> list[str]:
        """What there is of the machine, wherever it has been."""
        return [each for name in self._names for each in belongings(name).left()]

    def carry_out(self, event: Event) -> None:
        """Do it, with its fault meanwhile. Raises VmmError for what must not be."""
        action = getattr(self, f"_do_{event.do.replace('-', '_')}")
        self._faulty = event.fault is not None
        if event.fault is None:
            action(*event.arguments)
            return
        with self._hitting(event.fault):
            try:
                action(*event.arguments)
            except VmmError:
                # A vCPU that has gone may be what it was about; nothing may be lost all the same.
                if event.fault.stop_ms or not event.fault.victim.startswith("vcpu"):
                    raise
        self._outcome.faults += 1

    @contextlib.contextmanager
    def _hitting(self, fault: Fault) -> Iterator[None]:
        """The fault hits within the ``with``, or at its end."""
        machine = self._machine
        status = machine.status()
        before = status["coordinator"]["restarts"]
        pid = (status["coordinator"]["pid"] if fault.victim == "coordinator" else
               belongings(machine.name).owner_pid() or 0 if fault.victim == "keeper" else
               status["vcpus"][int(fault.victim.removeprefix("vcpu"))]["pid"])
        kill = fault.stop_ms == 0
        with contextlib.ExitStack() as stack:
            try:
                victim = os.pidfd_open(pid)
            except OSError:
                yield       # a vCPU that was killed before
                return
            stack.callback(os.close, victim)
            thread = threading.Thread(target=_hit, args=(victim, fault))
            thread.start()
            try:
                yield
            finally:
                thread.join()
        if machine is not self._machine:
            return          # it has moved: whoever was hit is gone with the rest
        if kill and fault.victim == "coordinator":
            self._await_successor(before)
        elif kill:
            self._dead.add(int(fault.victim.removeprefix("vcpu")))
            self._outcome.lost_workers += 1

    def _await_successor(self, before: int) -> None:
        deadline = time.monotonic() + _PATIENCE
        while self._machine.status()["coordinator"]["restarts"] == before:
            if time.monotonic() > deadline:
                raise Slow("no coordinator took over")
            time.sleep(0.01)
        self._outcome.takeovers += 1

    # --- events ---------------------------------------------------------------------------------------

    def _do_start(self) -> None:
        self._machine.start()

    def _do_run(self) -> None:
        time.sleep(_RUN)

    def _do_look(self) -> None:
        for oracle in self._oracles:
            oracle.look()

    def _do_check(self) -> None:
        for oracle in self._oracles:
            oracle.check()

    def _do_write(self, slot: int, page: int) -> None:
        """By the host, over a page's end."""
        gpa = {COLD_SLOT: _COLD_GPA, HOT_SLOT: _HOT_GPA}[slot]
        at = gpa + min(page * PAGE_SIZE + PAGE_SIZE - 8, _HOT_PAGES * PAGE_SIZE - 16)
        self._machine.write(at, self._dice.bytes(16))

    def _do_plug(self) -> None:
        self._machine.memory_add(HOT_SLOT, _HOT_GPA, _HOT_PAGES * PAGE_SIZE)

    def _do_unplug(self) -> None:
        self._machine.memory_remove(HOT_SLOT)

    def _do_log_start(self, slot: int) -> None:
        self._machine.log_start(slot)

    def _do_log_stop(self, slot: int) -> None:
        self._machine.log_stop(slot)

    def _do_tracking(self, mode: str) -> None:
        self._machine.set_tracking(mode)

    def _do_pause(self) -> None:
        self._machine.pause()
        self._paused = True

    def _do_resume(self) -> None:
        self._machine.resume()
        self._paused = False

    def _do_client(self) -> None:
        """One that comes, takes, and goes."""
        self._machine.register("faults_c")
        self._machine.take("faults_c")
        self._machine.unregister("faults_c")

    def _do_snapshot(self) -> None:
        """What it holds is what was in memory."""
        chain = self._folder / self._machine.name      # a machine that has moved begins a new one
        with self._machine.paused("fault campaign"):
            memory = self._memory(self._machine)
            snapshot.create(self._machine, chain, incremental=chain.exists())
        _same(snapshot.read_memory(chain), memory, "snapshot")

    def _do_migrate(self) -> None:
        """To another machine of this host. It is paused, so that what arrives can be compared with what left."""
        source = self._machine
        source.pause()
        memory = self._memory(source)
        receiver = _Receiver(f"ipc://{self._folder}/migrate{len(self._names)}",
                             f"{self._names[0]}-{len(self._names)}")
        self._names.append(receiver.name)
        try:
            migrate(source, receiver.address)
        except MigrationError:
            receiver.join(_PATIENCE)
            if receiver.machine is not None:
                raise VmmError("the migration failed, and both sides have the machine") from None
            if not self._faulty:
                raise
            target = source
        else:
            receiver.join(_PATIENCE)
            if receiver.machine is None:
                raise VmmError(f"the migration has ended, but the target says: {receiver.error}")
            target = self._open.enter_context(receiver.machine)
        _same({slot: target.ram(slot) for slot in memory}, memory, "migration")
        if target is not source:
            self._close_oracles()
            source.close()
            self._machine = target
            self._oracles = [Oracle(target.name, client) for client in _CLIENTS]
        if not self._paused:
            target.resume()

    @staticmethod
    def _memory(machine: Machine) -> dict[int, NDArray[np.uint8]]:
        return {each["id"]: machine.ram(each["id"]).copy() for each in machine.status()["slots"]}

    def _do_stop(self) -> None:
        self._machine.stop()
        report = self._machine.wait(_PATIENCE)
        checked = report["verification"]
        if checked is not None and checked["lost_pages"]:
            raise VmmError(f"the coordinator's verifier found {checked['lost_pages']} lost pages: "
                           f"{'; '.join(checked['first_findings'])}")
        wanted = ExitCode.WORKER_DIED if self._dead else ExitCode.STOPPED
        if report["exit_code"] != wanted:
            raise VmmError(f"the machine ended with status {report['exit_code']} instead of {int(wanted)}: "
                           f"{report['cause']}")

    def __enter__(self) -> _Run:
        return self

    def _close_oracles(self) -> None:
        for oracle in self._oracles:
            self._outcome.compared_pages += oracle.compared
            self._outcome.dirty_pages += oracle.dirty
            oracle.close()
        self._oracles.clear()

    def __exit__(self, *error: object) -> None:
        self._close_oracles()
        self._open.close()


class _Receiver(threading.Thread):
    """Waits for the machine in a thread of its own; listening when this returns."""

    def __init__(self, address: str, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.address = address
        self.machine: Machine | None = None
        self.error: Exception | None = None
        self._listening = threading.Event()
        self.start()
        self._listening.wait(_PATIENCE)

    def run(self) -> None:
        try:
            self.machine = receive(self.address, name=self.name, timeout=_PATIENCE,
                                   waiting=lambda address: self._listening.set())
        except Exception as exc:
            self.error = exc
        finally:
            self._listening.set()


def _same(held: dict[int, NDArray[np.uint8]], memory: dict[int, NDArray[np.uint8]], what: str) -> None:
    """Raises VmmError."""
    for slot, wanted in memory.items():
        different = np.flatnonzero((held[slot] != wanted).reshape(-1, PAGE_SIZE).any(axis=1))
        if len(different):
            raise VmmError(f"{what}: {len(different)} pages of slot {slot} are not those that were in memory: "
                           f"{', '.join(f'{page:#x}' for page in different[:8])}")


def _spec(episode: Episode, name: str) -> MachineSpec:
    """A guest that writes to random pages for ever, slowly enough to leave the processors to others."""
    return MachineSpec(
        name=name, accel=episode.accel, vcpus=episode.vcpus, privilege="user", ring_entries=episode.ring,
        slots=[RamSlot(0, 0, episode.mib << 20), RamSlot(COLD_SLOT, _COLD_GPA, _HOT_PAGES * PAGE_SIZE)],
        image=str(WORKLOADS["stamp"].image), load_address=None,
        params=resolve_params("stamp", {"writes": 0, "spin": 500}), cmdline="stamp", stack_size=16384,
        reaper=ReaperSpec(), timeout=None, trace=[], trace_file="",
        verify=VerifySpec(interval=0.05, surplus_is_failure=False) if episode.verify else None,
        tracking=episode.tracking, nice=5, linger=True)


def _hit(victim: int, fault: Fault) -> None:
    """In a thread of its own."""
    time.sleep(fault.after_ms / 1000)
    with contextlib.suppress(ProcessLookupError):
        if not fault.stop_ms:
            signal.pidfd_send_signal(victim, signal.SIGKILL)
            return
        signal.pidfd_send_signal(victim, signal.SIGSTOP)
        try:
            time.sleep(fault.stop_ms / 1000)
        finally:
            signal.pidfd_send_signal(victim, signal.SIGCONT)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Raises Slow in what takes too long."""
    def late(signum: int, frame: FrameType | None) -> None:
        raise Slow(f"not done within {_PATIENCE:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
