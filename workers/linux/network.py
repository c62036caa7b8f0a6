"""Where sockets are found: names of unix sockets, ports of the loopback network."""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from .inodes import Store

if TYPE_CHECKING:
    from .inet import InetSocket
    from .state import Loading, Saving
    from .unix import UnixSocket

__all__ = ["Network"]

_FIRST_PORT, _END_PORT = 32768, 61000       # /proc/sys/net/ipv4/ip_local_port_range


class Network:
    """``notify`` as of the system. ``nodes``: unix sockets by the inode that they are bound to. ``abstract``: by name.
    ``ports``: by protocol and port; several can share one."""

    def __init__(self, store: Store, notify: Callable[[Hashable, int], None]) -> None:
        self.store, self.notify = store, notify
        self.nodes: dict[int, UnixSocket] = {}
        self.abstract: dict[bytes, UnixSocket] = {}
        self.ports: dict[tuple[int, int], list[InetSocket]] = {}
        self._next_name, self._next_port = 0, _FIRST_PORT

    def free_name(self) -> bytes:
        """Of an abstract unix socket."""
        while True:
            name = b"\0%05x" % self._next_name
            self._next_name = (self._next_name + 1) & 0xFFFFF
            if name not in self.abstract:
                return name

    def free_port(self, protocol: int) -> int:
        """Raises OSError."""
        for _ in range(_END_PORT - _FIRST_PORT):
            port = self._next_port
            self._next_port = port + 1 if port + 1 < _END_PORT else _FIRST_PORT
            if (protocol, port) not in self.ports:
                return port
        raise OSError(errno.EADDRINUSE, "")

    def on(self, protocol: int, port: int) -> list[InetSocket]:
        """Those that have the port."""
        return self.ports.get((protocol, port), [])

    def enter(self, socket: InetSocket) -> None:
        self.ports.setdefault((socket.protocol, socket.port), []).append(socket)

    def leave(self, socket: InetSocket) -> None:
        found = self.ports.get((socket.protocol, socket.port), [])
        if socket in found:
            found.remove(socket)
            if not found:
                del self.ports[socket.protocol, socket.port]

    # --- as data ---------------------------------------------------------------------------------------------------

    def save(self, saving: Saving) -> dict[str, Any]:
        return {"nodes": [[number, saving.file(each)] for number, each in self.nodes.items()],
                "abstract": [[name, saving.file(each)] for name, each in self.abstract.items()],
                "ports": [[*key, [saving.file(each) for each in sockets]] for key, sockets in self.ports.items()],
                "next": [self._next_name, self._next_port]}

    def load(self, loading: Loading, saved: dict[str, Any]) -> None:
        self.nodes = {number: loading.unix(each) for number, each in saved["nodes"]}
        self.abstract = {name: loading.unix(each) for name, each in saved["abstract"]}
        self.ports = {(protocol, port): [loading.inet(each) for each in sockets]
                      for protocol, port, sockets in saved["ports"]}
        self._next_name, self._next_port = saved["next"]
