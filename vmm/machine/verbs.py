"""The verbs of the control socket: what the CLI and the Python API may ask a coordinator for.

JSON, one document per line, over the Unix socket ``control`` in the machine's runtime directory; docs/protocol.md
has a paragraph for each verb. A client sends ``{"v": 2, "id": n, "verb": …, …}`` and gets ``{"id": n, "result":
{…}}`` or ``{"id": n, "error": text, "code": exit status}``. vmm/client/connection.py is the client's end,
vmm/coordinator/server.py the coordinator's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

import msgspec

from ipc.messages import UNREADABLE

from ..errors import VmmError, one_line

__all__ = ["CONTROL_VERSION", "MARKED_WORDS", "VERB_NAMES", "Owned", "Verb", "decode_verb"]

CONTROL_VERSION = 2
MARKED_WORDS = 1 << 16      # of 64 pages, in a ``MarkFor``

#: One that Python, numpy and C agree on; whether a verb can do anything with it, it says itself.
Number = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


def _dashed(name: str) -> str:
    """``LogStart`` -> ``log-start``."""
    return "".join("-" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name))


class Verb(msgspec.Struct, tag_field="verb", tag=_dashed, forbid_unknown_fields=True, kw_only=True):
    """``lease``: the token of a lease that whoever asks has (``TakeLease``); some verbs are its holder's alone.
    ``request``: the client's name for it, that no other request has. One that is sent again, because the connection
    broke before the answer came, has the same; what must not be done twice is not."""

    v: Number
    id: Number
    lease: str = ""
    request: str = ""


class Owned(Verb, kw_only=True):
    """Something is to belong to the process that asks, and go with it. ``owner_start``: when that process started
    (ipc/linux/processid.py); which one it is, the coordinator sees from the connection. ``why``: for people. 0: it
    is nobody's, and stays."""

    owner_start: Number = 0
    why: str = ""


class Events(Verb):
    """The events after the first ``after`` of this machine; -1: those from now on. The answer, ``events``, ``next``
    (what to ask for then) and ``dropped`` (so many came too early for whoever asks only now), is held back until
    there is one. Of one connection only the last such request is answered."""

    after: Number = -1


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
    guest stands still, until ``Thaw`` or the lease's end. The answer: ``writing``, host writes that began before;
    whoever asks asks again until there is none."""

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
    """End every vCPU (reason stopped); the reply is sent at once, ``ended`` follows as an event. ``why``: for
    people, in the report; empty: on request."""

    why: str = ""


class Release(Verb):
    """The machine has ended and its report was taken: go."""


class LogStart(Verb):
    slot: Number


class LogStop(Verb):
    slot: Number


class Register(Owned):
    """With ``owner_start``: the client is unregistered when the process that asks ends, and nobody else may sync or
    unregister it. ``like``: begin with what that other client has gathered, which stays as it is."""

    client: str
    like: str = ""


class Unregister(Verb):
    client: str


class MarkFor(Verb):
    """These pages are dirty for this client alone, in its next sync: it is known from elsewhere (from the host that the
    machine was on before). ``bits``: a bit for each page, from the lowest of word ``word`` of 64 pages on, whole words,
    at most 65,536; zlib, base64."""

    client: str
    slot: Number
    word: Number
    bits: str


class Sync(Verb):
    """Flush, then give this client what was dirtied since its last sync. ``again``: the last one's
    answer was not received; what it took is given once more, and nothing is lost. The answer: ``slots``, and
    ``at`` and ``vcpu_pages``, the monotonic time of the flush and each vCPU's pages until then."""

    client: str
    again: bool = False


class DirtyLimit(Owned):
    """At most so many pages per second, of one vCPU or (null) of each; 0 lifts the limit. Without ``token``: the
    user's, which stays. With one, made up by who asks: its own, over the user's, until ``GiveBack`` or its end. The
    least counts."""

    pages_per_s: Number
    vcpu: Number | None = None
    token: str = ""


class SetTracking(Verb):
    """Switch to another tracking mode (one of vmm.machine.trackings.CHOICES), with nothing lost."""

    tracking: str


class Slots(Verb):
    """The memory slots as they are now. Answer: ``slots``, {id: {``gpa``, ``size``, ``born``, ``logged``, ``ram``:
    name of its segment}}; ``accelerator``; ``incoming``."""


class Mark(Owned):
    """A host write: these pages are dirty. ``when``: ``before`` and ``after`` go together by their ``token``,
    around a write that a freeze waits for (vmm/client/holds.py), and the pages are dirty in every sync in between;
    ``made`` stands alone, after one that nobody knew of. ``born``: of the slot that is meant; null: of whichever
    is there now."""

    slot: Number
    first: Number
    count: Number
    born: Number | None = None
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


class ProgramMaps(Verb):
    """Of a machine that runs Linux programs: what each process has mapped (workers/linux/survey.py). ``client``: of the
    dirty log; what its last sync gave is counted in each mapping."""

    client: str = ""


class ProgramTrace(Verb):
    """Of a machine that runs Linux programs: the system calls that were made after the first ``after`` (-1: none of
    those so far; workers/linux/tracing.py). ``tracer``: made up by who asks; calls are kept until it has not asked for
    a while, or says that it does not want them any more (``on``)."""

    tracer: str
    on: bool = True
    after: Number = -1


class MemoryAdd(Verb):
    slot: Number
    gpa: Number
    size: Number
    log: bool


class MemoryRemove(Verb):
    """``force``: although it holds the guest's image or stacks."""

    slot: Number
    force: bool = False


AnyVerb = (Events | Start | Status | State | SetState | Incoming | Arrived | Pause | Resume
           | TakeLease | Freeze | Thaw | HandOver | TakeBack | GiveBack
           | Stop | Release | LogStart | LogStop | Register
           | Unregister | MarkFor
           | Sync | DirtyLimit | SetTracking | Slots | Mark | RecordStart | RecordStep | RecordStop
           | ProgramMaps | ProgramTrace | MemoryAdd | MemoryRemove)

#: Each by its number in a mark (ipc/lanes.py).
VERB_NAMES: list[str] = [each.__name__ for each in get_args(AnyVerb)]

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
        what = (f"the machine speaks version {CONTROL_VERSION} of the control protocol, but the request is version "
                f"{envelope.v}: use the program that started the machine")
    except UNREADABLE as exc:
        what = f"bad request: {one_line(str(exc))}"
    error = VmmError(what)
    error.request_id = envelope.id  # type: ignore[attr-defined]
    raise error from None
