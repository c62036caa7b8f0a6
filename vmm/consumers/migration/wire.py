"""What a migration's two ends say to each other, in MessagePack.

One control connection, ZeroMQ DEALER -> ROUTER, and several for pages, which are plain sockets
(vmm/consumers/migration/streams.py). A message of the control connection is two frames: the message, its checksum
(XXH3, 64 bits). It is the connection that made the offer; those for pages say the token of that offer first (Join),
and so does a source that takes over from another (Commit). A peer that does neither is a stranger, and is not
listened to.

A round of pages ends with a barrier: the target acknowledges when it has every message of the round, so that a page
of the next round cannot be overtaken by an older copy.

The target trusts nothing: a message is decoded into one of these types or refused, and what it names is checked
against the machine that was offered before a byte is written. The pages themselves are in
vmm/consumers/migration/pages.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import xxhash

from ipc.messages import UNREADABLE
from workers.state import STATE_VERSION

from ...errors import VmmError, one_line
from ...machine.spec import MachineSpec

__all__ = ["POSTCOPY", "VERSION", "Abort", "Accept", "Alive", "Answer", "Buffer", "Busy", "Check", "Checked", "Commit",
           "Complete", "Counts", "Done", "Ended", "Gathered", "Join", "Message", "Missing", "Needs", "Offer",
           "OnStream", "OtherVersion", "Pages", "Part", "Ping", "Prepared", "Ready", "Received", "Refused", "RoundAck",
           "RoundEnd", "Running", "State", "Torn", "Unknown", "Want", "WhenReady", "WireError", "decode_answer",
           "decode_message", "decode_stream", "frames"]

VERSION = 6
POSTCOPY = 1 << 30          # round number of pages that are sent after Commit

Buffer = bytes | memoryview
#: Of the downtime (report.py).
Part = Literal["pause", "sync", "pages", "state", "hand_over", "start"]
Count = Annotated[int, msgspec.Meta(ge=0)]


class WireError(VmmError):
    """The other end sent something that it must not."""


class OtherVersion(WireError):
    """The other end speaks another version of this protocol."""


class Wire(msgspec.Struct, frozen=True, tag_field="t", forbid_unknown_fields=True):
    pass


# --- source to target ------------------------------------------------------------------------------------


class Needs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a machine needs of its target beside its specification: ``features``, the CPU features that its guest was
    shown; pages in this encoding read; post-copy; vCPU states of this version. ``accel``: that of the source."""

    accel: str = ""
    features: list[str] = []
    compression: str = "none"
    postcopy: bool = False
    state_version: int = STATE_VERSION


class Check(Wire, frozen=True, tag="check"):
    """Could this machine come? By anybody, who is not listened to any further."""

    version: int
    program: str
    spec: MachineSpec
    needs: Needs


class Offer(Wire, frozen=True, tag="offer"):
    """The machine that is to come. Its memory slots are as they are, its image is for snapshots later on. ``token``
    names this migration: it is known to its two ends alone; ``id`` names it to people. ``postcopy``: memory may come
    after the start. ``segments``: of a machine whose memory is handed over in place, by slot; no pages are sent
    then. ``proof``: the segment that shows that they are the target's, too."""

    version: int
    program: str
    token: str
    spec: MachineSpec
    image: bytes
    postcopy: bool
    id: str = ""
    needs: Needs = Needs()
    segments: dict[int, str] = {}
    proof: str = ""


class Join(Wire, frozen=True, tag="join"):
    """First on each connection for pages: it belongs to the migration of this token. ``asked``: what the target wants
    at once (``want``) it may say here, and is answered here."""

    token: str
    asked: bool = False


class Pages(Wire, frozen=True, tag="pages"):
    """Pages of a slot: their numbers (uint32, little endian, ascending). Behind it come their bytes one after the
    other, encoded; none for pages that are zero. All pages are zero at first. ``sum``: XXH3 of those bytes; empty
    where nothing can damage them on their way."""

    round: int
    slot: int
    numbers: bytes
    encoding: Literal["zero", "none", "zstd", "lz4"]
    sum: bytes = b""


class RoundEnd(Wire, frozen=True, tag="round-end"):
    """``messages`` of Pages were sent in this round; with so many pages, of them so many that are zero, and so many
    bytes, for the target's report."""

    round: int
    messages: int
    pages: int = 0
    zero: int = 0
    transferred: int = 0


class WhenReady(Wire, frozen=True, tag="when-ready"):
    """After the first round: the target is to say when the machine's processes are there. Until then the guest runs."""


class Missing(Wire, frozen=True, tag="missing"):
    """Post-copy, before State: pages of this slot that were not sent, or have changed since (``bits``, one per page
    from the lowest, zstd). They follow after Commit, as Pages of round POSTCOPY. And the target's answer to a
    repeated Commit: what is still missing."""

    slot: int
    bits: bytes


class Gathered(Wire, frozen=True, tag="gathered"):
    """Before State: the pages of this slot (``bits``, as in Missing) that this client of the dirty log has gathered,
    which gathers on at the target: what was dirtied since a snapshot. And at the beginning, with no pages: it will
    come."""

    client: str
    slot: int
    bits: bytes


class State(Wire, frozen=True, tag="state"):
    """The system slot's memory (zstd), the vCPUs' states (workers/state.py), and the specification as it is now: it
    has the slots of the offer, and the settings that were made since. ``paused``: by its user, and so it stays."""

    system: bytes
    vcpus: list[dict[str, Any]]
    spec: MachineSpec
    paused: bool


class Commit(Wire, frozen=True, tag="commit"):
    """The source will never run this machine again: the target starts it. May be repeated, on another connection
    too, which then takes the place of the first."""

    version: int
    token: str


class Counts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the source's report (report.Ram), when all is over."""

    transferred: Count = 0
    duplicate: Count = 0
    normal: Count = 0
    normal_bytes: Count = 0
    resent: Count = 0
    postcopy_requests: Count = 0
    postcopy_pages: Count = 0


class Done(Wire, frozen=True, tag="done"):
    """The source has heard that the machine runs (post-copy: that it is complete) and has ended. ``downtime`` and
    its ``parts``: as the source has measured them, in milliseconds; ``counts``: what it has sent in all."""

    downtime: float = 0.0
    parts: dict[Part, float] = {}
    counts: Counts | None = None


class Abort(Wire, frozen=True, tag="abort"):
    """The source gives up; ``reason`` is for a person."""

    reason: str


class Ping(Wire, frozen=True, tag="ping"):
    """The source is alive."""


# --- target to source ---------------------------------------------------------------------------------------


class Received(Wire, frozen=True, tag="received"):
    """The offer has come; making room for the machine may take a while."""


class Accept(Wire, frozen=True, tag="accept"):
    """There is memory for the machine's; its processes may still be being made. ``no_postcopy``: why there can be none;
    ``encodings``: those of pages that can be read; empty: all. ``certificate`` (DER): what the connections for pages
    are encrypted by (vmm/consumers/migration/tls.py); empty where there are no keys."""

    no_postcopy: str = ""
    encodings: list[str] = []
    certificate: bytes = b""


class Alive(Wire, frozen=True, tag="alive"):
    """Every second. ``messages`` of Pages have come so far: a source that waits sees whether there is progress."""

    messages: int


class Torn(Wire, frozen=True):
    """Pages that did not arrive with the sum they were sent with: the guest wrote to them on their way, or they
    were damaged. ``sums``: XXH3 (8 bytes each) of what is there now; none of pages that could not be unpacked."""

    slot: int
    numbers: bytes
    sums: bytes


class RoundAck(Wire, frozen=True, tag="round-ack"):
    """All pages of the round are here, but for those in ``torn``."""

    round: int
    torn: list[Torn] = []


class Ready(Wire, frozen=True, tag="ready"):
    """The machine's processes are there, and wait for its state."""


class Prepared(Wire, frozen=True, tag="prepared"):
    """Everything is in its place; waits for Commit."""


class Running(Wire, frozen=True, tag="running"):
    """The machine runs at the target."""


class Want(Wire, frozen=True, tag="want"):
    """Post-copy: a vCPU waits for these pages (as in Pages.numbers)."""

    slot: int
    numbers: bytes


class Complete(Wire, frozen=True, tag="complete"):
    """Post-copy: every page is here; ``blocked``: milliseconds that each vCPU has waited for some, ``latency``: how
    long for one (report.py)."""

    blocked: list[float]
    latency: dict[str, float] = {}


class Refused(Wire, frozen=True, tag="refused"):
    """The target does not have the machine, and never will: what there was of it is gone."""

    error: str


class Checked(Wire, frozen=True, tag="checked"):
    """Answer to Check: all that is in the way (none: it could come), and what should be known beside; the machine's
    name and accelerator there."""

    problems: list[str]
    notes: list[str]
    name: str
    accel: str


class Busy(Wire, frozen=True, tag="busy"):
    """Answer to an offer while another machine is being received: it may be made again later."""


class Ended(Wire, frozen=True, tag="ended"):
    """Post-copy: the machine has run here and ended before all of its memory had come."""

    error: str


class Unknown(Wire, frozen=True, tag="unknown"):
    """Answer to a Commit whose token is of no migration here: another receiver is at this address now."""


OnStream = Join | Pages | Want      # on connections for pages
Message = Check | Offer | RoundEnd | WhenReady | Missing | Gathered | State | Commit | Done | Abort | Ping
Answer = (Received | Accept | Alive | RoundAck | Ready | Prepared | Running | Missing | Want | Complete | Refused
          | Ended | Unknown | Busy | Checked)


class _AnyVersion(msgspec.Struct):
    """What every version's offer and commit begin with."""

    t: str = ""
    version: int = VERSION
    program: str = "another program"


_encoder = msgspec.msgpack.Encoder()
_messages = msgspec.msgpack.Decoder(Message)
_answers = msgspec.msgpack.Decoder(Answer)
_stream = msgspec.msgpack.Decoder(OnStream)
_any_version = msgspec.msgpack.Decoder(_AnyVersion)


def frames(message: Wire) -> list[bytes]:
    """Of a message: itself, and its checksum."""
    frame = _encoder.encode(message)
    return [frame, xxhash.xxh3_64_digest(frame)]


def decode_message(frame: Buffer, digest: Buffer) -> Message:
    """What a source says. Raises OtherVersion (as far as that can be told), else WireError."""
    try:
        if xxhash.xxh3_64_digest(frame) == bytes(digest):
            found = _messages.decode(frame)
            if isinstance(found, Offer | Commit | Check) and found.version != VERSION:
                raise msgspec.ValidationError("of another version")
            return found
        why = "it was damaged in transit"
    except UNREADABLE as exc:
        why = one_line(str(exc))
    _look_for_version(frame)
    raise WireError(f"the source sent something that is not a message of protocol {VERSION}: {why}")


def decode_stream(frame: Buffer, digest: Buffer) -> OnStream:
    """What comes over a connection for pages, either way. Raises WireError."""
    try:
        if xxhash.xxh3_64_digest(frame) == bytes(digest):
            return _stream.decode(frame)
        why = "it was damaged in transit"
    except UNREADABLE as exc:
        why = one_line(str(exc))
    raise WireError(f"the other end sent something on a connection for pages that is not a message of protocol "
                    f"{VERSION}: {why}")


def _look_for_version(frame: Buffer) -> None:
    """Raises OtherVersion."""
    try:
        other = _any_version.decode(frame)
    except UNREADABLE:
        return
    if other.t in ("offer", "commit", "check") and other.version != VERSION:
        raise OtherVersion(f"the source ({other.program[:40]}) speaks migration protocol {other.version}, but "
                           f"this program speaks {VERSION}")


def decode_answer(received: list[bytes]) -> Answer:
    """What a target says, as received. Raises WireError."""
    try:
        answer = _answers.decode(received[0])
    except UNREADABLE as exc:
        raise WireError(f"the target sent something that is not an answer of protocol {VERSION}: "
                        f"{one_line(str(exc))}") from None
    if len(received) != 2 or xxhash.xxh3_64_digest(received[0]) != received[1]:
        if isinstance(answer, Refused):     # a target of another version says it so
            return answer
        raise WireError("the target's answer was damaged in transit")
    return answer
