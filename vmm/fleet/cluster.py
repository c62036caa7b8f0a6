"""A Ray cluster as the fleet's actor has it: its nodes, what is free on them, and the actors of machines."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .. import optional
from ..errors import ExitCode, VmmError
from ..lab.cluster.connection import HOST, PART
from .config import Wanted
from .hosts import Look, look
from .places import Host
from .resident import Resident

__all__ = ["FLEET", "NAMESPACE", "Cluster", "Lost", "Node", "Unreachable"]

#: Of Ray's: where the fleet and its machines have their names.
NAMESPACE, FLEET = "shardvmm", "fleet"
_THREADS = 12               # of a machine's actor: so many things are done with it at once
_LOOK_TIMEOUT = 60.0        # seconds for a host to say what it has
_LOOK_GOOD = 5.0            # seconds for which that is good


class Lost(VmmError):
    """The actor has ended, whatever ended it."""


class Unreachable(VmmError):
    """It does not answer, and may do so later."""


@dataclass(frozen=True)
class Node:
    """``name``: as it was given when it was started, else its host's; with the beginning of its id, since several may
    be of one host. ``names``: by which it is known too. ``cpus``, ``memory`` (bytes): in all. ``shared``: it has the
    resource ``host``."""

    id: str
    name: str
    names: frozenset[str]
    address: str
    alive: bool
    cpus: float
    memory: int
    shared: bool


def _node(found: dict[str, Any]) -> Node:
    given, address, has = found.get("NodeName"), found["NodeManagerAddress"], found.get("Resources") or {}
    name = given if given and given != address else found["NodeManagerHostname"]
    return Node(found["NodeID"], f"{name} ({found['NodeID'][:6]})",
                frozenset({name, address, found["NodeManagerHostname"]}), address, found["Alive"], has.get("CPU", 0.0),
                int(has.get("memory", 0)), bool(has.get(HOST)))


class Cluster:
    """The one that this process is of."""

    def __init__(self) -> None:
        self._ray = optional.ray()
        self._looks: dict[str, tuple[float, Look]] = {}     # {id of a node: when, what it said}

    async def ask(self, answer: Any, timeout: float | None = None) -> Any:
        """Of an actor or a task. Raises what it raises; Lost, Unreachable, TimeoutError."""
        errors = self._ray.exceptions
        try:
            return await asyncio.wait_for(_awaited(answer), timeout)
        except errors.RayTaskError as exc:
            raise exc.cause from None
        except errors.ActorUnavailableError:
            raise Unreachable("its host does not answer now", ExitCode.TIMEOUT) from None
        except errors.RayError:
            raise Lost("its process, or its host, is lost", ExitCode.WORKER_DIED) from None

    def was_lost(self) -> bool:
        """This actor's process is not its first."""
        return bool(self._ray.get_runtime_context().was_current_actor_reconstructed)

    # --- nodes ----------------------------------------------------------------------------------------------

    def nodes(self) -> dict[str, Node]:
        """{id: node}; also those that are lost, for a while."""
        return {node.id: node for node in map(_node, self._ray.nodes())}

    def find(self, text: str) -> Node:
        """By its name, its host's name, its address, or the beginning of its id. Raises VmmError."""
        alive = [node for node in self.nodes().values() if node.alive]
        found = [node for node in alive if text in node.names]
        found = found or [node for node in alive if text and node.id.startswith(text)]
        if len(found) != 1:
            several = f"{len(found)} nodes are" if found else "no node is"
            raise VmmError(f"{several} called '{text}': see vmm fleet list (the beginning of a node's id will do)")
        return found[0]

    async def hosts(self, nodes: Iterable[Node]) -> list[Host]:
        """Those of these nodes that answer, and can have machines; with what they have in all, and as memory what is
        free for others than machines of the fleet, if that is less."""
        asked = [node for node in nodes if node.alive and node.cpus]
        looks = await asyncio.gather(*map(self._look, asked))
        return [Host(node.id, node.name, node.address, node.cpus, min(node.memory, seen.memory), seen.kvm,
                     node.shared)
                for node, seen in zip(asked, looks, strict=True) if seen is not None]

    def told(self, node: str, seen: Look) -> None:
        """By the actor of a machine there, just now: then no process has to be started for it."""
        self._looks[node] = time.monotonic(), seen

    async def _look(self, node: Node) -> Look | None:
        at, last = self._looks.get(node.id, (-_LOOK_GOOD, None))
        if last is not None and time.monotonic() < at + _LOOK_GOOD:
            return last
        there = self._ray.remote(look).options(num_cpus=0, max_retries=0, scheduling_strategy=self._at(node.id))
        try:
            seen: Look = await self.ask(there.remote(), _LOOK_TIMEOUT)
        except (VmmError, TimeoutError):
            return None
        self.told(node.id, seen)
        return seen

    # --- actors ---------------------------------------------------------------------------------------------

    def resident(self, wanted: Wanted, generation: int, host: Host) -> Any:
        """A new actor for this machine, there."""
        # Where points that measure time have a host for themselves, none of them comes to where a machine is.
        resources = {HOST: PART} if host.shared else {}
        return self._ray.remote(Resident).options(
            name=f"{wanted.name}.{generation}", namespace=NAMESPACE, lifetime="detached", num_cpus=wanted.cpus,
            memory=wanted.memory, resources=resources, max_restarts=0, max_concurrency=_THREADS,
            scheduling_strategy=self._at(host.id)).remote(wanted, generation, host.id, renew)

    def residents(self) -> Iterator[Any]:
        """Those that there are, whoever made them."""
        for name in sorted(self._ray.util.list_named_actors()):
            if name != FLEET:
                with contextlib.suppress(ValueError):       # it has just ended
                    yield self._ray.get_actor(name)

    def kill(self, actor: Any) -> None:
        """Its process, and with it what there is of its machine."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(actor)

    def _at(self, node: str) -> Any:
        return self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def renew(machine: str, generation: int, timeout: float) -> bool:
    """In a machine's actor: ask the fleet for the machine's lease (lease.py). Raises what Ray does."""
    ray = optional.ray()
    fleet = ray.get_actor(FLEET, namespace=NAMESPACE)
    return bool(ray.get(fleet.renew.remote(machine, generation), timeout=timeout))
