"""Whether a machine is logged, and in which mode of dirty tracking: by what a user asks for, and by who needs a log."""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

from ipc.layout import RING_RESERVE
from ipc.shm import SegmentError

from ..dirty.tracking import switch
from ..dirty.tracking.auto import Demand, Measured, Sample
from ..errors import VmmError
from ..machine.trackings import check_tracking, is_supported, not_logged
from . import hotplug
from .core import Core

__all__ = ["TrackingSwitch"]


class TrackingSwitch:
    """``asked``: one of vmm.machine.trackings.CHOICES; ``switches``: how often the mode has changed."""

    def __init__(self, core: Core, asked: str) -> None:
        self._core = core
        self._demand = Demand()
        self._measured = Measured(core.spec.ring_entries - RING_RESERVE)
        self.asked = asked
        self.switches = 0
        spec = core.spec
        #: There is a log whoever needs it. (To replay has no other purpose, and no guest that could be slowed down.)
        self._always = spec.log == "always" or bool(spec.trace) or not spec.can.guests

    def first(self) -> str:
        """Of a machine that is about to be made; one of vmm.machine.trackings.MODES."""
        return self._can_be[0] if self.asked == "auto" else self.asked

    @property
    def logs_first(self) -> bool:
        """The vCPUs of a machine that is about to be made log from the start."""
        spec = self._core.spec
        return self._always or spec.verify is not None or any(spec.quotas)

    def left(self, now: float) -> float | None:
        """Seconds until ``choose`` may say something else although nothing happens; None: never."""
        return None if self._core.pages_missing else self._demand.left(now)

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
        mode = self._can_be[0] if asked == "auto" else asked
        asked_before, self.asked = self.asked, asked    # written down with the first step of the switch
        try:
            seconds = self.switch(mode)
            core.save()
        except (VmmError, SegmentError):
            self.asked = asked_before
            raise
        self._demand.forget()
        self._measured.forget()
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
        """Have a log while somebody needs it, and with tracking auto in the mode that is best: now, or with a client, a
        dirty limit or a recording that is about to come. Raises VmmError and SegmentError."""
        core = self._core
        if core.pages_missing:
            return
        needed = self._needed() or logged or limited or recorded
        lasts = self._demand.lasts(time.monotonic(), needed=needed,
                                   logging=core.parts.mode.logged and core.parts.log.on)
        if self.asked == "auto":
            ring = self._ring_needed() or ((limited or recorded) and core.spec.ring_entries > 0)
            self.switch("ring" if ring else self._best(measure=needed and core.parts.log.on))
        if core.parts.mode.logged and core.state != "ended":
            hotplug.set_log(core, lasts)

    def _best(self, *, measure: bool) -> str:
        """With tracking auto, where either will do: rings or bitmaps, or what there is."""
        core, mode = self._core, self._core.parts.tracking
        if mode not in self._can_be:        # it arrived so
            return self._can_be[0]
        if not measure or len(self._can_be) == 1:
            self._measured.forget()
            return mode
        vcpus = core.vcpus.all
        return self._measured.choose(mode, Sample(
            time.monotonic(), sum(s.running for s in vcpus), core.reaper.repeats,
            sum(s.control.stalled_ns for s in vcpus) / 1e9, core.parts.control.flushes,
            tuple(s.control.dirty_pages for s in vcpus)))

    @cached_property
    def _can_be(self) -> list[str]:
        """What tracking auto chooses from, the first to begin with."""
        spec = self._core.spec
        return [mode for mode in ("ring", "bitmap") if is_supported(mode, spec.accel, spec.ring_entries)]

    def choose_or_keep(self) -> None:
        """``choose``, by itself: where that fails, it stays as it is, and for good."""
        core = self._core
        try:
            self.choose()
        except (VmmError, SegmentError) as exc:
            self._always = True
            if self.asked == "auto":
                self.asked = core.parts.tracking
                core.save_if_possible()
            core.warn(f"the tracking mode stays {core.parts.tracking}, and its log on, from now on: {exc}")

    def log_while_pages_are_missing(self) -> None:
        """Whoever may need it: in post-copy not every vCPU can be stopped to switch it on. Raises VmmError."""
        hotplug.set_log(self._core, True)

    def require_log(self) -> None:
        """Raises VmmError."""
        if not self._core.parts.mode.logged:
            raise not_logged(self._core.spec.name)

    def _needed(self) -> bool:
        """Somebody needs a log of what is dirtied: whoever does is one of these (docs/decisions/0020)."""
        return self._always or bool(self._core.parts.log.clients) or self._ring_needed()

    def _ring_needed(self) -> bool:
        """By a dirty limit, or a recording."""
        return self._limited() or self._core.reaper.recorder is not None

    def _limited(self) -> bool:
        return any(s.control.dirty_quota for s in self._core.vcpus.all)
