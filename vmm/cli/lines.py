"""JSON lines on standard output, of what goes on for a while: progress, and how it ended."""

from __future__ import annotations

import errno
import json
import os
import queue
import threading
from typing import Any

__all__ = ["JsonLines", "lost_output"]

_WAITING = 64       # lines that may wait for whoever reads them
_PATIENCE = 5.0     # seconds for the last of them


_lost: list[OSError] = []       # why a line could not be written


def lost_output() -> OSError | None:
    """Why lines could not be written; None: they were, or whoever read them has gone. Said once."""
    error = _lost[-1] if _lost else None
    _lost.clear()
    return error


class JsonLines:
    """Written by a thread of its own: nothing waits for whoever reads them. ``event`` says what a line is. When they
    are not read, progress is left out. ``with`` it."""

    def __init__(self) -> None:
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
                _lost.append(exc)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *error: Any) -> None:
        self._queue.put(b"")
        self._thread.join(_PATIENCE)
