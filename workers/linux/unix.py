"""Unix sockets."""

from __future__ import annotations

import errno
import stat
import struct
from typing import TYPE_CHECKING, Any

from .channels import ERR, HUP, IN, RDNORM
from .inodes import Inode
from .network import Network
from .sockets import (
    DGRAM,
    RECEIVE,
    SEND,
    SEQPACKET,
    STREAM,
    Broken,
    Credentials,
    Message,
    Packet,
    Received,
    Socket,
    credentials_of,
)

if TYPE_CHECKING:
    from .processes import Thread
    from .state import Loading, Saving
    from .system import System

__all__ = ["UnixSocket", "unix_pair"]

_FAMILY = 1                             # AF_UNIX
_LONGEST = 108                          # sun_path
_QUEUE = 10                             # /proc/sys/net/unix/max_dgram_qlen
_PASSCRED = (1, 16)


class UnixSocket(Socket):
    """``path``: sun_path as it was bound, or empty. ``peer``: of a connection, also when that is closed; of datagrams
    where they go. ``senders``: sockets whose datagrams go here. See ``Socket`` for the contract."""

    domain = _FAMILY

    def __init__(self, network: Network, kind: int, protocol: int, flags: int = 0) -> None:
        super().__init__(network, kind, protocol, flags)
        self.path = b""
        self._node: Inode | None = None
        self.peer: UnixSocket | None = None
        self.senders: dict[UnixSocket, None] = {}
        self.dead = False
        self.credentials: Credentials = (0, -1, -1)         # of whoever connected it, or listens

    @property
    def glues_same_only(self) -> bool:      # type: ignore[override]
        return bool(self.options.get(_PASSCRED))

    # --- names -----------------------------------------------------------------------------------------------------

    def name(self) -> bytes:
        return struct.pack("<H", _FAMILY) + self.path

    def peer_name(self) -> bytes:
        if self.peer is None:
            raise OSError(errno.ENOTCONN, "")
        return self.peer.name()

    def peer_credentials(self) -> Credentials:
        return self.credentials

    def bind(self, system: System, thread: Thread, address: bytes) -> None:
        if len(address) == 2 and _family(address) == _FAMILY:
            if not self.path:
                self._enter_abstract(self.network.free_name())
            return
        path = _path(address)
        if not path.startswith(b"\0"):
            self._make_node(system, thread, path)
        elif self.path:
            raise OSError(errno.EINVAL, "")
        elif path in self.network.abstract:
            raise OSError(errno.EADDRINUSE, "")
        else:
            self._enter_abstract(path)

    def _enter_abstract(self, name: bytes) -> None:
        self.path = name
        self.network.abstract[name] = self

    def _make_node(self, system: System, thread: Thread, path: bytes) -> None:
        at = thread.process.directory
        try:
            system.files.mknod(at, path, stat.S_IFSOCK | 0o777 & ~thread.process.mask)
        except FileExistsError:
            raise OSError(errno.EADDRINUSE, "") from None
        if self.path:               # in Linux too, that comes last
            system.files.unlink(at, path)
            raise OSError(errno.EINVAL, "")
        self._node = system.files.find(at, path, follow=False)
        self._node.keep()
        self.network.nodes[self._node.number] = self
        self.path = path + b"\0"

    def _found(self, system: System, thread: Thread, address: bytes) -> UnixSocket:
        path = _path(address)
        if path.startswith(b"\0"):
            found = self.network.abstract.get(path)
        else:
            inode = system.files.find(thread.process.directory, path)
            found = self.network.nodes.get(inode.number) if inode.kind == stat.S_IFSOCK else None
        if found is None:
            raise OSError(errno.ECONNREFUSED, "")
        if found.kind != self.kind:
            raise OSError(errno.EPROTOTYPE, "")
        return found

    # --- connections -----------------------------------------------------------------------------------------------

    def listen(self, thread: Thread, backlog: int) -> None:
        if self.kind == DGRAM:
            raise OSError(errno.EOPNOTSUPP, "")
        if not self.path or (self.peer is not None and self.backlog is None):
            raise OSError(errno.EINVAL, "")
        self.backlog = min(backlog & 0xFFFF_FFFF, 4096)
        self.credentials = credentials_of(thread)
        self.network.notify(self.room, 0)

    def connect(self, system: System, thread: Thread, address: bytes) -> None:
        if len(address) >= 2 and not _family(address) and self.kind == DGRAM:
            self._forget_peer()
            return
        found = self._found(system, thread, address)
        if self.kind == DGRAM:
            if found.peer not in (None, self):
                raise OSError(errno.EPERM, "")
            self._forget_peer()
            self.peer = found
            found.senders[self] = None
            return
        if found.backlog is None or found.shut & RECEIVE:
            raise OSError(errno.ECONNREFUSED, "")
        if self.peer is not None or self.backlog is not None:
            raise OSError(errno.EISCONN if self.backlog is None else errno.EINVAL, "")
        if len(found.waiting) > found.backlog:
            self.wait_for(found.room)
        other = UnixSocket(self.network, self.kind, self.protocol)
        other.path, other.options = found.path, {key: value for key, value in found.options.items() if key == _PASSCRED}
        other.credentials, self.credentials = credentials_of(thread), found.credentials
        self.peer, other.peer = other, self
        found.waiting.append(other)
        self.network.notify(self, 0)
        self.network.notify(found, IN | RDNORM)

    def _forget_peer(self) -> None:
        """What has come from it and was not read is lost, and if it sends here it hears of that."""
        peer, self.peer = self.peer, None
        if peer is None:
            return
        peer.senders.pop(self, None)
        if self.queue and not self.dead:
            self.discard_queue()
            self.network.notify(self.room, 0)
            if not peer.dead and peer.peer is self:
                peer.error = errno.ECONNRESET
                self.network.notify(peer, ERR)

    def shutdown(self, what: int) -> None:
        self.shut |= what
        if self.kind != DGRAM and self.peer is not None:
            self.peer.shut |= (SEND if what & RECEIVE else 0) | (RECEIVE if what & SEND else 0)
            self.network.notify(self.peer, 0)
        self.network.notify(self, 0)
        self.network.notify(self.room, 0)

    def closed(self) -> None:
        self.dead = True
        if self._node is not None:
            del self.network.nodes[self._node.number]
            self._node.let_go()
        elif self.network.abstract.get(self.path) is self:
            del self.network.abstract[self.path]
        for each in self.waiting:
            each.error = errno.ECONNRESET       # of its own peer: nobody has accepted it
            each.let_go()
        self.waiting.clear()
        if self.kind == DGRAM:
            self._forget_peer()
            for sender in self.senders:
                self.network.notify(sender, self.out(band=True))
        elif self.peer is not None and not self.peer.dead:
            self.peer.shut = RECEIVE | SEND
            unread = len(self.queue) > 1 or any(each.data for each in self.queue)    # an empty one does not
            if unread or self.error == errno.ECONNRESET:
                self.peer.error = errno.ECONNRESET
            self.network.notify(self.peer, 0)
        self.discard_queue()
        self.network.notify(self.room, 0)

    # --- sending ---------------------------------------------------------------------------------------------------

    def send(self, system: System, thread: Thread, message: Message) -> int:
        if self.kind == STREAM:
            return self._send_stream(message)
        return self._send_message(system, thread, message)

    def _send_stream(self, message: Message) -> int:
        if message.to is not None:
            raise OSError(errno.EISCONN if self.peer is not None else errno.EOPNOTSUPP, "")
        if self.peer is None:
            raise OSError(errno.ENOTCONN, "")
        if self.shut & SEND:
            raise Broken
        if not message.data:
            return 0
        if self.peer.dead or self.peer.shut & RECEIVE:
            raise Broken
        room = self.send_room - self.peer.held
        if room <= 0:
            self.wait_for(self)
        data = message.data[:room]
        self.peer.arrive(self._packet(message, bytearray(data), merges=True))
        return len(data)

    def _send_message(self, system: System, thread: Thread, message: Message) -> int:
        self.raise_error()
        if self.kind == SEQPACKET and self.peer is None:
            raise OSError(errno.ENOTCONN, "")
        if len(message.data) > self.send_room - 32:
            raise OSError(errno.EMSGSIZE, "")
        if self.shut & SEND:
            raise OSError(errno.EPIPE, "")
        to = self.peer
        if message.to is not None and self.kind == DGRAM:
            to = self._found(system, thread, message.to)
        if to is None:
            raise OSError(errno.ENOTCONN, "")
        if to.dead:
            if self.kind == DGRAM and to is self.peer:
                self._forget_peer()
            raise OSError(errno.ECONNREFUSED if self.kind == DGRAM else errno.EPIPE, "")
        if to.peer is not None and to.peer is not self:
            raise OSError(errno.EPERM, "")
        if to.shut & RECEIVE:
            raise OSError(errno.EPIPE, "")
        packet = self._packet(message, bytearray(message.data), merges=False)
        if self._is_full(to) or (to.queue and to.held + packet.cost > self.send_room):
            self.wait_for(to.room, self)
        to.arrive(packet)
        return len(message.data)

    def _is_full(self, to: UnixSocket) -> bool:
        return to is not self and to.peer is not self and len(to.queue) > _QUEUE

    def _packet(self, message: Message, data: bytearray, *, merges: bool) -> Packet:
        for each in message.rights:
            each.keep()
        sender = self.name() if self.path else b""
        return Packet(data, sender, list(message.rights), message.credentials or (0, 0, 0), merges)

    # --- receiving -------------------------------------------------------------------------------------------------

    def receive(self, system: System, thread: Thread, count: int, *, peek: bool = False,
                wait: bool = True) -> Received:
        if self.kind != DGRAM and self.peer is None:
            raise OSError(errno.EINVAL if self.kind == STREAM else errno.ENOTCONN, "")
        if self.kind != STREAM:
            self.raise_error()
        if not self.queue:
            self.raise_error()
            if self.shut & RECEIVE and (wait or self.kind != DGRAM):
                return Received(b"", 0)
            self.wait_for(self)
        found = (self.take_stream if self.kind == STREAM else self.take_message)(count, peek=peek)
        if not peek:
            self._tell_room()
        return found

    def _tell_room(self) -> None:
        if self.kind == DGRAM:
            self.network.notify(self.room, 0)
            for sender in self.senders:
                self.network.notify(sender, self.out(band=True))
        elif self.peer is not None and not self.peer.dead:
            self.network.notify(self.peer, self.out(band=True))

    # --- poll ------------------------------------------------------------------------------------------------------

    def ready(self, system: System) -> int:
        found = self.closing_events()
        if self.queue or self.waiting:
            found |= IN | RDNORM
        if self.kind != DGRAM and self.peer is None and self.backlog is None:
            found |= HUP
        if self.backlog is None and self._writable():
            found |= self.out(band=True)
        return found

    def _writable(self) -> bool:
        to = self.peer
        return to is None or to.dead or (to.held * 4 <= self.send_room and not (
            self.kind == DGRAM and self._is_full(to)))

    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return super().save() | {"path": self.path, "dead": self.dead, "credentials": list(self.credentials)}

    def save_links(self, saving: Saving) -> dict[str, Any]:
        return super().save_links(saving) | {
            "node": None if self._node is None or self.dead else self._node.number,
            "peer": None if self.peer is None else saving.file(self.peer),
            "senders": [saving.file(each) for each in self.senders]}

    def restore(self, inode: Inode, saved: dict[str, Any]) -> None:
        super().restore(inode, saved)
        self.path, self.dead = saved["path"], saved["dead"]
        pid, user, group = saved["credentials"]
        self.credentials = (pid, user, group)

    def link(self, loading: Loading, saved: dict[str, Any]) -> None:
        super().link(loading, saved)
        self._node = None if saved["node"] is None else self.network.store.inodes[saved["node"]]
        self.peer = None if saved["peer"] is None else loading.unix(saved["peer"])
        self.senders = {loading.unix(each): None for each in saved["senders"]}


def unix_pair(network: Network, thread: Thread, kind: int, flags: int) -> tuple[UnixSocket, UnixSocket]:
    """socketpair(2)."""
    one, other = (UnixSocket(network, kind, 0, flags) for _ in range(2))
    one.peer, other.peer = other, one
    one.credentials = other.credentials = credentials_of(thread)
    if kind == DGRAM:
        one.senders[other] = other.senders[one] = None
    return one, other


def _family(address: bytes) -> int:
    return int.from_bytes(address[:2], "little")


def _path(address: bytes) -> bytes:
    """Raises OSError. A path ends with its first zero byte, an abstract name with the address."""
    if not 2 < len(address) <= 2 + _LONGEST or _family(address) != _FAMILY:
        raise OSError(errno.EINVAL, "")
    path = address[2:]
    return path if path.startswith(b"\0") else path.partition(b"\0")[0]
