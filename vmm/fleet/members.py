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
    actor: Any = None               # of Ray's; None: none yet, or none any more
    generation: int = 0             # of the newest actor
    over: set[int] = field(default_factory=set)     # generations that have it no more, whatever they think
    state: State = "starting"
    detail: str = ""                # of this state, for people
    rate: float = 0.0               # pages per second that it dirtied when that was last measured
    on_kvm: bool = False            # it runs on that, or can on nothing else
    report: dict[str, Any] | None = None    # of one that has ended
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        """Of the machine."""
        return self.wanted.name

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

    def take_from(self, host: Host) -> None:
        """What it has there, or is to have, is not free."""
        if self.actor is None and self.state in ("ended", "lost"):
            return
        if host.id in (self.node, self.target):
            host.cpus -= self.wanted.cpus
            host.memory -= self.wanted.memory
            host.rate += self.rate
            host.groups.add(self.wanted.group)
