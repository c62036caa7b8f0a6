"""How far a migration is: what has been sent is counted into its report, and the report is told now and then, to
whoever migrates and to all who ask for it (vmm/consumers/migration/status.py)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ...machine import records
from .pages import PAGE
from .report import OVER, Report
from .status import save_status
from .wire import Pages

__all__ = ["Progress"]

_TELL_EVERY = 0.1           # seconds
_RATE_OVER = 0.5            # seconds


class Progress:
    """From the migration's beginning on. ``messages``: of pages, since it was last set to 0."""

    def __init__(self, report: Report, told: Callable[[Report], None]) -> None:
        self.report = report
        self.messages = 0
        #: The machine is this migration's: its report is kept. One that is refused leaves the last one's in its place.
        self.kept = False
        self._told = told
        self._lock = threading.Lock()           # for what the channels count
        self._began = time.monotonic() - report.total_time / 1000     # another process may have begun it
        self._told_at = 0.0
        self._measured = (time.monotonic(), report.ram.transferred)     # when, bytes transferred by then

    @property
    def elapsed_ms(self) -> float:
        """Since then."""
        return (time.monotonic() - self._began) * 1000

    def count(self, message: Pages, size: int) -> None:
        """A message that has been sent, of so many bytes. From any thread."""
        pages = len(message.numbers) // 4
        with self._lock:
            ram = self.report.ram
            self.messages += 1
            ram.transferred += size
            if message.encoding == "zero":
                ram.duplicate += pages
            else:
                ram.normal += pages
                ram.normal_bytes += pages * PAGE

    def tell(self, *, force: bool = False) -> None:
        """About every tenth of a second, however often it is called; ``force``: now."""
        now = time.monotonic()
        if not force and now - self._told_at < _TELL_EVERY:
            return
        self._told_at = now
        report = self.report
        report.total_time = self.elapsed_ms
        since, sent = self._measured
        if now - since >= _RATE_OVER:
            report.ram.mbps = (report.ram.transferred - sent) * 8 / 1e6 / (now - since)
            self._measured = (now, report.ram.transferred)
        if report.status in OVER:
            report.ended_at = records.now()
            report.sum_up()
        else:
            report.weigh()
        if self.kept:
            save_status(report)
        self._told(report)
