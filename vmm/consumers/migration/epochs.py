"""Chains of snapshots go on at the target: what was dirtied since the last snapshot of each travels with the machine.

It is gathered by a client of the dirty log, an epoch (vmm/consumers/snapshot/take.py), which stays as it is at the
source: a migration that fails has changed nothing. A client of this process' own is registered like it while the guest
runs, and asked for all of it when the guest stands still. At the target a client of the epoch's name begins with that,
before the first instruction there. So a page is in the next snapshot whichever host it was written on.
"""

from __future__ import annotations

import contextlib
import uuid

import numpy as np
from numpy.typing import NDArray

from ipc.bitmap import word_count

from ...client.machine import Machine
from ...errors import VmmError
from ...machine.names import is_epoch
from .pages import missing_pages, packed_bits
from .wire import Gathered, WireError

__all__ = ["ArrivingEpochs", "Epochs"]

_MOST = 64      # of a machine's clients


class Epochs:
    """Of the machine that leaves. ``warnings``: which chains will need a full snapshot at the target, and why."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._like: dict[str, str] = {}     # {epoch: client of this process' own}
        self.warnings: list[str] = []

    def follow(self) -> None:
        """The guest runs. From now on what the epochs have gathered can be asked for soon. Raises VmmError."""
        for number, epoch in enumerate(filter(is_epoch, self._machine.status()["clients"])):
            own = f"migrate_{uuid.uuid4().hex[:8]}_{number}"
            try:
                self._machine.register(own, mine=True, like=epoch)
            except VmmError as exc:
                self._stays(epoch, exc)
            else:
                self._like[epoch] = own

    def announced(self) -> list[Gathered]:
        """What will come, for a target that prepares for it meanwhile: nothing of it yet."""
        return [Gathered(epoch, slot["id"], packed_bits(np.zeros(-(-slot["pages"] // 8), np.uint8)))
                for epoch in self._like for slot in self._machine.status()["slots"]]

    def gathered(self) -> list[Gathered]:
        """The guest stands still: all there is."""
        found = []
        for epoch, own in self._like.items():
            try:
                found += [Gathered(epoch, slot, packed_bits(np.packbits(self._machine.bitmap(slot, own).bools(),
                                                                        bitorder="little")))
                          for slot in self._machine.collect(own)]
            except VmmError as exc:
                self._stays(epoch, exc)
        return found

    def _stays(self, epoch: str, exc: VmmError) -> None:
        self.warnings.append(f"what was dirtied since the snapshot of '{epoch}' does not come along: its chain needs "
                             f"a full one next ({exc})")

    def close(self) -> None:
        """Idempotent."""
        while self._like:
            with contextlib.suppress(VmmError):
                self._machine.unregister(self._like.popitem()[1])


class ArrivingEpochs:
    """Of the machine that arrives; ``pages``: {slot: its pages}."""

    def __init__(self, pages: dict[int, int]) -> None:
        self._pages = pages
        self._gathered: dict[str, dict[int, NDArray[np.uint64]]] = {}

    def note(self, message: Gathered) -> None:
        """The last of a client and a slot counts. Raises WireError."""
        if message.slot not in self._pages:
            raise WireError(f"the source sent what was gathered of slot {message.slot}, and there is none")
        total = self._pages[message.slot]
        if not is_epoch(message.client):
            raise WireError("the source sent what was gathered by something that is not a client of snapshots")
        if len(self._gathered) == _MOST and message.client not in self._gathered:
            raise WireError(f"the source sent more than {_MOST} clients of snapshots")
        bits = np.zeros(64 * word_count(total), bool)
        bits[:total] = missing_pages(message, total)
        words = np.packbits(bits, bitorder="little").view(np.uint64)
        self._gathered.setdefault(message.client, {})[message.slot] = words

    def begin(self, machine: Machine) -> None:
        """The machine is there, and the guest may run at the source still: what takes long is done now."""
        for client in self._gathered:
            with contextlib.suppress(VmmError):     # ``go_on`` finds that, too
                machine.register(client)

    def go_on(self, machine: Machine) -> None:
        """The machine has its slots and settings, and has not started yet: what it writes is gathered, too. An epoch
        that there cannot be is not there: then its chain needs a full snapshot, and says so."""
        for client, slots in self._gathered.items():
            try:
                machine.register(client)
                for slot, words in slots.items():
                    machine.mark_for(client, slot, words)
            except VmmError:
                with contextlib.suppress(VmmError):
                    machine.unregister(client)
        self._gathered.clear()
