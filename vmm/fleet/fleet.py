"""The fleet: an actor on the head of a Ray cluster, which knows its machines, and puts, moves and restores them.

It is the only one that does. Whoever asks it may go meanwhile: what was begun is carried out. It lives on the head,
since a cluster does not survive that. Should its process be killed, Ray starts another, which finds the machines by
their actors' names (``MACHINE.GENERATION``): of several of one machine the newest that has it is the right one.

A machine is lost when its actor is, whose end Ray tells: then it runs nowhere, or ends within its lease, and is
restored from its last snapshot on another host, if there is one. Events say what became of whom.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ..errors import ExitCode, VmmError
from .adoption import adopted
from .cluster import Cluster, Lost, Unreachable
from .config import Wanted
from .events import Event, Events
from .members import Member
from .places import Host, choose, place

__all__ = ["Fleet"]

_START_TIMEOUT = 180.0      # seconds until a machine runs, its actor's start and Ray's own among them
_STATUS_TIMEOUT = 10.0
_ARRIVAL_TIMEOUT = 90.0     # until it is known how a migration has ended whose source does not say
_AGAIN = 5.0                # seconds until a host with room is looked for again
_MEASURED = 0.5             # seconds, before machines are moved


class Fleet:
    """See above. Its methods take and give what can be pickled; each raises VmmError."""

    def __init__(self) -> None:
        self._cluster = Cluster()
        self._members: dict[str, Member] = {}
        self._events = Events()
        self._say = self._events.say
        self._drained: set[str] = set()     # nodes that get no machines any more
        self._gone: set[str] = set()        # nodes whose loss was said
        self._began = time.monotonic()
        self._renewed: dict[str, float] = {}    # {name: when its lease was}
        self._placing = asyncio.Lock()      # from a look at the hosts to the choice
        self._tasks: set[asyncio.Task[None]] = set()
        self._adopted: asyncio.Task[None] | None = None

    # --- what is asked of it ----------------------------------------------------------------------------------

    async def add(self, machines: list[Wanted], restored: bool) -> dict[str, list[str]]:
        """Have these too, all or none; {name: warnings}. ``restored``: from their last snapshots."""
        await self._ready()
        new = {each.name: Member(each, on_kvm=each.config.accel == "kvm") for each in machines}
        async with self._placing:
            if taken := sorted(new.keys() & self._members.keys()):
                raise VmmError(f"machine '{taken[0]}' is one of the fleet's already (vmm fleet stop {taken[0]} ends "
                               "it)")
            placed = place([member.load for member in new.values()], await self._hosts())
            if homeless := [new[name] for name, host in placed.items() if host is None]:
                raise VmmError(f"{homeless[0].no_room}; {len(homeless)} of {len(new)} machines have no place")
            homes = {name: host for name, host in placed.items() if host is not None}
            for name, host in homes.items():
                new[name].node = host.id
            self._members |= new
        began = await asyncio.gather(*(self._start(member, homes[name], restored) for name, member in new.items()),
                                     return_exceptions=True)
        for name, each in zip(new, began, strict=True):
            if isinstance(each, BaseException):
                await self._end(new.values())
                raise VmmError(f"machine '{name}' was not started, nor were the others: {_text(each)}",
                               getattr(each, "exit_code", ExitCode.BAD_INPUT))
        return {name: each for name, each in zip(new, began, strict=True) if not isinstance(each, BaseException)}

    async def overview(self, seconds: float) -> dict[str, Any]:
        """``nodes``, ``machines``, ``events``. ``seconds``: for so long what each machine dirties is measured."""
        await self._ready()
        told = await asyncio.gather(*(self._status(member, seconds) for member in self._members.values()))
        nodes, found = self._cluster.nodes(), []
        for each in told:
            each["node_name"] = nodes[each["node"]].name if each["node"] in nodes else ""
        hosts = {host.id: host for host in await self._hosts(everyone=True)}
        for node in nodes.values():
            if not node.alive and node.id not in self._gone:
                continue
            host = hosts.get(node.id)
            found.append({
                "node": node.id, "name": node.name, "address": node.address,
                "state": "lost" if not node.alive else "drained" if node.id in self._drained else "alive",
                "machines": sum(each["node"] == node.id for each in told if each["state"] not in ("ended", "lost")),
                "cpus": node.cpus, "cpus_free": None if host is None else host.cpus,
                "memory_free": None if host is None else host.memory, "kvm": None if host is None else host.kvm})
        return {"nodes": found, "machines": told, "events": [asdict(event) for event in self._events.since(0)]}

    async def renew(self, name: str, generation: int) -> bool:
        """Asked by a machine's actor: it still has the machine (lease.py)."""
        member = self._members.get(name)
        if member is not None and generation in member.over:
            return False
        self._renewed[name] = time.monotonic()
        return True

    async def next_event(self) -> int:
        """The number that the next event will have."""
        return self._events.next

    async def events(self, after: int) -> list[Event]:
        """Those from this number on."""
        return self._events.since(after)

    async def drain(self, text: str, at_most: int) -> list[dict[str, Any]]:
        """Move every machine of the node to others, so many at a time, those first that dirty least; for each ``name``,
        and ``to`` with its migration's ``report``, or ``error``. From now on the node gets no machines."""
        await self._ready()
        node = self._cluster.find(text)
        self._drained.add(node.id)
        await asyncio.gather(*(self._status(member, _MEASURED) for member in self._members.values()))
        async with self._placing:
            hosts = await self._hosts()
            going = [m for m in self._members.values() if m.node == node.id and m.state == "running"]
            placed = place([member.load for member in going], hosts)
            for member in going:
                member.target = _id(placed[member.name])
        self._say(f"node {node.name} is drained: {len(going)} machines move, {at_most} at a time")
        turn = asyncio.Semaphore(at_most)

        async def move(member: Member) -> dict[str, Any]:
            host = placed[member.name]
            try:
                if host is None:
                    raise VmmError(member.no_room)
                async with turn, member.lock:
                    return {"name": member.name, "to": host.name, "report": await self._move(member, host)}
            except VmmError as exc:
                self._say(f"{member.name} was not moved: {exc}")
                return {"name": member.name, "error": str(exc)}
            finally:
                member.target = ""

        return list(await asyncio.gather(*map(move, sorted(going, key=lambda member: member.rate))))

    async def stop(self, names: list[str]) -> list[str]:
        """End these machines (none: all); who they were."""
        await self._ready()
        if unknown := [name for name in names if name not in self._members]:
            raise VmmError(f"machine '{unknown[0]}' is none of the fleet's", ExitCode.NO_MACHINE)
        members = [self._members[name] for name in names or sorted(self._members)]
        await self._end(members)
        return [member.name for member in members]

    # --- a machine's life ---------------------------------------------------------------------------------------

    async def _start(self, member: Member, host: Host, restored: bool) -> list[str]:
        """There; warnings."""
        async with member.lock:
            member.actor = actor = self._resident(member, host)
            try:
                found = await self._cluster.ask((actor.restore if restored else actor.launch).remote(), _START_TIMEOUT)
            except Lost:
                raise VmmError(f"its process on {host.name} has ended: install the same shardvmm on each host (Ray's "
                               "logs there may say more)", ExitCode.WORKER_DIED) from None
            except TimeoutError:
                raise VmmError(f"it does not run after {_START_TIMEOUT:.0f} s: other programs of the cluster may have "
                               "what it needs", ExitCode.TIMEOUT) from None
            member.state = "running"
            self._follow(member)
            if not restored:
                return list(found)
            member.detail = _from(found)
            return []

    def _follow(self, member: Member) -> None:
        """To its end, here or after it has moved."""
        task = asyncio.create_task(self._to_its_end(member, member.actor))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _to_its_end(self, member: Member, actor: Any) -> None:
        report: dict[str, Any] | None = None
        lost = ""
        while not (report or lost):
            try:
                report = await self._cluster.ask(actor.ended.remote())
            except Unreachable:
                await asyncio.sleep(_AGAIN)
            except Lost as exc:
                lost = str(exc)
            except VmmError as exc:
                report = {"exit_code": int(exc.exit_code), "cause": str(exc)}
        async with member.lock:     # while it moves, one of its two actors ends
            if member.actor is not actor or member.state == "stopping":
                return
            member.actor = None
            if report is not None and report.get("handed_over"):
                lost = "it was handed over, and has not arrived"
            if report is None or lost:
                await self._restore(member, lost)
                return
            self._cluster.kill(actor)
            member.state, member.report = "ended", report
            member.detail = f"{report['cause']} (exit code {report['exit_code']})"
            self._say(f"{member.name} has ended: {member.detail}")

    async def _move(self, member: Member, host: Host) -> dict[str, Any]:
        """Its migration's report. The caller holds its lock."""
        if member.state != "running":
            raise VmmError(f"it is {member.state}")
        if member.wanted.config.replay is not None:
            raise VmmError("accel: replay has no memory that could be moved")
        ask, old, new = self._cluster.ask, member.actor, self._resident(member, host)
        self._say(f"{member.name} moves to {host.name}")
        member.state, member.detail = "moving", f"to {host.name}"
        report: dict[str, Any] = {}
        try:
            where, key = await ask(new.listen.remote(host.address, await ask(old.public_key.remote())), _START_TIMEOUT)
            report = await ask(old.migrate.remote(where, key))
            await ask(new.arrive.remote())
        except (VmmError, TimeoutError) as exc:
            if not await self._has_moved(old, new, exc):
                self._cluster.kill(new)
                member.over.add(member.generation)
                with contextlib.suppress(VmmError):     # should it be lost: whoever follows it restores it
                    await self._take_back(member, host)
                member.state, member.detail = "running", ""
                raise VmmError(_text(exc), ExitCode.MIGRATION_FAILED) from None
        member.actor, member.node, member.state, member.detail = new, host.id, "running", ""
        self._follow(member)
        with contextlib.suppress(VmmError):
            await ask(old.close.remote())
        self._cluster.kill(old)
        self._say(f"{member.name} runs on {host.name}, after {report.get('total_time', 0.0) / 1000:.1f} s; it stood "
                  f"still for {report.get('downtime', 0.0):.0f} ms")
        return report

    async def _has_moved(self, old: Any, new: Any, exc: Exception) -> bool:
        """All the same: the source was lost after the hand-over, or its answer was, or it has heard nothing since."""
        handed_over = True      # unless it says that it was not
        with contextlib.suppress(VmmError, TimeoutError):
            handed_over = isinstance(exc, Lost) or await self._cluster.ask(old.handed_over.remote(), _STATUS_TIMEOUT)
        deadline = time.monotonic() + _ARRIVAL_TIMEOUT
        while handed_over and time.monotonic() < deadline:
            try:
                await self._cluster.ask(new.arrive.remote(), _ARRIVAL_TIMEOUT)
                return True
            except Unreachable:
                await asyncio.sleep(_AGAIN)
            except (VmmError, TimeoutError):
                break
        return False

    async def _take_back(self, member: Member, host: Host) -> None:
        """Should it have been handed over to that host, which does not run it. Raises VmmError."""
        old, snapshots = member.actor, member.wanted.snapshots
        if not await self._cluster.ask(old.handed_over.remote()):
            return
        if snapshots is None:       # it may be cut off only, and has no lease
            self._say(f"{member.name} was handed over to {host.name}, which does not answer, and stays paused where it "
                      f"was: should it not run there, vmm resume {member.name} --force on its host has it go on")
            return
        await self._expire(member, snapshots.lease)
        await self._cluster.ask(old.reclaim.remote())
        self._say(f"{member.name} goes on where it was: {host.name}, to which it was handed over, does not answer")

    async def _expire(self, member: Member, lease: float) -> None:
        """Until no actor has it that is not to have it (``over``), wherever it is."""
        until = self._renewed.get(member.name, self._began) + lease
        await asyncio.sleep(max(0.0, until - time.monotonic()))

    async def _restore(self, member: Member, why: str) -> None:
        """From its last snapshot, as soon as a host has room for it. The caller holds its lock."""
        member.over.add(member.generation)
        lost = self._say_lost_node(member.node)
        member.node = ""
        if member.wanted.snapshots is None:
            member.state, member.detail = "lost", f"{why}; no snapshots are taken of it"
            self._say(f"{member.name} is lost: {member.detail}")
            return
        member.state, member.detail = "restoring", why
        self._say(f"{member.name} is lost: {why}; it is restored from its last snapshot")
        if lost:    # which may be cut off only
            await self._expire(member, member.wanted.snapshots.lease)
        while member.state == "restoring":
            async with self._placing:
                host = choose(member.load, await self._hosts())
                if host is not None:
                    member.node, member.actor = host.id, self._resident(member, host)
            if host is None:
                member.detail = member.no_room
                await asyncio.sleep(_AGAIN)
                continue
            try:
                found = await self._cluster.ask(member.actor.restore.remote(), _START_TIMEOUT)
            except Lost:
                self._say_lost_node(host.id)
                member.actor, member.node = None, ""
                member.over.add(member.generation)
                await self._expire(member, member.wanted.snapshots.lease)
            except (VmmError, TimeoutError) as exc:
                self._cluster.kill(member.actor)
                member.actor, member.state, member.detail = None, "lost", _text(exc)
                self._say(f"{member.name} is lost: {member.detail}")
            else:
                member.state, member.detail = "running", _from(found)
                self._say(f"{member.name} runs on {host.name}, {member.detail}")
                self._follow(member)

    async def _end(self, members: Iterable[Member]) -> None:
        async def end(member: Member) -> None:
            member.state = "stopping"
            async with member.lock:
                if member.actor is not None:
                    with contextlib.suppress(VmmError, TimeoutError):
                        await self._cluster.ask(member.actor.stop.remote(), _START_TIMEOUT)
                    self._cluster.kill(member.actor)
                    member.actor = None
            self._members.pop(member.name, None)

        await asyncio.gather(*map(end, list(members)))

    # --- hosts, and what is known -------------------------------------------------------------------------------

    async def _hosts(self, *, everyone: bool = False) -> list[Host]:
        """That may have machines, or ``everyone`` that is alive; each with what is free. The caller chooses before
        others do (``_placing``)."""
        nodes = [node for node in self._cluster.nodes().values() if everyone or node.id not in self._drained]
        hosts = await self._cluster.hosts(nodes)
        for host in hosts:
            for member in self._members.values():
                member.take_from(host)
        return hosts

    def _resident(self, member: Member, host: Host) -> Any:
        """A new actor for it, there."""
        member.generation += 1
        return self._cluster.resident(member.wanted, member.generation, host)

    async def _status(self, member: Member, seconds: float) -> dict[str, Any]:
        """For ``overview``; and what it dirties is known from then on."""
        found: dict[str, Any] = {}
        if member.actor is not None and member.state != "starting":
            with contextlib.suppress(VmmError, TimeoutError):
                found = await self._cluster.ask(member.actor.status.remote(seconds), seconds + _STATUS_TIMEOUT)
                self._cluster.told(member.node, found.pop("look"))
                if found["pages_per_s"] is not None:
                    member.rate = found["pages_per_s"]
                if found["report"] is not None:
                    member.on_kvm = found["report"].get("accelerator") == "kvm"
        return {"name": member.name, "state": member.state, "detail": member.detail, "node": member.node,
                "cpus": member.wanted.cpus, "memory": member.wanted.memory, "host": None, "pages_per_s": None,
                "snapshot": None, "report": member.report, **found}

    def _say_lost_node(self, node: str) -> bool:
        """Once, if it is; whether it is."""
        found = self._cluster.nodes().get(node)
        lost = found is None or not found.alive
        if found is not None and lost and node not in self._gone:
            self._gone.add(node)
            machines = sorted(member.name for member in self._members.values() if member.node == node)
            self._say(f"node {found.name} is lost, with {', '.join(machines)}")
        return lost

    async def _ready(self) -> None:
        """After its process was killed, it looks for its machines first."""
        if self._adopted is None:
            self._adopted = asyncio.create_task(self._adopt())
        await asyncio.shield(self._adopted)

    async def _adopt(self) -> None:
        if not self._cluster.was_lost():
            return
        self._members = await adopted(self._cluster)
        for member in self._members.values():
            self._follow(member)
        self._say(f"the fleet's own process was lost; it has found {len(self._members)} machines")


def _id(host: Host | None) -> str:
    return "" if host is None else host.id


def _from(snapshot: dict[str, Any]) -> str:
    return f"from snapshot {snapshot['id']} of {snapshot['created']}"


def _text(exc: BaseException) -> str:
    return str(exc) or ("it took too long" if isinstance(exc, TimeoutError) else type(exc).__name__)
