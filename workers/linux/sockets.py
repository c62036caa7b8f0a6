"""Sockets: what all of them have in common. unix.py has those with a path or a pair, inet.py those of the loopback
network; both ends of everything are in this system.

What has arrived and not been read is in the receiver's ``queue``. A sender that finds no room is blocked on itself
where it has a peer: the peer tells it (``notify``) when it has read.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from .blocked import Blocked
from .channels import ERR, HUP, IN, OUT, RDHUP, RDNORM, WRNORM, Channel, nameless
from .inodes import Inode
from .openfiles import OpenFile

if TYPE_CHECKING:
    from .network import Network
    from .processes import Thread
    from .state import Loading, Saving
    from .system import System

__all__ = ["DGRAM", "RECEIVE", "SEND", "SEQPACKET", "STREAM", "WRBAND", "Broken", "Credentials", "Message", "Packet",
           "Received", "Socket"]

STREAM, DGRAM, SEQPACKET = 1, 2, 5      # linux/net.h
RECEIVE, SEND = 1, 2                    # what has been shut
WRBAND = 0x200                          # uapi/asm-generic/poll.h
_FIONREAD, _OUTQ = 0x541B, 0x5411       # uapi/asm-generic/ioctls.h
_BUFFER = 212992                        # /proc/sys/net/core/rmem_default
_SIGPIPE = 13
_PACKET_COST = 512                      # of room, beside its data
_MERGED = 4096

#: Process, user, group.
Credentials = tuple[int, int, int]


class Broken(OSError):
    """EPIPE, and SIGPIPE with it where that is wanted."""

    def __init__(self) -> None:
        super().__init__(errno.EPIPE, "")


@dataclass(slots=True)
class Message:
    """What is sent. ``to``: an address (struct sockaddr), or the peer. ``rights``: open files; a use of each goes
    along."""

    data: bytes
    to: bytes | None = None
    rights: Sequence[OpenFile] = ()
    credentials: Credentials | None = None


@dataclass(slots=True)
class Packet:
    """What has arrived. ``sender``: its address."""

    data: bytearray
    sender: bytes
    rights: list[OpenFile] = field(default_factory=list)
    credentials: Credentials = (0, 0, 0)
    merges: bool = False

    @property
    def cost(self) -> int:
        return len(self.data) if self.merges else len(self.data) + _PACKET_COST

    def drop(self) -> None:
        for each in self.rights:
            each.let_go()
        self.rights = []


@dataclass(slots=True)
class Received:
    """``length``: of the message, all of it."""

    data: bytes
    length: int
    sender: bytes = b""
    rights: list[OpenFile] = field(default_factory=list)
    credentials: Credentials = (0, 0, 0)


class Socket(Channel):
    """``options``: that have been set, by level and name. ``shut``: what of it, by whomever. ``error``: an errno that
    the next call gives. See ``Channel`` for the contract."""

    domain = 0

    def __init__(self, network: Network, kind: int, protocol: int, flags: int = 0) -> None:
        super().__init__(nameless(network.store, stat.S_IFSOCK | 0o777), os.O_RDWR | flags)
        self.network, self.kind, self.protocol = network, kind, protocol
        self.whole = kind != STREAM
        self.options: dict[tuple[int, int], int] = {}
        self.shut = self.error = 0
        self.receive_room = self.send_room = _BUFFER
        self.receive_timeout = self.send_timeout = 0        # nanoseconds
        self.linger = (0, 0)
        self.queue: deque[Packet] = deque()
        self.held = 0                                       # what is in it, as room is counted
        #: Connections that come in here and are to be accepted; None: none do.
        self.backlog: int | None = None
        self.waiting: deque[Socket] = deque()

    @property
    def source(self) -> object:
        return self

    @property
    def room(self) -> Hashable:
        """What is notified when there is room in its queue or its backlog, for those who are not connected to it."""
        return "room", self.number

    def patience(self, *, writing: bool) -> int:
        return self.send_timeout if writing else self.receive_timeout

    # --- what each kind has its own way of -------------------------------------------------------------------------

    def bind(self, system: System, thread: Thread, address: bytes) -> None:
        """Addresses are struct sockaddr, as long as they are. Raises OSError."""
        raise OSError(errno.EOPNOTSUPP, "")

    def connect(self, system: System, thread: Thread, address: bytes) -> None:
        """Raises OSError and Blocked."""
        raise OSError(errno.EOPNOTSUPP, "")

    def listen(self, thread: Thread, backlog: int) -> None:
        """Raises OSError."""
        raise OSError(errno.EOPNOTSUPP, "")

    def send(self, system: System, thread: Thread, message: Message) -> int:
        """How many bytes of it are on their way. Raises OSError and Blocked."""
        raise NotImplementedError

    def receive(self, system: System, thread: Thread, count: int, *, peek: bool = False,
                wait: bool = True) -> Received:
        """``wait``: it does, if need be. Raises OSError and Blocked."""
        raise NotImplementedError

    def shutdown(self, what: int) -> None:
        """Raises OSError."""
        raise NotImplementedError

    def name(self) -> bytes:
        """getsockname(2)."""
        raise NotImplementedError

    def peer_name(self) -> bytes:
        """getpeername(2). Raises OSError."""
        raise NotImplementedError

    def peer_credentials(self) -> Credentials:
        """SO_PEERCRED."""
        return 0, -1, -1

    # --- for all ---------------------------------------------------------------------------------------------------

    def accept(self) -> Socket:
        """A connection that has come in. Raises OSError and Blocked."""
        if self.kind == DGRAM:
            raise OSError(errno.EOPNOTSUPP, "")
        if self.backlog is None:
            raise OSError(errno.EINVAL, "")
        if not self.waiting:
            self.wait_for(self)
        found = self.waiting.popleft()
        self.network.notify(self.room, 0)
        return found

    def take_error(self) -> int:
        """SO_ERROR."""
        found, self.error = self.error, 0
        return found

    def raise_error(self) -> None:
        """Raises OSError, if there is one."""
        if self.error:
            raise OSError(self.take_error(), "")

    @staticmethod
    def wait_for(*sources: Hashable) -> NoReturn:
        """Raises Blocked."""
        raise Blocked(on=sources)

    def take(self, system: System, thread: Thread, count: int) -> bytes:
        found = self.receive(system, thread, count, wait=not self.flags & os.O_NONBLOCK)
        for each in found.rights:
            each.let_go()
        return found.data

    def put(self, system: System, thread: Thread, data: bytes) -> int:
        try:
            return self.send(system, thread, Message(data, credentials=credentials_of(thread)))
        except Broken:
            self.signal_broken(system, thread)
            raise

    @staticmethod
    def signal_broken(system: System, thread: Thread) -> None:
        """Unless a part of what it sends has gone already."""
        if not thread.done:
            system.raise_signal(thread, _SIGPIPE)

    def control(self, system: System, thread: Thread, request: int, argument: int) -> int:
        if request == _FIONREAD and self.backlog is None:
            count = sum(len(each.data) for each in self.queue) if self.kind != DGRAM else (
                len(self.queue[0].data) if self.queue else 0)
        elif request == _OUTQ and self.backlog is None:
            count = 0
        else:
            raise OSError(errno.EINVAL if self.backlog is not None else errno.ENOTTY, "")
        thread.process.space.write(argument, struct.pack("<I", count))
        return 0

    # --- the queue -------------------------------------------------------------------------------------------------

    def arrive(self, packet: Packet) -> None:
        """At the end of the queue. Parts of a stream are put together."""
        last = self.queue[-1] if self.queue else None
        if (packet.merges and last is not None and last.merges and not packet.rights and not last.rights
                and last.credentials == packet.credentials and len(last.data) < _MERGED):
            last.data += packet.data
        else:
            self.queue.append(packet)
        self.held += packet.cost
        self.network.notify(self, IN | RDNORM)

    def take_message(self, count: int, *, peek: bool) -> Received:
        """The first in the queue."""
        packet = self.queue[0]
        rights = packet.rights
        if peek:
            for each in rights:
                each.keep()
        else:
            self.queue.popleft()
            self.held -= packet.cost
        return Received(bytes(packet.data[:count]), len(packet.data), packet.sender, list(rights), packet.credentials)

    def take_stream(self, count: int, *, peek: bool) -> Received:
        """So many bytes, as far as there are; no further than to the end of those that came with rights."""
        found, rights, credentials = bytearray(), list[OpenFile](), self.queue[0].credentials
        sender, at = self.queue[0].sender, 0
        while at < len(self.queue) and len(found) < count:
            packet = self.queue[at]
            if packet.credentials != credentials and self.glues_same_only:
                break
            part = packet.data[:count - len(found)]
            found += part
            rights = packet.rights
            if peek:
                for each in rights:
                    each.keep()
                at += 1
            else:
                packet.rights = []
                self.held -= len(part)
                if len(part) == len(packet.data):
                    self.queue.popleft()
                else:
                    del packet.data[:len(part)]
            if rights:
                break
        return Received(bytes(found), len(found), sender, list(rights), credentials)

    glues_same_only = False         # streams: parts of different processes are given apart

    def discard_queue(self) -> None:
        for packet in self.queue:
            packet.drop()
        self.queue.clear()
        self.held = 0

    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return super().save() | {
            "type": [self.kind, self.protocol], "options": [[*key, value] for key, value in self.options.items()],
            "shut": self.shut, "error": self.error, "rooms": [self.receive_room, self.send_room],
            "timeouts": [self.receive_timeout, self.send_timeout], "linger": list(self.linger),
            "backlog": self.backlog}

    def save_links(self, saving: Saving) -> dict[str, Any]:
        return {"queue": [[bytes(each.data), each.sender, [saving.file(file) for file in each.rights],
                           list(each.credentials), each.merges] for each in self.queue],
                "waiting": [saving.file(each) for each in self.waiting]}

    def restore(self, inode: Inode, saved: dict[str, Any]) -> None:
        super().restore(inode, saved)
        self.kind, self.protocol = saved["type"]
        self.whole = self.kind != STREAM
        self.options = {(level, name): value for level, name, value in saved["options"]}
        self.shut, self.error, self.backlog = saved["shut"], saved["error"], saved["backlog"]
        self.receive_room, self.send_room = saved["rooms"]
        self.receive_timeout, self.send_timeout = saved["timeouts"]
        on, seconds = saved["linger"]
        self.linger = (on, seconds)

    def link(self, loading: Loading, saved: dict[str, Any]) -> None:
        self.network = loading.system.network
        self.queue = deque(
            Packet(bytearray(data), sender, [loading.files[each] for each in rights], (pid, user, group), merges)
            for data, sender, rights, (pid, user, group), merges in saved["queue"])
        self.held = sum(each.cost for each in self.queue)
        self.waiting = deque(loading.socket(each) for each in saved["waiting"])

    # --- poll ------------------------------------------------------------------------------------------------------

    def closing_events(self) -> int:
        """Of its events those that an error, or what has been shut, brings."""
        found = ERR if self.error else 0
        if self.shut == RECEIVE | SEND:
            found |= HUP
        if self.shut & RECEIVE:
            found |= RDHUP | IN | RDNORM
        return found

    @staticmethod
    def out(*, band: bool) -> int:
        return OUT | WRNORM | (WRBAND if band else 0)


def credentials_of(thread: Thread) -> Credentials:
    return thread.process.pid, 0, 0
