"""The terminal of the process that follows a program: raw while it does, and how to leave it."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import tty
from types import TracebackType

__all__ = ["Escape", "RawTerminal", "in_foreground", "size_of"]

_ESCAPE, _LEAVE = 0x1D, ord("q")        # Ctrl-]


class RawTerminal:
    """What is typed is given at once and as it is, until the end of the ``with``."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> RawTerminal:
        """Raises OSError."""
        try:
            self._before = termios.tcgetattr(self._fd)
            tty.setraw(self._fd, termios.TCSADRAIN)     # what was typed until now is typed
        except termios.error as error:
            raise OSError(*error.args) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)      # also from the background
        try:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
        finally:
            signal.signal(signal.SIGTTOU, before)


class Escape:
    """Ctrl-] and then q leaves; Ctrl-] and anything else is what it is."""

    def __init__(self) -> None:
        self._begun = False

    def passed(self, data: bytes) -> tuple[bytes, bool]:
        """What goes on of what was typed, and whether that was the way out."""
        found = bytearray()
        for byte in data:
            if self._begun and byte == _LEAVE:
                return bytes(found), True
            if self._begun:
                found.append(_ESCAPE)
            self._begun = byte == _ESCAPE and not self._begun
            if not self._begun:
                found.append(byte)
        return bytes(found), False


def in_foreground(fd: int) -> bool:
    """This process may read from the terminal, as nobody there stops it for that."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:     # it is not the one that controls it
        return True


def size_of(fd: int) -> tuple[int, int]:
    """Rows and columns; zeros where it does not say."""
    try:
        columns, rows = os.get_terminal_size(fd)
    except OSError:
        return 0, 0
    return rows, columns
