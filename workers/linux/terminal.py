"""A terminal without a screen: what is typed is edited, echoed, or makes signals, and is read by lines or as it comes;
what is written is made ready to be shown. It does what Linux's does (drivers/tty/n_tty.c), to the byte.

Data only. Who has it puts in what was typed, and takes what is to be shown and which signals are to be sent::

    typed ──> edit, echo ──> lines or bytes ──> read
                 │
    shown <──────┴──── made ready for a screen <── write
"""

from __future__ import annotations

import signal
import termios
from collections import deque
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

from .screen import NEWLINE, RETURN, TAB, Screen, is_control
from .settings import Settings

__all__ = ["Tty"]

_SIZE = 4096                    # bytes that are typed and not read
_TENTH = 10**8                  # nanoseconds of a unit of VTIME

_SIGNALS = ((termios.VINTR, signal.SIGINT), (termios.VQUIT, signal.SIGQUIT), (termios.VSUSP, signal.SIGTSTP))
_RUB_OUT = b"\b \b"


def _is_of_word(byte: int) -> bool:
    """Letters of Latin-1 are; so are, by that, most first bytes of UTF-8."""
    return (byte < 0x80 and (chr(byte).isalnum() or byte == 0x5F)) or (byte >= 0xC0 and byte not in (0xD7, 0xF7))


class Tty:
    """``signals``: those for ``group``, for others to take away, as is what ``screen`` has.
    ``session``: of the processes that it controls; ``group``: of those, the ones in the foreground (0: none)."""

    def __init__(self, settings: Settings | None = None, *, session: int = 0, group: int = 0) -> None:
        self.session, self.group = session, group
        self.rows = self.columns = self.width = self.height = 0
        self.signals: list[int] = []
        self.hung_up = False            # whoever typed has gone
        self._input = bytearray()       # what was typed and has not been read, of which
        self._whole = 0                 # so many bytes are whole lines,
        self._ends: deque[int] = deque()    # and these end one (places since the first byte); a zero: ^D
        self._read = 0                  # bytes that have been read
        self._moment = 0                # when the last byte came
        self._literal = False           # the next byte is what it is: ^V
        self._erasing = False           # between \ and /
        self.settings = settings or Settings()
        self.screen = Screen(self.settings)
        self._prepare()

    # --- settings -----------------------------------------------------------------------------------------------------

    def set(self, settings: Settings) -> None:
        """Also how what has been typed already is read."""
        before, self.settings = self.settings, settings
        self.screen.settings = settings
        if (before.lflag ^ settings.lflag) & termios.ICANON:
            self._ends.clear()
            self._erasing = self._literal = False
            self._whole = 0
            if settings.lflag & termios.ICANON and self._input:
                self._whole = len(self._input)
                self._ends.append(self._read + self._whole - 1)
        if before.iflag & ~settings.iflag & termios.IXON:
            self.screen.start()
        self._prepare()

    def _prepare(self) -> None:
        """What is looked at for each byte."""
        settings, characters = self.settings, self.settings.characters
        iflag, lflag = settings.iflag, settings.lflag
        self._lines, self._echoes = bool(lflag & termios.ICANON), bool(lflag & termios.ECHO)
        extended = bool(lflag & termios.IEXTEN)
        special: dict[int, Callable[[int], None]] = {}
        # What comes first here gives way to what comes later.
        if iflag & (termios.IGNCR | termios.ICRNL):
            special[RETURN] = self._typed_return
        if iflag & termios.INLCR:
            special[NEWLINE] = self._typed_newline
        if self._lines:
            for byte in (NEWLINE, *(characters[at] for at in self._of_lines(extended))):
                special.setdefault(byte, self._typed_in_line)
        if lflag & termios.ISIG:
            for at, _ in reversed(_SIGNALS):
                special[characters[at]] = self._typed_signal
        if iflag & termios.IXON:
            special[characters[termios.VSTOP]] = self._typed_stop
            special[characters[termios.VSTART]] = self._typed_start
        special.pop(0, None)        # that is: none
        self._special = special

    def _of_lines(self, extended: bool) -> list[int]:
        of = [termios.VERASE, termios.VKILL, termios.VEOF, termios.VEOL]
        if extended:
            of += [termios.VWERASE, termios.VLNEXT, termios.VEOL2]
            if self._echoes:
                of.append(termios.VREPRINT)
        return of

    def _is(self, byte: int, at: int, *, extended: bool = False) -> bool:
        """It is that control character."""
        return byte == self.settings.characters[at] and (not extended or bool(self.settings.lflag & termios.IEXTEN))

    def resize(self, rows: int, columns: int, width: int = 0, height: int = 0) -> None:
        """Those in the foreground are told. ``width`` and ``height``: in pixels."""
        before = self.rows, self.columns, self.width, self.height
        self.rows, self.columns, self.width, self.height = rows, columns, width, height
        if before != (rows, columns, width, height):
            self.signals.append(signal.SIGWINCH)

    def hang_up(self) -> None:
        """Nobody types, and nobody sees it, any more."""
        if not self.hung_up:
            self.hung_up = True
            self.signals += [signal.SIGHUP, signal.SIGCONT]

    # --- what is typed ------------------------------------------------------------------------------------------------

    def type(self, data: bytes, now: int) -> int:
        """How many bytes were taken: there is no more room. A line that is too long loses its last ones instead.
        ``now``: nanoseconds, of the clock that `due` is asked by."""
        at = 0
        while at < len(data):
            room = _SIZE - 1 - len(self._input)
            if room <= 0:
                if not self._lines or self._whole:
                    break
                if room < 0:
                    self._input.pop()
                room = 1
            for byte in data[at:at + room]:
                self._type(byte)
            at += room
        self.screen.settle()
        self._moment = now
        return min(at, len(data))

    def _type(self, byte: int) -> None:
        if self.settings.iflag & termios.ISTRIP:
            byte &= 0x7F
        if self._literal:
            self._literal = False
            self._typed_plain(byte)
            return
        self._special.get(byte, self._typed_plain)(byte)

    def _typed_plain(self, byte: int) -> None:
        self._start_by_any()
        self._echo_typed(byte)
        self._input.append(byte)

    def _typed_return(self, byte: int) -> None:
        self._start_by_any()
        if not self.settings.iflag & termios.IGNCR:
            self._typed_translated(NEWLINE)

    def _typed_newline(self, byte: int) -> None:
        self._start_by_any()
        self._typed_translated(RETURN)

    def _typed_translated(self, byte: int) -> None:
        if self._lines and self._edit(byte):
            return
        self._echo_typed(byte, newline=True)
        self._input.append(byte)

    def _typed_in_line(self, byte: int) -> None:
        self._start_by_any()
        if not self._edit(byte):
            self._echo_typed(byte, newline=True)
            self._input.append(byte)

    def _typed_signal(self, byte: int) -> None:
        number = next(number for at, number in _SIGNALS if self._is(byte, at))
        self.signals.append(number)
        if not self.settings.lflag & termios.NOFLSH:
            self.screen.clear()
            self.flush()
        if self.settings.iflag & termios.IXON:
            self.screen.start()
        if self._echoes:
            self.screen.echo(byte)

    def _typed_stop(self, byte: int) -> None:
        self.screen.stop()

    def _typed_start(self, byte: int) -> None:
        self.screen.start()

    def _start_by_any(self) -> None:
        if self.screen.stopped and self.settings.iflag & termios.IXON and self.settings.iflag & termios.IXANY:
            self.screen.start()

    def _echo_typed(self, byte: int, *, newline: bool = False) -> None:
        """``newline``: one is not a control character here."""
        if not self._echoes:
            return
        self._end_erasing()
        if newline and byte == NEWLINE:
            self.screen.echo_raw(byte)
            return
        self._mark_line()
        self.screen.echo(byte)

    def _end_erasing(self) -> None:
        if self._erasing:
            self.screen.echo_raw(*b"/")
            self._erasing = False

    def _mark_line(self) -> None:
        """Where it begins, before its first byte."""
        if self._whole == len(self._input):
            self.screen.begin_line()

    # --- editing a line -----------------------------------------------------------------------------------------------

    def _edit(self, byte: int) -> bool:
        """Whether it edits or ends the line."""
        lflag = self.settings.lflag
        if self._is(byte, termios.VERASE) or self._is(byte, termios.VKILL) or self._is(byte, termios.VWERASE,
                                                                                         extended=True):
            self._erase(byte)
        elif self._is(byte, termios.VLNEXT, extended=True):
            self._literal = True
            if self._echoes:
                self._end_erasing()
                if lflag & termios.ECHOCTL:
                    self.screen.echo_raw(*b"^\b")
        elif self._is(byte, termios.VREPRINT, extended=True) and self._echoes:
            self._end_erasing()
            self.screen.echo(byte)
            self.screen.echo_raw(NEWLINE)
            for each in self._input[self._whole:]:
                self.screen.echo(each)
        elif byte == NEWLINE:
            if lflag & (termios.ECHO | termios.ECHONL):
                self.screen.echo_raw(byte)
            self._end_line(byte)
        elif self._is(byte, termios.VEOF):
            self._end_line(0)
        elif self._is(byte, termios.VEOL) or self._is(byte, termios.VEOL2, extended=True):
            if self._echoes:
                self._mark_line()
                self.screen.echo(byte)
            self._end_line(byte)
        else:
            return False
        return True

    def _end_line(self, byte: int) -> None:
        self._ends.append(self._read + len(self._input))
        self._input.append(byte)
        self._whole = len(self._input)

    def _erase(self, byte: int) -> None:
        """A character, a word, or the line."""
        lflag = self.settings.lflag
        if len(self._input) == self._whole:
            return
        one = self._is(byte, termios.VERASE)
        word = not one and self._is(byte, termios.VWERASE)
        if not one and not word and not (self._echoes and lflag & termios.ECHOK and lflag & termios.ECHOKE
                                         and lflag & termios.ECHOE):
            del self._input[self._whole:]
            if self._echoes:
                self._end_erasing()
                self.screen.echo(self.settings.characters[termios.VKILL])
                if lflag & termios.ECHOK:
                    self.screen.echo_raw(NEWLINE)
            return
        in_word = False
        while len(self._input) > self._whole:
            at = self._start_of_character()
            first = self._input[at]
            if self.screen.continues(first):      # in the middle of one, which begins in a line that is over
                break
            if word:
                if _is_of_word(first):
                    in_word = True
                elif in_word:
                    break
            erased = bytes(self._input[at:])
            del self._input[at:]
            if self._echoes:
                self._echo_erased(erased, one)
            if one:
                break
        if len(self._input) == self._whole and self._echoes:
            self._end_erasing()

    def _start_of_character(self) -> int:
        at = len(self._input) - 1
        while self.screen.continues(self._input[at]) and at > self._whole:
            at -= 1
        return at

    def _echo_erased(self, erased: bytes, one: bool) -> None:
        lflag, first = self.settings.lflag, erased[0]
        if lflag & termios.ECHOPRT:
            if not self._erasing:
                self.screen.echo_raw(*b"\\")
                self._erasing = True
            self.screen.echo(first)
            for byte in erased[1:]:
                self.screen.echo_raw(byte)
                self.screen.back()
        elif one and not lflag & termios.ECHOE:
            self.screen.echo(self.settings.characters[termios.VERASE])
        elif first == TAB:
            self._echo_erased_tab()
        else:
            times = 2 if is_control(first) else 1
            if not is_control(first) or lflag & termios.ECHOCTL:
                self.screen.echo_raw(*_RUB_OUT * times)

    def _echo_erased_tab(self) -> None:
        """Back to where the cursor was in front of it."""
        before = self._input[self._whole:]
        tab = before.rfind(b"\t")
        width = 0
        for byte in before[tab + 1:]:
            if is_control(byte):
                width += 2 if self.settings.lflag & termios.ECHOCTL else 0
            elif not self.screen.continues(byte):
                width += 1
        self.screen.echo_before_tab(width, of_line=tab < 0)

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def readable(self) -> int:
        """Bytes, as FIONREAD has it."""
        if not self._lines:
            return len(self._input)
        return self._whole - sum(not self._input[at - self._read] for at in self._ends)

    def is_ready(self) -> bool:
        """As poll(2) sees it."""
        if self._lines:
            return self._whole > 0 or self.hung_up
        least, tenths = self._minimum()
        return len(self._input) >= (least if least and not tenths else 1) or self.hung_up

    def _minimum(self) -> tuple[int, int]:
        """(VMIN, VTIME)"""
        return self.settings.characters[termios.VMIN], self.settings.characters[termios.VTIME]

    def due(self, count: int, until: int | None, now: int) -> int | None:
        """When a read of so many bytes ends if nothing more is typed; not after ``now``: it need not wait. None: never.
        ``until``: what this has said when the same read asked before."""
        if self.hung_up:
            return now
        if self._lines:
            return now if self._whole else None
        least, tenths = self._minimum()
        there = len(self._input)
        if not least:
            return now if there or not tenths else until or now + tenths * _TENTH
        if there >= min(least, count):
            return now
        if not there or not tenths:
            return None
        return max(until or now + tenths * _TENTH, self._moment + tenths * _TENTH)

    def read(self, count: int) -> bytes:
        """What is there: of a line its rest at most. Empty: nothing, or an end."""
        if not self._lines:
            return self._take(count)
        if not self._whole or not count:
            return b""
        end = self._ends[0] - self._read
        if end < count:
            self._ends.popleft()
            found = self._take(end + 1)
            return found if found[-1] else found[:-1]
        found = self._take(count)
        if end == count and not self._input[0]:     # the reader had all of it before
            self._ends.popleft()
            self._take(1)
        return found

    def _take(self, count: int) -> bytes:
        found = bytes(self._input[:count])
        del self._input[:count]
        self._read += len(found)
        self._whole = max(0, self._whole - len(found))
        return found

    def flush(self) -> None:
        """What was typed and has not been read is forgotten."""
        self._read += len(self._input)
        self._input.clear()
        self._ends.clear()
        self._whole = 0
        self._erasing = False

    # --- output -------------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> int:
        """How many bytes were taken: none while it is stopped."""
        return self.screen.write(data)

    def take_shown(self) -> bytes:
        """What is to be shown now."""
        found = bytes(self.screen.shown)
        self.screen.shown.clear()
        return found

    # --- as data ------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        return {"settings": list(astuple(self.settings)), "session": self.session, "group": self.group,
                "size": [self.rows, self.columns, self.width, self.height], "signals": list(map(int, self.signals)),
                "hung_up": self.hung_up, "input": bytes(self._input), "whole": self._whole, "ends": list(self._ends),
                "read": self._read, "moment": self._moment, "is": [self._literal, self._erasing],
                "screen": self.screen.save()}

    def load(self, saved: dict[str, Any]) -> None:
        self.settings = self.screen.settings = Settings(*saved["settings"])
        self.session, self.group, self.hung_up = saved["session"], saved["group"], saved["hung_up"]
        self.rows, self.columns, self.width, self.height = saved["size"]
        self.signals = list(saved["signals"])
        self._input, self._whole, self._ends = bytearray(saved["input"]), saved["whole"], deque(saved["ends"])
        self._read, self._moment = saved["read"], saved["moment"]
        self._literal, self._erasing = saved["is"]
        self.screen.load(saved["screen"])
        self._prepare()
