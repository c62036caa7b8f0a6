"""A TCP socket that listens."""

from __future__ import annotations

import socket

__all__ = ["listen_tcp"]


def listen_tcp(host: str | None, port: int, backlog: int) -> socket.socket:
    """At the first address of that name (None: every address of the host). Unlike ``socket.create_server`` it leaves to
    the host whether an IPv6 address takes IPv4, too, and errors as the kernel has them. Raises OSError."""
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                          flags=socket.AI_PASSIVE)[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(where)
        found.listen(backlog)
    except OSError:
        found.close()
        raise
    return found
