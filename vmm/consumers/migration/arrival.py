"""The report of a machine that arrives, as its target has it: kept where ``vmm migrate status`` finds it, like the
source's (vmm/consumers/migration/status.py), with the same fields."""

from __future__ import annotations

import time

import msgspec

from ipc.linux.processid import identity

from ...errors import one_line
from ...machine.records import now
from .pages import PAGE
from .report import OVER, Report, RoundReport
from .status import save_status
from .wire import Done, Offer, RoundEnd

__all__ = ["Arrival"]

_SHOWN = 64         # characters of a name that the source gives


class Arrival:
    """From the offer on; before there is one, nothing is kept."""

    def __init__(self, address: str, *, upgrade: bool = False) -> None:
        self._address = address
        self._upgrade = upgrade
        self._began = self._round_began = time.monotonic()
        #: None: no offer was taken yet.
        self.report: Report | None = None

    def begin(self, offer: Offer, name: str) -> None:
        """The machine of this offer is there, under this name, and its memory is awaited."""
        self._began = time.monotonic()
        process = identity()
        self.report = Report(one_line(offer.id, _SHOWN), name, self._address, direction="incoming",
                             source=one_line(offer.spec.name, _SHOWN), pid=process.pid, pid_started=process.start,
                             upgrade=self._upgrade)
        self.report.ram.total = sum(slot.size for slot in offer.spec.slots)
        self.report.ram.remaining = 0 if offer.segments else self.report.ram.total      # in place: it is there

    @property
    def origin(self) -> str:
        """How it comes, for people: completes "it arrives …"."""
        assert self.report is not None
        how = "in an upgrade" if self._upgrade else "by migration"
        return f"{how} from machine '{self.report.source}' (migration {self.report.id})"

    def taking(self) -> None:
        """The first page may come."""
        assert self.report is not None
        self._round_began = time.monotonic()
        self.report.setup_time = (self._round_began - self._began) * 1000
        self.tell("active")

    def round(self, said: RoundEnd) -> None:
        """All of this round has come."""
        assert self.report is not None
        report, ram, ended = self.report, self.report.ram, time.monotonic()
        took = max(ended - self._round_began, 1e-6)
        self._round_began = ended
        report.rounds.append(RoundReport(said.pages, said.zero, round(took, 4), said.transferred))
        ram.transferred += said.transferred
        ram.duplicate += said.zero
        ram.normal += said.pages - said.zero
        ram.normal_bytes = ram.normal * PAGE
        ram.dirty_sync_count += 1
        ram.remaining = 0       # what is dirty by now, the source alone knows
        ram.pages_per_second, ram.mbps = round(said.pages / took), said.transferred * 8 / 1e6 / took
        report.weigh()
        self.tell(report.status)

    def lack(self, pages: int) -> None:
        """Post-copy: so many pages are missing; now and then."""
        assert self.report is not None
        self.report.ram.remaining = pages * PAGE
        self.tell(self.report.status)

    def complete(self, blocked: list[float], latency: dict[str, float]) -> None:
        """Post-copy: no page is missing; each vCPU has waited so many milliseconds for some, so long for one."""
        assert self.report is not None
        self.report.postcopy_latency = latency
        self.report.postcopy_blocktime = blocked
        self.tell("completed")

    def tell(self, status: str, error: str = "") -> None:
        """How it is now. Nothing without an offer, or when all is over."""
        report = self.report
        if report is None or report.status in OVER:
            return
        report.status, report.error = status, error
        report.total_time = (time.monotonic() - self._began) * 1000
        if status in OVER:
            report.ended_at = now()
            report.sum_up()
        save_status(report)

    def heard(self, done: Done) -> None:
        """The source's last word: from now on both reports have the same counts."""
        report = self.report
        if report is None or report.status != "completed":
            return
        report.downtime, report.downtime_parts = done.downtime, done.parts
        if done.counts is not None:
            for name, count in msgspec.structs.asdict(done.counts).items():
                setattr(report.ram, name, count)
        report.sum_up()
        save_status(report)
