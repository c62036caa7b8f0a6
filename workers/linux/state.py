"""The state of the whole system as plain data, between two calls: what a snapshot stores and a migration sends.

What there is knows itself how it is saved (``save``) and what it leads to (``save_links``); here is the order in which
all of it comes back:

    files               the file system, by itself: inodes by number
    frames              as often as somebody has one of them, it is used
    open, pipes         open files by number, then (``link``) what they lead to: pipes, peers, each other
    tables, spaces      tables of descriptors, address spaces: in the order in which processes name them
    processes           and their threads
    made                inodes of /proc, by path: what they are about is there now (until then: `gone`)

What came from outside (forward.py) is reset. Not here: contents of memory, page tables (they follow), the host's
files (a source is attached again by its name), what threads have in their vCPUs (dispatch.py). A blocked call is none
of it: it is made again.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ipc.messages import UNREADABLE

from ..state import StateError
from .chance import Chance
from .channels import Channel, ConsoleStream, Terminal
from .contents import Regular
from .directories import Directory, new_inode
from .epoll import Epoll, load_interests, save_interests
from .events import EventFile, TimerFile
from .frames import Frames
from .inet import InetSocket, TcpSocket, UdpSocket
from .inodes import Inode
from .made import TextFile, gone, is_made, load_made, save_made
from .openfiles import OpenFile
from .pipes import Pipe, PipeEnd
from .processes import FileTable, Process
from .procfs import mount
from .sockets import Socket
from .space import Backing, Memory, Space
from .tables import NoTables, Tables
from .unix import UnixSocket
from .vdso import Vdso
from .vfs import FileSystem

if TYPE_CHECKING:
    from .sources import Source
    from .system import System

__all__ = ["VERSION", "Loading", "Saving", "load_system", "pack", "save_system", "unpack"]

#: Of the format.
VERSION = 2

_LEVEL = 1                  # of zlib: what is saved while a machine stands still is saved fast
_UNPACKED_MAX = 1 << 30     # bytes
_PACKED = frozenset({"system", "threads", "ended", "served"})

_VDSO = -1          # as a backing
_KINDS: dict[str, type[OpenFile]] = {
    "file": OpenFile, "text": TextFile, "terminal": Terminal, "stream": ConsoleStream, "pipe": PipeEnd,
    "event": EventFile, "timer": TimerFile, "epoll": Epoll, "unix": UnixSocket, "tcp": TcpSocket, "udp": UdpSocket}
_NAMES = {kind: name for name, kind in _KINDS.items()}

T = TypeVar("T")


class Saving:
    """What has been referred to, and is saved once. Each of the methods gives what stands for it."""

    def __init__(self, system: System) -> None:
        self._inodes = system.files.store.inodes
        self.files: dict[int, OpenFile] = {}
        self.pipes: dict[Pipe, int] = {}
        self.tables: dict[FileTable, int] = {}
        self.spaces: dict[Space, int] = {}
        self.made: dict[Inode, int] = {each: at for at, each in enumerate(system.files.root.covered.values())}

    def file(self, file: OpenFile) -> int:
        assert self.files.setdefault(file.number, file) is file
        return file.number

    def pipe(self, pipe: Pipe) -> int:
        return self.pipes.setdefault(pipe, len(self.pipes))

    def table(self, table: FileTable) -> int:
        return self.tables.setdefault(table, len(self.tables))

    def space(self, space: Space) -> int:
        return self.spaces.setdefault(space, len(self.spaces))

    def inode(self, inode: Inode) -> int | dict[str, int]:
        """Also one that is in no table."""
        if self._inodes.get(inode.number) is inode:
            return inode.number
        if is_made(inode):
            return {"made": self.made.setdefault(inode, len(self.made))}
        return {"gone": inode.number, "mode": inode.mode}

    def backing(self, backing: Backing | None) -> int | None:
        if backing is None:
            return None
        return _VDSO if isinstance(backing, Vdso) else _regular(backing).number


class Loading:
    """What is there already."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.files: dict[int, OpenFile] = {}
        self.pipes: list[Pipe] = []
        self.tables: list[FileTable] = []
        self.spaces: list[Space] = []
        self.made: list[Inode] = []

    def channel(self, number: int) -> Channel:
        return _checked(self.files[number], Channel)

    def socket(self, number: int) -> Socket:
        return _checked(self.files[number], Socket)

    def unix(self, number: int) -> UnixSocket:
        return _checked(self.files[number], UnixSocket)

    def inet(self, number: int) -> InetSocket:
        return _checked(self.files[number], InetSocket)

    def tcp(self, number: int) -> TcpSocket:
        return _checked(self.files[number], TcpSocket)

    def inode(self, saved: int | dict[str, int]) -> Inode:
        store = self.system.files.store
        if not isinstance(saved, dict):
            return store.inodes[saved]
        if "made" in saved:
            return self.made[saved["made"]]
        found = new_inode(store, saved["mode"], number=saved["gone"])
        del store.inodes[found.number]
        found.nlink = 0
        return found

    def directory(self, saved: int | dict[str, int]) -> Directory:
        return _checked(self.inode(saved), Directory)

    def backing(self, saved: int | None) -> Backing | None:
        if saved is None:
            return None
        if saved == _VDSO:
            return _checked(self.system.vdso, Vdso)
        return _regular(self.system.files.store.inodes[saved])


def _checked(found: object, kind: type[T]) -> T:
    """Raises TypeError."""
    if not isinstance(found, kind):
        raise TypeError(f"a {type(found).__name__} is no {kind.__name__}")
    return found


def _regular(found: object) -> Regular:
    return _checked(found, Regular)


# --- as bytes ------------------------------------------------------------------------------------------------------


def pack(saved: dict[str, Any]) -> bytes:
    """Of the whole vCPU that is the system (serve.py)."""
    return zlib.compress(msgspec.msgpack.encode(saved), _LEVEL)


def unpack(data: bytes) -> dict[str, Any]:
    """Raises StateError."""
    try:
        reader = zlib.decompressobj()
        saved = msgspec.msgpack.decode(reader.decompress(data, _UNPACKED_MAX))
    except (zlib.error, *UNREADABLE) as exc:
        raise StateError(f"the state of a program's system cannot be read: {exc}") from None
    if not reader.eof or not isinstance(saved, dict) or saved.keys() != _PACKED:
        raise StateError("not the state of a program's system")
    return saved


# --- saving --------------------------------------------------------------------------------------------------------


def save_system(system: System) -> dict[str, Any]:
    saving, files = Saving(system), system.files
    random = files.store.random
    saved: dict[str, Any] = {
        "version": VERSION, "monotonic": system.monotonic(), "host": system.host, "boot": system.boot,
        "threads_max": system.threads_max, "processors": system.processors, "memory_pages": system.memory_pages,
        "next_id": system.next_id, "code": system.code, "refused": system.refused,
        "missing": [[number, count] for number, count in system.missing.items()],
        "random": random.save() if isinstance(random, Chance) else None,
        "vdso": None if system.vdso is None else system.vdso.save(), "console": system.console.save(),
        "processes": [each.save(saving) for each in system.processes.values()], "threads": list(system.threads),
        "network": system.network.save(saving), "outside": [saving.file(each) for each in system.outside],
        "fifos": [[number, saving.pipe(pipe)] for number, pipe in system.fifos.items()]}
    saved["tables"] = [each.save(saving) for each in saving.tables]
    saved["spaces"] = [each.save(saving) for each in saving.spaces]
    saved["open"] = _save_files(saving)
    saved["pipes"] = [each.save() for each in saving.pipes]
    saved["interests"] = save_interests(system.interests)
    saved["files"] = files.save()
    saved["made"] = [save_made(each) for each in saving.made]
    return saved


def _save_files(saving: Saving) -> list[dict[str, Any]]:
    """Those that have been referred to, and what they refer to."""
    found: dict[int, dict[str, Any]] = {}
    while len(found) < len(saving.files):
        for number, file in list(saving.files.items()):
            if number not in found:
                found[number] = {"kind": _NAMES[type(file)], **file.save(), **file.save_links(saving),
                                 "inode": saving.inode(file.inode)}
    return [each for _, each in sorted(found.items())]


# --- loading -------------------------------------------------------------------------------------------------------


def load_system(system: System, saved: Any, memory: Memory, frames: Frames, tables: Tables, *,
                realtime: Callable[[], int], monotonic: Callable[[], int], tsc: Callable[[], int] | None,
                sources: Mapping[str, Source]) -> None:
    """Into a system of which nothing is there. Raises StateError, and NoTables."""
    version = saved.get("version") if isinstance(saved, dict) else None
    if version != VERSION:
        raise StateError(f"system state version {version!r} is not supported: this program reads version {VERSION}")
    try:
        _load(system, saved, memory, frames, tables, realtime, monotonic, tsc, sources)
    except (NoTables, StateError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, struct.error) as exc:
        raise StateError(f"not a valid state of a program's system: {type(exc).__name__}: {exc}") from exc


def _load(system: System, saved: dict[str, Any], memory: Memory, frames: Frames, tables: Tables,
          realtime: Callable[[], int], monotonic: Callable[[], int], tsc: Callable[[], int] | None,
          sources: Mapping[str, Source]) -> None:
    loading, ahead = Loading(system), saved["monotonic"] - monotonic()
    random = os.urandom if saved["random"] is None else Chance.load(saved["random"])
    files = FileSystem.load(saved["files"], memory, frames, clock=realtime, random=random)
    for name, source in sources.items():
        files.attach(name, source)
    for inode in files.store.inodes.values():
        if isinstance(inode, Regular) and (changed := inode.changed_source) is not None:
            raise StateError(f"the program has begun to read {os.fsdecode(changed[1])}, of which the rest is not in "
                             f"the files that it has here ({changed[0]})")
    frames.restore([
        *((frame, 1) for frame in (saved["vdso"] or ())[1:]),
        *(run for inode in files.store.inodes.values() if isinstance(inode, Regular) for run in inode.held),
        *((frame, count) for space in saved["spaces"] for _, frame, count, _ in space["pages"])])
    vdso = None if not saved["vdso"] else Vdso(
        memory, frames, monotonic=lambda: monotonic() + ahead, realtime=realtime, tsc=tsc, saved=saved["vdso"])
    system.begin(memory, frames, tables, files, realtime=realtime, monotonic=lambda: monotonic() + ahead, vdso=vdso,
                 host=saved["host"], boot=saved["boot"], threads_max=saved["threads_max"],
                 processors=saved["processors"], memory_pages=saved["memory_pages"])
    mount(system)
    loading.made = [gone(files.store, each["path"], each["mode"]) for each in saved["made"]]
    system.next_id, system.code = saved["next_id"], saved["code"]
    system.refused, system.missing = saved["refused"], Counter(dict(saved["missing"]))
    _load_files(loading, saved)
    loading.tables = [FileTable.load(loading, each) for each in saved["tables"]]
    loading.spaces = [Space.load(loading, each, memory, frames, tables) for each in saved["spaces"]]
    _load_processes(loading, saved)
    system.network.load(loading, saved["network"])
    load_interests(loading, saved["interests"])
    system.console.load(saved["console"], system.monotonic)
    loading.made = [load_made(files.root, each) for each in saved["made"]]
    for each in saved["open"]:
        if isinstance(each["inode"], dict):
            loading.files[each["number"]].inode = loading.inode(each["inode"])
    for each in saved["processes"]:
        system.processes[each["pid"]].directory = loading.directory(each["directory"])
    for number in saved["outside"]:     # nobody is there any more: the peer finds the connection reset
        socket = loading.tcp(number)
        socket.linger = (1, 0)
        socket.let_go()


def _load_files(loading: Loading, saved: dict[str, Any]) -> None:
    """Also pipes."""
    system = loading.system
    for each in saved["open"]:
        at = each["inode"]
        file = _KINDS[each["kind"]].load(system.files.store, each, loading.inode(at) if isinstance(at, dict) else None)
        loading.files[file.number] = file
    loading.pipes = [Pipe.load(system.notify, each) for each in saved["pipes"]]
    system.fifos.update({number: loading.pipes[each] for number, each in saved["fifos"]})
    for each in saved["open"]:
        loading.files[each["number"]].link(loading, each)


def _load_processes(loading: Loading, saved: dict[str, Any]) -> None:
    system = loading.system
    for each in saved["processes"]:
        process = Process.load(loading, each)
        system.processes[process.pid] = process
        if process.code is None:
            process.space.users += 1
            process.files.users += 1
    threads = {thread.tid: (thread, each) for process in saved["processes"]
               for thread, each in zip(system.processes[process["pid"]].threads, process["threads"], strict=True)}
    for thread, each in threads.values():
        thread.vfork = None if each["vfork"] is None else system.processes[each["vfork"]]
    system.threads = {tid: threads[tid][0] for tid in saved["threads"]}
