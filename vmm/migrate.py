"""Live migration, the source: pre-copy rounds from the dirty log, stop-and-copy, hand-over.

The machine runs on while its memory is sent; each round sends what was dirtied during the last. When what is
left can be sent within the downtime limit, or the rounds are used up, the guest is stopped, the rest and the
vCPU states are sent, and the target is told to go on. Guests that dirty faster than they can be sent are held
back by the dirty limit, those vCPUs alone that dirty most.

Never two, never none: until Commit is sent the source alone may run the machine, and any failure, a kill
included, lets it go on here (the pause and the dirty-log client belong to this process). After Commit it never
runs here again; Commit is repeated until the target says that it runs.

Post-copy is for guests that do not converge: Commit comes before the last pages. They follow while the guest runs
at the target, those first that it asks for (vmm/postcopy.py). The machine stays paused here, with its memory,
until the target has every page; a source that is lost meanwhile is replaced with ``recover``.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq
import zstandard
from numpy.typing import NDArray
from zmq.utils.monitor import recv_monitor_message

from ipc.shm import data_extents, open_fd

from .errors import VmmError
from .holds import Lease
from .machine import Machine
from .runtime import machine_dir
from .spec import MachineSpec
from .wire import (
    CHUNK_PAGES,
    PAGE,
    POSTCOPY,
    VERSION,
    Abort,
    Accept,
    Answer,
    Buffer,
    Commit,
    Complete,
    Encoding,
    Missing,
    Offer,
    Packer,
    Ping,
    Prepared,
    Received,
    Recover,
    Refused,
    RoundAck,
    RoundEnd,
    Running,
    State,
    Want,
    WireError,
    check_address,
    decode_answer,
    encode,
    missing,
    missing_pages,
    page_numbers,
    secure,
)

__all__ = ["MigrationError", "Options", "Report", "migrate", "recover"]

_PATIENCE = 10.0            # seconds without an answer after which the target is given up
_RESERVING = 300.0          # seconds that the target may take to make and reserve the memory
_PING_EVERY = 2.0
_HANDOVER_PATIENCE = 30.0   # seconds that Commit is repeated
_THROTTLE_AFTER = 3         # rounds without convergence before vCPUs are held back
_THROTTLE_STEP = 0.5        # of the quota, each further round
_THROTTLE_SHARE = 0.5       # of the bandwidth that all of them may dirty, at first
_QUEUE = 8                  # chunks that wait for a channel
_POSTCOPY_PAGES = 64        # a chunk after the hand-over: what is asked for must not wait long behind one
_POSTCOPY_WINDOW = 1 << 16  # pages looked at for the next chunk
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


class MigrationError(VmmError):
    """The migration failed; the machine runs on at the source, unless the text says otherwise."""


@dataclass(frozen=True)
class Options:
    """``bandwidth`` in bytes a second (0: no cap), ``downtime`` in seconds."""

    compression: Encoding = "none"
    channels: int = 2
    bandwidth: float = 0.0
    downtime: float = 0.3       # QEMU's default
    max_rounds: int = 30
    converge: bool = True       # hold vCPUs back that dirty faster than can be sent
    postcopy: bool = False      # let the guest go on at the target before all of its memory is there
    postcopy_after: int = 1     # rounds of pre-copy before that
    key: str = ""               # CURVE: own secret key file
    peer: str = ""              # and the target's public one
    insecure: bool = False


@dataclass
class Ram:
    """As QEMU's ``info migrate`` has it; bytes, but for the counts."""

    transferred: int = 0
    remaining: int = 0
    total: int = 0
    duplicate: int = 0          # zero pages
    normal: int = 0             # pages sent with their bytes
    normal_bytes: int = 0       # of those, before compression
    dirty_sync_count: int = 0   # rounds
    dirty_pages_rate: int = 0   # pages a second, in the last round
    mbps: float = 0.0
    pages_per_second: int = 0
    page_size: int = PAGE
    postcopy_requests: int = 0  # pages that the guest waited for at the target
    postcopy_pages: int = 0     # pages sent after the hand-over, those among them


@dataclass
class Report:
    """Times in milliseconds. ``status``: setup, active, device, postcopy-active, postcopy-paused, completed,
    failed, cancelled."""

    id: str
    machine: str
    target: str
    status: str = "setup"
    total_time: float = 0.0
    setup_time: float = 0.0
    downtime: float = 0.0
    expected_downtime: float = 0.0
    compression: str = "none"
    compression_ratio: float = 1.0
    ram: Ram = field(default_factory=Ram)
    rounds: list[dict[str, float]] = field(default_factory=list)
    throttled: dict[str, float] = field(default_factory=dict)   # {vCPU: quota in MB/s at the end}
    postcopy_blocktime: list[float] = field(default_factory=list)   # each vCPU's wait for pages
    error: str = ""
    pid: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def migrate(machine: Machine, address: str, options: Options | None = None, *, migration_id: str = "",
            progress: Callable[[Report], None] = lambda report: None) -> Report:
    """Move the machine to a waiting ``vmm receive``; it is gone here when this returns. ``progress`` is told
    after every round, and about every tenth of a second. Raises MigrationError, with the machine running on
    here; KeyboardInterrupt (and whatever else is raised into it) cancels in the same way."""
    options = options or Options()
    check_address(address, keys=bool(options.key and options.peer), insecure=options.insecure)
    report = Report(migration_id or uuid.uuid4().hex[:8], machine.name, address, compression=options.compression,
                    pid=os.getpid())
    return _carry_out(machine, address, options, report, progress, _Source.run)


def recover(machine: Machine, address: str, options: Options | None = None, *, migration_id: str = "",
            progress: Callable[[Report], None] = lambda report: None) -> Report:
    """Go on with a post-copy whose source has gone: the machine is paused here since its hand-over, the target
    waits. Raises MigrationError."""
    options = options or Options()
    check_address(address, keys=bool(options.key and options.peer), insecure=options.insecure)
    report = Report(migration_id or uuid.uuid4().hex[:8], machine.name, address, compression=options.compression,
                    pid=os.getpid())
    return _carry_out(machine, address, options, report, progress, _Source.recover)


def _carry_out(machine: Machine, address: str, options: Options, report: Report,
               progress: Callable[[Report], None], work: Callable[[_Source], None]) -> Report:
    source = _Source(machine, address, options, report, progress)
    try:
        work(source)
    except BaseException as exc:
        if report.status == "postcopy-active":
            report.status = "postcopy-paused"
        else:
            report.status = "failed" if isinstance(exc, Exception) else "cancelled"
        report.error = str(exc) or type(exc).__name__
        progress(report)
        if isinstance(exc, zmq.ZMQError):
            raise MigrationError(f"{address}: {exc}") from None
        raise
    finally:
        source.close()
    return report


def _handover_mark(machine: Machine) -> Path:
    """Says that the machine was handed over in a post-copy; holds ``_entries`` at that moment."""
    return machine_dir(machine.name) / "handed-over"


def _entries(status: dict[str, Any]) -> str:
    """Grows whenever a vCPU enters the guest."""
    return " ".join(str(v["guest_entries"]) for v in status["vcpus"])


class _Limiter:
    """A bandwidth cap shared by the channels."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free = time.monotonic()

    def take(self, size: int) -> None:
        if not self._rate:
            return
        with self._lock:
            now = time.monotonic()
            self._free = max(now, self._free) + size / self._rate
            wait = self._free - now
        time.sleep(max(0.0, wait))


def _send_pages(sock: zmq.Socket[bytes], frame: bytes, data: Buffer) -> None:
    """Without a copy: ZeroMQ holds on to ``data`` until it is sent."""
    sock.send_multipart([frame, data] if len(data) else [frame], copy=False)


class _Channel(threading.Thread):
    """One connection that packs and sends what the rounds put into the queue."""

    def __init__(self, source: _Source) -> None:
        super().__init__(name="channel", daemon=True)
        self._source = source
        self._sock = source.connect()
        self._packer = Packer(source.options.compression)
        self.start()

    def run(self) -> None:
        source = self._source
        with self._sock:
            while (job := source.jobs.get()) is not None:
                try:
                    if source.failure is None:
                        self._send(*job)
                except Exception as exc:
                    source.failure = exc
                finally:
                    source.jobs.task_done()
            source.jobs.task_done()

    def _send(self, round_: int, slot: int, memory: NDArray[np.uint8], pages: NDArray[np.int64]) -> None:
        source = self._source
        for message, data in self._packer.pack(round_, slot, memory, pages):
            frame = encode(message)
            source.limiter.take(len(frame) + len(data))
            deadline = time.monotonic() + _PATIENCE
            while not self._sock.poll(100, zmq.POLLOUT):
                if source.failure is not None:
                    return
                if time.monotonic() > deadline:
                    raise MigrationError(f"{source.address}: takes no more data")
            _send_pages(self._sock, frame, data)
            source.count(message.encoding == "zero", len(message.numbers) // 4, len(frame) + len(data))


class _Source:
    def __init__(self, machine: Machine, address: str, options: Options, report: Report,
                 progress: Callable[[Report], None]) -> None:
        self.machine = machine
        self.address = address
        self.options = options
        self.report = report
        self._progress = progress
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        self._control = self.connect()
        #: Says at once that the target has gone, or does not want our keys.
        self._monitor = self._control.get_monitor_socket(_LOST)
        self.jobs: queue.Queue[tuple[int, int, NDArray[np.uint8], NDArray[np.int64]] | None] = queue.Queue(_QUEUE)
        self.failure: Exception | None = None
        self.limiter = _Limiter(options.bandwidth)
        self._channels = [_Channel(self) for _ in range(options.channels)]
        self._client = f"migrate_{uuid.uuid4().hex[:8]}"
        self._lock = threading.Lock()
        self._messages = 0
        self._began = time.monotonic()
        self._last_ping = 0.0
        self._limits = machine.limits("migration")
        self._lease: Lease
        self._quotas: dict[int, int] = {}
        self._committed = False
        self._told = 0.0
        self._postcopy = False

    def connect(self) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.DEALER)
        sock.linger = 0
        sock.sndhwm = _QUEUE
        sock.sndtimeo = int(_PATIENCE * 1000)
        if self.options.key:
            secure(sock, self.options.key, self.options.peer, server=False)
        sock.connect(self.address)
        return sock

    # --- the way of a migration ----------------------------------------------------------------------------

    def run(self) -> None:
        with self.machine.lease("migration", f"to {self.address}") as self._lease:
            self._run()

    def _run(self) -> None:
        self._offer()
        self.machine.register(self._client, mine=True)
        try:
            self._pre_copy()
            rest = self._stop_and_copy()
        except BaseException as exc:
            if not self._committed:
                self._give_up(str(exc) or type(exc).__name__)
            raise
        self._finish(rest)

    def recover(self) -> None:
        """Another source has handed the machine over and is gone."""
        with self.machine.lease("migration", f"to {self.address}", recover=True) as self._lease:
            self._recover()

    def _recover(self) -> None:
        machine = self.machine
        state = machine.status()
        mark = _handover_mark(machine)
        if state["state"] != "paused" or not mark.exists() or mark.read_text() != _entries(state):
            raise MigrationError(f"machine '{machine.name}' was not handed over in a post-copy, or has run since")
        self._committed = True
        self.report.status = "postcopy-active"
        self._send(Recover(VERSION, machine.name))
        rest = {}
        pages = {s["id"]: s["pages"] for s in state["slots"]}
        deadline = time.monotonic() + _PATIENCE
        while not isinstance(answer := self._receive(0.5), Running):
            if isinstance(answer, Missing):
                rest[answer.slot] = np.flatnonzero(missing_pages(answer, pages[answer.slot]))
            elif isinstance(answer, Refused):
                raise MigrationError(f"{self.address}: {answer.error}")
            elif time.monotonic() > deadline:
                raise MigrationError(f"{self.address}: nobody there waits for this machine")
        self._finish(rest)

    def _finish(self, rest: dict[int, NDArray[np.int64]]) -> None:
        if self._postcopy or rest:
            self.report.status = "postcopy-active"
            self._serve(rest)
        self.machine.stop()
        self.report.status = "completed"
        self.report.total_time = self._elapsed_ms()
        self._tell(force=True)

    def _offer(self) -> None:
        machine = self.machine
        if machine.status()["state"] != "running":
            raise MigrationError(f"machine '{machine.name}' does not run: resume it first")
        with machine.paused("migration"):   # for its specification; the state that comes with it is not used
            state = machine.state()
        spec = msgspec.convert(state["spec"], MachineSpec)
        self._send(Offer(VERSION, metadata.version("shardvmm"), spec, Path(spec.image).read_bytes()))
        self._expect(Received, _PATIENCE)
        self._expect(Accept, _RESERVING)
        self.report.setup_time = self._elapsed_ms()
        self.report.ram.total = sum(s.size for s in spec.slots)
        self.report.status = "active"

    def _pre_copy(self) -> None:
        self.machine.sync(self._client)         # from here on counts
        todo = {s["id"]: self._touched(s) for s in self.machine.status()["slots"] if s["logged"]}   # round 0
        before = None
        for number in range(self.options.max_rounds):
            rate = self._send_round(number, todo)
            todo = self._dirty()
            left = sum(len(p) for p in todo.values()) * PAGE
            self.report.ram.remaining = left
            self.report.expected_downtime = left / rate * 1000 if rate else 0.0
            self._tell(force=True)
            if left <= rate * self.options.downtime:
                break
            if self.options.postcopy and number + 1 >= self.options.postcopy_after:
                self._postcopy = True
                break
            if self.options.converge and number + 1 >= _THROTTLE_AFTER and before and left > before * 0.7:
                self._hold_back(rate)
            before = left
        self._rest = todo

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

    def _dirty(self) -> dict[int, NDArray[np.int64]]:
        """The pages dirtied since the last call, by slot."""
        machine = self.machine
        counts = machine.sync(self._client)
        return {slot: np.flatnonzero(machine.bitmap(slot, self._client).bools())
                for slot, ranges in counts.slots.items() if ranges}

    def _send_round(self, number: int, todo: dict[int, NDArray[np.int64]]) -> float:
        """Send these pages; the bytes of guest memory a second that were dealt with."""
        began, before = time.monotonic(), self.machine.status()
        sent_before = self.report.ram.transferred
        self._messages = 0
        pages = sum(len(p) for p in todo.values())
        left = pages
        for slot, numbers in todo.items():
            memory = self.machine.ram(slot)
            for at in range(0, len(numbers), CHUNK_PAGES):
                chunk = numbers[at:at + CHUNK_PAGES]
                self._put((number, slot, memory, chunk))
                left -= len(chunk)
                self.report.ram.remaining = left * PAGE
                self._tell()
        while self.jobs.unfinished_tasks:
            self._check()
            time.sleep(0.001)
        self._check()
        self._send(RoundEnd(number, self._messages))
        self._expect(RoundAck, None)
        took = max(time.monotonic() - began, 1e-6)
        after = self.machine.status()
        ram = self.report.ram
        ram.dirty_sync_count += 1
        dirtied = [new["dirty_pages"] - old["dirty_pages"]
                   for old, new in zip(before["vcpus"], after["vcpus"], strict=True)]
        self._rates = [d / took for d in dirtied]
        ram.dirty_pages_rate = round(sum(self._rates))
        ram.mbps = (ram.transferred - sent_before) * 8 / 1e6 / took
        ram.pages_per_second = round(pages / took)
        self.report.rounds.append({"pages": pages, "seconds": round(took, 4),
                                   "transferred": ram.transferred - sent_before})
        return pages * PAGE / took

    def _hold_back(self, rate: float) -> None:
        """Dirty-limit the vCPUs that dirty most, until all together stay below what can be sent; the others are
        left alone. Again and again, to half each time."""
        status = self.machine.status()
        if not status["can_limit"]:
            return      # without rings there is nothing to hold one vCPU back by
        budget = rate * _THROTTLE_SHARE / PAGE
        if self._quotas:
            for vcpu, quota in self._quotas.items():
                self._limit(vcpu, max(1, int(quota * _THROTTLE_STEP)))
            return
        share = budget / len(self._rates)
        hot = [i for i, r in enumerate(self._rates) if r > share]
        calm = sum(r for r in self._rates if r <= share)
        for vcpu in hot:
            self._limit(vcpu, max(1, int((budget - calm) / len(hot))))

    def _limit(self, vcpu: int, quota: int) -> None:
        self._quotas[vcpu] = quota
        self._limits.set(quota, vcpu)
        self.report.throttled[str(vcpu)] = quota * PAGE / 1e6

    def _stop_and_copy(self) -> dict[int, NDArray[np.int64]]:
        """Up to the hand-over; with post-copy, the pages that are still to be sent."""
        machine, report = self.machine, self.report
        report.status = "device"
        with self._frozen():
            stopped = time.monotonic()
            self._release_limits()
            todo = self._rest
            for slot, pages in self._dirty().items():
                todo[slot] = np.union1d(todo[slot], pages) if slot in todo else pages
            status = machine.status()
            for slot in status["slots"]:
                if not slot["logged"]:      # nobody knows what changed there: all of it, now
                    todo[slot["id"]] = self._touched(slot)
            if self._postcopy:
                for slot in status["slots"]:
                    bits = np.zeros(slot["pages"], bool)
                    bits[todo.get(slot["id"], [])] = True
                    self._send(missing(slot["id"], bits))
                _handover_mark(machine).write_text(_entries(status))
            else:
                self._send_round(self.options.max_rounds, todo)
                todo = {}
            state = machine.state()
            system = zstandard.ZstdCompressor(level=1).compress(machine.system().tobytes())
            self._send(State(system, state["vcpus"]))
            self._expect(Prepared, _PATIENCE * 3)
            self._hand_over()
            report.downtime = (time.monotonic() - stopped) * 1000
        return todo

    def _hand_over(self) -> None:
        """The point of no return."""
        machine = self.machine
        machine.unregister(self._client)
        self._lease.hand_over(self.address)     # for good: this process may die now
        self._committed = True
        deadline = time.monotonic() + _HANDOVER_PATIENCE
        while time.monotonic() < deadline:
            self._send(Commit())
            answer = self._receive(1.0)
            if isinstance(answer, Running):
                return
            if isinstance(answer, Refused):
                self._lease.take_back()
                self._committed = False
                raise MigrationError(f"{self.address}: refused at the last moment: {answer.error}")
        raise MigrationError(
            f"{self.address}: was told to go on and did not answer: the machine may run there. It stays paused "
            f"here (vmm status {machine.name}): resume it only if it does not, stop it if it does")

    # --- post-copy --------------------------------------------------------------------------------------------

    def _serve(self, rest: dict[int, NDArray[np.int64]]) -> None:
        """Send what is missing at the target, what it asks for first, until it says that it has everything."""
        todo = {slot: np.zeros(int(pages[-1]) + 1, bool) for slot, pages in rest.items() if len(pages)}
        for slot, bits in todo.items():
            bits[rest[slot]] = True
        left = sum(len(pages) for pages in rest.values())
        cursor = dict.fromkeys(todo, 0)
        packer = Packer(self.options.compression)
        ram = self.report.ram
        try:
            while True:
                ram.remaining = left * PAGE
                self._tell()
                job = self._next_pages(todo, cursor) if left else None
                if job is not None:
                    try:
                        self.jobs.put_nowait((POSTCOPY, job[0], self.machine.ram(job[0]), job[1]))
                        todo[job[0]][job[1]] = False
                        ram.postcopy_pages += len(job[1])
                        left -= len(job[1])
                        wait = 0.0
                    except queue.Full:
                        wait = 0.001
                else:
                    wait = 0.1
                while (answer := self._receive(wait)) is not None:
                    wait = 0.0
                    if isinstance(answer, Complete):
                        self.report.postcopy_blocktime = answer.blocked
                        return
                    if isinstance(answer, Want):
                        left -= self._send_wanted(answer, todo, cursor, packer)
                    elif isinstance(answer, Refused):
                        raise MigrationError(f"{self.address}: {answer.error}")
                if self.failure is not None:
                    raise MigrationError(str(self.failure))
                self._ping()
                self._check_connection()
        except (MigrationError, zmq.ZMQError, KeyboardInterrupt) as exc:
            raise MigrationError(
                f"{exc or 'interrupted'}; {left:,} pages or more are not at the target, which waits for them. The "
                f"machine is paused here, as it was handed over: vmm migrate {self.machine.name} ADDRESS --recover "
                "goes on; if the target is lost, vmm resume --force goes on here from that moment") from None

    @staticmethod
    def _next_pages(todo: dict[int, NDArray[np.bool_]],
                    cursor: dict[int, int]) -> tuple[int, NDArray[np.int64]] | None:
        """The next pages of a slot from where its cursor is, round and round: a cursor jumps to what was asked for
        last, since its neighbours will be wanted too."""
        for slot, bits in todo.items():
            at = cursor[slot]
            found = np.flatnonzero(bits[at:at + _POSTCOPY_WINDOW])[:_POSTCOPY_PAGES] + at
            if not len(found):
                found = np.flatnonzero(bits)[:_POSTCOPY_PAGES]
            if len(found):
                cursor[slot] = int(found[-1]) + 1
                return slot, found
        return None

    def _send_wanted(self, wanted: Want, todo: dict[int, NDArray[np.bool_]], cursor: dict[int, int],
                     packer: Packer) -> int:
        """At once, past everything that waits for the channels. How many of them were not sent before."""
        if wanted.slot not in todo:
            raise WireError(f"{self.address}: wants pages of slot {wanted.slot}, which misses none")
        bits = todo[wanted.slot]
        pages = page_numbers(wanted, len(bits))
        fresh = int(bits[pages].sum())
        for message, data in packer.pack(POSTCOPY, wanted.slot, self.machine.ram(wanted.slot), pages):
            frame = encode(message)
            _send_pages(self._control, frame, data)
            self.count(message.encoding == "zero", len(message.numbers) // 4, len(frame) + len(data))
        bits[pages] = False
        cursor[wanted.slot] = int(pages[-1]) + 1
        self.report.ram.postcopy_requests += len(pages)
        self.report.ram.postcopy_pages += fresh
        return fresh

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """The guest stands still for the time being, and for good once the machine is committed to the target."""
        self._lease.freeze()
        try:
            yield
        finally:
            if not self._committed:
                self._lease.thaw()

    def _release_limits(self) -> None:
        with contextlib.suppress(VmmError):
            self._limits.close()

    def _give_up(self, reason: str) -> None:
        """The machine runs on here; the target cleans up."""
        with contextlib.suppress(VmmError, zmq.ZMQError):
            self._control.sndtimeo = 1000
            self._control.linger = 1000
            self._control.send(encode(Abort(reason)))
        self._release_limits()
        with contextlib.suppress(VmmError):
            self.machine.unregister(self._client)

    # --- sockets ----------------------------------------------------------------------------------------------

    def _put(self, job: tuple[int, int, NDArray[np.uint8], NDArray[np.int64]]) -> None:
        while True:
            self._check()
            try:
                return self.jobs.put(job, timeout=0.1)
            except queue.Full:
                self._tell()

    def _check(self) -> None:
        """A channel's failure, or the target's refusal, ends the round."""
        if self.failure is not None:
            raise self.failure if isinstance(self.failure, VmmError) else MigrationError(str(self.failure))
        self._ping()
        if self._control.poll(0):
            self._refusal(decode_answer(self._control.recv()))
        self._check_connection()

    def _check_connection(self) -> None:
        if self._monitor.poll(0) and not self._control.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            raise MigrationError(f"{self.address}: " + ("the target has gone" if event == zmq.EVENT_DISCONNECTED
                                                        else "the target refuses these keys"))

    def _refusal(self, answer: Answer) -> None:
        if isinstance(answer, Refused):
            raise MigrationError(f"{self.address}: refused: {answer.error}")
        raise WireError(f"{self.address}: said {type(answer).__name__} out of turn")

    def _ping(self) -> None:
        if time.monotonic() - self._last_ping > _PING_EVERY:
            self._send(Ping())

    def _send(self, message: Any) -> None:
        self._last_ping = time.monotonic()
        try:
            self._control.send(encode(message))
        except zmq.Again:
            raise MigrationError(f"{self.address}: nobody takes what is sent there") from None

    def _receive(self, timeout: float) -> Answer | None:
        return decode_answer(self._control.recv()) if self._control.poll(int(timeout * 1000)) else None

    def _expect(self, kind: type[Answer], patience: float | None) -> None:
        """Wait for this answer; for ever (None) while the target may have a lot in its queues, as long as it
        takes something now and then."""
        deadline = None if patience is None else time.monotonic() + patience
        while True:
            answer = self._receive(0.1)
            if isinstance(answer, kind):
                return
            if answer is not None:
                self._refusal(answer)
            self._check_connection()
            self._ping()
            self._tell()
            if deadline is not None and time.monotonic() > deadline:
                raise MigrationError(f"{self.address}: did not answer within {patience:.0f} s (is vmm receive "
                                     "waiting there, with the right keys?)")

    # --- report -------------------------------------------------------------------------------------------------

    def count(self, zero: bool, pages: int, size: int) -> None:
        with self._lock:
            ram = self.report.ram
            self._messages += 1
            ram.transferred += size
            if zero:
                ram.duplicate += pages
            else:
                ram.normal += pages
                ram.normal_bytes += pages * PAGE

    def _elapsed_ms(self) -> float:
        return (time.monotonic() - self._began) * 1000

    def _tell(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._told < 0.1:
            return
        self._told = now
        report = self.report
        report.total_time = self._elapsed_ms()
        if report.ram.transferred:
            report.compression_ratio = report.ram.normal_bytes / report.ram.transferred
        self._progress(report)

    def close(self) -> None:
        self.failure = self.failure or MigrationError("closed")     # channels drop what is left
        with contextlib.suppress(queue.Empty):
            while True:
                self.jobs.get_nowait()
                self.jobs.task_done()
        for _ in self._channels:
            self.jobs.put(None)
        for channel in self._channels:
            channel.join()
        self._control.disable_monitor()
        self._monitor.close(linger=0)
        self._control.close()
        self._context.term()
