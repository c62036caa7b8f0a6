"""Live migration, the target: wait for a machine, take its memory and state, run it when told to.

Until Commit the vCPUs stand before their first instruction; whatever goes wrong, the machine made here is torn
down and the source told why. Once everything is in its place the target waits for Commit as long as it takes:
from then on only the source knows who is to run the machine. With post-copy (vmm/postcopy.py) pages come after
that too; a source that is lost may be replaced by another that has the memory (``vmm migrate --recover``).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import zmq
import zstandard
from numpy.typing import NDArray
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import recv_monitor_message

from ipc.shm import data_extents, open_fd

from . import wire
from .errors import VmmError
from .machine import Machine
from .postcopy import Missing, Wanted
from .rules import RuleError, arriving
from .wire import (
    PAGE,
    VERSION,
    Abort,
    Accept,
    Answer,
    Buffer,
    Commit,
    Complete,
    Offer,
    Pages,
    Ping,
    Prepared,
    Received,
    Recover,
    Refused,
    RoundAck,
    RoundEnd,
    Running,
    State,
    WireError,
    check_address,
    decode_message,
    encode,
    secure,
    unpack,
)

__all__ = ["ReceiveError", "receive"]

_SILENCE = 30.0             # seconds without a word after which the source is given up, before Prepared
_LOOK_EVERY = 1000          # ms without pages after which the target looks whether its machine is still there
_QUEUE = 64                 # messages that wait here, a connection
_MESSAGE_MAX = 1 << 30      # bytes
_RUN = 4                    # pages that must follow one another, on average, to be written through the file


class ReceiveError(VmmError):
    """No machine was received; nothing of it is left here."""


def receive(address: str, *, name: str | None = None, accel: str = "auto", detach: bool = False, key: str = "",
            peer: str = "", insecure: bool = False, timeout: float | None = None,
            waiting: Callable[[str], None] = lambda address: None) -> Machine:
    """Wait for one machine and return it, running. ``timeout`` (seconds) bounds the wait for a source;
    ``waiting`` is told the address when somebody may connect. Raises VmmError."""
    check_address(address, keys=bool(key and peer), insecure=insecure)
    with contextlib.ExitStack() as stack:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        stack.callback(context.destroy, linger=2000)
        sock = context.socket(zmq.ROUTER)
        sock.rcvhwm = _QUEUE
        sock.maxmsgsize = _MESSAGE_MAX
        sock.router_mandatory = True
        if key:
            stack.enter_context(_authenticator(context, peer))
            secure(sock, key, peer, server=True)
        try:
            sock.bind(address)
        except zmq.ZMQError as exc:
            raise ReceiveError(f"{address}: cannot be listened on: {exc.strerror}") from None
        if address.startswith("ipc://"):
            stack.callback(Path(address.removeprefix("ipc://")).unlink, missing_ok=True)
        monitor = sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        stack.callback(sock.disable_monitor)
        waiting(sock.get_string(zmq.LAST_ENDPOINT))
        return _Target(sock, monitor, name, accel, detach, timeout).run()


@contextlib.contextmanager
def _authenticator(context: zmq.Context[zmq.Socket[bytes]], peer: str) -> Iterator[None]:
    """Let in who has the secret of the public key file ``peer``, nobody else."""
    with tempfile.TemporaryDirectory(prefix="shardvmm-keys-") as folder:
        try:
            (Path(folder) / "peer.key").write_bytes(Path(peer).read_bytes())
        except OSError as exc:
            raise VmmError(f"{peer}: is no key file: {exc.strerror}") from None
        guard = ThreadAuthenticator(context)
        guard.start()
        try:
            guard.configure_curve(domain="*", location=folder)
            yield
        finally:
            guard.stop()


class _Memory:
    """A slot of the machine that is to come; all zero at first."""

    def __init__(self, machine: Machine, slot: int) -> None:
        self._pages = machine.ram(slot, writable=True).reshape(-1, PAGE)
        self._fd = open_fd(machine.ram_segment(slot))
        #: Pages that are zero for certain: never touched.
        self._untouched = np.ones(len(self._pages), bool)
        for start, end in data_extents(self._fd, self._pages.size):     # what the loader has put there
            self._pages[start // PAGE:end // PAGE] = 0

    def write(self, numbers: NDArray[np.int64], data: NDArray[np.uint8] | None) -> None:
        """``data`` [n, 4096], None: zeros."""
        if data is None:
            touched = numbers[~self._untouched[numbers]]
            self._pages[touched] = 0
            return
        self._untouched[numbers] = False
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        if len(breaks) >= len(numbers) // _RUN:
            self._pages[numbers] = data
            return
        # Through the file, not the mapping: a page that nobody has touched yet costs no fault then.
        at = 0
        for run in np.split(numbers, breaks):
            self._put(data[at:at + len(run)], int(run[0]) * PAGE)
            at += len(run)

    def _put(self, data: NDArray[np.uint8], offset: int) -> None:
        view = data.reshape(-1).data
        while len(view):
            count = os.pwrite(self._fd, view, offset)
            view = view[count:]
            offset += count

    def close(self) -> None:
        os.close(self._fd)
        del self._pages


class _Target:
    """One migration on a ROUTER socket. Only the connection that sent the offer is answered."""

    def __init__(self, sock: zmq.Socket[bytes], monitor: zmq.Socket[bytes], name: str | None, accel: str,
                 detach: bool, timeout: float | None) -> None:
        self._sock = sock
        self._monitor = monitor
        self._connections: set[int] = set()
        self._name = name
        self._accel = accel
        self._detach = detach
        self._timeout = timeout
        self._peer = b""
        self._machine: Machine | None = None
        self._memory: dict[int, _Memory] = {}
        self._pages: dict[int, int] = {}
        self._arrived: dict[int, int] = {}      # {round: messages of pages}
        self._expected: dict[int, int] = {}     # {round: messages that the source says it sent}
        self._vcpus = 0
        self._source_name = ""
        self._absent: dict[int, NDArray[np.bool_]] = {}     # post-copy: what comes after the start
        self._missing: Missing | None = None

    def run(self) -> Machine:
        try:
            self._await_offer()
            self._take_memory()
            machine = self._await_commit()
            if self._missing is not None:
                self._fetch(self._missing)
            return machine
        except BaseException as exc:
            if isinstance(exc, VmmError) and self._peer:
                with contextlib.suppress(ReceiveError):
                    self._answer(Refused(str(exc)))
            if self._machine is not None:
                self._close_memory()
                self._machine.stop()
                self._machine.close()
            raise
        finally:
            if self._missing is not None:
                self._missing.close()

    def _close_memory(self) -> None:
        for memory in self._memory.values():
            memory.close()
        self._memory.clear()

    def _answer(self, message: Answer) -> None:
        """Raises ReceiveError when the source has gone."""
        try:
            self._sock.send_multipart([self._peer, encode(message)])
        except zmq.ZMQError as exc:
            raise ReceiveError(f"the source has gone ({exc.strerror})") from None

    def _next(self, patience: float | None) -> tuple[bytes, object, Buffer]:
        """(who, message, bytes of pages). Raises ReceiveError after ``patience`` seconds without one, or at once
        when nobody is connected any more; with None it waits for ever."""
        deadline = None if patience is None else time.monotonic() + patience
        while not self._sock.poll(0):
            left = None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000))
            if left == 0:
                raise ReceiveError(f"the source has said nothing for {patience:.0f} s" if self._peer
                                   else f"no source came within {patience:.0f} s")
            zmq.select([self._sock, self._monitor], [], [], None if left is None else left / 1000)
            if self._abandoned() and self._peer and patience is not None and not self._sock.poll(0):
                raise ReceiveError("the source has gone")
        return self._recv()

    def _recv(self) -> tuple[bytes, object, Buffer]:
        """Raises WireError."""
        frames = self._sock.recv_multipart(copy=False)
        if len(frames) not in (2, 3):
            raise WireError(f"the source sent a message of {len(frames) - 1} frames")
        message = decode_message(frames[1].buffer)
        data: Buffer = frames[2].buffer if len(frames) == 3 else b""
        if len(data) and not isinstance(message, Pages):
            raise WireError(f"the source sent {len(data)} bytes with {type(message).__name__}")
        return frames[0].bytes, message, data

    def _abandoned(self) -> bool:
        """Nobody is connected."""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._connections.discard(event["value"])
            else:
                self._connections.add(event["value"])
        return not self._connections

    def _await_offer(self) -> None:
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        while True:
            who, message, _ = self._next(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if isinstance(message, Offer):
                break
        self._peer = who
        if message.version != VERSION:
            raise WireError(f"the source ({message.program}) speaks migration protocol {message.version}, this "
                            f"program ({metadata.version('shardvmm')}) {VERSION}")
        self._answer(Received())
        self._source_name = message.spec.name
        self._machine = self._launch(message)
        self._vcpus = message.spec.vcpus
        for slot in message.spec.slots:
            self._memory[slot.id] = _Memory(self._machine, slot.id)
            self._pages[slot.id] = slot.pages
        self._answer(Accept())

    def _launch(self, offer: Offer) -> Machine:
        from .plan import choose_accelerator

        name = self._name or offer.spec.name
        with tempfile.NamedTemporaryFile(prefix="shardvmm-image-") as image:
            image.write(offer.image)
            image.flush()
            try:
                spec = arriving(offer.spec, name=name, accel=choose_accelerator(self._accel), image=image.name,
                                linger=not self._detach)
            except RuleError as exc:
                raise WireError(f"the source offers a machine that cannot be: {exc}") from None
            return Machine.launch(spec, detach=self._detach, start=False)

    def _take_memory(self) -> None:
        """Rounds of pages, until the state has come."""
        while True:
            who, message, data = self._next(_SILENCE)
            match message:
                case Pages():
                    self._write(message, data)
                    self._arrived[message.round] = self._arrived.get(message.round, 0) + 1
                    self._acknowledge(message.round)
                case Ping():
                    pass
                case RoundEnd() if who == self._peer:
                    self._expected[message.round] = message.messages
                    self._acknowledge(message.round)
                case wire.Missing() if who == self._peer:
                    self._absent[message.slot] = wire.missing_pages(message, self._total(message.slot))
                case State() if who == self._peer:
                    return self._set_state(message)
                case Abort() if who == self._peer:
                    raise ReceiveError(f"the source gave up: {message.reason}")
                case _:
                    raise WireError(f"the source said {type(message).__name__} out of turn")

    def _total(self, slot: int) -> int:
        if slot not in self._pages:
            raise WireError(f"the source sent pages of slot {slot}, which the machine does not have")
        return self._pages[slot]

    def _write(self, message: Pages, data: Buffer) -> None:
        pages = unpack(message, data, self._total(message.slot))
        self._memory[message.slot].write(*pages)

    def _acknowledge(self, number: int) -> None:
        if self._expected.get(number) == self._arrived.get(number, 0):
            del self._expected[number]
            self._arrived.pop(number, None)
            self._answer(RoundAck(number))

    def _set_state(self, message: State) -> None:
        assert self._machine is not None
        if len(message.vcpus) != self._vcpus:
            raise WireError(f"the source sent the states of {len(message.vcpus)} vCPUs")
        system = self._machine.system()
        try:
            size = zstandard.frame_content_size(message.system)
            data = zstandard.ZstdDecompressor().decompress(message.system) if size == len(system) else b""
        except zstandard.ZstdError as exc:
            raise WireError(f"the source sent a system slot that cannot be unpacked: {exc}") from None
        if len(data) != len(system):
            raise WireError(f"the source sent a system slot of {size} bytes; here it has {len(system)}")
        system[:] = np.frombuffer(data, np.uint8)
        if self._absent:
            self._missing = Missing(self._machine, self._absent)
        self._machine.set_state(message.vcpus)
        self._answer(Prepared())

    def _await_commit(self) -> Machine:
        """The source decides now, however long it takes."""
        assert self._machine is not None
        while True:
            who, message, _ = self._next(None)
            if who != self._peer:
                continue
            if isinstance(message, Abort):
                raise ReceiveError(f"the source gave up: {message.reason}")
            if isinstance(message, Commit):
                break
        self._close_memory()
        self._machine.start()
        with contextlib.suppress(ReceiveError):     # a source that died after Commit: the machine is ours
            self._answer(Running())
        return self._machine

    # --- post-copy ------------------------------------------------------------------------------------------

    def _fetch(self, missing: Missing) -> None:
        """The guest runs. Until every page is here, however long the source is away in between."""
        poller = zmq.Poller()
        poller.register(self._sock, zmq.POLLIN)
        for fd in missing.faults:
            poller.register(fd, zmq.POLLIN)
        while missing.left:
            if not (events := poller.poll(_LOOK_EVERY)) and self._ended():
                raise ReceiveError("the machine was stopped before all of its memory was here")
            for ready, _ in events:
                if ready is self._sock:
                    self._take_page(missing)
                else:
                    self._want(missing.wanted(ready))
        missing.finish()
        with contextlib.suppress(ReceiveError):
            self._answer(Complete([round(s * 1000, 3) for s in missing.blocked]))

    def _ended(self) -> bool:
        """The machine is over, or was stopped by somebody."""
        assert self._machine is not None
        return str(self._machine.status()["state"]) == "ended"

    def _take_page(self, missing: Missing) -> None:
        """The machine is ours alone by now: whoever sends what makes no sense is ignored."""
        try:
            who, message, data = self._recv()
            content = unpack(message, data, self._total(message.slot)) if isinstance(message, Pages) else None
        except WireError:
            return
        match message:
            case Pages() if content is not None:
                if message.slot in self._absent:
                    missing.put(message.slot, *content)
            case Commit() if who == self._peer:     # Running was lost
                self._answer(Running())
            case Recover(version=version, machine=name) if version == VERSION and name == self._source_name:
                self._peer = who
                for slot, bits in missing.bitmaps().items():
                    self._answer(wire.missing(slot, bits))
                self._answer(Running())
                self._want(missing.ask_again())
            case Recover():
                with contextlib.suppress(zmq.ZMQError):
                    self._sock.send_multipart([who, encode(Refused(f"machine '{self._source_name}' is what is "
                                                                   "awaited here"))])
            case _:
                pass    # Ping, or a straggler

    def _want(self, pages: list[Wanted]) -> None:
        for slot in {w.slot for w in pages}:
            numbers = sorted(w.page for w in pages if w.slot == slot)
            for at in range(0, len(numbers), wire.CHUNK_PAGES):
                with contextlib.suppress(ReceiveError):     # asked for again when it is back
                    self._answer(wire.want(slot, numbers[at:at + wire.CHUNK_PAGES]))
