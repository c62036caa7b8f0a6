"""Both ends of a migration for tests: real ones in threads and processes, and played ones that say what the test
wants said."""

from __future__ import annotations

import contextlib
import queue
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import numpy as np
import zmq
import zstandard
from machines import nothing_left, spec, until

from vmm import receive
from vmm.client.machine import Machine
from vmm.consumers.migration import wire
from vmm.consumers.migration.addresses import Address, parse_address
from vmm.consumers.migration.door import Door
from vmm.consumers.migration.keys import Keys
from vmm.consumers.migration.pages import PAGE, Packer
from vmm.consumers.migration.sockets import Connection, connect, connect_stream, listen
from vmm.consumers.migration.streams import Sent, Stream
from vmm.errors import VmmError
from vmm.machine.spec import MachineSpec

TIMEOUT = 60.0
#: It dirties one page after the other, for ever.
WALK = spec("sequential", accel="unicorn", name="source", mib=8, passes=0, spin=50, timeout=None)

_T = TypeVar("_T")


@contextlib.contextmanager
def listening(context: zmq.Context[zmq.Socket[bytes]], address: Address, keys: Keys | None = None,
              pages: Callable[[socket.socket], None] = socket.socket.close) -> Iterator[tuple[zmq.Socket[bytes], str]]:
    """A ROUTER behind a door, and what to connect to. ``pages`` is given the connections for them."""
    with Door(address) as door, listen(context, door, keys) as sock:
        door.serve(pages)
        yield sock, door.endpoint


class Receiver(threading.Thread):
    """``receive`` in a thread of its own."""

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__(daemon=True)       # a test that has failed does not wait for it
        self._arguments = (address, {"name": "target", **options})
        self._listening = threading.Event()
        self.at = ""
        self.machine: Machine | None = None
        self.error: BaseException | None = None
        self.refused: list[str] = []
        self.start()
        assert self._listening.wait(TIMEOUT)

    def run(self) -> None:
        address, options = self._arguments
        try:
            self.machine = receive.receive(address, waiting=self._listens, refused=self.refused.append, **options)
        except BaseException as exc:
            self.error = exc
        finally:
            self._listening.set()

    def _listens(self, at: str) -> None:
        self.at = at
        self._listening.set()

    def result(self) -> Machine:
        self.join(TIMEOUT)
        assert self.error is None, self.error
        assert self.machine is not None
        return self.machine

    def failure(self) -> str:
        """Why nothing was received; nothing of it is left."""
        self.join(TIMEOUT)
        assert self.machine is None
        assert isinstance(self.error, VmmError), self.error
        until(lambda: nothing_left("target"), "nothing is left of the target's machine")
        return str(self.error)


def vmm(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "vmm", *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    """It does, with this exit status; its output, and what it says on standard error."""
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, (out, err)
    return out, err


def receiver_process(address: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """``vmm receive``, which waits by now."""
    process = vmm("receive", address, "--name", "target", *arguments)
    assert process.stderr is not None
    assert "waiting at" in process.stderr.readline()
    return process


def goes_on(machine: Machine) -> None:
    """It runs, and nothing of a migration is left on it."""
    until(lambda: machine.status()["state"] == "running", "it runs on")
    machine.register("after")
    until(lambda: machine.sync("after").pages > 0, "the guest dirties pages")
    machine.unregister("after")
    until(lambda: not [c for c in machine.status()["clients"] if c.startswith("migrate")], "its client has gone")
    until(lambda: all(v["dirty_limit_pages_per_s"] == 0 for v in machine.status()["vcpus"]), "its limits have gone")


@contextlib.contextmanager
def touched(name: str) -> Iterator[None]:
    """From now on some pages of the machine are dirtied all the time: after every round something is left."""
    begun, over = threading.Event(), threading.Event()

    def touch() -> None:
        with contextlib.suppress(VmmError), Machine.attach(name) as machine:
            while not over.wait(0.001):
                machine.mark_dirty(0, 1200, 8)
                begun.set()

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        assert begun.wait(TIMEOUT), f"{name}: no page of it is dirtied"
        yield
    finally:
        over.set()
        thread.join()


# --- played ends
# ----------------------------------------------------------------------------------------------------


def spec_of(machine: Machine) -> MachineSpec:
    """Of a paused machine, as a source offers it."""
    return msgspec.convert(machine.state()["spec"], MachineSpec)


class PlayedSource:
    """Speaks the protocol to a real target as the test tells it to. ``with`` it."""

    def __init__(self, address: str) -> None:
        self._address = parse_address(address)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._connections: list[Connection] = []
        self._streams: list[Stream] = []
        self.token = secrets.token_hex(16)
        self.sock = self.connect()

    def connect(self) -> zmq.Socket[bytes]:
        """One more connection, which says nothing yet."""
        connection = connect(self._context, self._address, None, until=time.monotonic() + TIMEOUT)
        self._connections.append(connection)
        return connection.sock

    def stream(self, token: str = "") -> Stream:
        """One more connection for pages, which has joined (``token``: with another than ours)."""
        stream = connect_stream(self._address, time.monotonic() + TIMEOUT)
        self._streams.append(stream)
        stream.send(wire.Join(token or self.token))
        return stream

    def say(self, *messages: wire.Wire, sock: zmq.Socket[bytes] | None = None) -> None:
        for message in messages:
            (sock or self.sock).send_multipart(wire.frames(message), zmq.DONTWAIT)

    def hear(self, kind: type[_T], sock: zmq.Socket[bytes] | None = None) -> _T:
        """The next answer of this kind; no other may come before, but Alive."""
        sock = sock or self.sock
        while True:
            assert sock.poll(int(TIMEOUT * 1000)), f"no {kind.__name__}"
            answer = wire.decode_answer(sock.recv_multipart())
            if isinstance(answer, kind):
                return answer
            assert isinstance(answer, wire.Alive), answer

    def offer(self, spec: MachineSpec, *, postcopy: bool = False, **changes: Any) -> None:
        """Sent, not answered yet."""
        fields = {"version": wire.VERSION, "program": "0", "token": self.token, "spec": spec,
                  "postcopy": postcopy, **changes}
        self.say(wire.Offer(**{"image": fields.get("image") or Path(spec.image).read_bytes(), **fields}))

    def offered(self, spec: MachineSpec, **changes: Any) -> None:
        """And accepted."""
        self.offer(spec, **changes)
        self.hear(wire.Received)
        self.hear(wire.Accept)

    def page(self, number: int, fill: int, *, round_: int = 0, stream: Stream | None = None) -> None:
        """One page of slot 0, all of these bytes."""
        memory = np.full(PAGE * (number + 1), fill, np.uint8)
        for message, data in Packer("none", sums=True).pack(round_, 0, memory, np.array([number])):
            (stream or self._streams[0]).send(message, data, Sent(memory, -1))

    def state(self, machine: Machine, **changes: Any) -> wire.State:
        """As the machine, which is paused, has it; for a target that was offered ``spec_of`` it."""
        fields = {"system": zstandard.ZstdCompressor().compress(machine.system().tobytes()),
                  "vcpus": machine.state()["vcpus"], "spec": spec_of(machine), "paused": False, **changes}
        return wire.State(**fields)

    def commit(self) -> wire.Commit:
        return wire.Commit(wire.VERSION, self.token)

    def leave(self) -> None:
        """Close every connection, without a word."""
        for connection in self._connections:
            connection.close()
        for stream in self._streams:
            stream.close()
        self._connections.clear()
        self._streams.clear()

    def __enter__(self) -> PlayedSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self.leave()
        self._context.term()


class PlayedTarget(threading.Thread):
    """Answers a real source as a good target would, but for what ``replies`` has: {type of message: what is said
    instead}, a list of answers (bytes: a frame as it is), or a function of the message that gives one. Ends with
    ``close``."""

    def __init__(self, address: str, replies: dict[type[wire.Wire], Any] | None = None) -> None:
        super().__init__(daemon=True)
        self._replies = replies or {}
        self._over = threading.Event()
        self._listening = threading.Event()
        self._address = parse_address(address, listen=True)
        self._arrived: dict[int, int] = {}
        self._expected: dict[int, int] = {}
        self._pages: queue.SimpleQueue[wire.Pages] = queue.SimpleQueue()
        self.seen: list[wire.Wire] = []
        self.start()
        assert self._listening.wait(TIMEOUT)

    def run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        with listening(context, self._address, pages=self._take_pages) as (sock, _):
            self._listening.set()
            peer = b""
            while not self._over.is_set():
                message: wire.Wire
                if not self._pages.empty():
                    message = self._pages.get()
                elif sock.poll(5):
                    who, frame, digest = sock.recv_multipart()
                    message = wire.decode_message(frame, digest)
                    if isinstance(message, wire.Offer | wire.Commit | wire.Check):
                        peer = who
                else:
                    continue
                self.seen.append(message)
                for answer in self._answers(message):
                    sock.send_multipart([peer, answer] if isinstance(answer, bytes) else [peer,
                    *wire.frames(answer)])
        context.term()

    def _take_pages(self, sock: socket.socket) -> None:
        """As they come, at the speed at which they are answered."""
        with Stream(sock) as stream, contextlib.suppress(OSError):
            while (received := stream.receive()) is not None:
                if isinstance(received[0], wire.Pages):
                    self._pages.put(received[0])

    def _answers(self, message: wire.Wire) -> list[Any]:
        if (reply := self._replies.get(type(message))) is not None:
            return list(reply(message) if callable(reply) else reply)
        match message:
            case wire.Offer():
                return [wire.Received(), wire.Accept()]
            case wire.Pages(round=number):
                self._arrived[number] = self._arrived.get(number, 0) + 1
                return self._barrier(number)
            case wire.RoundEnd(round=number, messages=messages):
                self._expected[number] = messages
                return self._barrier(number)
            case wire.WhenReady():
                return [wire.Ready()]
            case wire.State():
                return [wire.Prepared()]
            case wire.Commit():
                return [wire.Running()]
        return []

    def _barrier(self, number: int) -> list[wire.Wire]:
        if self._expected.get(number) != self._arrived.get(number, 0):
            return []
        del self._expected[number]
        return [wire.RoundAck(number)]

    def has(self, kind: type[wire.Wire]) -> bool:
        return any(isinstance(message, kind) for message in self.seen)

    def close(self) -> None:
        self._over.set()
        self.join(TIMEOUT)

    def __enter__(self) -> PlayedTarget:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Relay:
    """Stands between a source and an ipc or tcp endpoint, and forwards every connection both ways: until it is
    ``cut``, when it falls silent, or its connections are ``broken``, when new ones may be made."""

    def __init__(self, endpoint: str, path: Path) -> None:
        self.address = f"ipc://{path}"
        self._endpoint = endpoint
        self._path = path
        #: All that has gone through, either way.
        self.seen = bytearray()
        self._silent = threading.Event()
        self._over = threading.Event()
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(0.05)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                one, _ = self._listener.accept()
                other = self._connect()
                self._sockets += [one, other]
                for pair in ((one, other), (other, one)):
                    self._threads.append(threading.Thread(target=self._forward, args=pair, daemon=True))
                    self._threads[-1].start()

    def _connect(self) -> socket.socket:
        if self._endpoint.startswith("tcp://"):
            host, _, port = self._endpoint.removeprefix("tcp://").rpartition(":")
            return socket.create_connection((host, int(port)))
        found = socket.socket(socket.AF_UNIX)
        found.connect(self._endpoint.removeprefix("ipc://"))
        return found

    def _forward(self, one: socket.socket, other: socket.socket) -> None:
        """A thread for each way: so neither sets a timeout, which would be the other's too."""
        while not self._silent.is_set() and not self._over.is_set():
            if not select.select([one], [], [], 0.05)[0]:
                continue
            try:
                data = one.recv(1 << 20)
                self.seen += data
                other.sendall(data)
            except OSError:
                data = b""
            if not data:
                for sock in (one, other):
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
                return

    def cut(self) -> None:
        """Nothing is forwarded any more, and no end of anything either."""
        self._silent.set()

    def broken(self) -> None:
        """All connections of now end, what is in them is lost."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._threads[0].join()
        for thread in self._threads:
            thread.join()
        for sock in (*self._sockets, self._listener):
            sock.close()
        self._path.unlink()
