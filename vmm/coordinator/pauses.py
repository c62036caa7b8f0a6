"""Pausing a machine for a user or a process."""

from __future__ import annotations

from ipc.process import ProcessId

from .core import Core
from .owners import Owner

__all__ = ["Pauses"]


class Pauses:
    """``paused``: somebody wants the guest to stand still. A pause of a process ends with it."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._owner: Owner | None = None
        self.paused = False

    @property
    def owner(self) -> ProcessId | None:
        """The process whose pause it is; None: nobody's, it stays."""
        return self._owner.process if self._owner is not None else None

    def adopt(self, paused: bool, owner: ProcessId | None) -> None:
        """As a coordinator that died has left it; the vCPUs are paused."""
        self.paused = paused
        if paused and owner is not None:
            try:
                self._owner = self._core.owners.watch(owner, self._owner_ended)
            except ProcessLookupError:
                self.paused = False

    def pause(self, owner: int = 0) -> None:
        core = self._core
        core.require_not_ended()
        if self.paused:
            if not owner:
                self._disown()      # somebody wants it paused for good
                core.save()
            return
        self.paused = True
        core.shards.pause_all()
        if owner:
            try:
                self._owner = core.owners.watch(owner, self._owner_ended)
            except ProcessLookupError:
                self.resume()
        core.save()

    def resume(self) -> None:
        self._core.require_not_ended()
        self._disown()
        if self.paused:
            self.paused = False
            self._core.shards.resume_all()
            self._core.save()

    def _owner_ended(self) -> None:
        if self._core.state == "running":
            self.resume()

    def _disown(self) -> None:
        if self._owner is not None:
            self._owner.close()
            self._owner = None
