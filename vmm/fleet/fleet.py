"""The fleet: an actor on the head of a Ray cluster, which knows its machines, and puts, moves and restores them.

It is the only one that does. Whoever asks it may go meanwhile: what was begun is carried out. It lives on the head,
since a cluster does not survive that. Should its process be killed, Ray starts another, which goes on from what this
one has written down (records.py).

A machine is held by one actor, and while it starts, moves or is restored, one other may come to have it: so Member.may
says which have a lease, and no others get one. A machine is lost when the actor is that holds it, whose end Ray tells.
It is restored from its last snapshot on another host, if there is one, when it is certain that it runs nowhere: its
host says so, or the leases of all that do not hold it any more are over. Events say what became of whom.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterable
from dataclasses import asdict
from typing import Any

from ..errors import ExitCode, VmmError, one_line
from .cluster import Cluster, Lost, Unreachable
from .config import Wanted
from .events import Event, Events
from .members import Member, State
from .places import Host, choose, place
from .records import Records
from .snapshots import NoSnapshot

__all__ = ["Fleet"]

_START_TIMEOUT = 180.0      # seconds until a machine runs, its actor's start and Ray's own among them
_STATUS_TIMEOUT = 10.0
_ARRIVAL_TIMEOUT = 90.0     # until it is known how a migration has ended whose source does not say
_AGAIN = 5.0                # seconds until a host with room is looked for again
_AGAIN_MOST = 60.0          # or one that can restore a machine, after several tries
_LOOK = 0.2                 # seconds between two looks whether what is under way with a machine has ended
_FOLLOWED = 300.0           # seconds for which a machine's actor is asked at a time whether it has ended
_MEASURED = 0.5             # seconds, before machines are moved
_FAREWELL = 1.0             # seconds until the fleet ends


class Fleet:
    """See above. Its methods take and give what can be pickled; each raises VmmError."""

    def __init__(self, cluster: Cluster | None = None) -> None:
        self._cluster = cluster or Cluster()
        self._records = Records(self._cluster)
        self._members = self._records.members
        self._drained = self._records.drained   # nodes that get no machines any more
        self._events = Events()
        self._say = self._events.say
        self._gone: set[str] = set()        # nodes whose loss was said
        self._began = time.monotonic()
        self._renewed: dict[tuple[str, int], float] = {}    # {(machine, generation): when its lease was}
        self._placing = asyncio.Lock()      # from a look at the hosts to the choice
        self._tasks: set[asyncio.Task[None]] = set()
        self._awake = self._over = False
        if self._members:
            self._say(f"the fleet's own process was lost; it goes on with its {len(self._members)} machines")
            self._cluster.wake()

    # --- what is asked of it ----------------------------------------------------------------------------------

    async def wake(self) -> None:
        """Go on with what an earlier process has begun; anything else that it is asked has it do that, too."""
        self._wake()

    async def add(self, machines: list[Wanted], restored: bool) -> dict[str, list[str]]:
        """Have these too, all or none; {name: warnings}. ``restored``: from their last snapshots."""
        self._wake()
        new = {each.name: Member(each, on_kvm=each.config.accel == "kvm") for each in machines}
        async with self._placing:
            if self._over:
                raise VmmError("the fleet has just ended with its last machine: try again")
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
        if restored and any(time.monotonic() < self._began + member.lease for member in new.values()):
            self._say("machines of an earlier fleet may still have leases, which are waited for")
        began = await asyncio.gather(*(self._start(member, homes[name], restored) for name, member in new.items()),
                                     return_exceptions=True)
        for name, each in zip(new, began, strict=True):
            if isinstance(each, BaseException):
                await self._end(new.values())
                raise VmmError(f"machine '{name}' was not started, nor were the others: {_text(each)}",
                               getattr(each, "exit_code", ExitCode.BAD_INPUT))
        for member in new.values():
            self._become(member, "running", member.detail)
            self._follow(member)
        await asyncio.gather(*map(self._keep, new.values()))
        return {name: each for name, each in zip(new, began, strict=True) if not isinstance(each, BaseException)}

    async def overview(self, seconds: float) -> dict[str, Any]:
        """``nodes``, ``machines``, ``events``. ``seconds``: for so long what each machine dirties is measured."""
        self._wake()
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
                "memory_free": None if host is None else host.room, "kvm": None if host is None else host.kvm})
        return {"nodes": found, "machines": told, "events": [asdict(event) for event in self._events.since(0)]}

    async def renew(self, name: str, generation: int) -> bool:
        """Asked by a machine's actor: it still has the machine (lease.py)."""
        self._wake()
        member = self._members.get(name)
        if member is None or generation not in member.may:
            return False
        self._renewed[name, generation] = time.monotonic()
        return True

    async def next_event(self) -> int:
        """The number that the next event will have."""
        return self._events.next

    async def events(self, after: int) -> list[Event]:
        """Those from this number on."""
        return self._events.since(after)

    async def drain(self, text: str, at_most: int) -> list[dict[str, Any]]:
        """Move every machine of the node to others, so many at a time, those first that dirty least; for each ``name``,
        and ``to`` with its migration's ``report``, or ``error``. From now on the node gets no machines; those that
        are on their way to it are waited for, and move on."""
        self._wake()
        node = self._cluster.find(text)
        self._drained.add(node.id)
        alive = {each.id for each in self._cluster.nodes().values() if each.alive}
        self._records.save_drained(self._drained & alive)
        self._say(f"node {node.name} is drained: it gets no machines any more")
        moved: list[dict[str, Any]] = []
        tried: set[str] = set()
        while there := [member for member in self._members.values() if member.name not in tried
                        and node.id in (member.node, member.target)]:
            tried |= {member.name for member in there}
            await asyncio.gather(*(self._settled(member, node.id) for member in there))
            going = [member for member in there if member.node == node.id and member.state == "running"]
            moved += await self._move_all(node.id, going, at_most)
        return moved

    async def stop(self, names: list[str]) -> list[str]:
        """End these machines (none: all); who they were."""
        self._wake()
        if unknown := [name for name in names if name not in self._members]:
            raise VmmError(f"machine '{unknown[0]}' is none of the fleet's", ExitCode.NO_MACHINE)
        members = [self._members[name] for name in names or sorted(self._members)]
        await self._end(members)
        return [member.name for member in members]

    async def end_if_empty(self) -> bool:
        """Whether it has no machines: then it takes none any more, and ends soon."""
        self._wake()
        async with self._placing:
            if not self._members and not self._over:
                self._over = True
                asyncio.get_running_loop().call_later(_FAREWELL, self._cluster.end)
            return self._over

    # --- a machine's life ---------------------------------------------------------------------------------------

    async def _start(self, member: Member, host: Host, restored: bool) -> list[str]:
        """There; warnings. Others are waited for until it counts as running."""
        async with member.lock:
            if restored:        # an earlier fleet's, of a head that was lost, may still run
                await self._expire(member)
            if member.state == "stopping":
                raise VmmError("it was stopped", ExitCode.STOPPED)
            actor = self._resident(member, host)
            try:
                found = await self._cluster.call(actor, "restore" if restored else "launch", timeout=_START_TIMEOUT)
            except Lost:
                raise VmmError(f"its process on {host.name} has ended: install the same shardvmm on each host (Ray's "
                               "logs there may say more)", ExitCode.WORKER_DIED) from None
            except TimeoutError:
                raise VmmError(f"it does not run after {_START_TIMEOUT:.0f} s: other programs of the cluster may have "
                               "what it needs", ExitCode.TIMEOUT) from None
            self._held(member, actor, host.id, found["accelerator"])
            member.detail = _from(found) if restored else ""
            return list(found["warnings"])

    async def _keep(self, member: Member) -> None:
        """Its snapshots begin: not before it is certain that it runs where it does."""
        with contextlib.suppress(VmmError, TimeoutError):       # whoever follows it hears of it, too
            await self._cluster.call(member.actor, "keep", timeout=_STATUS_TIMEOUT)

    def _follow(self, member: Member) -> None:
        """To its end, here or after it has moved."""
        self._begin(self._to_its_end(member, member.actor), member)

    async def _to_its_end(self, member: Member, actor: Any) -> None:
        report: dict[str, Any] | None = None
        lost = ""
        while report is None and not lost:
            try:
                if (ended := await self._cluster.call(actor, "ended", _FOLLOWED)) is None:
                    continue
                report, lost = ended["report"], "it has moved, and has not arrived" if ended["moved"] else ""
            except Unreachable:
                await asyncio.sleep(_AGAIN)
            except Lost as exc:
                lost = str(exc)
            except VmmError as exc:
                report = {"exit_code": int(exc.exit_code), "cause": str(exc)}
        async with member.lock:     # while it moves, one of its two actors ends
            if member.actor is not actor or member.state == "stopping":
                return
            if report is None or lost:
                await self._give_up(member, lost)
                return
            self._cluster.kill(actor)
            member.actor, member.holder, member.report = None, 0, report
            self._become(member, "ended", f"{report['cause']} (exit code {report['exit_code']})")
            self._say(f"{member.name} has ended: {member.detail}")

    async def _end(self, members: Iterable[Member]) -> None:
        async def end(member: Member) -> None:
            self._become(member, "stopping")
            async with member.lock:
                for actor in self._actors(member):
                    try:
                        await self._cluster.call(actor, "stop", timeout=_START_TIMEOUT)
                    except Lost:
                        pass
                    except (VmmError, TimeoutError) as exc:
                        self._say(f"{member.name} did not answer when it was stopped: {_text(exc)}")
                    self._cluster.kill(actor)
                member.actor = None
            if self._members.pop(member.name, None) is not None:
                self._records.forget(member)

        await asyncio.gather(*map(end, list(members)))

    # --- moves --------------------------------------------------------------------------------------------------

    async def _settled(self, member: Member, node: str) -> None:
        """Until what is under way with it has not this node as its end."""
        while member.target == node or (member.node == node and member.state in ("starting", "moving", "restoring")):
            await asyncio.sleep(_LOOK)

    async def _move_all(self, node: str, going: list[Member], at_most: int) -> list[dict[str, Any]]:
        """From that node; see ``drain``."""
        await asyncio.gather(*(self._status(member, _MEASURED) for member in going))
        async with self._placing:
            placed = place([member.load for member in going], await self._hosts())
            for member in going:
                host = placed[member.name]
                member.target = "" if host is None else host.id
        turn = asyncio.Semaphore(at_most)

        async def move(member: Member) -> dict[str, Any] | None:
            host = placed[member.name]
            try:
                async with turn, member.lock:
                    if member.node != node or member.state != "running":    # it has gone, or ended, meanwhile
                        return None
                    if host is None or host.id in self._drained:
                        host = await self._choose(member)
                    return {"name": member.name, "to": host.name, "report": await self._move(member, host)}
            except VmmError as exc:
                self._say(f"{member.name} was not moved: {exc}")
                return {"name": member.name, "error": str(exc)}
            finally:
                member.target = ""

        moved = await asyncio.gather(*map(move, sorted(going, key=lambda member: member.rate)))
        return [each for each in moved if each is not None]

    async def _choose(self, member: Member) -> Host:
        """Where it can move to now. Raises VmmError."""
        async with self._placing:
            member.target = ""
            host = choose(member.load, await self._hosts())
            if host is None:
                raise VmmError(member.no_room)
            member.target = host.id
            return host

    async def _move(self, member: Member, host: Host) -> dict[str, Any]:
        """Its migration's report. The caller holds its lock."""
        if member.wanted.config.replay is not None:
            raise VmmError("accel: replay has no memory that could be moved")
        key = await self._cluster.call(member.actor, "ready")       # it may be silent: before there is another
        member.target = host.id
        self._say(f"{member.name} moves to {host.name}")
        self._become(member, "moving", f"to {host.name}")
        try:
            new = self._resident(member, host)
            where, peer = await self._cluster.call(new, "listen", host.address, key, timeout=_START_TIMEOUT)
        except (VmmError, TimeoutError) as exc:
            self._put_out(member)
            self._become(member, "running")
            raise VmmError(_text(exc), ExitCode.MIGRATION_FAILED) from None
        return await self._finish_move(member, new, "migrate", where, peer)

    async def _finish_move(self, member: Member, new: Any, *call: Any) -> dict[str, Any]:
        """From when its source may be migrating it, which answers this ``call`` with the migration's report."""
        old, to, node = member.actor, self._name(member.target), member.target
        report: dict[str, Any] = {}
        try:
            report = await self._cluster.call(old, *call)
            accelerator: str = await self._cluster.call(new, "arrive")
        except (VmmError, TimeoutError) as exc:
            accelerator = await self._has_moved(old, new, exc)
            if not accelerator:
                await self._has_not_moved(member, to)
                raise VmmError(_text(exc), ExitCode.MIGRATION_FAILED) from None
        self._held(member, new, node, accelerator)
        self._become(member, "running")
        self._follow(member)
        await self._keep(member)
        with contextlib.suppress(VmmError, TimeoutError):
            await self._cluster.call(old, "close", timeout=_START_TIMEOUT)
        self._cluster.kill(old)
        self._say(f"{member.name} runs on {to}, after {report.get('total_time', 0.0) / 1000:.1f} s; it stood still for "
                  f"{report.get('downtime', 0.0):.0f} ms")
        return report

    async def _has_moved(self, old: Any, new: Any, exc: Exception) -> str:
        """Its accelerator there, when it has all the same: the source was lost after the hand-over, or its answer was,
        or it has heard nothing since. Empty: it has not."""
        handed_over = True      # unless it says that it was not
        with contextlib.suppress(VmmError, TimeoutError):
            handed_over = isinstance(exc, Lost) or await self._cluster.call(old, "handed_over", timeout=_STATUS_TIMEOUT)
        deadline = time.monotonic() + _ARRIVAL_TIMEOUT
        while handed_over and time.monotonic() < deadline:
            try:
                return str(await self._cluster.call(new, "arrive", timeout=_ARRIVAL_TIMEOUT))
            except Unreachable:
                await asyncio.sleep(_AGAIN)
            except (VmmError, TimeoutError):
                break
        return ""

    async def _has_not_moved(self, member: Member, to: str) -> None:
        """It stays where it was, and is taken back, should it have been handed over to that host."""
        self._put_out(member)
        try:
            detail = await self._take_back(member, to)
        except Lost:        # whoever follows it restores it: it runs nowhere until then
            return
        except (VmmError, TimeoutError) as exc:
            detail = f"it does not say whether it goes on, after it was to move to {to}: {_text(exc)}"
            self._say(f"{member.name}: {detail}")
        self._become(member, "running", detail)

    async def _take_back(self, member: Member, to: str) -> str:
        """Should it have been handed over; what its users should know of it. Raises VmmError."""
        if not await self._cluster.call(member.actor, "handed_over", timeout=_ARRIVAL_TIMEOUT):
            return ""
        if member.wanted.snapshots is None:     # it may be cut off only, and has no lease
            self._say(f"{member.name} was handed over to {to}, which does not answer, and stays paused where it was: "
                      f"should it not run there, vmm resume {member.name} --force on its host has it go on")
            return f"paused: it was handed over to {to}, which does not answer"
        await self._expire(member)
        await self._cluster.call(member.actor, "reclaim", timeout=_STATUS_TIMEOUT)
        self._say(f"{member.name} goes on where it was: {to}, to which it was handed over, does not answer")
        return ""

    # --- machines that are lost ---------------------------------------------------------------------------------

    async def _give_up(self, member: Member, why: str) -> None:
        """Its actor is lost, or the machine is; it is restored from its last snapshot. The caller holds its lock."""
        self._say_lost_node(member.node)
        self._cluster.kill(member.actor)
        node, generation = member.node, member.holder
        member.node, member.actor, member.holder = "", None, 0
        if member.wanted.snapshots is None:
            self._become(member, "lost", f"{why}; no snapshots are taken of it")
            self._say(f"{member.name} is lost: {member.detail}")
            return
        self._become(member, "restoring", why)
        self._say(f"{member.name} is lost: {why}; it is restored from its last snapshot")
        await self._await_end(member, generation, node)
        await self._restore(member)

    async def _await_end(self, member: Member, generation: int, node: str) -> None:
        """Until no actor has it that may not have it; this one of them was on that node."""
        ended = await self._cluster.has_ended(node, member.name)
        await self._expire(member, generation if ended else 0)

    async def _expire(self, member: Member, ended: int = 0) -> None:
        """Until no actor that may not have it can have a lease of it, wherever that is; nor does this generation's."""
        others = [at for (name, generation), at in self._renewed.items()
                  if name == member.name and generation not in member.may | {ended}]
        until = max([self._began, *others]) + member.lease      # an earlier process may have granted one just then
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _restore(self, member: Member) -> None:
        """From its last snapshot, as soon as a host has room for it and can. The caller holds its lock."""
        failed: set[str] = set()        # hosts that could not, until there are no others
        pause, said = _AGAIN, ""
        while member.state == "restoring":
            async with self._placing:
                host = choose(member.load, [host for host in await self._hosts() if host.id not in failed])
                member.node = "" if host is None else host.id
            if host is None:
                if failed:
                    failed.clear()
                    pause = min(2 * pause, _AGAIN_MOST)
                else:
                    member.detail = member.no_room
                await self._while_restoring(member, pause)
                continue
            try:
                actor = self._resident(member, host)
                found = await self._cluster.call(actor, "restore", timeout=_START_TIMEOUT)
            except NoSnapshot as exc:
                self._put_out(member)
                self._become(member, "lost", str(exc))
                self._say(f"{member.name} is lost: {exc}")
            except (VmmError, TimeoutError) as exc:
                generation = member.coming
                self._put_out(member)
                self._say_lost_node(host.id)
                failed.add(host.id)
                self._become(member, "restoring", f"{host.name}: {_text(exc)}")
                if said != member.detail:
                    said = member.detail
                    self._say(f"{member.name} is not restored yet: {said}")
                await self._await_end(member, generation, host.id)
                member.node = ""
            else:
                self._held(member, actor, host.id, found["accelerator"])
                self._become(member, "running", _from(found))
                self._say(f"{member.name} runs on {host.name}, {_from(found)}")
                self._follow(member)
                await self._keep(member)

    async def _while_restoring(self, member: Member, seconds: float) -> None:
        """So many at most; it may be stopped meanwhile."""
        until = time.monotonic() + seconds
        while member.state == "restoring" and time.monotonic() < until:
            await asyncio.sleep(_LOOK)

    # --- after the fleet's own process was lost -------------------------------------------------------------------

    def _wake(self) -> None:
        """Once."""
        if self._awake:
            return
        self._awake = True
        known = {(member.name, generation) for member in self._members.values() for generation in member.may}
        for name, generation in self._cluster.residents():
            if (name, generation) not in known:
                self._cluster.kill(self._cluster.actor(name, generation))
        for member in self._members.values():
            self._begin(self._go_on(member), member)

    async def _go_on(self, member: Member) -> None:
        """With what was begun."""
        if member.state in ("starting", "stopping"):    # who waits for its start was told that the fleet was lost
            self._say(f"{member.name} is ended: it was {member.state} when the fleet's process was lost")
            await self._end([member])
            return
        async with member.lock:
            if member.holder:
                member.actor = self._cluster.actor(member.name, member.holder)
                self._follow(member)
            if member.state == "moving" and member.coming:
                with contextlib.suppress(VmmError):
                    await self._finish_move(member, self._cluster.actor(member.name, member.coming), "migrated")
            elif member.state == "moving":
                await self._has_not_moved(member, self._name(member.target))
            member.target = ""
            if member.state == "restoring":
                self._put_out(member)
                await self._expire(member)
                await self._restore(member)
            elif member.state == "running":
                await self._keep(member)

    def _begin(self, work: Coroutine[Any, Any, None], member: Member) -> None:
        """As a task of its own."""
        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (exc := task.exception()) is not None:
                self._say(f"{member.name} is not looked after any more, which is a bug: {type(exc).__name__}: "
                          f"{one_line(str(exc))}")

        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(ended)

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
        """A new actor for it, there. Raises VmmError."""
        member.coming = self._records.next_generation()
        self._records.save(member)
        return self._cluster.resident(member.wanted, member.coming, host)

    def _held(self, member: Member, actor: Any, node: str, accelerator: str) -> None:
        """The actor that was coming has it now."""
        member.actor, member.on_kvm = actor, accelerator == "kvm"
        member.held(node, time.monotonic())
        self._records.save(member)

    def _put_out(self, member: Member) -> None:
        """The actor that was coming is not to have it: no lease from now on."""
        generation, member.coming, member.target = member.coming, 0, ""
        self._records.save(member)
        self._cluster.kill(self._cluster.actor(member.name, generation))

    def _actors(self, member: Member) -> list[Any]:
        """That may have it, as far as there are any."""
        found = [self._cluster.actor(member.name, generation) for generation in sorted(member.may)]
        return [actor for actor in found if actor is not None]

    def _become(self, member: Member, state: State, detail: str = "") -> None:
        """What is to be stopped is nothing else any more."""
        if member.state != "stopping" and self._members.get(member.name) is member:
            member.state, member.detail = state, detail
            self._records.save(member)

    def _name(self, node: str) -> str:
        found = self._cluster.nodes().get(node)
        return found.name if found is not None else node[:6] or "another host"

    async def _status(self, member: Member, seconds: float) -> dict[str, Any]:
        """For ``overview``; and what it dirties is known from then on."""
        found: dict[str, Any] = {}
        actor, node, asked = member.actor, member.node, time.monotonic()
        if actor is not None and member.state != "starting":
            with contextlib.suppress(VmmError, TimeoutError):
                found = await self._cluster.call(actor, "status", seconds, timeout=seconds + _STATUS_TIMEOUT)
                self._cluster.told(node, found.pop("look"), asked)
                if found["pages_per_s"] is not None:
                    member.rate = found["pages_per_s"]
        return {"name": member.name, "state": member.state, "detail": member.detail, "node": member.node,
                "cpus": member.wanted.cpus, "memory": member.wanted.memory, "host": None, "pages_per_s": None,
                "snapshot": None, "report": member.report, **found}

    def _say_lost_node(self, node: str) -> None:
        """Once, if it is."""
        found = self._cluster.nodes().get(node)
        if found is not None and not found.alive and node not in self._gone:
            self._gone.add(node)
            machines = sorted(member.name for member in self._members.values() if member.node == node)
            self._say(f"node {found.name} is lost, with {', '.join(machines)}")


def _from(snapshot: dict[str, Any]) -> str:
    return f"from snapshot {snapshot['id']} of {snapshot['created']}"


def _text(exc: BaseException) -> str:
    return str(exc) or ("it took too long" if isinstance(exc, TimeoutError) else type(exc).__name__)
