"""What setsockopt(2) and getsockopt(2) know. Most is only remembered: on a loopback network it changes nothing."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from .blocked import LONGEST
from .inet import INET, INET6
from .sockets import STREAM

if TYPE_CHECKING:
    from .sockets import Socket

__all__ = ["get_option", "set_option"]

_SOCKET, _IP, _TCP, _IPV6 = 1, 0, 6, 41         # levels
_SECOND, _MICROSECOND = 10**9, 10**3
_ROOM_MAX = 212992                              # /proc/sys/net/core/rmem_max, wmem_max
_TYPE, _ERROR, _SNDBUF, _RCVBUF, _LINGER, _PEERCRED, _ACCEPTCONN, _PROTOCOL, _DOMAIN = 3, 4, 7, 8, 13, 17, 30, 38, 39
_TIMEOUTS = (20, 21)                            # of receiving and of sending
_FORCED = {32: _SNDBUF, 33: _RCVBUF}
_UNIX = 1

#: What an option of SOL_SOCKET is before it is set: debug, reuse of addresses, not routed, broadcast, keep-alive,
#: urgent data inline, without checksums, priority, reuse of ports, credentials, low-water marks, time stamps, mark ...
_SOCKET_USUAL = {1: 0, 2: 0, 5: 0, 6: 0, 9: 0, 10: 0, 11: 0, 12: 0, 15: 0, 16: 0, 18: 1, 19: 1, 29: 0, 34: 0, 35: 0,
                 36: 0, 40: 0, 41: 0, 44: 0, 46: 0, 49: -1, 60: 0}
_SOCKET_SWITCHES = frozenset({1, 2, 5, 6, 9, 10, 11, 15, 16, 29, 34, 35, 40, 41, 44})
#: The same of TCP: no delay, segment size, cork, idle, interval and number of keep-alive probes ...
_TCP_USUAL = {1: 0, 2: 536, 3: 0, 4: 7200, 5: 75, 6: 9, 7: 6, 8: 60, 9: 0, 10: 0, 12: 1, 18: 0, 23: 0, 24: 0, 25: 0,
              30: 0}
_TCP_SWITCHES = frozenset({1, 3})
_IP_USUAL = {1: 0, 2: 64, 6: 0, 7: 0, 8: 0, 10: 1, 11: 0, 12: 0, 13: 0, 15: 0, 19: 0, 24: 0, 33: 1, 34: 1, 49: 1}
_IPV6_USUAL = {16: 64, 18: 1, 19: 1, 23: 1, 25: 0, 26: 0, 49: 0, 51: 0, 66: 0, 67: 0}


def _usual(socket: Socket, level: int, name: int) -> int:
    """Raises OSError where there is no such option."""
    found: dict[int, int] = {}
    if level == _SOCKET:
        found = _SOCKET_USUAL
    elif socket.domain in (INET, INET6):
        if level == _TCP and socket.kind == STREAM:
            found = _TCP_USUAL
        elif level == _IP:
            found = _IP_USUAL
        elif level == _IPV6 and socket.domain == INET6:
            found = _IPV6_USUAL
    elif level != _SOCKET:
        raise OSError(errno.EOPNOTSUPP, "")
    if name not in found:
        raise OSError(errno.ENOPROTOOPT, "")
    return found[name]


def set_option(socket: Socket, level: int, name: int, value: bytes) -> None:
    """Raises OSError."""
    if level == _SOCKET and name in _TIMEOUTS:
        _set_timeout(socket, name, value)
        return
    if level == _SOCKET and name == _LINGER:
        if len(value) < 8:
            raise OSError(errno.EINVAL, "")
        on, seconds = struct.unpack("<ii", value[:8])
        socket.linger = (int(bool(on)), seconds)
        return
    if level == _TCP and name == 13:            # TCP_CONGESTION: whichever
        return
    if len(value) < 4:
        # Options of IP are bytes, too.
        if level != _IP or not value:
            raise OSError(errno.EINVAL, "")
        value = value.ljust(4, b"\0")
    number, = struct.unpack("<i", value[:4])
    if level == _SOCKET and name in (_SNDBUF, _RCVBUF, *_FORCED):
        _set_room(socket, _FORCED.get(name, name), number)
        return
    if level == _SOCKET and name in (_TYPE, _ERROR, _PEERCRED, _ACCEPTCONN, _PROTOCOL, _DOMAIN):
        raise OSError(errno.ENOPROTOOPT, "")
    _usual(socket, level, name)
    if (level == _SOCKET and name in _SOCKET_SWITCHES) or (level == _TCP and name in _TCP_SWITCHES):
        number = int(bool(number))
    if (level, name) == (_IP, 1) and socket.kind == STREAM:
        number &= ~3                # the bits for congestion are not the program's
    if (level, name) == (_TCP, 4) and not 1 <= number <= 32767:
        raise OSError(errno.EINVAL, "")
    socket.options[level, name] = number


def _set_timeout(socket: Socket, name: int, value: bytes) -> None:
    if len(value) < 16:
        raise OSError(errno.EINVAL, "")
    seconds, rest = struct.unpack("<qq", value[:16])
    if not 0 <= rest < 10**6:
        raise OSError(errno.EDOM, "")
    length = min(seconds * _SECOND + rest * _MICROSECOND, LONGEST) if seconds >= 0 else 1
    if name == _TIMEOUTS[0]:
        socket.receive_timeout = length
    else:
        socket.send_timeout = length


def _set_room(socket: Socket, name: int, number: int) -> None:
    size = 2 * min(number & 0xFFFF_FFFF, _ROOM_MAX)
    if name == _SNDBUF:
        socket.send_room = max(size, 4608)
    else:
        socket.receive_room = max(size, 2304)


def get_option(socket: Socket, level: int, name: int) -> bytes:
    """Raises OSError."""
    if level == _SOCKET:
        if name in _TIMEOUTS:
            length = socket.receive_timeout if name == _TIMEOUTS[0] else socket.send_timeout
            return struct.pack("<qq", length // _SECOND, length % _SECOND // _MICROSECOND)
        if name == _LINGER:
            return struct.pack("<ii", *socket.linger)
        if name == _PEERCRED:
            return struct.pack("<iii", *socket.peer_credentials())
        known = {_TYPE: socket.kind, _SNDBUF: socket.send_room, _RCVBUF: socket.receive_room,
                 _ACCEPTCONN: int(socket.backlog is not None), _PROTOCOL: socket.protocol, _DOMAIN: socket.domain}
        if name == _ERROR:
            return struct.pack("<i", socket.take_error())
        if name in known:
            return struct.pack("<i", known[name])
    if level == _TCP and socket.domain != _UNIX and socket.kind == STREAM:
        if name == 13:
            return b"cubic".ljust(16, b"\0")
        if name == 11:              # TCP_INFO: a state, established or closed
            return bytes([1 if socket.backlog is None else 10]).ljust(104, b"\0")
    if level not in (_SOCKET, _IP) and socket.domain == INET and (level != _TCP or socket.kind != STREAM):
        raise OSError(errno.EOPNOTSUPP, "")
    usual = _usual(socket, level, name)
    return struct.pack("<i", socket.options.get((level, name), usual))
