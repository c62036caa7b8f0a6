"""Live migration, the source: pre-copy rounds from the dirty log, stop-and-copy, hand-over.

The machine runs on while its memory is sent; each round sends what was dirtied during the last. When what is left
can be sent within the downtime limit, or the rounds are used up (vmm/consumers/migration/converge.py), the machine
is frozen, the rest and the vCPU states are sent, and the target is told to go on.

Never two, never none: until the machine here is handed over (``Lease.hand_over``) it alone may run, and any
failure, a kill included, lets it go on: the lease, the dirty limits and the dirty-log client are this process' own.
From the hand-over on it never runs here again by itself. Commit is repeated until the target says that it runs, by
this process or, should it be killed, by one that the coordinator starts. Only a target that says that it does not
have the machine, and never will, gives it back.

Post-copy is for guests that do not converge: Commit comes before the last pages, which follow while the guest runs
at the target (vmm/consumers/migration/postcopy_source.py).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq
import zstandard
from numpy.typing import NDArray

from ipc.linux.processid import identity
from ipc.shm import data_extents, open_fd
from ipc.steps import step

from ...client.holds import Lease
from ...client.machine import Machine
from ...errors import VmmError
from ...machine.spec import MachineSpec
from ...optional import lz4_block
from .addresses import parse_address
from .channels import Channels, Job, chunk_pages
from .converge import Convergence, Next, Round, Rules
from .handover import HandOver, load_hand_over, save_hand_over, uninterrupted
from .keys import load_keys
from .pages import PAGE, changed, missing, missing_pages
from .postcopy_source import serve
from .report import MigrationError, Options, Report
from .sockets import Unreachable, connect
from .talk import PAUSED_PATIENCE, RUNNING_PATIENCE, GoneThere, Lost, Talk
from .wire import (
    VERSION,
    Abort,
    Accept,
    Commit,
    Done,
    Ended,
    Missing,
    Offer,
    Pages,
    Prepared,
    Received,
    Refused,
    RoundAck,
    RoundEnd,
    Running,
    State,
    Torn,
    Unknown,
    WireError,
)

__all__ = ["Source", "migrate", "recover"]

_PATIENCE = 10.0            # seconds for a target to be there, and to take the offer
_RESERVING = 300.0          # seconds that the target may take to make and reserve the memory
_COMMIT_PATIENCE = 60.0     # seconds that Commit is repeated
_COMMIT_EVERY = 2.0
_TELL_EVERY = 0.1
_IMAGE_MAX = 512 << 20      # bytes of a guest image that an offer may hold
_RATE_OVER = 0.5            # seconds
_NOBODY_PATIENCE = 5.0      # seconds that nobody listens at the target, after which its process is taken for gone
_TRIES = 3                  # rounds in which pages are sent again that were damaged on their way

_Todo = dict[int, NDArray[np.int64]]    # {slot: pages, ascending}
_NONE = np.zeros(0, np.int64)


def migrate(machine: Machine, address: str, options: Options | None = None, *, migration_id: str = "",
            progress: Callable[[Report], None] = lambda report: None) -> Report:
    """Move the machine to a waiting ``vmm receive``; it is gone here when this returns. ``progress`` is told
    after every round, and about every tenth of a second. Raises MigrationError, with the machine running on
    here; KeyboardInterrupt (and whatever else is raised into it) cancels in the same way, until the machine is
    handed over: nothing cancels it then. VmmError for an address or keys that cannot be, and for a machine that
    cannot be moved now."""
    return _carry_out(machine, address, options or Options(), migration_id or uuid.uuid4().hex[:8], progress,
                      Source.run)


def recover(machine: Machine, address: str = "", options: Options | None = None, *, migration_id: str = "",
            progress: Callable[[Report], None] = lambda report: None) -> Report:
    """Finish a migration whose source was lost after the hand-over: the machine is paused here since, and the
    target waits. ``address`` and ``options``: as they were, unless others are given. Raises MigrationError,
    VmmError."""
    record = load_hand_over(machine.name)
    return _carry_out(machine, address or record.address, options or record.options, migration_id or record.id,
                      progress, Source.recover)


def _carry_out(machine: Machine, address: str, options: Options, migration_id: str,
               progress: Callable[[Report], None], work: Callable[[Source], None]) -> Report:
    if options.compression == "lz4":
        lz4_block()     # it is here, or that is said now
    process = identity()
    report = Report(migration_id, machine.name, address, compression=options.compression, pid=process.pid,
                    pid_started=process.start)
    with Source(machine, address, options, report, progress) as source:
        try:
            work(source)
        except BaseException as exc:
            report.status = source.failed(exc)
            report.error = str(exc) or ("cancelled" if isinstance(exc, KeyboardInterrupt) else type(exc).__name__)
            progress(report)
            if isinstance(exc, zmq.ZMQError):
                raise MigrationError(f"{address}: {exc}") from None
            raise
    return report


class Source:
    """One migration, or the end of one. ``with`` it: nothing of it is left afterwards but what the machine
    keeps."""

    def __init__(self, machine: Machine, address: str, options: Options, report: Report,
                 progress: Callable[[Report], None]) -> None:
        self.machine = machine
        self.options = options
        self.report = report
        self._address = parse_address(address)
        self._keys = load_keys(options.key, options.peer, self._address, insecure=options.insecure)
        self._progress = progress
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        self._talk: Talk | None = None
        self._channels: Channels | None = None
        self._token = secrets.token_hex(16)
        self._client = f"migrate_{uuid.uuid4().hex[:8]}"
        self._convergence = Convergence(Rules(options.downtime, options.max_rounds, options.converge,
                                              options.postcopy, options.postcopy_after))
        self._offered: MachineSpec | None = None
        self._rest: _Todo = {}                  # after pre-copy
        self._there: _Todo = {}                 # post-copy: what is missing at the target
        self._number = 0                        # of the round
        self._torn: list[Torn] = []
        self._lease: Lease
        self._limits = machine.limits(f"migration to {address}")
        self._committed = False
        self._postcopy = False
        self._interrupted = False
        self._shield = contextlib.ExitStack()   # against signals
        self._lock = threading.Lock()           # for what the channels count
        self._messages = 0
        self._began = time.monotonic()
        self._told = 0.0
        self._measured = (self._began, 0)       # when, bytes transferred by then

    # --- the way of a migration ----------------------------------------------------------------------------

    def run(self) -> None:
        """From the offer to the end. Raises MigrationError, VmmError."""
        with self.machine.lease("migration", f"to {self._address.text}") as self._lease:
            spec = self._read_spec()
            try:
                self._talk = self._connect(_PATIENCE)
                self._offer(self._talk, spec)
                self.machine.register(self._client, mine=True)
                self._pre_copy()
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
            self._shield.enter_context(uninterrupted(self._on_signal))
            self._token = record.token
            self._committed = True
            self.report.status = "handed-over"
            self._tell(force=True)
            self._commit()
            self._finish()

    def failed(self, exc: BaseException) -> str:
        """The status that an end by this exception is."""
        if self._committed:
            return "postcopy-paused" if self._postcopy else "handed-over-paused"
        return "failed" if isinstance(exc, Exception) else "cancelled"

    def _read_spec(self) -> MachineSpec:
        """Of the machine, with its slots as they are. Raises VmmError when it is not one that runs."""
        machine = self.machine
        machine.require_memory()
        if (state := machine.status()["state"]) not in ("running", "paused"):
            raise VmmError(f"machine '{machine.name}' cannot be migrated: it is {state}")
        with machine.paused("migration"):   # for its specification; the state that comes with it is not used
            return msgspec.convert(machine.state()["spec"], MachineSpec)

    def _offer(self, talk: Talk, spec: MachineSpec) -> None:
        image = Path(spec.image).read_bytes()
        if len(image) > _IMAGE_MAX:
            raise VmmError(f"the guest image of machine '{spec.name}' has {len(image) >> 20} MiB; one of "
                           f"{_IMAGE_MAX >> 20} MiB at most can be moved")
        self._offered = spec
        talk.patience = _PATIENCE
        talk.send(Offer(VERSION, metadata.version("shardvmm"), self._token, spec, image, self.options.postcopy))
        talk.expect(Received)
        talk.patience = _RESERVING
        talk.expect(Accept)
        talk.patience = RUNNING_PATIENCE
        self._open_channels()
        self.report.setup_time = self._elapsed_ms()
        self.report.ram.total = sum(s.size for s in spec.slots)
        self.report.status = "active"

    def _connect(self, patience: float) -> Talk:
        return Talk(self._context, self._address, self._keys, time.monotonic() + patience, self._tell)

    def _open_channels(self) -> None:
        until = time.monotonic() + _PATIENCE
        connections = [connect(self._context, self._address, self._keys, until=until, queue=8)
                       for _ in range(self.options.channels)]
        self._channels = Channels(connections, self._token, self.options.compression, self.options.bandwidth,
                                  self._count)

    # --- pre-copy -----------------------------------------------------------------------------------------

    def _pre_copy(self) -> None:
        """Rounds, until the guest is to be stopped. ``_rest``: the pages that are dirty then."""
        machine, report = self.machine, self.report
        machine.sync(self._client)              # from here on counts
        todo = {s["id"]: self._touched(s) for s in machine.status()["slots"] if s["logged"]}   # round 0
        while True:
            before, began, normal = machine.status(), time.monotonic(), report.ram.normal
            self._send_round(todo)
            took = max(time.monotonic() - began, 1e-6)
            status = machine.status()
            dirtied = [(new["dirty_pages"] - old["dirty_pages"]) / took
                       for old, new in zip(before["vcpus"], status["vcpus"], strict=True)]
            todo = self._dirty()
            left = sum(len(p) for p in todo.values())
            what = self._convergence.after(Round(report.ram.normal - normal, took, left, dirtied),
                                           can_limit=status["can_limit"])
            report.ram.dirty_pages_rate = round(sum(dirtied))
            report.ram.remaining = left * PAGE
            expected = self._convergence.expected_downtime(left)
            report.expected_downtime = None if expected is None else expected * 1000
            self._tell(force=True)
            if what is not Next.ROUND:
                self._postcopy = what is Next.POSTCOPY
                self._rest = todo
                return
            self._limit()

    def _touched(self, slot: dict[str, Any]) -> NDArray[np.int64]:
        """The slot's pages but for those that nobody has ever touched: they are zero, at the target too."""
        fd = open_fd(self.machine.ram_segment(slot["id"]))
        try:
            extents = [np.arange(start // PAGE, end // PAGE) for start, end in data_extents(fd, slot["size"])]
        finally:
            os.close(fd)
        pages = np.concatenate([np.zeros(0, np.int64), *extents])
        self.report.ram.duplicate += slot["pages"] - len(pages)
        return pages

    def _dirty(self) -> _Todo:
        """The pages dirtied since the last call, by slot, and those that did not arrive as they were sent."""
        machine = self.machine
        counts = machine.collect(self._client)
        bits = {slot: machine.bitmap(slot, self._client).bools() for slot in counts}
        for message in self._torn:
            if message.slot not in bits:
                continue
            again = changed(message, machine.ram(message.slot), bits[message.slot])
            bits[message.slot][again] = True
            self.report.ram.resent += len(again)
        self._torn.clear()
        return {slot: pages for slot, b in bits.items() if len(pages := np.flatnonzero(b))}

    def _send_round(self, todo: _Todo) -> None:
        """Send these pages, and wait until they are there."""
        assert self._talk is not None
        assert self._channels is not None
        talk, channels, report = self._talk, self._channels, self.report
        began, sent_before = time.monotonic(), report.ram.transferred
        number, self._number, self._messages = self._number, self._number + 1, 0
        left = pages = sum(len(p) for p in todo.values())
        chunk = chunk_pages(self.options.bandwidth)
        talk.begin()
        for slot, numbers in todo.items():
            memory = self.machine.ram(slot)
            for at in range(0, len(numbers), chunk):
                job = Job(number, slot, memory, numbers[at:at + chunk])
                while not channels.put(job, 0.1):
                    self._check(talk, channels)
                left -= len(job.pages)
                report.ram.remaining = left * PAGE
                self._check(talk, channels)
        while not channels.idle:
            self._check(talk, channels)
            time.sleep(0.001)
        self._check(talk, channels)
        talk.send(RoundEnd(number, self._messages))
        self._torn += talk.expect(RoundAck).torn
        took = max(time.monotonic() - began, 1e-6)
        report.ram.dirty_sync_count += 1
        report.ram.pages_per_second = round(pages / took)
        report.rounds.append({"pages": pages, "seconds": round(took, 4),
                              "transferred": report.ram.transferred - sent_before})

    def _check(self, talk: Talk, channels: Channels) -> None:
        """A channel's failure, or the target's refusal, ends the round."""
        self._obey()
        talk.check()
        if channels.failure:
            raise talk.error(channels.failure, Lost)

    def _limit(self) -> None:
        for vcpu, quota in self._convergence.quotas.items():
            if self.report.throttled.get(str(vcpu)) != (shown := quota * PAGE / 1e6):
                self._limits.set(quota, vcpu)
                self.report.throttled[str(vcpu)] = shown

    def _release_limits(self) -> None:
        with contextlib.suppress(VmmError):
            self._limits.close()

    # --- stop-and-copy, hand-over ----------------------------------------------------------------------------

    def _stop_and_copy(self) -> None:
        """Up to the hand-over, and until the target runs the machine."""
        assert self._talk is not None
        machine, report, talk = self.machine, self.report, self._talk
        report.status = "device"
        self._tell(force=True)
        talk.patience = PAUSED_PATIENCE
        with self._frozen():
            stopped = time.monotonic()
            step("migrate-frozen")
            self._release_limits()
            todo = _joined(self._rest, self._dirty())
            for slot in machine.status()["slots"]:
                if not slot["logged"]:      # nobody knows what changed there: all of it, now
                    todo[slot["id"]] = self._touched(slot)
            self._send_rest(talk, todo)
            state = machine.state()
            spec = msgspec.convert(state["spec"], MachineSpec)
            self._check_slots(spec)
            system = zstandard.ZstdCompressor(level=1).compress(machine.system().tobytes())
            step("migrate-state")
            talk.send(State(system, state["vcpus"], spec, state["paused"]))
            talk.expect(Prepared)
            step("migrate-prepared")
            self._hand_over()
            self._commit()
            report.downtime = (time.monotonic() - stopped) * 1000

    def _send_rest(self, talk: Talk, todo: _Todo) -> None:
        """The guest stands still: send what is left, or with post-copy say what it is."""
        if self._postcopy:
            for slot in self.machine.status()["slots"]:
                bits = np.zeros(slot["pages"], bool)
                bits[todo.get(slot["id"], [])] = True
                talk.send(missing(slot["id"], bits))
            return
        for _ in range(_TRIES):
            self._send_round(todo)
            if not (todo := self._dirty()):
                return
        raise talk.error("pages arrive damaged there, again and again")

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
        record = HandOver(self.report.id, self._token, self._address.text, self.options)
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
        self._tell(force=True)

    def _commit(self) -> None:
        """Tell the target to go on, on another connection if need be, until it says that it does. Then ``_there``
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
            self._tell()
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
                    raise talk.error(f"refused at the last moment: {error}")
                case Ended(error=error):
                    raise self._stranded(f"{self._address.text}: the machine is gone there: {error}")
                case Unknown():
                    raise self._stranded(f"{self._address.text}: another receiver waits there now")
        return False

    def _stranded(self, why: str) -> MigrationError:
        """Handed over, and nobody says that it runs."""
        name = self.machine.name
        self._unregister()
        left = sum(len(pages) for pages in self._there.values())
        there = (f"its last {left:,} pages are not at the target, which waits for them"
                 if self._postcopy else "it may run there already")
        return MigrationError(
            f"{why}. Machine '{name}' was handed over, and stays paused here; {there}. vmm migrate {name} ADDRESS "
            f"--recover tries again; if the target is lost for good, vmm resume {name} --force goes on here from "
            f"the hand-over; if it runs there, vmm stop {name}")

    def _finish(self) -> None:
        """The machine runs at the target."""
        report = self.report
        while self._postcopy:
            report.status = "postcopy-active"
            self._tell(force=True)
            assert self._talk is not None
            if self._channels is None:
                self._open_channels()
            assert self._channels is not None
            try:
                serve(self._talk, self._channels, self.machine, self._there, report, self.options.compression,
                      self._count, self._tell)
                break
            except GoneThere as exc:
                raise self._stranded(str(exc)) from None
            except (Lost, WireError):
                self._disconnect()
                self._commit()
        step("migrate-stop")
        try:
            self.machine.stop()
        except VmmError as exc:
            report.warnings.append(f"the machine runs at the target, and is not ended here: {exc}")
        step("migrate-done")
        if self._talk is not None:
            self._talk.close(Done())
            self._talk = None
        report.status = "completed"
        self._tell(force=True)

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
        """The machine runs on here; the target cleans up."""
        reason = "cancelled by its user" if isinstance(exc, KeyboardInterrupt) else str(exc) or type(exc).__name__
        if self._talk is not None:
            self._talk.close(Abort(reason))
            self._talk = None
        self._release_limits()
        self._unregister()

    def _unregister(self) -> None:
        with contextlib.suppress(VmmError):
            self.machine.unregister(self._client)

    # --- signals ------------------------------------------------------------------------------------------------

    def _on_signal(self, signum: int) -> None:
        if not self._committed:
            self._interrupted = True
        elif (said := "handed over already: it cannot be cancelled any more") not in self.report.warnings:
            self.report.warnings.append(said)

    def _obey(self) -> None:
        """A signal that came while none may interrupt, and before the hand-over."""
        if self._interrupted and not self._committed:
            raise KeyboardInterrupt

    # --- report -------------------------------------------------------------------------------------------------

    def _count(self, message: Pages, size: int) -> None:
        """In a channel's thread, too."""
        pages = len(message.numbers) // 4
        with self._lock:
            ram = self.report.ram
            self._messages += 1
            ram.transferred += size
            if message.encoding == "zero":
                ram.duplicate += pages
            else:
                ram.normal += pages
                ram.normal_bytes += pages * PAGE

    def _elapsed_ms(self) -> float:
        return (time.monotonic() - self._began) * 1000

    def _tell(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._told < _TELL_EVERY:
            return
        self._told = now
        report = self.report
        report.total_time = self._elapsed_ms()
        since, sent = self._measured
        if now - since >= _RATE_OVER:
            report.ram.mbps = (report.ram.transferred - sent) * 8 / 1e6 / (now - since)
            self._measured = (now, report.ram.transferred)
        if report.ram.transferred:
            report.compression_ratio = report.ram.normal_bytes / report.ram.transferred
        self._progress(report)

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
        self._disconnect()
        self._context.term()
        self._shield.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _joined(one: _Todo, other: _Todo) -> _Todo:
    return {slot: np.union1d(one.get(slot, _NONE), other.get(slot, _NONE)) for slot in {*one, *other}}
