"""Consoles of a program, as its system has them: streams or a terminal of a process that shows them
(ipc/consoles.py), or the machine's console."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ipc.consoles import COUNT, SIZE, Frame, FrameReader, FrameWriter, open_input, open_output

from .controls import control
from .population import FIRST_PID
from .settings import IUTF8, Settings
from .terminal import Tty

if TYPE_CHECKING:
    from .processes import Thread
    from .system import System

__all__ = ["FramedConsole", "LineConsole", "Send", "StreamConsole", "TerminalConsole"]

_ROOM = 1 << 16         # bytes that wait to be shown, or to be read
_TYPED = 1 << 12        # the same, that were typed

#: Send a signal (the second argument) to a process group; 0: to the first process.
Send = Callable[[int, int], None]


class LineConsole:
    """What is written goes to the machine's console; there is nothing to read.
    See ``Console`` (system.py) for the contract."""

    terminal = False
    tty = None

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

    def settle(self) -> bool:
        return False

    def ioctl(self, system: System, thread: Thread, request: int, argument: int) -> int:
        raise OSError(errno.ENOTTY, "")


class FramedConsole:
    """Of a process that shows it. ``descriptors``: to be polled for reading, and for writing where ``pending``.

    What it reads is asked for, so that nothing is taken away from others which the program never reads, and signals
    and sizes are not kept waiting by it: never more than ``room`` bytes have been asked for and not been used."""

    terminal = False
    tty: Tty | None = None

    def __init__(self, directory: Path, send: Send, room: int) -> None:
        """Raises OSError."""
        self.input_fd, self.output_fd = open_input(directory), open_output(directory)
        self._reader, self._writer = FrameReader(self.input_fd), FrameWriter(self.output_fd)
        self._send, self._room = send, room
        self._input = bytearray()
        self._asked = 0         # bytes that have not come yet
        self._ended = False

    @property
    def pending(self) -> bool:
        """Something is to be shown still."""
        return self._writer.pending > 0

    def pump(self) -> bool:
        """What can be moved now is; whether a program may have waited for that. Raises OSError."""
        changed = False
        if self._writer.pending:
            full = not self.writable()
            self._writer.flush()
            changed = full and self.writable()
        for kind, data in self._reader.frames():
            changed = True
            if kind == Frame.INPUT:
                self._asked = max(0, self._asked - len(data))
                self._input += data
            else:
                self._take(kind, data)
        if changed:
            self.settle()
        return changed

    def _take(self, kind: int, data: bytes) -> None:
        """Another frame."""
        if kind == Frame.INPUT_ENDS:
            self._ended = True
        elif kind == Frame.SIGNAL and data:
            # What a keyboard would send goes to all who are at it.
            self._send(FIRST_PID if data[0] in (signal.SIGINT, signal.SIGQUIT) else 0, data[0])

    def _ask(self) -> None:
        """For as much as there is room for, unless that is little."""
        more = self._room - len(self._input) - self._asked
        if more >= self._room // 2 and not self._ended:
            self._asked += more
            self._writer.put(Frame.WANTED, COUNT.pack(more))

    def say_ended(self) -> None:
        """The program has. Raises OSError."""
        self._writer.put(Frame.ENDED)

    def settle(self) -> bool:
        """After something has been done with it; whether a program may have waited for what followed."""
        return False

    def writable(self) -> bool:
        return self._writer.pending < _ROOM


class StreamConsole(FramedConsole):
    """Three streams. See ``Console`` (system.py) for the contract."""

    def __init__(self, directory: Path, send: Send) -> None:
        super().__init__(directory, send, _ROOM)

    def read(self, count: int) -> bytes | None:
        found = bytes(self._input[:count])
        del self._input[:count]
        self._ask()
        return found if found or self._ended else None

    def ready(self) -> bool:
        if not self._input:
            self._ask()
        return bool(self._input) or self._ended

    def write(self, data: bytes, *, error: bool) -> int:
        if not self.writable():
            return 0
        data = data[:_ROOM]
        self._writer.put(Frame.ERROR if error else Frame.OUTPUT, data)
        return len(data)

    def ioctl(self, system: System, thread: Thread, request: int, argument: int) -> int:
        raise OSError(errno.ENOTTY, "")


class TerminalConsole(FramedConsole):
    """A terminal, which the first process controls. ``clock``: that of the system.
    See ``Console`` (system.py) for the contract."""

    terminal = True
    tty: Tty

    def __init__(self, directory: Path, send: Send, clock: Callable[[], int]) -> None:
        super().__init__(directory, send, _TYPED)
        usual = Settings()
        self.tty = Tty(Settings(iflag=usual.iflag | IUTF8), session=FIRST_PID, group=FIRST_PID)
        self._clock = clock
        self._ask()

    def _take(self, kind: int, data: bytes) -> None:
        if kind == Frame.SIZE:
            self.tty.resize(*SIZE.unpack(data))
        elif kind == Frame.INPUT_ENDS:
            self._ended = True
            self.tty.hang_up()
        else:
            super()._take(kind, data)

    def settle(self) -> bool:
        taken = self.tty.type(bytes(self._input), self._clock()) if self._input else 0
        del self._input[:taken]
        self._ask()
        shown = self.tty.take_shown()
        if shown:
            self._writer.put(Frame.OUTPUT, shown)
        signals, self.tty.signals = self.tty.signals, []
        for number in signals:
            if self.tty.group:
                self._send(self.tty.group, number)
        return taken > 0

    def read(self, count: int) -> bytes | None:
        """Without regard to least numbers and times."""
        until = self.tty.due(count, None, 0)
        return None if until is None else self.tty.read(count)

    def ready(self) -> bool:
        return self.tty.is_ready()

    def write(self, data: bytes, *, error: bool) -> int:
        if not self.writable():
            return 0
        written = self.tty.write(data[:_ROOM])
        self.settle()
        return written

    def writable(self) -> bool:
        return not self.tty.screen.stopped and super().writable()

    def ioctl(self, system: System, thread: Thread, request: int, argument: int) -> int:
        return control(system, thread, self.tty, request, argument)
