"""The operating system that programs see: all of it is here, and is data of one process without threads.

Calls come from vCPUs, one after the other (``call``). One that would have to wait is `Blocked`: its thread makes it
again when something has changed, or when its time has come.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from .calls import SERVED
from .contents import Regular
from .frames import Frames, NoFrames
from .inodes import Node
from .processes import FileTable, Process, Thread
from .program import Executable, Started, start
from .space import Memory, SegmentationFault, Space
from .tables import NoTables, Tables
from .vfs import FileSystem

__all__ = ["Console", "System"]

_FIRST_PID = 1
_DEVICES = {b"null": Node.NULL, b"zero": Node.ZERO, b"full": Node.FULL, b"random": Node.RANDOM[0],
            b"urandom": Node.RANDOM[1], b"tty": Node.TERMINALS[0], b"console": Node.TERMINALS[1]}


class Console(Protocol):
    """The terminal of the first process."""

    def read(self, count: int) -> bytes | None:
        """Empty at its end; None: nothing has come yet."""

    def ready(self) -> bool:
        """Something can be read, or its end has come."""

    def write(self, data: bytes) -> None: ...

    def ioctl(self, thread: Thread, request: int, argument: int) -> int:
        """Raises OSError."""


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
              environment: Sequence[bytes]) -> tuple[Thread, Started]:
        """The first process, its terminal open three times. Raises OSError, NoFrames, NoTables."""
        space = Space(self._memory, self.frames, self._tables, self.memory_pages)
        pid = self._next_pid
        self._next_pid += 1
        root = self.files.root
        root.keep()
        process = Process(pid, 0, space, FileTable(), root, group=pid, session=pid)
        started = start(space, self._executable, path, arguments, environment, random=self.files.store.random(16))
        for _ in range(3):
            process.files.add(self.files.open(root, b"/dev/console", os.O_RDWR))
        process.path, process.name = started.path, os.path.basename(path)[:15]
        thread = Thread(pid, process, process.name)
        process.threads.append(thread)
        self.processes[pid] = process
        return thread, started

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
        for thread in process.threads:
            thread.ended = True
        process.threads.clear()
        process.files.close_all()
        process.directory.let_go()
        process.space.close()

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
        thread.deadline = None
        return result
