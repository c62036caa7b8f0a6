"""Live migration. The oracle is the guest's own work; failures are real: killed processes, damaged messages."""

from __future__ import annotations

import contextlib
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
from machines import ACCELS, exact, machine_processes, replace, spec, until

from ipc.shm import list_segments
from vmm import migrate, receive
from vmm.errors import VmmError
from vmm.machine import Machine
from vmm.migrate import MigrationError, Options
from vmm.migration.pages import PAGE
from vmm.names import machine_prefix
from vmm.runtime import machine_dir

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


@pytest.mark.parametrize("postcopy", [pytest.param(False, id="precopy"),
                                      pytest.param(True, id="postcopy", marks=pytest.mark.postcopy)])
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


def test_only_vcpus_that_dirty_most_are_held_back(address: str) -> None:
    """vCPU 0 dirties all of its share, 1,000 pages, in each round, which is more than 1,000 pages per second carry
    off within the downtime; vCPU 1 dirties next to nothing."""
    walk = spec("sequential", accel="unicorn", mib=8, passes=0, timeout=None)
    with Machine.launch(walk) as machine:
        machine.dirty_limit(50, 1)
        receiver = Receiver(address, accel="unicorn")
        report = migrate.migrate(machine, address, Options(bandwidth=4e6, downtime=0.1, max_rounds=12))
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


@pytest.mark.postcopy
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
    try:
        assert migrate.recover(walker, address).status == "completed"
    except VmmError as exc:     # the one that the coordinator has started was first
        if "is being migrated" not in str(exc):
            raise
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


@pytest.mark.postcopy
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


@pytest.mark.postcopy
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
    with pytest.raises(VmmError, match="cannot be read as a key file"):
        migrate.migrate(endless, "tcp://127.0.0.1:1", Options(key=str(tmp_path / "a"), peer=str(tmp_path / "b")))


def test_curve_lets_the_right_key_in_and_no_other(endless: Machine, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    import zmq.auth

    from vmm.migration import source, target

    for name in ("source", "target", "stranger"):
        zmq.auth.create_certificates(tmp_path, name)
    monkeypatch.setattr(source, "_PATIENCE", 1.5)
    found: list[str] = []
    receiver = threading.Thread(target=lambda: found.append(receive.receive(
        "tcp://127.0.0.1:*", name="target", accel="unicorn", key=str(tmp_path / "target.key_secret"),
        peer=str(tmp_path / "source.key"), waiting=found.append).name))
    machines: list[Machine] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [m.close() for m in machines])
        original = target.Machine.launch

        def launch(*args: Any, **options: Any) -> Machine:
            machines.append(original(*args, **options))
            return machines[-1]

        monkeypatch.setattr(target.Machine, "launch", launch)
        receiver.start()
        until(lambda: bool(found), "listening")
        at = found[0]
        with pytest.raises(VmmError, match="refuses these keys"):
            migrate.migrate(endless, at, Options(key=str(tmp_path / "stranger.key_secret"),
                                                 peer=str(tmp_path / "target.key")))
        goes_on(endless)
        migrate.migrate(endless, at, Options(key=str(tmp_path / "source.key_secret"),
                                             peer=str(tmp_path / "target.key")))
        receiver.join(TIMEOUT)
        assert found[1] == "target"
