"""Which host a machine goes to: one that has room for it, and of these the one whose machines dirty least memory, and
then the one with most that is free.

Memory and CPUs are what a host has or has not. What a guest dirties is what machines of a host get in each other's way
with: the memory bus and the coordinators now, the network when the host is drained one day.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from .config import Spread

__all__ = ["Host", "Load", "choose", "place"]

_QUIET = 1000.0         # pages per second (4 MB/s) by which hosts differ when one is said to dirty more


@dataclass
class Host:
    """``cpus``, ``memory`` (bytes): of Ray's, what machines have not been given. ``free``: bytes that the host had when
    it was ``looked`` at (time.monotonic), less those of machines that came later. ``kvm``: guests run on KVM there.
    ``rate``: pages that its machines dirty per second; ``groups``: whose machines it has. ``shared``: points that
    measure time may have it too."""

    id: str
    name: str
    address: str
    cpus: float
    memory: int
    kvm: bool = False
    shared: bool = False
    rate: float = 0.0
    groups: set[str] = field(default_factory=set)
    free: float = math.inf
    looked: float = 0.0

    @property
    def room(self) -> float:
        """Bytes that another machine may have."""
        return min(self.memory, self.free)

    def take(self, load: Load, *, seen: bool = False) -> None:
        """That machine has its part of it. ``seen``: what was free when the host was looked at is without that."""
        self.cpus -= load.cpus
        self.memory -= load.memory
        if not seen:
            self.free -= load.memory
        self.rate += load.rate
        self.groups.add(load.group)


@dataclass(frozen=True)
class Load:
    """A machine to be put somewhere: what it takes, and does. ``kvm``: it must run on that."""

    name: str
    group: str
    spread: Spread
    cpus: float
    memory: int
    kvm: bool = False
    rate: float = 0.0


def choose(load: Load, hosts: Iterable[Host]) -> Host | None:
    """None: there is no room for it."""
    fitting = [host for host in hosts
               if host.cpus >= load.cpus and host.room >= load.memory and (host.kvm or not load.kvm)
               and not (load.spread == "apart" and load.group in host.groups)]
    if load.spread == "pack":
        return min(fitting, key=lambda host: (host.room, host.name, host.id), default=None)
    return min(fitting, key=lambda host: (host.rate // _QUIET, -host.room, host.name, host.id), default=None)


def place(loads: Iterable[Load], hosts: list[Host]) -> dict[str, Host | None]:
    """{name: host} of each, the largest first; what it takes is no longer free there. None: there is no room."""
    found: dict[str, Host | None] = {}
    for load in sorted(loads, key=lambda load: -load.memory):
        host = found[load.name] = choose(load, hosts)
        if host is not None:
            host.take(load)
    return found
