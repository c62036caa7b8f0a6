"""Changing the mode of dirty tracking, for a user or because ``auto`` wants it."""

from __future__ import annotations

import time
from typing import Any

from ipc.shm import SegmentError

from ..dirty.tracking import switch
from ..dirty.tracking.auto import AutoTracking
from ..errors import VmmError
from ..machine.trackings import check_tracking, not_logged
from .core import Core

__all__ = ["TrackingSwitch"]


class TrackingSwitch:
    """``asked``: one of vmm.machine.trackings.CHOICES; ``switches``: how often the mode has changed."""

    def __init__(self, core: Core, asked: str) -> None:
        self._core = core
        self._auto = AutoTracking()
        self.asked = asked
        self.switches = 0

    def first(self) -> str:
        """Of a machine that is about to be made; one of vmm.machine.trackings.MODES."""
        if self.asked != "auto":
            return self.asked
        spec = self._core.spec
        return self._auto.first(logged=spec.verify is not None, ring=any(spec.quotas))

    def left(self, now: float) -> float | None:
        """Seconds until ``choose`` may say something else although nothing happens; None: never."""
        return self._auto.left(now) if self.asked == "auto" else None

    def ask(self, asked: str, limits: list[str]) -> dict[str, Any]:
        """What a user wants from now on; ``limits``: processes that limit vCPUs, for people. Raises VmmError, with
        everything as it was."""
        core = self._core
        core.require_not_ended()
        core.require_whole_memory()
        check_tracking(asked, core.spec.accel, core.spec.ring_entries)
        if asked not in ("ring", "auto") and core.reaper.recorder is not None:
            raise VmmError(f"machine '{core.spec.name}' is being recorded (vmm trace record), which needs dirty "
                           "rings: stop the recording first")
        if asked not in ("ring", "auto") and self._limited():
            what = f"it was set by {', '.join(limits)}; wait for that" if limits else (
                f"cancel it first (vmm dirty-limit cancel {core.spec.name})")
            raise VmmError(f"machine '{core.spec.name}' has a dirty limit, which needs dirty rings: {what}")
        before = core.parts.tracking
        mode = asked
        if asked == "auto":
            self._auto = AutoTracking()
            mode = self._auto.first(logged=bool(core.parts.log.clients), ring=self._ring_needed())
        asked_before, self.asked = self.asked, asked    # written down with the first step of the switch
        try:
            seconds = self.switch(mode)
            core.save()
        except (VmmError, SegmentError):
            self.asked = asked_before
            raise
        return {"before": before, "tracking": core.parts.tracking, "asked": asked, "seconds": seconds}

    def switch(self, mode: str) -> float:
        """Seconds that it took, the vCPUs standing still; 0 when it is so already."""
        core = self._core
        before = core.parts.tracking
        if mode == before:
            return 0.0
        began = time.monotonic()
        with core.vcpus.all_paused():
            switch.switch(core.parts, core.vcpus, core.reaper, mode, core.save)
            self.switches += 1
            if core.verifier is not None:
                core.verifier.switched()
        now = time.monotonic()
        if core.parts.ring_entries:
            core.reaper.schedule.plan(now, core.reaper.room())
        core.tell({"event": "tracking", "before": before, "tracking": mode, "seconds": round(now - began, 6)})
        return now - began

    def choose(self, *, logged: bool = False, limited: bool = False, recorded: bool = False) -> None:
        """Tracking auto: as it is best now, or with a client, a dirty limit or a recording that is about to
        come."""
        core = self._core
        if self.asked == "auto" and not core.pages_missing:
            ring = self._ring_needed() or ((limited or recorded) and core.spec.ring_entries > 0)
            self.switch(self._auto.choose(time.monotonic(), core.parts.tracking,
                                          logged=logged or bool(core.parts.log.clients), ring=ring))

    def choose_or_keep(self) -> None:
        """``choose``, by itself: where that fails, it stays as it is, and for good."""
        core = self._core
        try:
            self.choose()
        except (VmmError, SegmentError) as exc:
            self.asked = core.parts.tracking
            core.save_if_possible()
            core.tell({"event": "warning", "text": f"the tracking mode stays {self.asked} from now on: {exc}"})

    def require_log(self) -> None:
        """Raises VmmError."""
        if not self._core.parts.mode.logged:
            raise not_logged(self._core.spec.name)

    def _ring_needed(self) -> bool:
        """By a dirty limit, or a recording."""
        return self._limited() or self._core.reaper.recorder is not None

    def _limited(self) -> bool:
        return any(s.control.dirty_quota for s in self._core.vcpus.all)
