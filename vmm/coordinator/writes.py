"""Host writes: memory that a process of the host, not the guest, is writing to.

KVM logs the guest's stores alone. Whoever writes says so first (``begin``) and afterwards (``end``). In between
the pages are dirty in every sync: one that comes before the write has the page as it was, the next has it again. A
writer that ends in between, or a coordinator, changes nothing of that: its pages are dirty once more, and then it
is forgotten.
"""

from __future__ import annotations

from ipc.process import ProcessId
from ipc.steps import step

from ..errors import VmmError
from .core import Core
from .journal import HostWrite
from .owners import Owner

__all__ = ["HostWrites"]


class HostWrites:
    """Those under way, by the name that the writer has given each."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._open: dict[str, tuple[HostWrite, Owner]] = {}

    @property
    def open(self) -> dict[str, HostWrite]:
        return {key: write for key, (write, _) in self._open.items()}

    def adopt(self, writes: dict[str, HostWrite]) -> None:
        """As a coordinator that died has left them; those whose process has gone meanwhile are over."""
        for key, write in writes.items():
            self._mark(write)
            try:
                self._add(key, write, write.owner)
            except ProcessLookupError:
                pass

    def begin(self, key: str, slot: int, born: int, first: int, count: int, owner: int) -> None:
        """Process ``owner`` is about to write to these pages. Raises VmmError, and then must not."""
        core = self._core
        if key in self._open:
            return
        core.parts.log.mark(slot, first, count, born)
        self._blind()
        write = HostWrite(slot, born, first, count, ProcessId(owner, 0))
        try:
            self._add(key, write, owner)
        except ProcessLookupError:
            raise VmmError(f"process {owner}, which is to write, is not there") from None
        try:
            core.commit()
        except VmmError:
            self._drop(key)
            raise
        step("write-begun")

    def end(self, key: str) -> None:
        """It has written. Raises VmmError where the slot was removed meanwhile: what was written is gone with
        it."""
        if key not in self._open:
            return
        write = self._open[key][0]
        self._mark(write)
        self._drop(key)
        step("write-ended")
        self._core.save()
        self._core.parts.log.mark(write.slot, 0, 0, write.born)

    def mark(self, slot: int, first: int, count: int, born: int | None) -> None:
        """Pages were written through a view, and it is over. Raises VmmError."""
        self._core.parts.log.mark(slot, first, count, born)
        self._blind()

    def _add(self, key: str, write: HostWrite, who: int | ProcessId) -> None:
        """Raises ProcessLookupError."""
        owner = self._core.owners.watch(who, lambda: self._owner_ended(key))
        self._open[key] = (HostWrite(write.slot, write.born, write.first, write.count, owner.process), owner)
        self._tell_log()

    def _owner_ended(self, key: str) -> None:
        self._mark(self._open[key][0])
        self._drop(key)
        self._core.save()

    def _mark(self, write: HostWrite) -> None:
        slot = self._core.parts.log.slots.get(write.slot)
        if slot is not None and slot.spec.born == write.born:
            slot.bitmap.mark_range(write.first, write.count)
        self._blind()

    def _drop(self, key: str) -> None:
        _, owner = self._open.pop(key)
        owner.close()
        self._tell_log()

    def _tell_log(self) -> None:
        self._core.parts.log.open_writes = [(w.slot, w.born, w.first, w.count) for w, _ in self._open.values()]

    def _blind(self) -> None:
        """A page that was marked need not have changed."""
        if self._core.verifier is not None:
            self._core.verifier.blind_to_surplus = True
