"""The journal's record, and the dirty log that it describes, without a machine around them."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc.journal import Journal
from ipc.shm import Segment, SegmentError, list_segments, open_fd
from vmm.dirty.log import DirtyLog, LogClient, Retired
from vmm.errors import VmmError
from vmm.machine.memory import MemorySlot
from vmm.machine.names import machine_prefix
from vmm.machine.spec import RamSlot

ROOM = 4096


def name() -> str:
    return f"/shardvmm-test-{uuid.uuid4().hex[:8]}"


def adopted(journal: Journal) -> bytes:
    """What whoever takes over finds."""
    again, record = Journal.adopt(journal.names[0][:-1])
    with again:
        return record


def torn(path: str, at: int, garbage: bytes) -> None:
    """As a write that was cut short leaves it: the beginning is of the new record, the rest of the old one."""
    fd = open_fd(path)
    try:
        os.pwrite(fd, garbage, at)
    finally:
        os.close(fd)


# --- the record --------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=2 * ROOM), min_size=1, max_size=6))
def test_whoever_takes_over_finds_the_last_record(records: list[bytes]) -> None:
    journal = Journal.create(name(), ROOM)
    for record in records:
        journal.write(record)
    again, found = Journal.adopt(journal.names[0][:-1])
    assert found == records[-1]
    again.write(b"of the second")
    third, found = Journal.adopt(journal.names[0][:-1])
    assert found == b"of the second"
    for each in (journal, again, third):
        each.close()
    assert list_segments(journal.names[0][1:-1]) == []


@settings(max_examples=60)
@given(st.binary(min_size=1, max_size=200), st.integers(0, 260), st.binary(min_size=1, max_size=64))
def test_a_torn_record_is_not_read(record: bytes, at: int, garbage: bytes) -> None:
    """The segment that would be written next is garbage, from any byte on: the other one counts."""
    with Journal.create(name(), ROOM) as journal:
        journal.write(b"first")
        journal.write(b"second" + record)
        older = min(journal.names, key=lambda each: b"second" in Path(f"/dev/shm{each}").read_bytes())
        torn(older, at, garbage)
        assert adopted(journal) == b"second" + record


def test_a_newer_record_that_is_torn_leaves_the_older_one() -> None:
    with Journal.create(name(), ROOM) as journal:
        journal.write(b"first")
        journal.write(b"second, which is cut")
        for each in journal.names:
            if b"which is cut" in Path(f"/dev/shm{each}").read_bytes():
                torn(each, 40, b"\0")
        assert adopted(journal) == b"first"


def test_none_is_one_line() -> None:
    with pytest.raises(SegmentError, match="cannot open"):
        Journal.adopt(name())
    with Journal.create(name(), ROOM) as journal, pytest.raises(SegmentError, match="hold no complete record"):
        adopted(journal)


def test_a_record_that_there_is_no_room_for_is_refused_and_the_one_before_stays() -> None:
    """A real limit: no file of this process may grow beyond it (RLIMIT_FSIZE)."""
    script = ("import resource, sys\nfrom ipc.journal import Journal\n"
              "journal = Journal.create(sys.argv[1], 4000)\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
              "for size in (3000, 4001, 3999, 10**6):\n"
              "    try:\n        journal.write(bytes([size % 251]) * size)\n"
              "    except OSError as exc:\n        print(size, exc.errno)\n"
              "print(len(Journal.adopt(sys.argv[1])[1]))\njournal.close()\n")
    done = subprocess.run([sys.executable, "-c", script, name()], capture_output=True, text=True, timeout=60,
                          check=True)
    assert done.stdout.split() == ["1000000", str(errno.EFBIG), "3999"]


# --- segments ----------------------------------------------------------------------------------------------


def test_a_segment_that_was_not_finished_is_made_anew() -> None:
    """Killed before it was sized, between sizing and reserving, and with another size."""
    for size, reserved in ((0, 0), (8192, 0), (4096, 4096)):
        segment = name()
        path = Path(f"/dev/shm{segment}")
        with path.open("wb") as file:
            file.truncate(size)
            if reserved:
                os.posix_fallocate(file.fileno(), 0, reserved)
        if not size:
            with pytest.raises(SegmentError, match="is empty"):
                Segment.open(segment)
        made, fresh = Segment.adopt(segment, 8192)
        with made:
            assert fresh
            assert (made.size, path.stat().st_blocks * 512) == (8192, 8192)
            again, fresh = Segment.adopt(segment, 8192)
            assert not fresh
            again.close()
        assert not path.exists()


# --- the dirty log -----------------------------------------------------------------------------------------


@pytest.fixture
def log() -> Iterator[DirtyLog]:
    made = DirtyLog("bare")
    with contextlib.closing(made):
        yield made
    assert list_segments(machine_prefix("bare")) == []


def slot(log: DirtyLog, slot_id: int, born: int, pages: int = 100) -> MemorySlot:
    spec = RamSlot(slot_id, slot_id << 30, pages * 4096, True, born)
    return MemorySlot(log.machine, spec, vcpu_logs=0, create=True)


def ranges(log: DirtyLog, client: str, *, again: bool = False) -> dict[int, list[tuple[int, int]]]:
    taken = log.take(client, again=again)
    maps = {**log._clients[client].maps, **{i: m for i, (_, m) in log._clients[client].retired.items()}}
    return {i: maps[i].synced.ranges() for i in taken}


def test_a_take_whose_answer_was_lost_is_taken_again(log: DirtyLog) -> None:
    for clients in (["a"], ["a", "b"]):     # alone, there is a shorter way
        with contextlib.closing(DirtyLog("bare")) as each:
            each.add_slot(slot(each, 0, 1))
            for generation, client in enumerate(clients):
                each.register(client, generation)
            each.mark(0, 5, 2)
            assert ranges(each, "a") == {0: [(5, 2)]}
            each.mark(0, 50, 1)
            assert ranges(each, "a", again=True) == {0: [(5, 2), (50, 1)]}
            assert ranges(each, "a") == {0: []}


def test_a_removed_slot_is_told_until_it_was_heard(log: DirtyLog) -> None:
    log.add_slot(slot(log, 0, 1))
    log.add_slot(slot(log, 1, 2))
    for client in ("a", "b"):
        log.register(client, 3)
    log.mark(1, 7, 1)
    log.retire_slot(1).close()
    log.committed()
    assert ranges(log, "a") == {0: [], 1: [(7, 1)]}
    assert log.changed                      # a successor must know that it was told
    assert log.saved_clients()[0] == LogClient("a", 3, [Retired(RamSlot(1, 1 << 30, 409600, True, 2), True)])
    assert ranges(log, "a", again=True) == {0: [], 1: [(7, 1)]}
    log.committed()
    assert ranges(log, "a") == {0: []}
    assert log.changed
    assert len([s for s in list_segments(machine_prefix("bare")) if "client.a.3.1" in s]) == 1
    log.committed()
    assert [s for s in list_segments(machine_prefix("bare")) if "client.a.3.1" in s] == []
    assert ranges(log, "b") == {0: [], 1: [(7, 1)]}     # each in its own time


def test_a_slot_under_a_number_that_had_another_is_dirty_as_a_whole(log: DirtyLog) -> None:
    log.add_slot(slot(log, 0, 1))
    log.add_slot(slot(log, 1, 2))
    log.register("a", 3)
    log.mark(1, 7, 1)
    log.retire_slot(1).close()
    log.add_slot(slot(log, 1, 4, pages=30))
    assert ranges(log, "a") == {0: [], 1: [(0, 30)]}
    assert ranges(log, "a") == {0: [], 1: []}
    with pytest.raises(VmmError, match="another slot was added"):
        log.mark(1, 0, 1, born=2)
    log.mark(1, 0, 1, born=4)


def test_what_is_taken_back_is_as_before(log: DirtyLog) -> None:
    log.add_slot(slot(log, 0, 1))
    log.register("a", 2)
    log.mark(0, 3, 1)
    segments = list_segments(machine_prefix("bare"))
    log.register("b", 3, like="a")
    log.discard_client("b")
    log.add_slot(added := slot(log, 1, 4))
    log.discard_slot(1)
    added.close()
    log.readmit(log.unregister("a"))
    log.unretire_slot(log.retire_slot(0))
    log.committed()
    assert list_segments(machine_prefix("bare")) == segments
    assert log.clients == ["a"]
    assert ranges(log, "a") == {0: [(3, 1)]}


def test_a_host_write_is_in_every_take_until_it_is_over(log: DirtyLog) -> None:
    log.add_slot(slot(log, 0, 1))
    for client in ("a", "b"):
        log.register(client, 2)
    log.open_writes = [(0, 1, 10, 3), (0, 99, 50, 1), (4, 1, 0, 1)]     # the last two: of slots that are gone
    for _ in range(2):
        assert ranges(log, "a") == {0: [(10, 3)]}
        assert ranges(log, "b") == {0: [(10, 3)]}
    log.open_writes = []
    assert ranges(log, "b") == {0: []}
    assert ranges(log, "a") == {0: [(10, 3)]}       # of b's last take
    assert ranges(log, "a") == {0: []}


def test_bitmaps_that_a_predecessor_did_not_leave_are_full(log: DirtyLog) -> None:
    """Nobody knows what was gathered in them."""
    log.add_slot(slot(log, 0, 1))
    log.adopt_client(LogClient("a", 7, [Retired(RamSlot(5, 5 << 30, 20 * 4096, True, 3))]))
    assert ranges(log, "a") == {0: [(0, 100)], 5: [(0, 20)]}
