"""Post-copy, at the machine that arrives: pages of RAM are missing, and a process fills them in."""

from __future__ import annotations

import signal
from typing import Any

from ipc.messages import Userfault

from ..errors import VmmError
from ..verify import CLIENT as VERIFY_CLIENT
from .core import Core
from .owners import Owner
from .tracking import TrackingSwitch

__all__ = ["Incoming"]


class Incoming:
    def __init__(self, core: Core, tracking: TrackingSwitch) -> None:
        self._core = core
        self._tracking = tracking
        self._owner: Owner | None = None
        #: Of the process that fills the pages in; it stays when that process has gone. 0: none is missing.
        self.owner_pid = 0

    def adopt(self, owner: int) -> None:
        """As a coordinator that died has left it."""
        if owner:
            try:
                self._missing(owner)
            except ProcessLookupError:
                self.owner_pid = owner
                self._lost()

    def expect(self, socket: str, owner: int) -> list[dict[str, Any]]:
        """{slot id: address of its mapping} for each vCPU. Raises VmmError."""
        core = self._core
        core.require_not_started()
        try:
            self._missing(owner)
        except ProcessLookupError:
            raise VmmError(f"process {owner}, which is to fill in the memory, is not there") from None
        if core.parts.tracking == "uffd":
            self._tracking.switch("bitmap")     # a mapping has one userfaultfd; back when all has arrived
        replies = core.shards.request(core.shards.all, lambda seq, s: Userfault(seq, socket))
        core.save()
        return [replies[s.index].data or {} for s in core.shards.all]

    def _missing(self, owner: int) -> None:
        """Raises ProcessLookupError."""
        core = self._core
        self._owner = core.owners.watch(owner, self._lost)
        self.owner_pid = owner
        core.pages_missing = core.shards.pages_missing = True
        core.reaper.only_full = core.spec.accel != "kvm"    # KVM_RUN is interrupted while it waits for a page

    def arrived(self) -> None:
        """Every page is there."""
        core = self._core
        if self._owner is None:
            return
        self._owner.close()
        self._owner = None
        self.owner_pid = 0
        core.pages_missing = core.shards.pages_missing = core.reaper.only_full = False
        core.shards.request(core.live, lambda seq, s: Userfault(seq, ""))
        if core.verifier is not None and core.state == "running":
            with core.shards.all_paused():
                core.reaper.drain()
                core.parts.log.take(VERIFY_CLIENT)
                core.verifier.blind_to_surplus = True
                core.verify_from_here()
        if self._tracking.asked == "uffd":
            self._tracking.switch("uffd")
        core.save()

    def _lost(self) -> None:
        """Who fills in the memory has gone: the guest can never go on, and must not with zeros instead."""
        core = self._core
        self._owner = None
        core.tell({"event": "incoming-lost", "detail": "the process that received this machine's memory ended "
                                                       "before all of it was here"})
        for shard in core.shards.all:
            shard.signal(signal.SIGKILL)
