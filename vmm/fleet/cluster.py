"""A Ray cluster as the fleet's actor has it: its nodes, what is free on them, and the actors of machines."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import time
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import Any

from .. import optional
from ..errors import ExitCode, VmmError, one_line
from ..lab.cluster.connection import HOST, PART
from .config import Wanted
from .hosts import Look, await_end, look
from .places import Host
from .resident import Resident

__all__ = ["FLEET", "NAMESPACE", "Cluster", "Lost", "Node", "Unreachable"]

#: Of Ray's: where the fleet and its machines have their names.
NAMESPACE, FLEET = "shardvmm", "fleet"
_THREADS = 12               # of a machine's actor: so many things are done with it at once
_LOOK_TIMEOUT = 60.0        # seconds for a host to say what it has
_LOOK_GOOD = 5.0            # seconds for which that is good
_END_TIMEOUT = 40.0         # for a machine to end whose actor has; its keeper gives it 20


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

    async def call(self, actor: Any, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        """Of a machine's actor (None: there is none any more). Raises what it raises; Lost, Unreachable,
        TimeoutError."""
        if actor is None:
            raise _lost()
        return await self._ask(getattr(actor, method).remote(*arguments), timeout)

    async def _ask(self, answer: Any, timeout: float | None = None) -> Any:
        errors = self._ray.exceptions
        try:
            return await asyncio.wait_for(_awaited(answer), timeout)
        except errors.RayTaskError as exc:
            if isinstance(exc.cause, VmmError):
                raise exc.cause from None
            raise VmmError(f"{type(exc.cause).__name__}: {one_line(str(exc.cause))}", ExitCode.BUG) from None
        except errors.ActorUnavailableError:
            raise Unreachable("its host does not answer now", ExitCode.TIMEOUT) from None
        except errors.RayError:
            raise _lost() from None

    # --- the fleet's own process ------------------------------------------------------------------------------

    def write(self, key: str, value: bytes | None) -> None:
        """Keep this on the head, for the next process of the fleet's; None: no more."""
        kept = importlib.import_module("ray.experimental.internal_kv")
        if value is None:
            kept._internal_kv_del(key, namespace=NAMESPACE)
        else:
            kept._internal_kv_put(key, value, namespace=NAMESPACE)

    def written(self) -> dict[str, bytes]:
        """What is kept there."""
        kept = importlib.import_module("ray.experimental.internal_kv")
        return {key.decode(): kept._internal_kv_get(key, namespace=NAMESPACE)
                for key in kept._internal_kv_list("", namespace=NAMESPACE)}

    def wake(self) -> None:
        """Have the fleet's actor, which this process is about to be, called first of all."""
        self._ray.get_runtime_context().current_actor.wake.remote()

    def end(self) -> None:
        """The fleet's actor, for good."""
        with contextlib.suppress(ValueError):
            self.kill(self._ray.get_actor(FLEET, namespace=NAMESPACE))

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
        """Those of these nodes that answer, and can have machines; with what Ray has in all, and what was free when
        they were looked at."""
        asked = [node for node in nodes if node.alive and node.cpus]
        looks = await asyncio.gather(*map(self._look, asked))
        return [Host(node.id, node.name, node.address, node.cpus, node.memory, found[1].kvm, node.shared,
                     free=found[1].memory, looked=found[0])
                for node, found in zip(asked, looks, strict=True) if found is not None]

    def told(self, node: str, seen: Look, asked: float) -> None:
        """By the actor of a machine there, which was asked then: no process has to be started for it."""
        self._looks[node] = asked, seen

    async def _look(self, node: Node) -> tuple[float, Look] | None:
        last = self._looks.get(node.id)
        if last is not None and time.monotonic() < last[0] + _LOOK_GOOD:
            return last
        began = time.monotonic()
        try:
            self._looks[node.id] = began, await self._there(node.id, look, timeout=_LOOK_TIMEOUT)
        except (VmmError, TimeoutError):
            return None
        return self._looks[node.id]

    async def has_ended(self, node: str, machine: str) -> bool:
        """The machine of an actor that was there and is lost runs there no more: that is waited for. False: it is not
        known."""
        found = self.nodes().get(node)
        if found is None or not found.alive:
            return False
        try:
            return bool(await self._there(node, await_end, machine, _END_TIMEOUT, timeout=_LOOK_TIMEOUT))
        except (VmmError, TimeoutError):
            return False

    async def _there(self, node: str, work: Any, *arguments: Any, timeout: float) -> Any:
        """As a task on that node. Raises VmmError, TimeoutError."""
        there = self._ray.remote(work).options(num_cpus=0, max_retries=0, scheduling_strategy=self._at(node))
        return await self._ask(there.remote(*arguments), timeout)

    # --- actors ---------------------------------------------------------------------------------------------

    def resident(self, wanted: Wanted, generation: int, host: Host) -> Any:
        """A new actor for this machine, there. Raises VmmError."""
        # Where points that measure time have a host for themselves, none of them comes to where a machine is.
        resources = {HOST: PART} if host.shared else {}
        try:
            return self._ray.remote(Resident).options(
                name=_actor_name(wanted.name, generation), namespace=NAMESPACE, lifetime="detached",
                num_cpus=wanted.cpus, memory=wanted.memory, resources=resources, max_restarts=0,
                max_concurrency=_THREADS, scheduling_strategy=self._at(host.id)).remote(wanted, generation, Renewal())
        except (self._ray.exceptions.RayError, ValueError) as exc:
            raise VmmError(f"no process can be started on {host.name}: {one_line(str(exc))}",
                           ExitCode.WORKER_DIED) from None

    def actor(self, machine: str, generation: int) -> Any:
        """That of the machine; None: there is none any more."""
        try:
            return self._ray.get_actor(_actor_name(machine, generation), namespace=NAMESPACE)
        except ValueError:
            return None

    def residents(self) -> list[tuple[str, int]]:
        """Machine and generation of each actor that there is, whoever made it."""
        names = [name.rpartition(".") for name in sorted(self._ray.util.list_named_actors()) if name != FLEET]
        return [(machine, int(generation)) for machine, _, generation in names if generation.isdecimal()]

    def kill(self, actor: Any) -> None:
        """Its process, and with it what there is of its machine. None: nothing."""
        if actor is not None:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)

    def _at(self, node: str) -> Any:
        return self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def _actor_name(machine: str, generation: int) -> str:
    return f"{machine}.{generation}"


def _lost() -> Lost:
    return Lost("its process, or its host, is lost", ExitCode.WORKER_DIED)


class Renewal:
    """In a machine's actor: asks the fleet for the machine's lease (lease.py). Raises what Ray does."""

    def __init__(self) -> None:
        self._fleet: Any = None     # to look it up may take a minute when the host is cut off

    def __call__(self, machine: str, generation: int, timeout: float) -> bool:
        ray = optional.ray()
        if self._fleet is None:
            self._fleet = ray.get_actor(FLEET, namespace=NAMESPACE)
        try:
            return bool(ray.get(self._fleet.renew.remote(machine, generation), timeout=timeout))
        except ray.exceptions.ActorUnavailableError:    # another process takes its place
            raise
        except ray.exceptions.RayActorError:            # another fleet may
            self._fleet = None
            raise
