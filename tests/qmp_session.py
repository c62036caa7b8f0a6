"""``vmm qmp`` as a process, and a session with it that is written by hand: what is sent and received is seen."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["TIMEOUT", "Session", "serving"]

TIMEOUT = 60.0


@contextlib.contextmanager
def serving(name: str, path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Clients may come. It has ended afterwards, by itself or not."""
    process = subprocess.Popen([sys.executable, "-m", "vmm", "qmp", name, str(path), *options], stderr=subprocess.PIPE,
                               text=True)
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        assert "speaks QMP at" in said, said + process.stderr.read()
        yield process
    finally:
        process.terminate()
        process.wait(TIMEOUT)
        process.stderr.close()


class Session:
    """A connection. ``events``: those that have come and were not waited for; ``told``: all of them. ``answers``:
    (command, what came). ``all_told``, ``all_answers``: of every session that there was."""

    all_told: ClassVar[list[dict[str, Any]]] = []
    all_answers: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def __init__(self, path: Path, *, negotiate: bool = True) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT)
        self._socket.connect(str(path))
        self._text = b""
        self._count = 0
        self.events: list[dict[str, Any]] = []
        self.told: list[dict[str, Any]] = []
        self.answers: list[tuple[str, dict[str, Any]]] = []
        self.greeting = self.line()
        if negotiate:
            assert self.ask("qmp_capabilities") == {}

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def line(self, seconds: float = TIMEOUT) -> dict[str, Any]:
        """What comes next. Raises EOFError at the end, TimeoutError."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._text:
            if not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            more = self._socket.recv(1 << 16)
            if not more:
                raise EOFError
            self._text += more
        text, _, self._text = self._text.partition(b"\n")
        assert text.endswith(b"\r")
        found = dict(json.loads(text))
        if "event" in found:
            self.told.append(found)
            self.all_told.append(found)
        return found

    def answer(self) -> dict[str, Any]:
        """The next that is no event."""
        while "event" in (found := self.line()):
            self.events.append(found)
        return found

    def tried(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The whole answer; ``_`` in names of arguments stands for ``-``."""
        self._count += 1
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        said = {"execute": command, "id": self._count, **({"arguments": given} if given else {})}
        self.send(json.dumps(said).encode())
        found = self.answer()
        assert found.pop("id") == self._count
        self.answers.append((command, found))
        self.all_answers.append((command, found))
        return found

    def ask(self, command: str, **arguments: Any) -> Any:
        """What is returned."""
        found = self.tried(command, **arguments)
        assert "return" in found, found
        return found["return"]

    def refused(self, command: str, **arguments: Any) -> dict[str, str]:
        """The error."""
        return dict(self.tried(command, **arguments)["error"])

    def event(self, name: str, seconds: float = TIMEOUT) -> dict[str, Any]:
        """The next of this name; those before it are left."""
        deadline = time.monotonic() + seconds
        while True:
            for at, found in enumerate(self.events):
                if found["event"] == name:
                    return self.events.pop(at)
            found = self.line(deadline - time.monotonic())
            assert "event" in found, found
            self.events.append(found)

    def closed(self) -> bool:
        """The other side closes it, after events at most."""
        with contextlib.suppress(EOFError):
            while True:
                self.events.append(self.line())
        return True

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
