"""epoll against the host's kernel: pipes, counters and epoll instances, whatever is done with them; which events are
reported, in which order."""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from twice import Fd, Guest, Out, Twice

from workers.linux.calls import Blocked

EXAMPLES = int(os.environ.get("EXAMPLES", "60"))
ADD, DEL, MOD = 1, 2, 3
IN, PRI, OUT, ERR, HUP = 1, 2, 4, 8, 16
ONESHOT, EDGE, EXCLUSIVE = 1 << 30, 1 << 31, 1 << 28


@pytest.fixture
def twice() -> Iterator[Twice]:
    with contextlib.closing(Twice()) as found:
        yield found


def event(events: int, data: int) -> bytes:
    return struct.pack("<IQ", events, data)


def waited(twice: Twice, epoll: Fd, most: int = 16) -> list[tuple[int, int]]:
    """What both report now."""
    count, (data,) = twice.same("epoll_wait", epoll, Out(12 * 16), most, 0)
    return [(events, mark) for events, mark in struct.iter_unpack("<IQ", data[:12 * count])]


class World:
    """Two pipes, two counters, two epoll instances."""

    def __init__(self, twice: Twice) -> None:
        self.twice = twice
        self.fds = [*twice.pair("pipe2", Out(8), os.O_NONBLOCK), *twice.pair("pipe2", Out(8), os.O_NONBLOCK),
                    twice.made("eventfd2", 0, os.O_NONBLOCK), twice.made("eventfd2", 2**32 - 1, os.O_NONBLOCK | 1)]
        self.counters = self.fds[4:]
        self.epolls = [twice.made("epoll_create1", 0), twice.made("epoll_create1", 0)]

    def any(self, index: int) -> Fd:
        both = self.fds + self.epolls
        return both[index % len(both)]

    def write(self, index: int, count: int) -> None:
        fd = self.any(index)
        if fd in self.counters:
            count = 8           # what else a counter takes depends on the kernel
        self.twice.same("write", fd, b"\1".ljust(count, b"\0"), count)

    def read(self, index: int, count: int) -> None:
        self.twice.same("read", self.any(index), Out(count + 1), count)

    def add(self, epoll: int, index: int, events: int) -> None:
        self.twice.same("epoll_ctl", self.epolls[epoll], ADD, self.any(index), event(events, index))

    def modify(self, epoll: int, index: int, events: int) -> None:
        self.twice.same("epoll_ctl", self.epolls[epoll], MOD, self.any(index), event(events, index))

    def remove(self, epoll: int, index: int) -> None:
        self.twice.same("epoll_ctl", self.epolls[epoll], DEL, self.any(index), 0)

    def wait(self, epoll: int, most: int) -> None:
        waited(self.twice, self.epolls[epoll], most)

    def close(self, index: int) -> None:
        if len(self.fds) > 2:
            fd = self.fds.pop(index % len(self.fds))
            self.twice.shut(fd)

    def dup(self, index: int) -> None:
        fd = self.fds[index % len(self.fds)]
        self.fds.append(self.twice.made("dup", fd))
        if fd in self.counters:
            self.counters.append(self.fds[-1])

    def poll(self) -> None:
        self.twice.poll(*self.fds, *self.epolls)


epolls, indices = st.sampled_from([0, 0, 0, 1]), st.integers(0, 7)
interest = st.builds(lambda what, how: what | how,
                     st.sampled_from([IN, OUT, IN | OUT, IN | OUT, 0, PRI, IN | 0x40, OUT | 0x100]),
                     st.sampled_from([0, 0, EDGE, EDGE, EDGE, ONESHOT, EDGE | ONESHOT, EXCLUSIVE]))
counts = st.sampled_from([1, 8, 8, 100, 5000, 65536, 70000])
actions = st.one_of(
    st.tuples(st.just("write"), indices, counts), st.tuples(st.just("write"), indices, counts),
    st.tuples(st.just("read"), indices, counts), st.tuples(st.just("read"), indices, counts),
    st.tuples(st.just("add"), epolls, indices, interest), st.tuples(st.just("add"), epolls, indices, interest),
    st.tuples(st.just("modify"), epolls, indices, interest), st.tuples(st.just("remove"), epolls, indices),
    st.tuples(st.just("wait"), epolls, st.sampled_from([16, 16, 16, 1, 2])),
    st.tuples(st.just("wait"), epolls, st.sampled_from([16, 16, 16, 1, 2])),
    st.tuples(st.just("close"), indices), st.tuples(st.just("dup"), indices), st.tuples(st.just("poll")))
BEGIN = [("add", 0, 0, IN | EDGE), ("add", 0, 1, OUT | EDGE), ("add", 0, 2, IN), ("add", 0, 4, IN | OUT | EDGE),
         ("add", 1, 5, IN | OUT)]


@settings(max_examples=EXAMPLES, deadline=None)
@example([("dup", 0), ("add", 0, 6, IN | EXCLUSIVE), ("write", 1, 1)], True)     # told last
@given(st.lists(actions, min_size=10, max_size=40), st.booleans())
def test_events_are_those_of_the_host(found: list[tuple[Any, ...]], begun: bool) -> None:
    with contextlib.closing(Twice()) as twice:
        world = World(twice)
        for name, *arguments in (BEGIN if begun else []) + found:
            getattr(world, name)(*arguments)
        world.wait(0, 16)
        world.wait(1, 16)
        world.poll()


def test_what_is_refused(twice: Twice, tmp_path: Any) -> None:
    assert twice.new("epoll_create", 0) == "EINVAL"
    assert twice.new("epoll_create1", 1) == "EINVAL"
    epoll, other = twice.made("epoll_create1", os.O_CLOEXEC), twice.made("epoll_create", 5)
    twice.same("fcntl", epoll, 1, 0)
    twice.same("fcntl", epoll, 3, 0)
    counter = twice.made("eventfd2", 0, 0)
    twice.guest.call("mknod", b"/f", 0o100644, 0)
    (tmp_path / "f").touch()
    file = twice.keep(twice.guest.call("open", b"/f", 2, 0)[0], os.open(tmp_path / "f", os.O_RDWR))
    for arguments in ((epoll, ADD, file, event(IN, 0)), (epoll, ADD, epoll, event(IN, 0)),
                      (counter, ADD, epoll, bytes(12)), (epoll, ADD, 10000, bytes(12)),
                      (10000, ADD, counter, bytes(12)), (epoll, 7, counter, bytes(12)),
                      (epoll, MOD, counter, bytes(12)), (epoll, DEL, counter, 0), (epoll, ADD, counter, 8),
                      (epoll, ADD, counter, event(IN | EXCLUSIVE | ONESHOT, 0)),
                      (epoll, ADD, other, event(IN | EXCLUSIVE, 0)), (epoll, ADD, other, event(IN, 0)),
                      (other, ADD, epoll, event(IN, 0))):
        twice.same("epoll_ctl", *arguments)
    for arguments in ((epoll, Out(12), 0, 0), (epoll, Out(12), -1, 0), (counter, Out(12), 1, 0),
                      (10000, Out(12), 1, 0)):
        twice.same("epoll_wait", *arguments)


def test_how_deep_they_go(twice: Twice) -> None:
    epolls = [twice.made("epoll_create1", 0) for _ in range(8)]
    for inner, outer in itertools.pairwise(epolls):
        twice.same("epoll_ctl", outer, ADD, inner, event(IN, 0))
    counter = twice.made("eventfd2", 1, 0)
    twice.same("epoll_ctl", epolls[0], ADD, counter, event(IN, 7))
    twice.poll(*epolls)
    twice.same("epoll_ctl", epolls[0], ADD, epolls[7], event(IN, 0))


@pytest.fixture
def guest() -> Guest:
    found = Guest()
    found.now = 10**9
    return found


def test_who_waits_is_woken(guest: Guest) -> None:
    epoll, outer, counter = (guest.call(*each)[0] for each in (("epoll_create1", 0), ("epoll_create1", 0),
                                                              ("eventfd2", 0, 0)))
    guest.call("epoll_ctl", outer, ADD, epoll, event(IN, 5))
    with pytest.raises(Blocked) as blocked:
        guest.call("epoll_wait", outer, Out(12), 1, 1)
    assert blocked.value.deadline == guest.now + 10**6
    guest.take_notified()
    guest.call("write", counter, struct.pack("<Q", 1), 8, thread=guest.another(guest.thread.process, 2))
    assert not guest.take_notified() & set(blocked.value.on)
    guest.call("epoll_ctl", epoll, ADD, counter, event(IN, 6), thread=guest.thread.process.threads[1])
    assert guest.take_notified() & set(blocked.value.on)
    assert guest.call("epoll_wait", outer, Out(12), 1, 1) == (1, [event(IN, 5)])
    guest.call("read", counter, Out(8), 8)
    with pytest.raises(Blocked):
        guest.call("epoll_wait", outer, Out(12), 1, 1)
    guest.now += 10**6
    assert guest.call("epoll_wait", outer, Out(12), 1, 1)[0] == 0


@pytest.mark.parametrize("edge", [0, EDGE])
def test_a_timer_in_an_instance_in_another(guest: Guest, edge: int) -> None:
    assert guest.now is not None
    epoll, outer, timer = (guest.call(*each)[0] for each in (("epoll_create1", 0), ("epoll_create1", 0),
                                                            ("timerfd_create", 1, 0)))
    guest.call("epoll_ctl", epoll, ADD, timer, event(IN | edge, 5))
    guest.call("epoll_ctl", outer, ADD, epoll, event(IN, 6))
    with pytest.raises(Blocked) as blocked:
        guest.call("epoll_wait", outer, Out(12), 1, -1)
    assert blocked.value.deadline is None
    guest.take_notified()
    guest.call("timerfd_settime", timer, 0, struct.pack("<4q", 0, 10, 0, 100), 0)
    assert guest.take_notified() & set(blocked.value.on)
    with pytest.raises(Blocked) as blocked:
        guest.call("epoll_wait", outer, Out(12), 1, -1)
    assert blocked.value.deadline == guest.now + 100
    guest.now += 100
    assert guest.call("epoll_wait", outer, Out(12), 1, -1) == (1, [event(IN, 6)])
    assert guest.call("epoll_wait", epoll, Out(12), 1, -1) == (1, [event(IN, 5)])
    assert guest.call("epoll_wait", epoll, Out(12), 1, 0)[0] == (0 if edge else 1)
    guest.call("read", timer, Out(8), 8)
    assert guest.call("epoll_wait", epoll, Out(12), 1, 0)[0] == 0
    guest.now += 10
    assert guest.call("epoll_wait", epoll, Out(12), 1, -1) == (1, [event(IN, 5)])


def test_nothing_is_left_of_what_is_closed(guest: Guest) -> None:
    epoll, counter = guest.call("epoll_create1", 0)[0], guest.call("eventfd2", 1, 0)[0]
    guest.call("epoll_ctl", epoll, ADD, counter, event(IN, 5))
    child = guest.fork(2)
    guest.call("close", counter)
    assert guest.call("epoll_wait", epoll, Out(12), 1, 0)[0] == 1
    guest.call("close", counter, thread=child)
    assert guest.call("epoll_wait", epoll, Out(12), 1, 0)[0] == 0
    assert not guest.system.interests
    counter = guest.call("eventfd2", 1, 0)[0]
    guest.call("epoll_ctl", epoll, ADD, counter, event(IN, 5))
    assert guest.call("epoll_wait", epoll, Out(12), 1, 0, thread=child)[0] == 1
    guest.system.end_process(child.process, 0)
    guest.call("close", epoll)
    assert not guest.system.interests
