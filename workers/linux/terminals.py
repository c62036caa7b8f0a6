"""Consoles of a program, as its system has them: streams or a terminal of a process that shows them
(ipc/consoles.py), or the machine's console."""

from __future__ import annotations

import errno
import signal
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
_HEAD = 5               # bytes of a frame before its data (ipc/consoles.py)

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

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, saved: dict[str, Any], clock: Callable[[], int]) -> None:
        """What streams had not shown yet is shown; what they had not been asked for is gone."""
        for _, data in saved.get("unshown", ()):
            self._say(data)


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
        self._unshown: deque[tuple[int, Frame, bytes]] = deque()    # where each ends, of those not written yet as a
        self._end = 0                                               # whole; where the last one does

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
            self._forget_shown()
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
            self._put(Frame.WANTED, COUNT.pack(more))

    def say_ended(self) -> None:
        """The program has. Raises OSError."""
        self._put(Frame.ENDED)

    def settle(self) -> bool:
        """After something has been done with it; whether a program may have waited for what followed."""
        return False

    def writable(self) -> bool:
        return self._writer.pending < _ROOM

    def _put(self, kind: Frame, data: bytes = b"") -> None:
        """Raises OSError."""
        for at in range(0, len(data) or 1, _ROOM):
            part = data[at:at + _ROOM]
            self._end += _HEAD + len(part)
            self._unshown.append((self._end, kind, part))
            self._writer.put(kind, part)
        self._forget_shown()

    def _forget_shown(self) -> None:
        while self._unshown and self._unshown[0][0] <= self._end - self._writer.pending:
            self._unshown.popleft()

    # --- as data ----------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Who shows it may be another process later: what this one was asked for is not here. What it was not given
        yet is."""
        written = self._end - self._writer.pending
        return {"input": bytes(self._input), "ended": self._ended,
                "unshown": [[int(kind), data[max(0, written - (end - len(data))):]]
                            for end, kind, data in self._unshown if kind in (Frame.OUTPUT, Frame.ERROR)]}

    def load(self, saved: dict[str, Any], clock: Callable[[], int]) -> None:
        """Into one that has not been used. ``clock``: of the system. Raises OSError."""
        self._input[:] = saved["input"]
        self._ended = saved["ended"]
        for kind, data in saved["unshown"]:
            self._put(Frame(kind), data)


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
        self._put(Frame.ERROR if error else Frame.OUTPUT, data)
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
            self._put(Frame.OUTPUT, shown)
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

    def save(self) -> dict[str, Any]:
        return super().save() | {"tty": self.tty.save()}

    def load(self, saved: dict[str, Any], clock: Callable[[], int]) -> None:
        super().load(saved, clock)
        self.tty.load(saved["tty"])
        self._clock = clock
