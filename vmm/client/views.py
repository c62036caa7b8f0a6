"""The machine's shared memory as a client has it mapped: RAM slots, the system slot, a dirty-log client's bitmaps, the
lanes in which its processes write down what they do.

What lies under a slot's number may change (it is removed, and another added): each use asks for the slots as they
are now, and a segment that is another's is mapped anew. numpy is imported with the first of them: who only runs a
machine has no use for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipc.lanes import Lane
from ipc.layout import control_error, machine_control
from ipc.shm import Segment, SegmentError
from workers.accel import registry

from ..errors import ExitCode, VmmError, no_memory
from ..machine import verbs
from ..machine.names import segment_name
from .connection import ControlClient

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ipc.bitmap import Bitmap

    from ..machine.memory import ClientBitmaps

__all__ = ["Bitmaps", "Lanes", "Memory", "View"]


@dataclass(frozen=True, slots=True)
class View:
    """A slot that is mapped here. ``born`` tells it from another under its number."""

    born: int
    segment: Segment


class Memory:
    """RAM slots and the system slot. Raises VmmError for what is not there, throughout."""

    def __init__(self, client: ControlClient, machine: str) -> None:
        self._client = client
        self._machine = machine
        self._system: Segment | None = None
        self._views: dict[int, View] = {}

    def view(self, slot: int, slots: dict[int, dict[str, Any]] | None = None) -> View:
        """The slot as it is now, or as ``slots`` (that ``_slots`` gave) has it."""
        slots = self._slots() if slots is None else slots
        if slot not in slots:
            raise VmmError(f"there is no memory slot {slot} (existing slots: {', '.join(map(str, slots))})")
        born, name = slots[slot]["born"], slots[slot]["ram"]
        known = self._views.get(slot)
        if known is None or known.segment.name != name:
            if known is not None:
                self.forget(slot)
            known = self._views[slot] = View(born, open_segment(self._machine, name))
        return known

    def known(self, slot: int) -> View | None:
        """The slot as it was last given; None: it has not been."""
        return self._views.get(slot)

    def forget(self, slot: int) -> None:
        """It has been removed."""
        view = self._views.pop(slot, None)
        if view is not None:
            view.segment.close()

    def locate(self, gpa: int, size: int) -> tuple[View, int, int]:
        """Of [gpa, gpa + size): (view, slot id, offset within the slot)."""
        slots = self._slots()
        for slot_id, slot in slots.items():
            if slot["gpa"] <= gpa and size >= 0 and gpa + size <= slot["gpa"] + slot["size"]:
                return self.view(slot_id, slots), slot_id, gpa - slot["gpa"]
        raise VmmError(f"guest addresses [{gpa:#x}, {gpa + size:#x}) are not within a single memory slot")

    def _slots(self) -> dict[int, dict[str, Any]]:
        """As they are now. Raises VmmError where they must not be accessed."""
        answer = self._client.ask(verbs.Slots)
        if not registry.capabilities(answer["accelerator"]).guests:
            raise VmmError(no_memory(self._machine))
        if answer["incoming"]:
            raise VmmError(f"machine '{self._machine}': its memory is still arriving (post-copy); wait until it is "
                           "complete")
        return {int(i): slot for i, slot in answer["slots"].items()}

    def system(self) -> NDArray[np.uint8]:
        """The system slot's memory, shape [bytes], writable."""
        import numpy as np

        if self._system is None:
            self._system = open_segment(self._machine, segment_name(self._machine, "system"))
        return np.frombuffer(self._system.buf, np.uint8)

    def close(self) -> None:
        """Idempotent."""
        for slot in list(self._views):
            self.forget(slot)
        if self._system is not None:
            self._system.close()
            self._system = None


class Bitmaps:
    """What this process has synced, for each client of the dirty log and each slot."""

    def __init__(self, client: ControlClient, machine: str) -> None:
        self._client = client
        self._machine = machine
        self._open: dict[tuple[str, int], ClientBitmaps] = {}

    def sync(self, client: str) -> dict[str, Any]:
        """Flush and sync; the answer (vmm/machine/verbs.py), with numbers for slots. The bitmaps that it names are
        open. Raises VmmError."""
        from ..machine.memory import ClientBitmaps

        answer = self._client.ask(verbs.Sync, client=client)
        slots = answer["slots"] = {int(i): s for i, s in answer["slots"].items()}
        for key in [k for k in self._open if k[0] == client and k[1] not in slots]:
            self._open.pop(key).close()
        for slot_id, slot in slots.items():
            found = self._open.get((client, slot_id))
            if found is None or found.segment.name != slot["bitmap"]:   # of another slot, or another client
                if found is not None:
                    del self._open[client, slot_id]
                    found.close()
                self._open[client, slot_id] = ClientBitmaps(open_segment(self._machine, slot["bitmap"]),
                                                            slot["pages"])
        return answer

    def synced(self, slot: int, client: str) -> Bitmap:
        """As of the client's last sync here, a view. Raises VmmError when there was none."""
        if (client, slot) not in self._open:
            raise VmmError(f"client '{client}' has not synced slot {slot} yet")
        return self._open[client, slot].synced

    def forget(self, client: str) -> None:
        """It has been unregistered."""
        for key in [k for k in self._open if k[0] == client]:
            self._open.pop(key).close()

    def close(self) -> None:
        """Idempotent."""
        for bitmaps in self._open.values():
            bitmaps.close()
        self._open.clear()


class Lanes:
    """What the coordinator (``coordinator``) and each vCPU's worker (``vcpus``) have written down of late. It stays
    when the machine has gone, until ``close``."""

    def __init__(self, machine: str) -> None:
        """Raises VmmError."""
        self._segment = open_segment(machine, segment_name(machine, "control"))
        address = self._segment.address
        if wrong := control_error(address, self._segment.size):
            self._segment.close()
            raise VmmError(f"machine '{machine}': {wrong}")
        count = machine_control(address).vcpu_count
        self.coordinator = Lane.of_coordinator(address, count)
        self.vcpus = [Lane.of_vcpu(address, count, index) for index in range(count)]

    def close(self) -> None:
        """Idempotent. A lane must not be read any more."""
        self._segment.close()


def open_segment(machine: str, name: str) -> Segment:
    """Raises VmmError."""
    try:
        return Segment.open(name)
    except SegmentError as exc:
        raise VmmError(f"machine '{machine}': {exc} (it has just been removed)", ExitCode.NO_MACHINE) from None
