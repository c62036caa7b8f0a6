"""Where metrics are served: HTTP at a port, or at a Unix socket.

    Prometheus -> Address -> Endpoint (threads of wsgiref) -> prometheus_client's application -> MachineCollector
"""

from __future__ import annotations

import errno
import os
import re
import socket
import threading
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from ipc.listening import InTheWay, UnixListener, listen_tcp

from .. import optional
from ..errors import VmmError, one_line
from ..machine.runtime import SOCKET_PATH_MAX
from .collector import MachineCollector

__all__ = ["Address", "Endpoint", "Listening", "parse_address"]

_LOCAL = "127.0.0.1"
_HEARING = 10.0         # seconds for a client to say what it wants
_BACKLOG = 16
_FORM = re.compile(r"(?:(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]*):)?(?P<port>[0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class Address:
    """``path``: of a Unix socket; empty: a port of a host."""

    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def text(self) -> str:
        """As ``parse_address`` reads it."""
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def shown(self) -> str:
        """For people."""
        return self.text if self.path else f"http://{self.text}/metrics"


def parse_address(text: str, option: str = "ADDRESS") -> Address:
    """``9853`` (of 127.0.0.1), ``HOST:9853``, ``:9853`` (of every address of the host), ``unix:PATH``. Raises
    VmmError."""
    if text.startswith("unix:"):
        path = os.path.abspath(text.removeprefix("unix:"))
        if not text.removeprefix("unix:") or len(os.fsencode(path)) > SOCKET_PATH_MAX or "\0" in path:
            raise VmmError(f"{option}: {one_line(text, 120)}: a socket's path has 1 to {SOCKET_PATH_MAX} bytes")
        return Address(path=path)
    match = _FORM.fullmatch(text)
    if match is None or not 0 <= int(match["port"]) <= 65535:
        raise VmmError(f"{option}: {one_line(text, 60)} is not an address: write PORT, HOST:PORT or unix:PATH")
    host = _LOCAL if match["host"] is None else match["host"].strip("[]")
    return Address(host, int(match["port"]))


class Listening:
    """Connections wait at ``address`` from now on. A Unix socket is this user's alone (ipc/listening.py).
    ``inherited``: the descriptor of a socket that listens there already."""

    def __init__(self, address: Address, *, inherited: int = -1) -> None:
        """Raises VmmError."""
        self.address = address
        self._unix: UnixListener | None = None
        try:
            if address.path:
                self._unix = UnixListener(address.path, _BACKLOG, inherited=inherited)
                self.socket = self._unix.socket
            elif inherited >= 0:
                self.socket = socket.socket(fileno=inherited)
            else:
                self.socket = listen_tcp(address.host or None, address.port, _BACKLOG)
        except InTheWay as exc:
            raise VmmError(f"metrics: {address.shown}: {exc.strerror}") from None
        except OSError as exc:
            why = "is in use" if exc.errno == errno.EADDRINUSE else f"cannot listen there: {exc.strerror or exc}"
            raise VmmError(f"metrics: {address.shown}: {why}") from None
        if not address.path:        # the port that was chosen, where 0 was asked for
            self.address = Address(address.host, self.socket.getsockname()[1])

    def leave(self) -> None:
        """Another process has the socket."""
        self.socket.close()
        if self._unix is not None:
            self._unix.leave()

    def close(self) -> None:
        """A Unix socket's file goes. Idempotent."""
        self.socket.close()
        if self._unix is not None:
            self._unix.close()


class _Handler(WSGIRequestHandler):
    """Says nothing of each request."""

    timeout = _HEARING

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.address_family = listening.family
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        client, where = self.socket.accept()
        return client, where or ("local", 0)        # of a Unix socket: the client has no name

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass    # it has gone, or does not speak HTTP


class Endpoint:
    """Serves what ``collector`` has to whoever connects, in threads of its own, within its ``with``; both are closed
    after it."""

    def __init__(self, listening: Listening, collector: MachineCollector) -> None:
        """Raises MissingPackage."""
        registry = optional.prometheus("registry").CollectorRegistry(auto_describe=False)
        registry.register(collector)
        self._collector = collector
        self._listening = listening
        self._server = _Server(listening.socket)
        self._server.set_app(optional.prometheus("exposition").make_wsgi_app(registry))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)

    def __enter__(self) -> Endpoint:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._listening.close()
        self._collector.close()
