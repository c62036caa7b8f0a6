"""Pipes and fifos: bytes in buffers of a page, and the ends through which they go in and out.

How much fits is counted in buffers, as Linux does it: what is written goes on in the last buffer where the part that
is not whole pages fits there as a whole, and into new ones otherwise. So a write of a page or less is never torn.
"""

from __future__ import annotations

import errno
import os
import struct
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .blocked import Blocked
from .channels import ERR, HUP, IN, OUT, RDNORM, WRNORM, Channel
from .inodes import Inode
from .openfiles import OpenFile
from .space import PAGE

if TYPE_CHECKING:
    from .processes import Thread
    from .state import Loading, Saving
    from .system import System

__all__ = ["Pipe", "PipeEnd", "open_fifo"]

_BUFFERS = 16
_SIZE_MAX = 1 << 20         # /proc/sys/fs/pipe-max-size
_FIONREAD = 0x541B          # uapi/asm-generic/ioctls.h
_SIGPIPE = 13


@dataclass(slots=True)
class _Buffer:
    """What is left to read, and where in its page that begins. ``packet``: read(2) goes no further, and drops what it
    has no room for (O_DIRECT)."""

    data: bytearray
    start: int = 0
    packet: bool = False


@dataclass(eq=False)
class Pipe:
    """``notify`` is called with it when it has changed, and with what poll(2) can then say. ``ever_read``,
    ``ever_written``: how often an end of that kind was opened."""

    notify: Callable[[Hashable, int], None]
    most: int = _BUFFERS
    readers: int = 0
    writers: int = 0
    ever_read: int = 0
    ever_written: int = 0
    buffers: deque[_Buffer] = field(default_factory=deque)

    @property
    def size(self) -> int:
        """F_GETPIPE_SZ."""
        return self.most * PAGE

    @property
    def filled(self) -> int:
        """Bytes that are in it."""
        return sum(len(each.data) for each in self.buffers)

    @property
    def full(self) -> bool:
        return len(self.buffers) >= self.most

    def resize(self, size: int) -> int:
        """F_SETPIPE_SZ: what it is then. Raises OSError."""
        if size > 1 << 31:
            raise OSError(errno.EINVAL, "")
        pages = 1 << max(0, -(-size // PAGE) - 1).bit_length()
        if pages > self.most and pages * PAGE > _SIZE_MAX:
            raise OSError(errno.EPERM, "")
        if pages < len(self.buffers):
            raise OSError(errno.EBUSY, "")
        self.most = pages
        self.notify(self, OUT | WRNORM)
        return self.size

    def read(self, count: int) -> bytes:
        """What there is of so many bytes."""
        found, was_full = bytearray(), self.full
        while self.buffers and len(found) < count:
            first = self.buffers[0]
            part = first.data[:count - len(found)]
            found += part
            if first.packet or len(part) == len(first.data):
                self.buffers.popleft()
                if first.packet:
                    break
            else:
                del first.data[:len(part)]
                first.start += len(part)
        if was_full and not self.full:
            self.notify(self, OUT | WRNORM)
        return bytes(found)

    def write(self, data: bytes, *, packets: bool) -> int:
        """How much of it has found room."""
        done, odd = 0, len(data) % PAGE
        if odd and self.buffers:
            last = self.buffers[-1]
            if not last.packet and last.start + len(last.data) + odd <= PAGE:
                last.data += data[:odd]
                done = odd
        while done < len(data) and not self.full:
            part = data[done:done + PAGE]
            self.buffers.append(_Buffer(bytearray(part), packet=packets))
            done += len(part)
        if done:
            self.notify(self, IN | RDNORM)
        return done


    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Without its ends."""
        return {"most": self.most, "ever": [self.ever_read, self.ever_written],
                "buffers": [[bytes(each.data), each.start, each.packet] for each in self.buffers]}

    @classmethod
    def load(cls, notify: Callable[[Hashable, int], None], saved: dict[str, Any]) -> Pipe:
        read, written = saved["ever"]
        return cls(notify, saved["most"], ever_read=read, ever_written=written, buffers=deque(
            _Buffer(bytearray(data), start, packet) for data, start, packet in saved["buffers"]))


class PipeEnd(Channel):
    """One that is opened for both reading and writing is both ends of a fifo. ``fifos``: where the pipe is entered
    while anybody has it open, by inode; of a pipe without a name, nowhere. See ``Channel`` for the contract."""

    __slots__ = ("_fifos", "_seen", "pipe")

    def __init__(self, pipe: Pipe, inode: Inode, flags: int, number: int = 0, *,
                 fifos: dict[int, Pipe] | None = None) -> None:
        super().__init__(inode, flags, number)
        self.pipe, self._fifos = pipe, fifos
        #: How many had been opened at the other side when this one was opened without any there.
        self._seen: int | None = None
        if self.readable:
            pipe.readers += 1
            pipe.ever_read += 1
        if self.writable:
            pipe.writers += 1
            pipe.ever_written += 1
        pipe.notify(pipe, 0)

    @property
    def source(self) -> object:
        return self.pipe

    @property
    def alone(self) -> bool:
        """At the other side nobody has been since this was opened."""
        return self._seen == (self.pipe.ever_written if self.readable else self.pipe.ever_read)

    def come_first(self) -> None:
        """It was opened with nobody at the other side."""
        self._seen = self.pipe.ever_written if self.readable else self.pipe.ever_read

    def closed(self) -> None:
        pipe = self.pipe
        pipe.readers -= self.readable
        pipe.writers -= self.writable
        pipe.notify(pipe, 0)
        if self._fifos is not None and not pipe.readers and not pipe.writers:
            del self._fifos[self.inode.number]

    def take(self, system: System, thread: Thread, count: int) -> bytes:
        found = self.pipe.read(count)
        if not found and self.pipe.writers:
            raise Blocked(on=(self.pipe,))
        return found

    def put(self, system: System, thread: Thread, data: bytes) -> int:
        if not data:
            return 0
        if not self.pipe.readers:
            system.raise_signal(thread, _SIGPIPE)
            raise OSError(errno.EPIPE, "")
        done = self.pipe.write(data, packets=bool(self.flags & os.O_DIRECT))
        if not done:
            if self.flags & os.O_NONBLOCK:
                self.pipe.notify(self.pipe, IN | RDNORM)        # in Linux too: for EPOLLET an event
            raise Blocked(on=(self.pipe,))
        return done

    def ready(self, system: System) -> int:
        found, pipe = 0, self.pipe
        if self.readable:
            found |= IN | RDNORM if pipe.buffers else 0
            found |= HUP if not pipe.writers and not self.alone else 0
        if self.writable:
            found |= OUT | WRNORM if not pipe.full else 0
            found |= ERR if not pipe.readers else 0
        return found

    def control(self, system: System, thread: Thread, request: int, argument: int) -> int:
        if request != _FIONREAD:
            raise OSError(errno.ENOTTY, "")
        thread.process.space.write(argument, struct.pack("<I", self.pipe.filled))
        return 0

    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return super().save() | {"named": self._fifos is not None, "seen": self._seen}

    def save_links(self, saving: Saving) -> dict[str, Any]:
        return {"pipe": saving.pipe(self.pipe)}

    def restore(self, inode: Inode, saved: dict[str, Any]) -> None:
        super().restore(inode, saved)
        self._seen = saved["seen"]

    def link(self, loading: Loading, saved: dict[str, Any]) -> None:
        self.pipe = loading.pipes[saved["pipe"]]
        self._fifos = loading.system.fifos if saved["named"] else None
        self.pipe.readers += self.readable
        self.pipe.writers += self.writable


def open_fifo(system: System, thread: Thread, file: OpenFile) -> PipeEnd:
    """Where one that was found leads to. It waits for somebody at the other side. Raises OSError and Blocked."""
    if not isinstance(file, PipeEnd):
        pipe = system.fifos.setdefault(file.inode.number, Pipe(system.notify))
        reading, writing = file.readable, file.writable
        if writing and not reading and not pipe.readers and file.flags & os.O_NONBLOCK:
            if not pipe.writers:
                del system.fifos[file.inode.number]
            file.let_go()
            raise OSError(errno.ENXIO, "")
        file = PipeEnd(pipe, file.inode, file.flags, file.number, fifos=system.fifos)
        if (reading and writing) or (pipe.writers if reading else pipe.readers):
            return file
        file.come_first()
        if file.flags & os.O_NONBLOCK:
            return file
    if file.alone:
        thread.opening = file
        raise Blocked(on=(file.pipe,))
    return file
