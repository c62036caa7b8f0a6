"""The operating system that programs see: all of it is here, and is data of one process without threads.

Calls come from vCPUs, one after the other (``call``). One that would have to wait is `Blocked`: its thread makes it
again when something has changed, or when its time has come.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from .calls import SERVED
from .channels import ConsoleStream, Terminal
from .contents import Regular
from .directories import Directory
from .frames import Frames, NoFrames
from .inodes import Node
from .openfiles import OpenFile
from .processes import FileTable, Process, Thread
from .program import Executable, Started, start
from .space import Memory, SegmentationFault, Space
from .tables import NoTables, Tables
from .terminal import Tty
from .vfs import FileSystem

__all__ = ["Console", "System"]

_FIRST_PID = 1
_PATH = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DEVICES = {b"null": Node.NULL, b"zero": Node.ZERO, b"full": Node.FULL, b"random": Node.RANDOM[0],
            b"urandom": Node.RANDOM[1], b"tty": Node.TERMINALS[0], b"console": Node.TERMINALS[1]}


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


class System:
    """``realtime`` and ``monotonic``: nanoseconds. ``threads_max``: how many threads there can be at once."""

    def __init__(self, memory: Memory, frames: Frames, tables: Tables, files: FileSystem, console: Console, *,
                 realtime: Callable[[], int], monotonic: Callable[[], int], threads_max: int = 1,
                 host: bytes = b"shardvmm") -> None:
        self._memory, self.frames, self._tables = memory, frames, tables
        self.memory_pages = frames.free
        self.files, self.console = files, console
        self.realtime, self.monotonic = realtime, monotonic
        self.threads_max, self.host = threads_max, host
        self.processes: dict[int, Process] = {}
        self._next_pid = _FIRST_PID
        #: Calls that nobody serves, and how often each was made.
        self.missing: Counter[int] = Counter()
        #: What has changed since somebody looked: calls that are blocked on it can be made again.
        self.notified: set[Hashable] = set()
        #: How the first process has ended, as wait(2) gives it.
        self.code: int | None = None
        self._make_devices()

    def _make_devices(self) -> None:
        """/dev, where it is not there."""
        root = self.files.root
        for path in (b"/dev", b"/tmp", b"/proc"):
            try:
                self.files.mkdir(root, path, 0o755)
            except FileExistsError:
                continue
        for name, device in _DEVICES.items():
            try:
                self.files.mknod(root, b"/dev/" + name, stat.S_IFCHR | 0o666, device)
            except FileExistsError:
                continue

    # --- processes -------------------------------------------------------------------------------------------------

    def process(self, pid: int) -> Process:
        """Raises OSError (ESRCH)."""
        try:
            return self.processes[pid]
        except KeyError:
            raise OSError(errno.ESRCH, "") from None

    def spawn(self, path: bytes, arguments: Sequence[bytes],
              environment: Sequence[bytes], directory: bytes = b"/") -> tuple[Thread, Started]:
        """The first process, its console open three times. A path without a slash is looked for as a shell does.
        Raises OSError, NoFrames, NoTables."""
        space = Space(self._memory, self.frames, self._tables, self.memory_pages)
        pid = self._next_pid
        self._next_pid += 1
        root = self.files.root
        at = self.files.find(root, directory)
        if not isinstance(at, Directory):
            raise OSError(errno.ENOTDIR, "")
        at.keep()
        process = Process(pid, 0, space, FileTable(), at, group=pid, session=pid)
        path = self._searched(path, environment)
        started = start(space, self._executable, path, arguments, environment, random=self.files.store.random(16))
        for flags, error in ((os.O_RDONLY, False), (os.O_WRONLY, False), (os.O_WRONLY, True)):
            process.files.add(self.opened(self.files.open(root, b"/dev/console", os.O_RDWR)) if self.console.terminal
                              else ConsoleStream(self.files.store, flags, error=error))
        process.path, process.name = started.path, os.path.basename(path)[:15]
        thread = Thread(pid, process, process.name)
        process.threads.append(thread)
        self.processes[pid] = process
        return thread, started

    def _searched(self, name: bytes, environment: Sequence[bytes]) -> bytes:
        if b"/" in name:
            return name
        path = next((each[5:] for each in environment if each.startswith(b"PATH=")), _PATH)
        for directory in path.split(b":"):
            found = (directory or b".") + b"/" + name
            try:
                self._executable(found)
            except OSError:
                continue
            return found
        raise OSError(errno.ENOENT, "")

    def _executable(self, path: bytes) -> Executable:
        inode = self.files.find(self.files.root, path)
        if not isinstance(inode, Regular) or not inode.mode & 0o111:
            raise OSError(errno.EACCES, "")
        return inode

    def end_thread(self, thread: Thread, code: int) -> None:
        """exit(2)."""
        thread.ended = True
        thread.process.threads.remove(thread)
        if not thread.process.threads:
            self.end_process(thread.process, code << 8)

    def end_process(self, process: Process, code: int) -> None:
        """``code`` as wait(2) gives it."""
        process.code = code
        if process.pid == _FIRST_PID:
            self.code = code
        for number in process.files:
            self.notify(process.files.get(number, path_only=True).inode)
        for thread in process.threads:
            thread.ended = True
        process.threads.clear()
        process.files.close_all()
        process.directory.let_go()
        process.space.close()

    def signal_group(self, group: int, number: int) -> None:
        """All processes of a group."""
        for process in list(self.processes.values()):
            if process.group == group:
                self._end_by(process, number)

    def signal_first(self, number: int) -> None:
        """The first process."""
        self._end_by(self.processes[_FIRST_PID], number)

    def _end_by(self, process: Process, number: int) -> None:
        """As if nobody handled signals."""
        if process.code is None and number not in (17, 18, 19, 20, 21, 22, 23, 28):
            self.end_process(process, number)

    def opened(self, file: OpenFile) -> OpenFile:
        """A file that was just opened, as what it leads to."""
        inode = file.inode
        if isinstance(inode, Node) and stat.S_ISCHR(inode.mode) and inode.rdev in Node.TERMINALS and not file.path_only:
            if inode.rdev == Node.TERMINALS[0] and not self.console.terminal:
                file.let_go()
                raise OSError(errno.ENXIO, "")
            return Terminal(inode, file.flags, file.number)
        return file

    def notify(self, source: Hashable) -> None:
        """Something about it has changed."""
        self.notified.add(source)

    # --- calls -----------------------------------------------------------------------------------------------------

    def call(self, thread: Thread, number: int, arguments: Sequence[int]) -> int:
        """The result, negative for an error. Raises Blocked, and Ended where the thread does not come back."""
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
        thread.deadline, thread.done = None, 0
        return result
