"""Pages that are written in every round are sent at first and at last, not in between; and nothing is lost by it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import spec
from migrations import PlayedTarget, Receiver, goes_on, touched

from vmm import migrate
from vmm.client.machine import Machine
from vmm.consumers.migration import wire
from vmm.consumers.migration.hot import joined
from vmm.migrate import Options

#: It dirties one page after the other, a few less than can be sent: each round leaves a little less than the last, and
#: for several rounds more than there is time for at the end.
WALK = spec("sequential", accel="unicorn", name="source", mib=32, vcpus=1, passes=0, spin=50, timeout=None)
OPTIONS = Options(bandwidth=2e6, downtime=0.1, max_rounds=6, converge=False, paused=True, keep_source=True)
HOT = 1200      # the first of those that ``touched`` marks all the time


@pytest.fixture
def running() -> Iterator[Machine]:
    with Machine.launch(WALK) as machine:
        machine.dirty_limit(450)
        machine.write(4 << 20, bytes(range(1, 256)) * (4 << 12))
        yield machine


def rounds_of(target: PlayedTarget, page: int) -> list[int]:
    """In which this page of slot 0 was sent."""
    return sorted({message.round for message in target.seen if isinstance(message, wire.Pages)
                   and page in np.frombuffer(message.numbers, "<u4")})


def test_what_is_written_in_every_round_is_not_sent_in_every_round(running: Machine, address: str) -> None:
    with PlayedTarget(address) as target, touched("source"):
        report = migrate.migrate(running, address, OPTIONS)
    last = len(report.rounds) - 1
    sent = rounds_of(target, HOT)
    assert last >= 3
    assert {0, 1, last} <= {*sent}
    assert {*range(2, last)} - {*sent}
    assert report.ram.held >= 1


def test_nothing_is_lost_by_it(running: Machine, address: str) -> None:
    receiver = Receiver(address, accel="unicorn")
    with touched("source"):
        report = migrate.migrate(running, address, OPTIONS)
    with receiver.result() as moved:
        assert report.ram.held >= 1
        assert np.array_equal(moved.ram(0), running.ram(0))
        moved.dirty_limit(0)
        moved.resume()
        goes_on(moved)


@given(st.sets(st.integers(0, 50)), st.sets(st.integers(0, 50)))
def test_what_is_in_either_ascends_and_is_there_once(one: set[int], other: set[int]) -> None:
    both = joined({0: np.array(sorted(one), np.int64)}, {0: np.array(sorted(other), np.int64), 1: np.array([3])})
    assert both[0].tolist() == sorted(one | other)
    assert both[1].tolist() == [3]
