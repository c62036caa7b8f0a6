"""The operating system that programs see: all of it is here, and is data of one process without threads.

Calls come from vCPUs, one after the other (``call``). One that would have to wait is `Blocked`: its thread makes it
again when something has changed, or when its time has come.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self

from . import signals
from .abi import number_of
from .calls import SERVED
from .channels import ConsoleStream, Terminal
from .contents import Regular
from .directories import Directory
from .epoll import Watcher
from .frames import Frames, NoFrames
from .inodes import Inode, Node
from .network import Network
from .openfiles import OpenFile
from .pipes import Pipe, PipeEnd, open_fifo
from .population import SI_KERNEL, SI_TIMER, Population
from .processes import FileTable, Process, Thread
from .procfs import mount
from .program import Executable, Started, start
from .signals import SignalInfo
from .sources import Source
from .space import Memory, SegmentationFault, Space
from .state import load_system, save_system
from .tables import NoTables, Tables
from .terminal import Tty
from .timers import Timer
from .vdso import Vdso
from .vfs import FileSystem

__all__ = ["Console", "System"]

_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NANOSLEEP, _CLOCK_NANOSLEEP = number_of("nanosleep"), number_of("clock_nanosleep")
_DEVICES = {b"null": Node.NULL, b"zero": Node.ZERO, b"full": Node.FULL, b"random": Node.RANDOM[0],
            b"urandom": Node.RANDOM[1], b"tty": Node.TERMINALS[0], b"console": Node.TERMINALS[1]}

_LINKS = {b"fd": b"/proc/self/fd", b"stdin": b"/proc/self/fd/0", b"stdout": b"/proc/self/fd/1",
          b"stderr": b"/proc/self/fd/2"}


class Console(Protocol):
    """What the first process has open as its standard input, output and error."""

    #: A terminal (``tty``), or else three streams.
    terminal: bool

    @property
    def tty(self) -> Tty | None:
        """What it is to programs."""

    def read(self, count: int) -> bytes | None:
        """Empty at its end; None: nothing has come yet."""

    def ready(self) -> bool:
        """Something can be read, or its end has come."""

    def write(self, data: bytes, *, error: bool) -> int:
        """How many bytes were taken. ``error``: of standard error."""

    def writable(self) -> bool:
        """There is room."""

    def settle(self) -> bool:
        """After something has been done with its ``tty``; whether somebody may have waited for what followed."""

    def ioctl(self, system: System, thread: Thread, request: int, argument: int) -> int:
        """Of a terminal. Raises OSError."""

    def save(self) -> dict[str, Any]:
        """Plain data."""

    def load(self, saved: dict[str, Any], clock: Callable[[], int]) -> None:
        """Into one that has not been used. ``clock``: of the system (``monotonic``)."""


class System(Population):
    """``realtime`` and ``monotonic``: nanoseconds. ``threads_max``: how many threads there can be at once.
    ``processors``: that programs find, for as much as they want to do at once (0: as many)."""

    def __init__(self, memory: Memory, frames: Frames, tables: Tables, files: FileSystem, console: Console, *,
                 realtime: Callable[[], int], monotonic: Callable[[], int], threads_max: int = 1, processors: int = 0,
                 host: bytes = b"shardvmm", vdso: Vdso | None = None) -> None:
        super().__init__()
        self.console = console
        self.begin(memory, frames, tables, files, realtime=realtime, monotonic=monotonic, vdso=vdso, host=host,
                   boot=files.store.random(16), threads_max=threads_max, processors=processors or threads_max,
                   memory_pages=frames.free)
        self._make_devices()
        mount(self)

    def begin(self, memory: Memory, frames: Frames, tables: Tables, files: FileSystem, *, realtime: Callable[[], int],
              monotonic: Callable[[], int], vdso: Vdso | None, host: bytes, boot: bytes, threads_max: int,
              processors: int, memory_pages: int) -> None:
        """Of one that is new, or loaded: what it stands on. ``boot``: of this one, random."""
        self._memory, self.frames, self._tables = memory, frames, tables
        tables.forget = lambda: self.launcher.forget_tables()
        self.memory_pages = memory_pages
        self.files = files
        self.realtime, self.monotonic = realtime, monotonic
        self.vdso = vdso
        if vdso is not None:        # what a call says, and what a program reads, is one
            self.realtime, self.monotonic = vdso.realtime, vdso.monotonic
        self.threads_max, self.processors, self.host, self.boot = threads_max, processors, host, boot
        #: Calls that nobody serves, and how often each was made.
        self.missing: Counter[int] = Counter()
        #: Threads and processes that there was no vCPU for.
        self.refused = 0
        #: What is in fifos that somebody has open, by inode.
        self.fifos: dict[int, Pipe] = {}
        self.network = Network(files.store, self.notify)
        #: Who looks at what, by source: epoll instances, forwarded connections.
        self.interests: dict[Hashable, list[Watcher]] = {}
        #: Sockets whose other end is in no program: forwarded connections.
        self.outside: set[OpenFile] = set()
        #: Whose call is served now, or was the last.
        self.caller: Thread | None = None

    def _make_devices(self) -> None:
        """/dev, where it is not there; an imported one is another machine's. And what is made when somebody looks."""
        root = self.files.root
        for path in (b"/dev", b"/tmp", b"/proc", b"/sys"):
            try:
                self.files.mkdir(root, path, 0o755)
            except FileExistsError:
                continue
        devices = root.find(b"dev")
        if isinstance(devices, Directory):
            devices.forget_source()
        for name, device in _DEVICES.items():
            try:
                self.files.mknod(root, b"/dev/" + name, stat.S_IFCHR | 0o666, device)
            except FileExistsError:
                continue
        for name, target in _LINKS.items():
            try:
                self.files.symlink(target, root, b"/dev/" + name)
            except FileExistsError:
                continue

    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Between two calls (state.py says what is in it, and what is not)."""
        return save_system(self)

    @classmethod
    def load(cls, saved: Any, memory: Memory, frames: Frames, tables: Tables, console: Console, *,
             realtime: Callable[[], int], monotonic: Callable[[], int], tsc: Callable[[], int] | None = None,
             sources: Mapping[str, Source] | None = None) -> Self:
        """Over the memory as it was; ``frames``, ``tables`` and ``console`` have not been used. For programs, the
        monotonic clock goes on where it was. ``tsc``: the counter that they see (vdso/tsc.py). ``launcher`` comes from
        the caller. Raises StateError, and NoTables."""
        found = cls.__new__(cls)
        Population.__init__(found)
        found.console = console
        load_system(found, saved, memory, frames, tables, realtime=realtime, monotonic=monotonic, tsc=tsc,
                    sources=sources or {})
        return found

    # --- processes -------------------------------------------------------------------------------------------------

    def spawn(self, path: bytes, arguments: Sequence[bytes],
              environment: Sequence[bytes], directory: bytes = b"/") -> tuple[Thread, Started]:
        """The first process, its console open three times. A path without a slash is looked for as a shell does.
        Raises OSError (with a file name: it is the directory), NoFrames, NoTables."""
        space = self.new_space()
        pid = self.new_id()
        root = self.files.root
        try:
            at = self.files.find(root, directory)
        except OSError as exc:
            raise OSError(exc.errno, "", directory) from None
        if not isinstance(at, Directory):
            raise OSError(errno.ENOTDIR, "", directory)
        at.keep()
        process = Process(pid, 0, space, FileTable(pid), at, group=pid, session=pid)
        path = self._searched(path, environment)
        started = start(space, self.executable, path, arguments, environment, random=self.files.store.random(16),
                        vdso=self.vdso.map if self.vdso else None)
        for flags, error in ((os.O_RDONLY, False), (os.O_WRONLY, False), (os.O_WRONLY, True)):
            process.files.add(self.opened(self.files.open(root, b"/dev/console", os.O_RDWR)) if self.console.terminal
                              else ConsoleStream(self.files.store, flags, error=error))
        self.processes[pid] = process
        self.name_program(process, started, path, arguments, environment)
        return self.new_thread(process, process.name, pid), started

    def new_space(self) -> Space:
        """Raises NoTables."""
        return Space(self._memory, self.frames, self._tables, self.memory_pages)

    @staticmethod
    def name_program(process: Process, started: Started, path: bytes, arguments: Sequence[bytes],
                     environment: Sequence[bytes]) -> None:
        """What is known about the program that it has now."""
        process.path, process.name = started.path, os.path.basename(path)[:15]
        process.arguments, process.environment = list(arguments), list(environment)

    def _searched(self, name: bytes, environment: Sequence[bytes]) -> bytes:
        if b"/" in name:
            return name
        path = next((each[5:] for each in environment if each.startswith(b"PATH=")), _PATH)
        for directory in path.split(b":"):
            found = (directory or b".") + b"/" + name
            try:
                self.executable(found)
            except OSError:
                continue
            return found
        raise OSError(errno.ENOENT, "")

    def executable(self, path: bytes, at: Inode | None = None) -> Executable:
        """``at``: where a relative path begins. Raises OSError."""
        inode = self.files.find(at or self.files.root, path)
        if not isinstance(inode, Regular) or not inode.mode & 0o111:
            raise OSError(errno.EACCES, "")
        return inode

    def opened(self, file: OpenFile, thread: Thread | None = None) -> OpenFile:
        """A file that was just opened, as what it leads to. Raises OSError, and Blocked: then it is the thread's
        (``Thread.opening``), and this is asked again with it."""
        inode = file.inode
        if thread is not None and inode.kind == stat.S_IFIFO and not file.path_only:
            return self._once_more(file) or open_fifo(self, thread, file)
        if isinstance(inode, Node) and stat.S_ISCHR(inode.mode) and inode.rdev in Node.TERMINALS and not file.path_only:
            if inode.rdev == Node.TERMINALS[0] and not self._is_controlled(thread):
                file.let_go()
                raise OSError(errno.ENXIO, "")
            return Terminal(inode, file.flags, file.number)
        return file

    def notify(self, source: Hashable, events: int = 0) -> None:
        super().notify(source, events)
        for each in tuple(self.interests.get(source, ())):
            each.happened(self, events)

    def _once_more(self, file: OpenFile) -> OpenFile | None:
        """One without a name, which somebody has open: found by a link of /proc."""
        if file.inode.place is None:
            for process in self.processes.values():
                for number in process.files:
                    there = process.files.get(number, path_only=True)
                    if there.inode is file.inode and isinstance(there, ConsoleStream):
                        return there.again(file)
                    if there.inode is file.inode and isinstance(there, PipeEnd):
                        return PipeEnd(there.pipe, file.inode, file.flags, file.number)
        return None

    def _is_controlled(self, thread: Thread | None) -> bool:
        """By the terminal."""
        tty = self.console.tty if self.console.terminal else None
        return tty is not None and (thread is None or thread.process.session == tty.session)

    # --- calls -----------------------------------------------------------------------------------------------------

    def call(self, thread: Thread, number: int, arguments: Sequence[int]) -> int:
        """The result, negative for an error. Raises Blocked, and Ended where the thread does not come back."""
        self.caller, process = thread, thread.process
        self.files.owner = process.users.files, process.groups.files
        function = SERVED.get(number)
        if function is None:
            self.missing[number] += 1
            return -errno.ENOSYS
        try:
            result = function(self, thread, *arguments)
        except OSError as error:
            result = -(error.errno or errno.EIO)
        except SegmentationFault:
            result = -errno.EFAULT
        except (NoFrames, NoTables):
            result = -errno.ENOMEM
        self.give_up(thread)
        if self.files.store.cut:
            self._lose_cut(thread.process.space)
        return result

    def _lose_cut(self, space: Space) -> None:
        """What mapped files have lost, no address space has any more."""
        spaces = {id(each.space): each.space for each in self.processes.values() if each.code is None}
        for cut in self.files.take_cut():
            assert isinstance(cut.inode, Regular)
            for each in spaces.values():
                each.lose(cut.inode, cut.first, cut.end, cut.frames)
        for each in spaces.values():
            if each is not space and each.stale:
                self.launcher.forget_space(each)

    @staticmethod
    def give_up(thread: Thread) -> None:
        """What a call that was blocked has begun is over: it is not made again."""
        thread.deadline, thread.done, thread.lock_owner = None, 0, 0
        opening, thread.opening = thread.opening, None
        if opening is not None:
            opening.let_go()

    def write_time_left(self, thread: Thread, number: int, arguments: Sequence[int]) -> None:
        """Of a sleep that a signal has interrupted: where it is asked for."""
        if thread.deadline is None:
            return
        left = max(0, thread.deadline - self.monotonic())
        address = 0
        if number == _NANOSLEEP:
            address = arguments[1]
        elif number == _CLOCK_NANOSLEEP and not arguments[1] & 1:
            address = arguments[3]
        if address:
            try:
                thread.process.space.write(address, struct.pack("<qq", *divmod(left, 10**9)))
            except SegmentationFault:
                pass

    # --- timers ----------------------------------------------------------------------------------------------------

    def next_timer(self) -> int | None:
        """When (monotonic) the next timer of a process is over."""
        first = None
        for process in self.processes.values():     # asked for with each turn: most have none
            if process.alarm[0] or process.timers:
                for at in (process.alarm[0], *(each.due for each in process.timers.values())):
                    if at and (first is None or at < first):
                        first = at
        return first

    def expire(self) -> None:
        """Signal those that are. Clocks go on too."""
        if self.vdso is not None:
            self.vdso.update()
        first = self.next_timer()
        if first is None or first > (now := self.monotonic()):
            return
        for process in list(self.processes.values()):
            at, interval = process.alarm
            if at and at <= now:
                process.alarm = (at + (1 + (now - at) // interval) * interval if interval else 0, interval)
                self.signal_process(process, SignalInfo(signals.ALRM, SI_KERNEL))
            for number, timer in list(process.timers.items()):
                self._expire_timer(process, number, timer, now)

    def _expire_timer(self, process: Process, number: int, timer: Timer, now: int) -> None:
        """Its signal is there once, until it is taken."""
        if not 0 < timer.due <= now:
            return
        thread = self.threads.get(timer.tid) if timer.tid else None
        info = SignalInfo(timer.number, SI_TIMER, number, value=timer.value)
        timer.missed = timer.expire(now) - 1
        timer.pending = True
        if thread is not None:
            self.signal_thread(thread, info)
        elif not timer.tid:
            self.signal_process(process, info)
        # Ignored, it is not.
        timer.pending = any(each is info for each in (process.pending if thread is None else thread.pending))

    def take_signal(self, thread: Thread, wanted: int) -> SignalInfo | None:
        found = super().take_signal(thread, wanted)
        if found is not None and found.code == SI_TIMER and not found.raw:
            timer = thread.process.timers.get(found.pid)
            if timer is not None:       # else it was deleted meanwhile
                return replace(found, status=timer.take(self.monotonic()))
        return found
