"""JSON lines on standard output, of what goes on for a while: progress, and how it ended."""

from __future__ import annotations

import errno
import json
import os
import queue
import threading
from typing import Any

from ..errors import ExitCode, VmmError

__all__ = ["JsonLines"]

_WAITING = 64       # lines that may wait for whoever reads them
_PATIENCE = 5.0     # seconds for the last of them


class JsonLines:
    """Written by a thread of its own: nothing waits for whoever reads them. ``event`` says what a line is. When they
    are not read, progress is left out. ``with`` it: at its end, lines that could not be written are a VmmError, unless
    something else went wrong or whoever read them has gone."""

    def __init__(self) -> None:
        self._lost: OSError | None = None
        self._queue: queue.Queue[bytes] = queue.Queue()
        self._thread = threading.Thread(target=self._write, name="json-lines", daemon=True)
        self._thread.start()

    def put(self, event: str, document: dict[str, Any]) -> None:
        """One line."""
        if event != "progress" or self._queue.qsize() < _WAITING:
            self._queue.put(json.dumps({"event": event, **document}).encode() + b"\n")

    def _write(self) -> None:
        try:
            while line := self._queue.get():
                while line:
                    line = line[os.write(1, line):]
        except OSError as exc:      # no reason to stop: what it is about goes on
            if exc.errno != errno.EPIPE:
                self._lost = exc

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._queue.put(b"")
        self._thread.join(_PATIENCE)
        if kind is None and self._lost is not None:
            raise VmmError(f"standard output: cannot be written: {self._lost.strerror}", ExitCode.OUTPUT)
