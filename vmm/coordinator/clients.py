"""Clients of the dirty log: registering, syncing, and going with the process that registered them."""

from __future__ import annotations

from typing import Any

from ..errors import VmmError
from ..verify import CLIENT as VERIFY_CLIENT
from .core import Core
from .owners import Owner
from .tracking import TrackingSwitch

__all__ = ["Clients"]


class Clients:
    def __init__(self, core: Core, tracking: TrackingSwitch) -> None:
        self._core = core
        self._tracking = tracking
        self._owners: dict[str, Owner] = {}

    @property
    def owner_pids(self) -> dict[str, int]:
        """{client: pid} of those that go when a process does."""
        return {client: owner.pid for client, owner in self._owners.items()}

    def adopt(self, owners: dict[str, int]) -> None:
        """As a coordinator that died has left them."""
        for client, pid in owners.items():
            self._own(client, pid)

    def register(self, client: str, owner: int, like: str) -> None:
        log = self._core.parts.log
        if client in log.clients:
            return
        self._tracking.choose(logged=True)
        self._tracking.require_log()
        self._core.flush()
        if like and like not in log.clients:
            raise VmmError(f"there is no client '{like}' of the dirty log")
        log.register(client)
        if like:
            log.copy_client(client, like)
        if owner:
            self._own(client, owner)
        self._core.save()

    def unregister(self, client: str) -> None:
        self._core.parts.log.unregister(client)
        owner = self._owners.pop(client, None)
        if owner is not None:
            owner.close()
        self._core.save()

    def sync(self, client: str, again: bool) -> dict[str, Any]:
        log = self._core.parts.log
        if client not in log.clients:
            raise VmmError(f"there is no client '{client}' of the dirty log: register it first")
        if client == VERIFY_CLIENT:
            raise VmmError(f"client '{client}' is the verifier's own")
        self._tracking.require_log()
        self._core.flush()
        if again:
            log.give_back(client)
        taken = log.take(client)
        return {"slots": {str(i): {"dirty": n, "pages": log.front(client, i).front.pages}
                          for i, n in taken.items()}}

    def _own(self, client: str, pid: int) -> None:
        try:
            self._owners[client] = self._core.owners.watch(pid, lambda: self.unregister(client))
        except ProcessLookupError:
            self._core.parts.log.unregister(client)
