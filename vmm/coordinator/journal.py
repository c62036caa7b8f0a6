"""The journal: what a replacement coordinator must know beyond the machine's other shared memory.

It is the one place that says what the machine is: which slots and clients there are, who holds what, how it tracks.
A verb changes the machine in such an order that at each moment either the journal is true, or what differs from it
can be told by looking, and is put right by whoever takes over (vmm/coordinator/takeover.py):

* What is **made** (segments, a slot in the workers) is made first, and then written down. Until then nothing counts
  on it: a successor removes what the journal does not name.
* What **goes** is struck out first, and then removed. Until then nothing counts on its absence: the same holds.
* What is **switched** (logging, tracking) is written down first, and then done. A successor does what is left of
  it.

Should the writing fail, the verb fails, and has done nothing. Writing needs no memory that is not there already
(ipc/journal.py) but when the journal grows.
"""

from __future__ import annotations

import msgspec

from ipc.journal import Journal as Record
from ipc.linux.processid import ProcessId
from ipc.messages import UNREADABLE, Exited
from ipc.shm import SegmentError

from ..dirty.log import LogClient
from ..dirty.verify import Verification
from ..errors import ExitCode, VmmError
from ..machine.names import segment_name
from ..machine.spec import RamSlot
from .leases import Lease
from .limits import Limit
from .owners import Hold
from .pauses import HandedOver
from .writes import HostWrite

__all__ = ["VERSION", "Holds", "Journal", "Saved"]

VERSION = 1
_ROOM, _ROOM_PER_VCPU = 1 << 16, 1 << 11    # bytes; of a vCPU: who it is, and how it ended, with its registers


class Holds(msgspec.Struct):
    """Who has what of the machine: the user, and processes."""

    user_paused: bool
    pauses: list[Hold]
    handed_over: HandedOver | None
    leases: list[Lease]
    user_limits: list[int]      # of each vCPU, pages per second
    limits: list[Limit]
    clients: list[Hold]
    writes: list[HostWrite]
    incoming: ProcessId | None  # fills in the memory


class Saved(msgspec.Struct, kw_only=True):
    """Times are seconds of CLOCK_MONOTONIC, which is one for all processes."""

    version: int = VERSION
    restarts: int                           # coordinators that died
    generation: int                         # the last that was given to anything
    requests: list[str]                     # verbs that have been carried out and may be asked for again
    slots: list[RamSlot]
    reused: list[int]                       # ids that had another slot before
    clients: list[LogClient]
    holds: Holds
    workers: list[ProcessId]                # by vCPU index
    exits: dict[int, Exited]
    started: float | None                   # when the guest was let go
    elapsed: float | None                   # seconds that it ran, once it has ended
    stopping: int                           # an ExitReason: why it has been asked to end
    stopped_by: str                         # the same for people
    tracking: str                           # one of vmm.machine.trackings.MODES
    asked_tracking: str                     # one of vmm.machine.trackings.CHOICES
    logging: bool                           # the vCPUs log, because somebody needs it
    incoming: bool                          # its memory comes from elsewhere, and has not arrived
    verification: Verification | None


class Journal:
    """The record, written and read as ``Saved``."""

    def __init__(self, record: Record) -> None:
        self._record = record

    @classmethod
    def create(cls, machine: str, vcpus: int) -> Journal:
        """Raises SegmentError."""
        return cls(Record.create(segment_name(machine, "journal"), _ROOM + vcpus * _ROOM_PER_VCPU))

    @classmethod
    def adopt(cls, machine: str) -> tuple[Journal, Saved]:
        """Of a coordinator that died. Raises VmmError where it cannot be read."""
        try:
            record, text = Record.adopt(segment_name(machine, "journal"))
        except SegmentError as exc:
            raise VmmError(f"machine '{machine}' cannot be taken over: {exc}", ExitCode.WORKER_DIED) from None
        try:
            saved = msgspec.json.decode(text, type=Saved)
        except UNREADABLE as exc:
            record.close()
            raise VmmError(f"machine '{machine}' cannot be taken over: its journal was written by another version "
                           f"of this program ({exc})", ExitCode.WORKER_DIED) from None
        return cls(record), saved

    @property
    def segments(self) -> tuple[str, str]:
        """Names of those that are its."""
        return self._record.names

    def write(self, saved: Saved) -> None:
        """Whole, or not at all. Raises VmmError where there is no room for it."""
        try:
            self._record.write(msgspec.json.encode(saved))
        except OSError as exc:
            raise VmmError(f"the machine's journal cannot be written: {exc.strerror or exc} (is /dev/shm "
                           "full?)") from None

    def close(self) -> None:
        """Idempotent."""
        self._record.close()
