"""Host writes: memory that a process of the host, not the guest, is writing to.

KVM logs only the guest's stores. A writer says so before (``begin``) and after it (``end``). In between the
pages are dirty in every sync: one that comes before the write has the page as it was, the next has it again. A
writer that dies in between changes nothing of that, nor does a coordinator: its pages are dirty once more, and
then it is over.
"""

from __future__ import annotations

from ipc.steps import step

from ..errors import VmmError
from .core import Core
from .owners import Held, Hold

__all__ = ["HostWrite", "HostWrites"]


class HostWrite(Hold):
    """Pages ``first``..``first + count - 1`` of the slot that was ``born`` then."""

    slot: int
    born: int
    first: int
    count: int


class HostWrites:
    """Those under way."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.held: Held[HostWrite] = Held(core.owners, self._gone)

    def adopt(self, writes: list[HostWrite]) -> None:
        """As a coordinator that died has left them; those whose process has gone meanwhile are over."""
        for write in writes:
            self._mark(write)
        self.held.adopt(writes)
        self._tell_log()

    def begin(self, write: HostWrite) -> None:
        """May be repeated. Raises VmmError, and then must not be made."""
        core = self._core
        core.parts.log.mark(write.slot, write.first, write.count, write.born)
        if not self.held.add(write):
            return
        try:
            core.save()
        except VmmError:
            self.held.pop(write.token)
            raise
        self._tell_log()
        step("write-begun")

    def end(self, token: str) -> None:
        """It has been made. May be repeated. Raises VmmError where the slot was removed meanwhile: what was written
        is lost with it."""
        write = self.held.pop(token)
        if write is None:
            return
        self._over(write)
        step("write-ended")
        self._core.save_if_possible()
        self._core.parts.log.mark(write.slot, write.first, write.count, write.born)

    def _gone(self, write: HostWrite) -> None:
        self._over(write)
        self._core.save_if_possible()

    def _over(self, write: HostWrite) -> None:
        self._mark(write)
        self._tell_log()

    def _mark(self, write: HostWrite) -> None:
        """Unless the slot is another by now."""
        slot = self._core.parts.log.slots.get(write.slot)
        if slot is not None and slot.spec.born == write.born:
            self._core.parts.log.mark(write.slot, write.first, write.count)

    def _tell_log(self) -> None:
        self._core.parts.log.open_writes = [(w.slot, w.born, w.first, w.count) for w in self.held]
