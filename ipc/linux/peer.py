"""Who is at the other end of a Unix socket (SO_PEERCRED, unix(7))."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

__all__ = ["Peer", "peer_of"]

_CREDENTIALS = struct.Struct("=iII")    # struct ucred


class Peer(NamedTuple):
    """As it connected, or listened."""

    pid: int        # 0: it is in a PID namespace that is not seen from here
    uid: int
    gid: int


def peer_of(sock: socket.socket) -> Peer:
    """Of a connected Unix socket. Raises OSError."""
    return Peer(*_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))
