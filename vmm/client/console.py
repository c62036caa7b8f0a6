"""The console of a Linux program, followed by the process that has launched it: what comes in goes to the program, what
it writes comes out (ipc/consoles.py)."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ipc.consoles import Frame, FrameReader, FrameWriter, open_input, open_output

__all__ = ["ConsoleFollower"]

_READ = 1 << 16
_LOOK_S = 0.25      # seconds after which it asks whether the machine is still there


class ConsoleFollower:
    """Of a machine that has not been started yet. Use with ``with``."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError."""
        self._input, self._output = open_input(directory), open_output(directory)
        self._reader, self._writer = FrameReader(self._output), FrameWriter(self._input)

    def follow(self, source: int, output: BinaryIO, error: BinaryIO, is_over: Callable[[], bool]) -> None:
        """From ``source`` (a descriptor; -1: it has ended) to ``output`` and ``error``, until the program has ended, or
        ``is_over`` says that the machine has."""
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        if source < 0:
            self._writer.put(Frame.INPUT_ENDS)
        over = False
        while True:
            reading = source >= 0 and not self._writer.pending
            if reading:
                poll.register(source, select.POLLIN)
            poll.register(self._input, select.POLLOUT if self._writer.pending else 0)
            ready = dict(poll.poll(0 if over else _LOOK_S * 1000))
            if reading:
                poll.unregister(source)
            if self._show(output, error) or over:
                return
            if self._writer.pending:
                self._writer.flush()
            if source in ready:
                data = os.read(source, _READ)
                self._writer.put(*((Frame.INPUT, data) if data else (Frame.INPUT_ENDS,)))
                source = source if data else -1
            over = not ready and is_over()      # what it has said until then is shown in the next turn

    def _show(self, output: BinaryIO, error: BinaryIO) -> bool:
        """True when the program has ended."""
        ended = False
        for kind, data in self._reader.frames():
            if kind == Frame.OUTPUT:
                output.write(data)
            elif kind == Frame.ERROR:
                output.flush()      # in the order in which it was said
                error.write(data)
                error.flush()
            elif kind == Frame.ENDED:
                ended = True
        output.flush()
        return ended

    def __enter__(self) -> ConsoleFollower:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        for fd in (self._input, self._output):
            with contextlib.suppress(OSError):
                os.close(fd)
