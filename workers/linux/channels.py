"""Open files that lead to somebody rather than to contents: the console's streams and its terminal, ends of pipes,
sockets. What cannot be done now is `Blocked`, on what it waits for; a descriptor that does not block makes EAGAIN of
that (calls/files.py)."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, Any

from .blocked import Blocked
from .inodes import Inode, Node, Store
from .openfiles import OpenFile

if TYPE_CHECKING:
    from .epoll import Interest
    from .processes import Thread
    from .system import System

__all__ = ["ERR", "HUP", "IN", "OUT", "PRI", "RDHUP", "RDNORM", "WRNORM", "Channel", "ConsoleStream", "Terminal",
           "nameless"]

IN, PRI, OUT, ERR, HUP, RDNORM, WRNORM, RDHUP = 1, 2, 4, 8, 16, 0x40, 0x100, 0x2000     # uapi/asm-generic/poll.h


def nameless(store: Store, mode: int) -> Node:
    """An inode that goes with the last open file of it."""
    found = Node(store, mode)
    found.nlink = 0
    return found


class Channel(OpenFile):
    """``source``: what is notified when anything about it changes (``System.notify``), the same as long as it lives.
    ``interests``: epoll instances that look at it."""

    __slots__ = ("interests",)

    #: A write(2) is one ``put`` with all that there is, and whatever that takes is its result.
    whole = False
    #: How many bytes a read(2) must have room for. With none, it gives none.
    least = 0
    #: Time alone changes it: ``due`` and ``tick`` are asked.
    timed = False

    def __init__(self, inode: Inode, flags: int, number: int = 0) -> None:
        super().__init__(inode, flags, number)
        self.interests: list[Interest] = []

    @property
    def source(self) -> object:
        return self.inode

    def let_go(self) -> None:
        super().let_go()
        if not self.uses:
            for each in tuple(self.interests):
                each.remove()
            self.closed()

    def closed(self) -> None:
        """No descriptor is left."""

    def restore(self, inode: Inode, saved: dict[str, Any]) -> None:
        super().restore(inode, saved)
        self.interests = []

    def patience(self, *, writing: bool) -> int:
        """How long a call waits that would block, in nanoseconds. 0: for ever."""
        return 0

    def due(self, system: System) -> int | None:
        """When that is, if nothing else comes before (``System.monotonic``)."""
        return None

    def tick(self, system: System) -> None:
        """It may be now: then ``System.notify``, once."""

    def take(self, system: System, thread: Thread, count: int) -> bytes:
        """read(2), of one that is readable. Raises OSError and Blocked."""
        raise OSError(errno.EINVAL, "")

    def put(self, system: System, thread: Thread, data: bytes) -> int:
        """write(2), of one that is writable. Raises OSError and Blocked."""
        raise OSError(errno.EINVAL, "")

    def ready(self, system: System) -> int:
        """As poll(2) says it."""
        return IN | RDNORM | OUT | WRNORM

    def control(self, system: System, thread: Thread, request: int, argument: int) -> int:
        """ioctl(2). Raises OSError."""
        raise OSError(errno.ENOTTY, "")


class Terminal(Channel):
    """/dev/console, /dev/tty, whatever is behind them. See ``Channel`` for the contract."""

    __slots__ = ()

    @property
    def source(self) -> object:
        return Terminal

    def take(self, system: System, thread: Thread, count: int) -> bytes:
        console = system.console
        if console.tty is None:
            found = console.read(count)
            if found is None:
                raise Blocked(on=(Terminal,))
            return found
        now = system.monotonic()
        until = console.tty.due(count, thread.deadline, now)
        waits = until is None or until > now
        found = console.tty.read(count) if not waits or self.flags & os.O_NONBLOCK else b""
        if waits and not found:
            thread.deadline = until
            raise Blocked(until, (Terminal,))
        if console.settle():
            system.notify(Terminal)
        return found

    def put(self, system: System, thread: Thread, data: bytes) -> int:
        if system.console.tty is not None and system.console.tty.hung_up:
            raise OSError(errno.EIO, "")
        written = system.console.write(data, error=False)
        if data and not written:
            raise Blocked(on=(Terminal,))
        return written

    def ready(self, system: System) -> int:
        found = IN | RDNORM if system.console.ready() else 0
        if system.console.tty is not None and system.console.tty.hung_up:
            return found | OUT | WRNORM | ERR | HUP
        return found | OUT | WRNORM if system.console.writable() else found

    def control(self, system: System, thread: Thread, request: int, argument: int) -> int:
        result = system.console.ioctl(system, thread, request, argument)
        system.console.settle()
        system.notify(Terminal)
        return result


class ConsoleStream(Terminal):
    """Standard input, output or error where the console is no terminal: to the program, a pipe. See
    ``Channel`` for the contract."""

    __slots__ = ("_error",)

    def __init__(self, store: Store, flags: int, *, error: bool = False, inode: Inode | None = None,
                 number: int = 0) -> None:
        """``inode``, ``number``: of one that is open, opened once more."""
        if inode is None:
            inode = nameless(store, stat.S_IFIFO | 0o600)
        super().__init__(inode, flags, number)
        self._error = error

    def again(self, file: OpenFile) -> ConsoleStream:
        """As it was opened by a link of /proc."""
        return ConsoleStream(self.inode.store, file.flags, error=self._error, inode=self.inode, number=file.number)

    def save(self) -> dict[str, Any]:
        return super().save() | {"error": self._error}

    def restore(self, inode: Inode, saved: dict[str, Any]) -> None:
        super().restore(inode, saved)
        self._error = saved["error"]

    def put(self, system: System, thread: Thread, data: bytes) -> int:
        written = system.console.write(data, error=self._error)
        if data and not written:
            raise Blocked(on=(Terminal,))
        return written

    def control(self, system: System, thread: Thread, request: int, argument: int) -> int:
        raise OSError(errno.ENOTTY, "")
