"""What a migration is asked for, and what it says of itself."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ...errors import ExitCode, VmmError
from ...machine.records import now
from .pages import PAGE, Encoding
from .wire import Part

__all__ = ["COMMITTED", "OVER", "Late", "MigrationError", "Options", "Parts", "Ram", "Report",
           "RoundReport", "latency"]

#: Of ``Report.status``: from here on the target runs the machine, or will; it can no longer be cancelled.
COMMITTED = frozenset({"handed-over", "postcopy-active", "postcopy-paused", "completed"})
#: The migration is over, one way or the other.
OVER = frozenset({"completed", "failed", "cancelled", "postcopy-paused", "handed-over-paused"})


_SHORTEST = 100     # us; the histogram of waits begins with it

Late = Literal["cancel", "force", "postcopy"]


class MigrationError(VmmError):
    """The migration failed; the machine keeps running at the source, unless the text says otherwise."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.MIGRATION_FAILED)


@dataclass(frozen=True)
class Options:
    """``bandwidth`` in bytes per second (0: no cap), ``downtime`` in seconds."""

    compression: Encoding = "none"
    channels: int = 2
    bandwidth: float = 0.0
    downtime: float = 0.3       # QEMU's default
    max_rounds: int = 30
    converge: bool = True       # throttle vCPUs that dirty faster than can be sent
    postcopy: bool = False      # resume the guest at the target before all of its memory is there
    postcopy_after: int = 1     # rounds of pre-copy before that
    wait: float = 0.0           # seconds in which the offer is made again to a target that is busy
    timeout: float = 0.0        # seconds until the hand-over, and (0: none for either)
    stall: float = 0.0          # seconds of rounds that leave no less than an earlier one; after either comes this:
    on_timeout: Late = "cancel"
    paused: bool = False        # it stands still at the target until it is resumed there
    keep_source: bool = False   # the machine here is not ended, but stays paused, as one that was handed over
    key: str = ""               # CURVE: own secret key file
    peer: str = ""              # and the target's public one
    insecure: bool = False
    in_place: bool = False      # not copied: the memory itself is handed over, to a target on this host
    upgrade: str = ""           # in place, and the machine called so continues this one (upgrade.py)


@dataclass
class Ram:
    """As QEMU's ``info migrate`` has it; bytes, but for the counts."""

    transferred: int = 0
    remaining: int = 0          # in this round
    total: int = 0
    duplicate: int = 0          # zero pages
    normal: int = 0             # pages sent with their bytes
    normal_bytes: int = 0       # of those, before compression
    dirty_sync_count: int = 0   # rounds
    dirty_pages_rate: int = 0   # pages per second, in the last round
    mbps: float = 0.0           # megabits per second, of late; when it is over, of all since the set-up
    pages_per_second: int = 0
    page_size: int = PAGE
    held: int = 0               # pages dirtied in every round, which wait for the last
    resent: int = 0             # pages sent again because they had not arrived as they were sent
    postcopy_requests: int = 0  # pages that the guest waited for at the target
    postcopy_pages: int = 0     # pages sent after the hand-over, those among them


def latency(waits: list[float]) -> dict[str, float]:
    """Of pages that vCPUs waited for, so many seconds each: ``pages``, ``median_us``, ``p99_us``, ``max_us``, and how
    many took at most 100 us (``upto_100_us``), longer and at most 200 us, longer and at most 400 us, and so on (what is
    empty is left out). Empty without any."""
    if not waits:
        return {}
    ranked = sorted(each * 1e6 for each in waits)
    found = {"pages": float(len(ranked)), "median_us": round(ranked[len(ranked) // 2], 1),
             "p99_us": round(ranked[len(ranked) * 99 // 100], 1), "max_us": round(ranked[-1], 1)}
    counts = Counter(max(0, math.ceil(math.log2(max(each, 1.0) / _SHORTEST))) for each in ranked)
    return found | {f"upto_{_SHORTEST << step}_us": float(counts[step]) for step in sorted(counts)}


class Parts:
    """What a time went to, from when this was made on. ``ms``: milliseconds by part; they add up to all that has been
    measured."""

    def __init__(self) -> None:
        self.ms: dict[Part, float] = {}
        self._at = time.monotonic()

    def end(self, part: Part) -> None:
        """The time since the last end was this part's."""
        before, self._at = self._at, time.monotonic()
        self.ms[part] = self.ms.get(part, 0.0) + (self._at - before) * 1000

    @property
    def total(self) -> float:
        """Milliseconds."""
        return sum(self.ms.values())


@dataclass
class RoundReport:
    """What a round has sent, in bytes and pages; ``zero``: of these pages, those that went without their bytes.
    ``left``: pages that were dirty after it, ``dirtied``: pages that the guest dirtied per second meanwhile; None where
    the guest stood still, and at the target, which does not know."""

    pages: int
    zero: int
    seconds: float
    transferred: int
    left: int | None = None
    dirtied: int | None = None


@dataclass
class Report:
    """Times in milliseconds. ``status``: setup, active, device (the guest is stopped), handed-over,
    postcopy-active, completed, failed, cancelled; handed-over-paused, postcopy-paused: the source gave up after the
    hand-over, and the machine stays paused there. ``pid`` and ``pid_started``: the source's process, whose start
    the second is (clock ticks since the boot, as in /proc/PID/stat). ``warnings``: what went wrong beside, after it
    was completed. ``direction``: "outgoing", or, of a machine that has come here, "incoming"; then ``machine`` is its
    name here, ``source`` the one that it had there, ``target`` the address at which it was awaited, and the process is
    the receiver's. ``began_at``, ``ended_at``: ISO 8601, UTC.

    ``downtime`` is the source's, by its clock: from when it asked for the pause until it had the target's word that the
    machine runs. ``downtime_parts`` add up to it: "pause" (the vCPUs stop), "sync" (the dirty log is asked for the last
    time, limits are lifted), "pages" (the last of them are sent, and are there; in post-copy: which are missing is
    said), "state" (of vCPUs and devices: read, sent, and set at the target), "hand_over" (it is written down that the
    machine is the target's), "start" (it is told so, starts the machine, and says that it runs). Empty, and 0 (not
    known), where another process took over before that word came."""

    id: str
    machine: str
    target: str
    status: str = "setup"
    total_time: float = 0.0
    setup_time: float = 0.0
    downtime: float = 0.0
    downtime_parts: dict[Part, float] = field(default_factory=dict)
    expected_downtime: float | None = None      # None: not known yet
    forecast: dict[str, Any] | None = None      # converge.Forecast in seconds and MB/s; ``at``: of total_time
    settings: dict[str, Any] = field(default_factory=dict)      # as in Options, as they are now; downtime in ms
    compression: str = "none"
    compression_ratio: float = 1.0
    ram: Ram = field(default_factory=Ram)
    rounds: list[RoundReport] = field(default_factory=list)
    throttled: dict[str, float] = field(default_factory=dict)   # {vCPU: quota in MB/s at the end}
    postcopy_blocktime: list[float] = field(default_factory=list)   # each vCPU's wait for pages
    postcopy_latency: dict[str, float] = field(default_factory=dict)    # of one page (see ``latency``)
    error: str = ""
    warnings: list[str] = field(default_factory=list)
    pid: int = 0
    pid_started: int = 0
    direction: str = "outgoing"
    source: str = ""
    upgrade: bool = False       # a half of one (upgrade.py)
    began_at: str = field(default_factory=now)
    ended_at: str = ""

    def sum_up(self) -> None:
        """It is over."""
        ram, seconds = self.ram, (self.total_time - self.setup_time) / 1000
        ram.mbps = ram.transferred * 8 / 1e6 / seconds if seconds > 0 else 0.0
        self.weigh()
        if self.status == "completed":
            ram.remaining = 0

    def weigh(self) -> None:
        """How many bytes of pages there were for each that was transferred so far."""
        if self.ram.transferred:
            self.compression_ratio = self.ram.normal_bytes / self.ram.transferred

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
