"""The control socket: how the CLI and the Python API speak to a coordinator.

JSON over a ZeroMQ ROUTER in the machine's runtime directory; docs/protocol.md has a paragraph a
verb. A client sends ``{"v": 1, "id": n, "verb": …, …}`` and gets ``{"id": n, "result": {…}}`` or
``{"id": n, "error": text, "code": exit status}``. A client that has sent ``follow`` also gets events,
``{"event": …}``, as they happen.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from ipc import channel

from .errors import ExitCode, VmmError

__all__ = ["CONTROL_VERSION", "ControlClient", "Verb", "decode_verb"]

CONTROL_VERSION = 2
_LOST: dict[str, Any] = {"lost": True}
_ALIVE_EVERY = 0.1      # seconds without an answer after which a client asks whether there can be one
_FOLLOW_HWM = 100_000   # events a slow follower may lag behind before some are dropped


def _dashed(name: str) -> str:
    """``LogStart`` -> ``log-start``."""
    return "".join("-" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))


class Verb(msgspec.Struct, tag_field="verb", tag=_dashed, forbid_unknown_fields=True, kw_only=True):
    """``request``: the client's name for it, that no other request has. One that is sent again, because the
    connection broke before the answer came, has the same; what must not be done twice is not."""

    v: int
    id: int
    request: str = ""


class Follow(Verb):
    """Send events to this client from now on."""


class Start(Verb):
    """Let the vCPUs enter the guest for the first time."""


class Status(Verb):
    pass


class Pause(Verb):
    """``owner``: a process id; the machine resumes when that process ends. 0: it stays paused."""

    owner: int = 0


class State(Verb):
    """Of a paused machine: its specification with the slots as they are, and each vCPU's state."""


class SetState(Verb):
    """Before the start: the vCPUs' states, as ``State`` gave them. The memory is in its place already."""

    vcpus: list[dict[str, Any]]


class Incoming(Verb):
    """Before the start: pages of RAM are missing, and will be filled in by process ``owner`` while the guest runs.
    Each worker sends a userfaultfd to the Unix socket ``socket``. The answer: ``addresses``, one a vCPU, {slot:
    where its mapping begins}. Should the owner end before ``Arrived``, the machine is ended."""

    socket: str
    owner: int


class Arrived(Verb):
    """Every page is there."""


class Resume(Verb):
    pass


class Stop(Verb):
    """End every vCPU (reason stopped); the reply is sent at once, ``ended`` follows as an event."""


class Release(Verb):
    """The machine has ended and its report was taken: go."""


class LogStart(Verb):
    slot: int


class LogStop(Verb):
    slot: int


class Register(Verb):
    """``owner``: a process id; the client is unregistered when that process ends. 0: it stays.
    ``like``: begin with what that other client has gathered, which stays as it is."""

    client: str
    owner: int = 0
    like: str = ""


class Unregister(Verb):
    client: str


class Sync(Verb):
    """Flush, then give this client what was dirtied since its last sync. ``again``: the last one's
    answer was not received; what it took is given once more, and nothing is lost."""

    client: str
    again: bool = False


class DirtyLimit(Verb):
    """At most so many pages a second, of one vCPU or (-1) of each; 0 lifts the limit."""

    pages_per_s: int
    vcpu: int = -1


class SetTracking(Verb):
    """Log dirty pages in another way from now on (one of vmm.tracking.CHOICES), with nothing lost."""

    tracking: str


class Slots(Verb):
    """The memory slots as they are now. Answer: ``slots``, {id: {``gpa``, ``size``, ``born``, ``logged``, ``ram``:
    name of its segment}}; ``accelerator``; ``incoming``."""


class WriteBegin(Verb):
    """Process ``owner`` is about to write to these pages: they are dirty in every sync until ``WriteEnd`` has the
    same ``key``, or that process has ended. ``born``: of the slot that is meant."""

    key: str
    slot: int
    born: int
    first: int
    count: int
    owner: int


class WriteEnd(Verb):
    """The write is over. Fails where the slot was removed in between."""

    key: str


class Mark(Verb):
    """A host write was made: these pages are dirty. ``born``: of the slot that is meant; null: of whichever is
    there now."""

    slot: int
    first: int
    count: int
    born: int | None = None


class RecordStart(Verb):
    """From now on what is harvested from the rings is also put into the queue ``record`` (a dirty trace), until
    ``RecordStop`` or the end of process ``owner``. One recording at a time."""

    owner: int


class RecordStep(Verb):
    """Reap now, if nothing else does, so that the trace's times are exact. The answer: ``going_on``, false when
    the machine has ended."""


class RecordStop(Verb):
    """Flush, and end the recording."""


class MemoryAdd(Verb):
    slot: int
    gpa: int
    size: int
    log: bool


class MemoryRemove(Verb):
    slot: int


AnyVerb = (Follow | Start | Status | State | SetState | Incoming | Arrived | Pause | Resume
           | Stop | Release | LogStart | LogStop | Register
           | Unregister | Sync | DirtyLimit | SetTracking | Slots | WriteBegin | WriteEnd | Mark
           | RecordStart | RecordStep | RecordStop | MemoryAdd | MemoryRemove)

_verbs = msgspec.json.Decoder(AnyVerb)


class _Envelope(msgspec.Struct):
    """What can be read of a request that does not decode."""

    v: int = 0
    id: int = 0


def decode_verb(frame: bytes) -> AnyVerb:
    """Raises VmmError, with the request's id as ``request_id``."""
    envelope = _Envelope()
    try:
        envelope = msgspec.json.decode(frame, type=_Envelope)
        if envelope.v != CONTROL_VERSION:
            raise VmmError(f"the machine speaks control protocol {CONTROL_VERSION}, not {envelope.v}")
        return _verbs.decode(frame)
    except msgspec.MsgspecError as exc:
        error = VmmError(f"bad request: {exc}")
        error.request_id = envelope.id  # type: ignore[attr-defined]
        raise error from None


class Refusal(VmmError):
    """The coordinator's own answer: it has done nothing."""


class ControlClient:
    """One connection to a coordinator. Not thread-safe. ``alive`` says whether the machine still runs."""

    def __init__(self, directory: Path, name: str, alive: Callable[[], bool]) -> None:
        self._name = name
        self._alive = alive
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._sock = channel.connect(self._context, zmq.DEALER, channel.endpoint(directory, "control"))
        self._sock.linger = 0
        self._sock.rcvhwm = _FOLLOW_HWM
        # A coordinator that died took a request with it: the lost connection says so at once.
        self._monitor = self._sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(self._sock, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._following = False
        self._ids = itertools.count(1)
        self._events: deque[dict[str, Any]] = deque()
        self._token = uuid.uuid4().hex
        self._requests = itertools.count(1)
        self._unanswered: set[str] = set()      # clients of the dirty log whose last sync was not answered

    def ask(self, verb: type[Verb], timeout: float = 30.0, **arguments: Any) -> dict[str, Any]:
        """Send one verb and wait for its answer; sent again when the coordinator died in between
        (another one takes over, and every verb may be repeated). Raises VmmError."""
        self._notice_losses()
        self._following = self._following or verb is Follow
        request = f"{self._token}.{next(self._requests)}"
        if verb is Sync:
            return self._sync(arguments, request, timeout)
        return self._ask(verb, arguments, request, timeout)

    def _sync(self, arguments: dict[str, Any], request: str, timeout: float) -> dict[str, Any]:
        """What the last one took is asked for again where its answer never came (it took too long, or the program
        was interrupted): else those pages would be lost."""
        client = arguments["client"]
        arguments["again"] = again = client in self._unanswered
        self._unanswered.add(client)
        try:
            answer = self._ask(Sync, arguments, request, timeout)
        except Refusal:
            if not (again or arguments["again"]):
                self._unanswered.discard(client)    # it was asked once, and has taken nothing
            raise
        self._unanswered.discard(client)
        return answer

    def _ask(self, verb: type[Verb], arguments: dict[str, Any], request: str, timeout: float) -> dict[str, Any]:
        number = self._send(verb, arguments, request)
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            answer = self._receive(min(left, _ALIVE_EVERY))
            if answer is None and left > _ALIVE_EVERY:
                if not self._alive():
                    raise VmmError(f"machine '{self._name}' is gone", ExitCode.NO_MACHINE)
                continue
            if answer is None:
                raise VmmError(f"machine '{self._name}' did not answer within {timeout:.0f} s",
                               ExitCode.NO_MACHINE)
            if answer is _LOST:
                if verb is Sync:
                    arguments["again"] = True
                number = self._send(verb, arguments, request)
                continue
            if answer.get("id") != number:
                if "event" in answer:
                    self._events.append(answer)
                continue
            if "error" in answer:
                raise Refusal(answer["error"], ExitCode(answer.get("code", ExitCode.BAD_INPUT)))
            return dict(answer["result"])

    def event(self, timeout: float) -> dict[str, Any] | None:
        """The next event, or None when none came within ``timeout`` seconds."""
        if self._events:
            return self._events.popleft()
        deadline = time.monotonic() + timeout
        while True:
            answer = self._receive(deadline - time.monotonic())
            if answer is None or "event" in answer:
                return answer

    def _send(self, verb: type[Verb], arguments: dict[str, Any], request: str = "") -> int:
        number = next(self._ids)
        self._sock.send(msgspec.json.encode(verb(v=CONTROL_VERSION, id=number, request=request, **arguments)))
        return number

    def _receive(self, timeout: float) -> dict[str, Any] | None:
        """The next message; None when none came in time; _LOST when the connection broke."""
        ready = dict(self._poller.poll(max(0, int(timeout * 1000))))
        if self._sock in ready:
            return dict(msgspec.json.decode(self._sock.recv()))
        if self._monitor in ready:
            self._notice_losses()
            return _LOST
        return None

    def _notice_losses(self) -> None:
        """The connection has broken, perhaps: whatever was sent before that may be lost, and what is sent from now
        on is not. Another coordinator does not know its followers."""
        lost = False
        while self._monitor.poll(0):
            self._monitor.recv_multipart()
            lost = True
        if lost and self._following:
            self._send(Follow, {})

    def close(self) -> None:
        self._sock.disable_monitor()
        self._monitor.close(linger=0)
        self._sock.close()
        self._context.term()
