"""The target's one address: who comes there for pages gets a thread, who speaks ZeroMQ is led to ZeroMQ.

An operator opens one port, or forwards one. So what listens is ours, and the first byte that a peer sends says what it
wants: ZMTP's greeting begins with 0xff, a connection for pages with 0 (``PAGES``). ZeroMQ listens behind
it, at a name that only this process may connect to; its bytes are forwarded both ways, which are few.

A Unix socket is the user's own: its file is mode 0600, and a peer is this user or root (SO_PEERCRED).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

from ipc.linux.peer import peer_of
from ipc.listening import InTheWay, UnixListener

from ...errors import VmmError
from .addresses import Address

__all__ = ["PAGES", "Door", "listening_at"]

PAGES = b"\0"               # the first byte of a connection for pages
_ZMTP = b"\xff"
_BACKLOG = 64
_STRANGERS = 64             # connections that have not said what they want
_LED = 256                  # to ZeroMQ at a time
_PATIENCE = 10.0            # seconds for them to say it
_DRAIN = 2.0                # seconds at the end for what ZeroMQ has said last
_PIECE = 1 << 16


class Door:
    """Listens at the address from its making on; ``serve`` before anybody is let in. ``with`` it."""

    def __init__(self, address: Address) -> None:
        """Raises VmmError when nobody can listen there: what is already there is never replaced, but for the socket
        that a receiver of this user has left behind when it was killed."""
        self._open = contextlib.ExitStack()
        self._address = address
        self._listener = self._open.enter_context(listening_at(address))
        #: Where ZeroMQ is to listen; it lets in nobody but this process.
        self.behind = f"ipc://@shardvmm-{secrets.token_hex(16)}"
        self._pages: Callable[[socket.socket], None] = lambda sock: None
        self._strangers = threading.BoundedSemaphore(_STRANGERS)
        self._led = threading.BoundedSemaphore(_LED)
        self._lock = threading.Lock()
        self._over = False
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._last_words: set[threading.Thread] = set()     # of these, those that carry what ZeroMQ says

    @property
    def endpoint(self) -> str:
        """What a source may be told to connect to."""
        if self._address.local:
            return f"ipc://{self._address.path}"
        host, port = self._listener.getsockname()[:2]
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    def serve(self, pages: Callable[[socket.socket], None]) -> None:
        """Let peers in. ``pages`` is called with each connection that pages are to come over, in a thread of its own;
        it closes it."""
        self._pages = pages
        self._begin(self._accept)

    def _begin(self, work: Callable[..., None], *arguments: object) -> threading.Thread:
        def run() -> None:
            try:
                work(*arguments)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, name="door", daemon=True)
        with self._lock:
            thread.start()
            self._threads.add(thread)
        return thread

    def _keep(self, sock: socket.socket) -> bool:
        """It is shut at the end, if it is still there then. False: it is the end."""
        with self._lock:
            if not self._over:
                self._sockets.add(sock)
        return not self._over

    def _drop(self, sock: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(sock)
        sock.close()

    def _accept(self) -> None:
        while not self._over:
            try:
                sock, _ = self._listener.accept()
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    time.sleep(0.1)     # others may close some
                    continue
                if exc.errno == errno.ECONNABORTED:
                    continue
                return      # it was shut
            if not self._strangers.acquire(blocking=False) or not self._keep(sock):
                sock.close()
                continue
            self._begin(self._let_in, sock)

    def _let_in(self, sock: socket.socket) -> None:
        wants = b""
        try:
            with contextlib.suppress(OSError):
                if not self._address.local:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if not self._address.local or peer_of(sock).uid in (os.geteuid(), 0):
                    sock.settimeout(_PATIENCE)
                    wants = sock.recv(1, socket.MSG_PEEK)
                    sock.settimeout(None)
        finally:
            self._strangers.release()
        if wants == _ZMTP and self._led.acquire(blocking=False):
            try:
                self._lead(sock)
            finally:
                self._led.release()
        elif wants == PAGES:
            try:
                sock.recv(1)
                self._pages(sock)
            finally:
                self._drop(sock)
        else:
            self._drop(sock)

    def _lead(self, sock: socket.socket) -> None:
        """To ZeroMQ, and back."""
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            inner.connect("\0" + self.behind.removeprefix("ipc://@"))
            there = self._keep(inner)
        except OSError:
            there = False
        if not there:
            inner.close()
            self._drop(sock)
            return
        back = self._begin(_carry, inner, sock)
        with self._lock:
            self._last_words = {thread for thread in self._last_words if thread.is_alive()} | {back}
        _carry(sock, inner)
        back.join()
        self._drop(sock)
        self._drop(inner)

    def close(self) -> None:
        """What ZeroMQ has said by now still arrives, if it is closed. Idempotent."""
        with self._lock:
            self._over = True
            said = set(self._last_words)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)   # who waits in accept goes on
        until = time.monotonic() + _DRAIN
        for thread in said:
            thread.join(max(0.0, until - time.monotonic()))
        with self._lock:
            sockets, threads = set(self._sockets), set(self._threads)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()
        self._open.close()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    """All that comes out of one into the other, and its end."""
    with contextlib.suppress(OSError):
        while data := source.recv(_PIECE):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


# --- listening ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening_at(address: Address) -> Iterator[socket.socket]:
    """A socket that listens there; the file of a Unix socket is removed at the end. Raises VmmError when nobody can,
    with whatever is there as it was."""
    if address.abstract or not address.local:       # no file
        with _abstract(address) if address.abstract else _tcp(address) as listener:
            yield listener
        return
    with contextlib.closing(_unix(address)) as unix:
        yield unix.socket


def _abstract(address: Address) -> socket.socket:
    """Raises VmmError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind("\0" + address.path[1:])
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        why = "another program is already listening" if exc.errno == errno.EADDRINUSE else exc.strerror
        raise VmmError(f"{address.text}: cannot listen there: {why}") from None
    return listener


def _unix(address: Address) -> UnixListener:
    """Raises VmmError."""
    try:
        return UnixListener(address.path, _BACKLOG)
    except InTheWay as exc:
        raise VmmError(f"{address.text}: {exc.strerror}") from None
    except OSError as exc:
        raise VmmError(f"{address.text}: cannot listen there: {exc.strerror}") from None


def _tcp(address: Address) -> socket.socket:
    """Raises VmmError."""
    why = ""
    for host, port in address.listening():
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return socket.create_server((host, port), family=family, backlog=_BACKLOG,
                                        dualstack_ipv6=address.host == "*" and family == socket.AF_INET6)
        except OSError as exc:
            why = why or os.strerror(exc.errno or 0)
    raise VmmError(f"{address.text}: cannot listen there: {why or 'it has no IPv4 address'}")
