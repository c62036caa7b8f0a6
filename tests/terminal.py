"""What a person sees: commands run on a terminal of a given width, and tables read back from their frames."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator

__all__ = ["Seen", "on_a_terminal", "read_tables"]

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_FRAME = "┃│"


class Seen:
    """``returncode``, and the text on the screen without colours and cursor movements."""

    def __init__(self, returncode: int, raw: str) -> None:
        self.returncode = returncode
        self.text = _ESCAPE.sub("", raw).replace("\r\n", "\n")

    @property
    def lines(self) -> list[str]:
        return self.text.split("\n")


def on_a_terminal(*arguments: str, columns: int, timeout: float = 60.0) -> Seen:
    """``vmm ARGUMENTS`` whose standard streams are a terminal so wide."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    try:
        process = subprocess.Popen([sys.executable, "-m", "vmm", *arguments], stdin=terminal, stdout=terminal,
                                   stderr=terminal, env=environment | {"TERM": "xterm-256color"})
    finally:
        os.close(terminal)
    try:
        raw = b"".join(_chunks(controller))
        return Seen(process.wait(timeout), raw.decode())
    finally:
        os.close(controller)
        if process.poll() is None:
            process.kill()
            process.wait()


def _chunks(fd: int) -> Iterator[bytes]:
    """Until the last process that has the terminal has gone. (pytest-timeout ends a wait for one that stays.)"""
    while True:
        try:
            data = os.read(fd, 65536)
        except OSError:     # EIO: nobody has the other end
            return
        if not data:
            return
        yield data


def read_tables(text: str) -> dict[str, dict[str, str]]:
    """{what a row begins with: {column: cell}} of all tables in ``text``. What was broken over several lines, or
    over several tables of the same rows, is put together again."""
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
            if cells[0]:
                row = rows.setdefault(cells[0], {})
                row.update(dict.fromkeys(columns, ""))
            for column, cell in zip(columns, cells, strict=True):
                row[column] = f"{row[column]} {cell}".strip()
    return rows
