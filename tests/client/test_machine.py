"""Whole machines on both accelerators: real workers, rings, signals. The oracle is memory itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machines import ACCELS, changed_pages, exact, replace, spec, until

from vmm.client.machine import Machine, list_machines
from vmm.errors import ExitCode, VmmError
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec

TIMEOUT = 60.0


def run(machine_spec: MachineSpec) -> dict[str, Any]:
    with Machine.launch(machine_spec) as machine:
        return machine.wait(TIMEOUT)


@pytest.fixture(params=ACCELS)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def assert_verified(report: dict[str, Any], rounds: int = 2) -> None:
    result = report["verification"]
    assert result["lost_pages"] == 0, result
    assert result["surplus_pages"] == 0, result
    assert result["rounds"] >= rounds
    assert result["dirty_pages"] > 0
    assert report["exit_code"] == 0, report


def pages_of(ranges: list[tuple[int, int]]) -> set[int]:
    return {p for first, count in ranges for p in range(first, first + count)}


# --- verified runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(("workload", "params"), [
    ("sequential", {"passes": 20}), ("random", {"writes": 60_000}),
    ("hotspot", {"writes": 60_000}), ("stamp", {"writes": 60_000}),
])
def test_no_page_is_lost(accel: str, workload: str, params: dict[str, int]) -> None:
    report = run(spec(workload, accel=accel, verify=exact(), **params, spin=100))
    assert_verified(report)


@pytest.mark.parametrize("ring", [0, 1024, 65536])
def test_no_page_is_lost_whatever_the_ring(accel: str, ring: int) -> None:
    report = run(spec("stamp", accel=accel, ring=ring, verify=exact(), writes=60_000, spin=50))
    assert_verified(report)
    assert report["tracking"] == ("ring" if ring else "bitmap")


def test_fixed_reaper_lives_on_ring_full_exits(accel: str) -> None:
    report = run(spec("sequential", accel=accel, ring=1024, reaper=ReaperSpec(mode="fixed", interval=10.0),
                      passes=4, log="always"))
    assert report["exit_code"] == 0
    # One vCPU's full ring has every ring reaped, so who reports the most is chance; but without a reap
    # in between nobody can push more than a ring holds.
    fulls = sum(v["ring_full_exits"] for v in report["vcpus"])
    pushed = max(v["dirty_pages"] for v in report["vcpus"])
    assert pushed > 4 * 1024
    assert fulls >= pushed // 1024 - 1, report["vcpus"]


@pytest.mark.parametrize("reapers", [2, 3])
def test_no_page_is_lost_to_several_reapers(accel: str, reapers: int) -> None:
    """Threads that harvest some of the rings each, into staging bitmaps of their own; rings overflow often."""
    report = run(spec("stamp", accel=accel, vcpus=3, ring=1024, reaper=ReaperSpec(reapers=reapers), verify=exact(),
                      writes=40_000, spin=50))
    assert_verified(report)
    assert all(v["dirty_pages"] > 0 and v["ring_rebuilds"] == 0 for v in report["vcpus"])


def test_slots_with_a_hole_and_one_that_is_not_logged(accel: str) -> None:
    slots = [RamSlot(0, 0, 8 << 20), RamSlot(7, 0x4000_0000, (4 << 20) + 4096),
             RamSlot(3, 0x1_0000_0000, (2 << 20) + 3 * 4096, log=False)]
    report = run(spec("sequential", accel=accel, slots=slots, verify=exact(0.02), passes=40, spin=60))
    assert_verified(report)
    assert [s["id"] for s in report["slots"]] == [0, 7, 3]


def test_kernel_privilege(accel: str) -> None:
    report = run(spec("sequential", accel=accel, privilege="kernel", ring=4096, passes=3, verify=exact()))
    assert_verified(report, rounds=1)


@pytest.mark.parametrize("ring", [0, 4096])
@pytest.mark.parametrize("inject", ["lost", "extra"])
def test_the_verifier_catches_what_is_injected(accel: str, inject: str, ring: int) -> None:
    report = run(spec("stamp", accel=accel, ring=ring, verify=exact(inject=inject), writes=50_000, pages=500,
                      spin=20))
    result = report["verification"]
    assert report["exit_code"] == ExitCode.VERIFY_FAILED
    assert result["injected"] == inject
    assert (result["lost_pages"], result["surplus_pages"]) == ((1, 0) if inject == "lost" else (0, 1))


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_locked_counters_are_exact(accel: str, mode: int) -> None:
    """The guest itself counts and exits with 1 when an update was lost."""
    report = run(spec("counter", accel=accel, increments=20_000, mode=mode))
    assert [v["exit_code"] for v in report["vcpus"]] == [0, 0]
    assert report["exit_code"] == 0


def test_wait_and_wake_between_vcpus(accel: str) -> None:
    report = run(spec("pingpong", accel=accel, turns=100, vcpus=3))
    assert report["exit_code"] == 0


# --- same memory on both ---------------------------------------------------------------------------


@pytest.mark.kvm
@pytest.mark.parametrize(("workload", "params"), [
    ("sequential", {"passes": 3}), ("random", {"writes": 30_000}), ("hotspot", {"writes": 30_000}),
    ("counter", {"increments": 5_000}), ("hello", {}), ("idle", {"milliseconds": 10}),
    ("pingpong", {"turns": 50}),
])
def test_both_accelerators_end_with_the_same_memory(workload: str, params: dict[str, int]) -> None:
    memories = []
    for name in ("kvm", "unicorn"):
        with Machine.launch(spec(workload, accel=name, mib=4, **params)) as machine:
            assert machine.wait(TIMEOUT)["exit_code"] == 0
            memories.append(machine.ram(0).tobytes())
    assert memories[0] == memories[1]


# --- the guest is not disturbed, and what becomes of a bad one -------------------------------------------


def test_kicks_and_reaps_do_not_disturb_the_guest(accel: str) -> None:
    """Each page is counted up once a pass: not once more or less, however often the vCPUs are stopped."""
    passes = 60 if accel == "unicorn" else 300
    walk = spec("sequential", accel=accel, ring=1024, mib=8, passes=passes, spin=20)
    with Machine.launch(replace(walk, dirty_quota=2000)) as machine:    # or it might be done before it is disturbed
        machine.register("a")

        def disturb() -> None:
            machine.sync("a")
            machine.pause()
            machine.resume()

        for _ in range(5):
            disturb()
        machine.dirty_limit(0)
        with contextlib.suppress(VmmError):     # "has ended", between two of them
            while machine.status()["state"] != "ended":
                disturb()
        assert machine.wait(TIMEOUT)["exit_code"] == 0
        words = machine.ram(0).view(np.uint64).reshape(-1, 512)[:, 0]
        # The stacks are at the slot's end, the image below 2 MiB.
        assert set(words[512:-16].tolist()) == {passes}


#: Flat binaries: name -> (code, privilege, reason, what the report's detail must say).
BAD_GUESTS = {
    "outside-ram-read": ("b8 00000080 8b 00", "user", "bad-address", "0x80000000"),
    "outside-ram-write": ("b8 00000080 89 00", "user", "bad-address", "0x80000000"),
    "unmapped": ("48 b8 0000000000010000 89 00", "user", "bad-address", "0x10000000000"),
    "unknown-port": ("b8 01000000 e7 99", "user", "unknown-port", "0x99"),
    "undefined": ("0f 0b", "user", "exception", "#UD"),
    "division": ("31 c9 f7 f1", "user", "exception", "#DE"),
    "halt": ("f4", "kernel", "halt", ""),
    "triple-fault": ("48 b8 00002000 00000000 0f 01 18 0f 0b", "kernel", "triple-fault", ""),
}


def test_vcpu_processes_are_as_nice_as_they_are_told(accel: str) -> None:
    """And their sessions, which are what the kernel shares a processor out to; nobody else is."""
    with Machine.launch(replace(spec("idle", accel=accel, milliseconds=0, timeout=None), nice=7)) as machine:
        status = machine.status()

        def nice(pid: int) -> int:
            return os.getpriority(os.PRIO_PROCESS, pid)

        for vcpu in status["vcpus"]:
            until(lambda pid=vcpu["pid"]: nice(pid) == 7, "the vCPU's thread is")
            group = Path(f"/proc/{vcpu['pid']}/autogroup")
            if group.exists():
                until(lambda group=group: group.read_text().endswith(" nice 7\n"), "its session is")
        assert nice(status["coordinator"]["pid"]) == nice(os.getpid())



@pytest.mark.parametrize("kind", BAD_GUESTS)
def test_a_bad_guest_ends_with_reason_and_registers(accel: str, kind: str, tmp_path: Path) -> None:
    code, privilege, reason, detail = BAD_GUESTS[kind]
    image = tmp_path / "bad.bin"
    image.write_bytes(bytes.fromhex(code.replace(" ", "")))
    report = run(spec("", accel=accel, vcpus=2, mib=4, image=image, load_address=0x10_0000, params=[],
                      privilege=privilege))
    assert report["exit_code"] == ExitCode.GUEST_CRASHED
    for vcpu in report["vcpus"]:
        assert vcpu["exit_reason"] == reason, vcpu
        assert detail in vcpu["detail"]
        if reason != "triple-fault":    # a shutdown resets the registers on some CPUs
            assert 0x10_0000 <= vcpu["registers"]["rip"] < 0x10_0020


@pytest.mark.kvm
def test_a_ring_that_overflows_at_kernel_privilege_is_rebuilt_and_nothing_lost() -> None:
    """Invariant 3, where KVM emulates CPL 0 in batches that a small ring cannot take."""
    machine_spec = spec("sequential", accel="kvm", privilege="kernel", ring=1024, mib=32, passes=2,
                        verify=exact(0.1), reaper=ReaperSpec(mode="fixed", interval=10.0))
    with Machine.launch(machine_spec) as machine:
        rebuilt = [e for e in machine.events(TIMEOUT) if e["event"] == "ring-rebuilt"]
        report = machine.wait(TIMEOUT)
    if not rebuilt:
        pytest.skip("this KVM runs CPL 0 natively: no ring overflows")
    assert report["exit_code"] == 0
    assert_verified(report, rounds=1)
    assert sum(v["ring_rebuilds"] for v in report["vcpus"]) == len(rebuilt)
    assert all(e["pages_marked"] == report["slots"][0]["pages"] for e in rebuilt)


# --- flush, clients, host writes -----------------------------------------------------------------------


@pytest.fixture
def endless(accel: str) -> Iterator[Machine]:
    busy = spec("random", accel=accel, writes=0, spin=200, timeout=None)
    with Machine.launch(busy, start=False) as machine:
        yield machine


def test_sync_covers_every_write_before_it(endless: Machine) -> None:
    """Nothing lost, judged from outside: between two pauses, what changed is what sync says."""
    endless.register("a")
    before = endless.ram(0).copy()
    for _ in range(5):
        endless.start()
        endless.resume()
        until(lambda b=before: len(changed_pages(b, endless.ram(0))) > 20, "the guest gets on")
        endless.pause()
        after = endless.ram(0).copy()
        dirty = pages_of(endless.sync("a").slots[0])
        changed = changed_pages(before, after)
        assert changed <= dirty
        assert len(dirty - changed) <= 2 * 2     # a logged store a vCPU that has not retired, twice
        before = after


def test_sync_of_a_running_guest_loses_nothing(endless: Machine) -> None:
    endless.register("a")
    before = endless.ram(0).copy()
    endless.start()
    dirty: set[int] = set()
    for _ in range(50):
        dirty |= pages_of(endless.sync("a").slots[0])
    endless.pause()
    dirty |= pages_of(endless.sync("a").slots[0])
    assert changed_pages(before, endless.ram(0)) <= dirty


def test_a_flush_is_traced_at_its_beginning_and_its_end(accel: str, tmp_path: Path) -> None:
    """What is reaped in it stands between the two (seed: kvm_dirty_ring_flush); flushes do not overlap."""
    events = tmp_path / "events"
    busy = spec("random", accel=accel, writes=0, spin=200, timeout=None, trace=["kvm_dirty_ring_flush",
                                                                                "kvm_dirty_ring_reap"],
                trace_file=str(events))
    with Machine.launch(busy) as machine:
        machine.register("a")
        for _ in range(5):
            machine.sync("a")
        until(lambda: bool(machine.sync("a").pages), "pages dirtied")
        machine.stop()
        flushes = machine.wait(TIMEOUT)["reaper"]["flushes"]
    found = [line.split(maxsplit=2)[1:] for line in events.read_text().splitlines()]
    sides = [fields for event, fields in found if event == "kvm_dirty_ring_flush"]
    assert sides == ["finished=0", "finished=1"] * flushes
    assert flushes >= 6
    ends = [at for at, (event, fields) in enumerate(found) if fields == "finished=1"]
    assert any(found[at - 1][0] == "kvm_dirty_ring_reap" for at in ends)


def test_clients_do_not_steal_from_one_another(endless: Machine) -> None:
    for client in ("fast", "slow"):
        endless.register(client)
    before = endless.ram(0).copy()
    endless.start()
    fast: set[int] = set()
    for _ in range(20):
        fast |= pages_of(endless.sync("fast").slots[0])
    endless.pause()
    fast |= pages_of(endless.sync("fast").slots[0])
    slow = endless.sync("slow").slots[0]
    changed = changed_pages(before, endless.ram(0))
    assert changed <= pages_of(slow)
    assert changed <= fast
    assert fast == pages_of(slow)
    bitmap = endless.bitmap(0, "slow")
    assert bitmap.count() == len(fast)
    assert endless.sync("slow").pages == 0


def test_unknown_client_is_one_line(endless: Machine) -> None:
    with pytest.raises(VmmError, match="there is no dirty-log client 'nobody'"):
        endless.sync("nobody")


def test_host_writes_are_dirty(endless: Machine) -> None:
    endless.register("a")
    endless.write(0x20_0000 - 2, b"abcd")      # crosses a page
    assert endless.read(0x20_0000 - 2, 4) == b"abcd"
    assert endless.sync("a").slots[0] == [(0x1FF, 2)]
    with pytest.raises(VmmError, match="not within a single memory slot"):
        endless.write(0x8000_0000, b"x")
    with pytest.raises(VmmError, match="outside a slot"):
        endless.mark_dirty(0, 1 << 30, 1)


def test_views_are_read_only_unless_asked_for(endless: Machine) -> None:
    with pytest.raises(ValueError, match="read-only"):
        endless.ram(0)[0] = 1


# --- logging, hotplug ---------------------------------------------------------------------------------


def test_log_stop_and_start(endless: Machine) -> None:
    endless.register("a")
    endless.start()
    endless.log_stop(0)
    endless.sync("a")
    before = endless.ram(0).copy()
    until(lambda: bool(changed_pages(before, endless.ram(0))), "the guest gets on")
    gap = endless.sync("a")
    assert (gap.pages, gap.unlogged) == (0, {0})
    endless.log_start(0)
    whole = endless.ram(0).size // 4096
    assert endless.sync("a").slots[0] == [(0, whole)]       # what was written in between nobody knows
    until(lambda: 0 < endless.sync("a").pages < whole, "the guest is logged again")
    assert endless.status()["slots"][0]["logged"] is True


def test_hotplug_keeps_what_was_dirty_in_the_slot_that_goes(accel: str) -> None:
    """Invariant 6: between the last sync and the removal nothing is lost."""
    slots = [RamSlot(0, 0, 4 << 20), RamSlot(1, 0x1000_0000, (4 << 20) + 4096)]
    machine_spec = spec("sequential", accel=accel, slots=slots, passes=0, timeout=None, pages=200, vcpus=2)
    with Machine.launch(machine_spec, start=False) as machine:
        machine.register("a")
        machine.memory_add(2, 0x2000_0000, 1 << 20)
        machine.write(0x2000_0000, b"x" * 5000)
        assert machine.sync("a").slots[2] == [(0, 2)]
        machine.write(0x2000_3000, b"y")
        machine.memory_remove(2)
        assert machine.sync("a").slots[2] == [(3, 1)]
        assert 2 not in machine.sync("a").slots
        machine.start()
        with pytest.raises(VmmError, match="overlaps slot 1"):
            machine.memory_add(2, 0x1000_0000, 4096)
        machine.memory_add(2, 0x2000_0000, 8192)
        assert machine.sync("a").slots[2] == [(0, 2)]       # what "a" knows of slot 2 is of the other one
        assert machine.sync("a").slots[2] == []
        # vCPU 1 works in slot 1 now: taking it away ends that vCPU, and its last pages are known.
        before = machine.ram(1).copy()
        dirty = pages_of(machine.sync("a").slots[1])
        view = machine.ram(1)
        machine.pause()
        machine.memory_remove(1)
        dirty |= pages_of(machine.sync("a").slots[1])
        assert changed_pages(before, view) <= dirty
        machine.resume()
        del view
        machine.stop()
        report = machine.wait(TIMEOUT)
        assert report["vcpus"][0]["exit_reason"] == "stopped"
        assert report["vcpus"][1]["exit_reason"] in ("bad-address", "stopped")


# --- life ------------------------------------------------------------------------------------------------


def test_pause_really_stops_the_guest(endless: Machine) -> None:
    endless.start()
    for _ in range(20):
        endless.pause()
        first = endless.ram(0).copy()
        entries = [v["guest_entries"] for v in endless.status()["vcpus"]]
        assert (first == endless.ram(0)).all()
        assert entries == [v["guest_entries"] for v in endless.status()["vcpus"]]
        assert endless.status()["state"] == "paused"
        endless.resume()


def test_a_wait_that_takes_too_long_is_an_error_for_people_too(endless: Machine) -> None:
    with pytest.raises(TimeoutError) as caught:
        endless.wait(0.1)
    assert isinstance(caught.value, VmmError)
    assert (str(caught.value), caught.value.exit_code) == (
        f"machine '{endless.name}' is still running after 0.1 s", ExitCode.TIMEOUT)


def test_stop_ends_in_order(endless: Machine) -> None:
    endless.start()
    endless.stop()
    report = endless.wait(TIMEOUT)
    assert report["exit_code"] == ExitCode.STOPPED
    assert {v["exit_reason"] for v in report["vcpus"]} == {"stopped"}


def test_timeout_reports_registers(accel: str) -> None:
    report = run(spec("random", accel=accel, writes=0, timeout=0.3))
    assert report["exit_code"] == ExitCode.TIMEOUT
    for vcpu in report["vcpus"]:
        assert vcpu["exit_reason"] == "timeout"
        assert 0x10_0000 <= vcpu["registers"]["rip"] < 0x20_0000


def test_console_lines_of_every_vcpu_arrive(accel: str) -> None:
    with Machine.launch(spec("hello", accel=accel, vcpus=3, lines=5)) as machine:
        lines = [e for e in machine.events(TIMEOUT) if e["event"] == "console"]
        assert machine.wait(TIMEOUT)["exit_code"] == 0
    for vcpu in range(3):
        text = "".join(e["data"] for e in lines if e["vcpu"] == vcpu)
        assert text == f"hello from vCPU {vcpu} of 3\n" * 5


def test_machines_side_by_side(accel: str) -> None:
    with Machine.launch(spec("idle", accel=accel, milliseconds=0, timeout=None), name="left") as left, \
         Machine.launch(spec("idle", accel=accel, milliseconds=0, timeout=None), name="right") as right:
        assert [m["name"] for m in list_machines()] == ["left", "right"]
        with pytest.raises(VmmError, match="'left' is already running"):
            Machine.launch(spec("idle", accel=accel), name="left")
        left.stop()
        left.wait(TIMEOUT)
        assert right.status()["state"] == "running"
        with Machine.attach("right") as second:
            second.pause()
            assert right.status()["state"] == "paused"


def test_attach_to_nothing_is_one_line() -> None:
    with pytest.raises(VmmError, match="no machine named 'nothing'") as caught:
        Machine.attach("nothing")
    assert caught.value.exit_code == ExitCode.NO_MACHINE
