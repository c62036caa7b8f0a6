"""Live migration, the source: pre-copy rounds from the dirty log, stop-and-copy, hand-over.

The machine keeps running while its memory is sent; each round sends what was dirtied during the last. When what is left
can be sent within the downtime limit, or the rounds are used up (vmm/consumers/migration/converge.py), the machine
is frozen, the rest and the vCPU states are sent, and the target is told to continue.

Never two, never none: until the machine here is handed over (``Lease.hand_over``) it alone may run, and any
failure, a kill included, lets it continue: the lease, the dirty limits and the dirty-log client are this process' own.
From the hand-over on it never runs here again by itself. Commit is repeated until the target says that it runs, by
this process or, should it be killed, by one that the coordinator starts. Only a target that says that it does not
have the machine, and never will, gives it back.

Post-copy is for guests that do not converge: Commit comes before the last pages, which follow while the guest runs
at the target (vmm/consumers/migration/postcopy_source.py).
"""

from __future__ import annotations

import contextlib
import secrets
import time
import uuid
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
import zmq
import zstandard

from ipc.linux.processid import identity
from ipc.shm import is_named
from ipc.steps import step

from ...client.holds import Lease
from ...client.machine import Machine
from ...errors import VmmError
from ...machine.records import UPGRADED
from ...machine.runtime import is_running
from ...machine.spec import MachineSpec
from ...optional import lz4_block
from .addresses import parse_address
from .channels import Channels
from .control import Control
from .converge import Next
from .fitness import check_movable, needs, not_in_place, ram_segments, specification
from .gathered import Travelling
from .handover import HandOver, load_hand_over, save_hand_over, uninterrupted
from .keys import load_keys
from .memory import SentMemory
from .pages import PAGE, missing, missing_pages
from .postcopy_source import serve
from .precopy import PreCopy, Todo, joined
from .progress import Progress
from .proof import proof
from .report import MigrationError, Options, Parts, Report
from .sockets import Unreachable, connect_stream
from .status import continued
from .steering import Steering
from .talk import PAUSED_PATIENCE, RUNNING_PATIENCE, Busy, GoneThere, Lost, Talk
from .wire import (
    VERSION,
    Abort,
    Accept,
    Commit,
    Counts,
    Done,
    Ended,
    Missing,
    Offer,
    Prepared,
    Received,
    Refused,
    Running,
    State,
    Unknown,
    WireError,
)

__all__ = ["Source", "migrate", "recover"]

_PATIENCE = 10.0            # seconds for a target to be there, and to take the offer
_RESERVING = 300.0          # seconds that the target may take to make and reserve the memory
_COMMIT_PATIENCE = 60.0     # seconds that Commit is repeated
_COMMIT_EVERY = 2.0
_BUSY_EVERY = 0.25          # seconds between two offers
_IMAGE_MAX = 512 << 20      # bytes of a guest image that an offer may hold
_NOBODY_PATIENCE = 5.0      # seconds without a listener at the target, after which its process is taken for gone
_TRIES = 3                  # rounds in which pages are sent again that were damaged on their way
_UNDECIDED = 60.0           # seconds in which a machine that continues this one must have begun to run, or have gone
_LOOK_EVERY = 0.02


def migrate(machine: Machine, address: str, options: Options | None = None, *, migration_id: str = "",
            early: bool = False, progress: Callable[[Report], None] = lambda report: None) -> Report:
    """Migrate the machine to a waiting ``vmm receive``; it has left this host when this returns. ``progress`` is told
    after every round, and about every tenth of a second; ``early``: and before the target is connected to. Raises
    MigrationError, with the machine still running here; KeyboardInterrupt (and whatever else is raised into it) cancels
    in the same way, until the machine is handed over: nothing cancels it then. VmmError for an invalid address or keys,
    and for a machine that cannot be migrated now."""
    options = options or Options()
    report = Report(migration_id or uuid.uuid4().hex[:8], machine.name, address, upgrade=bool(options.upgrade))
    return _carry_out(machine, options, report, progress, Source.run, early=early)


def recover(machine: Machine, address: str = "", options: Options | None = None, *, migration_id: str = "",
            progress: Callable[[Report], None] = lambda report: None) -> Report:
    """Finish a migration whose source was lost after the hand-over: the machine is paused here since, and the
    target waits. ``address`` and ``options``: as they were, unless others are given. Raises MigrationError,
    VmmError."""
    record = load_hand_over(machine.name)
    report = continued(Report(migration_id or record.id, machine.name, address or record.address,
                              upgrade=bool(record.upgrade)))
    return _carry_out(machine, options or record.options, report, progress, Source.recover)


def _carry_out(machine: Machine, options: Options, report: Report, progress: Callable[[Report], None],
               work: Callable[[Source], None], *, early: bool = False) -> Report:
    if options.compression == "lz4":
        lz4_block()     # it is installed, or that is said now
    process = identity()
    report.pid, report.pid_started = process.pid, process.start
    with Source(machine, report.target, options, report, progress, early=early) as source:
        try:
            work(source)
        except BaseException as exc:
            source.failed(exc)
            if isinstance(exc, zmq.ZMQError):
                raise MigrationError(f"{report.target}: {exc}") from None
            raise
    return report


class Source:
    """One migration, or the end of one. ``with`` it: nothing of it is left afterwards but what the machine
    keeps."""

    def __init__(self, machine: Machine, address: str, options: Options, report: Report,
                 progress: Callable[[Report], None], *, early: bool = False) -> None:
        self.machine = machine
        self._early = early
        self._steering = Steering(options, report)
        self._control: Control | None = None
        self.report = report
        self._address = parse_address(address)
        self._keys = load_keys(options.key, options.peer, self._address, insecure=options.insecure)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        self._talk: Talk | None = None
        self._channels: Channels | None = None
        self._token = secrets.token_hex(16)
        self._certificate = b""                 # the target's, for the connections of pages
        self._progress = Progress(report, progress)
        self._memory = SentMemory(machine)
        self._pre_copy = PreCopy(machine, self._memory, self._steering, self._progress, f"migration to {address}",
                                 self._channels_now, self._obey)
        self._travelling = Travelling(machine, everyone=bool(options.upgrade))
        self._offered: MachineSpec | None = None
        self._rest: Todo = {}                   # what pre-copy has left
        self._there: Todo = {}                  # post-copy: what is missing at the target
        self._lease: Lease
        self._committed = False
        self._postcopy = False
        self._interrupted = False
        self._shield = contextlib.ExitStack()   # against signals

    @property
    def options(self) -> Options:
        """As they are now."""
        return self._steering.options

    # --- the way of a migration ----------------------------------------------------------------------------

    def run(self) -> None:
        """From the offer to the end. Raises MigrationError, VmmError."""
        with self.machine.lease("migration", f"to {self._address.text}") as self._lease:
            self._progress.kept = True
            if self._early:
                self._progress.tell(force=True)
            self._listen()
            if self.options.in_place and (why := not_in_place(self._address, self.options)):
                raise VmmError(why)
            check_movable(self.machine)
            try:
                self._talk = self._connect(_PATIENCE)   # first: with nobody there, the guest need not stand still
                began = time.monotonic()
                spec = specification(self.machine)
                standstill = time.monotonic() - began
                talk = self._offer_until_taken(spec)
                self._travelling.follow()
                for message in self._travelling.announced():
                    talk.send(message)
                if not self.options.in_place:
                    self._rest, self._postcopy = self._pre_copy.run(talk, standstill)
                self._stop_and_copy()
            except BaseException as exc:
                if not self._committed:
                    self._give_up(exc)
                raise
            self._finish()

    def recover(self) -> None:
        """From the hand-over to the end. Raises MigrationError, VmmError."""
        record = load_hand_over(self.machine.name)
        with self.machine.lease("migration", f"to {self._address.text}", recover=True) as self._lease:
            self._progress.kept = True
            self._listen()
            self._shield.enter_context(uninterrupted(self._on_signal))
            self._token, self._certificate = record.token, record.certificate
            self._committed = True
            self.report.status = "handed-over"
            self._progress.tell(force=True)
            if not record.finished:
                if record.upgrade:
                    self._await_decision(record.upgrade)
                else:
                    self._commit()
                self._finish()
                return
        self._completed()

    def _await_decision(self, there: str) -> None:
        """Whether the machine that was to continue this one runs: it takes this one's memory away before its guest
        does (vmm/coordinator/core.py), and goes if nobody is left to start it. If it has not, this one goes on.
        Raises MigrationError then."""
        segments = ram_segments(self.machine)
        deadline = time.monotonic() + _UNDECIDED
        while True:
            gone = not is_running(there)        # first: from then on it takes nothing
            if not all(is_named(segment) for segment in segments):
                return
            if gone:
                self._lease.take_back()
                self._committed = False
                raise MigrationError(f"machine '{self.machine.name}' goes on as it was: whoever upgraded it was killed "
                                     "before its new processes ran it")
            if time.monotonic() > deadline:
                raise self._stranded(f"machine '{there}' has neither begun to run nor gone")
            time.sleep(_LOOK_EVERY)

    def failed(self, exc: BaseException) -> None:
        """It has ended by this exception, as its report says now."""
        report = self.report
        if self._committed:
            report.status = "postcopy-paused" if self._postcopy else "handed-over-paused"
        else:
            report.status = "failed" if isinstance(exc, Exception) else "cancelled"
        report.error = str(exc) or ("cancelled" if isinstance(exc, KeyboardInterrupt) else type(exc).__name__)
        self._progress.tell(force=True)

    def _offer_until_taken(self, spec: MachineSpec) -> Talk:
        """To a target that may be busy for a while. Raises MigrationError, VmmError."""
        until = time.monotonic() + self.options.wait
        while True:
            self._talk = talk = self._talk or self._connect(_PATIENCE)
            try:
                self._offer(talk, spec)
                return talk
            except Busy:
                if time.monotonic() > until:
                    raise
            self._disconnect()
            self._waiting()
            time.sleep(_BUSY_EVERY)

    def _offer(self, talk: Talk, spec: MachineSpec) -> None:
        """Taken: there is memory for it there, and pages can be sent. Raises MigrationError, VmmError."""
        image = Path(spec.image).read_bytes() if spec.image else b""
        if len(image) > _IMAGE_MAX:
            raise VmmError(f"the guest image of machine '{spec.name}' has {len(image) >> 20} MiB, but at "
                           f"most {_IMAGE_MAX >> 20} MiB can be migrated")
        self._offered, wanted = spec, needs(spec, self.options)
        offer = Offer(VERSION, metadata.version("shardvmm"), self._token, spec, image, wanted.postcopy,
                      self.report.id, wanted)
        with contextlib.ExitStack() as stack:
            if self.options.in_place:
                offer = msgspec.structs.replace(
                    offer, segments={s.id: self.machine.ram_segment(s.id) for s in spec.slots},
                    proof=stack.enter_context(proof(self.machine.name, self._token)))
            talk.patience = _PATIENCE
            talk.send(offer)
            talk.expect(Received)
            talk.patience = _RESERVING
            there = talk.expect(Accept)
        self._steering.no_postcopy, self._steering.encodings = there.no_postcopy, there.encodings
        self._certificate = there.certificate
        talk.patience = RUNNING_PATIENCE
        if not self.options.in_place:
            self._open_channels()
        self.report.setup_time = self._progress.elapsed_ms
        self.report.ram.total = sum(s.size for s in spec.slots)
        self.report.status = "active"

    def _connect(self, patience: float) -> Talk:
        return Talk(self._context, self._address, self._keys, time.monotonic() + patience, self._waiting)

    def _waiting(self) -> None:
        """Raises MigrationError."""
        self._progress.tell()
        if not self._committed:
            self._steering.keep_time(self._progress.elapsed_ms / 1000)

    def _open_channels(self) -> Channels:
        if (self._keys is not None) != bool(self._certificate):
            raise MigrationError(f"{self._address.text}: the connections for pages would "
                                 f"{'not ' * (not self._certificate)}be encrypted, other than this one")
        until, options = time.monotonic() + _PATIENCE, self._steering.opening()
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(connect_stream(self._address, until, self._certificate))
                       for _ in range(1 + options.channels)]
            stack.pop_all()
        self._channels = Channels(streams, self._token, options.compression, options.bandwidth, self._progress.count,
                                  sums=not (self._address.local or self._certificate))
        return self._channels

    def _channels_now(self) -> Channels:
        """As they are asked for; between rounds, when nothing is on its way through the last ones."""
        if self._channels is not None and not self._steering.reopen:
            return self._channels
        if self._channels is not None:
            self._channels.close()
        return self._open_channels()

    # --- stop-and-copy, hand-over ----------------------------------------------------------------------------

    def _stop_and_copy(self) -> None:
        """Up to the hand-over, and until the target runs the machine."""
        assert self._talk is not None
        machine, report, talk = self.machine, self.report, self._talk
        report.status = "device"
        self._progress.tell(force=True)
        talk.patience = PAUSED_PATIENCE
        parts = Parts()
        with self._frozen():
            parts.end("pause")
            step("migrate-frozen")
            self._pre_copy.release_limits()
            if not self.options.in_place:
                todo = joined(self._rest, self._pre_copy.dirty())
                for slot in machine.status()["slots"]:
                    if not slot["logged"]:      # it is unknown what changed there: all of it, now
                        todo[slot["id"]] = self._pre_copy.touched(slot)
                parts.end("sync")
                self._send_rest(talk, todo)
                parts.end("pages")
            state = machine.state()
            spec = msgspec.convert(state["spec"], MachineSpec)
            self._check_slots(spec)
            system = zstandard.ZstdCompressor(level=1).compress(machine.system().tobytes()
                                                                if spec.keeps_system else b"")
            step("migrate-state")
            for message in self._travelling.gathered():
                talk.send(message)
            talk.send(State(system, state["vcpus"], spec, state["paused"] or self.options.paused))
            talk.expect(Prepared)
            parts.end("state")
            step("migrate-prepared")
            self._hand_over()
            parts.end("hand_over")
            self._commit()
            parts.end("start")
            report.downtime, report.downtime_parts = parts.total, parts.ms
            self._progress.tell(force=True)     # should this process be killed now, another knows it

    def _send_rest(self, talk: Talk, todo: Todo) -> None:
        """The guest stands still: send what is left, or with post-copy say what it is."""
        tries = 0
        while not self._postcopy:
            rest = self._pre_copy.send(talk, todo, stopped=True)
            if not (todo := joined(rest, self._pre_copy.dirty())):
                return
            self._postcopy = self._steering.now is Next.POSTCOPY
            tries += not rest
            if tries == _TRIES:
                raise talk.error("pages repeatedly arrived damaged at the target")
        for slot in self.machine.status()["slots"]:
            bits = np.zeros(slot["pages"], bool)
            bits[todo.get(slot["id"], [])] = True
            talk.send(missing(slot["id"], bits))

    def _check_slots(self, now: MachineSpec) -> None:
        """The machine has the memory that was offered. Raises MigrationError."""
        assert self._offered is not None
        before = {(s.id, s.gpa, s.size, s.born) for s in self._offered.slots}
        after = {(s.id, s.gpa, s.size, s.born) for s in now.slots}
        if other := sorted({each[0] for each in before ^ after}):
            raise MigrationError(f"memory slot {', '.join(map(str, other))} of machine '{self.machine.name}' was "
                                 "added or removed during the migration: try again")

    def _hand_over(self) -> None:
        """The point of no return."""
        name = self.machine.name
        record = self._record()
        save_hand_over(name, record)
        self._shield.enter_context(uninterrupted(self._on_signal))
        self._obey()
        step("migrate-hand-over")
        self._committed = True      # should no answer come, only the coordinator knows
        try:
            self._lease.hand_over(record.where)
        except VmmError:
            self._committed = bool(self.machine.status()["handed_over"])
            if not self._committed:
                raise
        step("migrate-handed-over")
        self.report.status = "handed-over"
        self._progress.tell(force=True)

    def _commit(self) -> None:
        """Tell the target to continue, on another connection if need be, until it says that it does. Then ``_there``
        has the pages that are missing there. Raises MigrationError, the machine here staying paused unless the
        target has refused it for good."""
        deadline = time.monotonic() + _COMMIT_PATIENCE
        self._there.clear()
        while True:
            try:
                if self._talk is None:
                    self._talk = self._connect(min(_NOBODY_PATIENCE, deadline - time.monotonic()))
                if self._told_to_go_on(self._talk):
                    return
            except (Lost, WireError, zmq.ZMQError):
                self._disconnect()
            except Unreachable as exc:
                raise self._stranded(str(exc)) from None
            if time.monotonic() > deadline:
                raise self._stranded(f"{self._address.text}: did not answer within {_COMMIT_PATIENCE:.0f} s")

    def _told_to_go_on(self, talk: Talk) -> bool:
        """Once. Raises Lost, and MigrationError for good."""
        talk.patience = _COMMIT_PATIENCE
        talk.send(Commit(VERSION, self._token))
        step("migrate-commit")
        again = time.monotonic() + _COMMIT_EVERY
        while (left := again - time.monotonic()) > 0:
            answer = talk.hear(min(left, 0.1))
            self._progress.tell()
            match answer:
                case Running():
                    return True
                case Missing(slot=slot):
                    self._postcopy = True
                    pages = self.machine.ram(slot).size // PAGE
                    self._there[slot] = np.flatnonzero(missing_pages(answer, pages))
                case Refused(error=error):
                    self._lease.take_back()
                    self._committed = False
                    raise talk.error(f"the target refused at the last moment: {error}")
                case Ended(error=error):
                    raise self._stranded(f"{self._address.text}: the machine has ended there: {error}")
                case Unknown():
                    raise self._stranded(f"{self._address.text}: another receiver is waiting there now")
        return False

    def _stranded(self, why: str) -> MigrationError:
        """Handed over, without an answer that it runs."""
        name = self.machine.name
        self._pre_copy.unregister()
        self._travelling.close()
        left = sum(len(pages) for pages in self._there.values())
        there = (f"its last {left:,} pages have not reached the target, which is waiting for them"
                 if self._postcopy else "it may already be running there")
        return MigrationError(
            f"{why}. Machine '{name}' was handed over and stays paused here; {there}. To try again, run vmm migrate "
            f"{name} ADDRESS --recover; if the target is lost for good, vmm resume {name} --force resumes it here from "
            f"the hand-over; if it runs there, end it here with vmm stop {name}")

    def _finish(self) -> None:
        """The machine runs at the target."""
        report = self.report
        while self._postcopy:
            report.status = "postcopy-active"
            self._progress.tell(force=True)
            assert self._talk is not None
            try:
                serve(self._talk, self._channels or self._open_channels(), self._memory, self._there, report,
                      self._in_postcopy)
                break
            except GoneThere as exc:
                raise self._stranded(str(exc)) from None
            except (Lost, WireError):
                self._disconnect()
                self._commit()
        self._deafen()
        step("migrate-stop")
        try:
            if self.options.keep_source:
                self._pre_copy.unregister()
                self._travelling.close()
                save_hand_over(self.machine.name, self._record(finished=True))
            else:
                self.machine.stop(UPGRADED if self.options.upgrade else "")
        except VmmError as exc:
            what = "noted" if self.options.keep_source else "ended"
            report.warnings.append(f"the machine runs at the target, but the machine here could not be {what}: {exc}")
        step("migrate-done")
        self._completed()

    def _in_postcopy(self) -> None:
        """Raises Lost for channels that are not as they are asked for: with others, the target says what is missing."""
        self._progress.tell()
        if self._steering.reopen:
            raise Lost("its settings have changed")

    def _completed(self) -> None:
        report, ram = self.report, self.report.ram
        report.warnings += self._travelling.warnings
        if self._talk is not None:
            self._talk.close(Done(report.downtime, report.downtime_parts, Counts(
                ram.transferred, ram.duplicate, ram.normal, ram.normal_bytes, ram.resent, ram.postcopy_requests,
                ram.postcopy_pages)))
            self._talk = None
        report.status = "completed"
        self._progress.tell(force=True)

    def _record(self, *, finished: bool = False) -> HandOver:
        return HandOver(self.report.id, self._token, self._address.text, self.options, finished, self._certificate,
                        self.options.upgrade)

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """For the time being, and for good once the machine is handed over."""
        self._lease.freeze()
        try:
            yield
        finally:
            if not self._committed:
                self._lease.thaw()

    def _give_up(self, exc: BaseException) -> None:
        """The machine keeps running here; the target cleans up."""
        reason = "cancelled by the user" if isinstance(exc, KeyboardInterrupt) else str(exc) or type(exc).__name__
        if self._talk is not None:
            self._talk.close(Abort(reason))
            self._talk = None
        self._pre_copy.release_limits()
        self._pre_copy.unregister()
        self._travelling.close()

    # --- signals ------------------------------------------------------------------------------------------------

    def _on_signal(self, signum: int) -> None:
        if not self._committed:
            self._interrupted = True
        elif (said := "already handed over: the migration can no longer be cancelled") not in self.report.warnings:
            self.report.warnings.append(said)

    def _obey(self) -> None:
        """A signal that came while none may interrupt, and before the hand-over."""
        if self._interrupted and not self._committed:
            raise KeyboardInterrupt

    # --- whoever has something to say to it -------------------------------------------------------------------

    def _listen(self) -> None:
        """For the holder of the lease."""
        try:
            self._control = Control(self.machine.name, self._steering.change)
        except OSError as exc:
            self.report.warnings.append(f"its settings cannot be changed while it goes on: {exc}")

    def _deafen(self) -> None:
        control, self._control = self._control, None
        if control is not None:
            control.close()

    # --- end ------------------------------------------------------------------------------------------------------

    def _disconnect(self) -> None:
        if self._channels is not None:
            self._channels.close()
            self._channels = None
        if self._talk is not None:
            self._talk.close()
            self._talk = None

    def close(self) -> None:
        """Idempotent."""
        self._deafen()
        self._disconnect()
        self._memory.close()
        self._context.term()
        self._shield.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
