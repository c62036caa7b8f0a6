"""What is shown of programs from outside: mappings, the pages of them that were dirtied, and calls as they are made."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
from system import FIRST, System
from twice import Guest

from workers.linux.abi import number_of
from workers.linux.arguments import Shown
from workers.linux.blocked import Again, Blocked, Ended
from workers.linux.processes import Thread
from workers.linux.space import PAGE
from workers.linux.survey import Dirtied, survey
from workers.linux.tracing import Tracer

READ, WRITE = 1, 2


def bits(frames: Sequence[int], count: int = 4096) -> bytes:
    found = bytearray(-(-count // 64) * 8)
    for frame in frames:
        found[(frame - FIRST) // 8] |= 1 << (frame - FIRST) % 8
    return bytes(found)


# --- mappings ------------------------------------------------------------------------------------------------------


def test_what_was_dirtied_is_counted_where_it_is_and_else_is_nobodys() -> None:
    chosen = random.Random(1)
    frames = sorted(chosen.sample(range(FIRST, FIRST + 1000), 300))
    mine, other = set(chosen.sample(range(FIRST, FIRST + 1000), 400)), set(chosen.sample(range(FIRST, FIRST + 1000), 9))
    dirtied = Dirtied(FIRST, 1000, bits(frames, 1000))
    assert dirtied.flags.count(1) == 300
    assert dirtied.count(sorted(mine)) == len(mine.intersection(frames))
    assert dirtied.count(sorted(other)) == len(other.intersection(frames))     # of two, it is counted twice
    assert dirtied.of_nobody() == [frame for frame in frames if frame not in mine | other]


def test_frames_are_those_of_the_mapping_that_have_been_touched() -> None:
    system = System()
    at = system.space.map(0, 40 * PAGE, READ | WRITE)
    other = system.space.map(0, PAGE, READ | WRITE, shared=True)        # not more of the same
    mapping = system.space.find(at // PAGE)
    assert mapping is not None
    assert system.space.frames_of(mapping) == []
    system.space.own(at)
    system.space.own(at + 39 * PAGE)
    system.space.own(other)
    mapping = system.space.find(at // PAGE)
    assert mapping is not None
    found = system.space.frames_of(mapping)
    assert [system.space.place_of(at)[0], system.space.place_of(at + 39 * PAGE)[0]] == [found[0], found[-1]]
    assert len(found) == system.space.resident(mapping)


def test_processes_have_their_threads_and_mappings_with_what_was_dirtied() -> None:
    guest = Guest()
    process = guest.thread.process
    process.name, guest.thread.name = b"shell", b"sh\xffell"
    worker = guest.another(process, 7)
    space = process.space
    space.set_heap(0x5000)
    space.set_break(0x5000 * PAGE + 8 * PAGE)
    shared = space.map(0, 4 * PAGE, READ, shared=True)
    for address in (0x5000 * PAGE, 0x5003 * PAGE):
        space.own(address)
    space.read(shared, 4 * PAGE)
    kept = [frame for first, count in guest.pool.take(3) for frame in range(first, first + count)]     # of a file
    free, = guest.pool.take(1)
    guest.pool.give(guest.pool.drop([free[0]]))
    heap = [space.place_of(page * PAGE)[0] for page in (0x5000, 0x5003)]
    dirtied = Dirtied(FIRST, 4096, bits([*heap, space.place_of(shared)[0], *kept, free[0]]))
    zombie = guest.process(9)
    zombie.code = 0
    found = survey(guest.system, {guest.thread: 0}, dirtied)
    shown, = found["processes"]
    assert (shown["pid"], shown["name"]) == (1, "shell")
    assert shown["threads"] == [{"tid": 1, "name": "sh\\xffell", "vcpu": 0},
                                {"tid": worker.tid, "name": "", "vcpu": None}]
    by_start = {each["start"]: each for each in shown["mappings"]}
    assert by_start[0x5000 * PAGE] == {"start": 0x5000 * PAGE, "end": 0x5008 * PAGE, "rights": "rw-p", "what": "[heap]",
                                       "resident_pages": 2, "dirty_pages": 2}
    assert by_start[shared] | {"resident_pages": 4} == {
        "start": shared, "end": shared + 4 * PAGE, "rights": "r--s", "what": "anonymous", "resident_pages": 4,
        "dirty_pages": 1}
    assert (found["dirty_pages"], found["cached_pages"], found["free_pages"]) == (7, 3, 1)
    assert "dirty_pages" not in survey(guest.system, {})["processes"][0]["mappings"][0]


def test_a_page_that_two_processes_have_is_of_both_until_one_writes_to_it() -> None:
    system = System()
    at = system.space.map(0, PAGE, READ | WRITE)
    system.space.own(at)
    child = system.space.fork()
    frame = system.space.place_of(at)[0]
    for space in (system.space, child):
        assert Dirtied(FIRST, 96, bits([frame], 96)).count(space.frames_of(space.mappings[0])) == 1
    child.own(at)
    counted = [Dirtied(FIRST, 96, bits([frame], 96)).count(each.frames_of(each.mappings[0]))
               for each in (system.space, child)]
    assert counted == [1, 0]


def test_a_file_is_shown_by_what_it_is_called() -> None:
    guest = Guest()
    fd, _ = guest.call("open", b"/tmp/named", 0o102, 0o600)
    guest.call("write", fd, b"x" * 5000, 5000)
    at, _ = guest.call("mmap", 0, 2 * PAGE, READ, 1, fd, 0)
    found = {each["start"]: each["what"] for each in survey(guest.system, {})["processes"][0]["mappings"]}
    assert found[at] == "/tmp/named"


def test_many_pages_are_counted_at_once() -> None:
    """What takes long would stop the programs."""
    system = System(frames=65536, tables=200)
    at = system.space.map(0, 65000 * PAGE, READ | WRITE)
    for page in range(0, 65000, 16):
        system.space.fault(at + page * PAGE, 0)
    dirtied, best = Dirtied(FIRST, 65536, b"\x11" * 8192), 1.0
    for _ in range(3):
        began = time.process_time()
        assert dirtied.count(system.space.frames_of(system.space.mappings[0])) > 10000
        best = min(best, time.process_time() - began)
    assert best < 0.1


# --- calls ---------------------------------------------------------------------------------------------------------


def shown(guest: Guest, name: str, arguments: Sequence[int], result: int | None = 0) -> str:
    call = Shown(guest.thread.process.space, number_of(name), [*arguments, *[0] * (6 - len(arguments))])
    return f"{call.name}({call.arguments(guest.thread.process.space, result)}) = {call.result(result)}"


def test_arguments_are_shown_as_strace_does() -> None:
    guest = Guest()
    space, at = guest.thread.process.space, guest.scratch
    space.write(at, b"/etc/\"x\"\n\0\xff")
    space.write(at + PAGE, b"".join(each.to_bytes(8, "little") for each in (at, at, 0)))
    path = '"/etc/\\"x\\"\\n"'
    minus = (1 << 64) - 1
    assert shown(guest, "openat", [(1 << 32) - 100, at, 0x80000], -errno.ENOENT) == (
        f"openat(AT_FDCWD, {path}, 0x80000, 0) = -1 ENOENT (No such file or directory)")
    assert shown(guest, "chmod", [at, 0o644]) == f"chmod({path}, 0644) = 0"
    assert shown(guest, "execve", [at, at + PAGE, 0]) == f"execve({path}, [{path}, {path}], NULL) = 0"
    assert shown(guest, "write", [1, at, 5], 5) == 'write(1, "/etc/", 5) = 5'
    assert shown(guest, "write", [1, at, 50], -errno.EBADF) == (
        'write(1, "/etc/\\"x\\"\\n\\0\\377' + "\\0" * 21 + '"..., 50) = -1 EBADF (Bad file descriptor)')
    assert shown(guest, "read", [0, at, 4096], 4) == 'read(0, "/etc", 4096) = 4'
    assert shown(guest, "read", [0, at, 4096], -errno.EAGAIN).startswith(f"read(0, {at:#x}, 4096) = -1 EAGAIN")
    assert shown(guest, "lseek", [3, minus, 1]).startswith("lseek(3, -1, 1)")
    assert shown(guest, "brk", [0], 0x5000) == "brk(NULL) = 0x5000"
    assert shown(guest, "unlink", [8], -errno.EFAULT) == "unlink(0x8) = -1 EFAULT (Bad address)"
    assert shown(guest, "exit_group", [3], None) == "exit_group(3) = ?"
    assert shown(guest, "ptrace", [1, 2]) == "ptrace(0x1, 0x2, 0x0, 0x0, 0x0, 0x0) = 0"


class Traced:
    """A tracer of calls that end as they are told."""

    def __init__(self, kept: int = 100) -> None:
        self.guest, self.time, self.ends = Guest(), 100.0, [0]
        self.tracer = Tracer(self._call, lambda: self.time, kept)

    def _call(self, thread: Thread, number: int, arguments: Sequence[int]) -> int:
        self.time += 0.25
        end: Any = self.ends.pop(0) if len(self.ends) > 1 else self.ends[0]
        if isinstance(end, Exception):
            raise end
        return int(end)

    def make(self, name: str = "close", argument: int = 3) -> int:
        return self.tracer.call(self.guest.thread, number_of(name), [argument, 0, 0, 0, 0, 0])

    def ask(self, client: str = "me", after: int = -1, *, on: bool = True) -> dict[str, Any]:
        return self.tracer.ask(client, on, after)


def test_calls_are_given_once_each_with_their_time() -> None:
    traced = Traced()
    assert not traced.tracer.wanted
    began = traced.ask()
    assert traced.tracer.wanted
    assert began == {"calls": [], "next": 0, "more": False, "lost": 0, "stopped": False}
    traced.ends = [-errno.EBADF]
    traced.make()
    found = traced.ask(after=0)
    assert found["calls"] == [{"pid": 1, "tid": 1, "name": "close", "arguments": "3", "error": "EBADF", "seconds": 0.25,
                               "result": "-1 EBADF (Bad file descriptor)", "at": 100.25}]
    assert not traced.ask(after=found["next"])["calls"]
    assert traced.ask(after=0)["calls"] == found["calls"]       # an answer that was lost is given again


def test_a_call_that_is_blocked_is_one_call() -> None:
    traced = Traced()
    traced.ask()
    traced.ends = [Blocked(), Blocked(), 7]
    for _ in range(2):
        with pytest.raises(Blocked):
            traced.make()
    assert traced.make() == 7
    call, = traced.ask(after=0)["calls"]
    assert (call["result"], call["seconds"]) == ("7", 0.75)


def test_what_ends_a_call_otherwise() -> None:
    traced = Traced()
    traced.ask()
    thread = traced.guest.thread
    traced.tracer.over(thread, None)            # in none
    traced.ends = [Again()]
    with pytest.raises(Again):
        traced.make()
    assert not traced.ask(after=0)["calls"]
    traced.ends = [Ended()]
    with pytest.raises(Ended):
        traced.make("exit")
    for result, again in ((-errno.EINTR, False), (-errno.EINTR, True), (None, False)):      # by a signal; by its end
        traced.ends = [Blocked()]
        with pytest.raises(Blocked):
            traced.make()
        traced.tracer.over(thread, result, again=again)
    assert [call["result"] for call in traced.ask(after=0)["calls"]] == [
        "?", "-1 EINTR (Interrupted system call)", "? ERESTARTSYS", "?"]


def test_what_came_too_fast_is_counted() -> None:
    traced = Traced(kept=10)
    traced.ask()
    for number in range(25):
        traced.make(argument=number)
        traced.ask("other")         # keeps it on
    found = traced.ask(after=4)
    assert (found["lost"], found["next"]) == (11, 25)
    assert [call["arguments"] for call in found["calls"]] == [str(number) for number in range(15, 25)]


def test_it_stops_when_nobody_has_asked_for_a_while() -> None:
    traced = Traced()
    traced.ask("a")
    traced.ask("b")
    traced.time += 1.5
    assert traced.ask("b", 0) == {"calls": [], "next": 0, "more": False, "lost": 0, "stopped": False}
    traced.time += 1.5
    assert traced.tracer.wanted
    assert traced.ask("a", 0)["stopped"]        # it does not know what has happened meanwhile
    assert not traced.ask("a", 0)["stopped"]
    traced.ask("a", 0, on=False)
    assert traced.tracer.wanted
    traced.time += 1.0
    assert not traced.tracer.wanted
    traced.ask("a", 0)
    traced.ask("a", 0, on=False)
    assert not traced.tracer.wanted
