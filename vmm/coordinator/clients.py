"""Clients of the dirty log: registering, syncing, and going with the process that registered them."""

from __future__ import annotations

import contextlib
from typing import Any

from ipc.process import ProcessId
from ipc.steps import step

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
    def owners(self) -> dict[str, ProcessId]:
        """{client: process} of those that go when a process does."""
        return {client: owner.process for client, owner in self._owners.items()}

    def adopt(self, owners: dict[str, ProcessId]) -> None:
        """As a coordinator that died has left them; those whose process has gone meanwhile go now."""
        for client, process in owners.items():
            try:
                self._own(client, process)
            except ProcessLookupError:
                self._core.parts.log.unregister(client)

    def register(self, client: str, owner: int, like: str) -> None:
        """Raises VmmError and SegmentError, with nothing done."""
        core, log = self._core, self._core.parts.log
        _require_not_the_verifier(client)
        if client in log.clients:
            return
        self._tracking.choose(logged=True)
        self._tracking.require_log()
        core.flush()
        log.register(client, core.new_generation(), like)
        try:
            if owner:
                self._own(client, owner)
            step("register-made")
            core.commit()
        except (VmmError, ProcessLookupError) as exc:
            self._disown(client)
            log.discard_client(client)
            if isinstance(exc, ProcessLookupError):
                raise VmmError(f"process {owner}, with which client '{client}' is to go, is not there") from None
            raise
        step("register-committed")

    def unregister(self, client: str) -> None:
        """Idempotent. Raises VmmError, with nothing done."""
        _require_not_the_verifier(client)
        if client in self._core.parts.log.clients:
            self._remove(client)

    def sync(self, client: str, again: bool) -> dict[str, Any]:
        core, log = self._core, self._core.parts.log
        if client not in log.clients:
            raise VmmError(f"there is no client '{client}' of the dirty log: register it first")
        _require_not_the_verifier(client)
        self._tracking.require_log()
        core.flush()
        step("sync-flushed")
        taken = log.take(client, again=again)
        step("sync-taken")
        if log.changed:
            core.save()
        return {"slots": {str(i): {"dirty": t.dirty, "pages": t.slot.pages, "born": t.slot.born,
                                   "logged": t.slot.log, "retired": t.retired, "bitmap": t.segment}
                          for i, t in taken.items()}}

    def _remove(self, client: str) -> None:
        log = self._core.parts.log
        found = log.unregister(client)
        step("unregister")
        try:
            self._core.commit()
        except VmmError:
            log.readmit(found)
            raise
        self._disown(client)

    def _owner_ended(self, client: str) -> None:
        with contextlib.suppress(VmmError):     # it stays, then: nothing is lost by that
            self._remove(client)

    def _own(self, client: str, who: int | ProcessId) -> None:
        """Raises ProcessLookupError."""
        self._owners[client] = self._core.owners.watch(who, lambda: self._owner_ended(client))

    def _disown(self, client: str) -> None:
        owner = self._owners.pop(client, None)
        if owner is not None:
            owner.close()


def _require_not_the_verifier(client: str) -> None:
    """Raises VmmError."""
    if client == VERIFY_CLIENT:
        raise VmmError(f"client '{client}' is the verifier's own")
