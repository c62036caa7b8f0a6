"""Sockets."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..inet import INET, INET6, TCP, UDP, TcpSocket, UdpSocket
from ..openfiles import OpenFile
from ..options import get_option, set_option
from ..sockets import DGRAM, RECEIVE, SEND, SEQPACKET, STREAM, Broken, Credentials, Message, Received, Socket
from ..unix import UnixSocket, unix_pair
from .files import block, gather, give_pair, scatter, vectors
from .registry import Blocked, served, signed32
from .waiting import timespec

if TYPE_CHECKING:
    from ..processes import Thread
    from ..system import System

_UNIX = 1
_NETLINK, _PACKET = 16, 17
_RAW = 3
_KINDS = 11
_CLOEXEC, _NONBLOCK = os.O_CLOEXEC, os.O_NONBLOCK
_ADDRESS_MAX = 128                  # struct sockaddr_storage
_ICMP = (1, 58)

# MSG_*, linux/socket.h
_OOB, _PEEK, _CTRUNC, _TRUNC, _DONTWAIT, _WAITALL, _NOSIGNAL, _ERRQUEUE, _CMSG_CLOEXEC = (
    1, 2, 8, 0x20, 0x40, 0x100, 0x4000, 0x2000, 0x4000_0000)
_HEADER = struct.Struct("<QI4xQQQQi4x")         # struct msghdr
_CONTROL = struct.Struct("<Qii")                # struct cmsghdr
_SOL_SOCKET, _RIGHTS, _CREDENTIALS = 1, 1, 2
_RIGHTS_MAX = 253                               # SCM_MAX_FD
_PASSCRED = (1, 16)
_VECTORS_MAX = 1024                             # UIO_MAXIOV
_COUNT_MAX, _PART = 0x7FFF_F000, 1 << 18

Buffers = list[tuple[int, int]]


def _socket(thread: Thread, fd: int) -> Socket:
    file = thread.process.files.get(signed32(fd))
    if not isinstance(file, Socket):
        raise OSError(errno.ENOTSOCK, "")
    return file


# --- making them -------------------------------------------------------------------------------------------------


def _kind(kind: int) -> tuple[int, int]:
    """Of a type argument: the type, the flags. Raises OSError."""
    flags, kind = kind & 0xFFFF_FFFF & ~0xF, kind & 0xF
    if flags & ~(_CLOEXEC | _NONBLOCK) or kind >= _KINDS:
        raise OSError(errno.EINVAL, "")
    return kind, flags


@served("socket")
def socket(system: System, thread: Thread, domain: int, kind: int, protocol: int, *_: int) -> int:
    kind, flags = _kind(kind)
    made = _make(system, signed32(domain), kind, signed32(protocol), flags & _NONBLOCK)
    return thread.process.files.add(made, close_on_exec=bool(flags & _CLOEXEC))


def _make(system: System, domain: int, kind: int, protocol: int, flags: int) -> Socket:
    if domain == _UNIX:
        if protocol not in (0, _UNIX):
            raise OSError(errno.EPROTONOSUPPORT, "")
        kind = DGRAM if kind == _RAW else kind
        if kind not in (STREAM, DGRAM, SEQPACKET):
            raise OSError(errno.ESOCKTNOSUPPORT, "")
        return UnixSocket(system.network, kind, 0, flags)
    if domain not in (INET, INET6):
        raise OSError(errno.EAFNOSUPPORT, "")
    if kind == STREAM and protocol in (0, TCP):
        return TcpSocket(system.network, flags=flags, domain=domain)
    if kind == DGRAM and protocol in (0, UDP):
        return UdpSocket(system.network, flags=flags, domain=domain)
    if kind == _RAW and protocol:
        raise OSError(errno.EPERM, "")
    raise OSError(errno.EPROTONOSUPPORT if kind in (STREAM, DGRAM, _RAW) else errno.ESOCKTNOSUPPORT, "")


@served("socketpair")
def socketpair(system: System, thread: Thread, domain: int, kind: int, protocol: int, address: int, *_: int) -> int:
    kind, flags = _kind(kind)
    _make(system, signed32(domain), kind, signed32(protocol), 0).let_go()       # whether there is such a kind
    if signed32(domain) != _UNIX:
        raise OSError(errno.EOPNOTSUPP, "")
    give_pair(thread, unix_pair(system.network, thread, DGRAM if kind == _RAW else kind, flags & _NONBLOCK), address,
              close_on_exec=bool(flags & _CLOEXEC))
    return 0


# --- names and connections ---------------------------------------------------------------------------------------


def _address(thread: Thread, address: int, size: int) -> bytes:
    if not 0 <= signed32(size) <= _ADDRESS_MAX:
        raise OSError(errno.EINVAL, "")
    return thread.process.space.read(address, signed32(size))


def _give_address(thread: Thread, found: bytes, address: int, size: int) -> None:
    """As much of it as there is room for, and how long it is."""
    space = thread.process.space
    room, = struct.unpack("<i", space.read(size, 4))
    if room < 0:
        raise OSError(errno.EINVAL, "")
    space.write(address, found[:room])
    space.write(size, struct.pack("<i", len(found)))


@served("bind")
def bind(system: System, thread: Thread, fd: int, address: int, size: int, *_: int) -> int:
    _socket(thread, fd).bind(system, thread, _address(thread, address, size))
    return 0


@served("listen")
def listen(system: System, thread: Thread, fd: int, backlog: int, *_: int) -> int:
    _socket(thread, fd).listen(thread, signed32(backlog))
    return 0


@served("connect")
def connect(system: System, thread: Thread, fd: int, address: int, size: int, *_: int) -> int:
    found = _socket(thread, fd)
    try:
        found.connect(system, thread, _address(thread, address, size))
    except Blocked as blocked:
        block(system, thread, found, blocked, writing=True)
    return 0


@served("accept")
def accept(system: System, thread: Thread, fd: int, address: int, size: int, *_: int) -> int:
    return accept4(system, thread, fd, address, size, 0)


@served("accept4")
def accept4(system: System, thread: Thread, fd: int, address: int, size: int, flags: int, *_: int) -> int:
    flags &= 0xFFFF_FFFF
    if flags & ~(_CLOEXEC | _NONBLOCK):
        raise OSError(errno.EINVAL, "")
    listener = _socket(thread, fd)
    try:
        made = listener.accept()
    except Blocked as blocked:
        block(system, thread, listener, blocked, writing=False)
    made.flags |= flags & _NONBLOCK
    try:
        name = made.peer_name() if address else b""
    except OSError:                 # it has been broken off already
        made.let_go()
        raise OSError(errno.ECONNABORTED, "") from None
    number = thread.process.files.add(made, close_on_exec=bool(flags & _CLOEXEC))
    if address:
        _give_address(thread, name, address, size)
    return number


@served("getsockname")
def getsockname(system: System, thread: Thread, fd: int, address: int, size: int, *_: int) -> int:
    _give_address(thread, _socket(thread, fd).name(), address, size)
    return 0


@served("getpeername")
def getpeername(system: System, thread: Thread, fd: int, address: int, size: int, *_: int) -> int:
    _give_address(thread, _socket(thread, fd).peer_name(), address, size)
    return 0


@served("shutdown")
def shutdown(system: System, thread: Thread, fd: int, how: int, *_: int) -> int:
    found, how = _socket(thread, fd), signed32(how)
    if not 0 <= how <= 2:
        raise OSError(errno.EINVAL, "")
    found.shutdown((RECEIVE, SEND, RECEIVE | SEND)[how])
    return 0


@served("setsockopt")
def setsockopt(system: System, thread: Thread, fd: int, level: int, name: int, value: int, size: int, *_: int) -> int:
    found = _socket(thread, fd)
    if signed32(size) < 0:
        raise OSError(errno.EINVAL, "")
    set_option(found, signed32(level), signed32(name), thread.process.space.read(value, min(signed32(size), 256)))
    return 0


@served("getsockopt")
def getsockopt(system: System, thread: Thread, fd: int, level: int, name: int, value: int, size: int, *_: int) -> int:
    found, space = _socket(thread, fd), thread.process.space
    room, = struct.unpack("<i", space.read(size, 4))
    if room < 0:
        raise OSError(errno.EINVAL, "")
    data = get_option(found, signed32(level), signed32(name))[:room]
    space.write(value, data)
    space.write(size, struct.pack("<i", len(data)))
    return 0


# --- sending -----------------------------------------------------------------------------------------------------


def _send(system: System, thread: Thread, to: Socket, buffers: Buffers, flags: int, address: bytes | None,
          rights: Sequence[OpenFile] = (), credentials: Credentials | None = None) -> int:
    """What has gone of a call that waits for room is kept in the thread."""
    if flags & _OOB:
        raise OSError(errno.EOPNOTSUPP, "")
    total = min(sum(size for _, size in buffers), _COUNT_MAX)
    while True:
        data = gather(thread, buffers, thread.done, min(total - thread.done, _PART))
        message = Message(data, address, () if thread.done else rights, credentials or (thread.process.pid, 0, 0))
        try:
            thread.done += to.send(system, thread, message)
        except Blocked as blocked:
            try:
                block(system, thread, to, blocked, writing=True, now=bool(flags & _DONTWAIT))
            except OSError:
                if not thread.done:
                    raise
                return thread.done
        except OSError as error:
            if isinstance(error, Broken) and not flags & _NOSIGNAL:
                to.signal_broken(system, thread)
            if not thread.done:
                raise
            return thread.done
        if to.whole or thread.done >= total:
            return thread.done


@served("sendto")
def sendto(system: System, thread: Thread, fd: int, address: int, count: int, flags: int, to: int, size: int) -> int:
    found = _socket(thread, fd)
    return _send(system, thread, found, [(address, count)], flags, _address(thread, to, size) if to else None)


@served("sendmsg")
def sendmsg(system: System, thread: Thread, fd: int, header: int, flags: int, *_: int) -> int:
    return _send_header(system, thread, _socket(thread, fd), header, flags)


def _check_header(name: int, name_size: int, count: int) -> None:
    """Raises OSError."""
    if name and signed32(name_size) < 0:
        raise OSError(errno.EINVAL, "")
    if count > _VECTORS_MAX:
        raise OSError(errno.EMSGSIZE, "")


def _send_header(system: System, thread: Thread, to: Socket, header: int, flags: int) -> int:
    """A struct msghdr."""
    name, name_size, parts, count, control, control_size, _ = _HEADER.unpack(
        thread.process.space.read(header, _HEADER.size))
    _check_header(name, name_size, count)
    rights, credentials = _parse_control(thread, to, thread.process.space.read(control, control_size)
                                         if control and 0 < control_size <= 1 << 16 else b"")
    address = _address(thread, name, name_size) if name and name_size else None
    return _send(system, thread, to, vectors(thread, parts, count), flags, address, rights, credentials)


def _parse_control(thread: Thread, to: Socket, control: bytes) -> tuple[list[OpenFile], Credentials | None]:
    """What goes along with a message. Raises OSError."""
    rights: list[OpenFile] = []
    credentials = None
    while len(control) >= _CONTROL.size:
        length, level, kind = _CONTROL.unpack_from(control)
        if not _CONTROL.size <= length <= len(control):
            raise OSError(errno.EINVAL, "")
        body = control[_CONTROL.size:length]
        if level == _SOL_SOCKET and isinstance(to, UnixSocket):
            if kind == _RIGHTS:
                numbers = struct.unpack(f"<{len(body) // 4}i", body[:len(body) // 4 * 4])
                rights += [thread.process.files.get(number, path_only=True) for number in numbers]
            elif kind == _CREDENTIALS and len(body) == 12:
                pid, user, group = struct.unpack("<iii", body)
                credentials = (pid, user, group)
            else:
                raise OSError(errno.EINVAL, "")
        control = control[-(-length // 8) * 8:]
    if len(rights) > _RIGHTS_MAX:
        raise OSError(errno.EINVAL, "")
    return rights, credentials


@served("sendmmsg")
def sendmmsg(system: System, thread: Thread, fd: int, address: int, count: int, flags: int, *_: int) -> int:
    """It waits for the first of them."""
    return _several(system, thread, _socket(thread, fd), address, count, flags, _send_header)


def _several(system: System, thread: Thread, of: Socket, address: int, count: int, flags: int,
             one: Callable[[System, Thread, Socket, int, int], int]) -> int:
    """An array of struct mmsghdr: how many of them were done. What stops it is raised if it was the first."""
    most = min(count & 0xFFFF_FFFF, _VECTORS_MAX)
    for at in range(most):
        header = address + at * (_HEADER.size + 8)
        try:
            done = one(system, thread, of, header, flags | (_DONTWAIT if at else 0))
        except OSError:
            if at:
                return at
            raise
        thread.process.space.write(header + _HEADER.size, struct.pack("<I", done))
        thread.done = 0
    return most


# --- receiving ---------------------------------------------------------------------------------------------------


def _receive(system: System, thread: Thread, of: Socket, buffers: Buffers, flags: int) -> Received:
    """Into the buffers. ``length`` of what it gives is that of the message, and of a stream how many bytes there are.
    With MSG_WAITALL, what has come already is kept in the thread."""
    if flags & _ERRQUEUE:
        raise OSError(errno.EAGAIN, "")
    if flags & _OOB:
        raise OSError(errno.EINVAL if of.domain != _UNIX else errno.EOPNOTSUPP, "")
    total = min(sum(size for _, size in buffers), _PART)
    peek, wait = bool(flags & _PEEK), not flags & _DONTWAIT and not of.flags & os.O_NONBLOCK
    while True:
        try:
            found = of.receive(system, thread, total - thread.done, peek=peek, wait=wait)
        except Blocked as blocked:
            if thread.done and not flags & _WAITALL:
                return Received(b"", thread.done)
            try:
                block(system, thread, of, blocked, writing=False, now=bool(flags & _DONTWAIT))
            except OSError:
                if thread.done:
                    return Received(b"", thread.done)
                raise
        except OSError:
            if thread.done:
                return Received(b"", thread.done)
            raise
        scatter(thread, buffers, found.data, thread.done)
        if of.whole:
            return found
        thread.done += len(found.data)
        if (not flags & _WAITALL or peek or not found.data or found.rights or found.sender or thread.done >= total):
            found.length = thread.done
            return found


def _result(of: Socket, found: Received, flags: int) -> int:
    return found.length if not of.whole or flags & _TRUNC else len(found.data)


@served("recvfrom")
def recvfrom(system: System, thread: Thread, fd: int, address: int, count: int, flags: int, name: int,
             size: int) -> int:
    of = _socket(thread, fd)
    found = _receive(system, thread, of, [(address, count)], flags)
    for each in found.rights:
        each.let_go()
    if name:
        _give_address(thread, found.sender, name, size)
    return _result(of, found, flags)


@served("recvmsg")
def recvmsg(system: System, thread: Thread, fd: int, header: int, flags: int, *_: int) -> int:
    return _receive_header(system, thread, _socket(thread, fd), header, flags)


def _receive_header(system: System, thread: Thread, of: Socket, header: int, flags: int) -> int:
    space = thread.process.space
    name, name_size, parts, count, control, control_size, _ = _HEADER.unpack(space.read(header, _HEADER.size))
    _check_header(name, name_size, count)
    found = _receive(system, thread, of, vectors(thread, parts, count), flags)
    given = _TRUNC if of.whole and found.length > len(found.data) else 0
    if flags & _CMSG_CLOEXEC:
        given |= _CMSG_CLOEXEC
    data, cut = _pack_control(thread, of, found, control_size if control else 0, flags)
    given |= cut
    if name:
        space.write(name, found.sender[:name_size])
        name_size = len(found.sender)
    space.write(control, data)
    space.write(header, _HEADER.pack(name, name_size, parts, count, control, len(data), given))
    return _result(of, found, flags)


def _pack_control(thread: Thread, of: Socket, found: Received, room: int, flags: int) -> tuple[bytes, int]:
    """What came along with a message, and MSG_CTRUNC where there is no room for it. Rights become descriptors."""
    data, cut = b"", 0
    if of.options.get(_PASSCRED):
        body = struct.pack("<iii", *found.credentials)
        if room < _CONTROL.size + len(body):
            cut = _CTRUNC
        else:
            data = (_CONTROL.pack(_CONTROL.size + len(body), _SOL_SOCKET, _CREDENTIALS) + body).ljust(32, b"\0")
    if found.rights:
        fit = max(0, room - len(data) - _CONTROL.size) // 4
        numbers: list[int] = []
        for each in found.rights:
            if len(numbers) < fit:
                try:
                    numbers.append(thread.process.files.add(each, close_on_exec=bool(flags & _CMSG_CLOEXEC)))
                    continue
                except OSError:             # which lets it go
                    cut, fit = _CTRUNC, 0
                    continue
            cut = _CTRUNC
            each.let_go()
        found.rights = []
        if numbers:
            body = struct.pack(f"<{len(numbers)}i", *numbers)
            length = _CONTROL.size + len(body)
            data += (_CONTROL.pack(length, _SOL_SOCKET, _RIGHTS) + body).ljust(-(-length // 8) * 8, b"\0")
    return data[:room], cut


@served("recvmmsg")
def recvmmsg(system: System, thread: Thread, fd: int, address: int, count: int, flags: int, timeout: int,
             *_: int) -> int:
    """It waits for the first of them, as with MSG_WAITFORONE, and for as long as that takes."""
    timespec(thread, timeout, 1)
    return _several(system, thread, _socket(thread, fd), address, count, flags, _receive_header)
