"""Counters and timers against the host's kernel, and timers against a clock that stands still."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twice import Guest, Out, Twice

from workers.linux.calls import Blocked

EXAMPLES = int(os.environ.get("EXAMPLES", "60"))
SECOND = 10**9
IN = 1


@pytest.fixture
def twice() -> Iterator[Twice]:
    with contextlib.closing(Twice()) as found:
        yield found


values = st.sampled_from([0, 1, 2, 1000, 2**63, 2**64 - 2, 2**64 - 1])
steps = st.one_of(st.tuples(st.just("write"), values), st.tuples(st.just("write"), values),
                  st.tuples(st.just("read"), st.sampled_from([8, 8, 8, 7, 0, 20])))


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.sampled_from([0, 1]), st.sampled_from([0, 3, 2**32 - 1]), st.lists(steps, max_size=12))
def test_counters_are_as_on_the_host(semaphore: int, first: int, found: list[tuple[Any, ...]]) -> None:
    with contextlib.closing(Twice()) as twice:
        fd = twice.made("eventfd2", first, os.O_NONBLOCK | semaphore)
        for name, value in found:
            if name == "write":
                twice.same("write", fd, struct.pack("<Q", value), 8)
            else:
                twice.same("read", fd, Out(24), value)
            twice.poll(fd)


def test_what_a_counter_is_not(twice: Twice) -> None:
    assert twice.new("eventfd2", 0, 8) == "EINVAL"
    fd = twice.made("eventfd2", 7, os.O_CLOEXEC | os.O_NONBLOCK)
    for name, arguments in (("fcntl", (1, 0)), ("fcntl", (3, 0)), ("write", (b"", 0)),
                            ("write", (bytes(7), 7)), ("ioctl", (0x541B, Out(4))), ("ftruncate", (0,))):
        twice.same(name, fd, *arguments)


def test_who_waits_for_a_counter_is_woken() -> None:
    guest = Guest()
    fd = guest.call("eventfd", 0)[0]
    with pytest.raises(Blocked) as blocked:
        guest.call("read", fd, Out(8), 8)
    guest.take_notified()
    guest.call("write", fd, struct.pack("<Q", 2**64 - 2), 8)
    assert guest.take_notified() & set(blocked.value.on)
    with pytest.raises(Blocked) as blocked:
        guest.call("write", fd, struct.pack("<Q", 1), 8)
    assert guest.call("read", fd, Out(8), 8)[0] == 8
    assert guest.take_notified() & set(blocked.value.on)


# --- timers ------------------------------------------------------------------------------------------------------


def spec(interval: int, value: int) -> bytes:
    return struct.pack("<4q", *divmod(interval, SECOND), *divmod(value, SECOND))


@pytest.mark.parametrize(("clock", "flags"), [(0, 0), (1, os.O_NONBLOCK), (7, os.O_CLOEXEC), (2, 0), (-1, 0), (1, 4)])
def test_what_timers_there_are(twice: Twice, clock: int, flags: int) -> None:
    fd = twice.new("timerfd_create", clock, flags)
    if not isinstance(fd, str):
        twice.same("fcntl", fd, 1, 0)
        twice.same("fcntl", fd, 3, 0)


@pytest.mark.parametrize(("flags", "new"), [
    (0, spec(0, 0)), (0, struct.pack("<4q", 0, SECOND, 1, 0)), (0, struct.pack("<4q", 0, 0, -1, 0)), (4, spec(0, 5)),
    (1, spec(0, 5)), (0, spec(0, 1)), (0, struct.pack("<4q", -1, 0, 0, 0))])
def test_timers_are_as_on_the_host(twice: Twice, flags: int, new: bytes) -> None:
    fd = twice.made("timerfd_create", 1, os.O_NONBLOCK)
    twice.same("timerfd_settime", fd, flags, new, Out(32))
    twice.same("read", fd, Out(8), 7)
    twice.same("write", fd, bytes(8), 8)
    twice.poll(fd)
    twice.same("read", fd, Out(8), 8)
    twice.same("read", fd, Out(8), 8)
    twice.same("timerfd_gettime", fd, Out(32))
    other = twice.made("eventfd2", 0, 0)
    twice.same("timerfd_settime", other, 0, new, 0)
    twice.same("timerfd_gettime", other, Out(32))


@pytest.fixture
def guest() -> Guest:
    found = Guest()
    found.now = 100 * SECOND
    return found


def current(guest: Guest, fd: int) -> tuple[int, int]:
    a, b, c, d = struct.unpack("<4q", guest.call("timerfd_gettime", fd, Out(32))[1][0])
    return a * SECOND + b, c * SECOND + d


def test_an_interval(guest: Guest) -> None:
    assert guest.now is not None
    fd = guest.call("timerfd_create", 1, 0)[0]
    guest.call("timerfd_settime", fd, 0, spec(10, 25), 0)
    with pytest.raises(Blocked) as blocked:
        guest.call("read", fd, Out(8), 8)
    assert blocked.value.deadline == guest.now + 25
    assert current(guest, fd) == (10, 25)
    guest.now += 25
    assert guest.call("read", fd, Out(8), 8)[1] == [struct.pack("<Q", 1)]
    guest.now += 35
    assert current(guest, fd) == (10, 5)
    assert guest.call("read", fd, Out(8), 8)[1] == [struct.pack("<Q", 3)]
    _, (before,) = guest.call("timerfd_settime", fd, 1, spec(0, guest.now + 3), Out(32))
    assert before == spec(10, 5)
    guest.now += 3
    assert current(guest, fd) == (0, 0)
    assert guest.call("read", fd, Out(8), 8)[1] == [struct.pack("<Q", 1)]
    with pytest.raises(Blocked) as blocked:
        guest.call("read", fd, Out(8), 8)
    assert blocked.value.deadline is None
    guest.take_notified()
    guest.call("timerfd_settime", fd, 0, spec(0, 1), 0)
    assert guest.take_notified() & set(blocked.value.on)


@pytest.mark.parametrize("name", ["poll", "select"])
def test_waiting_for_a_timer_ends_in_time(guest: Guest, name: str) -> None:
    assert guest.now is not None
    fd = guest.call("timerfd_create", 1, 0)[0]
    guest.call("timerfd_settime", fd, 0, spec(0, 50), 0)

    def wait(milliseconds: int) -> int:
        if name == "poll":
            return guest.call("poll", struct.pack("<iHH", fd, IN, 0), 1, milliseconds)[0]
        return guest.call("select", fd + 1, struct.pack("<Q", 1 << fd).ljust(128, b"\0"), 0, 0,
                          struct.pack("<qq", 0, milliseconds * 1000) if milliseconds >= 0 else 0)[0]

    for milliseconds in (-1, 1):
        with pytest.raises(Blocked) as blocked:
            wait(milliseconds)
        assert blocked.value.deadline == guest.now + 50
        guest.system.give_up(guest.thread)
    guest.now += 50
    assert wait(-1) == 1


# --- timers that send a signal (timer_create) -----------------------------------------------------------------------

USR2, WAITS = 12, 1 << 11


@pytest.fixture
def timer(guest: Guest) -> int:
    """Of SIGUSR2, which is blocked."""
    guest.call("rt_sigprocmask", 0, struct.pack("<Q", WAITS), 0, 8)
    event = struct.pack("<Qii", 77, USR2, 0).ljust(64, b"\0")
    return int.from_bytes(guest.call("timer_create", 1, event, Out(4))[1][0], "little")


def pass_time(guest: Guest, length: int) -> None:
    assert guest.now is not None
    guest.now += length
    guest.system.expire()


def taken(guest: Guest) -> tuple[int, ...]:
    """(signal, its timer, overrun, value) of the one that is pending."""
    number, (info,) = guest.call("rt_sigtimedwait", struct.pack("<Q", WAITS), Out(128), bytes(16), 8)
    return number, *struct.unpack_from("<iiQ", info, 16)


def overrun(guest: Guest, timer: int) -> int:
    return guest.call("timer_getoverrun", timer)[0]


def test_an_overrun_is_that_of_the_last_signal_taken(guest: Guest, timer: int) -> None:
    guest.call("timer_settime", timer, 0, spec(10, 10), 0)
    pass_time(guest, 10)
    assert guest.system.next_timer() is None    # nothing is done for it until its signal is taken
    pass_time(guest, 25)
    guest.now = (guest.now or 0) + 10
    assert guest.call("timer_gettime", timer, Out(32))[1] == [spec(10, 5)]
    assert overrun(guest, timer) == 0
    assert taken(guest) == (USR2, timer, 3, 77)
    assert guest.system.next_timer() == guest.now + 5
    pass_time(guest, 25)
    assert overrun(guest, timer) == 3           # though another is pending by now
    assert taken(guest) == (USR2, timer, 2, 77)
    assert overrun(guest, timer) == 2
    guest.call("timer_settime", timer, 0, spec(0, 1), 0)
    assert overrun(guest, timer) == 0
    pass_time(guest, 1)
    assert taken(guest) == (USR2, timer, 0, 77)
    pass_time(guest, 1000)
    with pytest.raises(OSError, match="unavailable"):
        taken(guest)


def test_a_timer_goes_on_after_its_signal_was_ignored(guest: Guest, timer: int) -> None:
    ignore, default = (struct.pack("<4Q", handler, 0, 0, 0) for handler in (1, 0))
    guest.call("timer_settime", timer, 0, spec(10, 10), 0)
    pass_time(guest, 10)
    guest.call("rt_sigaction", USR2, ignore, 0, 8)
    guest.call("rt_sigaction", USR2, default, 0, 8)
    with pytest.raises(OSError, match="unavailable"):
        taken(guest)
    pass_time(guest, 10)
    assert taken(guest)[:2] == (USR2, timer)
    guest.call("timer_delete", timer)
    pass_time(guest, 10)
    with pytest.raises(OSError, match="unavailable"):
        taken(guest)


def test_an_alarm_that_is_late_does_not_put_off_those_to_come(guest: Guest) -> None:
    assert guest.now is not None
    start = guest.now
    guest.call("setitimer", 0, struct.pack("<4q", 0, 10, 0, 10), 0)
    pass_time(guest, 47_000)
    assert guest.system.next_timer() == start + 50_000
