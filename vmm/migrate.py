"""Live migration, the source: pre-copy rounds from the dirty log, stop-and-copy, hand-over.

The machine runs on while its memory is sent; each round sends what was dirtied during the last. When what is
left can be sent within the downtime limit, or the rounds are used up, the guest is stopped, the rest and the
vCPU states are sent, and the target is told to go on. Guests that dirty faster than they can be sent are held
back by the dirty limit, those vCPUs alone that dirty most.

Never two, never none: until Commit is sent the source alone may run the machine, and any failure, a kill
included, lets it go on here (the pause and the dirty-log client belong to this process). After Commit it never
runs here again; Commit is repeated until the target says that it runs.
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

from .errors import VmmError
from .machine import Machine
from .spec import MachineSpec
from .wire import (
    CHUNK_PAGES,
    PAGE,
    VERSION,
    Abort,
    Accept,
    Answer,
    Commit,
    Encoding,
    Offer,
    Packer,
    Ping,
    Prepared,
    Received,
    Refused,
    RoundAck,
    RoundEnd,
    Running,
    State,
    WireError,
    check_address,
    decode_answer,
    encode,
    secure,
)

__all__ = ["MigrationError", "Options", "Report", "migrate"]

_PATIENCE = 10.0            # seconds without an answer after which the target is given up
_RESERVING = 300.0          # seconds that the target may take to make and reserve the memory
_PING_EVERY = 2.0
_HANDOVER_PATIENCE = 30.0   # seconds that Commit is repeated
_THROTTLE_AFTER = 3         # rounds without convergence before vCPUs are held back
_THROTTLE_STEP = 0.5        # of the quota, each further round
_THROTTLE_SHARE = 0.5       # of the bandwidth that all of them may dirty, at first
_QUEUE = 8                  # chunks that wait for a channel
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


@dataclass
class Report:
    """Times in milliseconds. ``status``: setup, active, device, completed, failed, cancelled."""

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
    source = _Source(machine, address, options, report, progress)
    try:
        source.run()
    except BaseException as exc:
        report.status = "failed" if isinstance(exc, Exception) else "cancelled"
        report.error = str(exc) or type(exc).__name__
        progress(report)
        if isinstance(exc, zmq.ZMQError):
            raise MigrationError(f"{address}: {exc}") from None
        raise
    finally:
        source.close()
    return report


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
        for message in self._packer.pack(round_, slot, memory, pages):
            frame = encode(message)
            source.limiter.take(len(frame))
            deadline = time.monotonic() + _PATIENCE
            while not self._sock.poll(100, zmq.POLLOUT):
                if source.failure is not None:
                    return
                if time.monotonic() > deadline:
                    raise MigrationError(f"{source.address}: takes no more data")
            self._sock.send(frame)
            source.count(message.encoding == "zero", len(message.numbers) // 4, len(frame))


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
        self._limits: dict[int, int] = {}       # {vCPU: its quota before}
        self._quotas: dict[int, int] = {}
        self._committed = False
        self._told = 0.0

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
        self._offer()
        self.machine.register(self._client, mine=True)
        try:
            self._pre_copy()
            self._stop_and_copy()
        except BaseException as exc:
            if not self._committed:
                self._give_up(str(exc) or type(exc).__name__)
            raise
        self.report.status = "completed"
        self._tell(force=True)

    def _offer(self) -> None:
        machine = self.machine
        if machine.status()["state"] != "running":
            raise MigrationError(f"machine '{machine.name}' does not run: resume it first")
        with self._paused():        # for its specification alone: the state that comes with it is not used
            state = machine.state()
        spec = msgspec.convert(state["spec"], MachineSpec)
        self._send(Offer(VERSION, metadata.version("shardvmm"), spec, Path(spec.image).read_bytes()))
        self._expect(Received, _PATIENCE)
        self._expect(Accept, _RESERVING)
        self.report.setup_time = self._elapsed_ms()
        self.report.ram.total = sum(s.size for s in spec.slots)
        self.report.status = "active"

    def _pre_copy(self) -> None:
        logged = [s for s in self.machine.status()["slots"] if s["logged"]]
        todo = {s["id"]: np.arange(s["pages"]) for s in logged}     # round 0: everything
        self.machine.sync(self._client)         # from here on counts
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
            if self.options.converge and number + 1 >= _THROTTLE_AFTER and before and left > before * 0.7:
                self._hold_back(rate)
            before = left
        self._rest = todo

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
        if status["tracking"] != "ring":
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
            self._limits[vcpu] = status["vcpus"][vcpu]["dirty_limit_pages_per_s"]
            self._limit(vcpu, max(1, int((budget - calm) / len(hot))))

    def _limit(self, vcpu: int, quota: int) -> None:
        self._quotas[vcpu] = quota
        self.machine.dirty_limit(quota, vcpu)
        self.report.throttled[str(vcpu)] = quota * PAGE / 1e6

    def _stop_and_copy(self) -> None:
        machine, report = self.machine, self.report
        report.status = "device"
        with self._paused():
            stopped = time.monotonic()
            self._release_limits()
            todo = self._rest
            for slot, pages in self._dirty().items():
                todo[slot] = np.union1d(todo[slot], pages) if slot in todo else pages
            for slot in machine.status()["slots"]:
                if not slot["logged"]:      # nobody knows what changed there: all of it, now
                    todo[slot["id"]] = np.arange(slot["pages"])
            self._send_round(self.options.max_rounds, todo)
            state = machine.state()
            system = zstandard.ZstdCompressor(level=1).compress(machine.system().tobytes())
            self._send(State(system, state["vcpus"]))
            self._expect(Prepared, _PATIENCE * 3)
            self._hand_over()
            report.downtime = (time.monotonic() - stopped) * 1000
        report.total_time = self._elapsed_ms()

    def _hand_over(self) -> None:
        """The point of no return."""
        machine = self.machine
        machine.unregister(self._client)
        machine.pause()     # for good: this process may die now, and the machine must not run on here
        self._committed = True
        deadline = time.monotonic() + _HANDOVER_PATIENCE
        while time.monotonic() < deadline:
            self._send(Commit())
            answer = self._receive(1.0)
            if isinstance(answer, Running):
                machine.stop()
                return
            if isinstance(answer, Refused):
                self._committed = False
                raise MigrationError(f"{self.address}: refused at the last moment: {answer.error}")
        raise MigrationError(
            f"{self.address}: was told to go on and did not answer: the machine may run there. It stays paused "
            f"here (vmm status {machine.name}): resume it only if it does not, stop it if it does")

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Paused for the time being, and for good once the machine is committed to the target."""
        self.machine.pause(mine=True)
        try:
            yield
        finally:
            if not self._committed:
                self.machine.resume()

    def _release_limits(self) -> None:
        for vcpu, quota in self._limits.items():
            with contextlib.suppress(VmmError):
                self.machine.dirty_limit(quota, vcpu)

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
