"""``vmm upgrade``: a running machine gets new processes, keeper, coordinator and workers, of the program that carries
this out. It keeps its memory, which is handed over in place, and its name.

No two machines have one name at once, so there are two hand-overs, each to a machine that this process makes::

    NAME  -->  upgrade-<hash of NAME>  -->  NAME
    old processes    new ones, which end at once    new ones, which stay

The first asks of the old processes nothing but what a migration does, so they may be of another version. Between the
two the guest runs, and the old machine ends. Each hand-over is one of those that source.py and target.py carry out,
with three differences:

* The machine there lives by itself from before it is started (``Machine.let_go``), and takes the memory away from the
  one here as it starts (vmm/coordinator/core.py). So whoever is killed, either it has begun and goes on, or it goes.
* Should this process be killed after the machine here was handed over, the one that its coordinator starts looks which
  of the two it is (``Source.recover``), and ends the machine here or lets it go on.
* Should it be killed once the machine has new processes, one that it has begun beforehand (guard.py) does the rest;
  with that killed too, the machine goes on under the name that it has, until ``vmm upgrade`` is asked for again.

What a machine has beside its memory and the state of its vCPUs goes with it: the clients of the dirty log with what
they have gathered (gathered.py), limits, tracking, the time that it has run, its log.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from ipc.shm import is_named
from ipc.steps import step

from ...client.keeper import KeeperProcess
from ...client.machine import Machine
from ...errors import VmmError
from ...machine import records
from ...machine.log import append_log
from ...machine.names import between_name, machine_dir
from ...machine.rules import Trees
from ...machine.runtime import is_running, is_tied
from ...machine.spec import MachineSpec
from ...version import VERSION
from .fitness import ram_segments, specification
from .guard import Guard
from .report import MigrationError, Options, Report
from .source import migrate, recover
from .target import Continued, receive_here

__all__ = ["Upgraded", "finish", "upgrade"]

_END_PATIENCE = 30.0        # seconds for a machine that was handed over to end
_LOOK_EVERY = 0.005
_UNKNOWN = "an unknown version"


@dataclass(frozen=True)
class Upgraded:
    """``before`` and ``after``: versions of the program. ``seconds``: all of it; ``downtime``: milliseconds for which
    the guest stood still, of both hand-overs."""

    name: str
    before: str
    after: str
    seconds: float
    downtime: float


def upgrade(name: str) -> Upgraded:
    """Give the machine new processes, of this program. Raises VmmError, with the machine running on in its old
    processes, or, where the text says so, in new ones that do not have its name yet; KeyboardInterrupt in the same
    way."""
    began, between = time.monotonic(), between_name(name)
    if not is_running(name) and is_running(between):
        return finish(name)
    with _Keepers(2) as keepers, Guard(name):
        with Machine.attach_pinned(name) as machine:
            if machine.status()["handed_over"]:
                _decide(machine)
            spec = specification(machine)
            _check(spec)
            before = machine.status()["coordinator"].get("program", _UNKNOWN)
            first = _Hop(machine, spec, between, keepers.pop())
        step("upgrade-between")
        second = _finish(name, keepers.pop())
    return Upgraded(name, before, VERSION, round(time.monotonic() - began, 3),
                    round(first.report.downtime + second.downtime, 3))


def finish(name: str) -> Upgraded:
    """What is left of an upgrade whose process has ended after the machine had new ones. Raises VmmError."""
    began = time.monotonic()
    with _Keepers(1) as keepers, Guard(name):
        report = _finish(name, keepers.pop())
    return Upgraded(name, _UNKNOWN, VERSION, round(time.monotonic() - began, 3), round(report.downtime, 3))


def _finish(name: str, keeper: KeeperProcess) -> Report:
    """The second hand-over. Raises VmmError."""
    between = between_name(name)
    try:
        with Machine.attach_pinned(between) as machine:
            if machine.status()["handed_over"]:
                _decide(machine)
            _await_end(name)
            hop = _Hop(machine, specification(machine), name, keeper)
        step("upgrade-named")
        _tidy(name, between)
    except VmmError as exc:
        if is_running(between):
            raise VmmError(f"machine '{name}' runs in new processes, but is still called '{between}' ({exc}): run "
                           f"vmm upgrade {name} again", exc.exit_code) from None
        raise
    return hop.report


def _decide(machine: Machine) -> None:
    """It was handed over by somebody who has not finished that. Raises VmmError unless it goes on here."""
    with contextlib.suppress(MigrationError):
        recover(machine)
        raise VmmError(f"machine '{machine.name}' has just been upgraded by somebody else")
    if machine.status()["handed_over"]:
        raise VmmError(f"machine '{machine.name}' was handed over: see vmm migrate status {machine.name}")


def _check(spec: MachineSpec) -> None:
    """Raises VmmError for what cannot be upgraded."""
    if is_tied(spec.name):
        raise VmmError(f"machine '{spec.name}' cannot be upgraded: it is a fleet's, and must end with a process of "
                       "the fleet's, which its new processes would not")
    if spec.program is not None and spec.program.console != "lines":
        raise VmmError(f"machine '{spec.name}' cannot be upgraded: its program has the console of a vmm run, which its "
                       "new processes would not have")


class _Keepers:
    """Processes that wait for what they are to keep: what takes long is done while the guest runs. ``with`` them."""

    def __init__(self, number: int) -> None:
        # While this process has one thread, they need no new interpreter.
        self._all = [KeeperProcess("", quiet=True, fork=True) for _ in range(number)]
        self._left = list(self._all)

    def pop(self) -> KeeperProcess:
        return self._left.pop(0)

    def __enter__(self) -> _Keepers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 tb: TracebackType | None) -> None:
        for keeper in self._all:
            keeper.give_up()


class _Hop:
    """One hand-over, carried out when this has been made, to a machine that runs by itself; its ``report``. Raises
    VmmError."""

    def __init__(self, source: Machine, spec: MachineSpec, name: str, keeper: KeeperProcess) -> None:
        self._spec = spec
        self._elapsed = float(source.status()["elapsed_s"])
        self._listening, self._over = threading.Event(), threading.Event()
        self._arrived = False
        self._error: BaseException | None = None
        address = f"ipc://{_place(source.name)}"
        thread = threading.Thread(target=self._receive, args=(address, keeper, name), name="receive", daemon=True)
        thread.start()
        self._listening.wait()
        try:
            if self._error is not None:
                raise self._error
            self.report = migrate(source, address, Options(in_place=True, upgrade=name))
        finally:
            self._over.set()
            thread.join()
        if not self._arrived:
            raise VmmError(f"machine '{name}' has not arrived: {self._error}")

    def _receive(self, address: str, keeper: KeeperProcess, name: str) -> None:
        program = self._spec.program
        trees = Trees("", {}) if program is None else Trees(program.root, dict(program.files))
        try:
            receive_here(address, keeper, name, self._spec.accel, trees,
                         Continued(self._make, self._over.is_set),
                         waiting=lambda at: self._listening.set()).detach()
            self._arrived = True
        except BaseException as exc:
            self._error = exc
        finally:
            self._listening.set()

    def _make(self, spec: MachineSpec) -> MachineSpec:
        between = spec.name == between_name(self._spec.name)
        return msgspec.structs.replace(spec, continues=not between, elapsed=self._elapsed)


def _place(name: str) -> Path:
    """Where the machine is handed over: in a directory of its own, as the machine's is locked by its keeper. The path
    is no longer than those of its other sockets."""
    directory = machine_dir(name) / "upgrade"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise VmmError(f"{directory}: cannot be made: {exc.strerror}") from None
    return directory / "a"


def _await_end(name: str) -> None:
    """Of the machine whose guest runs elsewhere by now. One that lingers for its report is let go. Raises VmmError."""
    deadline = time.monotonic() + _END_PATIENCE
    while is_running(name):
        report: dict[str, Any] = {"handed_over": name}
        with contextlib.suppress(VmmError), Machine.attach_pinned(name) as machine:
            report = machine.status()
            if report["state"] == "ended":
                machine.release()
            elif not any(is_named(segment) for segment in ram_segments(machine)):
                machine.stop(records.UPGRADED)
        if not report["handed_over"]:
            raise VmmError(f"a machine named '{name}' is already running")
        if time.monotonic() > deadline:
            raise VmmError(f"the machine that has its name does not end within {_END_PATIENCE:.0f} s")
        time.sleep(_LOOK_EVERY)


def _tidy(name: str, between: str) -> None:
    """Nothing is left of the machine in between; what it had to say is in the log of the one that goes on."""
    _await_end(between)
    with contextlib.suppress(OSError):
        append_log(records.log_path(name), records.log_path(between))
        records.remove_records(between)
