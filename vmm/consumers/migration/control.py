"""Where a migration under way is spoken to: a Unix socket in its machine's runtime directory, which is its user's
alone. One line of JSON each way: Changes (vmm/consumers/migration/steering.py), and ``settings`` or ``error``."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from ipc.messages import UNREADABLE

from ...errors import ExitCode, VmmError, one_line
from ...machine.runtime import machine_dir
from .report import OVER
from .status import load_status
from .steering import Changes

__all__ = ["Control", "change"]

_SOCKET = "migrate"         # no longer than LONGEST_SOCKET (vmm/machine/runtime.py)
_PATIENCE = 10.0            # seconds for an answer
_HEARING = 1.0              # and of who asks; nobody else is heard meanwhile
_LINE_MAX = 4096


def change(machine: str, changes: Changes) -> dict[str, Any]:
    """Have the migration of this machine go on like this; its settings then. Raises VmmError when there is none, or it
    cannot."""
    found = load_status(machine)
    if found["direction"] != "outgoing" or found["status"] in OVER:
        raise VmmError(f"no migration of machine '{machine}' to elsewhere is in progress")
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_PATIENCE)
            sock.connect(str(_path(machine)))
            sock.sendall(msgspec.json.encode(changes) + b"\n")
            answer = msgspec.json.decode(_line(sock))
    except (OSError, *UNREADABLE) as exc:
        raise VmmError(f"the migration of machine '{machine}' (pid {found['pid']}) does not answer: {exc}",
                       ExitCode.MIGRATION_FAILED) from None
    if "error" in answer:
        raise VmmError(answer["error"])
    return dict(answer["settings"])


def _path(machine: str) -> Path:
    return machine_dir(machine) / _SOCKET


def _line(sock: socket.socket) -> bytes:
    """Raises OSError."""
    text = b""
    while not text.endswith(b"\n"):
        if not (more := sock.recv(_LINE_MAX)) or len(text) > _LINE_MAX:
            raise ConnectionError("it sent no line")
        text += more
    return text


class Control:
    """Listens, by a thread of its own, until it is closed. For the holder of the machine's migration lease: a socket
    that is there is one of somebody who was killed. Raises OSError where there can be none."""

    def __init__(self, machine: str, asked: Callable[[Changes], dict[str, Any]]) -> None:
        self._asked = asked
        self._at = _path(machine)
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._at.unlink(missing_ok=True)
            self._listener.bind(str(self._at))
            self._listener.listen()
        except OSError:
            self._listener.close()
            raise
        self._thread = threading.Thread(target=self._listen, name="migrate-control", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):      # closed
            while True:
                sock, _ = self._listener.accept()
                with sock, contextlib.suppress(OSError):
                    sock.settimeout(_HEARING)
                    sock.sendall(json.dumps(self._answer(_line(sock))).encode() + b"\n")

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            return {"settings": self._asked(msgspec.json.decode(line, type=Changes))}
        except UNREADABLE as exc:
            return {"error": f"not a change of a migration's settings: {one_line(str(exc))}"}
        except VmmError as exc:
            return {"error": str(exc)}

    def close(self) -> None:
        """Before the machine's directory may be another's. Idempotent."""
        if self._listener.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            self._at.unlink()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
