"""Where machines arrive: one address, and what the present migration there takes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import zmq

from .addresses import Address
from .arrivals import Arrivals
from .door import Door
from .keys import Keys
from .sockets import listen

__all__ = ["Place", "listening"]


class Place:
    """``sock``: the ROUTER. ``endpoint``: what a source may be told. ``local``: it is a Unix socket. ``encrypted``:
    there are keys."""

    def __init__(self, sock: zmq.Socket[bytes], endpoint: str, *, local: bool, encrypted: bool) -> None:
        self.sock = sock
        self.endpoint = endpoint
        self.local = local
        self.encrypted = encrypted
        #: Of the present migration.
        self.arrivals: Arrivals | None = None

    def serve(self, sock: socket.socket) -> None:
        """A connection for pages has come."""
        arrivals = self.arrivals
        if arrivals is not None:
            arrivals.serve(sock)


@contextlib.contextmanager
def listening(where: Address, keys: Keys | None, waiting: Callable[[str], None]) -> Iterator[Place]:
    """``waiting`` is told the endpoint when a source may connect. Raises VmmError."""
    with contextlib.ExitStack() as stack:
        door = stack.enter_context(Door(where))
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        stack.callback(context.term)
        sock = stack.enter_context(listen(context, door, keys))
        sock.linger = 2000
        place = Place(sock, door.endpoint, local=where.local, encrypted=keys is not None)
        door.serve(place.serve)
        waiting(door.endpoint)
        yield place
