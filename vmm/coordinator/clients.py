"""Clients of the dirty log: registering, syncing, and going with the process that registered them."""

from __future__ import annotations

import time
from typing import Any

from ipc.processid import ProcessId

from ..errors import VmmError
from ..verify import CLIENT as VERIFY_CLIENT
from .core import Core
from .owners import Held, Hold
from .tracking import TrackingSwitch

__all__ = ["Clients"]


class Clients:
    def __init__(self, core: Core, tracking: TrackingSwitch) -> None:
        self._core = core
        self._tracking = tracking
        #: Those that go when a process does; the token is the client's name.
        self.held: Held[Hold] = Held(core.owners, lambda hold: self._unregister(hold.token))

    def adopt(self, held: list[Hold]) -> None:
        """As a coordinator that died has left them."""
        for hold in self.held.adopt(held):
            self._unregister(hold.token)

    def register(self, client: str, owner: ProcessId | None, like: str) -> None:
        """``owner``: it goes with this process, which alone may use it. Raises VmmError."""
        log = self._core.parts.log
        if client in log.clients:
            self._require_own(client, owner.pid if owner else 0)
            return
        self._tracking.choose(logged=True)
        self._tracking.require_log()
        self._core.flush()
        if like and like not in log.clients:
            raise VmmError(f"there is no client '{like}' of the dirty log")
        log.register(client)
        if like:
            log.copy_client(client, like)
        if owner is not None:
            try:
                self.held.add(Hold(client, f"client {client}", owner))
            except VmmError:
                log.unregister(client)
                raise
        self._core.save()

    def unregister(self, client: str, asker: int) -> None:
        """``asker``: pid of who asks, as for ``sync``. Raises VmmError."""
        if client == VERIFY_CLIENT:
            raise VmmError(f"client '{client}' is the verifier's own")
        self._require_own(client, asker)
        self._unregister(client)

    def _unregister(self, client: str) -> None:
        self.held.pop(client)
        self._core.parts.log.unregister(client)
        self._core.save()

    def _require_own(self, client: str, asker: int) -> None:
        """What another process gathers is not to be taken from it."""
        hold = self.held.get(client)
        if hold is not None and hold.owner.pid != asker:
            raise VmmError(f"client '{client}' of the dirty log belongs to process {hold.owner.pid}")

    def sync(self, client: str, again: bool, asker: int) -> dict[str, Any]:
        log = self._core.parts.log
        if client not in log.clients:
            raise VmmError(f"there is no client '{client}' of the dirty log: register it first")
        if client == VERIFY_CLIENT:
            raise VmmError(f"client '{client}' is the verifier's own")
        self._require_own(client, asker)
        self._tracking.require_log()
        self._core.flush()
        if again:
            log.give_back(client)
        flushed = {"at": time.monotonic(), "vcpu_pages": [s.control.dirty_pages for s in self._core.shards.all]}
        taken = log.take(client)
        return {"slots": {str(i): {"dirty": n, "pages": log.front(client, i).front.pages}
                          for i, n in taken.items()}, **flushed}
