"""The verbs of the control socket: what the CLI and the Python API may ask a coordinator for.

JSON, one document per line, over the Unix socket ``control`` in the machine's runtime directory; docs/protocol.md
has a paragraph for each verb. A client sends ``{"v": 2, "id": n, "verb": …, …}`` and gets ``{"id": n, "result":
{…}}`` or ``{"id": n, "error": text, "code": exit status}``. vmm/connection.py is the client's end,
vmm/coordinator/server.py the coordinator's.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from .errors import VmmError

__all__ = ["CONTROL_VERSION", "Verb", "decode_verb"]

CONTROL_VERSION = 2

#: A process id, or 0 for none; the kernel has none above (PID_MAX_LIMIT, linux/threads.h).
Pid = Annotated[int, msgspec.Meta(ge=0, le=1 << 22)]
#: What a verb does with a number it checks itself; here it is a number that Python, numpy and C agree on.
Number = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


def _dashed(name: str) -> str:
    """``LogStart`` -> ``log-start``."""
    return "".join("-" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))


class Verb(msgspec.Struct, tag_field="verb", tag=_dashed, forbid_unknown_fields=True):
    v: Number
    id: Number


class Events(Verb):
    """The events after the first ``after`` of this machine; -1: those from now on. The answer, ``events``, ``next``
    (what to ask for then) and ``dropped`` (so many came too early for whoever asks only now), is held back until
    there is one. Of one connection only the last such request is answered."""

    after: Number = -1


class Start(Verb):
    """Let the vCPUs enter the guest for the first time."""


class Status(Verb):
    pass


class Pause(Verb):
    """``owner``: a process id; the machine resumes when that process ends. 0: it stays paused."""

    owner: Pid = 0


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
    owner: Pid


class Arrived(Verb):
    """Every page is there."""


class Resume(Verb):
    pass


class Stop(Verb):
    """End every vCPU (reason stopped); the reply is sent at once, ``ended`` follows as an event."""


class Release(Verb):
    """The machine has ended and its report was taken: go."""


class LogStart(Verb):
    slot: Number


class LogStop(Verb):
    slot: Number


class Register(Verb):
    """``owner``: a process id; the client is unregistered when that process ends. 0: it stays.
    ``like``: begin with what that other client has gathered, which stays as it is."""

    client: str
    owner: Pid = 0
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

    pages_per_s: Number
    vcpu: Number = -1


class SetTracking(Verb):
    """Log dirty pages in another way from now on (one of vmm.tracking.CHOICES), with nothing lost."""

    tracking: str


class Mark(Verb):
    """A host write was made: these pages are dirty."""

    slot: Number
    first: Number
    count: Number


class RecordStart(Verb):
    """From now on what is harvested from the rings is also put into the queue ``record`` (a dirty trace), until
    ``RecordStop`` or the end of process ``owner``. One recording at a time."""

    owner: Pid


class RecordStep(Verb):
    """Reap now, if nothing else does, so that the trace's times are exact. The answer: ``going_on``, false when
    the machine has ended."""


class RecordStop(Verb):
    """Flush, and end the recording."""


class MemoryAdd(Verb):
    slot: Number
    gpa: Number
    size: Number
    log: bool


class MemoryRemove(Verb):
    slot: Number


AnyVerb = (Events | Start | Status | State | SetState | Incoming | Arrived | Pause | Resume
           | Stop | Release | LogStart | LogStop | Register
           | Unregister | Sync | DirtyLimit | SetTracking | Mark | RecordStart | RecordStep | RecordStop
           | MemoryAdd | MemoryRemove)

_verbs = msgspec.json.Decoder(AnyVerb)


class _Envelope(msgspec.Struct):
    """What can be read of a request that does not decode."""

    v: Number = 0
    id: Number = 0


def decode_verb(frame: bytes) -> AnyVerb:
    """Raises VmmError, with the request's id as ``request_id``, whatever the bytes are."""
    envelope = _Envelope()
    try:
        envelope = msgspec.json.decode(frame, type=_Envelope)
        if envelope.v == CONTROL_VERSION:
            return _verbs.decode(frame)
        what = (f"the machine's program speaks version {CONTROL_VERSION} of the control protocol, and was asked in "
                f"version {envelope.v}: use the program that started the machine")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        what = f"bad request: {exc}"
    error = VmmError(what)
    error.request_id = envelope.id  # type: ignore[attr-defined]
    raise error from None
