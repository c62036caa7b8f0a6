"""A target that is taken says so, one that serves many serves them one after the other, and takes none that is too
large."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import nothing_left, replace, spec, until
from migrations import TIMEOUT, WALK, PlayedSource, PlayedTarget, Receiver, goes_on, vmm

from vmm import migrate, receive
from vmm.client.machine import Machine
from vmm.consumers.migration import target as target_module
from vmm.consumers.migration import wire
from vmm.consumers.migration.status import load_status
from vmm.errors import ExitCode, VmmError
from vmm.machine.spec import MachineSpec
from vmm.migrate import MigrationError, Options
from vmm.receive import Limits


class Loop(threading.Thread):
    """``receive_all`` in a thread, until no source has come for a while."""

    def __init__(self, address: str, *, patience: float = 4.0, **options: object) -> None:
        super().__init__(daemon=True)
        self._address, self._patience, self._options = address, patience, options
        self.arrived: list[Machine] = []
        self.failed: list[str] = []
        self.refused: list[str] = []
        self.error: VmmError | None = None
        self._listening = threading.Event()
        self.start()
        assert self._listening.wait(TIMEOUT)

    def run(self) -> None:
        try:
            receive.receive_all(self._address, accel="unicorn", timeout=self._patience, arrived=self.arrived.append,
                                failed=self.failed.append, refused=self.refused.append,
                                waiting=lambda at: self._listening.set(), **self._options)      # type: ignore[arg-type]
        except VmmError as exc:
            self.error = exc

    def over(self) -> None:
        """Nobody came any more."""
        self.join(TIMEOUT)
        assert self.error is not None
        assert self.error.exit_code == ExitCode.TIMEOUT


@contextlib.contextmanager
def elsewhere(base: MachineSpec, name: str) -> Iterator[Machine]:
    with Machine.launch(replace(base, name=name)) as machine:
        yield machine


def gone(*names: str) -> None:
    until(lambda: all(nothing_left(name) for name in names), "nothing of them is left")


def test_a_target_that_is_taken_says_that_it_is_busy(running: Machine, address: str, runtime_dir: Path) -> None:
    """Both machines go on at their sources, or where they went; who waits is served by the next receiver."""
    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as first, elsewhere(WALK, "other") as other:
        first.offered(WALK)
        with pytest.raises(MigrationError, match="the target is busy: another machine is being received there"):
            migrate.migrate(other, address)
        goes_on(other)
        with pytest.raises(MigrationError, match="is busy"):
            migrate.migrate(other, address, Options(wait=1.0))
        goes_on(other)
        first.say(wire.Abort("that is all"))
        receiver.failure()


def test_who_waits_for_a_busy_target_is_served_in_the_end(running: Machine, address: str) -> None:
    offers: list[wire.Wire] = []

    def offered(message: wire.Wire) -> list[wire.Wire]:
        offers.append(message)
        return [wire.Busy()] if len(offers) < 4 else [wire.Received(), wire.Accept()]

    with PlayedTarget(address, {wire.Offer: offered}):
        assert migrate.migrate(running, address, Options(wait=TIMEOUT)).status == "completed"
    assert len(offers) == 4


def test_many_are_received_one_after_the_other(address: str) -> None:
    """And those that fail in between, or are refused, keep nobody from coming."""
    loop = Loop(address, patience=12.0, limits=Limits(memory=32 << 20, vcpus=3))
    with contextlib.ExitStack() as stack:
        here = {name: stack.enter_context(elsewhere(WALK, name)) for name in ("one", "two", "three")}
        for machine in here.values():       # under their names they are there already
            with pytest.raises(MigrationError, match="is already running"):
                migrate.migrate(machine, address)
            goes_on(machine)
        with PlayedSource(address) as bad:
            bad.offered(replace(WALK, name="four"))
            bad.say(wire.Abort("that is all"))
            until(lambda: bool(loop.failed), "another may come")      # until then it is busy
        large_memory = spec("idle", accel="unicorn", mib=64).slots
        for changes, why in (({"vcpus": 4}, "4 vCPUs, and at most 3"),
                             ({"slots": large_memory}, "64.01 MiB of memory, and at most 32.00 MiB")):
            with PlayedSource(address) as large:
                large.offer(replace(WALK, name="five", **changes))
                assert why in large.hear(wire.Refused).error
        with pytest.raises(MigrationError, match="is already running"):
            migrate.migrate(here["one"], address)
    gone("one", "two", "three", "four", "five")
    for name in ("one", "two", "three"):
        with PlayedSource(address) as source, elsewhere(WALK, "model") as model:
            model.pause()
            states = model.state()["vcpus"]
            offered = replace(WALK, name=name)
            source.offered(offered)
            source.say(wire.State(source.state(model).system, states, offered, False))
            source.hear(wire.Prepared)
            source.say(source.commit())
            source.hear(wire.Running)
            source.say(wire.Done())
            until(lambda name=name: bool(loop.arrived) and loop.arrived[-1].name == name, "another may come")
    loop.over()
    assert [machine.name for machine in loop.arrived] == ["one", "two", "three"]
    assert loop.failed == ["the source gave up: that is all"]
    assert len(loop.refused) == 6       # three, and one, that were there already; two that were too large
    for machine in loop.arrived:
        goes_on(machine)
        machine.stop()
        machine.release()
        machine.detach()
    gone("one", "two", "three")


def test_a_source_that_asks_once_more_hears_how_it_ended_though_another_has_come(
        address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was lost after its Commit, and whoever takes over comes late."""
    monkeypatch.setattr(target_module, "_HEARD", 0.5)
    loop = Loop(address, patience=8.0)
    with elsewhere(WALK, "model") as model:
        model.pause()
        offered = replace(WALK, name="one")
        with PlayedSource(address) as first, PlayedSource(address) as late:
            late.token = first.token
            first.offered(offered)
            first.say(wire.State(first.state(model).system, model.state()["vcpus"], offered, False))
            first.hear(wire.Prepared)
            first.say(first.commit())
            first.hear(wire.Running)
            first.leave()
            until(lambda: len(loop.arrived) == 1, "it was not waited for")
            with PlayedSource(address) as second:
                second.offered(replace(WALK, name="two"))
                late.say(late.commit())
                late.hear(wire.Running)
                late.token = "0" * 32
                late.say(late.commit())
                late.hear(wire.Unknown)
                second.say(wire.Abort("that is all"))
    loop.over()
    with loop.arrived[0] as moved:
        goes_on(moved)
        moved.stop()
        moved.release()
    gone("one", "two")


def test_a_loop_from_the_command_line(address: str, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real machines, whose sources have a runtime directory of their own: they come under the same names."""
    _, err = vmm("receive", address, "--loop", "--name", "x").communicate(timeout=TIMEOUT)
    assert "--name cannot be had with --loop" in err
    serving = vmm("receive", address, "--loop", "--accel", "unicorn", "--json", "--max-memory", "64MiB")
    assert serving.stderr is not None
    assert "waiting at" in serving.stderr.readline()
    there = runtime_dir.with_name(f"{runtime_dir.name}-2")
    there.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(there))
    for name in ("one", "two"):
        with elsewhere(WALK, name) as machine:
            migrate.migrate(machine, address)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_dir))
    assert serving.stdout is not None
    assert [json.loads(serving.stdout.readline())["name"] for _ in range(2)] == ["one", "two"]
    serving.send_signal(signal.SIGTERM)
    ended(serving)
    for name in ("one", "two"):
        with Machine.attach(name) as machine:       # they live on
            goes_on(machine)
            assert load_status(name)["status"] == "completed"
            machine.stop()
            with contextlib.suppress(VmmError):     # it waits for that for a while only
                machine.release()
    gone("one", "two")
    with contextlib.suppress(OSError):
        (there / "shardvmm").rmdir()
    there.rmdir()


def ended(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + signal.SIGINT
