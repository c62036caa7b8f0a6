"""The written pages of another process (vmm/consumers/watch/): exactly those that it has written, as it knows."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from watched import PAGES, Writer

from ipc.linux.foreign import status
from vmm.consumers.watch.attach import attach, check_target
from vmm.consumers.watch.blocks import writable
from vmm.consumers.watch.watcher import Ended, Watcher
from vmm.errors import VmmError

pytestmark = pytest.mark.watch

KINDS = ("anonymous", "shared", "memfd", "file", "private-file")
def watcher(writer: Writer) -> Watcher:
    return Watcher(attach(check_target(writer.pid)), writable)


def found(watching: Watcher, writer: Writer, number: int, pages: int = PAGES) -> set[int]:
    """Of the last turn: the pages of one mapping, as the writer numbers them."""
    first = writer.addresses[number] // 4096
    everything = {int(page) for part in watching.collect().pages.values() for page in part}
    return {page - first for page in everything if first <= page < first + pages}


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_what_is_written_is_found(writer: Writer, kind: str, filled: bool) -> None:
    chance = random.Random(kind)
    number = writer.map(kind)
    if filled:
        writer.ask(f"fill {number}")
    with watcher(writer) as watching:
        watching.collect()
        for round_ in range(8):
            written = set(chance.sample(range(PAGES), chance.choice([0, 1, 50, 1500])))
            writer.write(number, written)
            if round_ == 4:
                writer.ask(f"read {number}")        # it is not written by that
            assert found(watching, writer, number) == written


@pytest.mark.parametrize("kind", ["anonymous", "shared"])
def test_what_is_read_or_thrown_away_is_not_written(writer: Writer, kind: str) -> None:
    number = writer.map(kind)
    with watcher(writer) as watching:
        watching.collect()
        writer.ask(f"read {number}")
        assert found(watching, writer, number) == set()
        writer.write(number, {1, 2, 3})
        assert found(watching, writer, number) == {1, 2, 3}
        writer.ask(f"drop {number}")
        assert found(watching, writer, number) == set()


def test_mappings_that_come_are_watched_from_then_on_and_those_that_go_are_not(writer: Writer) -> None:
    first = writer.map("anonymous")
    with watcher(writer) as watching:
        watching.collect()
        second = writer.map("anonymous", 3 * PAGES)
        written = {0, 5, 3 * PAGES - 1}
        writer.write(second, written)
        assert found(watching, writer, second, 3 * PAGES) == written
        writer.write(second, {7})
        assert found(watching, writer, second, 3 * PAGES) == {7}
        writer.ask(f"unmap {first}")
        third = writer.map("anonymous")         # where the first was, as a rule
        writer.write(third, {9, 11})
        watching.collect()
        watching.collect()
        writer.write(third, {10})
        assert found(watching, writer, third) == {10}


def test_what_a_child_writes_is_its_own(writer: Writer) -> None:
    number = writer.map("anonymous")
    with watcher(writer) as watching:
        watching.collect()
        writer.ask("fork")
        assert found(watching, writer, number) == set()
        writer.write(number, {4})
        assert found(watching, writer, number) == {4}


def test_that_it_has_forked_is_said(writer: Writer) -> None:
    with watcher(writer) as watching:
        watching.collect()
        assert watching.forked == set()
        child = int(writer.ask("child"))
        watching.collect()
        assert watching.forked == {child}


def test_afterwards_nothing_is_left_in_the_process(writer: Writer) -> None:
    writer.map("anonymous")
    descriptors = len(list(Path(f"/proc/{writer.pid}/fd").iterdir()))
    with watcher(writer) as watching:
        watching.collect()
        assert " uw " in Path(f"/proc/{writer.pid}/smaps").read_text()
    assert " uw " not in Path(f"/proc/{writer.pid}/smaps").read_text()
    assert len(list(Path(f"/proc/{writer.pid}/fd").iterdir())) == descriptors
    assert status(writer.pid)["TracerPid"] == "0"


def test_two_cannot_watch_the_same(writer: Writer) -> None:
    number = writer.map("anonymous")
    with watcher(writer) as watching:
        with pytest.raises(VmmError, match="has a userfaultfd already"):
            watcher(writer)
        watching.collect()
        writer.write(number, {1})
        assert found(watching, writer, number) == {1}


def until_ended(watching: Watcher) -> None:
    """Raises Ended, as soon as it is."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        watching.collect()


def test_that_it_ends_or_is_another_program_is_said(writer: Writer) -> None:
    with watcher(writer) as watching:
        assert writer.process.stdin is not None
        writer.process.stdin.write("exec\n")
        with pytest.raises(Ended, match="has executed another program"):
            until_ended(watching)
    with watcher(writer) as watching:
        writer.process.kill()
        with pytest.raises(Ended, match="has ended"):
            until_ended(watching)
