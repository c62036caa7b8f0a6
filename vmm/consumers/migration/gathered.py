"""What clients of the dirty log have gathered travels with the machine: chains of snapshots go on at the target, and in
an upgrade whoever asks for the log.

A client that travels stays as it is at the source: a migration that fails has changed nothing. A client of this
process' own is registered like it while the guest runs, and asked for all of it when the guest stands still. At the
target a client of that name begins with it, before the first instruction there. So a page is in what the client is told
next whichever host it was written on.
"""

from __future__ import annotations

import contextlib
import uuid

import numpy as np
from numpy.typing import NDArray

from ipc.bitmap import word_count

from ...client.machine import Machine
from ...errors import VmmError
from ...machine.names import VERIFIER, is_epoch
from .pages import missing_pages, packed_bits
from .wire import Gathered, WireError

__all__ = ["Arriving", "Travelling"]

_MOST = 64      # of a machine's clients


class Travelling:
    """Of the machine that leaves: clients of chains of snapshots, epochs (vmm/consumers/snapshot/take.py), or
    (``everyone``) all that are no process' own. ``warnings``: which stay behind, and why."""

    def __init__(self, machine: Machine, *, everyone: bool) -> None:
        self._machine = machine
        self._everyone = everyone
        self._like: dict[str, str] = {}     # {client: one of this process' own}
        self.warnings: list[str] = []

    def _wanted(self) -> list[str]:
        clients = [each["why"] for each in self._machine.status()["holders"]
                   if each["what"] == "client" and not each["pid"] and each["why"] != VERIFIER]
        return [client for client in clients if self._everyone or is_epoch(client)]

    def follow(self) -> None:
        """The guest runs. From now on what they have gathered can be asked for soon. Raises VmmError."""
        for number, client in enumerate(self._wanted()):
            own = f"migrate_{uuid.uuid4().hex[:8]}_{number}"
            try:
                self._machine.register(own, mine=True, like=client)
            except VmmError as exc:
                self._stays(client, exc)
            else:
                self._like[client] = own

    def announced(self) -> list[Gathered]:
        """What will come, for a target that prepares for it meanwhile: nothing of it yet."""
        return [Gathered(client, slot["id"], packed_bits(np.zeros(-(-slot["pages"] // 8), np.uint8)))
                for client in self._like for slot in self._machine.status()["slots"]]

    def gathered(self) -> list[Gathered]:
        """The guest stands still: all there is, but for slots that are no longer there."""
        found = []
        for client, own in self._like.items():
            try:
                flushed = self._machine.flush(own)
                found += [Gathered(client, slot, packed_bits(np.packbits(self._machine.bitmap(slot, own).bools(),
                                                                         bitorder="little")))
                          for slot in flushed.slots if slot not in flushed.retired]
            except VmmError as exc:
                self._stays(client, exc)
        return found

    def _stays(self, client: str, exc: VmmError) -> None:
        what = "its chain of snapshots needs a full one next" if is_epoch(client) else "it has to be registered again"
        self.warnings.append(f"what was gathered for client '{client}' of the dirty log does not come along: {what} "
                             f"({exc})")

    def close(self) -> None:
        """Idempotent."""
        while self._like:
            with contextlib.suppress(VmmError):
                self._machine.unregister(self._like.popitem()[1])


class Arriving:
    """Of the machine that arrives; ``pages``: {slot: its pages}; ``everyone``: any client, not epochs alone."""

    def __init__(self, pages: dict[int, int], *, everyone: bool) -> None:
        self._pages, self._everyone = pages, everyone
        self._gathered: dict[str, dict[int, NDArray[np.uint64]]] = {}

    def note(self, message: Gathered) -> None:
        """The last of a client and a slot counts. Raises WireError."""
        if message.slot not in self._pages:
            raise WireError(f"the source sent what was gathered of slot {message.slot}, and there is none")
        total = self._pages[message.slot]
        if not (self._everyone or is_epoch(message.client)):
            raise WireError("the source sent what was gathered by something that is not a client of snapshots")
        if len(self._gathered) == _MOST and message.client not in self._gathered:
            raise WireError(f"the source sent more than {_MOST} clients of the dirty log")
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
        """The machine has its slots and settings, and has not started yet: what it writes is gathered, too. A client
        that there cannot be is not there, and whoever asks for it is told so."""
        for client, slots in self._gathered.items():
            try:
                machine.register(client)
                for slot, words in slots.items():
                    machine.mark_for(client, slot, words)
            except VmmError:
                with contextlib.suppress(VmmError):
                    machine.unregister(client)
        self._gathered.clear()
