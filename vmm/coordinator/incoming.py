"""Post-copy, at the machine that arrives: pages of RAM are missing, and a process fills them in."""

from __future__ import annotations

import signal
from typing import Any

from ipc.linux.processid import ProcessId
from ipc.messages import Userfault
from ipc.shm import SegmentError
from ipc.steps import step

from ..errors import VmmError
from .core import Core
from .owners import Watch, unseen
from .tracking import TrackingSwitch

__all__ = ["Incoming"]


class Incoming:
    """Post-copy at the machine that arrives: from the first missing page to the last."""

    def __init__(self, core: Core, tracking: TrackingSwitch) -> None:
        self._core = core
        self._tracking = tracking
        self._watch: Watch | None = None
        #: The process that fills in the pages; it stays when that has ended. None: no page is missing.
        self.owner: ProcessId | None = None

    def adopt(self, owner: ProcessId | None) -> None:
        """As a coordinator that died has left it."""
        if owner is not None:
            try:
                self._missing(owner)
            except ProcessLookupError:
                self.owner = owner
                self._expecting(True)
                self._lost()

    def expect(self, socket: str, owner: ProcessId) -> list[dict[str, Any]]:
        """{slot id: address of its mapping} for each vCPU. May be repeated. Raises VmmError and SegmentError."""
        core = self._core
        core.require_not_started()
        if not core.pages_missing:
            self._tracking.log_while_pages_are_missing()
        if self._watch is not None:
            self._watch.close()
        try:
            self._missing(owner)
        except ProcessLookupError:
            raise unseen(owner) from None
        try:
            step("incoming")
            core.save()
            step("incoming-committed")
            if core.parts.tracking == "uffd":
                self._tracking.switch("bitmap")     # a mapping has one userfaultfd; back when all has arrived
            replies = core.vcpus.request(core.vcpus.all, lambda seq, s: Userfault(seq, socket))
        except (VmmError, SegmentError):
            self._whole()
            core.save_if_possible()
            raise
        step("incoming-set")
        return [replies[s.index].data or {} for s in core.vcpus.all]

    def _missing(self, owner: ProcessId) -> None:
        """Raises ProcessLookupError."""
        self._watch = self._core.owners.watch(owner, self._lost)
        self.owner = owner
        self._expecting(True)

    def _expecting(self, missing: bool) -> None:
        core = self._core
        core.pages_missing = core.vcpus.pages_missing = missing
        # KVM_RUN is interrupted while it waits for a page.
        core.reaper.only_full = missing and not core.spec.can.interruptible_fault

    def _whole(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch = self.owner = None
        self._expecting(False)

    def arrived(self) -> None:
        """Every page is there. May be repeated. Raises VmmError, and is to be repeated then."""
        core = self._core
        if self.owner is None:
            return
        step("arrived")
        core.vcpus.request(core.live, lambda seq, s: Userfault(seq, ""))
        step("arrived-set")
        self._whole()
        if core.verifier is not None and core.state == "running":
            with core.vcpus.all_paused():
                core.reaper.drain()
                core.verifier.restart()
        if self._tracking.asked == "uffd":
            self._tracking.switch("uffd")
        core.save_if_possible()

    def _lost(self) -> None:
        """The process that fills in the memory has ended: the guest can never continue, and must not do so with zeros
        instead."""
        core = self._core
        self._watch = None
        core.lost = "the process that fills in this machine's memory ended before all of it had arrived"
        core.tell({"event": "incoming-lost", "detail": core.lost})
        for vcpu in core.vcpus.all:
            vcpu.signal(signal.SIGKILL)
