"""Neither end of a migration trusts the other, or whoever else is at the address: played peers against real
ones."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
import zstandard
from machines import machine_processes, nothing_left, replace, spec, until
from migrations import (
    TIMEOUT,
    PlayedSource,
    PlayedTarget,
    Receiver,
    goes_on,
    receiver_process,
    spec_of,
)

from vmm import migrate
from vmm.client.machine import Machine
from vmm.consumers.migration import offers, source, talk, target, wire
from vmm.consumers.migration.pages import PAGE
from vmm.consumers.migration.wire import Torn, WireError
from vmm.errors import ExitCode, VmmError
from vmm.machine.spec import RamSlot
from vmm.migrate import MigrationError, Options

IDLE = spec("idle", accel="unicorn", name="source", mib=4, milliseconds=0, timeout=None)


@pytest.fixture
def address(runtime_dir: Path) -> Iterator[str]:
    path = runtime_dir / "migrate"
    yield f"ipc://{path}"
    assert not path.exists(), "the socket is left behind"


@pytest.fixture
def paused() -> Iterator[Machine]:
    """A machine like IDLE, to take states from."""
    with Machine.launch(IDLE) as machine:
        machine.pause()
        yield machine


@pytest.fixture
def endless() -> Iterator[Machine]:
    walk = spec("sequential", accel="unicorn", name="source", mib=16, passes=0, spin=50, timeout=None)
    with Machine.launch(walk) as machine:
        yield machine


# --- strangers at a waiting receiver ------------------------------------------------------------------------------


STRANGE: list[list[bytes]] = [
    [b""], [b"nonsense"], [b"x" * 100_000], [b"a", b"b", b"c", b"d", b"e"], wire.frames(wire.Ping()),
    wire.frames(wire.RoundEnd(0, 5)), [*wire.frames(wire.RoundEnd(0, 0)), b"x" * PAGE],
    wire.frames(wire.Pages(0, 0, b"\0\0\0\0", "zero")),
    wire.frames(wire.State(b"x", [{}, {}], IDLE, False)), wire.frames(wire.Join("00" * 16)),
    wire.frames(wire.Join("")), wire.frames(wire.Missing(0, b"")), wire.frames(wire.Abort("go")),
    wire.frames(wire.Gathered("snap_0", 0, b"")), wire.frames(wire.WhenReady()),
    wire.frames(wire.Done()), [b"\xc1", b"12345678"], [wire.frames(wire.Commit(wire.VERSION, ""))[0], b"12345678"],
]


def test_strangers_before_the_offer_are_ignored(address: str) -> None:
    receiver = Receiver(address, accel="unicorn", timeout=TIMEOUT)
    for frames in STRANGE:
        with PlayedSource(address) as stranger:
            stranger.sock.send_multipart(frames)
            stranger.say(wire.Commit(wire.VERSION, "00" * 16))      # answered when all before it was looked at
            stranger.hear(wire.Unknown)
    assert receiver.is_alive()
    with PlayedSource(address) as good:
        good.offered(IDLE)
        good.say(wire.Abort("that is all"))
        assert receiver.failure() == "the source gave up: that is all"
    assert receiver.refused == []


BAD_OFFERS: dict[str, dict[str, Any]] = {
    "vcpus": {"vcpus": 0}, "many vcpus": {"vcpus": 100_000}, "ring": {"ring_entries": 1000},
    "huge ring": {"ring_entries": 1 << 30}, "no slots": {"slots": []}, "privilege": {"privilege": "root"},
    "stack": {"stack_size": 3}, "params": {"params": [-1]}, "cmdline": {"cmdline": "x" * 300},
    "quota": {"dirty_quota": -1}, "quotas": {"dirty_quotas": [1]}, "a quota": {"dirty_quotas": [1, -1]},
    "two slots": {"slots": [RamSlot(0, 0, PAGE * 1024), RamSlot(0, 1 << 30, PAGE)]},
    "overlap": {"slots": [RamSlot(0, 0, PAGE * 1024), RamSlot(1, PAGE, PAGE)]},
    "odd size": {"slots": [RamSlot(0, 0, 5)]}, "timeout": {"timeout": -1.0}, "tracking": {"tracking": "magic"},
}


@pytest.mark.parametrize("what", BAD_OFFERS)
def test_an_offer_that_no_configuration_could_make_is_refused(what: str) -> None:
    """With a name of their own each, so that it is not the name that is refused."""
    good = wire.Offer(wire.VERSION, "0", "0" * 32, IDLE, b"", False)
    here = {"name": "here", "accel": "unicorn", "image": "/image", "linger": True}
    assert offers.taken(good, **here).name == "here"
    with pytest.raises(WireError, match="an invalid machine"):
        offers.taken(msgspec.structs.replace(good, spec=replace(IDLE, **BAD_OFFERS[what])), **here)


@pytest.mark.parametrize("token", ["", "short", "0" * 31 + "G", "0" * 33, "0" * 31 + "\n"])
def test_an_offer_needs_a_token(token: str) -> None:
    with pytest.raises(WireError, match="token"):
        offers.taken(wire.Offer(wire.VERSION, "0", token, IDLE, b"", False), name="here", accel="unicorn",
                     image="/image", linger=True)


def test_a_bad_offer_is_refused_and_another_awaited(address: str) -> None:
    receiver = Receiver(address, accel="unicorn", timeout=TIMEOUT)
    for changes in ({"spec": replace(IDLE, vcpus=0)}, {"version": wire.VERSION + 1}, {"token": "x"}):
        with PlayedSource(address) as bad:
            bad.offer(**{"spec": IDLE, **changes})
            assert bad.hear(wire.Refused).error
    until(lambda: len(receiver.refused) == 3, "each was said")      # to the source first
    assert f"speaks migration protocol {wire.VERSION + 1}" in receiver.refused[1]
    with PlayedSource(address) as good:
        good.offered(IDLE)
        good.say(wire.Abort("that is all"))
        assert receiver.failure() == "the source gave up: that is all"


def test_post_copy_that_cannot_be_is_refused_before_anything_is_made(address: str,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    from ipc.userfault import Userfault, UserfaultError

    def denied(*args: Any) -> Userfault:
        raise UserfaultError("userfaultfd: Operation not permitted")

    monkeypatch.setattr(Userfault, "make", denied)
    receiver = Receiver(address, accel="unicorn", timeout=TIMEOUT)
    with PlayedSource(address) as one:
        one.offer(IDLE, postcopy=True)
        assert "post-copy is not possible at the target: userfaultfd" in one.hear(wire.Refused).error
        assert nothing_left("target")
    with PlayedSource(address) as other:
        other.offered(IDLE)
        other.say(wire.Abort("that is all"))
        receiver.failure()


def test_nothing_of_an_offer_is_read_or_written_here(address: str, tmp_path: Path, paused: Machine) -> None:
    """Nor does its machine wait for a trace that another host has."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    receiver = Receiver(address, accel="unicorn")
    evil = replace(spec_of(paused), trace=["*"], trace_file=str(precious), image="/nonexistent")
    with PlayedSource(address) as one:
        one.offered(evil, image=Path(IDLE.image).read_bytes())
        one.say(one.state(paused, spec=evil))
        one.hear(wire.Prepared)
        one.say(one.commit())
        one.hear(wire.Running)
        one.say(wire.Done())
        with receiver.result() as machine:
            assert machine.status()["state"] == "running"
    assert precious.read_text() == "precious"


def test_a_receiver_that_nobody_comes_to_says_so_in_time() -> None:
    with pytest.raises(VmmError, match="no source came within 0 s") as failure:
        target.receive("ipc://@nobody-comes", timeout=0.2)
    assert failure.value.exit_code == ExitCode.TIMEOUT


# --- strangers during a migration
# -----------------------------------------------------------------------------------


def test_strangers_during_a_migration_are_ignored(address: str, paused: Machine) -> None:
    """Until the end: none of their pages is written, none of their words counts, and the second source is told."""
    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as good, PlayedSource(address) as bad:
        good.offered(spec_of(paused))
        channel, other = good.stream(), good.stream()

        def annoy() -> None:
            with contextlib.suppress(OSError):      # it is shut out
                bad.page(700, 0xEE, stream=bad.stream("0" * 32))
            for frames in STRANGE:
                bad.sock.send_multipart(frames)
            bad.offer(IDLE)
            bad.hear(wire.Busy)
            bad.say(bad.commit())
            bad.hear(wire.Unknown)

        annoy()
        good.page(700, 0x11, stream=channel)
        good.page(701, 0x22, stream=other)
        good.say(wire.RoundEnd(0, 2))
        assert good.hear(wire.RoundAck).torn == []
        annoy()
        good.say(wire.WhenReady())
        good.hear(wire.Ready)
        with Machine.attach("target") as arriving:      # it has a coordinator
            assert arriving.status()["state"] == "ready"
        annoy()
        good.say(good.state(paused))
        good.hear(wire.Prepared)
        annoy()
        assert receiver.is_alive()
        good.say(good.commit())
        good.hear(wire.Running)
        annoy()
        good.say(wire.Done())
        with receiver.result() as machine:
            assert machine.read(700 * PAGE, 2 * PAGE) == b"\x11" * PAGE + b"\x22" * PAGE


def test_pages_on_a_connection_that_has_not_joined_do_not_count(address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as good:
        good.offered(IDLE)
        with contextlib.suppress(OSError):
            good.page(700, 0xEE, stream=good.stream("0" * 32))
        good.say(wire.RoundEnd(0, 1))
        with pytest.raises(AssertionError, match="no RoundAck"):
            hear_soon(good, wire.RoundAck)
        good.page(700, 0x11, stream=good.stream())
        good.hear(wire.RoundAck)
        good.say(wire.Abort("that is all"))
        receiver.failure()


def hear_soon(played: PlayedSource, kind: type[wire.Wire]) -> None:
    """Not TIMEOUT, but a few of the target's signs of life."""
    for _ in range(3):
        assert played.sock.poll(int(TIMEOUT * 1000))
        answer = wire.decode_answer(played.sock.recv_multipart())
        if isinstance(answer, kind):
            return
        assert isinstance(answer, wire.Alive)
    raise AssertionError(f"no {kind.__name__}")


# --- a source that says what it must not --------------------------------------------------------------------------


BAD_WORDS: dict[str, tuple[list[bytes], str]] = {
    "damaged": ([wire.frames(wire.Ping())[0], b"12345678"], "damaged"),
    "commit": ([], "Commit out of turn"),
    "state": (wire.frames(wire.State(b"x", [{}, {}], IDLE, False)), "vcpu 0"),
    "whose": (wire.frames(wire.Gathered("verify", 0, b"x")), "not a client of snapshots"),
    "of what": (wire.frames(wire.Gathered("snap_0", 9, b"x")), "slot 9"),
    "gathered": (wire.frames(wire.Gathered("snap_0", 0, zstandard.compress(b"x"))), "wrong size"),
}


@pytest.mark.parametrize("what", BAD_WORDS)
def test_a_source_that_says_what_it_must_not_is_refused_and_nothing_is_left(what: str, address: str) -> None:
    frames, why = BAD_WORDS[what]
    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as bad:
        bad.offered(IDLE)
        bad.sock.send_multipart(frames or wire.frames(bad.commit()))
        said = bad.hear(wire.Refused).error
        assert why in said
        assert receiver.failure() == said


BAD_PAGES: dict[str, tuple[wire.Pages | wire.Join, bytes, str]] = {
    "slot": (wire.Pages(0, 9, b"\0\0\0\0", "zero"), b"", "slot 9"),
    "page": (wire.Pages(0, 0, b"\xff\xff\xff\xff", "zero"), b"", "page numbers"),
    "bytes": (wire.Pages(0, 0, b"\0\0\0\0", "none"), b"x", "1 bytes for 1 pages"),
    "join": (wire.Join("0" * 32), b"", "out of turn"),
}


@pytest.mark.parametrize("what", BAD_PAGES)
def test_a_source_that_sends_pages_that_cannot_be_is_refused_and_nothing_is_left(what: str, address: str) -> None:
    message, data, why = BAD_PAGES[what]
    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as bad:
        bad.offered(IDLE)
        bad.stream().send(message, data)
        said = bad.hear(wire.Refused).error
        assert why in said
        assert receiver.failure() == said


@pytest.mark.parametrize(("changes", "why"), [
    ({"privilege": "kernel"}, "differs from"), ({"vcpus": 3}, "differs from"), ({"name": "other"}, "differs from"),
    ({"slots": [RamSlot(0, 0, PAGE * 1024)]}, "differ from those that it offered"),
    ({"slots": [msgspec.structs.replace(IDLE.slots[0], born=7)]}, "differ from those that it offered"),
    ({"slots": [*IDLE.slots, *IDLE.slots]}, "slot")])
def test_a_state_is_that_of_the_machine_which_was_offered(changes: dict[str, Any], why: str) -> None:
    offers.check_settings(replace(IDLE, tracking="auto", dirty_quotas=[5, 0],
                                  slots=[msgspec.structs.replace(IDLE.slots[0], log=False)]), IDLE)
    with pytest.raises(VmmError, match=why):
        offers.check_settings(replace(IDLE, **changes), IDLE)


def test_a_bad_vcpu_state_is_refused_before_the_machine_is_taken(address: str, paused: Machine) -> None:
    """Not after 30 s of silence, and not when the machine has begun here and none is left at the source. (What is
    bad, tests/workers/test_state.py has.)"""
    states = paused.state()["vcpus"]
    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as bad:
        bad.offered(spec_of(paused))
        bad_exit = {"reason": 77, "code": 0, "detail": ""}
        bad.say(bad.state(paused, vcpus=[states[0], {**states[1], "exit": bad_exit}]))
        assert "vcpu 1: " in bad.hear(wire.Refused).error
    receiver.failure()


# --- the target's end ---------------------------------------------------------------------------------------------


def prepared(played: PlayedSource, machine: Machine, **changes: Any) -> None:
    played.offered(spec_of(machine), **changes)
    played.say(played.state(machine))
    played.hear(wire.Prepared)


def test_a_machine_that_is_stopped_while_it_arrives_is_noticed_at_once(address: str, paused: Machine) -> None:
    for begin in (lambda played: played.offered(IDLE), lambda played: prepared(played, paused)):
        receiver = Receiver(address, accel="unicorn")
        with PlayedSource(address) as one:
            begin(one)
            with Machine.attach("target") as arriving:
                arriving.stop()
            assert "was stopped while it was arriving" in one.hear(wire.Refused).error
            assert nothing_left("target")       # before it was said
            with contextlib.suppress(zmq.Again):
                one.say(wire.Done())
        assert "was stopped while it was arriving" in receiver.failure()


def test_commit_may_be_repeated_and_come_from_another_process(address: str, paused: Machine) -> None:
    """The first source is lost after Prepared, the second after Running; the third says that it has heard."""
    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as first, PlayedSource(address) as second, PlayedSource(address) as third:
        second.token = third.token = first.token
        prepared(first, paused)
        first.leave()
        with pytest.raises(AssertionError, match="no Running"):
            hear_soon_nothing(second)
        second.say(second.commit())
        second.hear(wire.Running)
        second.say(second.commit())
        second.hear(wire.Running)
        second.leave()
        third.say(third.commit())
        third.hear(wire.Running)
        assert receiver.is_alive()
        third.say(wire.Done())
        receiver.result().close()


def hear_soon_nothing(played: PlayedSource) -> None:
    """A while in which the target says nothing to a connection that it does not know."""
    assert played.sock.poll(1500), "no Running"


def test_a_source_that_never_comes_back_is_given_up(address: str, paused: Machine,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_UNDECIDED", 0.5)
    monkeypatch.setattr(target, "_HEARD", 0.5)
    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as one:
        prepared(one, paused)
    assert "has sent nothing" in receiver.failure()


def test_a_source_that_has_gone_before_prepared_is_given_up_at_once(address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as one:
        one.offered(IDLE)
    assert "the source has disconnected" in receiver.failure()


def test_a_source_that_is_silent_is_given_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_SILENCE", 0.5)
    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as one:
        one.offered(IDLE)
        assert "has sent nothing" in one.hear(wire.Refused).error
        receiver.failure()


def test_a_source_that_never_says_that_it_has_heard_is_not_waited_for_long(address: str, paused: Machine,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_HEARD", 0.5)
    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as one:
        prepared(one, paused)
        one.say(one.commit())
        one.hear(wire.Running)
        receiver.result().close()


def test_a_target_that_cannot_start_is_gone_before_it_says_so(address: str, paused: Machine,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever repeats Commit hears it again; then the source may let the guest go on."""
    def start(machine: Machine) -> None:
        raise VmmError("it did not answer within 30 s")

    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as one:
        prepared(one, paused)
        monkeypatch.setattr(Machine, "start", start)
        one.say(one.commit())
        assert one.hear(wire.Refused).error == "it did not answer within 30 s"
        assert not machine_processes("target")
        one.say(one.commit())
        one.hear(wire.Refused)
        one.say(wire.Done())
    receiver.failure()


# --- a target that does not do what it should ---------------------------------------------------------------------


def promptly(machine: Machine, address: str, options: Options | None = None) -> str:
    """Why the migration failed; the machine goes on, and stood still for less than ten seconds."""
    stood: list[float] = []

    def watch(report: migrate.Report) -> None:
        if report.status == "device" and not stood:
            stood.append(time.monotonic())

    with pytest.raises(VmmError) as failure:
        migrate.migrate(machine, address, options, progress=watch)
    if stood:
        assert time.monotonic() - stood[0] < 10.0 + SLACK
    goes_on(machine)
    return str(failure.value)


#: Seconds that a loaded host may take for what takes none.
SLACK = 5.0


BAD_REPLIES: list[tuple[type[wire.Wire], Any, str]] = [
    (wire.Offer, [wire.Refused("no room")], "refused: no room"),
    (wire.Offer, [wire.Accept()], "sent Accept out of turn"),
    (wire.Offer, [b"noise"], "not an answer"),
    (wire.RoundEnd, [wire.Prepared()], "sent Prepared out of turn"),
    (wire.RoundEnd, [b""], "not an answer"),
    (wire.RoundEnd, lambda m: [wire.RoundAck(m.round, [Torn(0, b"\0\0\0\0", b"x")])], "bytes of checksums"),
    (wire.RoundEnd, lambda m: [wire.RoundAck(m.round, [Torn(0, b"\xff" * 4, b"x" * 8)])], "does not have"),
    (wire.State, [wire.Refused("a vCPU state that it does not know")], "refused: a vCPU state"),
    (wire.State, [wire.Running()], "sent Running out of turn"),
]


def test_a_target_that_says_what_it_must_not_leaves_the_source_running(endless: Machine, address: str) -> None:
    for message, reply, why in BAD_REPLIES:
        with PlayedTarget(address, {message: reply}) as played:
            assert why in promptly(endless, address), message
            assert not played.has(wire.Commit)


def test_a_target_that_falls_silent_is_given_up(endless: Machine, address: str,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ZeroMQ is there still, and answers heartbeats; its program says nothing any more."""
    monkeypatch.setattr(source, "_PATIENCE", 1.0)
    monkeypatch.setattr(source, "RUNNING_PATIENCE", 1.0)
    monkeypatch.setattr(source, "PAUSED_PATIENCE", 1.0)
    for message in (wire.Offer, wire.Pages, wire.RoundEnd, wire.WhenReady, wire.State):
        with PlayedTarget(address, {message: []}) as played:
            assert "made no progress" in promptly(endless, address), message
            assert not played.has(wire.Commit)


def test_signs_of_life_without_progress_are_no_progress(endless: Machine, address: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "PAUSED_PATIENCE", 1.0)
    class Babbler(PlayedTarget):
        def _answers(self, message: wire.Wire) -> list[Any]:
            return [wire.Alive(7)] if isinstance(message, wire.State | wire.Ping) else super()._answers(message)

    monkeypatch.setattr(talk, "_PING_EVERY", 0.1)
    with Babbler(address):
        assert "made no progress" in promptly(endless, address)


def test_waits_with_the_guest_standing_still_are_short() -> None:
    """What the tests above make shorter still."""
    assert talk.PAUSED_PATIENCE <= 8.0
    assert source.PAUSED_PATIENCE == talk.PAUSED_PATIENCE


def test_pages_that_arrive_damaged_are_sent_again(endless: Machine, address: str) -> None:
    """Page 700 of the first round is said to be otherwise than it is; the next brings it once more."""
    said: list[int] = []

    class Doubter(PlayedTarget):
        def _barrier(self, number: int) -> list[wire.Wire]:
            answers = super()._barrier(number)
            if answers and not said:
                said.append(number)
                return [wire.RoundAck(number, [Torn(0, np.array([700], "<u4").tobytes(), b"otherwise"[:8])])]
            return answers

    quiet = Options(downtime=1e-6, max_rounds=2)
    endless.pause()     # nothing else is dirty then
    endless.resume()
    with Doubter(address) as played:
        report = migrate.migrate(endless, address, quiet)
        assert report.status == "completed"
        later = [m for m in played.seen if isinstance(m, wire.Pages) and m.round > said[0] and m.slot == 0]
        assert 700 in np.concatenate([np.frombuffer(m.numbers, "<u4") for m in later])


def test_pages_that_always_arrive_damaged_are_no_machine(endless: Machine, address: str) -> None:
    class Doubter(PlayedTarget):
        def _barrier(self, number: int) -> list[wire.Wire]:
            answers = super()._barrier(number)
            return [wire.RoundAck(number, [Torn(0, np.array([700], "<u4").tobytes(), b"")])] if answers else []

    with Doubter(address) as played:
        assert "damaged" in promptly(endless, address, Options(max_rounds=1))
        assert not played.has(wire.Commit)


def test_a_connection_for_pages_that_breaks_ends_the_migration(endless: Machine, address: str) -> None:
    """And not silently, with pages that never come."""
    class Dropper(PlayedTarget):
        """Its ROUTER goes away in the first round, with all connections."""

        def _answers(self, message: wire.Wire) -> list[Any]:
            if isinstance(message, wire.Pages):
                self._over.set()
            return super()._answers(message)

    with Dropper(address):
        assert "broke" in (said := promptly(endless, address, Options(bandwidth=2e6))) or "disconnected" in said


def test_a_target_that_is_stopped_by_a_signal_in_the_last_round_leaves_the_source_running(endless: Machine,
                                                                                          address: str) -> None:
    """SIGSTOP: nothing of it answers any more, and nothing says so. When it goes on, the machine that it holds is
    nobody's, and goes."""
    process = receiver_process(address, "--accel", "unicorn")
    stopped: list[float] = []

    def watch(report: migrate.Report) -> None:
        if report.status == "device" and not stopped:
            stopped.append(time.monotonic())
            os.kill(process.pid, signal.SIGSTOP)

    with pytest.raises(MigrationError):
        migrate.migrate(endless, address, Options(bandwidth=20e6), progress=watch)
    assert stopped
    assert time.monotonic() - stopped[0] < 10.0 + SLACK
    goes_on(endless)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode not in (0, 70)
    until(lambda: nothing_left("target"), "the target's machine is gone")
    goes_on(endless)
