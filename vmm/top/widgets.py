"""Parts of the screen, each of which draws no more than what changes: a line is what a slow terminal waits for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from rich.segment import Segment
from rich.style import Style
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Sparkline, Static

from .text import Column

__all__ = ["Graph", "Line", "Rows"]

_HISTORY = 512          # samples: more columns than a terminal has


class Line(Static):
    """Text that is drawn when it changes."""

    def __init__(self, name: str, shown: str = "") -> None:
        super().__init__(shown, id=name, markup=False)
        self.shown = shown

    def show(self, shown: str) -> None:
        """From now on."""
        if shown != self.shown:
            self.shown = shown
            self.update(shown)


class _Bars(Sparkline):
    """In the colour of text, said once a line."""

    def render_line(self, y: int) -> Strip:
        """As Textual's own, of which the colours tell the heights once more."""
        return Strip([Segment(super().render_line(y).text, self.rich_style)])


class Graph(Vertical):
    """What something is now, and how it was: the newest at the right. ``form`` makes text of a value."""

    def __init__(self, name: str, title: str, form: Callable[[float], str]) -> None:
        super().__init__(id=name)
        self._title = title
        self._form = form
        self._values: deque[float] = deque(maxlen=_HISTORY)
        self.now = Line(f"{name}-now", title)
        self.bars = _Bars([])

    def compose(self) -> ComposeResult:
        """The parts of the graph."""
        yield self.now
        yield self.bars

    def add(self, value: float | None, unknown: str = "-", *, title: str = "") -> None:
        """One more sample. ``unknown``: what None means. ``title``: what this one is, if it is something else."""
        self._values.append(value or 0.0)
        self._draw()
        text = f"{title or self._title} {unknown if value is None else self._form(value)}"
        most = f" (most {self._form(max(self.bars.data or [0.0]))})"
        self.now.show(text + (most if value is not None and len(text + most) <= self.size.width else ""))

    def _draw(self) -> None:
        """One column a sample. The first column is always 0: heights are from the least to the greatest."""
        room = max(2, self.bars.size.width)
        values = list(self._values)[1 - room:]
        self.bars.data = [0.0] * (room - len(values)) + values

    def on_resize(self) -> None:
        """There is room for more, or less."""
        self._draw()


class Rows(ScrollView, can_focus=True):
    """A table of text. Its first line stays where it is when the others are scrolled."""

    def __init__(self, name: str, columns: Sequence[Column]) -> None:
        super().__init__(id=name)
        self._columns = columns
        self._head = self._line([column.label for column in columns])
        #: The other lines, as they are shown.
        self.lines: list[str] = []
        self.virtual_size = Size(len(self._head), 1)

    def _line(self, cells: Sequence[str]) -> str:
        return "".join(column.padded(cell) for column, cell in zip(self._columns, cells, strict=True))

    def show(self, rows: Sequence[Sequence[str]]) -> None:
        """Their cells, from now on."""
        before, self.lines = self.lines, [self._line(cells) for cells in rows]
        if len(before) != len(self.lines):
            self.virtual_size = Size(len(self._head), 1 + len(self.lines))
            self.refresh(layout=True)
            return
        for number, (old, new) in enumerate(zip(before, self.lines, strict=True)):
            if old != new and number >= self.scroll_offset.y:
                self.refresh_line(1 + number)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Lines, where the height is not given."""
        return 1 + len(self.lines)

    def render_line(self, y: int) -> Strip:
        """One line of what can be seen."""
        left, number = self.scroll_offset.x, self.scroll_offset.y + y - 1
        style = self.rich_style
        text = self.lines[number] if y > 0 and number < len(self.lines) else ""
        if y == 0:
            text, style = self._head, style + Style(bold=True)
        return Strip([Segment(text, style)]).crop_extend(left, left + self.size.width, style)
