"""Where metrics are served: HTTP at a port, or at a Unix socket.

    Prometheus -> Address -> Endpoint (threads of wsgiref) -> prometheus_client's application -> MachineCollector
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import socket
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from types import TracebackType
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from ipc.listening import InTheWay, UnixListener, listen_tcp

from .. import optional
from ..errors import VmmError, one_line
from ..machine.runtime import SOCKET_PATH_MAX
from .collector import MachineCollector

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["Address", "Endpoint", "Listening", "parse_address"]

_LOCAL = "127.0.0.1"
_HEARING = 10.0         # seconds for a client to say something, or take some of its answer
_REQUEST = 30.0         # and for all of it
_BACKLOG = 16
_CLIENTS = 32           # at once; each has a thread
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
    """Says nothing of each request. A client that has not asked and taken its answer in time is given up."""

    timeout = _HEARING

    def handle(self) -> None:
        """One request."""
        deadline = threading.Timer(_REQUEST, self._give_up)
        deadline.daemon = True
        deadline.start()
        try:
            super().handle()
        finally:
            deadline.cancel()

    def _give_up(self) -> None:
        with contextlib.suppress(OSError):      # it has gone
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def get_stderr(self) -> io.StringIO:
        """For what wsgiref says of a client that does not take its answer: nothing."""
        return io.StringIO()


class _Server(ThreadingMixIn, WSGIServer):
    """Whoever comes while ``_CLIENTS`` are served is hung up on at once."""

    daemon_threads = True

    def __init__(self, listening: socket.socket) -> None:
        self._free = threading.BoundedSemaphore(_CLIENTS)
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.address_family = listening.family
        self.server_name, self.server_port = "localhost", 0
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        client, where = self.socket.accept()
        return client, where or ("local", 0)        # of a Unix socket: the client has no name

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:       # there is no thread for it
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass    # it has gone, or does not speak HTTP


def _said(application: WSGIApplication) -> WSGIApplication:
    """What goes wrong within it is one line on standard error, and for the client."""
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            return application(environ, start_response)
        except Exception as exc:
            said = f"metrics: {type(exc).__name__}: {one_line(str(exc))} (this is a bug)"
            print(f"vmm: error: {said}", file=sys.stderr, flush=True)
            start_response("500 Internal Server Error", [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{said}\n".encode()]

    return answer


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
        self._server.set_app(_said(optional.prometheus("exposition").make_wsgi_app(registry)))
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
