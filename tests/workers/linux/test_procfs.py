"""/proc, /sys and the links of /dev: against the host's for their form and their errors, against what is known here for
what they say."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import struct
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from system import FIRST, Ram
from twice import Console, Fd, Guest, Out, Twice

from workers.linux.channels import ConsoleStream
from workers.linux.directories import Directory
from workers.linux.frames import Frames
from workers.linux.inodes import Inode
from workers.linux.pipes import PipeEnd
from workers.linux.processes import Thread
from workers.linux.procfs import machine
from workers.linux.sources import HostTree
from workers.linux.space import PAGE
from workers.linux.system import System
from workers.linux.tables import Tables
from workers.linux.vdso import Vdso
from workers.linux.vfs import FileSystem

CREATE = os.O_CREAT | os.O_WRONLY


def made(root: str = "") -> System:
    """A system without a process, perhaps with a directory of the host as its root."""
    ram, pool = Ram(), Frames(FIRST, 4096)
    files = FileSystem(ram, pool, clock=time.time_ns, random=os.urandom, blocks=4096)
    if root:
        files.attach("root", HostTree(root))
        files.import_tree(files.root, "root")
    tables = Tables(memoryview(array("Q", bytes(256 * PAGE))), 1 << 40)
    vdso = Vdso(ram, pool, monotonic=time.monotonic_ns, realtime=time.time_ns)
    return System(ram, pool, tables, files, Console(), realtime=time.time_ns, monotonic=time.monotonic_ns,
                  threads_max=3, vdso=vdso)


def close(system: System) -> None:
    for source in system.files.store.sources.values():
        assert isinstance(source, HostTree)
        source.close()


@pytest.fixture
def running() -> Iterator[tuple[System, Thread]]:
    """A program of the host, in the host's own root."""
    system = made("/")
    path = os.fsencode(os.path.realpath("/bin/cat"))
    thread, _ = system.spawn(path, [b"cat", b"two words"], [b"A=1", b"B="])
    system.caller = thread
    yield system, thread
    close(system)


@pytest.fixture
def twice() -> Iterator[Twice]:
    with contextlib.closing(Twice()) as found:
        found.guest.system.caller = found.guest.thread
        yield found


def read(system: System, path: bytes) -> bytes:
    file = system.files.open(system.files.root, path, os.O_RDONLY)
    found = file.read(1 << 20)
    file.let_go()
    return found


def listed(system: System, path: bytes) -> set[bytes]:
    directory = system.files.find(system.files.root, path)
    assert isinstance(directory, Directory)
    return {name for name, _, _ in directory.entries()} - {b".", b".."}


def link(system: System, path: bytes) -> bytes:
    return system.files.readlink(system.files.find(system.files.root, path, follow=False))


# --- forms -------------------------------------------------------------------------------------------------------


def keys(text: bytes) -> list[bytes]:
    return [line.partition(b":")[0] for line in text.splitlines() if b":" in line]


def form(text: bytes) -> bytes:
    """Digits are alike, and how many there are."""
    return re.sub(rb"[0-9a-f]*[0-9][0-9a-f]*", b"0", text)


@pytest.mark.parametrize("name", ["status", "limits", "task/{}/status", "smaps"])
def test_what_is_said_of_a_process_is_said_as_the_host_does(running: tuple[System, Thread], name: str) -> None:
    """In its order; what the host says more, depends on what it is."""
    system, thread = running
    ours = read(system, b"/proc/self/" + name.format(thread.tid).encode())
    theirs = Path(f"/proc/self/{name.format(os.getpid())}").read_bytes()
    if name == "limits":
        assert [line[:26] for line in ours.splitlines()] == [line[:26] for line in theirs.splitlines()]
        return
    if name == "smaps":
        ours, theirs = (re.split(rb"\n(?=[0-9a-f]+-)", each)[0] for each in (ours, theirs))
        ours, theirs = ours.partition(b"\n")[2], theirs.partition(b"\n")[2]
    order = keys(theirs)
    places = [order.index(each) for each in keys(ours)]
    assert places == sorted(places)
    lines = {line.partition(b":")[0]: line for line in theirs.splitlines()}
    for line in ours.splitlines():
        key = line.partition(b":")[0]
        if line.endswith(b" kB"):
            assert len(line) == len(lines[key]), line


@pytest.mark.parametrize("name", ["stat", "statm", "cmdline", "comm", "mounts", "mountinfo", "cgroup", "fdinfo/0"])
def test_fields_are_as_many(running: tuple[System, Thread], name: str) -> None:
    ours, theirs = read(running[0], b"/proc/self/" + name.encode()), Path(f"/proc/self/{name}").read_bytes()
    if name == "cmdline":
        assert ours == b"cat\0two words\0"
    elif name == "comm":
        assert ours == b"cat\n"
    elif name == "mountinfo":
        assert all(re.fullmatch(rb"\d+ \d+ \d+:\d+ / \S+ \S+ - \S+ \S+ \S+", each) for each in ours.splitlines())
    elif name == "cgroup":
        assert ours.splitlines()[-1] == b"0::/"
    elif name == "fdinfo/0":
        assert keys(ours) == keys(theirs)[:4]
    else:
        assert {len(line.split()) for line in ours.splitlines()} == {len(theirs.splitlines()[0].split())}


@pytest.mark.parametrize("name", ["uptime", "loadavg", "sys/kernel/osrelease", "sys/kernel/ostype",
                                  "sys/kernel/hostname", "sys/kernel/pid_max", "sys/kernel/random/uuid",
                                  "sys/kernel/random/boot_id", "sys/kernel/threads-max", "sys/vm/overcommit_memory",
                                  "sys/vm/max_map_count", "sys/vm/mmap_min_addr", "sys/net/core/somaxconn"])
def test_of_the_machine_one_line(name: str) -> None:
    system = made()
    ours = read(system, b"/proc/" + name.encode())
    assert ours.endswith(b"\n")
    assert ours.count(b"\n") == 1
    if name in ("uptime", "loadavg"):
        assert form(ours) == form(Path("/proc", name).read_bytes())
    if "random" in name:
        assert re.fullmatch(rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\n", ours)
        assert (read(system, b"/proc/" + name.encode()) == ours) == (name.endswith("boot_id"))


@pytest.mark.parametrize("name", ["meminfo", "stat", "cpuinfo", "filesystems", "net/dev", "net/tcp", "net/route",
                                  "net/unix", "mounts"])
def test_of_the_machine_many_lines(running: tuple[System, Thread], name: str) -> None:
    ours, theirs = read(running[0], b"/proc/" + name.encode()), Path("/proc", name).read_bytes()
    if name in ("meminfo", "cpuinfo"):
        assert set(keys(ours)) <= set(keys(theirs))
        whole = set(theirs.splitlines()) if name == "cpuinfo" else set()
        assert {each for each in ours.splitlines() if each.startswith((b"flags", b"model name"))} <= whole
    elif name == "stat":
        names = [line.split()[0] for line in ours.splitlines()]
        assert names == [b"cpu", b"cpu0", b"cpu1", b"cpu2", b"intr", b"ctxt", b"btime", b"processes", b"procs_running",
                         b"procs_blocked", b"softirq"]
        assert len(ours.split(b"\n")[0].split()) == len(theirs.split(b"\n")[0].split())
    elif name.startswith("net/"):
        head = 2 if name.endswith("dev") else 1
        assert [each.split() for each in ours.splitlines()[:head]] == [each.split() for each in
                                                                       theirs.splitlines()[:head]]
    if name == "meminfo":
        assert {len(each) for each in ours.splitlines() if each.endswith(b"kB")} == {27}


def test_processors_are_as_many_as_it_is_told() -> None:
    guest = Guest()
    guest.system.processors = 3
    mask, = guest.call("sched_getaffinity", 0, 8, Out(8))[1]
    assert struct.unpack("<Q", mask)[0] == 7
    system = made()
    assert read(system, b"/proc/cpuinfo").count(b"processor\t:") == 3
    for name in (b"online", b"possible", b"present"):
        assert read(system, b"/sys/devices/system/cpu/" + name) == b"0-2\n"
    assert listed(system, b"/sys/devices/system/cpu") >= {b"cpu0", b"cpu1", b"cpu2"}
    assert b"[never]" in read(system, b"/sys/kernel/mm/transparent_hugepage/enabled")


def test_the_same_name_as_uname() -> None:
    found = Guest().call("uname", Out(6 * 65))[1][0]
    parts = [found[at:at + 65].rstrip(b"\0") for at in range(0, len(found), 65)]
    system = made()
    assert read(system, b"/proc/sys/kernel/osrelease") == parts[2] + b"\n" == machine.RELEASE + b"\n"
    assert read(system, b"/proc/sys/kernel/hostname") == parts[1] + b"\n"
    assert read(system, b"/proc/version").startswith(b"Linux version " + parts[2] + b" ")


# --- mappings ----------------------------------------------------------------------------------------------------

LINE = re.compile(rb"(\w+)-(\w+) ([r-])([w-])([x-])([sp]) (\w{8}) (\w\w):(\w\w) (\d+) *(.*)")


def test_maps_are_the_mappings(running: tuple[System, Thread]) -> None:
    system, thread = running
    space = thread.process.space
    space.set_break(space.heap * PAGE + 5000)
    text = read(system, b"/proc/self/maps")
    rows = []
    for line in text.splitlines():
        found = LINE.fullmatch(line)
        assert found, line
        if found[11]:
            assert line.index(found[11], 40) == 73      # as on the host
        prot = sum(bit for bit, letter in zip((1, 2, 4), (found[3], found[4], found[5]), strict=True) if letter != b"-")
        rows.append((int(found[1], 16), int(found[2], 16), prot, found[6] == b"s", int(found[7], 16)))
    assert rows == [(each.start * PAGE, each.end * PAGE, each.prot, each.shared,
                     each.offset * PAGE if isinstance(each.backing, Inode) else 0) for each in space.mappings]
    names = {line[73:] for line in text.splitlines()}
    assert names >= {b"[heap]", b"[stack]", b"[vdso]", b"[vvar]", os.fsencode(os.path.realpath("/bin/cat"))}
    assert any(b"/ld-linux" in each for each in names)
    theirs = Path("/proc/self/maps").read_bytes().splitlines()
    assert any(line.endswith(b" 0 ") for line in theirs)
    assert any(line.endswith(b" 0 ") for line in text.splitlines()) or all(line[73:] for line in text.splitlines())
    assert b"[stack]" in read(system, b"/proc/self/smaps")
    size, resident, *_ = map(int, read(system, b"/proc/self/statm").split())
    assert size == sum(each.end - each.start for each in space.mappings)
    assert resident == sum(space.resident(each) for each in space.mappings)


def test_what_is_gone_is_called_deleted(running: tuple[System, Thread]) -> None:
    system, thread = running
    files, space = system.files, thread.process.space
    file = files.open(files.root, b"/tmp/mapped", os.O_CREAT | os.O_RDWR, 0o600)
    file.write(b"x" * 10)
    space.map(0, PAGE, 1, backing=file.inode)       # type: ignore[arg-type]
    assert b"/tmp/mapped\n" in read(system, b"/proc/self/maps")
    files.rename(files.root, b"/tmp/mapped", files.root, b"/tmp/moved")
    assert b"/tmp/moved\n" in read(system, b"/proc/self/maps")
    files.unlink(files.root, b"/tmp/moved")
    file.let_go()
    assert b"/tmp/moved (deleted)\n" in read(system, b"/proc/self/maps")


def test_arguments_are_read_where_the_program_has_them(running: tuple[System, Thread]) -> None:
    system, thread = running
    assert read(system, b"/proc/1/environ") == b"A=1\0B=\0"
    beginning = thread.process.space.beginning
    assert beginning is not None
    thread.process.space.write(beginning.arguments[0], b"dog")
    assert read(system, b"/proc/1/cmdline") == b"dog\0two words\0"
    assert dict(struct.iter_unpack("<QQ", read(system, b"/proc/1/auxv")))[6] == PAGE
    assert link(system, b"/proc/self/exe") == os.fsencode(os.path.realpath("/bin/cat"))
    assert system.files.find(system.files.root, b"/proc/self/exe") is system.files.find(system.files.root, b"/bin/cat")


# --- who is there ------------------------------------------------------------------------------------------------


def test_self_is_who_asks() -> None:
    guest = Guest()
    child = guest.fork(7)
    thread = guest.another(child.process, 9)
    guest.system.threads[9] = thread
    for each, name in ((guest.thread, b"1"), (child, b"7"), (thread, b"7")):
        count, (text,) = guest.call("readlink", b"/proc/self\0", Out(20), 20, thread=each)
        assert text[:count] == name
    count, (text,) = guest.call("readlink", b"/proc/thread-self\0", Out(20), 20, thread=thread)
    assert text[:count] == b"7/task/9"
    system = guest.system
    assert {b"1", b"7"} <= listed(system, b"/proc")
    assert b"9" not in listed(system, b"/proc")
    assert listed(system, b"/proc/7/task") == {b"7", b"9"}
    assert read(system, b"/proc/9/status").splitlines()[3:6:2] == [b"Tgid:\t7", b"Pid:\t9"]
    for name in (b"/proc/007", b"/proc/8", b"/proc/7/task/1", b"/proc/7/fd/3", b"/proc/nothing"):
        with pytest.raises(FileNotFoundError):
            system.files.find(system.files.root, name)
    held = system.files.open(system.files.root, b"/proc/7", os.O_RDONLY)
    status = system.files.open(system.files.root, b"/proc/7/comm", os.O_RDWR)
    del system.processes[7]
    with pytest.raises(FileNotFoundError):
        system.files.find(held.inode, b"stat")
    held.let_go()
    status.let_go()


def test_a_zombie() -> None:
    guest = Guest()
    child = guest.fork(7).process
    guest.system.files.root.keep()
    child.threads.clear()
    child.files.close_all()
    child.space.close()
    child.code = 256
    system = guest.system
    assert read(system, b"/proc/7/stat").split()[2] == b"Z"
    assert b"State:\tZ (zombie)" in read(system, b"/proc/7/status")
    assert read(system, b"/proc/7/maps") == read(system, b"/proc/7/cmdline") == b""
    assert listed(system, b"/proc/7/fd") == listed(system, b"/proc/7/task") == set()
    for name in (b"/proc/7/exe", b"/proc/7/cwd"):
        with pytest.raises(FileNotFoundError):
            link(system, name)


def test_a_name_is_given() -> None:
    guest = Guest()
    fd = guest.call("open", b"/proc/self/comm\0", os.O_RDWR)[0]
    assert guest.call("write", fd, b"a very long name that is cut\n", 29)[0] == 29
    assert guest.thread.name == b"a very long nam"
    assert guest.call("pread64", fd, Out(20), 20, 0)[1][0][:16] == b"a very long nam\n"


def test_how_soon_it_may_be_ended_for_want_of_memory_is_kept_and_inherited(twice: Twice) -> None:
    fd = twice.made("open", b"/proc/self/oom_score_adj\0", os.O_RDWR)
    for text in (b"1000\n", b"1001", b"-1001", b"x", b"7x", b" 7 \n", b"0"):
        twice.same("pwrite64", fd, text, len(text), 0)
        twice.same("pread64", fd, Out(20), 20, 0)
    twice.guest.thread.process.oom_adjustment = 300
    system = twice.guest.system
    child = system.fork(twice.guest.thread, share=True, exit_signal=0)
    assert read(system, b"/proc/%d/oom_score_adj" % child.tid) == b"300\n"


def test_processor_time_is_told_in_ticks() -> None:
    guest = Guest()
    process, other = guest.thread.process, guest.another(guest.thread.process, 9)
    guest.thread.cpu_ns, other.cpu_ns, process.cpu_children = 50 * 10**6, 20 * 10**6, 30 * 10**6
    guest.system.threads.update({1: guest.thread, 9: other})
    for path, ticks in ((b"/proc/1/stat", b"7"), (b"/proc/1/task/1/stat", b"5"), (b"/proc/1/task/9/stat", b"2")):
        assert read(guest.system, path).rpartition(b")")[2].split()[11:15] == [ticks, b"0", b"3", b"0"]


# --- as files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "arguments"), [
    ("open", (b"/proc/x\0", CREATE, 0o600)), ("open", (b"/proc/self/x\0", CREATE, 0o600)),
    ("open", (b"/proc/self/fd/99\0", CREATE, 0o600)), ("open", (b"/proc/self/fd/99\0", os.O_RDONLY)),
    ("open", (b"/proc/sys/x\0", CREATE, 0o600)), ("open", (b"/proc/version/\0", os.O_RDONLY)),
    ("open", (b"/proc/version\0", os.O_RDONLY | os.O_DIRECTORY)), ("open", (b"/proc\0", os.O_RDWR)),
    ("open", (b"/proc/self/exe\0", os.O_RDONLY | os.O_NOFOLLOW)),
    ("open", (b"/proc/version\0", CREATE | os.O_EXCL, 0o600)),
    ("mkdir", (b"/proc/x\0", 0o700)), ("mkdir", (b"/proc/self/fd/x\0", 0o700)), ("mkdir", (b"/sys/x\0", 0o700)),
    ("mkdir", (b"/proc/version\0", 0o700)), ("symlink", (b"a\0", b"/proc/x\0")), ("symlink", (b"a\0", b"/sys/x\0")),
    ("unlink", (b"/proc/version\0",)), ("unlink", (b"/proc/self/maps\0",)), ("unlink", (b"/proc\0",)),
    ("rmdir", (b"/proc/self/fd\0",)), ("rmdir", (b"/proc\0",)), ("rename", (b"/proc\0", b"/proc2\0")),
    ("rename", (b"/proc/version\0", b"/proc/other\0")), ("rename", (b"/tmp\0", b"/proc/x\0")),
    ("link", (b"/proc/version\0", b"/tmp/test-procfs\0")), ("access", (b"/proc/version\0", 2)),
    ("getdents64", (0, Out(8), 8)), ("statfs", (b"/nowhere\0", Out(120)))])
def test_what_cannot_be_done(twice: Twice, name: str, arguments: tuple[Any, ...]) -> None:
    ours, theirs = twice.both(name, *arguments)
    if name == "getdents64":
        return
    assert ours == theirs, (ours, theirs)


def test_reading_and_seeking(twice: Twice) -> None:
    """Of /proc/sys/kernel/ostype, which is the same on both."""
    fd = twice.made("open", b"/proc/sys/kernel/ostype\0", os.O_RDONLY)
    assert twice.same("read", fd, Out(3), 3)[1] == [b"Lin"]
    assert twice.same("read", fd, Out(10), 10)[1][0][:3] == b"ux\n"
    assert twice.same("read", fd, Out(10), 10)[0] == 0
    twice.same("lseek", fd, 0, os.SEEK_SET)
    assert twice.same("pread64", fd, Out(10), 10, 2)[0] == 4
    twice.same("lseek", fd, -50, os.SEEK_CUR)
    twice.same("write", fd, b"x", 1)
    twice.same("mmap", 0, PAGE, 1, 2, fd, 0)
    version = twice.made("open", b"/proc/version\0", os.O_RDONLY)
    twice.same("lseek", version, 0, os.SEEK_END)
    assert twice.same("read", version, Out(14), 14)[1] == [b"Linux version "]
    for path in (b"/proc/version\0", b"/proc\0", b"/proc/self/fd\0"):
        (_, ours), (_, theirs) = twice.both("statfs", path, Out(120))
        assert ours[0][:8] == theirs[0][:8]             # what kind of file system
    for path in (b"/proc\0", b"/proc/version\0", b"/proc/self\0", b"/proc/self/fd\0", b"/proc/self/exe\0",
                 b"/proc/self/environ\0", b"/proc/self/comm\0", b"/sys\0"):
        (_, ours), (_, theirs) = twice.both("lstat", path, Out(144))
        assert ours[0][24:28] == theirs[0][24:28], path     # mode


def test_it_says_what_is_now() -> None:
    """Whoever goes back to its beginning reads it anew."""
    guest = Guest()
    guest.now = 5 * 10**9
    fd = guest.call("open", b"/proc/uptime\0", os.O_RDONLY)[0]
    assert guest.call("read", fd, Out(40), 40)[1][0].startswith(b"5.00 ")
    guest.now = 7 * 10**9
    assert guest.call("read", fd, Out(40), 40)[0] == 0
    guest.call("lseek", fd, 0, os.SEEK_SET)
    assert guest.call("read", fd, Out(40), 40)[1][0].startswith(b"7.00 ")


def test_numbers_stay() -> None:
    system = made()
    root = system.files.root
    seen = {path: system.files.find(root, path).stat() for path in (
        b"/proc", b"/proc/sys", b"/proc/version", b"/sys", b"/proc/sys/kernel/random/uuid")}
    assert len({found.ino for found in seen.values()}) == len(seen)
    assert {path: system.files.find(root, path).stat().ino for path in seen} == {
        path: found.ino for path, found in seen.items()}
    assert seen[b"/proc"].dev != root.stat().dev
    assert not {found.ino for found in seen.values()} & set(system.files.store.inodes)


def test_a_working_directory_in_it(twice: Twice) -> None:
    here = os.getcwd()
    try:
        for path in (b"/proc/sys/kernel\0", b"random\0", b"../../net\0", b"..\0", b"/proc/self/fd/..\0", b"fd\0"):
            twice.same("chdir", path)
            (ours, (text,)), (theirs, (other,)) = twice.both("getcwd", Out(200), 200)
            assert text[:ours].replace(b"/1/", b"/N/").replace(b"/1\0", b"/N\0") == other[:theirs].replace(
                b"%d" % os.getpid(), b"N")
    finally:
        os.chdir(here)


def test_it_is_not_saved() -> None:
    """But whatever is mounted there is there again."""
    system = made()
    fs = system.files
    before = len(fs.store.inodes)
    list(fs.find(fs.root, b"/proc").entries())      # type: ignore[attr-defined]
    assert len(fs.store.inodes) == before
    saved = msgspec.msgpack.decode(msgspec.msgpack.encode(fs.save()))
    again = FileSystem.load(saved, fs.store.memory, fs.store.frames, clock=time.time_ns, random=os.urandom)
    proc = again.find(again.root, b"/proc")
    assert isinstance(proc, Directory)
    assert proc.empty()
    assert again.name_of(again.find(again.root, b"/dev/null")) == b"/dev/null"


# --- descriptors -------------------------------------------------------------------------------------------------


def shown(twice: Twice, fd: Fd) -> tuple[bytes, bytes]:
    found = []
    for call, number in ((twice.guest.call, fd.ours), (None, fd.theirs)):
        path = b"/proc/self/fd/%d\0" % number
        if call:
            count, (text,) = call("readlink", path, Out(200), 200)
            found.append(text[:count])
        else:
            found.append(os.readlink(path[:-1]))
    return found[0], found[1]


def test_links_of_descriptors(twice: Twice, tmp_path: Path) -> None:
    """As the host has them; only where they are is another place."""
    top = os.fsencode(tmp_path)
    for part in (*reversed(tmp_path.parents), tmp_path):
        with contextlib.suppress(FileExistsError):
            twice.guest.call("mkdir", os.fsencode(part) + b"\0", 0o755)
    file = twice.made("open", top + b"/a\0", os.O_RDWR | os.O_CREAT, 0o600)
    other = twice.made("open", top + b"/b\0", os.O_RDONLY | os.O_CREAT, 0o600)
    twice.same("mkdir", top + b"/d\0", 0o755)
    directory = twice.made("open", top + b"/d\0", os.O_RDONLY)
    path = twice.made("open", top + b"/a\0", os.O_PATH)
    write = twice.made("open", top + b"/a\0", os.O_WRONLY)
    every = [file, other, directory, path, write]

    def same() -> None:
        for each in every:
            ours, theirs = shown(twice, each)
            assert ours == theirs
            stats = [call("lstat", b"/proc/self/fd/%d\0" % number, Out(144))[1][0] for call, number in (
                (twice.guest.call, each.ours), (lambda name, *more: (0, [host_lstat(more[0])]), each.theirs))]
            assert stats[0][24:28] == stats[1][24:28]

    same()
    twice.same("rename", top + b"/a\0", top + b"/c\0")
    same()
    twice.same("unlink", top + b"/c\0")
    same()
    twice.same("rename", top + b"/d\0", top + b"/e\0")
    same()
    twice.same("rmdir", top + b"/e\0")
    same()
    # A name that is none: the file itself.
    twice.same("write", file, b"hello", 5)
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC):
        again = twice.keep(twice.guest.call("open", b"/proc/self/fd/%d\0" % file.ours, flags)[0],
                           os.open(f"/proc/self/fd/{file.theirs}", flags))
        twice.same("read", again, Out(5), 5)
    assert twice.same("pread64", file, Out(5), 5, 0)[0] == 0        # it was made empty


def host_lstat(path: bytes) -> bytes:
    return bytes(24) + struct.pack("<I", os.lstat(path.rstrip(b"\0")).st_mode) + bytes(116)


def test_links_of_what_has_no_name() -> None:
    guest = Guest()
    (numbers,) = guest.call("pipe2", Out(8), 0)[1]
    reader, writer = struct.unpack("<ii", numbers)
    count, (text,) = guest.call("readlink", b"/proc/self/fd/%d\0" % reader, Out(50), 50)
    assert re.fullmatch(rb"pipe:\[\d+\]", text[:count])
    again = guest.call("open", b"/proc/self/fd/%d\0" % writer, os.O_WRONLY)[0]
    assert isinstance(guest.thread.process.files.get(again), PipeEnd)
    guest.call("close", writer)
    guest.call("write", again, b"through it", 10)
    assert guest.call("read", reader, Out(10), 10)[1][0] == b"through it"
    guest.call("close", again)
    assert guest.call("read", reader, Out(10), 10)[0] == 0          # nobody writes
    fd = guest.call("memfd_create", b"some\0", 0)[0]
    assert guest.call("readlink", b"/proc/self/fd/%d\0" % fd, Out(50), 50)[1][0].rstrip(b"\0") == (
        b"/memfd:some (deleted)")


@pytest.mark.parametrize(("name", "arguments"), [
    ("epoll_create1", (0,)), ("eventfd2", (0, 0)), ("timerfd_create", (1, 0))])
def test_links_of_what_is_no_file(twice: Twice, name: str, arguments: tuple[int, ...]) -> None:
    ours, theirs = shown(twice, twice.made(name, *arguments))
    assert ours == theirs


def test_an_unnamed_file_gets_a_name(twice: Twice, tmp_path: Path) -> None:
    """linkat(2), as it is described there: by the link of /proc."""
    guest = twice.guest
    fd = guest.call("open", b"/tmp\0", os.O_TMPFILE | os.O_RDWR, 0o600)[0]
    count, (text,) = guest.call("readlink", b"/proc/self/fd/%d\0" % fd, Out(50), 50)
    assert re.fullmatch(rb"/tmp/#\d+ \(deleted\)", text[:count])
    guest.call("linkat", -100, b"/proc/self/fd/%d\0" % fd, -100, b"/tmp/named\0", 0x400)
    count, (text,) = guest.call("readlink", b"/proc/self/fd/%d\0" % fd, Out(50), 50)
    assert text[:count] == b"/tmp/named"


def test_standard_output_is_opened_once_more(running: tuple[System, Thread]) -> None:
    system, thread = running
    for name, number in ((b"/dev/stdin", 0), (b"/dev/stdout", 1), (b"/dev/stderr", 2), (b"/dev/fd/1", 1)):
        was = thread.process.files.get(number)
        assert isinstance(was, ConsoleStream)
        found = system.opened(system.files.open(system.files.root, name, was.flags & os.O_ACCMODE), thread)
        assert isinstance(found, ConsoleStream)
        assert found.inode is was.inode
        assert found is not was
        assert found.put(system, thread, b"x") == 1
        uses = was.inode.uses
        found.let_go()
        assert was.inode.uses == uses - 1


# --- what covers the host's --------------------------------------------------------------------------------------


def test_of_the_hosts_nothing_is_shown(tmp_path: Path) -> None:
    for name in ("proc", "sys", "dev", "etc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of-the-host").write_text("secret")
    system = made(str(tmp_path))
    for name in (b"/proc", b"/sys", b"/dev"):
        assert b"of-the-host" not in listed(system, name)
        assert listed(system, name)
    assert b"of-the-host" in listed(system, b"/etc")
    assert {name for name, _, _ in system.files.root.entries()} == {
        b".", b"..", b"proc", b"sys", b"dev", b"etc", b"tmp"}
    close(system)


def test_whatever_was_there_is_covered(tmp_path: Path) -> None:
    (tmp_path / "proc").write_text("a file")
    (tmp_path / "sys").symlink_to("/etc")
    system = made(str(tmp_path))
    assert b"version" in listed(system, b"/proc")
    assert stat.S_ISDIR(system.files.find(system.files.root, b"/sys", follow=False).mode)
    with pytest.raises(OSError, match=r"Errno") as raised:
        system.files.rmdir(system.files.root, b"/proc")
    assert raised.value.errno == errno.EBUSY
    close(system)
