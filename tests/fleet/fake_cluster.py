"""A cluster without Ray, for a fleet in this process: nodes that can be cut off or lost, and actors whose machines run
or do not. Whether a machine runs at two places at once is seen by the actors, whatever the fleet thinks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from vmm.client.config import load_config
from vmm.errors import VmmError
from vmm.fleet.cluster import Lost, Node, Unreachable
from vmm.fleet.config import Snapshots, Wanted
from vmm.fleet.fleet import Fleet
from vmm.fleet.hosts import Look
from vmm.fleet.places import Host
from vmm.fleet.snapshots import NoSnapshot

GIB = 1 << 30
LEASE = 0.6
_OWN = 0.8          # of it, after which an actor ends its machine


def wanted(name: str, *, snapshots: bool = True, spread: str = "even", cpus: float = 1.0, accel: str = "unicorn",
           tmp: Any = None) -> Wanted:
    config = load_config("quickstart", [f"accel={accel}"], name=name)
    chain = Snapshots(tmp, 60.0, 10, LEASE) if snapshots else None
    return Wanted(name, name, config, cpus, GIB, spread, chain, False)      # type: ignore[arg-type]


class Actor:
    """Of one machine. ``runs``: the machine is here, and its guest runs. ``cut``: it hears nobody, and nobody it."""

    def __init__(self, cluster: FakeCluster, machine: Wanted, generation: int, node: str) -> None:
        self.cluster, self.wanted, self.generation, self.node = cluster, machine, generation, node
        self.dead = self.runs = self.handed_over = self.here = False
        self.over = asyncio.Event()         # the actor's end, or the machine's
        self.arrived = asyncio.Event()
        self.migrates = asyncio.Event()
        self.calls: list[str] = []
        self.source: Actor | None = None
        self.outcome: asyncio.Future[dict[str, Any]] | None = None
        self.lease = asyncio.create_task(self._lease()) if machine.snapshots is not None else None

    @property
    def cut(self) -> bool:
        return self.node in self.cluster.cut

    async def _lease(self) -> None:
        """As lease.py has it: counted from when it asks."""
        last = time.monotonic()
        while not self.dead:
            asked = time.monotonic()
            if not self.cut and await self.cluster.fleet.renew(self.wanted.name, self.generation):
                last = asked
            if time.monotonic() > last + LEASE * _OWN:
                self.die()
            await asyncio.sleep(LEASE / 20)

    def die(self) -> None:
        self.dead, self.runs = True, False
        self.cluster.seen(self)
        self.over.set()
        self.arrived.set()

    def run(self) -> None:
        self.here = self.runs = True
        self.cluster.seen(self)

    # --- as Resident has it ---------------------------------------------------------------------------------

    async def launch(self) -> dict[str, Any]:
        await self.cluster.meet("launch", self)
        self.run()
        return {"warnings": [], "accelerator": self.cluster.accelerator(self.node)}

    async def restore(self) -> dict[str, Any]:
        await self.cluster.meet("restore", self)
        if self.wanted.name not in self.cluster.snapshots:
            raise NoSnapshot(f"machine '{self.wanted.name}' has no snapshot")
        self.run()
        return {"id": "0001", "created": "now", "warnings": [], "accelerator": self.cluster.accelerator(self.node)}

    async def keep(self) -> None:
        if self.wanted.snapshots is not None:
            self.cluster.snapshots.add(self.wanted.name)

    async def status(self, seconds: float) -> dict[str, Any]:
        return {"host": self.node, "report": {"state": "running"}, "pages_per_s": None, "snapshot": None,
                "look": Look(self.cluster.memory, False)}

    async def ended(self, seconds: float) -> dict[str, Any]:
        await self.over.wait()
        return {"report": {"cause": "it has ended", "exit_code": 0}, "moved": self.handed_over}

    async def ready(self) -> str:
        await self.cluster.meet("ready", self)
        return "key"

    async def listen(self, host: str, peer: str) -> tuple[str, str]:
        await self.cluster.meet("listen", self)
        return f"{self.wanted.name}.{self.generation}", "key"

    async def migrate(self, address: str, peer: str) -> dict[str, Any]:
        self.outcome = asyncio.get_running_loop().create_future()
        try:
            name, _, generation = address.rpartition(".")
            await self.cluster.meet("migrate", self)
            there = self.cluster.actors.get((name, int(generation)))
            if there is None or there.dead or there.cut:
                raise VmmError("the target is lost")
            self.runs, self.handed_over = False, True
            self.cluster.seen(self)
            await self.cluster.meet("handed over", self)
            if there.dead or there.cut:
                raise VmmError("it was handed over, and stays paused")
            there.run()
            there.arrived.set()
            self.over.set()
            self.outcome.set_result({"status": "completed"})
        except VmmError as exc:
            self.outcome.set_exception(exc)
        return await self.outcome

    async def migrated(self) -> dict[str, Any]:
        if self.outcome is None:
            raise VmmError("its migration had not begun")
        return await asyncio.shield(self.outcome)

    async def arrive(self) -> str:
        await self.arrived.wait()
        if not self.here:
            raise VmmError("it has not arrived")
        return self.cluster.accelerator(self.node)

    async def still_handed_over(self) -> bool:
        return self.handed_over

    async def reclaim(self) -> None:
        await self.cluster.meet("reclaim", self)
        self.handed_over = False
        self.run()

    async def stop(self) -> None:
        await self.cluster.meet("stop", self)
        self.runs = False
        self.cluster.seen(self)

    async def close(self) -> None:
        self.runs = False


class FakeCluster:
    """``nodes``: their names. What a test does when an actor comes to a point is in ``points``: by the point's name."""

    def __init__(self, *nodes: str, memory: int = 8 * GIB, cpus: float = 8.0) -> None:
        self.names, self.memory, self.cpus = nodes, memory, cpus
        self.alive, self.cut = set(nodes), set[str]()
        self.kvm: set[str] = set()
        self.kept: dict[str, bytes] = {}
        self.actors: dict[tuple[str, int], Actor] = {}
        self.snapshots: set[str] = set()
        self.points: dict[str, Callable[[Actor], Coroutine[Any, Any, None]]] = {}
        self.twice: list[str] = []          # machines that ran at two places
        self.ended = False
        self.fleet = Fleet(self)            # type: ignore[arg-type]

    def again(self) -> Fleet:
        """The fleet's process is killed: what it was about is not carried on, but the actors are there."""
        for task in self.fleet._tasks:
            task.cancel()
        self.fleet = Fleet(self)            # type: ignore[arg-type]
        return self.fleet

    def seen(self, actor: Actor) -> None:
        name = actor.wanted.name
        if sum(each.runs for each in self.actors.values() if each.wanted.name == name) > 1:
            self.twice.append(name)

    async def meet(self, point: str, actor: Actor) -> None:
        if point in self.points:
            await self.points[point](actor)

    def accelerator(self, node: str) -> str:
        return "kvm" if node in self.kvm else "unicorn"

    def running(self, name: str) -> list[str]:
        """Nodes on which it runs."""
        return [actor.node for actor in self.actors.values() if actor.wanted.name == name and actor.runs]

    def lose(self, node: str) -> None:
        """It has ended, and Ray knows it."""
        self.alive.discard(node)
        for actor in self.actors.values():
            if actor.node == node:
                actor.die()

    def freeze(self, node: str) -> None:
        """Ray's own process there stands still, and Ray takes it for lost; the actors go on, and are heard."""
        self.alive.discard(node)

    def cut_off(self, node: str) -> None:
        """It runs, hears nobody, and Ray takes it for lost."""
        self.alive.discard(node)
        self.cut.add(node)

    # --- as Cluster has it ----------------------------------------------------------------------------------

    async def call(self, actor: Actor | None, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        if actor is None or actor.dead or actor.node not in self.alive:
            raise Lost("its process, or its host, is lost")
        if actor.cut:
            raise Unreachable("its host does not answer now")
        actor.calls.append(method)
        found = getattr(actor, "still_handed_over" if method == "handed_over" else method)
        work = asyncio.ensure_future(found(*arguments))
        gone = asyncio.ensure_future(self._lost(actor))
        done, _ = await asyncio.wait({work, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if gone in done or actor.dead:
            raise Lost("its process, or its host, is lost")
        if work not in done:
            raise TimeoutError
        return work.result()

    async def _lost(self, actor: Actor) -> None:
        while not actor.dead and actor.node in self.alive:
            await asyncio.sleep(0.01)

    def write(self, key: str, value: bytes | None) -> None:
        self.kept.pop(key, None)
        if value is not None:
            self.kept[key] = value

    def written(self) -> dict[str, bytes]:
        return dict(self.kept)

    def wake(self) -> None:
        asyncio.get_running_loop().create_task(self._wake())

    async def _wake(self) -> None:
        await self.fleet.wake()

    def end(self) -> None:
        self.ended = True

    def nodes(self) -> dict[str, Node]:
        return {name: Node(name, name, frozenset({name}), name, name in self.alive, self.cpus, self.memory, False)
                for name in self.names}

    def find(self, text: str) -> Node:
        return self.nodes()[text]

    async def hosts(self, nodes: Any) -> list[Host]:
        return [Host(node.id, node.name, node.address, node.cpus, node.memory, node.id in self.kvm)
                for node in nodes if node.alive]

    def told(self, node: str, seen: Look, asked: float) -> None:
        pass

    async def has_ended(self, node: str, machine: str) -> bool:
        return node in self.alive

    def resident(self, machine: Wanted, generation: int, host: Host) -> Actor:
        actor = self.actors[machine.name, generation] = Actor(self, machine, generation, host.id)
        return actor

    def actor(self, machine: str, generation: int) -> Actor | None:
        found = self.actors.get((machine, generation))
        return None if found is None or found.dead else found

    def residents(self) -> list[tuple[str, int]]:
        return [key for key, actor in self.actors.items() if not actor.dead]

    def kill(self, actor: Actor | None) -> None:
        if actor is not None and actor.node in self.alive and not actor.cut:
            actor.die()

    async def close(self) -> None:
        """Nothing of it goes on."""
        for actor in self.actors.values():
            actor.die()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
