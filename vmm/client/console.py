"""The console of a Linux program, followed by the process that has launched it: what comes in goes to the program, what
it writes comes out (ipc/consoles.py)."""

from __future__ import annotations

import contextlib
import os
import select
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ipc.consoles import COUNT, SIZE, Frame, FrameReader, FrameWriter, open_input, open_output

from .terminal import Escape, RawTerminal, size_of

__all__ = ["ConsoleFollower"]

_READ = 1 << 16
_LOOK_S = 0.25      # seconds after which it asks whether the machine is still there


class ConsoleFollower:
    """Of a machine that has not been started yet. Use with ``with``. ``source``: a descriptor; -1: it has ended.
    ``output`` and ``error``: None: nobody is there. ``is_over``: the machine has ended."""

    def __init__(self, directory: Path, source: int, output: BinaryIO | None, error: BinaryIO | None,
                 is_over: Callable[[], bool]) -> None:
        """Raises OSError."""
        self._input, self._output = open_input(directory), open_output(directory)
        self._wake, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._reader, self._writer = FrameReader(self._output), FrameWriter(self._input)
        self._source, self._to, self._to_error, self._is_over = source, output, error, is_over
        self._wanted = 0                    # bytes that the program's system has asked for
        self._signals: deque[int] = deque()
        self._escape: Escape | None = None      # of a terminal
        self._left = False
        self._sized = True
        if source < 0:
            self._writer.put(Frame.INPUT_ENDS)

    def be_terminal(self) -> RawTerminal:
        """``source`` and the output are one, and the program has a terminal: it is raw within this ``with``."""
        self._escape = Escape()
        self._say_size()
        return RawTerminal(self._source)

    # --- from signal handlers -----------------------------------------------------------------------------------------

    def signal(self, number: int) -> None:
        """It becomes the program's."""
        self._signals.append(number)
        self._be_woken()

    def resized(self) -> None:
        """The terminal."""
        self._sized = False
        self._be_woken()

    def _be_woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._waker, b"\0")

    # ------------------------------------------------------------------------------------------------------------------

    def follow(self) -> bool:
        """Until the program has ended, or the machine. False: its user has left it (Ctrl-] q). Raises BrokenPipeError,
        of ``error``, and what ``output`` does."""
        over = False
        while True:
            ready = self._wait(0.0 if over else _LOOK_S)
            if self._show() or over or self._left:
                return not self._left
            if self._writer.pending:
                self._writer.flush()
            self._say_signals()
            if self._source in ready:
                self._read()
            over = not ready and self._is_over()    # what it has said until then is shown in the next turn

    def _wait(self, seconds: float) -> set[int]:
        """Descriptors for which there is something to do."""
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        if self._source >= 0 and self._wanted and not self._writer.pending:
            poll.register(self._source, select.POLLIN)
        if self._writer.pending:
            poll.register(self._input, select.POLLOUT)
        return {fd for fd, _ in poll.poll(seconds * 1000)}

    def _say_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, _READ)
        while self._signals:
            self._writer.put(Frame.SIGNAL, bytes((self._signals.popleft(),)))
        if not self._sized:
            self._say_size()

    def _say_size(self) -> None:
        self._sized = True
        self._writer.put(Frame.SIZE, SIZE.pack(*size_of(self._source)))

    def _read(self) -> None:
        try:
            data = os.read(self._source, min(self._wanted, _READ))
        except BlockingIOError:
            return
        except OSError:     # a directory, a terminal that has gone
            data = b""
        if not data:
            self._source = -1
            self._writer.put(Frame.INPUT_ENDS)
            return
        if self._escape is not None:
            data, self._left = self._escape.passed(data)
        if data:
            self._wanted = max(0, self._wanted - len(data))
            self._writer.put(Frame.INPUT, data)

    def _show(self) -> bool:
        """True when the program has ended."""
        ended = False
        for kind, data in self._reader.frames():
            if kind == Frame.OUTPUT:
                _write(self._to, data)
            elif kind == Frame.ERROR:
                _flush(self._to)        # in the order in which it was said
                self._show_error(data)
            elif kind == Frame.WANTED:
                self._wanted += COUNT.unpack(data)[0]
            elif kind == Frame.ENDED:
                ended = True
        _flush(self._to)
        return ended

    def _show_error(self, data: bytes) -> None:
        """Raises BrokenPipeError."""
        try:
            _write(self._to_error, data)
            _flush(self._to_error)
        except BrokenPipeError:
            raise
        except OSError:         # full, for example: that is no reason to end
            self._to_error = None

    def __enter__(self) -> ConsoleFollower:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        for fd in (self._input, self._output, self._wake, self._waker):
            with contextlib.suppress(OSError):
                os.close(fd)


def _write(stream: BinaryIO | None, data: bytes) -> None:
    while stream is not None and data:
        try:
            data = data[stream.write(data):]
        except BlockingIOError as error:        # somebody has made it so
            data = data[error.characters_written:]
            select.select([], [stream], [])


def _flush(stream: BinaryIO | None) -> None:
    while stream is not None:
        try:
            stream.flush()
            return
        except BlockingIOError:
            select.select([], [stream], [])
