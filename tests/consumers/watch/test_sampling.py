"""Estimates from samples, and huge pages afterwards, against a process that knows what it has written."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from watched import PAGES, Writer

from ipc.linux.foreign import Mapping
from ipc.linux.processid import identity
from vmm.consumers.watch.attach import attach, check_target
from vmm.consumers.watch.blocks import Block, writable
from vmm.consumers.watch.huge import HUGE_SIZE, collapse_again, huge_pages
from vmm.consumers.watch.sampling import Sampler, _by_entries, _populated, error_of
from vmm.consumers.watch.watcher import Ended, Watcher
from vmm.errors import VmmError

pytestmark = pytest.mark.watch


def one(writer: Writer, number: int, pages: int = PAGES) -> Block:
    return Block(writer.addresses[number], writer.addresses[number] + pages * 4096, "one", True)


def only(block: Block) -> Callable[[Iterable[Mapping]], list[Block]]:
    return lambda there: [block]


@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
def test_of_all_pages_the_estimate_is_exact(writer: Writer, kind: str) -> None:
    number = writer.map(kind)
    writer.ask(f"fill {number}")
    sampler = Sampler(identity(writer.pid), only(one(writer, number)), PAGES)
    for count in (0, 1, 500, PAGES):
        writer.write(number, set(range(count)))
        found = sampler.collect()
        assert (found.population, found.sampled, found.pages, found.error) == (PAGES, PAGES, count, 0.0)
        assert sum(area.pages for area in found.areas) == count


def test_of_some_pages_it_is_as_far_off_as_it_says(writer: Writer) -> None:
    number = writer.map("anonymous")
    writer.ask(f"fill {number}")
    chance, off = random.Random(3), []
    for seed in range(40):
        sampler = Sampler(identity(writer.pid), only(one(writer, number)), 200, seed)
        writer.write(number, set(chance.sample(range(PAGES), 900)))
        found = sampler.collect()
        off.append((found.pages - 900) / found.error)
    # As many standard errors as a standard normal variable has: the mean about 0, the variance about 1.
    assert abs(np.mean(off)) < 4 / math.sqrt(len(off))
    assert 0.4 < np.var(off) < 2.0


def test_the_error_is_none_of_all_and_never_none_of_some() -> None:
    assert error_of(1000, 1000, 3) == 0.0
    for changed in (0, 1, 50, 100):
        assert error_of(1000, 100, changed) > 0.0
    assert error_of(1000, 100, 50) == pytest.approx(1000 * math.sqrt(0.25 / 100 * 900 / 999))


def test_holes_are_no_pages_and_are_left_alone(writer: Writer) -> None:
    number = writer.map("anonymous")
    with pytest.raises(VmmError, match="no memory that could be sampled"):
        Sampler(identity(writer.pid), only(one(writer, number)))
    writer.write(number, {3, 7, 8})
    regions = _populated(writer.pid, one(writer, number))
    assert ((regions - writer.addresses[number]) // 4096).tolist() == [[3, 4], [7, 9]]
    # And by the entries of pagemap, where there is no PAGEMAP_SCAN.
    entries = _by_entries(writer.pid, one(writer, number))
    assert ((entries[:, 0] - writer.addresses[number]) // 4096).tolist() == [3, 7, 8]


def test_that_the_process_ends_is_said_of_samples_too(writer: Writer) -> None:
    sampler = Sampler(identity(writer.pid), writable)
    writer.process.kill()
    writer.process.wait()
    with pytest.raises(Ended, match="has ended"):
        sampler.collect()


def test_huge_pages_that_were_split_are_huge_again(writer: Writer) -> None:
    pages = 8 * HUGE_SIZE // 4096
    number = writer.map("anonymous", pages)
    writer.ask(f"huge {number}")
    writer.ask(f"fill {number}")
    block = one(writer, number, pages)
    before = huge_pages(writer.pid, [(block.start, block.end)])
    if not before:
        pytest.skip("this host has no huge pages to give")
    with Watcher(attach(check_target(writer.pid)), only(block)) as watching:
        assert huge_pages(writer.pid, [(block.start, block.end)]) == before     # protecting leaves them
        for address in before:
            writer.write(number, {(address - block.start) // 4096})
        assert watching.collect().count == len(before)
    after = huge_pages(writer.pid, [(block.start, block.end)])
    assert after < before
    split, done = collapse_again(identity(writer.pid), before)
    assert split == len(before - after)
    assert len(before - huge_pages(writer.pid, [(block.start, block.end)])) == split - done
    assert done > 0
