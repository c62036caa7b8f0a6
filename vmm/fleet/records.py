"""What a fleet writes down of its machines, before it acts on it: should its process be killed, its successor knows
what was wanted, which actors may have a machine, and what was begun. Ray keeps it on the cluster's head."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from typing import Protocol

from .members import Member

__all__ = ["Records", "Store"]

_MEMBER, _DRAINED, _GENERATION = "machine ", "drained", "generation"
_FIELDS = ("wanted", "node", "target", "holder", "coming", "state", "detail", "rate", "on_kvm", "report")


class Store(Protocol):
    """Where it is kept."""

    def write(self, key: str, value: bytes | None) -> None:
        """None: there is none any more."""

    def written(self) -> dict[str, bytes]:
        """All of it."""


class Records:
    """``members`` and ``drained`` (ids of nodes): as an earlier process has left them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        found = {key: pickle.loads(value) for key, value in store.written().items()}
        self.members = {key.removeprefix(_MEMBER): Member(**value) for key, value in found.items()
                        if key.startswith(_MEMBER)}
        self.drained: set[str] = set(found.get(_DRAINED, ()))
        self._generation: int = found.get(_GENERATION, 0)

    def save(self, member: Member) -> None:
        """As it is now."""
        self._write(_MEMBER + member.name, {name: getattr(member, name) for name in _FIELDS})

    def forget(self, member: Member) -> None:
        """It is none of the fleet's any more."""
        self._store.write(_MEMBER + member.name, None)

    def save_drained(self, nodes: Iterable[str]) -> None:
        """Those that get no machines."""
        self._write(_DRAINED, sorted(nodes))

    def next_generation(self) -> int:
        """Of an actor: no two of a cluster have the same, whatever becomes of the fleet and its machines."""
        self._generation += 1
        self._write(_GENERATION, self._generation)
        return self._generation

    def _write(self, key: str, value: object) -> None:
        self._store.write(key, pickle.dumps(value))
