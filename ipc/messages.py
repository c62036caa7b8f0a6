"""Messages between coordinator and vCPU workers: msgspec tagged structs in MessagePack.

Two sockets a worker, so that each is used by one thread alone (ZeroMQ sockets are not thread-safe):

* **request** (coordinator ROUTER, worker DEALER, the worker's service thread): the coordinator asks,
  each request is answered by exactly one :class:`Done` or :class:`Failed` with the same ``seq``.
* **notify** (coordinator PULL, worker PUSH, the vCPU thread): :class:`Hello`, :class:`RingFull`,
  :class:`KickAck`, :class:`Console`, :class:`Exited`.

Pause, resume, stop and kick are not messages: they are a word in the control block, the
immediate-exit flag and a signal (workers/vcpu.py), acknowledged by a notification. Nor is the reset of a
ring, which comes too often for that: it is two words in the control block, each with a futex wake.

Decoding checks types and refuses unknown tags; unknown *fields* are ignored, so that a newer peer
may add some. docs/protocol.md has a paragraph a message. Never pickle.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from .layout import PROTOCOL_VERSION, ExitReason, Tracking
from .oneline import one_line

__all__ = [
    "DETAIL_MAX",
    "UNREADABLE",
    "BitmapPlace",
    "ClearLog",
    "Console",
    "Done",
    "ExitReason",
    "Exited",
    "Failed",
    "GetLog",
    "GetState",
    "Hello",
    "KickAck",
    "MessageError",
    "Notification",
    "ProgramCalls",
    "ProgramMaps",
    "ProgramSpec",
    "ProgramTrace",
    "RebuildRing",
    "RemoveMemslot",
    "ReplayPhase",
    "ReplaySpec",
    "Request",
    "RingFull",
    "SendFd",
    "SetMemslot",
    "SetMemslots",
    "SetState",
    "SetTracking",
    "Shutdown",
    "SlotSpec",
    "Userfault",
    "WorkerSpec",
    "decode_notification",
    "decode_reply",
    "decode_request",
    "decode_spec",
    "encode",
]


#: Characters of what is said about a vCPU's end.
DETAIL_MAX = 1000


#: What msgspec raises for bytes that it cannot make sense of: the latter two are not of its own kind (text that is no
#: UTF-8 where it is not looked at closely, and what is nested a thousand times). Whoever decodes what another process
#: or a file says catches these.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class MessageError(Exception):
    """A frame that is not a message of this protocol."""


class Wire(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of all messages."""


class SlotSpec(Wire, frozen=True):
    """A memory slot as a worker needs it."""

    id: int
    gpa: int                    # bytes
    size: int                   # bytes
    segment: str                # name of the shared-memory segment that backs it, whole
    log: bool = False           # dirty logging on
    log_segment: str = ""       # bitmap mode: this vCPU's own log buffer for the slot; replay with
                                # verification: its record of the pages it wrote, with a summary


class BitmapPlace(Wire, frozen=True):
    """Where a bitmap without its summary is (ipc/bitmap.py)."""

    segment: str
    offset: int                 # bytes


class ReplayPhase(Wire, frozen=True):
    """A stretch of writes in one pattern (workers/accel/replay/layout.py, Pattern)."""

    pattern: str                # "sequential" | "strided" | "random" | "zipf"
    writes: int = 0             # of each vCPU; 0: for ever
    stride: int = 1             # strided: pages
    exponent: float = 1.0       # zipf


class ReplaySpec(Wire, frozen=True):
    """What a worker of the replay accelerator dirties: phases in their order, or its part of a trace."""

    phases: list[ReplayPhase] = []
    rate: float = 0.0           # writes a second of each vCPU; 0: as fast as it can
    seed: int = 0
    shared: bool = False        # every vCPU writes to all pages, else each to its own share of them
    repeat: bool = False        # a page makes an entry at each write, not only when it was reset in between
    trace_segment: str = ""     # shared memory with this vCPU's part (ipc/traces/segment.py)
    speed: float = 0.0          # of a trace, against its own times; 0: as fast as it can


class ProgramSpec(Wire, frozen=True, kw_only=True):
    """A Linux program, and what it finds. Paths are absolute."""

    path: str                   # of the program, as it sees it
    args: list[str]             # the first is what it is called by
    env: list[str]              # "NAME=value"
    root: str = ""              # on the host: a directory or a tar file; empty: nothing is there
    files: dict[str, str] = {}  # {path as the program sees it: on the host}
    directory: str = "/"        # where it starts
    seed: int | None = None     # of its random numbers; None: it finds others each time
    console: str = "lines"      # "lines": to the machine's console | "streams", "terminal": ipc/consoles.py
    arrives: bool = False       # it has begun elsewhere: nothing is read before its state comes (SetState)
    forward: list[str] = []     # ports of the host that lead to its own (vmm/machine/forwards.py), for who launches it


class WorkerSpec(Wire, frozen=True, kw_only=True):
    """Everything a worker process is told at its start (JSON on an inherited pipe)."""

    version: int = PROTOCOL_VERSION
    machine: str
    index: int
    vcpu_count: int
    accel: str                  # a folder of workers/accel
    privilege: str = "user"     # "user" (CPL 3) | "kernel" (CPL 0)
    ring_entries: int = 0       # 0: no ring
    tracking: str = ""          # name of a Tracking; empty: ring, or bitmap where there is no ring
    ring_segment: str = ""      # software rings: segment of ring_entries * 16 bytes
    slots: list[SlotSpec]       # RAM
    system_slot: SlotSpec       # never logged
    control_segment: str
    belongings: str             # the name that all of the machine goes with (ipc/claims.py)
    request_endpoint: str
    notify_endpoint: str
    fd_socket: str              # path of the Unix socket that takes the vCPU fd ("" if none wanted)
    keeper_fd: int = -1         # inherited pipe: end of file means that nobody owns the machine any more
    boot: dict[str, int]        # initial registers: rip, rsp, rdi, rsi, rdx, cr3, gdt_base, gdt_limit,
                                # idt_base, idt_limit, tss_base (GPAs; vmm/machine/boot.py makes them)
    replay: ReplaySpec | None = None
    nice: int = 0               # of the vCPU's thread and its session, 0 to 19
    program: ProgramSpec | None = None      # this vCPU runs a thread of it; the last vCPU is the system of all

    @property
    def threads(self) -> int:
        """vCPUs of a program's threads; 0 without a program."""
        return 0 if self.program is None else self.vcpu_count - 1

    @property
    def is_system(self) -> bool:
        """It has no CPU, but serves the system calls of the others."""
        return self.program is not None and self.index == self.threads

    @property
    def mode(self) -> Tracking:
        return Tracking[(self.tracking or ("ring" if self.ring_entries else "bitmap")).upper()]


# --- requests (coordinator -> worker) ---------------------------------------------------------


class Request(Wire, frozen=True, tag_field="t"):
    """From the coordinator to one worker; ``seq`` is that of the answer."""

    seq: int


class SetMemslot(Request, frozen=True, tag="set-memslot"):
    """Add a slot, or change its logging. The vCPU is paused. One of this id that has another segment is another
    slot, and goes."""

    slot: SlotSpec


class RemoveMemslot(Request, frozen=True, tag="remove-memslot"):
    """There is no such slot any more. Nothing to do where there was none."""

    slot_id: int


class SetMemslots(Request, frozen=True, tag="set-memslots"):
    """These are the slots, with their logging: others are removed, missing ones added. From a coordinator that
    replaces one which may have died in the middle of a change. The vCPU is paused."""

    slots: list[SlotSpec]


class GetLog(Request, frozen=True, tag="get-log"):
    """Bitmap mode: KVM_GET_DIRTY_LOG of the slot into its log segment. Uffd mode: protect the written pages of the
    slot again, and set their bits in its log segment, which the coordinator clears when it has taken them.
    Done.value: dirty pages in the log segment."""

    slot_id: int


class ClearLog(Request, frozen=True, tag="clear-log"):
    """Bitmap mode: re-protect the pages whose bits are set in the slot's log segment."""

    slot_id: int


class RebuildRing(Request, frozen=True, tag="rebuild-ring"):
    """Replace a ring that has lost count: a fresh one, indices at zero, vCPU state kept. On kvm the
    new vCPU fd is sent over the fd socket before Done."""


class SetTracking(Request, frozen=True, tag="set-tracking"):
    """Log in another way from now on. The vCPU is paused and its log has been drained: what is still in it is
    dropped. The indices of a ring are at zero afterwards. The control block's ``tracking`` says when it is done; on
    kvm the vCPU fd may be another one then (``send-fd``)."""

    tracking: str                       # name of a Tracking
    ring_entries: int                   # 0 unless ``ring``
    ring_segment: str                   # of a software ring
    log_segments: dict[int, str]        # {slot id: its log segment}, with ``bitmap`` and ``uffd``


class SendFd(Request, frozen=True, tag="send-fd"):
    """Send the vCPU fd over the fd socket again (to a coordinator that replaces one that died).
    Done.value: bytes of kvm_run, 0 when there is no fd to send."""


class GetState(Request, frozen=True, tag="get-state"):
    """Architectural state; the vCPU is out of the guest. Done.data: {name: value}. A program's system is asked when all
    its threads have answered: what they are about to ask it is in their mailboxes by then."""


class SetState(Request, frozen=True, tag="set-state"):
    """Give the vCPU, which has not started, this architectural state (workers/state.py). It is paused."""

    state: dict[str, Any]


class Userfault(Request, frozen=True, tag="userfault"):
    """Post-copy: from now on whoever touches a page of RAM that is missing waits for it. The userfaultfd is sent
    to the Unix socket ``socket``. Done.data: {slot id in decimal: address of the slot in the worker}. An empty
    ``socket`` ends it: every page is there."""

    socket: str


class ProgramMaps(Request, frozen=True, tag="program-maps"):
    """Of the system of Linux programs, paused or not: what each process has mapped. Done.data: workers/linux/survey.py.
    ``bitmaps``: {slot id: pages that are counted in each mapping}; empty: none are."""

    bitmaps: dict[int, BitmapPlace]


class ProgramTrace(Request, frozen=True, tag="program-trace"):
    """Of the system of Linux programs, paused or not: the calls that were made after the first ``after`` (-1: none that
    were made so far). Done.data: workers/linux/tracing.py. Calls are kept as long as each ``client`` asks for them
    often enough, or has said that it does not want them any more (``on``)."""

    client: str
    on: bool
    after: int


class Shutdown(Request, frozen=True, tag="shutdown"):
    """Tear down and exit the process with status 0."""


AnyRequest = (SetMemslot | SetMemslots | RemoveMemslot | GetLog | ClearLog | RebuildRing | SetTracking | SendFd
              | GetState | SetState | Userfault | ProgramMaps | ProgramTrace | Shutdown)


# --- replies (worker -> coordinator) -----------------------------------------------------------


class Done(Wire, frozen=True, tag_field="t", tag="done"):
    """The request was carried out; ``value`` and ``data`` are what it asked for."""

    seq: int
    value: int = 0
    data: dict[str, Any] | None = None


class Failed(Wire, frozen=True, tag_field="t", tag="failed"):
    """It was not; ``error`` is one line for a person."""

    seq: int
    error: str


# --- notifications (worker -> coordinator) ---------------------------------------------------


class Notification(Wire, frozen=True, tag_field="t"):
    """From a worker, unasked; ``vcpu`` is its index."""

    vcpu: int


class Hello(Notification, frozen=True, tag="hello"):
    """Set up and ready to enter the guest; the vCPU fd has been sent. ``error`` says why not. ``version`` is the
    worker's own."""

    pid: int
    version: int = PROTOCOL_VERSION
    kvm_run_size: int = 0       # bytes to map of the vCPU fd at offset 0
    ring_entries: int = 0
    error: str = ""


class RingFull(Notification, frozen=True, tag="ring-full"):
    """Soft-full: out of the guest until a reset has freed entries."""


class KickAck(Notification, frozen=True, tag="kick-ack"):
    """Was outside the guest after kick number ``kick``."""

    kick: int


class Console(Notification, frozen=True, tag="console"):
    """What the guest has written to its console."""

    data: bytes


class Exited(Notification, frozen=True, tag="exited"):
    """The guest ended on this vCPU. ``registers`` where there is something to look into."""

    reason: ExitReason
    code: Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)] = 0
    detail: Annotated[str, msgspec.Meta(max_length=DETAIL_MAX)] = ""
    registers: dict[str, int] | None = None


class ProgramCalls(Notification, frozen=True, tag="program-calls"):
    """From the system of Linux programs: calls that it has served so far, and those that it does not know, by name,
    with how often each was made; how often a thread or a process was refused, because no vCPU was free."""

    served: Annotated[int, msgspec.Meta(ge=0)]
    missing: dict[Annotated[str, msgspec.Meta(max_length=40)], Annotated[int, msgspec.Meta(ge=0)]]
    refused: Annotated[int, msgspec.Meta(ge=0)] = 0


AnyNotification = Hello | RingFull | KickAck | Console | Exited | ProgramCalls
AnyReply = Done | Failed

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(AnyRequest)
_replies = msgspec.msgpack.Decoder(AnyReply)
_notifications = msgspec.msgpack.Decoder(AnyNotification)
_specs = msgspec.json.Decoder(WorkerSpec)


def encode(message: Wire) -> bytes:
    return _encoder.encode(message)


def decode_request(frame: bytes) -> AnyRequest:
    """Raises MessageError."""
    try:
        return _requests.decode(frame)
    except UNREADABLE as exc:
        raise MessageError(f"bad request: {one_line(str(exc))}") from None


def decode_reply(frame: bytes) -> AnyReply:
    """Raises MessageError."""
    try:
        return _replies.decode(frame)
    except UNREADABLE as exc:
        raise MessageError(f"bad reply: {one_line(str(exc))}") from None


def decode_notification(frame: bytes) -> AnyNotification:
    """Raises MessageError."""
    try:
        return _notifications.decode(frame)
    except UNREADABLE as exc:
        raise MessageError(f"bad notification: {one_line(str(exc))}") from None


def decode_spec(text: bytes) -> WorkerSpec:
    """Raises MessageError."""
    try:
        return _specs.decode(text)
    except UNREADABLE as exc:
        raise MessageError(f"bad worker specification: {one_line(str(exc))}") from None
