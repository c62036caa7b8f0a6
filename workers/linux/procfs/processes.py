"""Processes and threads as /proc shows them."""

from __future__ import annotations

import errno
import stat as modes
from collections.abc import Callable
from dataclasses import astuple
from typing import TYPE_CHECKING

from ..calls.identity import usual_limit
from ..directories import Directory
from ..inodes import Inode
from ..openfiles import OpenFile
from ..space import PAGE, SegmentationFault
from .entries import Entries, Entry, folder, link, text
from .maps import Sizes, maps, smaps

if TYPE_CHECKING:
    from ..processes import Process, Thread
    from ..system import System

__all__ = ["process_entries", "thread_entries"]

_KIBIBYTES = PAGE // 1024
_UNLIMITED = (1 << 64) - 1
_ALL_RIGHTS = (1 << 41) - 1         # capabilities
_TICK = 10**7                       # nanoseconds of the processor time in stat
_ADJUSTMENT_MOST = 1000             # OOM_SCORE_ADJ_MAX
#: By RLIMIT_*: as they are called, and in what unit.
_LIMITS = (("cpu time", "seconds"), ("file size", "bytes"), ("data size", "bytes"), ("stack size", "bytes"),
           ("core file size", "bytes"), ("resident set", "bytes"), ("processes", "processes"), ("open files", "files"),
           ("locked memory", "bytes"), ("address space", "bytes"), ("file locks", "locks"),
           ("pending signals", "signals"), ("msgqueue size", "bytes"), ("nice priority", ""),
           ("realtime priority", ""), ("realtime timeout", "us"))


def process_entries(system: System, process: Process, thread: Thread | None = None) -> Entries:
    """/proc/<pid>; ``thread``: as that is found by its own number."""
    files = system.files
    return {
        **_common(system, process, lambda: thread or _first(process), whole=True),
        b"auxv": text(lambda: _auxiliary(process), mode=0o400),
        b"fdinfo": folder(lambda: {b"%d" % each: text(lambda each=each: _fdinfo(process, each))    # type: ignore[misc]
                                   for each in process.files}),
        b"mountinfo": text(b"1 0 0:1 / / rw,relatime - tmpfs shardvmm rw\n2 1 0:2 / /proc rw,relatime - proc proc rw\n"
                           b"3 1 0:2 / /sys ro,relatime - sysfs sysfs ro\n"),
        b"net": folder(_NET),
        b"oom_score": text(b"0\n"),
        b"oom_score_adj": text(lambda: b"%d\n" % process.oom_adjustment, lambda data: _adjust(process, data)),
        b"smaps": text(lambda: smaps(files, process.space)),
        b"task": folder(lambda: {b"%d" % each.tid: _task(system, each) for each in process.threads}),
    }


def thread_entries(system: System, thread: Thread) -> Entries:
    """/proc/<pid>/task/<tid>."""
    return _common(system, thread.process, lambda: thread)


def _common(system: System, process: Process, thread: Callable[[], Thread | None], *,
            whole: bool = False) -> dict[bytes, Entry]:
    """``whole``: of the process, not of the thread alone."""
    files = system.files
    return {
        b"cgroup": text(b"0::/\n"),
        b"cmdline": text(lambda: _texts(process, "arguments")),
        b"comm": text(lambda: _name(process, thread()) + b"\n", lambda data: _rename(process, thread(), data)),
        b"cwd": link(lambda: files.name_of(_directory(process)), lambda: _directory(process)),
        b"environ": text(lambda: _texts(process, "environment"), mode=0o400),
        b"exe": link(lambda: files.name_of(_program(process)), lambda: _program(process)),
        b"fd": folder(lambda: {b"%d" % each: _descriptor(system, process, each) for each in process.files}, mode=0o500),
        b"limits": text(lambda: _limits(process)),
        b"maps": text(lambda: maps(files, process.space)),
        b"mounts": text(b"shardvmm / tmpfs rw,relatime 0 0\nproc /proc proc rw,relatime 0 0\n"
                        b"sysfs /sys sysfs ro,relatime 0 0\n"),
        b"root": link(b"/", lambda: files.root),
        b"stat": text(lambda: _stat(system, process, thread(), whole=whole)),
        b"statm": text(lambda: _statm(process)),
        b"status": text(lambda: _status(system, process, thread())),
    }


def _task(system: System, thread: Thread) -> Entry:
    tid = thread.tid
    return folder(lambda: thread_entries(system, thread), is_there=lambda: not thread.ended and thread.tid == tid)


def _first(process: Process) -> Thread | None:
    """The one that it began with; any other where that has ended."""
    return next((each for each in process.threads if each.tid == process.pid), next(iter(process.threads), None))


# --- what it has -------------------------------------------------------------------------------------------------


def _directory(process: Process) -> Directory:
    """Raises OSError."""
    if process.code is not None:
        raise OSError(errno.ENOENT, "")
    return process.directory


def _program(process: Process) -> Inode:
    """Raises OSError."""
    beginning = process.space.beginning
    if process.code is not None or beginning is None or not isinstance(beginning.file, Inode):
        raise OSError(errno.ENOENT, "")
    return beginning.file


def _descriptor(system: System, process: Process, number: int) -> Entry:
    """/proc/<pid>/fd/<number>."""
    def file() -> OpenFile:
        """Whichever it is then."""
        try:
            return process.files.get(number, path_only=True)
        except OSError:
            raise OSError(errno.ENOENT, "") from None

    there = file()
    mode = (0o500 if there.readable else 0) | (0o300 if there.writable else 0)
    return link(lambda: _shown(system, file()), lambda: file().inode, mode=mode)


def _shown(system: System, file: OpenFile) -> bytes:
    inode = file.inode
    if inode.place is None:
        kind = {modes.S_IFIFO: b"pipe", modes.S_IFSOCK: b"socket"}.get(inode.kind)
        if file.label or kind:
            return file.label or b"%s:[%d]" % (kind, inode.number)
    return system.files.name_of(inode)


def _fdinfo(process: Process, number: int) -> bytes:
    try:
        file = process.files.get(number, path_only=True)
    except OSError:
        raise OSError(errno.ESRCH, "") from None
    flags = file.flags | (0o2000000 if process.files.descriptor(number).close_on_exec else 0)
    return b"pos:\t%d\nflags:\t0%o\nmnt_id:\t1\nino:\t%d\n" % (file.position, flags, file.inode.number)


def _auxiliary(process: Process) -> bytes:
    beginning = process.space.beginning
    return beginning.auxiliary if beginning else b""


def _texts(process: Process, which: str) -> bytes:
    """Where the program has found its arguments or its environment: it may have written something else there."""
    beginning = process.space.beginning
    if process.code is not None or beginning is None:
        return b""
    start, end = beginning.arguments if which == "arguments" else beginning.environment
    try:
        return process.space.read(start, end - start)
    except SegmentationFault:
        return b""


def _name(process: Process, thread: Thread | None) -> bytes:
    return process.name if thread is None else thread.name


def _rename(process: Process, thread: Thread | None, data: bytes) -> None:
    name = data.rstrip(b"\n").partition(b"\0")[0][:15]
    if thread is not None:
        thread.name = name
    if thread is None or thread.tid == process.pid:
        process.name = name


def _adjust(process: Process, data: bytes) -> None:
    """Raises OSError."""
    try:
        value = int(data)
    except ValueError:
        raise OSError(errno.EINVAL, "") from None
    if not -_ADJUSTMENT_MOST <= value <= _ADJUSTMENT_MOST:
        raise OSError(errno.EINVAL, "")
    process.oom_adjustment = value


def _limits(process: Process) -> bytes:
    lines = [f"{'Limit':<25} {'Soft Limit':<20} {'Hard Limit':<20} {'Units':<10}"]
    for which, (name, unit) in enumerate(_LIMITS):
        soft, hard = ("unlimited" if each == _UNLIMITED else str(each)
                      for each in process.limits.get(which, usual_limit(which)))
        lines.append(f"{'Max ' + name:<25} {soft:<20} {hard:<20} {unit:<10}")
    return "".join(line + "\n" for line in lines).encode()


# --- how it does -------------------------------------------------------------------------------------------------


def _state(system: System, process: Process, thread: Thread | None) -> str:
    if process.code is not None or thread is None:
        return "Z"
    if process.stopped:
        return "T"
    return "R" if thread is system.caller else "S"


def _signals(process: Process, thread: Thread | None) -> dict[str, int]:
    """Sets, a bit each."""
    def bits(numbers: list[int]) -> int:
        return sum({1 << number - 1 for number in numbers})

    return {
        "SigPnd": bits([each.number for each in thread.pending] if thread else []),
        "ShdPnd": bits([each.number for each in process.pending]),
        "SigBlk": thread.blocked if thread else 0,
        "SigIgn": bits([number for number, action in process.actions.items() if action.ignores]),
        "SigCgt": bits([number for number, action in process.actions.items()
                        if not action.ignores and not action.is_default])}


def _stat(system: System, process: Process, thread: Thread | None, *, whole: bool) -> bytes:
    sizes, signals, beginning = Sizes(process.space), _signals(process, thread), process.space.beginning
    arguments, environment = (beginning.arguments, beginning.environment) if beginning else ((0, 0), (0, 0))
    stack = beginning.stack if beginning else 0
    code, used = process.code or 0, process.cpu_ns if whole or thread is None else thread.cpu_ns
    tid = process.pid if thread is None else thread.tid
    fields = [
        process.parent, process.group, process.session, 0, -1, 0, *[0] * 4, used // _TICK, 0,
        process.cpu_children // _TICK, 0, 20 + process.niceness, process.niceness,
        len(process.threads), 0, 0,
        sizes.virtual * PAGE, sizes.resident, _UNLIMITED, *[1 if beginning else 0] * 2, stack, 0, 0,
        (signals["SigPnd"] | signals["ShdPnd"]) & 0x7FFF_FFFF, signals["SigBlk"] & 0x7FFF_FFFF,
        signals["SigIgn"] & 0x7FFF_FFFF, signals["SigCgt"] & 0x7FFF_FFFF, 0, 0, 0, process.exit_signal, 0, 0, 0, 0, 0,
        0, 0, 0, process.space.heap * PAGE, *arguments, *environment, code]
    return b"%d (%s) %s %s\n" % (tid, _name(process, thread), _state(system, process, thread).encode(),
                                 b" ".join(b"%d" % each for each in fields))


def _statm(process: Process) -> bytes:
    sizes = Sizes(process.space)
    return b"%d %d %d %d 0 %d 0\n" % (sizes.virtual, sizes.resident, sizes.shared, sizes.text,
                                      sizes.data + sizes.stack)


_STATES = {"R": "running", "S": "sleeping", "T": "stopped", "Z": "zombie"}


def _status(system: System, process: Process, thread: Thread | None) -> bytes:
    state, sizes = _state(system, process, thread), Sizes(process.space)
    tid = process.pid if thread is None else thread.tid
    number = system.processors
    values: dict[str, object] = {
        "Name": _name(process, thread).decode(errors="surrogateescape"), "Umask": f"{process.mask:04o}",
        "State": f"{state} ({_STATES[state]})", "Tgid": process.pid, "Ngid": 0, "Pid": tid, "PPid": process.parent,
        "TracerPid": 0, "Uid": "\t".join(map(str, astuple(process.users))),
        "Gid": "\t".join(map(str, astuple(process.groups))),
        "FDSize": max(64, 1 << max(process.files, default=0).bit_length()),
        "Groups": " ".join(map(str, process.more_groups)) + " ", "NStgid": process.pid,
        "NSpid": tid, "NSpgid": process.group, "NSsid": process.session}
    if process.code is None:
        kilobytes = {
            "VmPeak": sizes.virtual, "VmSize": sizes.virtual, "VmLck": 0, "VmPin": 0, "VmHWM": sizes.resident,
            "VmRSS": sizes.resident, "RssAnon": sizes.resident - sizes.shared, "RssFile": sizes.shared, "RssShmem": 0,
            "VmData": sizes.data, "VmStk": sizes.stack, "VmExe": sizes.text, "VmLib": sizes.library, "VmPTE": 0,
            "VmSwap": 0}
        values |= {name: f"{value * _KIBIBYTES:8} kB" for name, value in kilobytes.items()}
    values |= {"Threads": max(1, len(process.threads)), "SigQ": "0/1024"}
    values |= {name: f"{bits:016x}" for name, bits in _signals(process, thread).items()}
    values |= {"CapInh": f"{0:016x}", **dict.fromkeys(("CapPrm", "CapEff", "CapBnd"), f"{_ALL_RIGHTS:016x}"),
               "CapAmb": f"{0:016x}", "NoNewPrivs": 0, "Seccomp": 0,
               "Cpus_allowed": f"{(1 << number) - 1:x}", "Cpus_allowed_list": f"0-{number - 1}" if number > 1 else "0",
               "Mems_allowed": 1, "Mems_allowed_list": 0, "voluntary_ctxt_switches": 0, "nonvoluntary_ctxt_switches": 0}
    return "".join(f"{name}:\t{value}\n" for name, value in values.items()).encode(errors="surrogateescape")


# --- the network: there is none ----------------------------------------------------------------------------------

_SOCKETS = (b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"
            b"                                                     \n")
_NET: dict[bytes, Entry] = {
    b"dev": text(b"Inter-|   Receive                                                |  Transmit\n"
                 b" face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo "
                 b"colls carrier compressed\n"
                 b"    lo:       0       0    0    0    0     0          0         0        0       0    0    0    0 "
                 b"    0       0          0\n"),
    b"if_inet6": text(b""),
    b"route": text(b"Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT"
                   b"                                                       \n"),
    **{name: text(_SOCKETS) for name in (b"tcp", b"tcp6", b"udp", b"udp6", b"raw")},
    b"unix": text(b"Num       RefCount Protocol Flags    Type St Inode Path\n"),
}
