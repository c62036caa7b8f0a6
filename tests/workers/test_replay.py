"""The replay accelerator. What it must have dirtied is computed here with numpy, from the documented pattern."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import exact, machine_processes, replace, until
from numpy.typing import NDArray

from ipc.bitmap import bitmap_bytes
from ipc.layout import RING_RESERVE, DirtyGfn, VcpuControl, control_size, vcpu_control
from ipc.messages import ReplayPhase, ReplaySpec, SlotSpec, WorkerSpec
from ipc.shm import Segment, list_segments
from vmm.cli.commands import cli
from vmm.client.config import ConfigError, load_config
from vmm.client.machine import Machine
from vmm.client.plan import plan
from vmm.errors import ExitCode, VmmError
from vmm.machine.names import machine_prefix, segment_name
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec
from workers.accel.base import Accelerator, ExitKind
from workers.accel.registry import load
from workers.accel.replay.producer import zipf_quantiles
from workers.memory import GuestMemory
from workers.ports import PortBus

TIMEOUT = 60.0
PAGE = 4096
SLOTS = [RamSlot(0, 0, 5003 * PAGE), RamSlot(7, 1 << 32, 9001 * PAGE)]      # no multiples of 64 pages
PAGES = 5003 + 9001
U64 = NDArray[np.uint64]


def spec(*phases: ReplayPhase, vcpus: int = 2, ring: int = 4096, slots: list[RamSlot] | None = None,
         **changes: Any) -> MachineSpec:
    """A machine that replays these phases. ReplaySpec's other fields, and MachineSpec's, by name."""
    fields = {k: changes.pop(k) for k in list(changes) if k in ReplaySpec.__struct_fields__}
    base = MachineSpec(
        name="t", accel="replay", vcpus=vcpus, privilege="user", ring_entries=ring, slots=slots or SLOTS, image="",
        load_address=None, params=[], cmdline="", stack_size=16384, reaper=ReaperSpec(), verify=None, timeout=60.0,
        trace=[], trace_file="", linger=True, replay=ReplaySpec(list(phases), **fields))
    return replace(base, **changes)


# --- the oracle -------------------------------------------------------------------------------------------


def mix(z: U64) -> U64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def pages_written(machine: MachineSpec, vcpu: int) -> NDArray[np.int64]:
    """Pages that a vCPU writes, in their order, numbered through all slots. Every phase has an end."""
    replay, total = machine.replay, sum(s.pages for s in machine.slots)
    assert replay is not None
    first, end = (0, total) if replay.shared else (vcpu * total // machine.vcpus,
                                                   (vcpu + 1) * total // machine.vcpus)
    n = end - first
    golden = np.uint64(0x9E3779B97F4A7C15)
    found, made = [], 0
    with np.errstate(over="ignore"):
        seed = mix(np.array([replay.seed], np.uint64) + golden * np.uint64(vcpu + 1))[0]
        for phase in replay.phases:
            k = np.arange(phase.writes, dtype=np.uint64)
            numbers = mix(seed + (k + np.uint64(made + 1)) * golden)
            if phase.pattern == "sequential":
                pages = k.astype(np.int64) % n
            elif phase.pattern == "strided":
                pages = k.astype(np.int64) * phase.stride % n
            elif phase.pattern == "random":
                pages = ((numbers >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)
            else:
                sums = np.concatenate([[0.0], np.cumsum(np.arange(1, n + 1, dtype=float) ** -phase.exponent)])
                quantiles = np.interp(np.linspace(0, 1, (1 << 14) + 1) * sums[-1], sums, np.arange(n + 1.0))
                step = (numbers >> np.uint64(50)).astype(np.int64)
                part = (numbers >> np.uint64(16) & np.uint64(0xFFFFFFFF)).astype(float) / 2**32
                pages = (quantiles[step] + part * (quantiles[step + 1] - quantiles[step])).astype(np.int64)
                pages = np.minimum(pages, n - 1)
            found.append(first + pages)
            made += phase.writes
    return np.concatenate(found)


def by_slot(machine: MachineSpec, pages: NDArray[np.int64]) -> dict[int, set[int]]:
    found, first = {}, 0
    for slot in machine.slots:
        found[slot.id] = set((pages[(pages >= first) & (pages < first + slot.pages)] - first).tolist())
        first += slot.pages
    return found


def expected(machine: MachineSpec) -> dict[int, set[int]]:
    return by_slot(machine, np.concatenate([pages_written(machine, i) for i in range(machine.vcpus)]))


def synced(machine: Machine, client: str = "c") -> dict[int, set[int]]:
    return {i: {p for first, n in ranges for p in range(first, first + n)}
            for i, ranges in machine.sync(client).slots.items()}


def run(machine_spec: MachineSpec) -> tuple[dict[str, Any], dict[int, set[int]]]:
    """The report, and what a client got that was there from the start."""
    with Machine.launch(machine_spec, start=False) as machine:
        machine.register("c")
        machine.start()
        report = machine.wait(TIMEOUT)
        return report, synced(machine)


# --- what is dirtied ---------------------------------------------------------------------------------------


EACH = [ReplayPhase("sequential", 20_000), ReplayPhase("strided", 3000, stride=61),
        ReplayPhase("random", 6000), ReplayPhase("zipf", 30_000, exponent=1.1)]


@pytest.mark.parametrize("phases", [[p] for p in EACH] + [EACH], ids=lambda p: "+".join(x.pattern for x in p))
def test_exactly_the_pages_of_the_pattern_are_dirtied(phases: list[ReplayPhase]) -> None:
    machine_spec = spec(*phases, seed=11, ring=1024)
    report, dirty = run(machine_spec)
    assert report["exit_code"] == 0
    assert dirty == expected(machine_spec)
    for vcpu in report["vcpus"]:
        pages = pages_written(machine_spec, vcpu["index"])
        assert len(set(pages.tolist())) <= vcpu["dirty_pages"] <= len(pages)
        assert vcpu["exit_reason"] == "code"
        assert vcpu["bad_entries"] == vcpu["ring_rebuilds"] == 0


@pytest.mark.parametrize(("ring", "vcpus"), [(1024, 3), (65536, 1)])
def test_repeated_writes_make_an_entry_each(ring: int, vcpus: int) -> None:
    machine_spec = spec(ReplayPhase("zipf", 200_000, exponent=0.8), ring=ring, vcpus=vcpus, repeat=True,
                        shared=True)
    report, dirty = run(machine_spec)
    assert dirty == expected(machine_spec)
    assert [v["dirty_pages"] for v in report["vcpus"]] == [200_000] * vcpus


def test_a_vcpu_keeps_to_its_share_unless_they_are_shared() -> None:
    alone = spec(ReplayPhase("sequential", PAGES), vcpus=3)
    report, dirty = run(alone)
    assert {i: len(p) for i, p in dirty.items()} == {0: 5003, 7: 9001}
    shares = [len(set(pages_written(alone, i).tolist())) for i in range(3)]
    assert sum(shares) == PAGES     # and no page in two of them
    assert all(v["dirty_pages"] >= n for v, n in zip(report["vcpus"], shares, strict=True))


@given(st.integers(1, 3000), st.floats(0.2, 3.0))
@settings(max_examples=40)
def test_quantiles_are_those_of_the_zipf_distribution(pages: int, exponent: float) -> None:
    weights = np.arange(1, pages + 1, dtype=float) ** -exponent
    found = np.clip(zipf_quantiles(pages, exponent), 0, pages)
    below = np.interp(found, np.arange(pages + 1.0), np.concatenate([[0.0], np.cumsum(weights)]) / weights.sum())
    assert np.abs(below - np.linspace(0, 1, len(found))).max() < 1e-9


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.1, 2.0])
def test_quantiles_of_many_pages_are_integrals_behind_the_first(exponent: float) -> None:
    pages = 2_000_000
    sums = np.cumsum(np.arange(1, pages + 1, dtype=float) ** -exponent)
    found = zipf_quantiles(pages, exponent)
    want = np.interp(np.linspace(0, 1, len(found)) * sums[-1], sums, np.arange(1, pages + 1.0))
    assert np.all(np.diff(found) >= 0)
    assert found[-1] == pytest.approx(pages)
    assert np.abs(np.maximum(found, 1) - np.maximum(want, 1)).max() < 1e-4 * pages


# --- the ring protocol, without a machine around it ---------------------------------------------------------


class BareReplay:
    """One producer in this process."""

    def __init__(self, accel: Accelerator, control: VcpuControl, ring: Segment, entries: int) -> None:
        self.accel, self.control = accel, control
        self._ring, self._entries, self._at = ring, entries, 0

    def run(self) -> ExitKind:
        self.accel.clear_immediate_exit()
        return self.accel.run().kind

    def harvest(self, most: int = 1 << 20) -> list[int]:
        """Plain Python. Flags the entries as harvested; their pages."""
        found: list[int] = []
        entries = (DirtyGfn * self._entries).from_address(self._ring.address)
        while len(found) < min(most, self._entries):
            entry = entries[(self._at + len(found)) % self._entries]
            if entry.flags != 1:
                break
            entry.flags = 2
            found.append(int(entry.offset))
        self._at += len(found)
        return found


@contextmanager
def bare(*phases: ReplayPhase, ring: int = 1024, pages: int = 5000, **fields: Any) -> Iterator[BareReplay]:
    with ExitStack() as stack:
        def segment(what: str, size: int) -> Segment:
            return stack.enter_context(Segment.create(segment_name("bare", what), size, reserve=False))

        ram, control, rings = segment("ram", pages * PAGE), segment("control", control_size(1)), segment(
            "ring", ring * 16)
        record = segment("record", bitmap_bytes(pages))
        slot = SlotSpec(0, 0, pages * PAGE, ram.name, True, record.name)
        worker = WorkerSpec(machine="bare", belongings="bare", index=0, vcpu_count=1, accel="replay",
                            ring_entries=ring, ring_segment=rings.name, slots=[slot], system_slot=slot,
                            control_segment=control.name,
                            request_endpoint="", notify_endpoint="", fd_socket="", boot={},
                            replay=ReplaySpec(list(phases), **fields))
        memory = GuestMemory()
        stack.callback(memory.close)
        memory.add(slot)
        block = vcpu_control(control.address, 0)
        accel = load("replay")(worker, memory, block, PortBus(lambda data: None))
        stack.callback(accel.close)
        yield BareReplay(accel, block, rings, ring)


def test_soft_full_leaves_the_reserve_and_stays_until_a_reset() -> None:
    with bare(ReplayPhase("sequential", 0)) as vcpu:
        limit = 1024 - RING_RESERVE
        assert vcpu.run() is ExitKind.RING_FULL
        assert vcpu.run() is ExitKind.RING_FULL
        assert vcpu.accel.pushed() == vcpu.control.pushed_total == limit
        assert vcpu.harvest(100) == list(range(100))
        assert vcpu.run() is ExitKind.RING_FULL     # harvested is not reset
        assert vcpu.accel.reset_ring(100) == 100
        assert vcpu.run() is ExitKind.RING_FULL
        assert vcpu.accel.pushed() == limit + 100
        assert vcpu.harvest() == list(range(100, limit + 100))
        assert vcpu.accel.reset_ring(limit) == limit
        assert vcpu.accel.reset_ring(0) == 0


def test_pushes_can_be_limited_and_a_flag_set_before_the_entry_counts() -> None:
    with bare(ReplayPhase("sequential", 0)) as vcpu:
        vcpu.accel.limit_pushes(7)
        assert vcpu.run() is ExitKind.KICKED
        assert vcpu.accel.pushed() == 7
        vcpu.accel.limit_pushes(None)
        vcpu.accel.clear_immediate_exit()
        vcpu.accel.interrupt()
        assert vcpu.accel.run().kind is ExitKind.KICKED
        assert vcpu.accel.pushed() == 7


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_an_interrupt_ends_a_run_that_would_go_on_for_ever(rate: float) -> None:
    """Also one that waits until its rate lets it write again."""
    with bare(ReplayPhase("sequential", 0), pages=100, rate=rate) as vcpu:
        vcpu.accel.clear_immediate_exit()
        timer = threading.Timer(0.05, vcpu.accel.interrupt)
        timer.start()
        assert vcpu.accel.run().kind is ExitKind.KICKED
        timer.join()


def test_a_rebuilt_ring_begins_anew_and_every_page_is_protected() -> None:
    with bare(ReplayPhase("sequential", 0), pages=300) as vcpu:
        vcpu.accel.limit_pushes(200)
        assert vcpu.run() is ExitKind.KICKED
        vcpu.accel.rebuild_ring()
        vcpu.accel.limit_pushes(300)
        assert vcpu.run() is ExitKind.KICKED
        found = vcpu.harvest()
        assert len(found) == 300
        assert set(found) == set(range(300))
        assert vcpu.accel.reset_ring(300) == 300


@given(st.lists(st.tuples(st.integers(1, 600), st.integers(0, 600)), max_size=30), st.integers(0, 2**32))
@settings(max_examples=25)
def test_entries_are_those_of_pages_that_have_none(steps: list[tuple[int, int]], seed: int) -> None:
    """Against a model: a set of the pages that have an entry which was not reset."""
    pages = 900
    machine = spec(ReplayPhase("random", 40_000), vcpus=1, slots=[RamSlot(0, 0, pages * PAGE)], seed=seed)
    writes = iter(pages_written(machine, 0).tolist())
    with bare(ReplayPhase("random", 40_000), pages=pages, seed=seed) as vcpu:
        waiting: list[int] = []     # pushed, not reset
        queue: list[int] = []       # pushed, not harvested
        for push, take in steps:
            push = min(push, 1024 - RING_RESERVE - len(waiting), pages - len(waiting))
            if push:
                vcpu.accel.limit_pushes(push)
                vcpu.run()
                dirty = set(waiting)
                new: list[int] = []
                while len(new) < push:
                    page = next(writes)
                    if page not in dirty:
                        dirty.add(page)
                        new.append(page)
                waiting += new
                queue += new
            got = vcpu.harvest(take)
            assert got == queue[:take]
            queue = queue[len(got):]
            assert vcpu.accel.reset_ring(len(got)) == len(got)
            waiting = waiting[len(got):]


# --- the machine around it -----------------------------------------------------------------------------------


def test_pause_resume_stop_and_the_dirty_limit() -> None:
    with Machine.launch(spec(ReplayPhase("random", 0), dirty_quota=20_000, timeout=None)) as machine:
        until(lambda: machine.status()["vcpus"][1]["throttled_s"] > 0, "held back")
        machine.pause()
        before = [v["dirty_pages"] for v in machine.status()["vcpus"]]
        machine.register("c")
        assert machine.sync("c").pages == 0
        assert [v["state"] for v in machine.status()["vcpus"]] == ["paused", "paused"]
        machine.resume()
        machine.dirty_limit(0)
        until(lambda: all(v["dirty_pages"] > b + 20_000
                          for v, b in zip(machine.status()["vcpus"], before, strict=True)), "running on")
        machine.stop()
        report = machine.wait(TIMEOUT)
        assert report["exit_code"] == ExitCode.STOPPED
        assert all(v["registers"]["writes"] > 20_000 for v in report["vcpus"])


def test_a_rate_is_kept() -> None:
    """10,000 writes at 50,000 a second cannot take less than 0.2 s, less the burst that it may begin with."""
    report, dirty = run(spec(ReplayPhase("sequential", 10_000), vcpus=1, rate=50_000.0))
    assert report["elapsed_s"] > 0.15
    assert sum(len(p) for p in dirty.values()) == 10_000


@pytest.mark.parametrize("ring", [1024, 65536])
def test_it_verifies(ring: int) -> None:
    report, dirty = run(spec(ReplayPhase("zipf", 300_000, exponent=0.7), ring=ring, verify=exact(0.03), rate=1e6))
    result = report["verification"]
    assert (result["lost_pages"], result["surplus_pages"]) == (0, 0), result
    assert result["rounds"] >= 3
    assert result["dirty_pages"] >= sum(len(p) for p in dirty.values())
    assert report["exit_code"] == 0


@pytest.mark.parametrize(("inject", "found"), [("lost", "lost_pages"), ("extra", "surplus_pages")])
def test_the_verifier_finds_what_is_injected(inject: str, found: str) -> None:
    report, _ = run(spec(ReplayPhase("sequential", 2000), vcpus=1, verify=exact(0.03, inject)))
    assert report["verification"][found] == 1
    assert report["exit_code"] == ExitCode.VERIFY_FAILED


@pytest.mark.parametrize("reapers", [2, 5])
def test_several_reapers_find_the_same(reapers: int) -> None:
    machine_spec = spec(ReplayPhase("random", 100_000), vcpus=3, ring=1024, reaper=ReaperSpec(reapers=reapers),
                        verify=exact(0.05))
    report, dirty = run(machine_spec)
    assert dirty == expected(machine_spec)
    assert (report["exit_code"], report["verification"]["ok"]) == (0, True), report
    assert not any(v["ring_rebuilds"] for v in report["vcpus"])


@pytest.mark.parametrize("reapers", [1, 3])
def test_a_killed_coordinator_loses_nothing(reapers: int) -> None:
    machine_spec = spec(ReplayPhase("random", 400_000), verify=exact(0.03), rate=500_000.0, seed=3,
                        reaper=ReaperSpec(reapers=reapers))
    with Machine.launch(machine_spec, name="replaykill", start=False) as machine:
        machine.register("c")
        machine.start()
        for restart in range(2):
            os.kill(machine.status()["coordinator"]["pid"], signal.SIGKILL)
            until(lambda n=restart: machine.status()["coordinator"]["restarts"] > n, "another coordinator")
        report = machine.wait(TIMEOUT)
        result = report["verification"]
        assert (result["lost_pages"], result["surplus_pages"]) == (0, 0), result
        assert report["exit_code"] == 0
        assert synced(machine) == expected(machine_spec)
    assert not machine_processes("replaykill")


def test_a_killed_worker_is_reported_and_its_pages_are_kept() -> None:
    with Machine.launch(spec(ReplayPhase("random", 0), verify=exact(0.05), timeout=None)) as machine:
        until(lambda: machine.status()["verification"]["rounds"] > 1, "a round")
        os.kill(machine.status()["vcpus"][0]["pid"], signal.SIGKILL)
        until(lambda: machine.status()["vcpus"][0]["state"] == "dead", "death seen")
        rounds = machine.status()["verification"]["rounds"]
        until(lambda: machine.status()["verification"]["rounds"] > rounds + 1, "another round")
        machine.stop()
        report = machine.wait(TIMEOUT)
        assert report["exit_code"] == ExitCode.WORKER_DIED
        assert report["verification"]["lost_pages"] == report["verification"]["surplus_pages"] == 0


def test_slots_come_and_go_under_it() -> None:
    with Machine.launch(spec(ReplayPhase("random", 0), verify=exact(0.05), timeout=None)) as machine:
        machine.register("c")
        machine.log_stop(7)
        machine.sync("c")
        until(lambda: machine.sync("c").pages > 0, "slot 0 dirtied")
        assert synced(machine)[7] == set()
        machine.log_start(7)
        until(lambda: bool(synced(machine)[7]), "slot 7 dirtied")
        machine.memory_add(3, 1 << 40, 1 << 30)
        machine.memory_remove(0)
        machine.sync("c")
        assert set(machine.sync("c").slots) == {3, 7}
        machine.memory_add(0, 0, 5003 * PAGE)
        until(lambda: bool(synced(machine)[0]), "slot 0 dirtied again")
        machine.stop()
        result = machine.wait(TIMEOUT)["verification"]
        assert (result["lost_pages"], result["surplus_pages"]) == (0, 0), result


def test_a_slot_of_a_tebibyte_takes_no_memory_but_for_its_bitmaps() -> None:
    machine_spec = spec(ReplayPhase("strided", 5000, stride=50_021), slots=[RamSlot(0, 0, 1 << 40)], vcpus=4)
    with Machine.launch(machine_spec, start=False) as machine:
        machine.register("c")
        machine.start()
        assert machine.wait(TIMEOUT)["exit_code"] == 0
        assert synced(machine) == expected(machine_spec)
        segments = [Path("/dev/shm") / name[1:] for name in list_segments(machine_prefix(machine_spec.name))]
        assert sum(s.stat().st_size for s in segments) > 1 << 40
        assert sum(s.stat().st_blocks * 512 for s in segments) < 1 << 30


def test_what_needs_memory_is_refused_in_one_line(tmp_path: Path) -> None:
    with Machine.launch(spec(ReplayPhase("sequential", 0), timeout=None)) as machine:
        with pytest.raises(VmmError, match="'t' runs accel: replay, which has no guest memory"):
            machine.ram(0)
        with pytest.raises(VmmError, match="no guest memory"):
            machine.write(0, b"x")
        machine.pause()
        with pytest.raises(VmmError, match="no guest memory"):
            machine.state()
        machine.resume()
        for words in (["snapshot", "create", "t", str(tmp_path / "s")], ["dirty-rate", "t", "--mode", "sampling"],
                      ["migrate", "t", "ipc:///tmp/nobody"]):
            done = CliRunner().invoke(cli, words)
            assert isinstance(done.exception, VmmError), (words, done)
            assert "no guest memory" in str(done.exception)
        assert not (tmp_path / "s").exists()


# --- configuration ------------------------------------------------------------------------------------------


HEAD = "accel: replay\nmemory: [{size: 1TiB}]\n"


@pytest.mark.parametrize(("text", "said"), [
    ("guest: {workload: hello}", "accel: replay has no CPU"),
    ("", r"'guest' \(or 'replay'\) is missing"),
    ("guest: {workload: hello}\nreplay: {pattern: random}", "give either 'guest' or 'replay', not both"),
    ("replay: {pattern: randm}", r"m\.yaml:3:\d+: replay\.pattern"),
    ("replay: {patern: random}", r"m\.yaml:3:\d+: replay\.patern: unknown key \(did you mean 'pattern'"),
    ("replay: {writes: 5}", r"m\.yaml:3:\d+: replay: give exactly one of"),
    ("replay: {pattern: zipf}", r"replay\.pattern: zipf needs 'exponent'"),
    ("replay: {pattern: random, stride: 4}", r"replay\.stride: only valid with pattern: strided"),
    ("replay: {pattern: random, speed: full}", r"replay\.speed: only valid with 'trace'"),
    ("replay:\n  trace: x.trace\n  seed: 4", r"m\.yaml:5:\d+: replay\.seed"),
    ("replay:\n  phases:\n  - {pattern: random}\n  - {pattern: random}", r"m\.yaml:5:\d+: replay\.phases\.0: needs"),
    ("replay:\n  phases:\n  - {pattern: random, writs: 3}", r"m\.yaml:5:\d+: replay\.phases\.0\.writs: unknown key"),
    ("replay: {pattern: random}\ndirty_ring_size: 0", r"m\.yaml:4:\d+: dirty_ring_size"),
])
def test_what_is_wrong_with_a_replay_section_is_said_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "m.yaml").write_text(HEAD + text + "\n")
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "m.yaml")


def test_a_guest_may_not_have_that_much_memory_or_be_run_by_replay(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("memory: [{gpa: 4GiB, size: 1TiB}]\nguest: {workload: hello}\n")
    with pytest.raises(ConfigError, match=r"m\.yaml:1:\d+: memory\.0\.size: ends at 0x10100000000"):
        load_config(path)
    path.write_text("accel: kvm\nmemory: [{size: 1TiB}]\nreplay: {pattern: random}\n")
    with pytest.raises(ConfigError, match=r"m\.yaml:1:\d+: accel: kvm runs a guest"):
        load_config(path)


def test_a_plan_of_a_replayed_machine(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("memory: [{size: 8TiB}]\nvcpus: 200\nreplay: {phases: [{pattern: zipf, exponent: 1.2, "
                    "writes: 9}, {pattern: strided, stride: 3}], rate: 1.0e+6, seed: 4, shared: true}\n")
    planned = plan(load_config(path))
    assert planned.accel == "replay"
    assert planned.image == ""
    assert planned.replay == ReplaySpec([ReplayPhase("zipf", 9, 1, 1.2), ReplayPhase("strided", 0, 3, 1.0)], 1e6, 4,
                                        True, speed=1.0)
