"""What a terminal has shown: what programs write, and the echo of what is typed, made ready as its settings say
(``OPOST``), with the column of the cursor, which tabs and the erasing of them depend on."""

from __future__ import annotations

import termios
from collections import deque
from collections.abc import Callable
from typing import Any

from .settings import IUTF8, Settings

__all__ = ["NEWLINE", "RETURN", "TAB", "Screen", "is_control"]

_BACKSPACE, TAB, NEWLINE, RETURN = b"\b\t\n\r"

_ECHO_MAX = 4096        # pieces of echo that wait while it is stopped
_ECHO_BLOCK = 256       # pieces that are shown in the middle of what is typed at once
_TAB_COLUMNS = 8
_ESCAPED = 0xFF         # is echoed as it is, whatever the settings
#: More than newlines is to be changed.
_SLOW = termios.OCRNL | termios.ONOCR | termios.ONLRET | termios.TABDLY


def is_control(byte: int) -> bool:
    return byte < 0x20 or byte == 0x7F


class Screen:
    """``shown``: for others to take away. ``stopped``: nothing can be written, and echo waits; so it does until
    `settle`, which shows it, or `clear`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.shown = bytearray()
        self.stopped = self._by_call = False
        self._echo: deque[tuple[Callable[..., None], tuple[int, ...]]] = deque(maxlen=_ECHO_MAX)
        self._column = self._first_column = 0   # of the cursor, and of the first byte of the line that is typed

    # --- stopping it --------------------------------------------------------------------------------------------------

    def stop(self, *, by_call: bool = False) -> None:
        """``by_call``: until there is another, no matter what is typed (tcflow(3))."""
        self.stopped = True
        self._by_call |= by_call

    def start(self, *, by_call: bool = False) -> None:
        if self._by_call and not by_call:
            return
        self.stopped = self._by_call = False
        self.settle()

    def clear(self) -> None:
        """What nobody has seen yet is forgotten."""
        self._echo.clear()
        self.shown.clear()

    # --- what programs write ------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> int:
        """How many bytes were taken: none while it is stopped."""
        if self.stopped:
            return 0
        oflag, rest = self.settings.oflag, data
        if not oflag & termios.OPOST:
            self.shown += data
            return len(data)
        if oflag & (_SLOW | termios.ONLCR) == termios.ONLCR:    # only where the last line ends needs to be known
            lines, newline, rest = data.rpartition(b"\n")
            if newline:
                self.shown += lines.replace(b"\n", b"\r\n") + b"\r\n"
                self._column = self._first_column = 0
        for byte in rest:
            self.shown += self._processed(byte)
        return len(data)

    def _processed(self, byte: int) -> bytes:
        """As it is shown; the cursor moves."""
        oflag = self.settings.oflag
        if byte == NEWLINE:
            if oflag & (termios.ONLRET | termios.ONLCR):
                self._column = 0
            self._first_column = self._column
            return b"\r\n" if oflag & termios.ONLCR else b"\n"
        if byte == RETURN:
            if oflag & termios.ONOCR and not self._column:
                return b""
            if oflag & termios.OCRNL:
                if oflag & termios.ONLRET:
                    self._column = self._first_column = 0
                return b"\n"
            self._column = self._first_column = 0
        elif byte == TAB:
            spaces = _TAB_COLUMNS - self._column % _TAB_COLUMNS
            self._column += spaces
            if oflag & termios.TABDLY == termios.XTABS:
                return b" " * spaces
        elif byte == _BACKSPACE:
            self._move_back()
        elif not is_control(byte) and not self.continues(byte):
            self._column += 1
        return bytes((byte,))

    def continues(self, byte: int) -> bool:
        """A character of UTF-8."""
        return bool(self.settings.iflag & IUTF8) and byte & 0xC0 == 0x80

    # --- echo ---------------------------------------------------------------------------------------------------------

    def begin_line(self) -> None:
        """A line that is typed begins at the cursor."""
        self._later(self._begin_line)

    def echo(self, byte: int) -> None:
        """What is typed: a control character so that it is seen."""
        if self.settings.lflag & termios.ECHOCTL and is_control(byte) and byte != TAB:
            self._later(self._show_control, byte)
        else:
            self.echo_raw(byte)

    def echo_raw(self, *data: int) -> None:
        for byte in data:
            self._later(self._show, byte)

    def echo_before_tab(self, columns: int, *, of_line: bool) -> None:
        """Back to where the cursor was in front of a tab, so many columns behind the one before it, or (``of_line``)
        behind the beginning of the line."""
        self._later(self._show_before_tab, columns % _TAB_COLUMNS, of_line)

    def back(self) -> None:
        """The cursor has moved."""
        self._later(self._move_back)

    def settle(self) -> None:
        """What was typed at once has been looked at."""
        while self._echo and not self.stopped:
            do, arguments = self._echo.popleft()
            do(*arguments)

    def _later(self, do: Callable[..., None], *arguments: int) -> None:
        self._echo.append((do, arguments))
        if len(self._echo) >= _ECHO_BLOCK:
            self.settle()

    # --- as data ------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """Without its settings, which are the terminal's."""
        return {"shown": bytes(self.shown), "stopped": [self.stopped, self._by_call],
                "echo": [[do.__name__, *map(int, arguments)] for do, arguments in self._echo],
                "columns": [self._column, self._first_column]}

    def load(self, saved: dict[str, Any]) -> None:
        self.shown[:] = saved["shown"]
        self.stopped, self._by_call = saved["stopped"]
        kinds = {each.__name__: each for each in (self._begin_line, self._show, self._show_control,
                                                  self._show_before_tab, self._move_back)}
        self._echo.clear()
        self._echo.extend((kinds[name], tuple(arguments)) for name, *arguments in saved["echo"])
        self._column, self._first_column = saved["columns"]

    # --- what echo does -----------------------------------------------------------------------------------------------

    def _begin_line(self) -> None:
        self._first_column = self._column

    def _show(self, byte: int) -> None:
        if byte == _ESCAPED:
            self.shown.append(byte)
            self._column += 1
        elif self.settings.oflag & termios.OPOST:
            self.shown += self._processed(byte)
        else:
            self.shown.append(byte)

    def _show_control(self, byte: int) -> None:
        self.shown += bytes((ord("^"), byte ^ 0x40))
        self._column += 2

    def _show_before_tab(self, columns: int, of_line: int) -> None:
        if of_line:
            columns += self._first_column
        for _ in range(_TAB_COLUMNS - columns % _TAB_COLUMNS):
            self.shown.append(_BACKSPACE)
            self._move_back()

    def _move_back(self) -> None:
        self._column = max(0, self._column - 1)
