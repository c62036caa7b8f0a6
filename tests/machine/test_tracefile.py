"""The trace file format, the queue that feeds it, and record and replay of real machines."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import ACCELS, replace, until
from machines import spec as guest_spec
from numpy.typing import NDArray

from ipc.messages import ReplayPhase, ReplaySpec
from ipc.traces.queue import TraceQueue
from vmm.cli.commands import cli
from vmm.client.config import ConfigError, load_config
from vmm.client.machine import Machine
from vmm.client.plan import plan
from vmm.consumers.trace import record
from vmm.errors import VmmError
from vmm.machine.names import segment_name
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec
from vmm.machine.tracefile import TraceEnd, TraceError, TraceHeader, TraceReader, TraceWriter, pack, unpack

TIMEOUT = 60.0
PAGE = 4096
U64 = NDArray[np.uint64]
HEADER = TraceHeader(machine="m", accelerator="kvm", vcpus=3, ring_entries=4096, interval=0.01,
                     slots=[RamSlot(0, 0, 1 << 20), RamSlot(9, 1 << 32, 1 << 30)], recorded="2025-01-01T00:00:00")

entries = st.lists(st.tuples(st.integers(0, 499), st.integers(0, 2**48 - 1)), max_size=40)
records = st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 2), entries), max_size=12)


def packed(pairs: list[tuple[int, int]]) -> U64:
    return np.array([slot << 48 | page for slot, page in pairs], np.uint64)


def write(path: Path, found: list[tuple[int, int, list[tuple[int, int]]]], **end: Any) -> TraceEnd:
    with TraceWriter(path, HEADER) as writer:
        now = 0
        for step, vcpu, pairs in found:
            now += step
            writer.append(now, vcpu, packed(pairs))
        return writer.finish(**end)


# --- format ---------------------------------------------------------------------------------------------------


@given(found=records, blocks=st.booleans())
@settings(max_examples=60)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, found: Any, blocks: bool) -> None:
    path = tmp_path_factory.mktemp("trace") / "x.trace"
    with pytest.MonkeyPatch.context() as patch:
        if blocks:
            patch.setattr("vmm.machine.tracefile._BLOCK_ENTRIES", 16)
        end = write(path, found, lost=3)
    with TraceReader(path) as reader:
        assert reader.header == HEADER
        got = [(r.time_ns, r.vcpu, list(zip(r.slots.tolist(), r.pages.tolist(), strict=True))) for r in reader]
        times = np.cumsum([step for step, _, _ in found]).tolist()
        assert got == [(t, vcpu, pairs) for t, (_, vcpu, pairs) in zip(times, found, strict=True)]
        assert reader.end == end
        assert not end.complete
        for vcpu, part in enumerate(reader.vcpus()):
            mine = [(t, pairs) for t, v, pairs in got if v == vcpu]
            assert part.entries.tolist() == packed([p for _, pairs in mine for p in pairs]).tolist()
            assert part.times.tolist() == [t for t, _ in mine]
            assert part.ends.tolist() == np.cumsum([len(pairs) for _, pairs in mine]).tolist()


@given(found=records, at=st.integers(0, 10**6), flip=st.integers(1, 255), cut=st.booleans())
@settings(max_examples=80)
def test_a_damaged_file_is_refused(tmp_path_factory: pytest.TempPathFactory, found: Any, at: int, flip: int,
                                   cut: bool) -> None:
    """One byte changed, or everything from it on missing: never another error, never other contents."""
    path = tmp_path_factory.mktemp("trace") / "x.trace"
    write(path, found)
    data = bytearray(path.read_bytes())
    at %= len(data)
    if cut:
        del data[at:]
    else:
        data[at] ^= flip
    path.write_bytes(data)
    with pytest.raises(TraceError, match=r"x\.trace: is "), TraceReader(path) as reader:
        list(reader)


def test_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.trace"
    with pytest.raises(TraceError, match=r"x\.trace: cannot be read: No such file"):
        TraceReader(path)
    for text in (b"", b"SVMTRACE", b"#!/bin/sh\necho something else altogether\n"):
        path.write_bytes(text)
        with pytest.raises(TraceError, match=r"x\.trace: is not a dirty trace"):
            TraceReader(path)
    write(path, [])
    data = bytearray(path.read_bytes())
    data[8] = 77
    path.write_bytes(data)
    with pytest.raises(TraceError, match="of version 77; this program reads version 1"):
        TraceReader(path)
    done = CliRunner().invoke(cli, ["trace", "info", str(path)])
    assert isinstance(done.exception, TraceError)


def test_a_record_of_more_than_a_ring_is_several(tmp_path: Path) -> None:
    path, found = tmp_path / "x.trace", np.arange((1 << 20) + 70_000, dtype=np.uint64)
    with TraceWriter(path, HEADER) as writer:
        writer.append(7, 1, found)
        writer.append(7, 1, found[:0])
        end = writer.finish()
    assert end.entries == len(found)
    with TraceReader(path) as reader:
        assert {(record.time_ns, record.vcpu) for record in reader} == {(7, 1)}
        assert np.array_equal(reader.vcpus()[1].entries, found)


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "x.trace", HEADER) as writer:
        writer.append(1, 0, packed([(0, 1)]))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(VmmError, match=r"no/x\.trace: cannot be written"):
        TraceWriter(tmp_path / "no" / "x.trace", HEADER)


def test_a_sequential_trace_takes_next_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.trace"
    with TraceWriter(path, HEADER) as writer:
        for i in range(50):
            writer.append(i, 0, pack(np.zeros(10_000), np.arange(i * 10_000, (i + 1) * 10_000)))
        assert writer.finish().complete
    assert path.stat().st_size < 500_000 / 50


# --- queue ----------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.integers(0, 160), st.none()), max_size=60))
@settings(max_examples=60)
def test_the_queue_gives_what_had_room_in_its_order(steps: list[int | None]) -> None:
    """Numbers: so many entries are put; None: everything is taken."""
    name = segment_name("test", f"queue{uuid.uuid4().hex[:8]}")
    queue = TraceQueue.create(name, 512)
    reader = TraceQueue.open(name)
    try:
        waiting: list[tuple[int, int, list[int]]] = []
        used = lost = 0
        for number, step in enumerate([*steps, None]):
            if step is None:
                assert [(t, v, e.tolist()) for t, v, e in reader.records()] == waiting
                waiting, used = [], 0
                continue
            found = list(range(number * 100, number * 100 + step))
            fits = used + 2 + step <= 512
            assert queue.put(number, number % 5, np.array(found, np.uint64)) == fits
            if fits:
                waiting.append((number, number % 5, found))
                used += 2 + step
            else:
                lost += step
        assert reader.lost == lost
        assert not reader.closed
        queue.end()
        assert reader.closed
    finally:
        queue.close()
        reader.close()


# --- record -----------------------------------------------------------------------------------------------------


def replay_spec(*phases: ReplayPhase, name: str = "t", trace: Path | None = None, vcpus: int = 2,
                **fields: Any) -> MachineSpec:
    return MachineSpec(
        name=name, accel="replay", vcpus=vcpus, privilege="user", ring_entries=4096, image="", load_address=None,
        slots=[RamSlot(0, 0, 5003 * PAGE), RamSlot(7, 1 << 32, 9001 * PAGE)], params=[], cmdline="",
        stack_size=16384, reaper=ReaperSpec(), verify=None, timeout=60.0, trace=[], trace_file="", linger=True,
        replay=ReplaySpec(list(phases), **fields), replay_trace=str(trace or ""))


def recorded_until_the_end(machine_spec: MachineSpec, path: Path) -> tuple[dict[str, Any], dict[int, set[int]]]:
    """The report, and the pages that an ordinary client of the dirty log got meanwhile."""
    with Machine.launch(machine_spec, start=False) as machine:
        machine.register("c")
        starter = threading.Timer(0.1, lambda: Machine.attach(machine.name).start())
        starter.start()
        end = record(machine, path, TIMEOUT, 0.005)
        starter.join()
        report = machine.wait(TIMEOUT)
        assert end.complete, end
        assert end.entries == sum(v["dirty_pages"] for v in report["vcpus"])
        return report, {i: {p for first, n in ranges for p in range(first, first + n)}
                        for i, ranges in machine.sync("c").slots.items()}


def pages_per_vcpu(path: Path) -> list[list[tuple[int, int]]]:
    """(slot, page) of each entry, in their order."""
    with TraceReader(path) as reader:
        found = []
        for part in reader.vcpus():
            slots, pages = unpack(part.entries)
            found.append(list(zip(slots.tolist(), pages.tolist(), strict=True)))
        return found


def in_slots(parts: list[list[tuple[int, int]]]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for part in parts:
        for slot, page in part:
            found.setdefault(slot, set()).add(page)
    return found


@pytest.mark.parametrize("accel", ACCELS)
def test_a_trace_of_a_guest_has_what_the_log_has_and_replays_the_same(accel: str, tmp_path: Path) -> None:
    path, again = tmp_path / "a.trace", tmp_path / "b.trace"
    guest = guest_spec("random", accel=accel, writes=20_000, mib=8, spin=50)
    _, dirty = recorded_until_the_end(guest, path)
    parts = pages_per_vcpu(path)
    assert in_slots(parts) == dirty
    replayed = replace(guest, accel="replay", image="", replay=ReplaySpec(repeat=True, speed=0.0),
                       replay_trace=str(path))
    _, dirty = recorded_until_the_end(replayed, again)
    assert pages_per_vcpu(again) == parts
    assert in_slots(parts) == dirty


def test_a_trace_keeps_to_its_times_and_may_be_faster(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    recorded_until_the_end(replay_spec(ReplayPhase("random", 20_000), rate=40_000.0), path)
    parts = pages_per_vcpu(path)
    seconds = {}
    for speed in (1.0, 4.0, 0.0):
        again = tmp_path / f"{speed}.trace"
        report, _ = recorded_until_the_end(replay_spec(trace=path, speed=speed), again)
        seconds[speed] = report["elapsed_s"]
        assert [set(p) for p in pages_per_vcpu(again)] == [set(p) for p in parts]
    assert seconds[1.0] > 0.4       # 20,000 writes at 40,000 a second
    assert seconds[4.0] > 0.09


def test_a_killed_coordinator_ends_the_recording_and_the_trace_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    with Machine.launch(replay_spec(ReplayPhase("random", 0), rate=10_000.0), start=True) as machine:
        coordinator = machine.status()["coordinator"]["pid"]
        killed: list[int] = []

        def kill_once(part: float, entries: int) -> None:
            if entries and not killed:
                killed.append(entries)
                os.kill(coordinator, signal.SIGKILL)

        end = record(machine, path, TIMEOUT, 0.01, kill_once)
        assert killed
        assert not end.complete
        assert "not being recorded" in end.reason
        until(lambda: machine.status()["coordinator"]["restarts"] == 1, "another coordinator")
        assert record(machine, path, 0.1, 0.01).complete
    assert pages_per_vcpu(path)


def test_a_recorder_that_lags_loses_entries_and_the_guest_goes_on(tmp_path: Path) -> None:
    """Nobody reads the queue, which holds 8 million entries."""
    with Machine.launch(replay_spec(ReplayPhase("random", 5_000_000), repeat=True)) as machine:
        machine.record_start()
        with pytest.raises(VmmError, match="is already being recorded"):
            machine.record_start()
        queue = TraceQueue.open(segment_name(machine.name, "record"))
        report = machine.wait(TIMEOUT)
        assert report["exit_code"] == 0
        machine.record_stop()
        assert queue.closed
        assert queue.lost > 0
        held = sum(len(e) for _, _, e in queue.records())
        assert held + queue.lost <= sum(v["dirty_pages"] for v in report["vcpus"])
        queue.close()
        with pytest.raises(VmmError, match="is not being recorded"):
            machine.record_step()


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    with Machine.launch(guest_spec("idle", accel="unicorn", ring=0, vcpus=1)) as machine:
        with pytest.raises(VmmError, match="only dirty rings record"):
            record(machine, tmp_path / "a.trace", 1.0, 0.01)
        assert list(tmp_path.iterdir()) == []
        machine.stop()


# --- configuration, command line ---------------------------------------------------------------------------------


def test_record_and_info_on_the_command_line_and_a_file_that_replays_it(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    with Machine.launch(replay_spec(ReplayPhase("zipf", 0, exponent=1.1), rate=20_000.0, name="rec")):
        done = CliRunner().invoke(cli, ["trace", "record", "rec", str(path), "--time", "200ms", "--json"])
        assert done.exception is None, done.output
        said = json.loads(done.stdout)
        assert said["complete"]
        assert said["entries"] > 0
    info = json.loads(CliRunner().invoke(cli, ["trace", "info", str(path), "--json"]).stdout)
    assert info["entries"] == sum(v["entries"] for v in info["vcpus"]) == said["entries"]
    assert "incomplete" not in CliRunner().invoke(cli, ["trace", "info", str(path)]).stdout
    config = tmp_path / "m.yaml"
    memory = "memory: [{size: 5003 pages}, {slot: 7, gpa: 4GiB, size: 9001 pages}]\n"
    config.write_text(f"vcpus: 2\n{memory}replay: {{trace: a.trace, speed: 2.0}}\n")
    planned = plan(load_config(config))
    assert planned.replay_trace == str(path)
    assert planned.replay is not None
    assert planned.replay.speed == 2.0
    with pytest.raises(ConfigError, match=r"m\.yaml:3:\d+: replay\.trace: .*a\.trace: was recorded from 2 vCPUs, "):
        plan(load_config(config, ["vcpus=3"]))
    with pytest.raises(ConfigError, match=r"m\.yaml:3:\d+: replay\.trace: .*needs memory slot 7 of 9001 pages"):
        plan(load_config(config, ["memory.1.size=4MiB"]))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(VmmError, match=r"a\.trace: is damaged"):
        Machine.launch(planned)
    path.unlink()
    with pytest.raises(ConfigError, match=r"replay\.trace: .*a\.trace: cannot be read"):
        plan(load_config(config))


def test_times_are_those_of_the_harvests(tmp_path: Path) -> None:
    began = time.monotonic()
    with Machine.launch(replay_spec(ReplayPhase("random", 0), rate=5000.0)) as machine:
        end = record(machine, tmp_path / "a.trace", 0.3, 0.02)
    assert 0.3 <= end.seconds <= time.monotonic() - began
    with TraceReader(tmp_path / "a.trace") as reader:
        times = [r.time_ns for r in reader if r.vcpu == 0]
    assert len(times) >= 3
    assert all(0 <= t <= end.seconds * 1e9 for t in times)
