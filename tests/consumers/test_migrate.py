"""Live migration from end to end. The oracle is the guest's own work; failures are real: killed processes, a
stopped machine, another migration. (Played peers are in test_migration_peers.py, kills at the hand-over in
test_handover.py.)"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from machines import ACCELS, exact, nothing_left, replace, spec, until
from migrations import TIMEOUT, Receiver, goes_on, receiver_process, touched, vmm

from ipc.shm import list_segments
from vmm import migrate
from vmm.client.machine import Machine
from vmm.consumers.migration import source as source_module
from vmm.consumers.migration.keys import make_keys
from vmm.consumers.migration.pages import PAGE
from vmm.consumers.migration.report import latency
from vmm.consumers.migration.status import load_status
from vmm.errors import ExitCode, VmmError
from vmm.machine import records
from vmm.machine.names import machine_prefix
from vmm.machine.runtime import LONGEST_SOCKET, machine_dir
from vmm.machine.spec import RamSlot
from vmm.migrate import MigrationError, Options


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
    with Machine.launch(replace(work, dirty_quota=20)) as machine:
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

    def counts(machine: Machine) -> np.ndarray[Any, np.dtype[np.int64]]:
        words = machine.ram(0).view(np.uint64).reshape(-1, 512)[:, 0].astype(np.int64)
        return words[512:len(words) - 4 * vcpus]      # behind image and before stacks, surely

    with Machine.launch(walk) as machine:
        until(lambda: counts(machine).min() > 0, "each page was written once")
        receiver = Receiver(address, accel=accel)
        migrate.migrate(machine, address)
        with receiver.result() as moved:
            moved.pause()
            usable = counts(moved)
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


# --- what was set at run time ----------------------------------------------------------------------------------


def test_what_a_user_has_set_travels(address: str) -> None:
    """Before the migration, and while it goes on: the target is told of it with the vCPU states."""
    slots = [RamSlot(0, 0, 8 << 20), RamSlot(1, 1 << 30, 1 << 20)]
    walk = spec("sequential", accel="unicorn", name="source", slots=slots, passes=0, spin=50, timeout=None)
    with Machine.launch(replace(walk, dirty_quota=5000)) as machine:
        machine.dirty_limit(0, 0)
        machine.log_stop(1)
        receiver = Receiver(address, accel="unicorn")
        seen: list[str] = []

        def meanwhile(report: migrate.Report) -> None:
            if report.status == "active" and not seen:
                seen.append(report.status)
                with Machine.attach("source") as other:
                    other.dirty_limit(3000, 1)
                    other.log_start(1)
                    other.pause()       # it stands still, and so it does at the target

        migrate.migrate(machine, address, progress=meanwhile)
        assert seen
        with receiver.result() as moved:
            status = moved.status()
            assert status["state"] == "paused"
            assert [v["dirty_limit_pages_per_s"] for v in status["vcpus"]] == [0, 3000]
            assert [s["logged"] for s in status["slots"]] == [True, True]
            moved.resume()
            moved.register("a")
            until(lambda: moved.sync("a").pages > 0, "the guest goes on")


def test_a_way_of_tracking_set_during_the_migration_travels(address: str) -> None:
    walk = spec("sequential", accel="unicorn", name="source", mib=8, passes=0, spin=50, timeout=None)
    with Machine.launch(walk) as machine:
        receiver = Receiver(address, accel="unicorn")
        seen: list[str] = []

        def meanwhile(report: migrate.Report) -> None:
            if report.status == "active" and not seen:
                seen.append(report.status)
                with Machine.attach("source") as other:
                    other.set_tracking("bitmap")

        migrate.migrate(machine, address, progress=meanwhile)
        with receiver.result() as moved:
            assert moved.status()["tracking"] == "bitmap"
            moved.register("a")
            until(lambda: moved.sync("a").pages > 0, "the guest goes on and is logged")


def test_a_machine_that_was_paused_arrives_paused(address: str) -> None:
    walk = spec("sequential", accel="unicorn", name="source", mib=8, passes=0, spin=50, timeout=None)
    with Machine.launch(walk) as machine:
        machine.pause()
        expected = machine.ram(0).tobytes()
        receiver = Receiver(address, accel="unicorn")
        migrate.migrate(machine, address)
        with receiver.result() as moved:
            assert moved.status()["state"] == "paused"
            assert moved.ram(0).tobytes() == expected


# --- post-copy -------------------------------------------------------------------------------------------------


SLOWLY = Options(postcopy=True, bandwidth=10e6, downtime=0.0)


def in_postcopy(machine: Machine) -> bool:
    """Its migration is past the point of no return, and pages are missing there."""
    with contextlib.suppress(VmmError):
        return bool(load_status(machine.name)["status"] == "postcopy-active")
    return False


@pytest.fixture
def walker(accel: str) -> Iterator[Machine]:
    walk = spec("sequential", accel=accel, name="source", mib=32, passes=0, spin=300, timeout=None)
    with Machine.launch(walk) as machine:
        yield machine


def state_of(machine: Machine) -> dict[str, Any]:
    machine.pause()         # a software CPU that waits for a page cannot leave the guest; KVM can
    return machine.state()


def whole(moved: Machine) -> None:
    """Each page has been counted up since the first round: one never sent would be zero."""
    moved.pause()
    words = moved.ram(0).view(np.uint64).reshape(-1, 512)[:, 0].astype(np.int64)
    usable = words[512:len(words) - 8]
    down = np.flatnonzero(np.diff(usable) < 0)
    assert len(down) <= 3
    assert usable.min() > 0


@pytest.mark.postcopy
def test_both_ends_say_how_long_a_page_took_that_was_waited_for(walker: Machine, accel: str, address: str) -> None:
    receiver = Receiver(address, accel=accel)
    report = migrate.migrate(walker, address, SLOWLY)
    receiver.result().close()
    waits = report.postcopy_latency
    assert 0 < waits["median_us"] <= waits["p99_us"] <= waits["max_us"] <= sum(report.postcopy_blocktime) * 1000 + 1
    # A page that several vCPUs wait for is asked for once.
    assert waits["pages"] >= report.ram.postcopy_requests > 0
    assert sum(count for name, count in waits.items() if name.startswith("upto_")) == waits["pages"]
    assert load_status("target")["postcopy_latency"] == waits


def test_waits_are_counted_by_powers_of_two() -> None:
    assert latency([]) == {}
    assert latency([50e-6, 100e-6, 101e-6, 250e-6, 0.0]) == {
        "pages": 5, "median_us": 100.0, "p99_us": 250.0, "max_us": 250.0,
        "upto_100_us": 3, "upto_200_us": 1, "upto_400_us": 1}
    many = latency([n * 1e-6 for n in range(1, 1001)])
    assert (many["median_us"], many["p99_us"], many["max_us"]) == (501.0, 991.0, 1000.0)


@pytest.mark.postcopy
def test_a_source_killed_in_post_copy_is_replaced_and_no_page_is_lost(walker: Machine, accel: str,
                                                                      address: str) -> None:
    receiver = Receiver(address, accel=accel)
    source = vmm("migrate", "source", address, "--postcopy", "--bandwidth", "10MB/s", "--downtime", "1ms")
    until(lambda: in_postcopy(walker), "in post-copy", TIMEOUT)
    with Machine.attach("target") as target:
        with pytest.raises(VmmError, match="still arriving"):
            target.ram(0)
        with pytest.raises(VmmError, match="still arriving"):
            state_of(target)
        target.resume()
    source.kill()
    source.communicate()
    with receiver.result() as moved:
        whole(moved)
    until(lambda: walker.status()["state"] == "ended", "the source has ended")
    assert load_status("source")["status"] == "completed"


@pytest.mark.postcopy
@pytest.mark.parametrize("whose", ["source", "target"])
def test_a_coordinator_killed_in_post_copy_is_replaced_and_no_page_is_lost(walker: Machine, accel: str, whose: str,
                                                                           address: str) -> None:
    receiver = Receiver(address, accel=accel)
    killed: list[int] = []

    def kill_once(report: migrate.Report) -> None:
        if report.status == "postcopy-active" and not killed:
            with Machine.attach(whose) as machine:
                killed.append(machine.status()["coordinator"]["pid"])
            os.kill(killed[0], signal.SIGKILL)

    assert migrate.migrate(walker, address, SLOWLY, progress=kill_once).status == "completed"
    assert killed
    with receiver.result() as moved:
        whole(moved)


@pytest.mark.postcopy
def test_a_target_lost_in_post_copy_leaves_the_source_as_it_was_handed_over(
        walker: Machine, accel: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_NOBODY_PATIENCE", 1.0)
    target = receiver_process(address, "--accel", accel)
    seen: list[str] = []

    def watch(report: migrate.Report) -> None:
        if report.status == "postcopy-active" and not seen:
            seen.append(report.status)
            target.kill()

    with pytest.raises(MigrationError, match="vmm resume source --force") as failure:
        migrate.migrate(walker, address, SLOWLY, progress=watch)
    assert failure.value.exit_code == ExitCode.MIGRATION_FAILED
    target.communicate()
    until(lambda: nothing_left("target"), "the target's machine is gone")
    assert walker.status()["state"] == "paused"
    walker.resume(force=True)
    goes_on(walker)
    with pytest.raises(VmmError, match="has not been handed over"):
        migrate.recover(walker, address)


@pytest.mark.postcopy
def test_a_machine_stopped_in_post_copy_is_gone_and_the_source_is_told(walker: Machine, accel: str,
                                                                       address: str) -> None:
    """The guest has run there: what the source has is older, and a person decides."""
    receiver = Receiver(address, accel=accel)
    seen: list[str] = []

    def watch(report: migrate.Report) -> None:
        if report.status == "postcopy-active" and not seen:
            seen.append(report.status)
            with Machine.attach("target") as target:
                target.stop()

    with pytest.raises(MigrationError, match="the machine has ended there"):
        migrate.migrate(walker, address, SLOWLY, progress=watch)
    receiver.failure()
    assert walker.status()["state"] == "paused"
    walker.resume(force=True)
    goes_on(walker)


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


@pytest.mark.postcopy
def test_post_copy_in_a_runtime_directory_as_long_as_can_be(runtime_dir: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that can be launched there can also arrive there by post-copy: no socket of it has a longer
    name."""
    deep = runtime_dir / ("d" * (107 - len(f"{runtime_dir}//shardvmm/target/{LONGEST_SOCKET}")))
    deep.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    walk = spec("sequential", accel="unicorn", name="source", mib=8, passes=0, spin=50, timeout=None)
    receiver = Receiver(f"ipc://{runtime_dir}/m", accel="unicorn")
    with Machine.launch(walk) as machine, touched("source"):
        report = migrate.migrate(machine, f"ipc://{runtime_dir}/m", SLOWLY)
        assert report.ram.postcopy_pages
        with receiver.result():
            pass
    with contextlib.suppress(OSError):
        (deep / "shardvmm").rmdir()
    deep.rmdir()


# --- failures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def endless() -> Iterator[Machine]:
    walk = spec("sequential", accel="unicorn", name="source", mib=64, passes=0, spin=50, timeout=None)
    with Machine.launch(walk) as machine:
        yield machine


def begun() -> None:
    until(lambda: bool(list_segments(machine_prefix("target"))), "begun", TIMEOUT)


def test_a_target_that_is_killed_leaves_the_source_running(endless: Machine, address: str) -> None:
    target = receiver_process(address, "--accel", "unicorn")
    killer = threading.Thread(target=lambda: (begun(), target.kill()))
    killer.start()
    with pytest.raises(MigrationError):
        migrate.migrate(endless, address, Options(bandwidth=5e6))
    killer.join()
    target.communicate()
    goes_on(endless)
    until(lambda: nothing_left("target"), "the target's machine is gone")


def test_a_source_that_is_killed_while_it_throttles_leaves_no_limit_and_no_target(address: str) -> None:
    """Nor a client, and ``status`` and ``cancel`` say what is the case at once."""
    walk = spec("sequential", accel="unicorn", name="source", mib=8, passes=0, timeout=None)
    with Machine.launch(walk) as machine:
        receiver = Receiver(address, accel="unicorn")
        source = vmm("migrate", "source", address, "--bandwidth", "4MB/s", "--downtime", "1ms")

        def throttled() -> bool:
            return any(v["dirty_limit_pages_per_s"] for v in machine.status()["vcpus"])

        until(throttled, "throttled", TIMEOUT)
        source.kill()
        source.communicate()
        assert "disconnected" in receiver.failure()
        goes_on(machine)
        found = load_status("source")
        assert found["status"] == "failed"
        assert "was killed" in found["error"]
        with pytest.raises(VmmError):
            run("migrate", "cancel", "source")


def run(*arguments: str) -> str:
    """``vmm`` with these; what it prints. Raises VmmError with what it says on standard error."""
    process = vmm(*arguments)
    out, err = process.communicate(timeout=TIMEOUT)
    if process.returncode:
        raise VmmError(err.strip(), ExitCode(process.returncode))
    return out


def test_cancel_signals_nobody_but_the_source(endless: Machine, address: str) -> None:
    """The pid that the report names is another's by now."""
    report = migrate.Report("1234", "source", address, status="active", pid=os.getpid(), pid_started=1)
    (machine_dir("source") / "migrate.json").write_text(json.dumps(report.as_dict()))
    assert load_status("source")["status"] == "failed"
    with pytest.raises(VmmError, match="no migration of machine 'source' is in progress"):
        run("migrate", "cancel", "source")


def test_cancel_and_status_from_the_command_line(endless: Machine, address: str) -> None:
    with pytest.raises(VmmError, match="is not being migrated") as failure:
        run("migrate", "cancel", "source")
    assert failure.value.exit_code == ExitCode.BAD_INPUT
    receiver = Receiver(address, accel="unicorn")
    source = vmm("migrate", "source", address, "--bandwidth", "5MB/s")
    until(lambda: load_status("source")["ram"]["transferred"] > 0 if (machine_dir("source") /
    "migrate.json").exists()
          else False, "pages are sent", TIMEOUT)
    until(lambda: load_status("source")["ram"]["mbps"] > 0, "a rate is known in the first round", TIMEOUT)
    text = run("migrate", "status", "source")
    assert "active: round 1: " in text
    assert " % of memory is there, " in text
    assert " MB/s" in text
    assert msgspec.json.decode(run("migrate", "cancel", "source", "--json"))["status"] == "cancelled"
    _, err = source.communicate(timeout=TIMEOUT)
    assert source.returncode == 128 + signal.SIGINT
    assert receiver.failure() == "the source gave up: cancelled by the user"
    assert err.endswith("vmm: the migration was cancelled: source runs on here\n")
    assert "KeyboardInterrupt" not in err + run("migrate", "status", "source")
    goes_on(endless)
    with pytest.raises(VmmError, match="is in progress"):
        run("migrate", "cancel", "source")


@pytest.mark.parametrize("what", ["interrupted", "target killed"])
def test_a_slow_migration_ends_soon(what: str, endless: Machine, address: str) -> None:
    """Under a cap at which a message of 1 MiB would take half a minute."""
    target = receiver_process(address, "--accel", "unicorn")
    source = vmm("migrate", "source", address, "--bandwidth", "30kB/s")
    until(lambda: (machine_dir("source") / "migrate.json").exists()
          and load_status("source")["ram"]["transferred"] > 0, "pages are sent", TIMEOUT)
    began = time.monotonic()
    (source if what == "interrupted" else target).send_signal(
        signal.SIGINT if what == "interrupted" else signal.SIGKILL)
    source.communicate(timeout=TIMEOUT)
    assert time.monotonic() - began < 15.0
    assert source.returncode == (128 + signal.SIGINT if what == "interrupted" else ExitCode.MIGRATION_FAILED)
    target.communicate(timeout=TIMEOUT)
    goes_on(endless)
    until(lambda: nothing_left("target"), "the target's machine is gone")


def test_a_second_migration_and_hotplug_are_refused_with_the_name_of_the_first(endless: Machine, address: str,
                                                                               runtime_dir: Path) -> None:
    receiver = Receiver(address, accel="unicorn")
    tried: list[str] = []

    def meanwhile(report: migrate.Report) -> None:
        if report.status == "active" and not tried:
            with Machine.attach("source") as other:
                for attempt in (lambda: migrate.migrate(other, f"ipc://{runtime_dir}/other"),
                                lambda: other.memory_add(1, 1 << 30, PAGE)):
                    with pytest.raises(VmmError) as failure:
                        attempt()
                    tried.append(str(failure.value))

    migrate.migrate(endless, address, progress=meanwhile)
    assert len(tried) == 2
    for said in tried:
        assert f"it is being migrated to {address} (pid {os.getpid()})" in said
    with receiver.result():
        pass


def test_memory_that_is_not_what_was_offered_is_not_moved(endless: Machine) -> None:
    """Whatever lets it come about: removed, added, and added again under its id."""
    with migrate._Source(endless, "ipc://x", Options(), migrate.Report("", "", ""), lambda report: None) as source:
        offered = spec("idle", accel="unicorn", slots=[RamSlot(0, 0, 4 << 20), RamSlot(1, 1 << 30, PAGE, born=7)])
        source._offered = offered
        source._check_slots(replace(offered, slots=[RamSlot(0, 0, 4 << 20, log=False), offered.slots[1]]))
        for slots in ([offered.slots[0]], [*offered.slots, RamSlot(2, 2 << 30, PAGE)],
                      [offered.slots[0], RamSlot(1, 1 << 30, PAGE, born=8)]):
            with pytest.raises(MigrationError, match=r"memory slot [12] of machine 'source' was added or removed"):
                source._check_slots(replace(offered, slots=slots))


def test_an_arriving_machine_is_the_receivers_alone(endless: Machine, address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    tried: list[str] = []

    def meanwhile(report: migrate.Report) -> None:
        if report.status == "active" and not tried:
            with Machine.attach("target") as arriving:
                for attempt in (arriving.start, lambda: arriving.memory_add(1, 1 << 30, PAGE),
                                lambda: arriving.write(5 << 20, b"x"), lambda: arriving.register("a")):
                    with pytest.raises(VmmError) as failure:
                        attempt()
                    tried.append(str(failure.value))

    migrate.migrate(endless, address, Options(bandwidth=40e6), progress=meanwhile)
    assert len(tried) == 4
    assert all("it is still arriving" in said for said in tried)
    with receiver.result() as moved:        # and nobody is kept from it afterwards
        moved.memory_add(1, 1 << 30, PAGE)
        moved.register("a")


def test_a_target_that_cannot_is_a_reason_and_the_source_runs_on(endless: Machine, address: str) -> None:
    with Machine.launch(spec("idle", accel="unicorn", milliseconds=0, timeout=None), name="target"):
        receiver = Receiver(address, accel="unicorn", timeout=3.0)
        with pytest.raises(MigrationError, match="'target' is already running"):
            migrate.migrate(endless, address)
        receiver.join(TIMEOUT)      # another may come
        assert isinstance(receiver.error, VmmError)
        assert receiver.error.exit_code == ExitCode.TIMEOUT
        assert "'target' is already running" in receiver.refused[0]
    goes_on(endless)


def test_addresses_and_keys(endless: Machine, tmp_path: Path) -> None:
    for address, options, why in (("tcp://127.0.0.1:1", Options(), "would be sent unencrypted"),
                                  ("udp://x", Options(), "write tcp://HOST:PORT"),
                                  ("tcp://127.0.0.1:99999", Options(insecure=True), "port '99999'"),
                                  ("tcp://127.0.0.1:1", Options(key=str(tmp_path / "a"), peer=str(tmp_path / "b")),
                                   "cannot be read as a key file")):
        with pytest.raises(VmmError, match=why):
            migrate.migrate(endless, address, options)
    goes_on(endless)


@pytest.mark.parametrize("at", ["127.0.0.1", "[::1]"])
def test_over_tcp_with_keys(endless: Machine, tmp_path: Path, at: str) -> None:
    for name in ("source", "target", "stranger"):
        make_keys(tmp_path, name)

    def keys(own: str, peer: str) -> dict[str, str]:
        return {"key": str(tmp_path / f"{own}.key_secret"), "peer": str(tmp_path / f"{peer}.key")}

    receiver = Receiver(f"tcp://{at}:*", accel="unicorn", **keys("target", "source"))
    with pytest.raises(VmmError, match="rejected these keys"):
        migrate.migrate(endless, receiver.at, Options(**keys("stranger", "target")))
    goes_on(endless)
    migrate.migrate(endless, receiver.at, Options(**keys("source", "target")))
    receiver.result().close()


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> Iterator[Machine]:
    walk = spec("sequential", accel="unicorn", name="source", mib=8, passes=0, spin=50, timeout=None)
    with Machine.launch(walk) as machine:
        yield machine


def test_migrate_and_receive_from_the_command_line(small: Machine, address: str, tmp_path: Path) -> None:
    """With every option that says how; a detached target lives on, the report is written, and status is kept."""
    receiver = receiver_process(address, "--accel", "unicorn", "--detach", "--json")
    report = tmp_path / "report.json"
    text = run("migrate", "source", address, "--channels", "3", "--no-converge", "--compress", "lz4",
               "--max-rounds", "3", "--report", str(report))
    assert text.startswith(f"source was migrated to {address}: total ")
    assert "compression lz4" in text
    found = json.loads(report.read_text())
    assert found["status"] == "completed"
    assert found["throttled"] == {}
    assert len(found["rounds"]) <= 4
    out, _ = receiver.communicate(timeout=TIMEOUT)
    assert receiver.returncode == 0
    assert json.loads(out) == {"name": "target"}
    with Machine.attach("target") as moved:
        moved.register("a")
        until(lambda: moved.sync("a").pages > 0, "the guest goes on")
        moved.stop()
    small.close()
    until(lambda: not machine_dir("source").exists(), "the source's machine is gone")
    assert json.loads(run("migrate", "status", "source", "--json")) == found
    assert "completed: " in run("migrate", "status", "source")
    with pytest.raises(VmmError, match=f"has already been migrated to {address}"):
        run("migrate", "cancel", "source")
    assert records.migration_path("source").exists()


def test_background_returns_an_id_and_the_machine_arrives(small: Machine, address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    found = msgspec.json.decode(run("migrate", "source", address, "--background", "--json"))
    assert len(found["id"]) == 8
    with receiver.result() as moved:
        moved.register("a")
        until(lambda: moved.sync("a").pages > 0, "the guest goes on")
    until(lambda: small.status()["state"] == "ended", "the source has ended")
    until(lambda: load_status("source")["status"] == "completed", "and says so")
    assert load_status("source")["id"] == found["id"]


def test_background_that_cannot_begin_says_why(small: Machine, address: str, runtime_dir: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VmmError, match="no machine named 'nobody'") as failure:
        run("migrate", "nobody", address, "--background")
    assert failure.value.exit_code == ExitCode.NO_MACHINE


@pytest.mark.parametrize(("path", "moves"), [("/nonexistent/r.json", False), ("/dev/full", True)])
def test_a_report_that_cannot_be_written_is_no_failed_migration(path: str, moves: bool, small: Machine,
                                                                address: str) -> None:
    """Refused before it begins; or a warning, when it has moved."""
    receiver = Receiver(address, accel="unicorn", timeout=None if moves else 3.0)
    source = vmm("migrate", "source", address, "--report", path)
    _, err = source.communicate(timeout=TIMEOUT)
    assert f"{path}: cannot be written" in err
    assert source.returncode == (ExitCode.OK if moves else ExitCode.BAD_INPUT)
    if moves:
        assert "vmm: warning: the report was not written" in err
        receiver.result().close()
    else:
        receiver.failure()
        goes_on(small)


def test_recover_from_the_command_line(small: Machine, address: str) -> None:
    with pytest.raises(VmmError, match="has not been handed over"):
        run("migrate", "source", address, "--recover")


def test_a_failed_migration_has_an_exit_status_of_its_own(small: Machine, address: str,
                                                          runtime_dir: Path) -> None:
    receiver = receiver_process(address, "--accel", "unicorn", "--timeout", "1s")
    _, err = receiver.communicate(timeout=TIMEOUT)
    assert receiver.returncode == ExitCode.TIMEOUT
    assert "no source came" in err
    Path(f"{runtime_dir}/there").write_text("precious")
    process = vmm("receive", f"ipc://{runtime_dir}/there")
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == ExitCode.BAD_INPUT
    assert "is not a socket" in err
    assert Path(f"{runtime_dir}/there").read_text() == "precious"
    Path(f"{runtime_dir}/there").unlink()


def test_keys_from_the_command_line(tmp_path: Path) -> None:
    assert run("keys", str(tmp_path), "a").split() == [str(tmp_path / "a.key"), str(tmp_path / "a.key_secret")]
    before = (tmp_path / "a.key_secret").read_text()
    with pytest.raises(VmmError, match="already exists"):
        run("keys", str(tmp_path), "a")
    assert (tmp_path / "a.key_secret").read_text() == before
    run("keys", str(tmp_path), "a", "--force")
    with pytest.raises(VmmError, match="key name"):
        run("keys", str(tmp_path), "../x")
