"""``vmm trace record --pid``: the trace of a process has what the process has written, and replays like any other."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
from watched import PAGES, Writer

from ipc.messages import ReplaySpec
from vmm.client.machine import Machine
from vmm.consumers.watch import tracing
from vmm.consumers.watch.attach import attach, check_target
from vmm.consumers.watch.blocks import writable
from vmm.consumers.watch.watcher import Watcher
from vmm.machine.spec import MachineSpec, ReaperSpec
from vmm.machine.tracefile import TraceReader, unpack

pytestmark = pytest.mark.watch


def recorded(writer: Writer, path: Path, rounds: list[list[tuple[int, set[int]]]]) -> None:
    """What the writer writes in each interval: (mapping, pages)."""
    turns = iter(rounds)

    def wait(seconds: float) -> bool:
        """The time between two collections is when the writer is done."""
        for number, pages in (mine := next(turns, [])):
            while number >= len(writer.addresses):
                writer.map("anonymous")
            writer.write(number, pages)
        return not mine

    with Watcher(attach(check_target(writer.pid)), writable) as source:
        end = tracing.record_process(source, "writer", path, 60.0, 0.01, lambda part, entries: None, wait)
    assert end.reason == "interrupted"      # as ``wait`` says when there is no more


def pages_of(path: Path, writer: Writer) -> list[dict[int, set[int]]]:
    """Of each record: the pages of each mapping of the writer, as the writer numbers them."""
    found = []
    with TraceReader(path) as reader:
        at = {int(name.split()[0], 16) // 4096: slot for name, slot in
              zip(reader.header.mappings, reader.header.slots, strict=True)}
        for record in reader:
            one: dict[int, set[int]] = {}
            for first, slot in at.items():
                for number, address in enumerate(writer.addresses):
                    pages = record.pages[record.slots == slot.id].astype(np.int64) + first - address // 4096
                    mine = set(pages[(pages >= 0) & (pages < PAGES)].tolist())
                    if mine:
                        one[number] = mine
            found.append(one)
    return found


def test_each_interval_has_what_was_written_in_it_also_in_mappings_that_came_later(writer: Writer,
                                                                                   tmp_path: Path) -> None:
    chance = random.Random(5)
    writer.map("anonymous")
    rounds = [[(0, set(chance.sample(range(PAGES), 40)))] for _ in range(6)]
    rounds += [[(0, {1}), (1, set(chance.sample(range(PAGES), 30)))] for _ in range(3)]
    recorded(writer, tmp_path / "x.trace", rounds)
    found = pages_of(tmp_path / "x.trace", writer)
    assert found[:len(rounds)] == [dict(each) for each in rounds]


def test_a_replay_dirties_the_same_pages_and_says_what_the_trace_lacks(writer: Writer, tmp_path: Path) -> None:
    path = tmp_path / "x.trace"
    writer.map("shared")
    recorded(writer, path, [[(0, {3, 5, PAGES - 1})], [(0, {4})]])
    with TraceReader(path) as reader:
        slots = reader.header.slots
        entries = np.concatenate([part.entries for part in reader.vcpus()])
        assert reader.header.lacks == ["vcpus", "order"]
    ids, pages = unpack(entries)
    spec = MachineSpec(name="replayed", accel="replay", vcpus=1, privilege="user", ring_entries=1024, slots=slots,
                       image="", load_address=None, params=[], cmdline="", stack_size=16384, reaper=ReaperSpec(),
                       verify=None, timeout=60.0, trace=[], trace_file="", log="always", linger=True,
                       replay=ReplaySpec(speed=0.0), replay_trace=str(path))
    with Machine.launch(spec, start=False) as machine:
        machine.register("me")
        machine.start()
        assert any("one vCPU stands for all threads; within an interval, pages are in the order" in text
                   for text in machine.warnings)
        wanted = {(int(i), int(p)) for i, p in zip(ids, pages, strict=True)}
        deadline, found = time.monotonic() + 30.0, set[tuple[int, int]]()
        while found != wanted and time.monotonic() < deadline:
            for slot, ranges in machine.sync("me").slots.items():
                found |= {(slot, page) for first, count in ranges for page in range(first, first + count)}
        assert found == wanted
