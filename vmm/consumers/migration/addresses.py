"""Where a migration goes to: ``tcp://HOST:PORT`` or ``ipc://PATH``, read and checked in one place.

HOST is a name, an IPv4 address or an IPv6 one in brackets; to listen, it may also be ``*`` or the name of a
network interface, and ``*`` or 0 for a port that is free. PATH is that of a Unix socket; one that begins with ``@``
is in Linux's abstract namespace.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import VmmError, one_line
from ...machine.runtime import SOCKET_PATH_MAX

__all__ = ["Address", "parse_address"]

_SHOWN = 60         # characters
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?")


class Plain(NamedTuple):
    """What socket(2) and connect(2) take."""

    family: socket.AddressFamily
    name: Any


@dataclass(frozen=True, slots=True)
class Address:
    """``text`` is what the user wrote. Either ``path`` is set, or ``host`` (without brackets) and ``port``."""

    text: str
    path: str = ""
    host: str = ""
    port: int = 0

    @property
    def local(self) -> bool:
        """A Unix socket: guest memory stays on this host."""
        return bool(self.path)

    @property
    def abstract(self) -> bool:
        """A name in Linux's abstract namespace, not a file."""
        return self.path.startswith("@")

    def endpoints(self) -> list[str]:
        """What ZeroMQ may be given to connect to, the best first. Raises VmmError for a name that is not known."""
        if self.path:
            return [f"ipc://{self.path}"]
        return [f"tcp://{_bracketed(host)}:{self.port}" for host in self._resolve(passive=False)]

    def plain(self) -> list[Plain]:
        """What a plain socket may be connected to, the best first. Raises VmmError for a name that is not known."""
        if self.path:
            return [Plain(socket.AF_UNIX, "\0" + self.path[1:] if self.abstract else self.path)]
        return [Plain(socket.AF_INET6 if ":" in host else socket.AF_INET, (host, self.port))
                for host in self._resolve(passive=False)]

    def listening(self) -> list[tuple[str, int]]:
        """Of a tcp address: (host, port) to listen at, the best first. Raises VmmError for a name that is not
        known."""
        if self.host == "*":
            return [("::", self.port), ("0.0.0.0", self.port)]      # the first takes IPv4 too
        import psutil  # who connects has no use for it

        here = psutil.net_if_addrs().get(self.host)
        if here is not None:
            return [(each.address, self.port) for each in here if each.family == socket.AF_INET]
        return [(host, self.port) for host in self._resolve(passive=True)]

    def _resolve(self, *, passive: bool) -> list[str]:
        """Numeric addresses of the host."""
        flags = socket.AI_PASSIVE if passive else 0
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=flags)
        except (OSError, UnicodeError) as exc:
            why = exc.strerror if isinstance(exc, OSError) else "not a valid host name"
            raise VmmError(f"address '{self.text}': host '{self.host}': {why}") from None
        return list(dict.fromkeys(str(where[0]) for *_, where in found))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def parse_address(text: str, *, listen: bool = False) -> Address:
    """Raises VmmError, one line, for what cannot be connected to (``listen``: listened on)."""
    def refuse(why: str) -> VmmError:
        return VmmError(f"address {text if len(text) <= 60 else text[:57] + '...'!r}: {why}")

    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in ("tcp", "ipc") or not rest:
        raise refuse("write tcp://HOST:PORT or ipc://PATH")
    if any(ord(c) < 32 or ord(c) == 127 for c in rest):
        raise refuse("it contains a control character")
    if any("\ud800" <= c <= "\udfff" for c in rest):
        raise refuse("it is not valid UTF-8")
    if scheme == "ipc":
        if rest in ("*", "@"):
            raise refuse("write ipc://PATH")
        if (size := len(rest.encode())) > SOCKET_PATH_MAX:
            raise refuse(f"its path has {size} bytes, but a Unix socket path may have at most {SOCKET_PATH_MAX}")
        return Address(text, path=rest)
    host, separator, port = rest.rpartition(":")
    if not separator or not host:
        raise refuse("write tcp://HOST:PORT")
    return Address(text, host=_host(host, listen, refuse), port=_port(port, listen, refuse))


def _cut(text: str) -> str:
    """A part of an address, in what is said of it."""
    return one_line(text, _SHOWN)


def _host(host: str, listen: bool, refuse: Callable[[str], VmmError]) -> str:
    if host.startswith("[") and host.endswith("]"):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            raise refuse(f"{_cut(host)} is not an IPv6 address") from None
        return host[1:-1]
    if ":" in host:
        raise refuse(f"write an IPv6 address in brackets: tcp://[{_cut(host.strip('[]'))}]:PORT")
    if listen and host == "*":
        return host
    if not _HOST.fullmatch(host):
        raise refuse(f"'{_cut(host)}' is not a valid host name or address")
    return host


def _port(port: str, listen: bool, refuse: Callable[[str], VmmError]) -> int:
    if listen and port == "*":
        return 0
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise refuse(f"port '{_cut(port)}': use a number from {0 if listen else 1} to 65535")
    if not listen and int(port) == 0:
        raise refuse("port 0: use a number from 1 to 65535")
    return int(port)
