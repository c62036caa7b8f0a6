"""The memory of a machine that arrives: sparse until it has come, nobody else's meanwhile, and there when it runs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from machines import nothing_left, runs, spec, until
from migrations import TIMEOUT, PlayedSource, Receiver, spec_of

from ipc.shm import SHM_DIRECTORY
from vmm.client.keeper import KeeperProcess
from vmm.client.machine import Machine
from vmm.consumers.migration import wire
from vmm.errors import VmmError
from vmm.machine.names import slot_segment

PAGE = 4096
IDLE = spec("idle", accel="unicorn", name="source", mib=8, milliseconds=0, timeout=None)


@pytest.fixture
def address(runtime_dir: Path) -> str:
    return f"ipc://{runtime_dir / 'migrate'}"


@pytest.fixture
def paused() -> Iterator[Machine]:
    with Machine.launch(IDLE) as machine:
        machine.pause()
        yield machine


def held(segment: str) -> int:
    """Bytes of memory that it has."""
    return os.stat(SHM_DIRECTORY / segment.removeprefix("/")).st_blocks * 512


def test_memory_is_had_as_it_comes_and_all_of_it_before_the_machine_may_run(address: str, paused: Machine) -> None:
    segment = slot_segment("target", "ram", IDLE.slots[0])
    receiver = Receiver(address, accel="unicorn")
    with PlayedSource(address) as source:
        source.offered(spec_of(paused))
        assert held(segment) == 0
        stream = source.stream()
        for number in (700, 702):
            source.page(number, 0x11, stream=stream)
        until(lambda: held(segment) == 2 * PAGE, "two pages have come")
        source.say(wire.RoundEnd(0, 2))
        assert source.hear(wire.RoundAck).torn == []
        assert held(segment) == IDLE.slots[0].size
        source.say(source.state(paused))
        source.hear(wire.Prepared)
        source.say(source.commit())
        source.hear(wire.Running)
        source.say(wire.Done())
        with receiver.result() as machine:
            assert held(segment) == IDLE.slots[0].size
            assert machine.read(699 * PAGE, 5 * PAGE) == bytes(PAGE) + (b"\x11" * PAGE + bytes(PAGE)) * 2


def test_nothing_is_loaded_into_memory_that_comes_from_elsewhere() -> None:
    """The guest's image would be written over what has arrived by then."""
    with Machine.launch(msgspec.structs.replace(IDLE, incoming=True), start=False) as machine:
        assert machine.is_ready(wait=True)
        assert held(machine.ram_segment(0)) == 0
    with Machine.launch(IDLE, start=False) as machine:
        assert machine.ram(0).any()


def test_it_is_nobodys_before_who_brings_its_memory_has_it() -> None:
    with Machine.launch(msgspec.structs.replace(IDLE, incoming=True), start=False) as machine:
        assert machine.is_ready(wait=True)
        with Machine.attach(IDLE.name) as other:
            for attempt in (other.start, lambda: other.memory_add(1, 1 << 30, PAGE), lambda: other.write(PAGE, b"x"),
                            lambda: other.register("a"), lambda: other.set_state([])):
                with pytest.raises(VmmError, match="it is still arriving"):
                    attempt()
        with machine.lease("incoming", "by a test"):
            machine.start()
        assert machine.status()["state"] == "running"


@contextlib.contextmanager
def small_memory(address: str) -> Iterator[subprocess.Popen[str]]:
    """A receiver whose /dev/shm is its own, and small."""
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=40m tmpfs /dev/shm && exec "$@"', "sh",
         sys.executable, "-m", "vmm", "receive", address, "--name", "target", "--accel", "unicorn"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "waiting at" in process.stderr.readline()
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=TIMEOUT)


def fill(pid: int) -> None:
    """Take all that is left there, once the machine has what it needs."""
    status = ["nsenter", "--mount", f"--target={pid}", sys.executable, "-m", "vmm", "status", "target"]
    until(lambda: subprocess.run(status, capture_output=True, timeout=TIMEOUT).returncode == 0, "the machine is made")
    with open(f"/proc/{pid}/root/dev/shm/filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))


def send_a_page(source: PlayedSource) -> None:
    source.page(700, 0x11, stream=source.stream())


def end_a_round(source: PlayedSource) -> None:
    source.say(wire.RoundEnd(0, 0))


@pytest.mark.root
@pytest.mark.parametrize("then", [send_a_page, end_a_round])
def test_a_full_dev_shm_is_a_reason_and_nothing_is_left(then: Callable[[PlayedSource], None], address: str) -> None:
    with small_memory(address) as process, PlayedSource(address) as source:
        source.offered(IDLE)
        fill(process.pid)
        then(source)
        assert "is /dev/shm full?" in source.hear(wire.Refused).error
        _, error = process.communicate(timeout=TIMEOUT)
        assert "is /dev/shm full?" in error
        assert process.returncode not in (0, 70)


# --- a keeper that nobody has a machine for yet ----------------------------------------------------------------------


def test_a_keeper_without_a_name_takes_none_and_goes_when_it_is_not_needed() -> None:
    keeper = KeeperProcess("", quiet=True)
    with Machine.launch(IDLE):      # the name is free
        pass
    keeper.give_up()
    assert keeper.process.poll() is not None
    keeper.give_up()        # idempotent


def test_a_keeper_without_a_name_has_any_machine() -> None:
    walk = spec("sequential", accel="unicorn", name="late", mib=8, passes=0, spin=50, timeout=None)
    with Machine.launch(walk, keeper=KeeperProcess("", quiet=True)) as machine:
        assert runs(machine)
        assert machine._keeper is not None
        assert "late" in Path(f"/proc/{machine._keeper.pid}/cmdline").read_text().split("\0")
    assert nothing_left("late")


def test_a_keeper_without_a_name_says_when_the_name_is_taken() -> None:
    with Machine.launch(IDLE), pytest.raises(VmmError, match="already running"):
        Machine.launch(IDLE, keeper=KeeperProcess("", quiet=True))
