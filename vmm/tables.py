"""Tables, sizes and numbers for a person. Nothing is cut, however narrow the terminal: a table of which not every
column fits is printed in parts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

from ipc.shm import PAGE_SIZE

__all__ = ["digits_text", "print_table", "screen", "size_text", "table"]

_PLAIN_WIDTH = 120
_FRAME = 3                  # characters of a column besides its text: a line, a blank at each side


def screen() -> Console:
    """Standard output; where it is not a terminal as wide as $COLUMNS says, else wide enough for a table."""
    console = Console(highlight=False)
    if not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit():
        console.width = _PLAIN_WIDTH
    return console


def table(*columns: str, numbers: Sequence[str] = (), texts: Sequence[str] = (), title: str | None = None) -> Table:
    """A table of these columns, then ``numbers``, then ``texts``. Only texts may be broken over several lines."""
    made = Table(title=title, title_justify="left")
    for name in columns:
        made.add_column(name, no_wrap=True)
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    for name in texts:
        made.add_column(name, overflow="fold")
    return made


def print_table(whole: Table, console: Console, keys: int = 1) -> None:
    """Print a table so that nothing in it is cut: where the console is too narrow for all of its columns, in parts
    one below the other, each of them with the first ``keys`` columns."""
    for part in _parts(whole, console, keys):
        console.print(part)


def _parts(whole: Table, console: Console, keys: int) -> list[Table]:
    widths = [_least_width(column, console) for column in whole.columns]
    room = console.width - 1        # the last line of the frame
    if sum(widths) <= room:
        return [whole]
    groups: list[list[int]] = [[]]
    for at in range(keys, len(widths)):
        if groups[-1] and sum(widths[i] for i in (*range(keys), *groups[-1], at)) > room:
            groups.append([])
        groups[-1].append(at)
    return [_some_columns(whole, [*range(keys), *group], whole.title if not number else None)
            for number, group in enumerate(groups)]


def _least_width(column: Column, console: Console) -> int:
    """What a column takes if nothing in it is cut: its longest line, or (of a text) its longest word."""
    unlimited = console.options.update(width=1 << 16)
    found = [Measurement.get(console, unlimited, cell) for cell in (column.header, *column.cells)]
    return max(m.maximum if column.no_wrap else m.minimum for m in found) + _FRAME


def _some_columns(whole: Table, chosen: list[int], title: Any) -> Table:
    part = Table(title=title, title_justify="left")
    for at in chosen:
        column = whole.columns[at]
        part.add_column(column.header, justify=column.justify, no_wrap=column.no_wrap, overflow=column.overflow)
    for row in zip(*(whole.columns[at].cells for at in chosen), strict=True):
        part.add_row(*row)
    return part


def size_text(size: int) -> str:
    """``64 MiB`` where it is whole, else exact bytes with the next unit: ``64 MiB + 3 pages``."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            rest = size % unit
            if rest % PAGE_SIZE:
                break
            return f"{size // unit} {name}" + (f" + {rest // PAGE_SIZE} pages" if rest else "")
    return f"{size} B"


def digits_text(number: float, digits: int = 3) -> str:
    """``12.3``, ``1,230``: rounded to so many digits, and never with an exponent."""
    return f"{Decimal(f'{number:.{digits}g}'):,f}"
