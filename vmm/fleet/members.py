"""What a fleet knows of each of its machines."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Literal

from .config import Wanted
from .places import Host, Load

__all__ = ["Member", "State"]

#: ``starting``; ``running`` (the machine is there, paused or not); ``moving``; ``restoring`` (also while no host has
#: room for it); ``ended`` (by itself); ``lost``: it is gone, and was not restored; ``stopping``.
State = Literal["starting", "running", "moving", "restoring", "ended", "lost", "stopping"]


@dataclass
class Member:
    """One machine. ``node``: the id of Ray's for its host, or of that to which it is about to come; ``target``: of that
    to which it moves. There is room kept for it on both. ``lock``: whoever changes where it is holds it."""

    wanted: Wanted
    node: str = ""
    target: str = ""
    holder: int = 0                 # generation of the actor that has it; 0: none has
    coming: int = 0                 # of the one that is to have it: it starts, moves or is restored there; 0: none is
    state: State = "starting"
    detail: str = ""                # of this state, for people
    rate: float = 0.0               # pages per second that it dirtied when that was last measured
    on_kvm: bool = False            # it runs on that, or can on nothing else
    report: dict[str, Any] | None = None    # of one that has ended
    actor: Any = None               # of Ray's, the holder
    since: float = 0.0              # time.monotonic when it came to its node; 0: before this process
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        """Of the machine."""
        return self.wanted.name

    @property
    def may(self) -> set[int]:
        """Generations of the actors that may have it: no others get a lease."""
        return {self.holder, self.coming} - {0}

    @property
    def lease(self) -> float:
        """Seconds for which an actor may have it without a word; 0 where nothing is restored."""
        return 0.0 if self.wanted.snapshots is None else self.wanted.snapshots.lease

    @property
    def load(self) -> Load:
        """For whoever looks for a host."""
        wanted = self.wanted
        return Load(wanted.name, wanted.group, wanted.spread, wanted.cpus, wanted.memory, self.on_kvm, self.rate)

    @property
    def no_room(self) -> str:
        """What is said where there is no host for it."""
        apart = " that has none of its kind" if self.wanted.spread == "apart" else ""
        return (f"no node{apart} has room for '{self.name}': {self.wanted.cpus:g} CPUs, {self.wanted.memory >> 20:,} "
                f"MiB{', KVM' * self.on_kvm} (see vmm fleet list)")

    def held(self, node: str, now: float) -> None:
        """The actor that was coming has it, on this node."""
        self.holder, self.coming, self.node, self.target, self.since = self.coming, 0, node, "", now

    def take_from(self, host: Host) -> None:
        """What it has there, or is to have, is not free."""
        if self.state not in ("ended", "lost") and host.id in (self.node, self.target):
            host.take(self.load, seen=bool(self.holder) and host.id == self.node and self.since < host.looked)
