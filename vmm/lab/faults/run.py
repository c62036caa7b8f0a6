"""Carry out an episode: a real machine, real signals to its processes, and clients that hold what they are told
against memory."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipc.shm import PAGE_SIZE

from ... import snapshot
from ...client.machine import Machine
from ...consumers.trace import record
from ...errors import ExitCode, VmmError
from ...guests import WORKLOADS, resolve_params
from ...machine.names import belongings, between_name
from ...machine.spec import MachineSpec, RamSlot, ReaperSpec, VerifySpec
from ...tracefile import TraceReader
from .hit import Hit, pid_in
from .move import Ended, Move, end, move
from .oracle import Oracle
from .plan import COLD_SLOT, HOT_SLOT, Episode, Event, Fault
from .process import until
from .upgraded import upgrade

__all__ = ["Outcome", "run_episode"]

_HOT_GPA, _HOT_PAGES, _COLD_GPA = 1 << 33, 256, 1 << 32
_PATIENCE = 60.0            # seconds that an event may take
_MOVING = 300.0             # of a migration: vmm/lab/faults/move.py bounds its parts
_RUN = 0.03                 # seconds that a guest is left alone
_RECORDING = 0.3            # seconds of a recording
_CLIENTS = ("faults_a", "faults_b")
_HITS_ITSELF = ("migrate", "upgrade")    # events that have processes of their own, which a fault may hit


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
    hits: Counter[str] = field(default_factory=Counter)     # by what was done to whom
    done: Counter[str] = field(default_factory=Counter)     # events by what they were


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
                try:
                    with _patience(_MOVING if event.do in _HITS_ITSELF else _PATIENCE):
                        run.carry_out(event)
                except Ended:
                    break
                finally:
                    outcome.events += 1
                    outcome.done[event.kind] += 1
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
        self._verifies = episode.verify
        self._outcome = outcome
        self._names = [name]                # of the machine, and of where it has moved to
        self._paused = False                # by the user
        self._limit: int | None = 0         # pages per second; None: it was not to be set
        self._fault: Fault | None = None    # what is going wrong in the present event
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
        return [each for name in self._names for each in (*belongings(name).left(),
                                                          *belongings(between_name(name)).left())]

    def carry_out(self, event: Event) -> None:
        """Do it, with its fault meanwhile. Raises Ended, and VmmError for what must not be."""
        action = getattr(self, f"_do_{event.do.replace('-', '_')}")
        self._fault = event.fault
        if event.fault is None or event.do in _HITS_ITSELF:
            action(*event.arguments)
            return
        with self._hitting(event.fault):
            try:
                action(*event.arguments)
            except VmmError:
                # A vCPU that has gone may be what it was about; nothing may be lost all the same.
                if not event.fault.kills or not event.fault.victim.startswith("vcpu"):
                    raise

    def _hit(self, fault: Fault) -> None:
        """It has."""
        self._outcome.faults += 1
        self._outcome.hits[fault.kind] += 1

    @contextlib.contextmanager
    def _hitting(self, fault: Fault) -> Iterator[None]:
        """The fault hits within the ``with``, or at its end."""
        status = self._machine.status()
        pid = (belongings(self._machine.name).owner_pid() or 0 if fault.victim == "keeper" else
               pid_in(status, fault.victim))
        with Hit(fault, lambda: pid, late=True) as hit:
            yield
        if hit.done:
            self._hit(fault)
            self._after_kill(fault, status["coordinator"]["restarts"])

    def _after_kill(self, fault: Fault, restarts: int) -> None:
        """``restarts``: of the coordinator's, before. Whoever replaces the victim is there."""
        if fault.kills and fault.victim == "coordinator":
            self._await_successor(restarts)
        elif fault.kills and fault.victim.startswith("vcpu"):
            self._dead.add(int(fault.victim.removeprefix("vcpu")))
            self._outcome.lost_workers += 1

    def _await_successor(self, before: int) -> None:
        until(lambda: self._machine.status()["coordinator"]["restarts"] != before, "another coordinator takes over")
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
        self._check_limit()

    def _do_write(self, slot: int, page: int) -> None:
        """By the host, over a page's end. The number with which the next page begins is 0: whatever the guest puts
        there later is higher (``_not_older``)."""
        gpa = {COLD_SLOT: _COLD_GPA, HOT_SLOT: _HOT_GPA}[slot]
        at = gpa + min(page * PAGE_SIZE + PAGE_SIZE - 8, _HOT_PAGES * PAGE_SIZE - 16)
        self._machine.write(at, self._dice.bytes(8) + bytes(4) + self._dice.bytes(4))

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

    def _do_nobody(self) -> None:
        """All clients go, and the log with them, if nobody else needs it; then they come again."""
        try:
            for oracle in self._oracles:
                oracle.leave()
            self._machine.set_tracking(self._machine.status()["tracking_asked"])    # does not wait for somebody else
            time.sleep(_RUN)
        finally:
            for oracle in self._oracles:
                oracle.come()

    def _do_snapshot(self) -> None:
        """What it holds is what was in memory."""
        chain = self._folder / self._machine.name      # a machine that has moved begins a new one
        with self._machine.paused("fault campaign"):
            memory = self._memory(self._machine)
            snapshot.create(self._machine, chain, incremental=chain.exists())
        _same(snapshot.read_memory(chain), memory, "snapshot")

    def _do_limit(self, pages_per_s: int) -> None:
        self._limit = None
        self._machine.dirty_limit(pages_per_s)
        self._limit = pages_per_s
        self._check_limit()

    def _check_limit(self) -> None:
        """Whoever is replaced, and wherever it goes, it stays."""
        for each in self._machine.status()["vcpus"]:
            if self._limit is not None and not each["exit_reason"] and each["dirty_limit_pages_per_s"] != self._limit:
                raise VmmError(f"vCPU {each['index']} has a dirty limit of {each['dirty_limit_pages_per_s']} pages/s "
                               f"instead of {self._limit}")

    def _do_record(self) -> None:
        """Every page that changes between two looks at the memory is in the trace, if that says that it is
        complete. The guest stands still until the recording has begun, and from the second look to its end."""
        machine, path = self._machine, self._folder / "trace"
        logged = [each["id"] for each in machine.status()["slots"] if each["logged"]]
        with contextlib.ExitStack() as still:
            still.enter_context(machine.paused("fault campaign"))
            looks = [self._memory(machine)]

            def wait(seconds: float) -> bool:
                if len(looks) == 1:
                    still.close()
                    time.sleep(_RUN)
                    still.enter_context(machine.paused("fault campaign"))
                    looks.append(self._memory(machine))
                else:
                    time.sleep(seconds)
                return False

            end = record(machine, path, _RECORDING, _RECORDING / 2, wait=wait)
        if end.reason:
            if self._fault is None or not self._fault.kills:
                raise VmmError(f"the recording is not complete: {end.reason}")
        elif not end.lost and len(looks) == 2:
            _recorded(path, {slot: (looks[0][slot], looks[1][slot]) for slot in logged})

    def _do_migrate(self, how: str, accel: str) -> None:
        """To another machine of this host; what arrives is compared with what left. The memory here stays as it was
        handed over, and can be looked at until this process lets go of it."""
        source, fault = self._machine, self._fault
        status = source.status()
        if how == "in-place" and self._verifies:
            how = "precopy"     # its verifier would compare memory that is no longer its own
        # In place the guest goes on in that very memory: it is compared with what was there before.
        left = self._memory(source) if how == "in-place" else {e["id"]: source.ram(e["id"]) for e in status["slots"]}
        name = f"{self._names[0]}-{len(self._names)}"
        self._names.append(name)
        moved, hit = move(source, Move(name, accel, how, self._folder), fault)
        if fault is not None and hit:
            self._hit(fault)
        if not moved:
            if fault is not None and hit:
                self._after_kill(fault, status["coordinator"]["restarts"])
            return
        target = self._open.enter_context(Machine.attach(name))
        if fault is not None and hit and fault.kills and fault.victim == "target-coordinator":
            self._machine = target
            self._await_successor(0)
        arrived = {slot: target.ram(slot).copy() for slot in left}
        (_same if self._paused else _not_older)(arrived, left, f"migration ({how})")
        self._close_oracles()
        _checked(source.wait(_PATIENCE))
        source.close()
        self._machine = target
        self._dead = {each["index"] for each in target.status()["vcpus"] if each["exit_reason"]}
        self._outcome.lost_workers += len(self._dead)
        self._oracles = [Oracle(target.name, client) for client in _CLIENTS]
        self._check_limit()

    def _do_upgrade(self) -> None:
        """Clients, and what they have been told and will be, are those of before: the oracles go on."""
        if upgrade(self._machine, self._folder, self._fault) and self._fault is not None:
            self._hit(self._fault)
        self._check_limit()

    @staticmethod
    def _memory(machine: Machine) -> dict[int, NDArray[np.uint8]]:
        return {each["id"]: machine.ram(each["id"]).copy() for each in machine.status()["slots"]}

    def _do_stop(self) -> None:
        self._machine.stop()
        report = self._machine.wait(_PATIENCE)
        _checked(report)
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
        for name in self._names[1:]:        # those are nobody's
            end(name)


def _checked(report: dict[str, Any]) -> None:
    """Raises VmmError where the coordinator's own verifier, if it was on, has found something."""
    checked = report["verification"]
    if checked is not None and checked["lost_pages"]:
        raise VmmError(f"the coordinator's verifier found {checked['lost_pages']} lost pages: "
                       f"{'; '.join(checked['first_findings'])}")


def _recorded(path: Path, looks: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> None:
    """Raises VmmError."""
    with TraceReader(path) as reader:
        found = {slot: np.zeros(before.size // PAGE_SIZE, bool) for slot, (before, _) in looks.items()}
        for each in reader:
            for slot, bits in found.items():
                bits[each.pages[each.slots == slot]] = True
    for slot, (before, after) in looks.items():
        changed = (before != after).reshape(-1, PAGE_SIZE).any(axis=1)
        _none(changed & ~found[slot], slot, "recording", "changed and are in no record of a complete trace")


def _same(held: dict[int, NDArray[np.uint8]], memory: dict[int, NDArray[np.uint8]], what: str) -> None:
    """Raises VmmError."""
    for slot, wanted in memory.items():
        _none((held[slot] != wanted).reshape(-1, PAGE_SIZE).any(axis=1), slot, what,
              "are not those that were in memory")


def _not_older(held: dict[int, NDArray[np.uint8]], memory: dict[int, NDArray[np.uint8]], what: str) -> None:
    """Of a guest that went on: it puts ever higher numbers into the first four bytes of its pages, and its round and
    its vCPU into the next four (vmm/guests/stamp.S). Raises VmmError."""
    for slot, wanted in memory.items():
        now, then = held[slot].reshape(-1, PAGE_SIZE), wanted.reshape(-1, PAGE_SIZE)
        lower = now[:, :4].copy().view("<u4")[:, 0] < then[:, :4].copy().view("<u4")[:, 0]
        _none(lower | (now[:, 8:] != then[:, 8:]).any(axis=1), slot, what, "are older than those that were in memory")


def _none(pages: NDArray[np.bool_], slot: int, what: str, wrong: str) -> None:
    """Raises VmmError where there are any."""
    found = np.flatnonzero(pages)
    if len(found):
        raise VmmError(f"{what}: {len(found)} pages of slot {slot} {wrong}: "
                       f"{', '.join(f'{page:#x}' for page in found[:8])}")


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


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Raises Slow in what takes too long."""
    def late(signum: int, frame: FrameType | None) -> None:
        raise Slow(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
