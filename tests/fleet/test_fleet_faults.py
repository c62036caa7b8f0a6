"""A fleet whose nodes and own process are lost at the worst moments, without Ray: the cluster is fake_cluster.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from fake_cluster import LEASE, Actor, FakeCluster, wanted

from vmm.errors import VmmError
from vmm.fleet import fleet as module
from vmm.fleet.cluster import Unreachable
from vmm.fleet.members import Member

_DEADLINE = 30.0


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fleet waits for is nothing that takes long here."""
    for name, seconds in {"_AGAIN": 0.05, "_AGAIN_MOST": 0.1, "_LOOK": 0.01, "_ARRIVAL_TIMEOUT": 0.5,
                          "_FAREWELL": 0.01, "_MEASURED": 0.0}.items():
        monkeypatch.setattr(module, name, seconds)


def on(*nodes: str, **options: Any) -> Callable[[Callable[[FakeCluster], Coroutine[Any, Any, None]]],
                                                Callable[[], None]]:
    """A test of a cluster of these nodes; in the end no machine has run twice."""
    def made(body: Callable[[FakeCluster], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        async def whole() -> None:
            cluster = FakeCluster(*nodes, **options)
            try:
                await asyncio.wait_for(body(cluster), _DEADLINE)
                assert cluster.twice == []
            finally:
                await cluster.close()

        def test() -> None:
            asyncio.run(whole())

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return made


async def until(holds: Callable[[], object]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


def member(cluster: FakeCluster, name: str = "web") -> Member:
    return cluster.fleet._members[name]


def said(cluster: FakeCluster) -> str:
    return "\n".join(event.text for event in cluster.fleet._events.since(0))


async def start(cluster: FakeCluster, *names: str, **options: Any) -> None:
    await cluster.fleet.add([wanted(name, **options) for name in names or ("web",)], False)


def held(*, at: str, cluster: FakeCluster) -> tuple[asyncio.Event, asyncio.Event]:
    """Whoever comes to that point waits there: the first event says that somebody has, the second lets it go on."""
    there, go = asyncio.Event(), asyncio.Event()

    async def stay(actor: Actor) -> None:
        there.set()
        await go.wait()

    cluster.points[at] = stay
    return there, go


def fails(*, at: str, cluster: FakeCluster, times: int = 1, why: str = "no", kind: type[Exception] = VmmError) -> None:
    left = [times]

    async def fail(actor: Actor) -> None:
        if left[0]:
            left[0] -= 1
            raise kind(why)

    cluster.points[at] = fail


# --- who has it --------------------------------------------------------------------------------------------------


@on("a", "b", "c")
async def test_a_machine_that_stayed_after_a_failed_move_is_put_out_when_its_node_is_lost(
        cluster: FakeCluster) -> None:
    """And its actor is not: it still asks for the lease."""
    await start(cluster)
    fails(at="migrate", cluster=cluster)
    (moved,) = await cluster.fleet.drain("a", 1)
    assert "error" in moved
    assert cluster.running("web") == ["a"]
    cluster.freeze("a")
    await until(lambda: member(cluster).state == "running" and member(cluster).node != "a")
    assert cluster.running("web") == [member(cluster).node]


@on("a", "b")
async def test_nobody_but_its_actor_gets_a_lease_of_a_machine(cluster: FakeCluster) -> None:
    await start(cluster)
    generation = member(cluster).holder
    assert await cluster.fleet.renew("web", generation)
    assert not await cluster.fleet.renew("web", generation + 1)
    assert not await cluster.fleet.renew("nobody", 1)
    await cluster.fleet.stop(["web"])
    assert not await cluster.fleet.renew("web", generation)
    await start(cluster)
    assert member(cluster).holder > generation      # one that was not reached is never taken for another


@on("a", "b")
async def test_a_node_that_comes_back_has_no_machine_that_was_restored(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.cut_off("a")
    await until(lambda: cluster.running("web") == ["b"])
    cluster.cut.clear()
    cluster.alive.add("a")
    await asyncio.sleep(LEASE)
    assert cluster.running("web") == ["b"]


@on("a", "b")
async def test_what_was_handed_over_to_a_host_that_is_cut_off_goes_on_where_it_was(cluster: FakeCluster) -> None:
    """When the lease there is over."""
    await start(cluster)

    async def cut(actor: Actor) -> None:
        cluster.cut_off("b")

    cluster.points["handed over"] = cut
    (moved,) = await cluster.fleet.drain("a", 1)
    assert "error" in moved
    assert cluster.running("web") == ["a"]
    assert "goes on where it was" in said(cluster)


@on("a", "b", "c")
async def test_a_machine_that_neither_end_of_a_move_answers_for_is_restored_when_no_lease_is_left(
        cluster: FakeCluster) -> None:
    """The source's actor has ended, and the target is cut off with the machine."""
    await start(cluster)

    async def lost(actor: Actor) -> None:
        there = cluster.actors["web", actor.generation + 1]
        there.run()
        cluster.cut_off(there.node)
        actor.die()

    cluster.points["handed over"] = lost
    (moved,) = await cluster.fleet.drain("a", 1)
    assert "error" in moved
    await until(lambda: len(cluster.running("web")) == 1 and member(cluster).state == "running")
    assert cluster.running("web") == [member(cluster).node] != ["a"]


@on("a", "b", "c")
async def test_a_machine_that_is_lost_as_it_moves_runs_nowhere_until_it_is_restored(cluster: FakeCluster) -> None:
    """It is never written down as running on the host that was lost."""
    await start(cluster)
    write, seen = cluster.write, []

    def look(key: str, value: bytes | None) -> None:
        if "a" not in cluster.alive:
            seen.append((member(cluster).state, member(cluster).node))
        write(key, value)

    async def lost(actor: Actor) -> None:
        cluster.lose("a")
        cluster.actors["web", actor.generation + 1].arrived.set()       # it waits no longer, and nothing has come
        raise VmmError("it is lost")

    cluster.points["migrate"] = lost
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "write", look)
        (moved,) = await cluster.fleet.drain("a", 1)
        assert "error" in moved
        await until(lambda: member(cluster).state == "running" and member(cluster).node != "a")
    assert ("restoring", "") in seen
    assert ("running", "a") not in seen


@on("a", "b")
async def test_a_machine_that_cannot_be_taken_back_is_said_to_be_so(cluster: FakeCluster) -> None:
    await start(cluster)

    async def cut(actor: Actor) -> None:
        cluster.cut_off("b")

    cluster.points["handed over"] = cut
    fails(at="reclaim", cluster=cluster, why="its memory is gone")
    await cluster.fleet.drain("a", 1)
    assert "its memory is gone" in member(cluster).detail
    assert "its memory is gone" in said(cluster)


@on("a", "b")
async def test_a_machine_of_a_new_fleet_is_not_restored_while_one_of_an_earlier_may_have_a_lease(
        cluster: FakeCluster) -> None:
    began = time.monotonic()
    cluster.snapshots.add("web")
    await cluster.fleet.add([wanted("web")], True)
    assert time.monotonic() >= began + LEASE
    assert cluster.running("web") == [member(cluster).node]


# --- the fleet's own process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("snapshots", [True, False])
@pytest.mark.parametrize("point", ["listen", "migrate", "handed over"])
def test_a_move_survives_the_fleets_process(point: str, snapshots: bool) -> None:
    """Where it had begun, the machine goes to its target; else it stays."""
    @on("a", "b")
    async def test(cluster: FakeCluster) -> None:
        await start(cluster, snapshots=snapshots)
        there, go = held(at=point, cluster=cluster)
        drain = asyncio.ensure_future(cluster.fleet.drain("a", 1))
        await there.wait()
        drain.cancel()
        cluster.again()
        await asyncio.sleep(0.05)       # it asks while neither end can say how it went
        go.set()
        node = "a" if point == "listen" else "b"
        await until(lambda: member(cluster).state == "running" and member(cluster).node == node)
        await until(lambda: sum(not actor.dead for actor in cluster.actors.values()) == 1)
        assert cluster.running("web") == [node]
        assert (await cluster.fleet.overview(0.0))["nodes"][0]["state"] == "drained"
        await asyncio.sleep(LEASE)
        assert cluster.running("web") == [node]

    test()


@on("a", "b")
async def test_a_fleet_whose_process_was_lost_needs_no_client_to_go_on(cluster: FakeCluster) -> None:
    """Another machine's actor asks for its lease."""
    await start(cluster, "web", "db")
    lost = member(cluster).node
    assert member(cluster, "db").node != lost
    cluster.wake = lambda: None         # type: ignore[method-assign]
    cluster.again()
    cluster.lose(lost)
    await until(lambda: cluster.running("web"))
    assert cluster.running("web") == [member(cluster, "db").node]


@on("a", "b", cpus=1.0)
async def test_a_fleet_whose_process_was_lost_knows_machines_that_have_no_actor(cluster: FakeCluster) -> None:
    await start(cluster, "web", "db")
    lost = member(cluster).node
    cluster.lose(lost)
    await until(lambda: "no node has room" in member(cluster).detail)
    cluster.again()
    await until(lambda: "no node has room" in member(cluster).detail)
    assert member(cluster).state == "restoring"
    await cluster.fleet.stop(["db"])
    await until(lambda: member(cluster).state == "running")


@on("a", "b", cpus=1.0)
async def test_a_machine_that_was_restored_to_a_node_when_the_fleet_was_lost_runs_once(cluster: FakeCluster) -> None:
    await start(cluster)
    there, go = held(at="restore", cluster=cluster)
    cluster.lose("a")
    await there.wait()
    cluster.again()
    go.set()
    await until(lambda: member(cluster).state == "running")
    assert cluster.running("web") == ["b"]


@on("a", "b")
async def test_a_machine_whose_host_does_not_answer_a_new_process_is_followed_later(cluster: FakeCluster) -> None:
    await start(cluster, snapshots=False)
    cluster.cut.add("a")
    cluster.again()
    await asyncio.sleep(0.1)
    assert (member(cluster).state, member(cluster).node) == ("running", "a")
    cluster.cut.clear()
    cluster.lose("a")
    await until(lambda: member(cluster).state == "lost")


@on("a")
async def test_a_start_that_the_fleets_process_did_not_survive_is_undone(cluster: FakeCluster) -> None:
    there, go = held(at="launch", cluster=cluster)
    add = asyncio.ensure_future(start(cluster))
    await there.wait()
    add.cancel()
    cluster.again()
    go.set()
    await until(lambda: not cluster.fleet._members)
    assert cluster.running("web") == []
    assert all(actor.dead for actor in cluster.actors.values())


@on("a")
async def test_a_stop_survives_the_fleets_process(cluster: FakeCluster) -> None:
    await start(cluster)
    there, go = held(at="stop", cluster=cluster)
    stop = asyncio.ensure_future(cluster.fleet.stop([]))
    await there.wait()
    stop.cancel()
    cluster.again()
    go.set()
    await until(lambda: not cluster.fleet._members)
    assert cluster.running("web") == []
    cluster.again()
    assert not cluster.fleet._members


@on("a")
async def test_what_nobody_looks_after_any_more_is_said(cluster: FakeCluster) -> None:
    await start(cluster)
    cluster.has_ended = None        # type: ignore[assignment]
    cluster.lose("a")
    await until(lambda: "web is not looked after any more, which is a bug: TypeError" in said(cluster))


# --- starts -------------------------------------------------------------------------------------------------------


@on("a", "b")
async def test_all_are_started_or_none_and_then_they_can_be_started_again(cluster: FakeCluster) -> None:
    fails(at="launch", cluster=cluster)
    with pytest.raises(VmmError, match="was not started, nor were the others: no"):
        await start(cluster, "web", "db", "mail")
    assert not cluster.fleet._members
    assert all(actor.dead and not actor.runs for actor in cluster.actors.values())
    assert cluster.snapshots == set()       # nothing is in the way of the next start
    await start(cluster, "web", "db", "mail")
    assert cluster.snapshots == {"web", "db", "mail"}


@on("a")
async def test_a_fleet_that_ends_takes_no_machines(cluster: FakeCluster) -> None:
    await start(cluster)
    assert not await cluster.fleet.end_if_empty()
    await cluster.fleet.stop([])
    assert await cluster.fleet.end_if_empty()
    with pytest.raises(VmmError, match="has just ended"):
        await start(cluster)
    await until(lambda: cluster.ended)


# --- machines that are lost ---------------------------------------------------------------------------------------


@on("a", "b")
async def test_a_machine_without_snapshots_is_lost(cluster: FakeCluster) -> None:
    await start(cluster, "web", snapshots=False)
    await start(cluster, "db")
    cluster.snapshots.clear()
    for name in ("web", "db"):
        next(actor for actor in cluster.actors.values() if actor.wanted.name == name).die()
    await until(lambda: member(cluster).state == member(cluster, "db").state == "lost")
    assert member(cluster).detail.endswith("no snapshots are taken of it")
    assert member(cluster, "db").detail == "machine 'db' has no snapshot"


@on("a", "b", "c")
async def test_a_restore_that_fails_is_tried_elsewhere_and_again(cluster: FakeCluster) -> None:
    await start(cluster)
    fails(at="restore", cluster=cluster, times=3, why="no memory just now")
    cluster.lose("a")
    await until(lambda: member(cluster).state == "running" and member(cluster).node != "a")
    tried = [actor.node for actor in cluster.actors.values() if "restore" in actor.calls]
    assert set(tried[:2]) == {"b", "c"}
    assert len(tried) == 4
    assert "web is not restored yet" in said(cluster)


@on("a", "b", cpus=1.0)
async def test_a_machine_that_waits_for_room_can_be_stopped(cluster: FakeCluster) -> None:
    await start(cluster, "web", "db")
    cluster.lose(member(cluster).node)
    await until(lambda: "no node has room" in member(cluster).detail)
    await cluster.fleet.stop(["web"])
    assert sorted(cluster.fleet._members) == ["db"]


# --- drains -------------------------------------------------------------------------------------------------------


@on("a", "b", "c")
async def test_a_node_that_has_just_gone_silent_is_drained_of_nothing(cluster: FakeCluster) -> None:
    await start(cluster)
    fails(at="ready", cluster=cluster, kind=Unreachable, why="its host does not answer now")
    (moved,) = await cluster.fleet.drain("a", 1)
    assert moved == {"name": "web", "error": "its host does not answer now"}
    assert len(cluster.actors) == 1         # none was begun
    assert member(cluster).state == "running"


@on("a", "b")
async def test_an_actor_that_cannot_listen_does_not_stay(cluster: FakeCluster) -> None:
    await start(cluster)
    fails(at="listen", cluster=cluster)
    await cluster.fleet.drain("a", 1)
    assert [actor.dead for actor in cluster.actors.values()] == [False, True]
    assert cluster.running("web") == ["a"]


@pytest.mark.parametrize("point", ["launch", "restore", "migrate"])
def test_machines_that_are_on_their_way_to_a_node_are_moved_on_when_it_is_drained(point: str) -> None:
    @on("a", "b", "c")
    async def test(cluster: FakeCluster) -> None:
        there, go = held(at=point, cluster=cluster)
        work: list[Awaitable[Any]] = []
        if point == "launch":
            work.append(asyncio.ensure_future(start(cluster)))
        else:
            await start(cluster)
            if point == "restore":
                cluster.lose("a")
            else:
                work.append(asyncio.ensure_future(cluster.fleet.drain("a", 1)))
        await there.wait()
        node = member(cluster).target or member(cluster).node
        drain = asyncio.ensure_future(cluster.fleet.drain(node, 1))
        await asyncio.sleep(0.05)
        assert not drain.done()
        del cluster.points[point]
        go.set()
        (moved,) = await drain
        assert moved["name"] == "web"
        assert cluster.running("web") == [moved["to"]] == [member(cluster).node]
        assert moved["to"] != node
        await asyncio.gather(*work)

    test()


@on("a", "b", "c")
async def test_a_move_that_waits_for_its_turn_looks_where_its_machine_is_and_may_go(cluster: FakeCluster) -> None:
    """The node to which it was to go is drained meanwhile; and then it is asked for once more."""
    await start(cluster, "web", "db", spread="pack")
    node = member(cluster).node
    assert member(cluster, "db").node == node
    there, go = held(at="migrate", cluster=cluster)
    first = asyncio.ensure_future(cluster.fleet.drain(node, 1))
    await there.wait()
    target = member(cluster).target or member(cluster, "db").target
    waits = "web" if member(cluster, "db").state == "moving" else "db"
    second = asyncio.ensure_future(cluster.fleet.drain(node, 1))        # of machines that the first one moves
    third = asyncio.ensure_future(cluster.fleet.drain(target, 1))
    await asyncio.sleep(0.05)
    del cluster.points["migrate"]
    go.set()
    (left,) = {"a", "b", "c"} - {node, target}
    assert len(await first) == 2
    assert await second == []
    await third
    for name in ("web", "db"):
        assert cluster.running(name) == [member(cluster, name).node] == [left]
    assert target not in [actor.node for actor in cluster.actors.values() if actor.wanted.name == waits]


@on("a", "b", "c")
async def test_two_drains_of_a_node_move_each_machine_once(cluster: FakeCluster) -> None:
    await start(cluster, "web", "db", spread="pack")
    node = member(cluster).node
    moved = await asyncio.gather(cluster.fleet.drain(node, 1), cluster.fleet.drain(node, 1))
    assert sorted(each["name"] for each in moved[0] + moved[1]) == ["db", "web"]
    assert len(cluster.actors) == 4


@on("a", "b", "c")
async def test_a_machine_that_came_to_kvm_stays_on_kvm(cluster: FakeCluster) -> None:
    """It was to take what there is."""
    cluster.kvm = {"a", "c"}
    await start(cluster, accel="auto", snapshots=False)
    assert member(cluster).node == "a"
    (moved,) = await cluster.fleet.drain("a", 1)
    assert moved["to"] == "c"
    (moved,) = await cluster.fleet.drain("c", 1)
    assert "KVM" in moved["error"]


@on("a", "b")
async def test_what_a_host_has_is_noted_for_that_host(cluster: FakeCluster) -> None:
    """The machine that says so moves meanwhile."""
    await start(cluster)
    told: list[str] = []
    cluster.told = lambda node, seen, asked: told.append(node)      # type: ignore[method-assign]
    status = Actor.status

    async def late(self: Actor, seconds: float) -> dict[str, Any]:
        found = await status(self, seconds)
        member(cluster).node = "b"
        return found

    actor = member(cluster).actor
    actor.status = late.__get__(actor)
    await cluster.fleet.overview(0.0)
    assert told == ["a"]
