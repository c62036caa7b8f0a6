"""Live migration. The oracle is the guest's own work; failures are real: killed processes, damaged messages."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from machines import ACCELS, exact, machine_processes, replace, spec, until

from ipc.shm import list_segments
from vmm import migrate, receive, wire
from vmm.errors import VmmError
from vmm.machine import Machine
from vmm.migrate import MigrationError, Options
from vmm.names import machine_prefix
from vmm.runtime import machine_dir
from vmm.wire import PAGE, Pages, WireError, unpack

TIMEOUT = 60.0


@pytest.fixture(params=ACCELS)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def address(runtime_dir: Path) -> Iterator[str]:
    path = runtime_dir / "migrate"
    yield f"ipc://{path}"
    path.unlink(missing_ok=True)


class Receiver(threading.Thread):
    """``receive`` in a thread of its own."""

    def __init__(self, address: str, **options: Any) -> None:
        super().__init__()
        self._arguments = (address, options)
        self._listening = threading.Event()
        self.machine: Machine | None = None
        self.error: BaseException | None = None
        self.start()
        assert self._listening.wait(TIMEOUT)

    def run(self) -> None:
        address, options = self._arguments
        try:
            self.machine = receive.receive(address, name="target", waiting=lambda at: self._listening.set(),
                                           **options)
        except BaseException as exc:
            self.error = exc

    def result(self) -> Machine:
        self.join(TIMEOUT)
        assert self.error is None, self.error
        assert self.machine is not None
        return self.machine


def nothing_left(name: str) -> bool:
    return not machine_processes(name) and not list_segments(machine_prefix(name))


@contextlib.contextmanager
def touched(name: str) -> Iterator[None]:
    """Meanwhile some pages of the machine are dirtied all the time: after every round something is left."""
    over = threading.Event()

    def touch() -> None:
        with contextlib.suppress(VmmError), Machine.attach(name) as machine:
            while not over.wait(0.001):
                machine.mark_dirty(0, 1200, 8)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# --- the guest goes on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("postcopy", [False, True], ids=["precopy", "postcopy"])
@pytest.mark.parametrize("target", ACCELS)
def test_a_moved_machine_ends_as_one_that_was_never_moved(accel: str, target: str, postcopy: bool,
                                                          address: str) -> None:
    compression: Any = {"kvm": {"kvm": "zstd", "unicorn": "lz4"}, "unicorn": {"kvm": "none", "unicorn": "zstd"}}[
        accel][target]
    work = spec("random", accel=accel, mib=8, writes=400_000 if accel == "kvm" else 150_000)
    with Machine.launch(work) as machine:
        assert machine.wait(TIMEOUT)["exit_code"] == 0
        expected = machine.ram(0).tobytes()
    receiver = Receiver(address, accel=target)
    # Held back, so that its work is not over before it has moved.
    with Machine.launch(replace(work, dirty_quota=100)) as machine:
        with touched("t") if postcopy else contextlib.nullcontext():
            report = migrate.migrate(machine, address, Options(
                compression=compression, postcopy=postcopy, downtime=0.0 if postcopy else 0.3))
        with receiver.result() as moved:
            moved.dirty_limit(0)
            assert report.status == "completed"
            assert moved.wait(TIMEOUT)["exit_code"] == 0
            assert moved.ram(0).tobytes() == expected
            assert machine.wait(TIMEOUT)["vcpus"][0]["exit_reason"] == "stopped"
    ram = report.ram
    assert ram.normal + ram.duplicate >= (8 << 20) // PAGE
    assert ram.duplicate > 0
    assert ram.normal_bytes == ram.normal * PAGE
    assert ram.dirty_sync_count == len(report.rounds) >= (1 if postcopy else 2)
    assert bool(ram.postcopy_pages) == postcopy
    if compression != "none":
        assert ram.transferred < ram.normal_bytes
    assert 0 < report.downtime < report.total_time


@pytest.mark.parametrize(("vcpus", "ring"), [(1, 65536), (6, 1024), (2, 0)])
def test_walking_up_there_is_one_step_down_at_most(accel: str, vcpus: int, ring: int, address: str) -> None:
    """The oracle of QEMU's migration test: each vCPU counts its pages up one after the other, for ever."""
    walk = spec("sequential", accel=accel, mib=16, vcpus=vcpus, ring=ring, passes=0, spin=300, timeout=None)
    with Machine.launch(walk) as machine:
        receiver = Receiver(address, accel=accel)
        migrate.migrate(machine, address)
        with receiver.result() as moved:
            moved.pause()
            words = moved.ram(0).view(np.uint64).reshape(-1, 512)[:, 0].astype(np.int64)
            usable = words[512:len(words) - 4 * vcpus]      # behind image and before stacks, surely
            steps = np.diff(usable)
            # Shares of the vCPUs meet at vcpus - 1 places, where anything may be.
            down = np.flatnonzero(steps < 0)
            assert len(down) <= vcpus + (vcpus - 1)
            assert (steps[down] == -1).sum() >= len(down) - (vcpus - 1)
            assert usable.min() > 0
            moved.resume()
            moved.register("a")
            until(lambda: moved.sync("a").pages > 0, "the guest goes on and is logged")
            moved.stop()
            moved.wait(TIMEOUT)


@pytest.mark.timing
def test_only_vcpus_that_dirty_most_are_held_back(address: str) -> None:
    walk = spec("sequential", accel="unicorn", mib=64, passes=0, timeout=None)
    with Machine.launch(walk) as machine:
        machine.dirty_limit(50, 1)
        receiver = Receiver(address, accel="unicorn")
        report = migrate.migrate(machine, address, Options(bandwidth=30e6, downtime=0.1, max_rounds=12))
        with receiver.result() as moved:
            assert set(report.throttled) == {"0"}
            assert report.expected_downtime > 0
            limits = [v["dirty_limit_pages_per_s"] for v in moved.status()["vcpus"]]
            assert limits == [0, 50]        # the user's came along, the migration's own did not
            moved.stop()
            moved.wait(TIMEOUT)


# --- post-copy -------------------------------------------------------------------------------------------------


SLOWLY = Options(postcopy=True, bandwidth=10e6, downtime=0.0)


def handed_over(machine: Machine) -> bool:
    """Its migration is past the point of no return."""
    with contextlib.suppress(OSError, ValueError):
        status = msgspec.json.decode((machine_dir(machine.name) / "migrate.json").read_bytes())
        return bool(status["status"] == "postcopy-active")
    return False


@pytest.fixture
def walker(accel: str) -> Iterator[Machine]:
    walk = spec("sequential", accel=accel, name="source", mib=32, passes=0, spin=300, timeout=None)
    with Machine.launch(walk) as machine:
        yield machine


def state_of(machine: Machine) -> dict[str, Any]:
    machine.pause()         # a software CPU that waits for a page cannot leave the guest; KVM can
    return machine.state()


def test_a_source_lost_in_post_copy_is_replaced_and_no_page_is(walker: Machine, accel: str, address: str) -> None:
    receiver = Receiver(address, accel=accel)
    source = vmm("migrate", "source", address, "--postcopy", "--bandwidth", "10MB/s", "--downtime", "1ms")
    until(lambda: handed_over(walker), "handed over")
    cancel = vmm("migrate", "cancel", "source")
    assert "cannot be cancelled" in cancel.communicate(timeout=TIMEOUT)[1]
    source.kill()
    source.communicate()
    assert walker.status()["state"] == "paused"
    with Machine.attach("target") as target:
        with pytest.raises(VmmError, match="still on its way"):
            target.ram(0)
        with pytest.raises(VmmError, match="still on its way"):
            state_of(target)
        target.resume()
    report = migrate.recover(walker, address)
    assert report.status == "completed"
    with receiver.result() as moved:
        moved.pause()
        # Each page has been counted up since the first round: one never sent would be zero.
        words = moved.ram(0).view(np.uint64).reshape(-1, 512)[:, 0].astype(np.int64)
        usable = words[512:len(words) - 8]
        down = np.flatnonzero(np.diff(usable) < 0)
        assert len(down) <= 3
        assert usable.min() > 0
        moved.stop()
        moved.wait(TIMEOUT)
    until(lambda: walker.status()["state"] == "ended", "the source has stopped")


def test_a_target_lost_in_post_copy_leaves_the_source_as_it_was_handed_over(walker: Machine, accel: str,
                                                                            address: str) -> None:
    target = vmm("receive", address, "--name", "target", "--accel", accel)
    assert target.stderr is not None
    assert "waiting at" in target.stderr.readline()
    seen: list[str] = []

    def watch(report: migrate.Report) -> None:
        if report.status == "postcopy-active" and not seen:
            seen.append(report.status)
            target.kill()

    with pytest.raises(MigrationError, match="vmm resume"):
        migrate.migrate(walker, address, SLOWLY, progress=watch)
    target.communicate()
    until(lambda: nothing_left("target"), "the target's machine is gone")
    assert walker.status()["state"] == "paused"
    walker.resume(force=True)
    goes_on(walker)
    walker.pause()
    with pytest.raises(VmmError, match="has been taken back since"):
        migrate.recover(walker, address)


def test_a_verified_machine_stays_verified_in_post_copy(accel: str, address: str) -> None:
    walk = spec("random", accel=accel, name="source", mib=16, writes=60_000, verify=exact(0.2))
    receiver = Receiver(address, accel=accel)
    with Machine.launch(replace(walk, dirty_quota=200)) as machine:
        migrate.migrate(machine, address, SLOWLY)
        with receiver.result() as moved:
            moved.dirty_limit(0)
            report = moved.wait(TIMEOUT)
            assert report["exit_code"] == 0
            assert report["verification"]["ok"]
            assert report["verification"]["dirty_pages"] > 0


# --- failures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def endless() -> Iterator[Machine]:
    walk = spec("sequential", accel="unicorn", name="source", mib=64, passes=0, spin=50, timeout=None)
    with Machine.launch(walk) as machine:
        yield machine


def goes_on(machine: Machine) -> None:
    assert machine.status()["state"] == "running"
    machine.register("after")
    until(lambda: machine.sync("after").pages > 0, "the guest dirties pages")
    assert [c for c in machine.status()["clients"] if c.startswith("migrate")] == []
    assert all(v["dirty_limit_pages_per_s"] == 0 for v in machine.status()["vcpus"])


def vmm(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "vmm", *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def test_a_target_that_is_killed_leaves_the_source_running(endless: Machine, address: str) -> None:
    target = vmm("receive", address, "--name", "target", "--accel", "unicorn")
    assert target.stderr is not None
    assert "waiting at" in target.stderr.readline()
    killer = threading.Thread(target=lambda: (until(lambda: bool(list_segments(machine_prefix("target"))), "begun"),
                                              target.kill()))
    killer.start()
    with pytest.raises(MigrationError):
        migrate.migrate(endless, address, Options(bandwidth=5e6))
    killer.join()
    target.communicate()
    goes_on(endless)
    until(lambda: nothing_left("target"), "the target's machine is gone")


def test_a_source_that_is_killed_leaves_its_machine_running_and_no_target(endless: Machine,
                                                                          address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    source = vmm("migrate", "source", address, "--bandwidth", "5MB/s")
    until(lambda: bool(list_segments(machine_prefix("target"))), "begun")
    source.kill()
    source.communicate()
    goes_on(endless)
    receiver.join(TIMEOUT)
    assert "said nothing" in str(receiver.error) or "has gone" in str(receiver.error)
    until(lambda: nothing_left("target"), "the target's machine is gone")


def test_cancel_from_the_command_line(endless: Machine, address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    source = vmm("migrate", "source", address, "--bandwidth", "5MB/s")
    done = vmm("migrate", "status", "source")
    until(lambda: bool(list_segments(machine_prefix("target"))), "begun")
    done.communicate(timeout=TIMEOUT)
    cancel = vmm("migrate", "cancel", "source", "--json")
    out, err = cancel.communicate(timeout=TIMEOUT)
    assert cancel.returncode == 0, err
    assert msgspec.json.decode(out)["status"] == "cancelled"
    source.communicate(timeout=TIMEOUT)
    assert source.returncode == 128 + signal.SIGINT
    receiver.join(TIMEOUT)
    assert "the source" in str(receiver.error)
    goes_on(endless)
    until(lambda: nothing_left("target"), "the target's machine is gone")


def test_background_returns_an_id_and_the_machine_arrives(endless: Machine, address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    start = vmm("migrate", "source", address, "--background", "--json")
    out, err = start.communicate(timeout=TIMEOUT)
    assert start.returncode == 0, err
    assert len(msgspec.json.decode(out)["id"]) == 8
    with receiver.result() as moved:
        moved.register("a")
        until(lambda: moved.sync("a").pages > 0, "the guest goes on")
        moved.stop()
        moved.wait(TIMEOUT)
    until(lambda: endless.status()["state"] == "ended", "the source has stopped")


def test_a_target_that_cannot_is_a_reason_and_the_source_runs_on(endless: Machine, address: str) -> None:
    with Machine.launch(spec("idle", accel="unicorn", milliseconds=0, timeout=None), name="target"):
        receiver = Receiver(address, accel="unicorn")
        with pytest.raises(MigrationError, match="'target' is running already"):
            migrate.migrate(endless, address)
        receiver.join(TIMEOUT)
        assert isinstance(receiver.error, VmmError)
    goes_on(endless)


def test_addresses_and_keys(endless: Machine, tmp_path: Path) -> None:
    with pytest.raises(VmmError, match="readable by everybody"):
        migrate.migrate(endless, "tcp://127.0.0.1:1")
    with pytest.raises(VmmError, match="write tcp://HOST:PORT"):
        migrate.migrate(endless, "udp://x")
    with pytest.raises(VmmError, match="is no key file"):
        migrate.migrate(endless, "tcp://127.0.0.1:1", Options(key=str(tmp_path / "a"), peer=str(tmp_path / "b")))


def test_curve_lets_the_right_key_in_and_no_other(endless: Machine, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    import zmq.auth

    for name in ("source", "target", "stranger"):
        zmq.auth.create_certificates(tmp_path, name)
    monkeypatch.setattr(migrate, "_PATIENCE", 1.5)
    found: list[str] = []
    receiver = threading.Thread(target=lambda: found.append(receive.receive(
        "tcp://127.0.0.1:*", name="target", accel="unicorn", key=str(tmp_path / "target.key_secret"),
        peer=str(tmp_path / "source.key"), waiting=found.append).name))
    machines: list[Machine] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [m.close() for m in machines])
        original = receive.Machine.launch

        def launch(*args: Any, **options: Any) -> Machine:
            machines.append(original(*args, **options))
            return machines[-1]

        monkeypatch.setattr(receive.Machine, "launch", launch)
        receiver.start()
        until(lambda: bool(found), "listening")
        at = found[0]
        with pytest.raises(MigrationError, match=r"did not answer|nobody takes|has gone|refuses these keys"):
            migrate.migrate(endless, at, Options(key=str(tmp_path / "stranger.key_secret"),
                                                 peer=str(tmp_path / "target.key")))
        goes_on(endless)
        migrate.migrate(endless, at, Options(key=str(tmp_path / "source.key_secret"),
                                             peer=str(tmp_path / "target.key")))
        receiver.join(TIMEOUT)
        assert found[1] == "target"


# --- a target trusts nothing ----------------------------------------------------------------------------------


@given(numbers=st.binary(max_size=64), data=st.binary(max_size=9000),
       encoding=st.sampled_from(["zero", "none", "zstd", "lz4"]))
def test_pages_that_make_no_sense_are_refused(numbers: bytes, data: bytes, encoding: Any) -> None:
    """Whatever comes, either pages within the slot and as many bytes come out, or a WireError."""
    try:
        found, content = unpack(Pages(0, 0, numbers, encoding), data, 10)
    except WireError:
        return
    assert len(found) > 0
    assert set(found.tolist()) <= set(range(10))
    assert content is None or content.shape == (len(found), PAGE)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True), st.sampled_from(["none", "zstd", "lz4"]),
       st.integers(0, 1 << 32))
def test_what_is_packed_is_unpacked(pages: list[int], encoding: Any, seed: int) -> None:
    memory = np.zeros(10 * PAGE, np.uint8)
    random = np.random.default_rng(seed)
    for page in pages:
        if random.random() < 0.7:
            memory[page * PAGE:(page + 1) * PAGE] = random.integers(0, 256, PAGE, np.uint8)
    copy = np.full((10, PAGE), 7, np.uint8)
    for message, sent in wire.Packer(encoding).pack(0, 0, memory, np.array(sorted(pages))):
        numbers, data = unpack(message, sent, 10)
        copy[numbers] = 0 if data is None else data
    for page in range(10):
        assert (copy[page] == (memory.reshape(-1, PAGE)[page] if page in pages else 7)).all()


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(1, 300), st.binary(max_size=40))
def test_a_bitmap_of_missing_pages(bits: list[bool], total: int, junk: bytes) -> None:
    message = wire.missing(0, np.array(bits))
    assert wire.missing_pages(message, len(bits)).tolist() == bits
    for other in (message, wire.Missing(0, junk)):
        try:
            assert len(wire.missing_pages(other, total)) == total
        except WireError:
            pass


def test_a_zstd_bomb_is_not_unpacked() -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 28))
    with pytest.raises(WireError):
        unpack(Pages(0, 0, b"\0\0\0\0", "zstd"), bomb, 10)


@pytest.mark.parametrize("frames", [
    [b"nonsense"], [b""], [wire.encode(wire.RoundEnd(0, 5))], [wire.encode(wire.Pages(0, 0, b"\0\0\0\0", "zero"))],
    [wire.encode(wire.Commit())], ["offer", wire.encode(wire.Commit())],
    ["offer", wire.encode(wire.Pages(0, 9, b"\0\0\0\0", "zero"))],
    ["offer", wire.encode(wire.Pages(0, 0, b"\xff\xff\xff\xff", "zero"))],
    ["offer", wire.encode(wire.State(b"x", []))], ["offer", wire.encode(wire.State(b"x", [{}, {}]))],
    ["offer", b"\xc1"], ["offer", wire.encode(wire.Missing(9, b""))], ["offer", wire.encode(wire.Missing(0, b"x"))],
    ["offer", wire.encode(wire.missing(0, np.ones(9, bool)))], ["offer", wire.encode(wire.Recover(1, "source"))],
])
def test_a_stranger_gets_nowhere_and_nothing_is_left(frames: list[Any], address: str) -> None:
    work = spec("idle", accel="unicorn", mib=4, milliseconds=0)
    offer = wire.encode(wire.Offer(wire.VERSION, "0", work, Path(work.image).read_bytes()))
    receiver = Receiver(address, accel="unicorn", timeout=1.0)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.connect(address)
        for frame in frames:
            sock.send(offer if frame == "offer" else frame)
        receiver.join(TIMEOUT)
    context.term()
    assert isinstance(receiver.error, VmmError)
    assert receiver.machine is None
    until(lambda: nothing_left("target"), "nothing is left")
    assert os.path.exists(work.image)
