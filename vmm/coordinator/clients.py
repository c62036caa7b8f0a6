"""Clients of the dirty log: registering, syncing, and going with the process that registered them."""

from __future__ import annotations

import base64
import time
import zlib
from typing import Any

from ipc.linux.processid import ProcessId
from ipc.messages import BitmapPlace
from ipc.steps import step

from ..errors import VmmError
from ..machine.names import VERIFIER
from ..machine.verbs import MARKED_WORDS
from .core import Core
from .owners import Held, Hold
from .tracking import TrackingSwitch

__all__ = ["Clients"]

_CLIENTS = 64       # each has two bitmaps of every slot, and may have a descriptor here


class Clients:
    """The verbs of dirty-log clients, and whose they are."""

    def __init__(self, core: Core, tracking: TrackingSwitch) -> None:
        self._core = core
        self._tracking = tracking
        #: Those that go when a process does; the token is the client's name.
        self.held: Held[Hold] = Held(core.owners, lambda hold: self._unregister(hold.token))

    def adopt(self, held: list[Hold]) -> None:
        """As a coordinator that died has left them."""
        for hold in self.held.adopt(held):
            if hold.token in self._core.parts.log.clients:
                self._core.parts.log.unregister(hold.token)

    def register(self, client: str, owner: ProcessId | None, like: str) -> None:
        """``owner``: it goes with this process, which alone may use it. Raises VmmError and SegmentError, with
        nothing done."""
        core, log = self._core, self._core.parts.log
        _require_not_the_verifier(client)
        if client in log.clients:
            self._require_own(client, owner.pid if owner else 0)
            return
        if len(log.clients) >= _CLIENTS:
            raise VmmError(f"machine '{core.spec.name}' already has {_CLIENTS} dirty-log clients: unregister one "
                           "first")
        self._tracking.choose(logged=True)
        self._tracking.require_log()
        core.flush()
        log.register(client, core.new_generation(), like)
        try:
            if owner is not None:
                self.held.add(Hold(client, client, owner))
            step("register-made")
            core.save()
        except VmmError:
            self.held.pop(client)
            log.discard_client(client)
            raise
        step("register-committed")

    def unregister(self, client: str, asker: int) -> None:
        """``asker``: pid of who asks, as for ``sync``. May be repeated. Raises VmmError, with nothing done."""
        _require_not_the_verifier(client)
        self._require_own(client, asker)
        if client not in self._core.parts.log.clients:
            return
        log = self._core.parts.log
        hold, found = self.held.pop(client), log.unregister(client)
        step("unregister")
        try:
            self._core.save()
        except VmmError:
            log.readmit(found)
            if hold is not None:
                self.held.add(hold)
            raise

    def mark(self, client: str, slot: int, word: int, bits: str, asker: int) -> None:
        """``bits``: zlib, base64. May be repeated. Raises VmmError, with nothing marked."""
        self._require_there(client, asker)
        try:
            packer = zlib.decompressobj()
            found = packer.decompress(base64.b64decode(bits, validate=True), 8 * MARKED_WORDS)
        except (ValueError, zlib.error) as exc:
            raise VmmError(f"dirty-log client '{client}': its pages cannot be read: {exc}") from None
        if not packer.eof or not found or len(found) % 8:
            raise VmmError(f"dirty-log client '{client}': its pages must be from 1 to {MARKED_WORDS} whole words")
        self._core.parts.log.mark_for(client, slot, word, found)

    def _unregister(self, client: str) -> None:
        """Its process has ended."""
        if client in self._core.parts.log.clients:
            self._core.parts.log.unregister(client)
            self._core.save_if_possible()

    def _require_own(self, client: str, asker: int) -> None:
        """What another process gathers must not be taken from it."""
        hold = self.held.get(client)
        if hold is not None and hold.owner.pid != asker:
            raise VmmError(f"dirty-log client '{client}' belongs to process {hold.owner.pid}")

    def synced(self, client: str, asker: int) -> dict[int, BitmapPlace]:
        """{slot id: what its last sync gave}. Raises VmmError."""
        log = self._core.parts.log
        self._require_there(client, asker)
        return {slot_id: BitmapPlace((maps := log.synced(client, slot_id)).segment.name, maps.synced_at)
                for slot_id in log.slots}

    def _require_there(self, client: str, asker: int) -> None:
        """Raises VmmError."""
        if client not in self._core.parts.log.clients:
            raise VmmError(f"there is no dirty-log client '{client}': register it first")
        _require_not_the_verifier(client)
        self._require_own(client, asker)

    def sync(self, client: str, again: bool, asker: int) -> dict[str, Any]:
        """Raises VmmError, with nothing taken."""
        core, log = self._core, self._core.parts.log
        self._require_there(client, asker)
        self._tracking.require_log()
        core.flush()
        step("sync-flushed")
        flushed = {"at": time.monotonic(), "vcpu_pages": [s.control.dirty_pages for s in core.vcpus.all]}
        taken = log.take(client, again=again)
        step("sync-taken")
        if log.changed:
            core.save_if_possible()
        return {"slots": {str(i): {"dirty": t.dirty, "pages": t.slot.pages, "born": t.slot.born,
                                   "logged": t.slot.log, "retired": t.retired, "bitmap": t.segment}
                          for i, t in taken.items()}, **flushed}


def _require_not_the_verifier(client: str) -> None:
    """Raises VmmError."""
    if client == VERIFIER:
        raise VmmError(f"dirty-log client '{client}' is reserved for the verifier")
