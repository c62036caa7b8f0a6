"""What a migration under way is told: other settings, and to go over to post-copy. By whoever asks at its control
socket (vmm/consumers/migration/control.py), from another thread; the migration itself looks when it may follow."""

from __future__ import annotations

import dataclasses
import threading
from typing import Annotated, Any

import msgspec

from ...errors import VmmError
from ...optional import lz4_block
from .converge import LATE, Next
from .pages import Encoding
from .report import COMMITTED, OVER, Late, MigrationError, Options, Report

__all__ = ["CHANNELS_MAX", "ROUNDS_MAX", "Changes", "Steering"]

CHANNELS_MAX = 16
ROUNDS_MAX = 1000


class Changes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be otherwise from now on, as in ``Options``; None: as it was."""

    bandwidth: Annotated[float, msgspec.Meta(ge=0)] | None = None
    downtime: Annotated[float, msgspec.Meta(ge=0)] | None = None
    compression: Encoding | None = None
    channels: Annotated[int, msgspec.Meta(ge=1, le=CHANNELS_MAX)] | None = None
    max_rounds: Annotated[int, msgspec.Meta(ge=1, le=ROUNDS_MAX)] | None = None
    converge: bool | None = None
    timeout: Annotated[float, msgspec.Meta(ge=0)] | None = None
    stall: Annotated[float, msgspec.Meta(ge=0)] | None = None
    on_timeout: Late | None = None
    postcopy: bool = False      # go over to it now

    @property
    def settings(self) -> dict[str, Any]:
        """Those that are to change."""
        given = msgspec.structs.asdict(self)
        del given["postcopy"]
        return {name: value for name, value in given.items() if value is not None}


class Steering:
    """Of one migration, whose report this is."""

    def __init__(self, options: Options, report: Report) -> None:
        #: As they are now.
        self.options = options
        #: What is to come now, whatever the rounds say; None: the next of them.
        self.now: Next | None = None
        #: Why the target cannot have post-copy; empty: it can. None: it was not asked yet.
        self.no_postcopy: str | None = None
        #: Encodings of pages that the target can read; empty: all.
        self.encodings: list[str] = []
        self._report = report
        self._lock = threading.Lock()
        self._reopen = self._late = False
        self._show()

    # --- the migration's own ---------------------------------------------------------------------------------

    @property
    def reopen(self) -> bool:
        """The channels are not as they are asked for now."""
        return self._reopen

    def interrupts(self, *, stopped: bool) -> bool:
        """A round is to end, though not all of it was sent. ``stopped``: the guest stands still."""
        return self._reopen or self.now is Next.POSTCOPY or (self.now is Next.STOP and not stopped)

    def opening(self) -> Options:
        """The channels are opened with these."""
        with self._lock:
            self._reopen = False
            return self.options

    def keep_time(self, elapsed: float) -> None:
        """After so many seconds, before the hand-over: see to it that the end comes in time. Raises MigrationError for
        one that is given up."""
        with self._lock:
            options = self.options
            if not options.timeout or elapsed < options.timeout or self._late:
                return
            self._late = True
            if options.on_timeout == "cancel":
                raise MigrationError(f"{self._report.target}: given up, since it was not handed over within "
                                     f"{options.timeout:g} s")
            self.now = LATE[options.on_timeout]
            self._report.warnings.append(
                f"it was not handed over within {options.timeout:g} s: "
                + ("the guest was stopped for the rest" if self.now is Next.STOP else "it went over to post-copy"))

    # --- whoever asks --------------------------------------------------------------------------------------------

    def change(self, changes: Changes) -> dict[str, Any]:
        """The settings as they are then. Raises VmmError, with nothing changed."""
        with self._lock:
            self._check(changes)
            before = self.options
            self.options = now = dataclasses.replace(before, **changes.settings)
            self._reopen |= ((before.bandwidth, before.compression, before.channels)
                             != (now.bandwidth, now.compression, now.channels))
            if changes.postcopy:
                self.now = Next.POSTCOPY
            self._show()
            return self._report.settings

    def _check(self, changes: Changes) -> None:
        """Raises VmmError."""
        status, name = self._report.status, self._report.machine
        if status in OVER:
            raise VmmError(f"no migration of machine '{name}' is in progress (last one: {status})")
        if status in COMMITTED and (changes.postcopy or status != "postcopy-active"):
            raise VmmError(f"machine '{name}' has already been handed over to {self._report.target}")
        if changes.compression == "lz4":
            lz4_block()
        if changes.compression is not None and self.encodings and changes.compression not in self.encodings:
            raise VmmError(f"the target cannot read pages compressed with {changes.compression}")
        wanted = changes.postcopy or changes.on_timeout == "postcopy"
        if wanted and self.no_postcopy is None:
            raise VmmError(f"the migration of machine '{name}' has only just begun: try again")
        if wanted and self.no_postcopy:
            raise VmmError(f"the target cannot have post-copy: {self.no_postcopy}")

    def _show(self) -> None:
        options = self.options
        self._report.compression = options.compression
        self._report.settings = {
            "bandwidth": options.bandwidth, "downtime": options.downtime * 1000, "compression": options.compression,
            "channels": options.channels, "max_rounds": options.max_rounds, "converge": options.converge,
            "timeout": options.timeout, "stall": options.stall, "on_timeout": options.on_timeout}
