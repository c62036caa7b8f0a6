"""Consoles of a program, as its system has them: streams to a process that shows them, or the machine's console."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ipc.consoles import Frame, FrameReader, FrameWriter, open_input, open_output

if TYPE_CHECKING:
    from .processes import Thread

__all__ = ["LineConsole", "StreamConsole"]

_ROOM = 1 << 16         # bytes that wait to be shown, or to be read


class LineConsole:
    """What is written goes to the machine's console; there is nothing to read."""

    terminal = False

    def __init__(self, say: Callable[[bytes], None]) -> None:
        self._say = say

    def read(self, count: int) -> bytes | None:
        return b""

    def ready(self) -> bool:
        return True

    def write(self, data: bytes, *, error: bool) -> int:
        self._say(data)
        return len(data)

    def writable(self) -> bool:
        return True

    def ioctl(self, thread: Thread, request: int, argument: int) -> int:
        raise OSError(errno.ENOTTY, "")


class StreamConsole:
    """Three streams. ``descriptors``: to be polled for reading, and for writing where ``pending``."""

    terminal = False

    def __init__(self, directory: Path) -> None:
        """Raises OSError."""
        self.input_fd, self.output_fd = open_input(directory), open_output(directory)
        self._reader, self._writer = FrameReader(self.input_fd), FrameWriter(self.output_fd)
        self._input = bytearray()
        self._ended = False

    @property
    def pending(self) -> bool:
        """Something is to be shown still."""
        return self._writer.pending > 0

    @property
    def wants_input(self) -> bool:
        return len(self._input) < _ROOM

    def pump(self) -> bool:
        """What can be moved now is; whether a program may have waited for that. Raises OSError."""
        changed = False
        if self._writer.pending:
            full = self._writer.pending >= _ROOM
            self._writer.flush()
            changed = full and self._writer.pending < _ROOM
        if self.wants_input:
            for kind, data in self._reader.frames():
                changed = True
                if kind == Frame.INPUT:
                    self._input += data
                elif kind == Frame.INPUT_ENDS:
                    self._ended = True
        return changed

    def say_ended(self) -> None:
        """The program has. Raises OSError."""
        self._writer.put(Frame.ENDED)

    # --- for the system ---------------------------------------------------------------------------------------------

    def read(self, count: int) -> bytes | None:
        if not self._input:
            return b"" if self._ended else None
        found = bytes(self._input[:count])
        del self._input[:count]
        return found

    def ready(self) -> bool:
        return bool(self._input) or self._ended

    def write(self, data: bytes, *, error: bool) -> int:
        if self._writer.pending >= _ROOM:
            return 0
        data = data[:_ROOM]
        self._writer.put(Frame.ERROR if error else Frame.OUTPUT, data)
        return len(data)

    def writable(self) -> bool:
        return self._writer.pending < _ROOM

    def ioctl(self, thread: Thread, request: int, argument: int) -> int:
        raise OSError(errno.ENOTTY, "")
