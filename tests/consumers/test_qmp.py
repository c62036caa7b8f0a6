"""QMP: a client that is not ours drives a machine, every answer is what QEMU's own schema says, and what a client sends
that is no QMP ends nothing but itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import msgspec
import pytest
from command import vmm_here
from machines import end, nothing_left, replace, runs, spec, stands_still, until
from migrations import PlayedTarget, Receiver, goes_on
from qmp_schema import qemu_schema
from qmp_session import TIMEOUT, Session, serving

from vmm.client.machine import Machine
from vmm.consumers.migration import wire
from vmm.consumers.migration.upgrade import upgrade
from vmm.consumers.qmp import QmpServer
from vmm.consumers.qmp import server as server_module
from vmm.consumers.qmp.commands import TABLE
from vmm.consumers.qmp.follower import Follower
from vmm.consumers.qmp.story import Story
from vmm.errors import ExitCode, VmmError
from vmm.machine.records import ended_names
from vmm.machine.spec import MachineSpec

#: Its guest dirties a few thousand pages per second, for ever.
WALK = spec("sequential", accel="unicorn", name="source", mib=16, passes=0, spin=3000, timeout=None)
#: Members that came to QMP, or went, between versions of QEMU: what is answered here is 7.2's.
GONE_SINCE = ("query-status.singlestep", "query-migrate.ram.skipped")


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory, runtime_dir: Path) -> Iterator[Path]:
    found = runtime_dir / "qmp"
    yield found
    assert not found.exists()


@pytest.fixture(autouse=True)
def all_is_as_qemus_schema_says() -> Iterator[None]:
    """Whatever is answered and told in any of these tests (where there is a QEMU to say so)."""
    Session.all_answers.clear()
    Session.all_told.clear()
    yield
    with contextlib.suppress(pytest.skip.Exception):
        schema = qemu_schema()
        wrong = [text for name, answer in Session.all_answers if "return" in answer and schema.knows(name)
                 for text in schema.wrong_answer(name, answer["return"])]
        wrong += [text for each in Session.all_told
                  for text in schema.wrong_event(each["event"], each.get("data", {}))]
        assert not [text for text in wrong if not text.startswith(GONE_SINCE)]


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine.launch(WALK) as launched:
        yield launched


@pytest.fixture
def session(machine: Machine, path: Path) -> Iterator[Session]:
    with serving("source", path), Session(path) as found:
        yield found


# --- a client that is not ours --------------------------------------------------------------------------------------


def test_qemus_own_client_drives_a_machine(machine: Machine, path: Path) -> None:
    """qemu.qmp, with what it checks of a greeting, of answers and of events."""
    qmp = pytest.importorskip("qemu.qmp")

    async def drive() -> list[str]:
        client = qmp.QMPClient("test")
        seen: list[str] = []
        with client.listener() as events:
            await client.connect(str(path))
            assert (await client.execute("query-status"))["status"] == "running"
            await client.execute("stop")
            seen.append((await asyncio.wait_for(events.get(), TIMEOUT))["event"])
            assert await asyncio.to_thread(stands_still, machine)
            assert (await client.execute("query-status"))["running"] is False
            await client.execute("cont")
            seen.append((await asyncio.wait_for(events.get(), TIMEOUT))["event"])
            assert await asyncio.to_thread(runs, machine)
            with pytest.raises(qmp.ExecuteError) as refused:
                await client.execute("device_add", {"driver": "none"})
            assert refused.value.error_class == "CommandNotFound"
            await client.execute("quit")
            seen.append((await asyncio.wait_for(events.get(), TIMEOUT))["event"])
            with contextlib.suppress(EOFError):
                await client.disconnect()
        return seen

    with serving("source", path) as server:
        assert asyncio.run(drive()) == ["STOP", "RESUME", "SHUTDOWN"]
        assert server.wait(TIMEOUT) == 0
    assert machine.wait(TIMEOUT)["cause"] == "stopped on request"


# --- run control ----------------------------------------------------------------------------------------------------


def test_what_others_do_to_the_machine_is_told(machine: Machine, session: Session) -> None:
    assert [(cpu["cpu-index"], cpu["thread-id"]) for cpu in session.ask("query-cpus-fast")] == [
        (vcpu["index"], vcpu["pid"]) for vcpu in machine.status()["vcpus"]]
    machine.pause()
    session.event("STOP")
    assert session.ask("query-status")["status"] == "paused"
    session.ask("stop")
    machine.resume()
    session.event("RESUME")
    with machine.paused("snapshot"):
        session.event("STOP")
        assert session.ask("query-status")["status"] == "save-vm"
        session.ask("stop")
    assert session.ask("query-status")["status"] == "paused"
    session.ask("cont")
    session.event("RESUME")
    assert not session.events
    machine.stop()
    assert session.event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-signal"}
    assert session.closed()


def tiny(tmp_path: Path, code: str) -> MachineSpec:
    """Its guest is these bytes, in hex."""
    image = tmp_path / "guest.bin"
    image.write_bytes(bytes.fromhex(code))
    return spec("", accel="unicorn", image=image, load_address=0x10_0000, params=[], vcpus=1, mib=4)


ENDS = "31c0e7f4"       # exit with code 0
CRASHES = "0f0b"        # ud2


@pytest.mark.parametrize(("code", "events"), [
    (ENDS, [("RESUME", {}), ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})]),
    (CRASHES, [("RESUME", {}), ("GUEST_PANICKED", {"action": "poweroff"}),
               ("SHUTDOWN", {"guest": True, "reason": "guest-panic"})])])
@pytest.mark.parametrize("first", [[], ["stop"]], ids=["", "stopped before"])
def test_the_end_of_a_guest_is_told_as_what_it_was(code: str, events: list[Any], first: list[str], path: Path,
                                                   tmp_path: Path) -> None:
    with Machine.launch(tiny(tmp_path, code), start=False), serving("t", path) as server, Session(path) as session:
        for command in [*first, "query-status"]:
            session.ask(command)
        assert session.answers[-1][1]["return"] == {"running": False, "singlestep": False, "status": "prelaunch"}
        session.ask("cont")
        assert session.closed()
        assert [(each["event"], each.get("data", {})) for each in session.events] == events
        assert server.wait(TIMEOUT) == 0


def test_launch_starts_it_and_it_ends_with_the_machine(path: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("memory: [{size: 4MiB}]\naccel: unicorn\nguest: {workload: random, params: {writes: 0}}\n")
    assert vmm_here("launch", str(config), "--name", "t", "--detach", "--qmp", str(path)).returncode == 0
    with Session(path) as session:
        until(lambda: session.ask("query-status")["status"] == "running", "it runs")
        session.ask("quit")
        assert session.event("SHUTDOWN")["data"]["reason"] == "host-qmp-quit"
        assert session.closed()
    until(lambda: nothing_left("t") and not path.exists(), "nothing is left")


def test_a_socket_that_cannot_be_had_leaves_no_machine(path: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("memory: [{size: 4MiB}]\naccel: unicorn\nguest: {workload: random, params: {writes: 0}}\n")
    done = vmm_here("launch", str(config), "--name", "t", "--detach", "--qmp", str(tmp_path / "no" / "where"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot listen there: No such file or directory" in done.stderr
    assert nothing_left("t")
    assert ended_names() == []      # not even a record: nothing was started


def test_it_outlives_the_coordinator(machine: Machine, session: Session) -> None:
    session.ask("stop")
    session.event("STOP")
    os.kill(machine.status()["coordinator"]["pid"], signal.SIGKILL)
    assert session.ask("query-status")["status"] == "paused"
    assert machine.status()["coordinator"]["restarts"] == 1
    session.ask("cont")
    session.event("RESUME")
    assert not session.events


def test_a_resume_that_went_down_with_its_coordinator_is_told(steps: Path, machine: Machine, session: Session) -> None:
    session.ask("stop")
    session.event("STOP")
    (steps / "kill-resume-noted").touch()
    session.ask("cont")
    session.event("RESUME")
    assert machine.status()["coordinator"]["restarts"] == 1
    assert not session.events


@contextlib.contextmanager
def detached(launched: MachineSpec) -> Iterator[Machine]:
    """It lives by itself, and has ended afterwards. It is paused before its first instruction."""
    first = Machine.launch(replace(launched, linger=False), detach=True, start=False)
    first.pause()
    first.start()
    first.detach()
    try:
        with Machine.attach(launched.name) as found:
            yield found
    finally:
        end(launched.name)
        until(lambda: nothing_left(launched.name), "nothing is left")


def test_it_outlives_an_upgrade(path: Path) -> None:
    """The guest stands still for each of its two hand-overs, which are no migrations."""
    with detached(WALK) as machine, serving("source", path) as server, Session(path) as session:
        session.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        session.ask("cont")
        session.event("RESUME")
        upgrade("source")
        session.event("STOP")
        session.event("RESUME")
        assert session.ask("query-migrate") == {}
        session.ask("stop")
        session.event("STOP")
        assert stands_still(machine)
        session.ask("cont")
        session.event("RESUME")
        session.ask("quit")
        assert session.closed()
        assert server.wait(TIMEOUT) == 0
        assert {each["event"] for each in session.told} == {"STOP", "RESUME", "SHUTDOWN"}


def test_a_guest_that_ends_after_an_upgrade_has_ended_by_itself(path: Path, tmp_path: Path) -> None:
    """Though its old vCPUs were stopped; and one that was paused all the time is not said to go on."""
    with detached(tiny(tmp_path, ENDS)), serving("t", path) as server, Session(path) as session:
        upgrade("t")
        assert session.ask("query-status")["status"] == "paused"
        session.ask("cont")
        assert session.closed()
        assert server.wait(TIMEOUT) == 0
        assert [(each["event"], each.get("data", {})) for each in session.told] == [
            ("RESUME", {}), ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})]


class Deaf(Machine):
    """Its first three looks for events are ``said`` instead."""

    looks = 0
    said: dict[str, Any] | VmmError

    def events(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        self.looks += 1
        if self.looks > 3:
            yield from super().events(timeout)
        elif isinstance(self.said, VmmError):
            raise self.said
        else:
            yield self.said


def test_a_machine_that_does_not_answer_has_not_ended(machine: Machine) -> None:
    with Deaf.attach("source") as deaf:
        deaf.said = VmmError("it did not answer", ExitCode.NO_MACHINE)
        deaf.skip_events()
        machine.stop()
        report = Follower(deaf, Story(deaf.status()), lambda told: None, Event()).until_end()
        assert report is not None
        assert (report["state"], deaf.looks > 3) == ("ended", True)


def test_what_was_dropped_is_made_up_for(machine: Machine) -> None:
    told: list[str] = []

    def tell(each: list[Any]) -> None:
        told.extend(name for name, _ in each)
        machine.stop()

    with Deaf.attach("source") as deaf:
        story = Story(deaf.status())
        machine.pause()
        deaf.skip_events()      # nobody tells of it
        deaf.said = {"event": "dropped", "count": 3}
        assert Follower(deaf, story, tell, Event()).until_end() is not None
    assert told == ["STOP"]


# --- dirty rate and limit -------------------------------------------------------------------------------------------


def test_a_dirty_rate_is_that_of_the_guest(machine: Machine, session: Session) -> None:
    """The oracle: a limit that the guest is held to, and would exceed."""
    assert session.ask("query-dirty-rate")["status"] == "unstarted"
    session.ask("set-vcpu-dirty-limit", dirty_rate=2)
    for mode in ("page-sampling", "dirty-ring", "dirty-bitmap"):
        session.ask("calc-dirty-rate", calc_time=1, mode=mode)
        assert "measured already" in session.refused("calc-dirty-rate", calc_time=1)["desc"]
        assert session.ask("query-dirty-rate")["status"] == "measuring"
        until(lambda: session.ask("query-dirty-rate")["status"] == "measured", "it is measured")
        found = session.ask("query-dirty-rate")
        assert found["mode"] == mode
        assert 1 <= found["dirty-rate"] <= 8
        assert len(found.get("vcpu-dirty-rate", [])) == (2 if mode == "dirty-ring" else 0)


def test_limits_are_those_of_the_machine(machine: Machine, session: Session) -> None:
    def limits() -> list[int]:
        return [vcpu["dirty_limit_pages_per_s"] for vcpu in machine.status()["vcpus"]]

    assert session.ask("query-vcpu-dirty-limit") == []
    session.ask("set-vcpu-dirty-limit", dirty_rate=3, cpu_index=1)
    assert limits() == [0, 3 << 20 >> 12]
    assert [(each["cpu-index"], each["limit-rate"]) for each in session.ask("query-vcpu-dirty-limit")] == [(1, 3)]
    session.ask("set-vcpu-dirty-limit", dirty_rate=7)
    session.ask("cancel-vcpu-dirty-limit", cpu_index=0)
    assert limits() == [0, 7 << 20 >> 12]
    session.ask("set-vcpu-dirty-limit", dirty_rate=0)
    assert limits() == [0, 0]
    assert "there is no vCPU 9" in session.refused("set-vcpu-dirty-limit", dirty_rate=1, cpu_index=9)["desc"]


# --- migration ------------------------------------------------------------------------------------------------------


def statuses(session: Session) -> list[str]:
    return [each["data"]["status"] for each in session.events if each["event"] == "MIGRATION"]


def test_a_migration_as_qemu_tells_it(machine: Machine, path: Path, address: str) -> None:
    """The machine goes, and what became of it is answered until its client has gone."""
    receiver = Receiver(address, accel="unicorn")
    with serving("source", path) as server, Session(path) as session:
        assert session.ask("query-migrate") == {}
        session.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        session.ask("migrate-set-parameters", max_bandwidth=1 << 30, downtime_limit=400)
        assert session.ask("query-migrate-parameters")["downtime-limit"] == 400
        session.ask("migrate", uri="unix:" + address.removeprefix("ipc://"))
        until(lambda: session.ask("query-migrate")["status"] == "completed", "it is completed", TIMEOUT)
        while "completed" not in statuses(session):
            session.events.append(session.line())
        assert statuses(session) == ["setup", "active", "device", "completed"]
        passes = [each["data"]["pass"] for each in session.events if each["event"] == "MIGRATION_PASS"]
        info = session.ask("query-migrate")
        assert passes == list(range(1, info["ram"]["dirty-sync-count"] + 1))
        assert info["ram"]["total"] == WALK.slots[0].size
        assert info["downtime"] <= info["total-time"]
        assert session.events[-1]["event"] != "SHUTDOWN"
        assert session.ask("query-status") == {"running": False, "singlestep": False, "status": "postmigrate"}
        assert "does not run here any more" in session.refused("cont")["desc"]
        with Session(path, negotiate=False) as other:
            other.refused("quit")
        session.refused("quit", now=True)
        assert session.ask("query-status")["status"] == "postmigrate"
        with receiver.result() as moved:
            goes_on(moved)
        session.close()
        assert server.wait(TIMEOUT) == 0
    assert machine.wait(TIMEOUT)["handed_over"]


def test_a_quit_is_not_forgotten_before_it_is_noticed_that_the_machine_has_left(
        machine: Machine, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client waits for the end."""
    answered, closed = Event(), list[bool]()

    class Late(Follower):
        def until_end(self) -> dict[str, Any]:
            assert answered.wait(TIMEOUT)
            return {"handed_over": "there"}

    def client() -> None:
        with Session(path) as session:
            session.ask("quit")
            answered.set()
            closed.append(session.closed())

    monkeypatch.setattr(server_module, "Follower", Late)
    thread = Thread(target=client)
    assert QmpServer("source", str(path)).run(thread.start) == 0
    thread.join(TIMEOUT)
    assert closed == [True]


def test_a_migration_that_fails_is_told(machine: Machine, session: Session, address: str) -> None:
    session.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    with PlayedTarget(address, {wire.Offer: [wire.Refused("there is no room")]}):
        session.ask("migrate", uri=address)
        until(lambda: session.ask("query-migrate")["status"] == "failed", "it has failed", TIMEOUT)
    assert "there is no room" in session.ask("query-migrate")["error-desc"]
    while statuses(session)[-1:] != ["failed"]:
        session.events.append(session.line())
    assert session.ask("query-status")["status"] == "running"


def test_a_migration_is_cancelled_and_the_machine_goes_on(machine: Machine, session: Session, address: str) -> None:
    machine.write(4 << 20, bytes(range(1, 256)) * (8 << 12))
    assert session.ask("migrate-cancel") == {}      # nothing to cancel: as QEMU
    session.ask("migrate", uri="unix:/nobody")
    first = session.ask("query-migrate")
    assert first["status"] == "setup"
    until(lambda: session.ask("query-migrate")["total-time"] > first["total-time"], "its time goes on", TIMEOUT)
    session.ask("migrate-cancel")
    assert session.ask("query-migrate")["status"] == "cancelled"
    session.ask("stop")
    session.event("STOP")
    session.ask("cont")
    session.event("RESUME")
    assert [each["event"] for each in session.told] == ["STOP", "RESUME"], "with nobody there the guest ran on"
    receiver = Receiver(address, accel="unicorn")
    session.ask("migrate-set-parameters", max_bandwidth=200_000)
    session.ask("migrate", uri="unix:" + address.removeprefix("ipc://"))
    until(lambda: session.ask("query-migrate")["status"] == "active", "it is active", TIMEOUT)
    assert "already" in session.refused("migrate", uri="unix:/nowhere")["desc"]
    session.ask("migrate-set-parameters", max_bandwidth=300_000)
    until(lambda: json.loads(vmm_here("migrate", "status", "source", "--json").stdout)["settings"]["bandwidth"]
          == 300_000, "the migration that is under way is told")
    session.ask("migrate_cancel")
    assert session.ask("query-migrate")["status"] == "cancelled"
    assert "cancelled" in receiver.failure()
    assert session.ask("query-status")["status"] == "running"
    goes_on(machine)


def test_a_server_that_is_killed_takes_nothing_along(machine: Machine, path: Path, address: str) -> None:
    """Neither the migration, which another server sees through, nor its place."""
    machine.write(4 << 20, bytes(range(1, 256)) * (8 << 12))
    receiver = Receiver(address, accel="unicorn")
    with serving("source", path) as server, Session(path) as session:
        session.ask("migrate-set-parameters", max_bandwidth=200_000)
        session.ask("migrate", uri="unix:" + address.removeprefix("ipc://"))
        until(lambda: session.ask("query-migrate")["status"] == "active", "it is active", TIMEOUT)
        server.kill()
        server.wait(TIMEOUT)
    assert path.exists()
    with serving("source", path) as server, Session(path) as session:
        assert session.ask("query-migrate")["status"] == "active"
        session.ask("migrate-set-parameters", max_bandwidth=0)
        until(lambda: session.ask("query-migrate")["status"] == "completed", "it is completed", TIMEOUT)
        receiver.result().close()
        session.ask("quit")
        assert session.closed()
        assert server.wait(TIMEOUT) == 0


def test_a_target_that_cannot_be_is_said(machine: Machine, session: Session) -> None:
    for uri, said in (("tcp:localhost:4444", "--insecure"), ("exec:cat", "write tcp:HOST:PORT or unix:PATH"),
                      ("tcp:localhost:99999999", "port"), ("tcp:localhost:1,ipv4=on", "comma"), ("unix:", "unix:PATH"),
                      ("unix:/a\0b", "control character"), ("unix:/" + "x" * 200_000, "socket path"),
                      ("tcp:" + "x" * 200_000 + ":1", "not a valid host name"), ("\u202e" * 1000, "unix:PATH"),
                      ("tcp://\u202e:1", "not a valid host name")):
        error = session.refused("migrate", uri=uri)
        assert error["class"] == "GenericError"
        assert said in error["desc"]
        assert error["desc"].isprintable()
        assert len(error["desc"]) < 400
        assert session.ask("query-status")["status"] == "running"


# --- QEMU's schema --------------------------------------------------------------------------------------------------


def test_commands_take_what_qemus_take() -> None:
    schema = qemu_schema()
    for name, command in TABLE.items():
        if name == "migrate-cancel":        # an alias
            continue
        assert schema.knows(name), name
        theirs = schema.takes(name)
        ours = {field.encode_name: not field.required for field in msgspec.structs.fields(command.takes)}
        assert ours.keys() <= theirs.keys(), name
        assert {each for each, optional in theirs.items() if not optional} <= ours.keys(), name
        assert all(optional or not theirs[each] or name == "migrate" for each, optional in ours.items()), name


def test_every_command_is_answered_as_qemus_schema_says(machine: Machine, path: Path, address: str) -> None:
    """Which is looked at after each test here."""
    qemu_schema()
    receiver = Receiver(address, accel="unicorn")
    with serving("source", path), Session(path) as session:
        queries = [name for name in TABLE if name.startswith("query-")]
        session.ask("set-vcpu-dirty-limit", dirty_rate=4)
        session.ask("calc-dirty-rate", calc_time=1, mode="dirty-ring")
        for name in queries:
            session.ask(name)
        session.ask("stop")
        session.ask("cont")
        session.ask("migrate-set-capabilities", capabilities=[
            {"capability": "events", "state": True}, {"capability": "xbzrle", "state": False}])
        session.refused("migrate-start-postcopy")
        until(lambda: session.ask("query-dirty-rate")["status"] == "measured", "it is measured")
        session.ask("cancel-vcpu-dirty-limit")
        session.ask("migrate-set-parameters", multifd_channels=3, multifd_compression="zstd")
        session.ask("migrate", uri="unix:" + address.removeprefix("ipc://"))
        until(lambda: session.ask("query-migrate")["status"] == "completed", "it is completed", TIMEOUT)
        for name in ("query-status", "query-migrate", "query-migrate-capabilities", "query-commands"):
            session.ask(name)
        receiver.result().close()
        session.ask("quit")
        assert session.closed()
    assert {"STOP", "RESUME", "MIGRATION", "MIGRATION_PASS"} <= {each["event"] for each in session.events}
    assert {name for name, _ in session.answers} >= {name for name in TABLE if name != "migrate_cancel"} - {
        "migrate-cancel"}


def test_the_check_finds_what_is_wrong() -> None:
    schema = qemu_schema()
    assert schema.wrong_answer("query-name", {"name": 3})
    assert schema.wrong_answer("query-kvm", {"enabled": True})
    assert schema.wrong_answer("query-migrate", {"status": "done"})
    assert schema.wrong_event("SHUTDOWN", {"guest": True, "reason": "none", "more": 1})
    assert not schema.wrong_event("STOP", {})


# --- what is no QMP -------------------------------------------------------------------------------------------------


def test_a_session_begins_with_its_capabilities(machine: Machine, path: Path) -> None:
    with serving("source", path), Session(path, negotiate=False) as session:
        assert session.greeting["QMP"]["version"]["qemu"]["major"] >= 7
        assert session.refused("query-status")["class"] == "CommandNotFound"
        assert session.refused("qmp_capabilities", enable=["oob"])["class"] == "GenericError"
        machine.pause()
        machine.resume()        # no events before
        session.ask("qmp_capabilities")
        assert not session.events
        assert session.refused("qmp_capabilities")["class"] == "CommandNotFound"


NO_COMMANDS = [
    (b'{"execute": "nothing"}', "CommandNotFound"), (b'{"execute": 3}', "GenericError"), (b"3 ", "GenericError"),
    (b'{"arguments": {}}', "GenericError"), (b'{"execute": "stop", "more": 1}', "GenericError"),
    (b'{"execute": "stop", "arguments": {"x": 1}}', "GenericError"), (b'{"execute": }', "GenericError"),
    (b'{"execute": "calc-dirty-rate"}', "GenericError"), (b"[" * 5000 + b"]" * 5000, "GenericError"),
    (b'{"execute": "calc-dirty-rate", "arguments": {"calc-time": 0}}', "GenericError"), (b'"\x01', "GenericError"),
    (b'{"execute": "%s"}' % ("\u202e" * 9999).encode(), "CommandNotFound"), (b"{'execute': 'stop'}", "GenericError"),
    (b'{"execute": "qu\xff', "GenericError"), (b"}", "GenericError"), (b'{"execute": "\xc3\x28"}', "GenericError")]


def test_what_is_no_command_is_an_error_and_the_next_one_is_heard(session: Session) -> None:
    for sent, kind in NO_COMMANDS:
        session.send(sent)
        error = session.answer()["error"]
        assert error["class"] == kind, sent
        assert error["desc"].isprintable()
        assert len(error["desc"]) < 400
        assert session.ask("query-name") == {"name": "source"}
    session.send(b'{"execute":"query-name","id":{"a":[1]}}{"execute":\n\n"query-na')
    session.send(b'me"}')
    assert session.answer() == {"return": {"name": "source"}, "id": {"a": [1]}}
    assert session.answer() == {"return": {"name": "source"}}


def test_a_client_that_does_not_read_is_given_up(session: Session, path: Path) -> None:
    """It has asked for more than may lie about for it, and the others are served."""
    with Session(path) as other:
        with contextlib.suppress(ConnectionError):
            other.send(b'{"execute":"query-commands"}' * 20_000)
        assert session.ask("query-status")["running"] is True
        read = 0
        with contextlib.suppress(EOFError, ConnectionError):
            while other.line():
                read += 1
    assert 0 < read < 20_000
    assert session.ask("query-status")["running"] is True


def test_clients_harm_nobody_else(session: Session, path: Path) -> None:
    """One that goes in the middle of a command, one that sends without end, more than there may be."""
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(path))
        other.sendall(b'{"execute": "qmp_capabilities"}{"execute": "query-status"')
    with Session(path) as greedy:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            greedy.send(b'{"execute": "' + b"x" * (2 << 20))
        with contextlib.suppress(ConnectionResetError):
            assert greedy.answer()["error"]["class"] == "GenericError"
            assert greedy.closed()
    with contextlib.ExitStack() as stack:
        refused = 0
        for _ in range(20):
            try:
                stack.enter_context(Session(path))
            except EOFError:
                refused += 1
        assert refused >= 5
        assert session.ask("query-status")["running"] is True
