"""The control socket: how the CLI and the Python API speak to a coordinator.

JSON over a ZeroMQ ROUTER in the machine's runtime directory; docs/protocol.md has a paragraph a
verb. A client sends ``{"v": 1, "id": n, "verb": …, …}`` and gets ``{"id": n, "result": {…}}`` or
``{"id": n, "error": text, "code": exit status}``. A client that has sent ``follow`` also gets events,
``{"event": …}``, as they happen.
"""

from __future__ import annotations

import itertools
import os
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq

from ipc import channel
from ipc.processid import identity

from .errors import ExitCode, VmmError

__all__ = ["CONTROL_VERSION", "ControlClient", "Owned", "Verb", "decode_verb"]

CONTROL_VERSION = 2
_LOST: dict[str, Any] = {"lost": True}
_ALIVE_EVERY = 0.1      # seconds without an answer after which a client asks whether there can be one
_FOLLOW_HWM = 100_000   # events a slow follower may lag behind before some are dropped


def _dashed(name: str) -> str:
    """``LogStart`` -> ``log-start``."""
    return "".join("-" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))


class Verb(msgspec.Struct, tag_field="verb", tag=_dashed, forbid_unknown_fields=True, kw_only=True):
    """``lease``: the token of a lease that whoever asks has (``TakeLease``); some verbs are its holder's alone.
    ``request``: the client's name for it, that no other request has. One that is sent again, because the connection
    broke before the answer came, has the same; what must not be done twice is not."""

    v: int
    id: int
    lease: str = ""
    request: str = ""


class Owned(Verb, kw_only=True):
    """Something is to belong to the process that asks, and go with it. ``owner_start``: when that process started
    (ipc/processid.py); which one it is, the coordinator sees from the connection. ``why``: for people. 0: it is
    nobody's, and stays."""

    owner_start: int = 0
    why: str = ""


class Follow(Verb):
    """Send events to this client from now on."""


class Start(Verb):
    """Let the vCPUs enter the guest for the first time."""


class Status(Verb):
    pass


class Pause(Owned):
    """The guest stands still until nobody wants it to any more. Without ``token``: the user's pause, which stays
    until ``Resume``. With one, made up by who asks: its own, until ``GiveBack`` or its end."""

    token: str = ""


class State(Verb):
    """Of a paused machine: its specification with the slots as they are, and each vCPU's state."""


class SetState(Verb):
    """Before the start: the vCPUs' states, as ``State`` gave them. The memory is in its place already."""

    vcpus: list[dict[str, Any]]


class Incoming(Owned):
    """Before the start: pages of RAM are missing, and will be filled in by the process that asks while the guest
    runs. Each worker sends a userfaultfd to the Unix socket ``socket``. The answer: ``addresses``, one a vCPU,
    {slot: where its mapping begins}. Should the owner end before ``Arrived``, the machine is ended."""

    socket: str


class Arrived(Verb):
    """Every page is there."""


class Resume(Verb):
    """Take back the user's pause. The answer: ``held_by``, who wants the guest to stand still all the same. A
    machine that was handed over is taken back only with ``force``."""

    force: bool = False


class TakeLease(Owned):
    """Have the machine for something that others must not disturb (vmm/coordinator/leases.py), until ``GiveBack``
    or the end of the process that asks. ``token``: made up by who asks. ``recover``: a migration that goes on with
    a machine which was handed over."""

    token: str
    kind: str
    recover: bool = False


class Freeze(Verb):
    """The lease's holder is about to copy the last of the memory: from now on no host write may begin, and the
    guest stands still, until ``Thaw`` or the lease's end."""

    token: str


class Thaw(Verb):
    token: str


class HandOver(Verb):
    """A frozen machine belongs to another host from now on (``to``, for people): it stays paused here whoever dies,
    until ``TakeBack`` or a ``Resume`` with ``force``."""

    token: str
    to: str


class TakeBack(Verb):
    """The other host has refused it."""

    token: str


class GiveBack(Verb):
    """End the pause, lease or limits of this token; nothing happens when there is none (any more)."""

    token: str


class Stop(Verb):
    """End every vCPU (reason stopped); the reply is sent at once, ``ended`` follows as an event."""


class Release(Verb):
    """The machine has ended and its report was taken: go."""


class LogStart(Verb):
    slot: int


class LogStop(Verb):
    slot: int


class Register(Owned):
    """With ``owner_start``: the client is unregistered when the process that asks ends, and nobody else may sync or
    unregister it. ``like``: begin with what that other client has gathered, which stays as it is."""

    client: str
    like: str = ""


class Unregister(Verb):
    client: str


class Sync(Verb):
    """Flush, then give this client what was dirtied since its last sync. ``again``: the last one's
    answer was not received; what it took is given once more, and nothing is lost."""

    client: str
    again: bool = False


class DirtyLimit(Owned):
    """At most so many pages a second, of one vCPU or (null) of each; 0 lifts the limit. Without ``token``: the
    user's, which stays. With one, made up by who asks: its own, over the user's, until ``GiveBack`` or its end. The
    least counts."""

    pages_per_s: int
    vcpu: int | None = None
    token: str = ""


class SetTracking(Verb):
    """Log dirty pages in another way from now on (one of vmm.tracking.CHOICES), with nothing lost."""

    tracking: str


class Slots(Verb):
    """The memory slots as they are now. Answer: ``slots``, {id: {``gpa``, ``size``, ``born``, ``logged``, ``ram``:
    name of its segment}}; ``accelerator``; ``incoming``."""


class Mark(Owned):
    """A host write: these pages are dirty. ``when``: ``before`` and ``after`` go together by their ``token``,
    around a write that a freeze waits for (vmm/holds.py), and the pages are dirty in every sync in between;
    ``made`` stands alone, after one that nobody knew of. ``born``: of the slot that is meant; null: of whichever
    is there now."""

    slot: int
    first: int
    count: int
    born: int | None = None
    when: Literal["before", "after", "made"] = "made"
    token: str = ""


class RecordStart(Owned):
    """From now on what is harvested from the rings is also put into the queue ``record`` (a dirty trace), until
    ``RecordStop`` or the end of the process that asks. One recording at a time, which is its own."""


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
           | TakeLease | Freeze | Thaw | HandOver | TakeBack | GiveBack
           | Stop | Release | LogStart | LogStop | Register
           | Unregister | Sync | DirtyLimit | SetTracking | Slots | Mark | RecordStart | RecordStep | RecordStop
           | MemoryAdd | MemoryRemove)

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
    """One connection to a coordinator. Not thread-safe, nor for a forked child. ``alive`` says whether the machine
    still runs. ``lease``: token of the lease whose holder asks."""

    def __init__(self, directory: Path, name: str, alive: Callable[[], bool]) -> None:
        self.lease = ""
        self._name = name
        self._alive = alive
        self._pid = os.getpid()
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
        if os.getpid() != self._pid:
            raise VmmError(f"this connection to machine '{self._name}' is that of process {self._pid}, which "
                           "forked: attach to the machine here")
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
        if issubclass(verb, Owned) and arguments.pop("mine", False):
            try:
                arguments["owner_start"] = identity().start
            except ProcessLookupError:
                raise VmmError("/proc/self/stat cannot be read: nothing can be held for this process") from None
        self._sock.send(msgspec.json.encode(verb(v=CONTROL_VERSION, id=number, lease=self.lease, request=request,
                                            **arguments)))
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
