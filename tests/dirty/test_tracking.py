"""Modes of dirty tracking, and switching between them: nothing may be lost, whoever dies when."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import ACCELS, changed_pages, exact, replace, spec, until
from needs import missing

from ipc.bitmap import word_count
from ipc.layout import Tracking, vcpu_control
from ipc.shm import Segment
from ipc.sockets import FdListener
from ipc.writelog import WriteLog
from vmm.client.config import ConfigError, load_config
from vmm.client.machine import Machine
from vmm.client.plan import plan
from vmm.dirty.tracking.auto import Demand
from vmm.errors import VmmError
from vmm.machine import verbs as control
from vmm.machine.names import segment_name
from vmm.machine.spec import RamSlot

TIMEOUT = 60.0
MODES = ["ring", "bitmap", "none"] + ([] if missing("uffd") else ["uffd"])


@pytest.fixture(params=ACCELS)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- the log of a process's writes ----------------------------------------------------------------------


class Mapped:
    """Shared memory mapped twice, the first mapping watched."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.segment = Segment.create(f"/shardvmm-test-{os.getpid()}", pages * 4096)
        self.other = Segment.open(self.segment.name)
        self.log = WriteLog()
        self.words = np.zeros(word_count(pages), np.uint64)

    def collect(self) -> set[int]:
        self.words[:] = 0
        self.log.collect(self.segment.address, self.pages, self.words)
        bits = np.unpackbits(self.words.view(np.uint8), bitorder="little")
        return set(np.flatnonzero(bits).tolist())

    def close(self) -> None:
        self.log.close()
        self.other.close()
        self.segment.close()


@pytest.fixture
def mapped() -> Iterator[Mapped]:
    made = Mapped(3 * 4096 + 3)
    yield made
    made.close()


@pytest.mark.uffd
@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(["write", "read", "other"]), st.integers(0, 3 * 4096 + 2),
                          st.integers(1, 300)), max_size=30))
def test_a_write_log_has_exactly_the_pages_written_through_its_mapping(steps: list[tuple[str, int, int]]) -> None:
    made = Mapped(3 * 4096 + 3)
    try:
        made.log.watch(made.segment.address, made.segment.size)
        assert made.collect() == set()
        for half in (steps[::2], steps[1::2], []):
            wanted = set()
            for what, first, count in half:
                for page in range(first, min(first + count, made.pages)):
                    at = page * 4096 + first % 4096
                    if what == "write":
                        made.segment.buf[at] = 7
                        wanted.add(page)
                    elif what == "read":
                        assert made.segment.buf[at] in (0, 7, 9)
                    else:
                        made.other.buf[at] = 9
            assert made.collect() == wanted
    finally:
        made.close()


@pytest.mark.uffd
def test_a_write_log_takes_more_regions_than_one_call_reports() -> None:
    made = Mapped(70_001)
    try:
        made.log.watch(made.segment.address, made.segment.size)
        for page in range(0, made.pages, 2):
            made.segment.buf[page * 4096] = 1
        assert made.collect() == set(range(0, made.pages, 2))
        assert made.collect() == set()
    finally:
        made.close()


@pytest.mark.uffd
def test_a_page_whose_table_entry_was_dropped_is_not_lost(mapped: Mapped) -> None:
    """The kernel may throw shared pages out of a page table at any time."""
    mapped.log.watch(mapped.segment.address, mapped.segment.size)
    mapped.segment.buf[5 * 4096] = 1
    mapped.segment.buf.madvise(mmap.MADV_DONTNEED)
    assert mapped.collect() == {5}
    mapped.segment.buf.madvise(mmap.MADV_DONTNEED)
    mapped.segment.buf[6 * 4096] = 1
    assert mapped.collect() == {6}


@pytest.mark.uffd
def test_nothing_is_lost_while_another_thread_writes(mapped: Mapped) -> None:
    mapped.log.watch(mapped.segment.address, mapped.segment.size)
    done = threading.Event()

    def write() -> None:
        memory = np.frombuffer(mapped.segment.buf, np.uint64).reshape(-1, 512)
        generator = np.random.default_rng(1)
        for turn in range(1, 400):
            memory[generator.integers(0, mapped.pages, 200), 0] = turn
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    dirty: set[int] = set()
    while not done.is_set():
        dirty |= mapped.collect()
    thread.join()
    dirty |= mapped.collect()
    written = np.frombuffer(mapped.segment.buf, np.uint64).reshape(-1, 512)[:, 0] != 0
    assert set(np.flatnonzero(written).tolist()) == dirty


# --- machines ----------------------------------------------------------------------------------------------


def verified(report: dict[str, Any]) -> None:
    result = report["verification"]
    assert result["lost_pages"] == 0, result
    assert result["surplus_pages"] == 0, result
    assert result["rounds"] >= 2
    assert result["dirty_pages"] > 0


@pytest.mark.uffd
@pytest.mark.parametrize("workload", ["stamp", "sequential"])
def test_uffd_loses_nothing(accel: str, workload: str) -> None:
    amount = {"writes": 30_000} if workload == "stamp" else {"passes": 10}
    slots = [RamSlot(0, 0, 8 << 20), RamSlot(7, 0x4000_0000, (4 << 20) + 4096),
             RamSlot(3, 0x1_0000_0000, (2 << 20) + 3 * 4096, log=False)]
    machine_spec = replace(spec(workload, accel=accel, slots=slots, verify=exact(0.02), spin=100, **amount),
                           tracking="uffd")
    with Machine.launch(machine_spec) as machine:
        report = machine.wait(TIMEOUT)
    verified(report)
    assert report["tracking"] == "uffd"
    assert report["exit_code"] == 0


@pytest.mark.uffd
def test_uffd_follows_slots_and_their_logging(accel: str) -> None:
    machine_spec = replace(spec("sequential", accel=accel, mib=4, passes=0, pages=300, timeout=None),
                           tracking="uffd")
    with Machine.launch(machine_spec, start=False) as machine:
        machine.memory_add(2, 0x2000_0000, 1 << 20)
        machine.register("a")
        machine.write(0x2000_0000, b"x" * 5000)
        assert machine.sync("a").slots[2] == [(0, 2)]
        machine.start()
        until(lambda: machine.sync("a").pages > 0, "pages dirtied")
        machine.memory_remove(2)
        machine.log_stop(0)
        machine.sync("a")
        assert machine.sync("a").pages == 0
        machine.log_start(0)
        until(lambda: machine.sync("a").pages > 0, "pages dirtied again")
        machine.log_stop(0)
        machine.set_tracking("bitmap")
        machine.sync("a")
        assert machine.sync("a").pages == 0     # the switch has kept that, too
        machine.log_start(0)
        until(lambda: machine.sync("a").pages > 0, "pages dirtied once more")


def pages(ranges: list[tuple[int, int]]) -> set[int]:
    return {p for first, count in ranges for p in range(first, first + count)}


def test_nothing_is_lost_across_every_switch(accel: str) -> None:
    """The verifier inside, a client outside, and each way after each other."""
    walk = [mode for pair in itertools.permutations(MODES, 2) for mode in pair]
    busy = spec("stamp", accel=accel, writes=0, spin=100, timeout=None, mib=8, verify=exact(0.02))
    with Machine.launch(busy) as machine:
        machine.register("a")
        before = machine.ram(0).copy()
        dirty: set[int] = set()
        switches = 0
        for mode in walk:
            answer = machine.set_tracking(mode)
            assert answer["tracking"] == mode == machine.status()["tracking"]
            switches += answer["before"] != mode
            if mode != "none":
                dirty |= pages(machine.sync("a").slots[0])
                rounds = machine.status()["verification"]["rounds"]
                until(lambda n=rounds: machine.status()["verification"]["rounds"] > n, "a round")
        machine.pause()
        if machine.status()["tracking"] == "none":
            machine.set_tracking("bitmap")
        dirty |= pages(machine.sync("a").slots[0])
        assert changed_pages(before, machine.ram(0)) <= dirty
        assert machine.status()["tracking_switches"] >= switches
        machine.resume()
        machine.stop()
        verified(machine.wait(TIMEOUT))


def test_the_guest_is_not_disturbed_by_switches(accel: str) -> None:
    """Each page is counted up once a pass, and the guest ends with the code that it means to."""
    passes = 400 if accel == "kvm" else 40
    with Machine.launch(spec("sequential", accel=accel, mib=8, passes=passes, spin=20)) as machine:
        ways = itertools.cycle(random.Random(3).sample(MODES, len(MODES)))
        while machine.status()["state"] != "ended":
            with contextlib.suppress(VmmError):     # "has ended", between two of them
                machine.set_tracking(next(ways))
        assert machine.wait(TIMEOUT)["exit_code"] == 0
        words = machine.ram(0).view(np.uint64).reshape(-1, 512)[:, 0]
        assert set(words[512:-16].tolist()) == {passes}


@pytest.mark.parametrize(("accel", "old", "new"), [
    *(pytest.param("kvm", *pair, marks=pytest.mark.kvm) for pair in (
        ("ring", "bitmap"), ("bitmap", "ring"), ("none", "ring"))),
    *(pytest.param("kvm", *pair, marks=[pytest.mark.kvm, pytest.mark.uffd]) for pair in (
        ("ring", "uffd"), ("uffd", "bitmap"))),
    ("unicorn", "bitmap", "ring"), pytest.param("unicorn", "ring", "uffd", marks=pytest.mark.uffd)])
def test_a_coordinator_killed_in_the_middle_of_a_switch_is_replaced(accel: str, old: str, new: str) -> None:
    """One worker has switched (or, where the old log is asked for first, none has), the other is held up: then the
    coordinator is killed. Its successor carries on, and nothing is lost."""
    busy = replace(spec("stamp", accel=accel, writes=0, spin=100, timeout=None, mib=8, verify=exact(0.02)),
                   tracking="" if old == "none" else old)
    with Machine.launch(busy, name="switch") as machine:
        if old == "none":
            machine.set_tracking("none")
        else:
            until(lambda: machine.status()["verification"]["rounds"] > 1, "rounds")
        machine.pause()
        before = machine.status()
        control = Segment.open(segment_name("switch", "control"))
        try:
            blocks = [vcpu_control(control.address, i) for i in range(2)]   # views of the segment
            if old == "ring":
                machine.register("drain")   # flushes: the rings are empty, nothing is asked before the switch
                machine.sync("drain")
            os.kill(blocks[1].pid, signal.SIGSTOP)
            outcome: list[Any] = []

            def ask() -> None:
                with Machine.attach("switch") as other:
                    outcome.append(other.set_tracking(new))

            asking = threading.Thread(target=ask)
            asking.start()
            wanted = Tracking[new.upper()]
            if old in ("ring", "none"):
                until(lambda b=blocks[0], w=wanted: b.tracking == w, "the first worker has switched")
            else:
                until(lambda: not answers(machine), "the coordinator waits for the worker that is held up")
            assert blocks[1].tracking == Tracking[old.upper()]
            os.kill(before["coordinator"]["pid"], signal.SIGKILL)
            os.kill(blocks[1].pid, signal.SIGCONT)
            asking.join(TIMEOUT)
            assert outcome[0]["tracking"] == new
            status = machine.status()
            assert status["coordinator"]["restarts"] == 1
            assert status["tracking"] == new
            assert [b.tracking for b in blocks] == [wanted] * 2
        finally:
            control.close()
        machine.resume()
        if new != "none":
            rounds = machine.status()["verification"]["rounds"]
            until(lambda: machine.status()["verification"]["rounds"] > rounds + 2, "rounds after it")
        machine.stop()
        report = machine.wait(TIMEOUT)
        assert report["verification"]["lost_pages"] == 0, report["verification"]
        assert report["verification"]["surplus_pages"] == 0, report["verification"]
        assert [v["exit_reason"] for v in report["vcpus"]] == ["stopped"] * 2


def answers(machine: Machine) -> bool:
    try:
        machine._client.ask(control.Status, timeout=0.3)
    except VmmError:
        return False
    return True


def test_coordinators_killed_at_any_moment_of_many_switches_lose_nothing(accel: str) -> None:
    busy = spec("stamp", accel=accel, writes=0, spin=100, timeout=None, mib=8, verify=exact(0.02))
    chance = random.Random(5)
    with Machine.launch(busy, name="switch") as machine:
        for kill in range(2):
            delay = chance.uniform(0.0, 0.03)
            coordinator = machine.status()["coordinator"]["pid"]

            def strike(pid: int = coordinator, after: float = delay) -> None:
                time.sleep(after)       # not to synchronise: the moment is to be any
                os.kill(pid, signal.SIGKILL)

            killer = threading.Thread(target=strike)
            killer.start()
            for mode in chance.sample([m for m in MODES if m != "none"], len(MODES) - 1):
                machine.set_tracking(mode)
            killer.join()
            until(lambda n=kill: restarts(machine) > n, "another coordinator")
        rounds = machine.status()["verification"]["rounds"]
        until(lambda: machine.status()["verification"]["rounds"] > rounds + 2, "rounds after it")
        machine.stop()
        verified(machine.wait(TIMEOUT))


def restarts(machine: Machine) -> int:
    try:
        return int(machine.status()["coordinator"]["restarts"])
    except VmmError:
        return -1


@pytest.mark.uffd
@pytest.mark.postcopy
def test_uffd_makes_room_for_post_copy(accel: str, tmp_path: Path) -> None:
    """A mapping has one userfaultfd: until every page is there the machine has plain bitmaps."""
    machine_spec = replace(spec("stamp", accel=accel, writes=0, timeout=None, mib=4), tracking="uffd")
    listener = FdListener(tmp_path / "userfault")
    try:
        with Machine.launch(machine_spec, start=False) as machine:
            machine.incoming(str(listener.path))
            assert machine.status()["tracking"] == "bitmap"
            with pytest.raises(VmmError, match="still arriving"):
                machine.set_tracking("ring")
            machine.arrived()
            assert machine.status()["tracking"] == "uffd"
            machine.register("a")
            machine.start()
            until(lambda: machine.sync("a").pages > 0, "pages dirtied")
    finally:
        listener.close()


@pytest.mark.postcopy
def test_a_sync_that_cannot_reach_a_vcpu_is_refused(accel: str, tmp_path: Path) -> None:
    """In post-copy a software CPU that waits for a page cannot be stopped: its last pages would be missing."""
    machine_spec = spec("stamp", accel=accel, writes=0, timeout=None, mib=4)
    listener = FdListener(tmp_path / "userfault")
    try:
        with Machine.launch(machine_spec, start=False) as machine:
            machine.register("a")
            machine.incoming(str(listener.path))
            machine.start()
            if accel == "unicorn":
                with pytest.raises(VmmError, match="cannot be flushed: pages are still arriving"):
                    machine.sync("a")
                with pytest.raises(VmmError, match="cannot be flushed"):
                    machine.register("b")
            machine.arrived()
            until(lambda: machine.sync("a").pages > 0, "pages dirtied")
    finally:
        listener.close()


# --- auto -------------------------------------------------------------------------------------------------


def test_auto_is_what_the_machine_is_used_for(accel: str) -> None:
    busy = replace(spec("stamp", accel=accel, writes=0, spin=100, pages=100, timeout=None), tracking="auto")
    with Machine.launch(busy) as m:
        assert (m.status()["tracking"], m.status()["logging"]) == ("ring", False)      # nobody wants to know
        m.register("a")
        before = m.ram(0).copy()
        assert (m.status()["tracking"], m.status()["logging"]) == ("ring", True)
        dirty = pages(m.sync("a").slots[0])
        assert len(dirty) <= 2 * 100 + 20       # not all of them were marked: it counts from register
        m.dirty_limit(2000)
        assert m.status()["tracking"] == "ring"     # which a limit needs
        dirty |= pages(m.sync("a").slots[0])
        m.dirty_limit(0)
        m.pause()
        assert dirty
        assert changed_pages(before, m.ram(0)) <= dirty | pages(m.sync("a").slots[0])
        m.set_tracking("uffd" if "uffd" in MODES else "ring")
        assert m.status()["tracking_asked"] != "auto"
        m.set_tracking("auto")
        assert m.status()["tracking"] == "ring"


def test_auto_loses_nothing(accel: str) -> None:
    """Switched by what clients and limits ask for, under the verifier."""
    busy = replace(spec("stamp", accel=accel, writes=0, spin=100, timeout=None, mib=8, verify=exact(0.02)),
                   tracking="auto")
    with Machine.launch(busy) as machine:
        for _ in range(4):
            machine.dirty_limit(3000)
            assert machine.status()["tracking"] == "ring"
            rounds = machine.status()["verification"]["rounds"]
            machine.dirty_limit(0)
            machine.set_tracking("bitmap")
            machine.set_tracking("auto")
            until(lambda n=rounds: machine.status()["verification"]["rounds"] > n + 1, "rounds")
        machine.stop()
        report = machine.wait(TIMEOUT)
    verified(report)
    assert report["tracking_switches"] >= 8


def test_a_log_stays_for_a_moment_after_the_last_who_needed_it() -> None:
    demand = Demand()
    assert not demand.lasts(0.0, needed=False, logging=False)
    assert demand.left(0.0) is None
    assert demand.lasts(0.0, needed=True, logging=False)
    assert demand.left(0.0) is None
    assert demand.lasts(1.0, needed=False, logging=True)
    assert demand.lasts(4.0, needed=False, logging=True)
    assert demand.left(4.0) == pytest.approx(2.0)
    assert demand.lasts(5.0, needed=True, logging=True)     # somebody came again
    assert demand.left(5.0) is None
    assert demand.lasts(9.0, needed=False, logging=True)
    assert not demand.lasts(14.0, needed=False, logging=True)
    assert not demand.lasts(14.1, needed=False, logging=False)      # which it is, and that is that
    assert demand.left(14.1) is None
    assert demand.lasts(15.0, needed=True, logging=True)
    demand.forget()
    assert demand.left(15.0) == 0.0
    assert not demand.lasts(15.0, needed=False, logging=True)
    demand.forget()
    assert demand.lasts(16.0, needed=True, logging=True)


# --- what is refused ----------------------------------------------------------------------------------------


def test_without_a_log_there_is_nothing_to_sync(accel: str) -> None:
    with Machine.launch(replace(spec("random", accel=accel, writes=0, timeout=None), tracking="none")) as machine:
        with pytest.raises(VmmError, match=r"has no dirty log \(tracking none\): start one with vmm tracking t auto"):
            machine.register("a")
        machine.set_tracking("bitmap")
        machine.register("a")
        machine.set_tracking("none")
        with pytest.raises(VmmError, match="has no dirty log"):
            machine.sync("a")
        machine.set_tracking("bitmap")
        assert machine.sync("a").pages == machine.status()["slots"][0]["pages"]    # any of them may be dirty


def test_a_dirty_limit_holds_the_ring(accel: str) -> None:
    with Machine.launch(spec("random", accel=accel, writes=0, timeout=None)) as machine:
        machine.dirty_limit(1000)
        with pytest.raises(VmmError, match="has a dirty limit, which needs dirty rings: cancel it first"):
            machine.set_tracking("bitmap")
        machine.dirty_limit(0)
        machine.set_tracking("bitmap")
        with pytest.raises(VmmError, match="but the tracking mode is bitmap"):
            machine.dirty_limit(1000)
        for wrong in ("rings", "unknown", "unset"):
            with pytest.raises(VmmError, match=f"unknown tracking mode '{wrong}'"):
                machine.set_tracking(wrong)


def test_a_machine_without_a_ring_size_has_no_ring(accel: str) -> None:
    with Machine.launch(spec("random", accel=accel, ring=0, writes=0, timeout=None)) as machine:
        assert machine.status()["tracking"] == "bitmap"
        with pytest.raises(VmmError, match="dirty_ring_size is 0"):
            machine.set_tracking("ring")
        assert machine.status()["tracking"] == "bitmap"


@pytest.mark.parametrize(("lines", "error"), [
    ("tracking: ring\ndirty_ring_size: 0", "tracking: ring needs a dirty_ring_size above 0"),
    ("tracking: none\nverify: true", "tracking: none leaves nothing to verify"),
    ("tracking: bitmap\ndirty_limit: 1MB/s", "dirty_limit: needs a dirty ring, but tracking is bitmap"),
    ("tracking: none\nlog: always", "tracking: none leaves nothing to log, but log is always"),
    ("log: never", "log: input should be 'auto' or 'always'"),
    ("tracking: rings", "tracking: input should be 'ring', 'bitmap', 'uffd', 'none' or 'auto'"),
])
def test_configurations_that_cannot_be(tmp_path: Path, lines: str, error: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(f"{lines}\nmemory: [{{size: 4MiB}}]\nguest: {{workload: idle}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert error in str(caught.value)


@pytest.mark.parametrize(("lines", "asked"), [
    ("guest: {workload: idle}", "auto"),
    ("guest: {workload: idle}\ndirty_ring_size: auto", "auto"),
    ("guest: {workload: idle}\ndirty_limit: 1MB/s", "auto"),
    ("guest: {workload: idle}\ndirty_ring_size: 2048", "ring"),
    ("guest: {workload: idle}\ndirty_ring_size: 0", "bitmap"),
    ("guest: {workload: idle}\ntracking: ring", "ring"),
    ("replay: {pattern: random, writes: 10}\naccel: replay", "ring"),
])
def test_who_says_nothing_of_rings_has_what_is_measured_to_be_best(tmp_path: Path, lines: str, asked: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(f"{lines}\nmemory: [{{size: 4MiB}}]\n" + ("" if "accel" in lines else "accel: unicorn\n"))
    assert plan(load_config(path)).asked_tracking == asked


def test_a_host_without_uffd_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("tracking: uffd\nmemory: [{size: 4MiB}]\nguest: {workload: idle}\n")
    monkeypatch.setattr("ipc.writelog.write_log_missing", lambda: "userfaultfd: this kernel lacks it")
    with pytest.raises(ConfigError, match=r"m\.yaml:1:\d+: tracking: tracking uffd: userfaultfd: this kernel lacks it"):
        plan(load_config(path))


@pytest.mark.parametrize(("lines", "mode"), [("", "auto"), ("dirty_ring_size: 0", "bitmap"),
                                             ("tracking: bitmap", "bitmap"), ("tracking: none", "none")])
def test_what_a_file_means(tmp_path: Path, lines: str, mode: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(f"{lines}\naccel: unicorn\nmemory: [{{size: 4MiB}}]\nguest: {{workload: idle}}\n")
    assert plan(load_config(path)).asked_tracking == mode
