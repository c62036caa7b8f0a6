"""Sockets of the loopback network: TCP and UDP, IPv4 and IPv6. There is no other network: nothing is lost, nothing is
late, and a connection is there as soon as it is asked for."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Any

from .channels import ERR, HUP, IN, RDNORM
from .inodes import Inode
from .network import Network
from .sockets import DGRAM, RECEIVE, SEND, STREAM, Broken, Message, Packet, Received, Socket

if TYPE_CHECKING:
    from .processes import Thread
    from .state import Loading, Saving
    from .system import System

__all__ = ["INET", "INET6", "LOOPBACK", "LOOPBACK4", "TCP", "UDP", "InetSocket", "TcpSocket", "UdpSocket"]

INET, INET6 = 2, 10
TCP, UDP = 6, 17
_MAPPED = bytes(10) + b"\xff\xff"               # an IPv4 address as IPv6 has it
_ANY, _ANY4 = bytes(16), _MAPPED + bytes(4)
LOOPBACK, LOOPBACK4 = bytes(15) + b"\1", _MAPPED + b"\x7f\0\0\1"
_REUSEADDR, _REUSEPORT, _V6ONLY = (1, 2), (1, 15), (41, 26)
_LONGEST = 65507                                # of a datagram, IPv4
_TCP_ROOM, _TCP_SEND_ROOM = 131072, 16384       # tcp_rmem, tcp_wmem

#: Address, as IPv6 has it, and port.
Place = tuple[bytes, int]


def _local(ip: bytes) -> bool:
    return ip == LOOPBACK or ip[:13] == _MAPPED + b"\x7f"


class InetSocket(Socket):
    """``ip`` and ``port``: its own (0: none yet). ``remote``: where it is connected to. See
    ``Socket`` for the contract."""

    def __init__(self, network: Network, kind: int, protocol: int, flags: int = 0, *, domain: int) -> None:
        super().__init__(network, kind, protocol, flags)
        self.domain = domain
        self.ip = _ANY4 if domain == INET else _ANY
        self.port = 0
        self.remote: Place | None = None

    # --- addresses -------------------------------------------------------------------------------------------------

    def _parsed(self, address: bytes) -> Place:
        """Raises OSError."""
        if len(address) < 2:
            raise OSError(errno.EINVAL, "")
        family, port = struct.unpack("<H", address[:2])[0], int.from_bytes(address[2:4], "big")
        if len(address) < (16 if self.domain == INET else 24):
            raise OSError(errno.EINVAL, "")
        if self.domain == INET and (family == INET or (not family and not any(address[4:8]))):
            return _MAPPED + address[4:8], port
        if self.domain == INET6 and family == INET6:
            return address[8:24], port
        raise OSError(errno.EAFNOSUPPORT, "")

    def packed(self, ip: bytes, port: int) -> bytes:
        if self.domain == INET:
            return struct.pack("<H", INET) + port.to_bytes(2, "big") + ip[12:] + bytes(8)
        return struct.pack("<H", INET6) + port.to_bytes(2, "big") + bytes(4) + ip + bytes(4)

    def name(self) -> bytes:
        return self.packed(self.ip, self.port)

    def peer_name(self) -> bytes:
        if self.remote is None:
            raise OSError(errno.ENOTCONN, "")
        return self.packed(*self.remote)

    def accepts(self, ip: bytes) -> int:
        """How well what goes to an address goes to this socket; 0: not at all."""
        if self.ip == ip:
            return 3
        if ip.startswith(_MAPPED):
            return 2 if self.ip == _ANY4 else int(self.ip == _ANY and not self.options.get(_V6ONLY))
        return 2 if self.ip == _ANY else 0

    def bind(self, system: System, thread: Thread, address: bytes) -> None:
        ip, port = self._parsed(address)
        if ip not in (_ANY, _ANY4) and not _local(ip):
            raise OSError(errno.EADDRNOTAVAIL, "")
        if self.port or self.remote is not None:
            raise OSError(errno.EINVAL, "")
        if ip.startswith(_MAPPED) and self.domain == INET6 and self.options.get(_V6ONLY):
            raise OSError(errno.EINVAL, "")
        self._take_port(ip, port)

    def _take_port(self, ip: bytes, port: int = 0) -> None:
        """Raises OSError."""
        before, self.ip = self.ip, ip
        if port and any(self._conflicts(each) for each in self.network.on(self.protocol, port)):
            self.ip = before
            raise OSError(errno.EADDRINUSE, "")
        self.port = port or self.network.free_port(self.protocol)
        self.network.enter(self)

    def _conflicts(self, other: InetSocket) -> bool:
        if not self.accepts(other.ip) and not other.accepts(self.ip):
            return False
        if self.options.get(_REUSEPORT) and other.options.get(_REUSEPORT):
            return False
        return not (self.options.get(_REUSEADDR) and other.options.get(_REUSEADDR) and other.backlog is None)

    def _reachable(self, ip: bytes) -> bytes:
        """Where what goes there goes. Raises OSError."""
        if ip in (_ANY, _ANY4):
            return LOOPBACK if ip == _ANY else LOOPBACK4
        if self.domain == INET6 and ip.startswith(_MAPPED) and self.options.get(_V6ONLY):
            raise OSError(errno.ENETUNREACH, "")
        if not _local(ip):
            raise OSError(errno.ENETUNREACH, "")
        return ip

    def _source_of(self, ip: bytes) -> bytes:
        """The address that what goes there comes from."""
        if self.ip not in (_ANY, _ANY4):
            return self.ip
        return LOOPBACK4 if ip.startswith(_MAPPED) else LOOPBACK

    def _best(self, ip: bytes, port: int) -> list[InetSocket]:
        """Those that fit an address best."""
        found = [(each.accepts(ip), each) for each in self.network.on(self.protocol, port) if each.is_open(self)]
        best = max((score for score, _ in found), default=0)
        return [each for score, each in found if score == best and score]

    def is_open(self, sender: InetSocket) -> bool:
        """To it."""
        raise NotImplementedError

    def save(self) -> dict[str, Any]:
        return super().save() | {"domain": self.domain, "ip": self.ip, "port": self.port,
                                 "remote": None if self.remote is None else list(self.remote)}

    def restore(self, inode: Inode, saved: dict[str, Any]) -> None:
        super().restore(inode, saved)
        self.domain, self.ip, self.port = saved["domain"], saved["ip"], saved["port"]
        self.remote = None if saved["remote"] is None else (saved["remote"][0], saved["remote"][1])

    def closed(self) -> None:
        if self.port:
            self.network.leave(self)
        self.discard_queue()


class TcpSocket(InetSocket):
    """``peer``: the other end, also when that is closed. ``finished``: it has said that nothing more comes. ``gone``:
    the connection is over. ``dead``: no descriptor is left. See ``Socket`` for the contract."""

    def __init__(self, network: Network, kind: int = STREAM, protocol: int = TCP, flags: int = 0, *,
                 domain: int) -> None:
        super().__init__(network, kind, protocol, flags, domain=domain)
        self.receive_room, self.send_room = _TCP_ROOM, _TCP_SEND_ROOM
        self.peer: TcpSocket | None = None
        self.finished = self.gone = self.dead = False

    def is_open(self, sender: InetSocket) -> bool:
        return self.backlog is not None

    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return super().save() | {"is": [self.finished, self.gone, self.dead]}

    def save_links(self, saving: Saving) -> dict[str, Any]:
        return super().save_links(saving) | {"peer": None if self.peer is None else saving.file(self.peer)}

    def restore(self, inode: Inode, saved: dict[str, Any]) -> None:
        super().restore(inode, saved)
        self.finished, self.gone, self.dead = saved["is"]

    def link(self, loading: Loading, saved: dict[str, Any]) -> None:
        super().link(loading, saved)
        self.peer = None if saved["peer"] is None else loading.tcp(saved["peer"])

    # --- connections -----------------------------------------------------------------------------------------------

    def listen(self, thread: Thread, backlog: int) -> None:
        if self.peer is not None:
            raise OSError(errno.EINVAL, "")
        if not self.port:
            self._take_port(self.ip)
        if self.backlog is None and any(each is not self and each.backlog is not None and self._conflicts(each)
                                        for each in self.network.on(self.protocol, self.port)):
            raise OSError(errno.EADDRINUSE, "")
        self.backlog = min(backlog & 0xFFFF_FFFF, 4096)

    def connect(self, system: System, thread: Thread, address: bytes) -> None:
        if len(address) >= 2 and not any(address[:2]):
            self._disconnect()
            return
        self.join(*self._parsed(address))

    def join(self, ip: bytes, port: int) -> None:
        """It is connected there. Raises OSError."""
        if self.peer is not None or self.backlog is not None:
            raise OSError(errno.EISCONN, "")
        ip = self._reachable(ip)
        own = self._source_of(ip)
        if not self.port:
            self._take_port(self.ip)
        listeners = self._best(ip, port)
        if not listeners:
            raise OSError(errno.ECONNREFUSED, "")
        listener = min(listeners, key=lambda each: len(each.waiting))
        other = TcpSocket(self.network, domain=listener.domain)
        self.ip = own
        self.remote, other.remote = (ip, port), (self.ip, self.port)
        other.ip, other.port = ip, port
        other.options, other.linger = dict(listener.options), listener.linger
        self.network.enter(other)
        self.peer, other.peer = other, self
        listener.waiting.append(other)
        self.network.notify(self, 0)
        self.network.notify(listener, IN | RDNORM)

    def _disconnect(self) -> None:
        if self.peer is not None and not self.gone:
            self.peer.reset()
        if self.port:
            self.network.leave(self)
        self.peer, self.remote, self.backlog = None, None, None
        self.ip, self.port, self.shut = _ANY4 if self.domain == INET else _ANY, 0, 0
        self.finished = self.gone = False
        self._reset_waiting()

    def _reset_waiting(self) -> None:
        """Connections that nobody accepts."""
        for each in self.waiting:
            assert isinstance(each, TcpSocket)
            if each.peer is not None:
                each.peer.reset()
            each.gone = True
            each.let_go()
        self.waiting.clear()

    def reset(self) -> None:
        """The other end has broken it off."""
        if self.gone or self.dead:
            return
        self.error = errno.EPIPE if self.finished else errno.ECONNRESET
        self.shut, self.gone, self.remote = RECEIVE | SEND, True, None
        self.network.notify(self, 0)

    def finish(self) -> None:
        """The other end has nothing more to say."""
        if self.gone or self.finished:
            return
        self.finished = True
        self.shut |= RECEIVE
        if self.peer is not None and self.peer.finished:
            for each in (self, self.peer):
                each.gone, each.remote = True, None
        self.network.notify(self, 0)

    def shutdown(self, what: int) -> None:
        if self.backlog is not None:
            if what & RECEIVE:
                self.backlog = None
                self._reset_waiting()
                self.network.notify(self, 0)
            return
        self.shut |= what
        self.network.notify(self, 0)
        if self.peer is None or self.gone:
            raise OSError(errno.ENOTCONN, "")
        if what & SEND:
            self.peer.finish()

    def closed(self) -> None:
        self._reset_waiting()
        if self.peer is not None and not self.gone:
            if self.queue or self.linger == (1, 0):
                self.peer.reset()
                self.gone = True
            else:
                self.peer.finish()
        self.dead = True
        super().closed()

    # --- data ------------------------------------------------------------------------------------------------------

    def send(self, system: System, thread: Thread, message: Message) -> int:
        return self.give(message.data)

    def give(self, data: bytes) -> int:
        """How many bytes are on their way. Raises OSError and Blocked."""
        if self.error or self.shut & SEND or self.peer is None:
            if self.error and self.error != errno.EPIPE:
                self.raise_error()
            self.error = 0
            raise Broken
        if not data:
            return 0
        if self.peer.gone or self.peer.dead or (self.finished and self.peer.shut & RECEIVE):
            self.peer.reset()       # they know that only now
            self.reset()
            return len(data)
        room = self._room()
        if room <= 0:
            self.wait_for(self)
        data = data[:room]
        self.peer.arrive(Packet(bytearray(data), b"", merges=True))
        return len(data)

    def _room(self) -> int:
        assert self.peer is not None
        return self.send_room + self.peer.receive_room - self.peer.held

    def receive(self, system: System, thread: Thread, count: int, *, peek: bool = False,
                wait: bool = True) -> Received:
        return self.fetch(count, peek=peek)

    def fetch(self, count: int, *, peek: bool = False) -> Received:
        """Raises OSError and Blocked."""
        if self.peer is None and not self.shut & RECEIVE:
            raise OSError(errno.ENOTCONN, "")
        if not self.queue:
            if self.finished:
                return Received(b"", 0)
            self.raise_error()
            if self.shut & RECEIVE:
                return Received(b"", 0)
            self.wait_for(self)
        peer = self.peer
        was_full = peer is not None and not peer.has_room()
        found = self.take_stream(count, peek=peek)
        if peer is not None and was_full and peer.has_room():
            self.network.notify(peer, self.out(band=False))
        return found

    def has_room(self) -> bool:
        """By a third, not by a byte: so a sender is not told of each."""
        return self.peer is None or self.peer.dead or self._room() * 3 >= self.send_room + self.peer.receive_room

    def ready(self, system: System) -> int:
        if self.backlog is not None:
            return IN | RDNORM if self.waiting else 0
        found = self.closing_events()
        if self.peer is None or self.gone:
            found |= HUP
        if self.queue:
            found |= IN | RDNORM
        if self.shut & SEND or self.has_room():
            found |= self.out(band=False)
        return found


class UdpSocket(InetSocket):
    """What has no room is lost. See ``Socket`` for the contract."""

    def __init__(self, network: Network, kind: int = DGRAM, protocol: int = UDP, flags: int = 0, *,
                 domain: int) -> None:
        super().__init__(network, kind, protocol, flags, domain=domain)
        self._bound_ip: bytes | None = None         # before it was connected

    def save(self) -> dict[str, Any]:
        return super().save() | {"bound": self._bound_ip}

    def restore(self, inode: Inode, saved: dict[str, Any]) -> None:
        super().restore(inode, saved)
        self._bound_ip = saved["bound"]

    def is_open(self, sender: InetSocket) -> bool:
        return self.remote is None or (self.remote[1] == sender.port and self.remote[0] == sender._source_of(self.ip))

    def connect(self, system: System, thread: Thread, address: bytes) -> None:
        if len(address) >= 2 and not any(address[:2]):
            if self._bound_ip is not None:
                self.ip, self._bound_ip = self._bound_ip, None
            self.remote = None
            return
        place = self._parsed(address)
        ip = self._reachable(place[0])
        if not self.port:
            self._take_port(self.ip)
        self._bound_ip = self.ip if self._bound_ip is None else self._bound_ip
        self.ip = self._source_of(ip)
        self.remote = (ip, place[1])

    def shutdown(self, what: int) -> None:
        self.shut |= what
        self.network.notify(self, 0)
        if self.remote is None:
            raise OSError(errno.ENOTCONN, "")

    def send(self, system: System, thread: Thread, message: Message) -> int:
        if not self.port:
            self._take_port(self.ip)
        if len(message.data) > _LONGEST:
            raise OSError(errno.EMSGSIZE, "")
        if message.to is not None:
            ip, port = self._parsed(message.to)
            if not port:
                raise OSError(errno.EINVAL, "")
        elif self.remote is not None:
            ip, port = self.remote
        else:
            raise OSError(errno.EDESTADDRREQ, "")
        ip = self._reachable(ip)
        self.raise_error()
        if self.shut & SEND:
            raise OSError(errno.EPIPE, "")
        found = self._best(ip, port)
        if found:
            connected = [each for each in found if each.remote is not None]
            self._deliver((connected or found)[-1], ip, message.data)
        elif self.remote == (ip, port):
            self.error = errno.ECONNREFUSED
            self.network.notify(self, ERR)
        return len(message.data)

    def _deliver(self, to: InetSocket, ip: bytes, data: bytes) -> None:
        packet = Packet(bytearray(data), to.packed(self._source_of(ip), self.port))
        if to.held + packet.cost <= to.receive_room:
            to.arrive(packet)

    def receive(self, system: System, thread: Thread, count: int, *, peek: bool = False,
                wait: bool = True) -> Received:
        self.raise_error()
        if not self.queue:
            if self.shut & RECEIVE and wait:
                return Received(b"", 0)
            self.wait_for(self)
        return self.take_message(count, peek=peek)

    def ready(self, system: System) -> int:
        found = self.closing_events()
        if self.queue:
            found |= IN | RDNORM
        return found | self.out(band=True)
