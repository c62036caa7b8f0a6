"""Which host a machine goes to: one that has room for it, and of these the one whose machines dirty least memory, and
then the one with most that is free.

Memory and CPUs are what a host has or has not. What a guest dirties is what machines of a host get in each other's way
with: the memory bus and the coordinators now, the network when the host is drained one day.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .config import Spread

__all__ = ["Host", "Load", "choose", "place"]

_QUIET = 1000.0         # pages per second (4 MB/s) by which hosts differ when one is said to dirty more


@dataclass
class Host:
    """What is free there, in Ray's CPUs and bytes. ``kvm``: guests run on KVM there. ``rate``: pages that its machines
    dirty per second; ``groups``: whose machines it has. ``shared``: points that measure time may have it too."""

    id: str
    name: str
    address: str
    cpus: float
    memory: int
    kvm: bool = False
    shared: bool = False
    rate: float = 0.0
    groups: set[str] = field(default_factory=set)


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
               if host.cpus >= load.cpus and host.memory >= load.memory and (host.kvm or not load.kvm)
               and not (load.spread == "apart" and load.group in host.groups)]
    if load.spread == "pack":
        return min(fitting, key=lambda host: (host.memory, host.name, host.id), default=None)
    return min(fitting, key=lambda host: (host.rate // _QUIET, -host.memory, host.name, host.id), default=None)


def place(loads: Iterable[Load], hosts: list[Host]) -> dict[str, Host | None]:
    """{name: host} of each, the largest first; what it takes is no longer free there. None: there is no room."""
    found: dict[str, Host | None] = {}
    for load in sorted(loads, key=lambda load: -load.memory):
        host = found[load.name] = choose(load, hosts)
        if host is not None:
            host.cpus -= load.cpus
            host.memory -= load.memory
            host.rate += load.rate
            host.groups.add(load.group)
    return found
