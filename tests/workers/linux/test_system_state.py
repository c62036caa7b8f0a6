"""The state of a system: it goes on from what was saved as if nothing had been, whatever was going on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from kept import FRAMES, SECOND, Launcher, Machine, difference, new_tables, packed
from system import FIRST, Ram
from twice import Console, Out

from ipc.forwarding import COUNT, PIPES, Kind, Link, open_outside
from workers.linux.forward import Forwarding
from workers.linux.frames import Frames
from workers.linux.processes import Thread
from workers.linux.signals import SignalInfo
from workers.linux.sources import HostTree
from workers.linux.space import PAGE, Beginning, SegmentationFault
from workers.linux.system import System
from workers.state import StateError

CREATE = os.O_CREAT | os.O_RDWR
HANDLER = struct.pack("<QQQQ", 0x1234, 0, 0, 0)
CLONE_VM, CLONE_FILES, CLONE_THREAD, CLONE_VFORK = 0x100, 0x400, 0x10000, 0x4000


@pytest.fixture
def machine() -> Machine:
    return Machine()


def pair(machine: Machine, name: str, *arguments: int, tid: int = 1) -> tuple[int, int]:
    (_, (numbers,)) = machine.call(name, *arguments, tid=tid)
    one, other = struct.unpack("<ii", numbers)
    return one, other


def unix(path: bytes) -> bytes:
    return struct.pack("<H", socket.AF_UNIX) + path


def inet(port: int) -> bytes:
    return struct.pack("<H", socket.AF_INET) + port.to_bytes(2, "big") + b"\x7f\0\0\1" + bytes(8)


# --- one by one --------------------------------------------------------------------------------------------------


def test_of_another_version(machine: Machine) -> None:
    for wrong in (machine.system.save() | {"version": 99}, {}, None, [1]):
        with pytest.raises(StateError, match="version"):
            load(wrong)


@pytest.mark.parametrize("change", [
    lambda saved: saved.pop("pipes"), lambda saved: saved["processes"][0].update(space=7),
    lambda saved: saved["spaces"][0]["pages"].append([1 << 40, FIRST, 1, 0]),
    lambda saved: saved["spaces"][0]["mappings"][-1].__setitem__(1, 1 << 36),
    lambda saved: saved["spaces"][0]["mappings"].reverse(),
    lambda saved: saved["spaces"][0]["pages"][0].__setitem__(1, FIRST + FRAMES), lambda saved: saved["vdso"].append(0),
    lambda saved: saved.update(random=b"1"), lambda saved: saved["files"].update(root=12345),
    lambda saved: saved.update(network={}), lambda saved: saved["open"].append({"kind": "other"})])
def test_what_is_no_state(machine: Machine, change: Any) -> None:
    machine.call("pipe2", Out(8), 0)
    saved = packed(machine.system.save())
    change(saved)
    with pytest.raises(StateError, match="not a valid state"):
        load(saved)


def load(saved: Any) -> System:
    return System.load(saved, Ram(), Frames(FIRST, FRAMES), new_tables(), Console(), realtime=lambda: 0,
                       monotonic=lambda: 0)


def test_nothing_has_happened_yet(machine: Machine) -> None:
    machine.journey()
    assert machine.call("getpid") == (1, [])


def test_contents_and_positions(machine: Machine) -> None:
    fd, _ = machine.call("open", b"/tmp/file\0", CREATE, 0o644)
    machine.call("write", fd, b"some text", 9)
    other, _ = machine.call("dup", fd)
    third, _ = machine.call("open", b"/tmp/file\0", os.O_RDONLY)
    machine.call("lseek", fd, 5, os.SEEK_SET)
    machine.journey()
    assert machine.call("read", other, Out(4), 4) == (4, [b"text"])
    assert machine.call("lseek", fd, 0, os.SEEK_CUR)[0] == 9
    assert machine.call("lseek", third, 0, os.SEEK_CUR)[0] == 0


def test_times_that_are_far_away(machine: Machine) -> None:
    """As many nanoseconds are no number of 64 bits."""
    fd, _ = machine.call("open", b"/tmp/file\0", CREATE, 0o644)
    for seconds in (-(1 << 63), (1 << 63) - 1, 0, -1):
        machine.call("utimensat", fd, 0, struct.pack("<4q", seconds, 999_999_999, 1, 0), 0)
        before = machine.call("fstat", fd, Out(144))
        machine.journey()
        assert machine.call("fstat", fd, Out(144)) == before


def test_what_lasts_for_ever(machine: Machine) -> None:
    forever = struct.pack("<qq", (1 << 63) - 1, 0)
    timer, _ = machine.call("timerfd_create", 1, 0)
    machine.call("timerfd_settime", timer, 0, forever + forever, 0)
    machine.call("setitimer", 0, forever + forever, 0)
    one, _ = pair(machine, "socketpair", socket.AF_UNIX, socket.SOCK_STREAM, 0, Out(8))
    machine.call("setsockopt", one, socket.SOL_SOCKET, socket.SO_RCVTIMEO, forever, 16)
    assert machine.call("nanosleep", forever, 0)[0] == "blocked"
    machine.journey(ahead=-500 * SECOND)
    assert machine.call("nanosleep", forever, 0)[0] == "blocked"


def test_timers_of_a_process(machine: Machine) -> None:
    kept = Out(4)
    assert machine.call("timer_create", 0, struct.pack("<Qiii44x", 5, 34, 0, 0), kept)[0] == 0
    assert machine.call("timer_settime", 0, 0, struct.pack("<4q", 2, 0, 3, 0), 0)[0] == 0
    machine.pass_time(SECOND)
    machine.journey(ahead=-500 * SECOND)
    assert machine.call("timer_gettime", 0, Out(32)) == (0, [struct.pack("<4q", 2, 0, 2, 0)])
    assert machine.system.next_timer() == machine.system.monotonic() + 2 * SECOND
    assert machine.call("timer_create", 1, 0, kept) == (0, [struct.pack("<i", 1)])


@pytest.mark.parametrize("ahead", [-900 * SECOND, 0, 10**15])
def test_time_goes_on(machine: Machine, ahead: int) -> None:
    timer, _ = machine.call("timerfd_create", 1, os.O_NONBLOCK)
    machine.call("timerfd_settime", timer, 0, struct.pack("<4q", 0, 0, 5, 0), 0)
    machine.call("alarm", 7)
    assert machine.call("nanosleep", struct.pack("<qq", 9, 0), 0) == ("blocked", 9 * SECOND)
    before = machine.system.monotonic()
    machine.pass_time(2 * SECOND)
    machine.journey(ahead)
    machine.pass_time(2 * SECOND)
    assert machine.system.monotonic() == before + 4 * SECOND
    assert machine.call("nanosleep", struct.pack("<qq", 9, 0), 0) == ("blocked", 5 * SECOND)
    assert machine.call("read", timer, Out(8), 8) == "EAGAIN"
    assert machine.system.next_timer() == before + 7 * SECOND
    machine.pass_time(SECOND)
    assert machine.call("read", timer, Out(8), 8) == (8, [struct.pack("<Q", 1)])
    machine.pass_time(2 * SECOND)
    assert [each.number for each in machine.thread.process.pending] == [signal.SIGALRM]


def test_names_of_what_has_gone(machine: Machine) -> None:
    machine.call("mkdir", b"/tmp/a\0", 0o755)
    machine.call("mkdir", b"/tmp/a/b\0", 0o755)
    fd, _ = machine.call("open", b"/tmp/a/b/file\0", CREATE, 0o644)
    other, _ = machine.call("open", b"/tmp/kept\0", CREATE, 0o644)
    third, _ = machine.call("memfd_create", b"name\0", 0)
    machine.call("link", b"/tmp/kept\0", b"/tmp/first\0")
    machine.call("unlink", b"/tmp/first\0")
    machine.call("unlink", b"/tmp/a/b/file\0")
    machine.call("rmdir", b"/tmp/a/b\0")
    machine.call("rmdir", b"/tmp/a\0")
    machine.call("mkdir", b"/tmp/a\0", 0o755)
    before = [machine.call("readlink", b"/proc/self/fd/%d\0" % each, Out(64), 64) for each in (fd, other, third)]
    assert before[0][1][0].startswith(b"/tmp/a/b/file (deleted)")
    for _ in range(2):
        machine.journey()
        assert before == [machine.call("readlink", b"/proc/self/fd/%d\0" % each, Out(64), 64)
                          for each in (fd, other, third)]


def test_what_is_made_when_somebody_looks(machine: Machine) -> None:
    child, _ = machine.call("fork")
    status, _ = machine.call("open", b"/proc/%d/status\0" % child, os.O_RDONLY)
    maps, _ = machine.call("open", b"/proc/self/maps\0", os.O_RDONLY)
    mine, _ = machine.call("open", b"/proc/self/task/1\0", os.O_RDONLY)
    link, _ = machine.call("open", b"/proc/self/exe\0", os.O_PATH | os.O_NOFOLLOW)
    machine.call("chdir", b"/proc/%d\0" % child)
    machine.call("read", status, Out(5), 5)
    boot = machine.call("open", b"/proc/sys/kernel/random/boot_id\0", os.O_RDONLY)[0]
    identity = machine.call("read", boot, Out(40), 40)
    rest = machine.call("pread64", status, Out(2000), 2000, 5)
    directory, _ = machine.call("open", b".\0", os.O_RDONLY)
    machine.call("fchdir", directory)
    machine.call("fchmod", directory, 0o700)
    machine.journey()
    assert machine.thread.process.directory is machine.thread.process.files.get(directory).inode
    assert machine.call("stat", b".\0", Out(144)) == machine.call("fstat", directory, Out(144))
    assert machine.call("read", status, Out(2000), 2000) == rest
    assert machine.call("pread64", boot, Out(40), 40, 0) == identity
    assert machine.call("getcwd", Out(40), 40)[1][0].rstrip(b"\0") == b"/proc/%d" % child
    assert machine.call("openat", mine, b"status\0", os.O_RDONLY)[0] > 0
    assert machine.call("read", maps, Out(4), 4)[0] == 4
    assert machine.call("fstat", link, Out(144))[0] == 0
    machine.call("exit_group", 3, tid=child)
    assert machine.call("pread64", status, Out(200), 200, 0)[0] == 200      # a zombie
    machine.call("wait4", -1, 0, 0, 0)
    rest = machine.call("pread64", status, Out(2000), 20, 6)
    for _ in range(3):
        assert machine.call("pread64", status, Out(200), 200, 0) == "ESRCH"
        assert machine.call("open", b"status\0", os.O_RDONLY) == "ENOENT"
        assert machine.call("pread64", status, Out(2000), 20, 6) == rest
        machine.journey()


def test_a_program_that_was_removed(machine: Machine) -> None:
    """It is known as long as it runs, also where nothing of it is mapped."""
    space, files = machine.thread.process.space, machine.system.files
    fd, _ = machine.call("open", b"/tmp/program\0", CREATE, 0o755)
    machine.call("write", fd, b"code", 4)
    inode = files.find(files.root, b"/tmp/program")
    space.begin(Beginning(inode, b"auxiliary", (1, 2), (2, 3), 4))      # type: ignore[arg-type]
    child, _ = machine.call("fork")
    machine.call("close", fd)
    machine.call("unlink", b"/tmp/program\0")
    machine.journey()
    for tid in (1, child):
        fd, _ = machine.call("open", b"/proc/self/exe\0", os.O_RDONLY, tid=tid)
        assert machine.call("read", fd, Out(4), 4, tid=tid) == (4, [b"code"])
        machine.call("close", fd, tid=tid)
    machine.call("exit_group", 0, tid=child)
    machine.journey()
    assert inode.number in machine.system.files.store.inodes
    stat_, _ = machine.call("open", b"/proc/%d/stat\0" % child, os.O_RDONLY)
    before = machine.call("pread64", stat_, Out(400), 400, 0)
    machine.journey()
    assert machine.call("pread64", stat_, Out(400), 400, 0) == before
    machine.system.processes[1].space.close()
    assert inode.number not in machine.system.files.store.inodes


def test_descriptors_on_their_way(machine: Machine) -> None:
    """Of a socket that only a message has, and that has one itself."""
    one, other = pair(machine, "socketpair", socket.AF_UNIX, socket.SOCK_STREAM, 0, Out(8))
    inner, outer = pair(machine, "socketpair", socket.AF_UNIX, socket.SOCK_DGRAM, 0, Out(8))
    reading, writing = pair(machine, "pipe2", Out(8), 0)
    machine.call("write", writing, b"through", 7)
    send(machine, inner, b"y", reading)
    send(machine, one, b"x", outer)
    for each in (outer, reading, inner, writing):
        machine.call("close", each)
    machine.journey()
    found, = receive(machine, other)
    last, = receive(machine, found)
    machine.journey()
    assert machine.call("read", last, Out(10), 10)[0] == 7
    assert machine.call("read", last, Out(10), 10)[0] == 0


def send(machine: Machine, fd: int, data: bytes, *rights: int, tid: int = 1) -> Any:
    base = machine.scratch + 20 * PAGE
    space = machine.system.threads[tid].process.space
    control = struct.pack(f"<Qii{len(rights)}i", 16 + 4 * len(rights), 1, 1, *rights) if rights else b""
    try:
        space.write(base, data)
        space.write(base + PAGE, struct.pack("<QQ", base, len(data)) + control)
        space.write(base + 2 * PAGE, struct.pack("<QI4xQQQQi4x", 0, 0, base + PAGE, 1, base + PAGE + 16, len(control),
                                                 0))
    except SegmentationFault:
        return "no memory"
    return machine.make(machine.system.threads[tid], "sendmsg", [fd, base + 2 * PAGE, socket.MSG_DONTWAIT])


def receive(machine: Machine, fd: int, tid: int = 1, flags: int = socket.MSG_DONTWAIT) -> Any:
    """The descriptors that came along, or what it gives instead."""
    base = machine.scratch + 20 * PAGE
    space = machine.system.threads[tid].process.space
    try:
        space.write(base + PAGE, struct.pack("<QQ", base, 50).ljust(500, b"\0"))
        space.write(base + 2 * PAGE, struct.pack("<QI4xQQQQi4x", 0, 0, base + PAGE, 1, base + PAGE + 16, 100, 0))
        result = machine.make(machine.system.threads[tid], "recvmsg", [fd, base + 2 * PAGE, flags])
        if not isinstance(result, int) or result < 0:
            return result
        given, = struct.unpack("<Q", space.read(base + 2 * PAGE + 40, 8))
        size, = struct.unpack("<Q", space.read(base + PAGE + 16, 8)) if given else (16,)
        count = (size - 16) // 4
        return struct.unpack(f"<{count}i", space.read(base + PAGE + 32, 4 * count))
    except SegmentationFault:
        return "no memory"


def test_connections_that_nobody_has_accepted(machine: Machine) -> None:
    for listens, address in ((socket.AF_UNIX, unix(b"\0name")), (socket.AF_UNIX, unix(b"/tmp/socket")),
                             (socket.AF_INET, inet(80))):
        listener, _ = machine.call("socket", listens, socket.SOCK_STREAM, 0)
        machine.call("bind", listener, address, len(address))
        machine.call("listen", listener, 5)
        client, _ = machine.call("socket", listens, socket.SOCK_STREAM, 0)
        assert machine.call("connect", client, address, len(address)) == (0, [])
        machine.call("write", client, b"hello", 5)
        machine.journey()
        again, _ = machine.call("socket", listens, socket.SOCK_STREAM, 0)
        assert machine.call("connect", again, address, len(address))[0] == 0
        made, _ = machine.call("accept4", listener, 0, 0, 0)
        assert machine.call("read", made, Out(5), 5) == (5, [b"hello"])
        machine.call("close", client)
        machine.journey()
        assert machine.call("read", made, Out(5), 5)[0] == 0
        machine.call("close", made)
        machine.journey()


def test_epoll(machine: Machine) -> None:
    """Two instances, one in the other; edges are told once."""
    inner, outer = (machine.call("epoll_create1", 0)[0] for _ in range(2))
    reading, writing = pair(machine, "pipe2", Out(8), 0)
    counter, _ = machine.call("eventfd2", 0, 0)
    edge, oneshot = 1 << 31, 1 << 30
    for epoll, fd, events in ((inner, reading, 1 | edge), (inner, counter, 1 | oneshot), (outer, inner, 1),
                              (outer, reading, 1)):
        assert machine.call("epoll_ctl", epoll, 1, fd, struct.pack("<IQ", events, fd)) == (0, [])
    machine.call("write", writing, b"x", 1)
    machine.call("write", counter, struct.pack("<Q", 2), 8)
    machine.journey()
    assert wait(machine, outer) == [(1, reading), (1, inner)]
    assert wait(machine, inner) == [(1, reading), (1, counter)]
    machine.journey()
    assert wait(machine, inner) == []
    machine.call("write", writing, b"x", 1)
    machine.journey()
    assert wait(machine, inner) == [(1, reading)]
    machine.call("close", reading)
    machine.journey()
    assert machine.call("epoll_ctl", outer, 3, inner, struct.pack("<IQ", 1, 0)) == (0, [])


def wait(machine: Machine, epoll: int, tid: int = 1) -> Any:
    found = machine.call("epoll_wait", epoll, Out(120), 10, 0, tid=tid)
    if not isinstance(found, tuple) or not isinstance(found[0], int):
        return found
    return list(struct.iter_unpack("<IQ", found[1][0]))[:found[0]]


def test_after_the_end(machine: Machine) -> None:
    machine.call("fork")
    machine.call("pipe2", Out(8), 0)
    assert machine.call("exit_group", 7) == "ended"
    machine.journey()
    assert machine.system.code == 7 << 8
    assert not machine.system.threads


@pytest.fixture
def running() -> Iterator[Machine]:
    """A program of the host, in the host's own root."""
    with contextlib.closing(HostTree("/")) as tree:
        yield Machine(frames=2000, tree=tree, program=os.fsencode(os.path.realpath("/bin/cat")))


def elsewhere(machine: Machine, trees: dict[str, Any]) -> System:
    """With these files of the host."""
    return System.load(packed(machine.system.save()), machine.ram, Frames(FIRST, machine.count), new_tables(),
                       Console(), realtime=lambda: 0, monotonic=lambda: 0, sources=trees)


def test_files_that_are_others(tmp_path: Path) -> None:
    """What has been read in part is there, or else it is said which file is not."""
    with contextlib.ExitStack() as stack:
        trees = []
        for pages in (100, 99, 1):
            (tmp_path / str(pages)).mkdir()
            (tmp_path / str(pages) / "file").write_bytes(b"x" * pages * PAGE)
            trees.append(stack.enter_context(contextlib.closing(HostTree(tmp_path / str(pages)))))
        machine = Machine(tree=trees[0])
        elsewhere(machine, {})
        fd, _ = machine.call("open", b"/file\0", os.O_RDONLY)
        machine.call("pread64", fd, Out(8), 8, 0)
        for there in ({}, {"root": trees[1]}, {"root": trees[2]}):
            with pytest.raises(StateError, match="begun to read file,"):
                elsewhere(machine, there)
        elsewhere(machine, {"root": trees[0]})


def test_a_connection_from_outside(machine: Machine, tmp_path: Path) -> None:
    """Nobody is there at its other end where the machine goes on: it is reset."""
    for name in PIPES:
        os.mkfifo(tmp_path / name)
    listener, _ = machine.call("socket", socket.AF_INET, socket.SOCK_STREAM | os.O_NONBLOCK, 0)
    machine.call("bind", listener, struct.pack("<HH4s8x", 2, socket.htons(80), b"\x7f\0\0\1"), 16)
    machine.call("listen", listener, 5)
    with contextlib.closing(Forwarding(tmp_path, machine.system)) as forwarding, \
            contextlib.closing(Link(*open_outside(tmp_path))) as link:
        for kind, number, data in ((Kind.HELLO, 7, b""), (Kind.OPEN, 1, COUNT.pack(80)), (Kind.DATA, 1, b"before")):
            link.put(kind, number, data)
        link.flush()
        forwarding.pump()
        accepted, _ = machine.call("accept4", listener, 0, 0, os.O_NONBLOCK)
        assert machine.system.outside
        machine.system = elsewhere(machine, {})
    machine.system.launcher = Launcher()
    assert machine.call("read", accepted, Out(6), 6) == (6, [b"before"])
    assert machine.call("read", accepted, Out(6), 6) == "ECONNRESET"
    assert not machine.system.interests
    assert not machine.system.outside


def test_a_program(running: Machine) -> None:
    """Its file is read still where it was not, and its clocks are the system's."""
    machine = running
    program = machine.system.processes[1].path
    fd, _ = machine.call("open", program + b"\0", os.O_RDONLY)
    maps, _ = machine.call("open", b"/proc/self/maps\0", os.O_RDONLY)
    before = machine.call("read", maps, Out(4000), 4000)
    there = machine.call("pread64", fd, Out(8), 8, 0)
    machine.journey()
    assert machine.call("pread64", maps, Out(4000), 4000, 0) == before
    assert machine.call("pread64", fd, Out(8), 8, 0) == there
    end = os.path.getsize(program) - 8
    assert machine.call("pread64", fd, Out(8), 8, end)[1] == [Path(os.fsdecode(program)).read_bytes()[-8:]]
    frames = machine.system.processes[1].space
    vdso = machine.system.vdso
    assert vdso is not None
    address = next(each.start for each in frames.mappings if each.name == "vdso") * PAGE
    assert frames.read(address, 4) == b"\x7fELF"
    assert frames.place_of(address)[0] == vdso.frames[1]
    assert machine.call("open", b"/proc/self/exe\0", os.O_RDONLY)[0] > 0
    machine.call("fork")
    machine.journey()
    assert machine.system.frames.uses(vdso.frames[1]) == 3


def test_a_source_that_is_not_there_any_more(running: Machine) -> None:
    running.system.files.store.sources.clear()
    running.journey()
    assert running.call("stat", b"/etc/passwd\0", Out(144)) == "EIO"


def test_a_large_heap_takes_little_room() -> None:
    machine = Machine(frames=20000)
    there, _ = machine.call("mmap", 0, 64 << 20, 3, 0x22, -1, 0)
    space = machine.thread.process.space
    for at in range(0, 64 << 20, 16 * PAGE):
        space.fault(there + at, 6)
    assert len(msgspec.msgpack.encode(machine.system.save())) < 20000
    machine.call("fork")
    machine.journey()
    assert len(msgspec.msgpack.encode(machine.system.save())) < 20000


def test_what_two_have_together(machine: Machine) -> None:
    """A table of descriptors, an address space, an open file, a pipe, shared memory."""
    fd, _ = machine.call("open", b"/tmp/file\0", CREATE, 0o644)
    shared, _ = machine.call("mmap", 0, PAGE, 3, 0x21, -1, 0)
    private, _ = machine.call("mmap", 0, 3 * PAGE, 3, 0x22, -1, 0)
    machine.thread.process.space.write(private, b"before")
    same_files, _ = machine.call("clone", CLONE_FILES | signal.SIGCHLD, 0, 0, 0, 0)
    child, _ = machine.call("fork")
    assert machine.call("vfork")[0] == "blocked"
    fast = max(machine.system.threads)
    machine.journey()
    assert machine.call("vfork")[0] == "blocked"        # made again
    spaces = {tid: machine.system.threads[tid].process.space for tid in (1, same_files, child, fast)}
    assert spaces[1] is spaces[fast]
    assert spaces[1].users == 2
    spaces[1].write(shared, b"shared")
    spaces[1].write(private, b"after")
    assert spaces[child].read(shared, 6) == b"shared"
    assert spaces[child].read(private, 6) == b"before"
    machine.call("write", fd, b"12345", 5, tid=child)
    machine.call("exit_group", 0, tid=fast)
    machine.journey()
    assert machine.call("vfork") == (fast, [])
    assert machine.call("lseek", fd, 0, os.SEEK_CUR) == (5, [])
    machine.call("close", fd, tid=same_files)
    assert machine.call("close", fd) == "EBADF"
    assert machine.call("wait4", fast, Out(4), 0, 0) == (fast, [bytes(4)])


def test_signals(machine: Machine) -> None:
    machine.call("rt_sigaction", signal.SIGUSR1, HANDLER, 0, 8)
    machine.call("rt_sigprocmask", 0, struct.pack("<Q", (1 << 64) - 1), 0, 8)
    for number in (signal.SIGUSR1, 40, 40):
        machine.call("kill", 1, number)
    machine.call("rt_tgsigqueueinfo", 1, 1, 41, struct.pack("<iii4xiiQ", 0, 0, -1, 5, 6, 7).ljust(128, b"\0"))
    machine.call("sigaltstack", struct.pack("<Qi4xQ", machine.scratch, 0, 8192), 0)
    machine.journey()
    found = [machine.call("rt_sigtimedwait", struct.pack("<Q", (1 << 64) - 1), Out(128), struct.pack("<qq", 0, 0), 8)
             for _ in range(5)]
    assert [each[0] for each in found] == [41, signal.SIGUSR1, 40, 40, "E"]
    assert struct.unpack_from("<iiQ", found[0][1][0], 16) == (5, 6, 7)
    assert machine.call("sigaltstack", 0, Out(24))[1][0][16:] == struct.pack("<Q", 8192)
    assert machine.call("rt_sigaction", signal.SIGUSR1, 0, Out(32), 8) == (0, [HANDLER])


def test_a_fifo_that_waits_for_its_other_end(machine: Machine) -> None:
    machine.call("mknod", b"/tmp/fifo\0", stat.S_IFIFO | 0o644, 0)
    child, _ = machine.call("fork")
    assert machine.call("open", b"/tmp/fifo\0", os.O_RDONLY)[0] == "blocked"
    machine.journey()
    assert machine.call("open", b"/tmp/fifo\0", os.O_RDONLY)[0] == "blocked"
    writing, _ = machine.call("open", b"/tmp/fifo\0", os.O_WRONLY, tid=child)
    machine.call("write", writing, b"text", 4, tid=child)
    machine.journey()
    reading, _ = machine.call("open", b"/tmp/fifo\0", os.O_RDONLY)
    assert machine.call("read", reading, Out(9), 9)[0] == 4


def test_half_a_write(machine: Machine) -> None:
    """What a call has moved already it does not move again."""
    reading, writing = pair(machine, "pipe2", Out(8), 0)
    data = bytes(range(251)) * 400
    space = machine.thread.process.space
    there, _ = machine.call("mmap", 0, len(data), 3, 0x22, -1, 0)
    space.write(there, data)
    child, _ = machine.call("fork")
    assert machine.call("write", writing, there, len(data))[0] == "blocked"
    found = b""
    result: Any = None
    while result != (len(data), []):
        assert result in (None, ("blocked", None))
        machine.journey()
        count, (part,) = machine.call("read", reading, Out(30000), 30000, tid=child)
        found += part[:count]
        result = machine.call("write", writing, there, len(data))
    while len(found) < len(data):
        count, (part,) = machine.call("read", reading, Out(30000), 30000)
        found += part[:count]
    assert found == data


def test_locks_and_what_is_missing(machine: Machine) -> None:
    fd, _ = machine.call("open", b"/tmp/file\0", CREATE, 0o644)
    child, _ = machine.call("fork")
    machine.call("fcntl", fd, 6, struct.pack("<hh4xqqi4x", fcntl.F_WRLCK, 0, 10, 5, 0))
    machine.call("flock", fd, fcntl.LOCK_EX)
    machine.call("swapon", 0)
    machine.call("swapon", 0)
    machine.journey()
    assert machine.call("fcntl", fd, 6, struct.pack("<hh4xqqi4x", fcntl.F_RDLCK, 0, 0, 11, 0), tid=child) == "EAGAIN"
    other, _ = machine.call("open", b"/tmp/file\0", os.O_RDONLY, tid=child)
    assert machine.call("flock", other, fcntl.LOCK_SH | fcntl.LOCK_NB, tid=child) == "EAGAIN"
    assert list(machine.system.missing.values()) == [2]


def test_random_bytes_go_on(machine: Machine) -> None:
    twin = Machine()
    for each in (machine, twin):
        each.call("getrandom", Out(13), 13, 0)
    machine.journey()
    assert machine.call("getrandom", Out(33), 33, 0) == twin.call("getrandom", Out(33), 33, 0)


# --- whatever happens --------------------------------------------------------------------------------------------

class Nth(int):
    """Of the descriptors that there are."""

    def of(self, thread: Thread) -> int:
        there = list(thread.process.files)
        return there[self % len(there)] if there else 0


PATHS = [b"/tmp/a", b"/tmp/b", b"/tmp/d", b"/tmp/d/a", b"/tmp/d/e", b"/tmp/fifo", b"a", b".", b"..", b"/dev/null",
         b"/proc", b"/proc/self/status", b"/proc/self/fd", b"/proc/2/maps", b"/proc/3/stat", b"/proc/2/task/2",
         b"/proc/self/fd/3", b"/proc/self/fdinfo/4", b"/proc/self/cwd/a", b"/proc/2/cwd", b"/tmp/socket"]
paths = st.sampled_from(PATHS)
fds = st.integers(0, 40).map(Nth)
tids = st.integers(0, 7)
small = st.integers(0, 9000)
ADDRESSES = [unix(b"\0one"), unix(b"\0two"), unix(b"/tmp/socket"), unix(b""), inet(80), inet(81), inet(0)]
addresses = st.sampled_from(ADDRESSES)

def resolved(machine: Machine, tid: int, *fds: Nth) -> list[int]:
    return [each.of(machine.system.threads[tid]) for each in fds]


signals = st.sampled_from([signal.SIGUSR1, signal.SIGCHLD, signal.SIGCONT, signal.SIGSTOP, signal.SIGWINCH, 40])
where = st.tuples(st.integers(0, 40), st.integers(1, 12))       # pages, from a place on
PLACE = 0x2000_0000


class Twins(RuleBasedStateMachine):
    """One of two machines becomes data now and then; both do the same, and are alike at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.machines = [Machine(), Machine()]
        self.blocked: dict[int, tuple[str, tuple[Any, ...]]] = {}

    def teardown(self) -> None:
        one, other = (each.seen() for each in self.machines)
        assert one == other, difference(one, other)
        for each in self.machines:
            each.check_frames()

    def both(self, tid: int, name: str, *arguments: Any) -> Any:
        """In one of the threads that there are. Who is blocked makes its call again, or is interrupted (by odd
        numbers)."""
        live = list(self.machines[0].system.threads)
        assert live == list(self.machines[1].system.threads)
        if not live:
            return None
        which = live[tid // 2 % len(live)]
        if which in self.blocked:
            name_, arguments_ = self.blocked.pop(which)
            if tid % 2 and self.machines[0].system.threads[which].vfork is None:
                for each in self.machines:
                    each.interrupt(which)
            else:
                name, arguments = name_, arguments_
        thread = self.machines[0].system.threads[which]
        arguments = tuple(each.of(thread) if isinstance(each, Nth) else each for each in arguments)
        found = [each.call(name, *arguments, tid=which) for each in self.machines]
        assert found[0] == found[1], (name, arguments, found)
        if isinstance(found[0], tuple) and found[0][0] == "blocked":
            self.blocked[which] = name, arguments
        return found[0]

    def each(self, tid: int, function: Any, *arguments: Any) -> None:
        """The same, of a function that takes a machine."""
        live = [each for each in self.machines[0].system.threads if each not in self.blocked]
        if live:
            which = live[tid % len(live)]
            one, other = (function(each, *arguments, tid=which) for each in self.machines)
            assert one == other, (function, arguments, one, other)

    # --- the journey ------------------------------------------------------------------------------------------------

    @initialize(children=st.integers(0, 2))
    def begin(self, children: int) -> None:
        """Some of each."""
        for path in (b"/tmp/a", b"/tmp/b"):
            self.both(0, "open", path + b"\0", CREATE, 0o755)
            self.both(0, "write", Nth(-1), path * 900, 900 * len(path))
        self.both(0, "mkdir", b"/tmp/d\0", 0o755)
        self.both(0, "mknod", b"/tmp/fifo\0", stat.S_IFIFO | 0o644, 0)
        self.both(0, "pipe2", Out(8), 0)
        self.both(0, "socketpair", socket.AF_UNIX, socket.SOCK_STREAM, 0, Out(8))
        self.both(0, "eventfd2", 1, 0)
        self.both(0, "timerfd_create", 1, 0)
        self.both(0, "epoll_create1", 0)
        for page, prot, flags, fd in ((0, 3, 0x32, -1), (4, 3, 0x31, -1), (8, 3, 0x12, 0), (12, 3, 0x11, 0)):
            self.both(0, "mmap", PLACE + page * PAGE, 3 * PAGE, prot, flags, fd, 0)
        for _ in range(children):
            self.both(0, "fork")

    @rule(ahead=st.integers(-SECOND, SECOND))
    def journey(self, ahead: int) -> None:
        self.machines[0].journey(ahead)

    @rule(length=st.integers(0, 3 * SECOND))
    def pass_time(self, length: int) -> None:
        for each in self.machines:
            each.pass_time(length)

    # --- files ------------------------------------------------------------------------------------------------------

    @rule(tid=tids, path=paths, flags=st.sampled_from([
        os.O_RDONLY, CREATE, CREATE | os.O_TRUNC, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_NONBLOCK,
        os.O_RDONLY | os.O_NONBLOCK, os.O_PATH, os.O_PATH | os.O_NOFOLLOW, os.O_RDONLY | os.O_DIRECTORY,
        os.O_TMPFILE | os.O_RDWR]))
    def open(self, tid: int, path: bytes, flags: int) -> None:
        self.both(tid, "open", path + b"\0", flags, 0o755)

    @rule(tid=tids, name=st.sampled_from(["mkdir", "rmdir", "unlink", "chdir", "mknod"]), path=paths)
    def at(self, tid: int, name: str, path: bytes) -> None:
        self.both(tid, name, path + b"\0", stat.S_IFIFO | 0o644 if name == "mknod" else 0o755)

    @rule(tid=tids, name=st.sampled_from(["rename", "link", "symlink"]), old=paths, new=paths)
    def two(self, tid: int, name: str, old: bytes, new: bytes) -> None:
        self.both(tid, name, old + b"\0", new + b"\0")

    @rule(tid=tids, path=paths, name=st.sampled_from(["stat", "lstat", "readlink"]))
    def look(self, tid: int, path: bytes, name: str) -> None:
        self.both(tid, name, path + b"\0", Out(144), 144)

    @rule(tid=tids, fd=fds, data=st.binary(max_size=20), times=st.sampled_from([1, 1, 300, 2000]))
    def write(self, tid: int, fd: int, data: bytes, times: int) -> None:
        self.both(tid, "write", fd, data * times, len(data) * times)

    @rule(tid=tids, fd=fds, count=small)
    def read(self, tid: int, fd: int, count: int) -> None:
        self.both(tid, "read", fd, Out(count), count)

    @rule(tid=tids, fd=fds, offset=small, name=st.sampled_from(["lseek", "ftruncate", "fchmod", "fchdir", "pread64"]),
          whence=st.integers(0, 4))
    def move(self, tid: int, fd: int, offset: int, name: str, whence: int) -> None:
        if name == "pread64":
            self.both(tid, name, fd, Out(50), 50, offset)
        else:
            self.both(tid, name, fd, offset, whence)

    @rule(tid=tids, fd=fds, mode=st.sampled_from([0, 1, 3]), offset=small, length=small)
    def allocate(self, tid: int, fd: int, mode: int, offset: int, length: int) -> None:
        self.both(tid, "fallocate", fd, mode, offset, length)

    @rule(tid=tids, fd=fds, name=st.sampled_from(["fstat", "getdents64", "getcwd"]))
    def look_at(self, tid: int, fd: int, name: str) -> None:
        self.both(tid, name, *([Out(200), 200] if name == "getcwd" else [fd, Out(144), 144]))

    @rule(tid=tids, fd=fds, new=fds, name=st.sampled_from(["close", "dup", "dup2", "close"]))
    def descriptors(self, tid: int, fd: int, new: int, name: str) -> None:
        self.both(tid, name, fd, new)

    @rule(tid=tids, fd=fds, kind=st.integers(0, 2), start=st.integers(0, 20), length=st.integers(0, 20),
          whole=st.booleans())
    def lock(self, tid: int, fd: int, kind: int, start: int, length: int, whole: bool) -> None:
        if whole:
            self.both(tid, "flock", fd, (fcntl.LOCK_SH, fcntl.LOCK_EX, fcntl.LOCK_UN)[kind])
        else:
            self.both(tid, "fcntl", fd, 6, struct.pack("<hh4xqqi4x", kind, 0, start, length, 0))

    @rule(tid=tids, fd=fds, command=st.sampled_from([1, 2, 3, 4, 1031, 1032, 1030]),
          argument=st.sampled_from([0, 1, 4096, os.O_NONBLOCK, 20000]))
    def control(self, tid: int, fd: int, command: int, argument: int) -> None:
        self.both(tid, "fcntl", fd, command, argument)

    # --- channels ---------------------------------------------------------------------------------------------------

    @rule(tid=tids, flags=st.sampled_from([0, os.O_NONBLOCK, os.O_DIRECT, os.O_CLOEXEC]))
    def pipe(self, tid: int, flags: int) -> None:
        self.both(tid, "pipe2", Out(8), flags)

    @rule(tid=tids, name=st.sampled_from(["eventfd2", "timerfd_create", "epoll_create1"]), flags=st.integers(0, 1))
    def event(self, tid: int, name: str, flags: int) -> None:
        self.both(tid, name, *({"eventfd2": (flags, flags), "timerfd_create": (flags, 0)}.get(name, (0,))))

    @rule(tid=tids, fd=fds, value=st.integers(0, 3 * SECOND), interval=st.sampled_from([0, SECOND // 3]))
    def timer(self, tid: int, fd: int, value: int, interval: int) -> None:
        self.both(tid, "timerfd_settime", fd, 0, struct.pack("<4q", 0, interval, *divmod(value, SECOND)), Out(32))

    @rule(tid=tids, epoll=fds, fd=fds, operation=st.integers(1, 3),
          how=st.sampled_from([0, 1 << 31, 1 << 30, 3 << 30]), events=st.integers(1, 7))
    def interest(self, tid: int, epoll: int, fd: int, operation: int, how: int, events: int) -> None:
        self.both(tid, "epoll_ctl", epoll, operation, fd, struct.pack("<IQ", events | how, operation))

    @rule(tid=tids, epoll=fds, timeout=st.sampled_from([0, 0, 10, -1]))
    def wait(self, tid: int, epoll: int, timeout: int) -> None:
        self.both(tid, "epoll_wait", epoll, Out(120), 10, timeout)

    @rule(tid=tids, timeout=st.sampled_from([0, 0, 0, 100]))
    def poll(self, tid: int, timeout: int) -> None:
        asked = b"".join(struct.pack("<iHH", fd, 0x3DF, 0) for fd in range(15))
        self.both(tid, "poll", Out(len(asked), asked), 15, timeout)

    # --- sockets ----------------------------------------------------------------------------------------------------

    @rule(tid=tids, kind=st.sampled_from([1, 2, 5]), flags=st.sampled_from([0, os.O_NONBLOCK]))
    def socketpair(self, tid: int, kind: int, flags: int) -> None:
        self.both(tid, "socketpair", socket.AF_UNIX, kind | flags, 0, Out(8))

    @rule(tid=tids, domain=st.sampled_from([1, 2, 10]), kind=st.sampled_from([1, 2]))
    def socket(self, tid: int, domain: int, kind: int) -> None:
        self.both(tid, "socket", domain, kind, 0)

    @rule(tid=tids, name=st.sampled_from(["bind", "connect", "connect"]), fd=fds, address=addresses)
    def address(self, tid: int, name: str, fd: int, address: bytes) -> None:
        self.both(tid, name, fd, address, len(address))

    @rule(tid=tids, fd=fds, kind=st.sampled_from([1, 2]), address=addresses, talk=st.booleans())
    def serve(self, tid: int, fd: int, kind: int, address: bytes, talk: bool) -> None:
        """As those do it that get somewhere."""
        domain = int.from_bytes(address[:2], "little")
        for name in ("bind", "connect"):
            made = self.both(tid, "socket", domain, kind | os.O_NONBLOCK, 0)
            if not isinstance(made, tuple) or not isinstance(made[0], int):
                return
            self.both(tid, name, made[0], address, len(address))
            if name == "bind":
                self.both(tid, "listen", made[0], 3)
            elif talk:
                self.both(tid, "write", made[0], b"hello", 5)

    @rule(tid=tids, fd=fds, name=st.sampled_from(["listen", "accept4", "accept4", "shutdown", "getsockname",
                                                  "getpeername"]), number=st.integers(0, 2))
    def connection(self, tid: int, fd: int, name: str, number: int) -> None:
        if name in ("listen", "shutdown"):
            self.both(tid, name, fd, number)
        elif name == "accept4":
            self.both(tid, name, fd, 0, 0, 0)
        else:
            self.both(tid, name, fd, Out(120), struct.pack("<i", 120))

    @rule(tid=tids, fd=fds, data=st.binary(min_size=1, max_size=9), rights=st.lists(fds, max_size=2))
    def send(self, tid: int, fd: int, data: bytes, rights: list[int]) -> None:
        self.each(tid, lambda machine, tid: send(machine, *resolved(machine, tid, fd), data,
                                                 *resolved(machine, tid, *rights), tid=tid))

    @rule(tid=tids, fd=fds, peek=st.sampled_from([0, 2]))
    def receive(self, tid: int, fd: int, peek: int) -> None:
        self.each(tid, lambda machine, tid: receive(machine, *resolved(machine, tid, fd), tid,
                                                    socket.MSG_DONTWAIT | peek))

    @rule(tid=tids, fd=fds, name=st.sampled_from([2, 4, 7, 8, 13, 15, 16, 17, 20]), value=st.integers(0, 9000))
    def option(self, tid: int, fd: int, name: int, value: int) -> None:
        self.both(tid, "setsockopt", fd, 1, name, struct.pack("<iiq", value, 3, 5), 16)
        self.both(tid, "getsockopt", fd, 1, name, Out(16), struct.pack("<i", 16))

    # --- processes --------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.machines[0].system.threads) < 6)
    @rule(tid=tids, flags=st.sampled_from([17, 17, CLONE_FILES | 17, CLONE_VM | CLONE_FILES | CLONE_THREAD,
                                           CLONE_VM | CLONE_VFORK | 17]))
    def clone(self, tid: int, flags: int) -> None:
        self.both(tid, "clone", flags, 0, 0, 0, 0)

    @rule(tid=tids, name=st.sampled_from(["exit", "exit_group"]), code=st.integers(0, 3))
    def exit(self, tid: int, name: str, code: int) -> None:
        live = list(self.machines[0].system.threads)
        if live and self.machines[0].system.threads[live[tid // 2 % len(live)]].process.pid != 1:
            self.both(tid | 1, name, code)
            live = list(self.machines[0].system.threads)
            self.blocked = {which: call for which, call in self.blocked.items() if which in live}

    @rule(tid=tids, options=st.sampled_from([0, 1, 3, 9]))
    def wait_for(self, tid: int, options: int) -> None:
        self.both(tid, "wait4", -1, Out(4), options, 0)

    @rule(tid=tids, pid=st.sampled_from([1, 2, 3, 4, 5, 0, -1]), number=signals)
    def kill(self, tid: int, pid: int, number: int) -> None:
        self.both(tid, "kill", pid, number)

    @rule(tid=tids, number=signals, what=st.sampled_from([HANDLER, HANDLER, struct.pack("<QQQQ", 1, 0, 0, 0),
                                                          struct.pack("<QQQQ", 0, 1, 0, 0)]))
    def action(self, tid: int, number: int, what: bytes) -> None:
        self.both(tid, "rt_sigaction", number, what, Out(32), 8)

    @rule(tid=tids, how=st.integers(0, 2), mask=st.sampled_from([0, 0x200, 0x8000010000, (1 << 64) - 1]))
    def mask(self, tid: int, how: int, mask: int) -> None:
        self.both(tid, "rt_sigprocmask", how, struct.pack("<Q", mask), Out(8), 8)

    @rule(tid=tids, name=st.sampled_from(["rt_sigtimedwait", "rt_sigsuspend", "rt_sigpending", "getitimer"]))
    def wait_for_signal(self, tid: int, name: str) -> None:
        mask = struct.pack("<Q", 0x8000010200)
        self.both(tid, name, *{
            "rt_sigtimedwait": (mask, Out(128), struct.pack("<qq", 1, 0), 8), "rt_sigsuspend": (mask, 8),
            "rt_sigpending": (Out(8), 8), "getitimer": (0, Out(32))}[name])

    @rule(tid=tids)
    def take_signals(self, tid: int) -> None:
        def act(machine: Machine, tid: int) -> Any:
            found: list[SignalInfo] = []
            thread = machine.system.threads[tid]
            machine.system.act(thread, lambda info, action: found.append(info))
            return found

        self.each(tid, act)
        live = self.machines[0].system.threads
        self.blocked = {which: call for which, call in self.blocked.items() if which in live}

    @rule(tid=tids, name=st.sampled_from(["alarm", "umask", "setsid", "getppid", "times", "getpgrp"]),
          value=st.integers(0, 2))
    def simple(self, tid: int, name: str, value: int) -> None:
        self.both(tid, name, Out(32) if name == "times" else value)

    @rule(tid=tids, length=st.integers(0, 2 * SECOND))
    def sleep(self, tid: int, length: int) -> None:
        self.both(tid, "nanosleep", struct.pack("<qq", *divmod(length, SECOND)), 0)

    # --- memory -----------------------------------------------------------------------------------------------------

    @rule(tid=tids, where=where, prot=st.integers(0, 7), flags=st.sampled_from([0x22, 0x22, 0x21, 1, 2]), fd=fds)
    def map(self, tid: int, where: tuple[int, int], prot: int, flags: int, fd: int) -> None:
        page, count = where
        self.both(tid, "mmap", PLACE + page * PAGE, count * PAGE, prot, flags | 0x10, fd, 0)

    @rule(tid=tids, where=where, name=st.sampled_from(["munmap", "mprotect", "mprotect", "madvise", "mremap", "brk"]),
          prot=st.integers(0, 7), to=st.integers(1, 20))
    def change(self, tid: int, where: tuple[int, int], name: str, prot: int, to: int) -> None:
        page, count = where
        if name == "brk":
            self.both(tid, name, (0x1000 + page) * PAGE + 77)
        else:
            third = {"madvise": 4, "mremap": to * PAGE}.get(name, prot)
            self.both(tid, name, PLACE + page * PAGE, count * PAGE, third, 1)

    @rule(tid=tids, where=where, data=st.binary(min_size=1, max_size=9), writes=st.booleans(), heap=st.booleans())
    def touch(self, tid: int, where: tuple[int, int], data: bytes, writes: bool, heap: bool) -> None:
        def touch(machine: Machine, tid: int) -> Any:
            space = machine.system.threads[tid].process.space
            address = (0x1000_000 if heap else PLACE) + where[0] * PAGE + where[1]
            try:
                space.fault(address, 6 if writes else 4)
                return space.write(address, data) if writes else space.read(address, 9)
            except SegmentationFault as fault:
                return fault.address, fault.mapped, fault.bus

        self.each(tid, touch)

    @rule(tid=tids, source=st.sampled_from([b"/proc/self/maps", b"/proc/self/status", b"/proc/meminfo",
                                            b"/proc/2/stat"]))
    def maps(self, tid: int, source: bytes) -> None:
        found = self.both(tid, "open", source + b"\0", os.O_RDONLY)
        if isinstance(found, tuple) and isinstance(found[0], int):
            self.both(tid, "read", found[0], Out(3000), 3000)
            self.both(tid, "close", found[0])


TestTwins = Twins.TestCase
TestTwins.settings = settings(max_examples=25, stateful_step_count=100, deadline=None,
                              suppress_health_check=list(HealthCheck))


@pytest.mark.long
class TestTwinsForLong(Twins.TestCase):     # type: ignore[name-defined,misc]
    """More of the same."""

    settings = settings(max_examples=150, stateful_step_count=400, deadline=None,
                        suppress_health_check=list(HealthCheck))
