"""Who asks at the control socket, and may send what it likes."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machines import until


class Caller:
    """A connection of its own, without the client's care."""

    def __init__(self, directory: Path, after: Callable[[], None] = lambda: None) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(str(directory / "control"))      # waits while too many others do
        self._sock.settimeout(30)
        self._after = after     # with a server in this process: let it serve
        self._text = b""

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def answer(self) -> dict[str, Any]:
        """The next one. Raises EOFError when the connection was closed."""
        until(self._has_answer, "an answer")
        line, _, self._text = self._text.partition(b"\n")
        return dict(json.loads(line))

    def _has_answer(self) -> bool:
        self._after()
        while b"\n" not in self._text and select.select([self._sock], [], [], 0)[0]:
            chunk = self._sock.recv(65536)
            if not chunk:
                raise EOFError
            self._text += chunk
            self._after()
        return b"\n" in self._text

    def ask(self, data: bytes) -> dict[str, Any]:
        self.send(data + b"\n")
        return self.answer()

    def close(self) -> None:
        self._sock.close()
