"""What a person sees: commands run on a terminal of a given width, and tables read back from their frames."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

__all__ = ["Terminal", "on_a_terminal", "read_tables"]

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_FRAME = "┃│"


class Terminal:
    """``vmm ARGUMENTS`` whose standard streams are a terminal so wide. ``text`` is what has been shown there,
    without colours and cursor movements; ``raw`` with them. ``variables``: of its environment."""

    def __init__(self, *arguments: str, columns: int, rows: int = 40, **variables: str) -> None:
        self._controller, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.raw = b""
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vmm", *arguments], stdin=terminal, stdout=terminal, stderr=terminal,
                env=environment | {"TERM": "xterm-256color", **variables})
        finally:
            os.close(terminal)

    @property
    def text(self) -> str:
        return _ESCAPE.sub("", self.raw.decode(errors="replace")).replace("\r\n", "\n")

    @property
    def colours(self) -> set[int]:
        """Those that were asked for: 30 to 37, 90 to 97 (ECMA-48, SGR)."""
        codes = re.findall(rb"\x1b\[([0-9;]*)m", self.raw)
        return {int(each) for code in codes for each in code.split(b";") if re.fullmatch(rb"[39][0-7]", each)}

    @property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    def type(self, text: str) -> None:
        """As if somebody typed it."""
        os.write(self._controller, text.encode())

    def wait_for(self, what: str, times: int = 1, seconds: float = 60.0) -> None:
        """Until this was shown so many times."""
        deadline = time.monotonic() + seconds
        while self.text.count(what) < times:
            assert self._read(deadline), f"ended without {what!r}: {self.text}"

    def wait(self, seconds: float = 60.0) -> int:
        """Until the last process that has the terminal has gone; the exit status."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        return self.process.wait(seconds)

    def read_for(self, seconds: float) -> None:
        """All that is shown within so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._controller], [], [], left)[0]:
                self.raw += os.read(self._controller, 65536)

    def _read(self, deadline: float) -> bool:
        """Something more of what is shown; False: nobody has the terminal any more."""
        ready, _, _ = select.select([self._controller], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"not in time: {self.text}"
        try:
            data = os.read(self._controller, 65536)
        except OSError:     # EIO: nobody has the other end
            return False
        self.raw += data
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._controller)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def on_a_terminal(*arguments: str, columns: int) -> str:
    """What a verb that succeeds shows there. No line is longer than the terminal is wide."""
    with Terminal(*arguments, columns=columns) as terminal:
        assert terminal.wait() == 0, terminal.text
        assert max(map(len, terminal.lines)) <= columns, terminal.text
        return terminal.text


def read_tables(text: str, key: str = "") -> dict[str, dict[str, str]]:
    """{what stands in column ``key``, or else in the first: {column: cell}} of all tables in ``text``. What was
    broken over several lines, or over several tables of the same rows, is put together again."""
    rows: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    row: dict[str, str] = {}
    for line in text.splitlines():
        line = line.strip()
        if line[:1] == "┃":
            columns = [cell.strip() for cell in line.strip(_FRAME).split("┃")]
        elif line[:1] == "│":
            cells = [cell.strip() for cell in line.strip(_FRAME).split("│")]
            assert len(cells) == len(columns), line
            name = cells[columns.index(key) if key else 0]
            if name:
                row = rows.setdefault(name, {})
                row.update(dict.fromkeys(columns, ""))
            for column, cell in zip(columns, cells, strict=True):
                row[column] = f"{row[column]} {cell}".strip()
    return rows
