"""How figures look. On a page they have the page's own ink on its own ground, so that they can be read by day, by
night and in print; on paper they are black on white, with the letters as outlines.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), which people tell apart however they see colours,
but for black and yellow, which are lost on one of the two grounds; and no line is told from another by its colour
alone.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from ... import optional
from ...errors import VmmError, one_line
from .document import Figure

__all__ = ["COLOURS", "Format", "area", "bars", "colour", "drawn", "heat_colours", "inline_svg"]

Format = Literal["svg", "png"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), (0, (5, 1)))
_HATCHES = ("", "//", "..", "xx")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")     # more than colours: the seventh is no first
_INK = "#010203"        # stands for the page's own colour of text until the drawing is text
_FAINTEST = 0.15        # of the colours' scale, from white
_DECADES = 1e3          # below which a logarithmic axis has more ticks than one for each
_DPI = 300              # of a PNG for a paper


def colour(number: int) -> dict[str, Any]:
    """Of line ``number``: its colour, and how it is drawn."""
    at = number % len(COLOURS)
    return {"color": COLOURS[at], "linestyle": _LINES[at], "marker": _MARKERS[number % len(_MARKERS)]}


def area(number: int) -> dict[str, Any]:
    """Of area ``number``, of at most four: its colour, and a hatch that tells it without."""
    return {"facecolor": COLOURS[number], "hatch": _HATCHES[number], "edgecolor": "white"}


def heat_colours() -> Any:
    """Of the cells of a heat map: told apart by lightness, too, and all of them from a white ground. (A page inverts
    lightness by night, when the ground is dark.) Raises MissingPackage."""
    return optional.matplotlib_colors().ListedColormap(
        optional.matplotlib().colormaps["cividis_r"](np.linspace(_FAINTEST, 1.0, 256)))


def bars(axes: Any, labels: Sequence[str], parts: Sequence[tuple[str, Sequence[float]]]) -> None:
    """Bars to the right, one below the other, of parts that add up."""
    left = [0.0] * len(labels)
    for number, (name, values) in enumerate(parts):
        axes.barh(labels, values, left=left, label=name, linewidth=0.4, height=0.7, **area(number))
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


@contextlib.contextmanager
def _style(ink: str, ground: str, key: str, letters: str) -> Iterator[None]:
    matplotlib = optional.matplotlib()
    with matplotlib.rc_context({
            "font.size": 9, "font.family": "sans-serif", "text.color": ink, "axes.edgecolor": ink,
            "axes.labelcolor": ink, "axes.titlesize": 9, "axes.titlelocation": "left", "xtick.color": ink,
            "ytick.color": ink, "grid.color": ink, "grid.alpha": 0.15, "grid.linewidth": 0.6, "axes.grid": True,
            "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": ground,
            "axes.facecolor": ground, "savefig.facecolor": ground, "legend.frameon": False,
            "legend.fontsize": 8, "lines.linewidth": 1.5, "lines.markersize": 4, "svg.fonttype": letters,
            "svg.hashsalt": key, "hatch.linewidth": 0.5,
            "axes.prop_cycle": matplotlib.cycler(color=COLOURS, linestyle=_LINES)}):
        yield


def drawn(figure: Figure, kind: Format) -> bytes:
    """A file for a paper. Raises MissingPackage, and VmmError for numbers that cannot be drawn."""
    with _style("black", "white", figure.key, "path"):
        return _saved(figure, kind)


def inline_svg(figure: Figure) -> str:
    """An SVG element for a page, which needs nothing from elsewhere. Raises what ``drawn`` does."""
    with _style(_INK, "none", figure.key, "none"):
        text = _saved(figure, "svg").decode()
    text = text[text.index("<svg"):].replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # matplotlib numbers what is in each figure from 1, and an id is to be there once in a page: only those stay that
    # something refers to, which are made of the figure's key.
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"',
                  r"<svg \1\2\3", text, count=1)


def _number(axis: Any) -> None:
    """Ticks in digits: 25,000 and 0.1, not 2.5e4 and 10 to the -1."""
    ticker = optional.matplotlib_ticker()
    scale = axis.get_scale()
    if not isinstance(axis.get_major_formatter(), ticker.ScalarFormatter | ticker.LogFormatter):
        return      # they are names
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, place: f"{value:,.10g}"))
    if scale == "log":
        low, high = axis.get_view_interval()
        if low > 0 and high / low < _DECADES:
            axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_formatter(ticker.NullFormatter())


def _saved(figure: Figure, kind: Format) -> bytes:
    made = optional.figure(figsize=figure.size, layout="constrained")
    out = io.BytesIO()
    try:
        figure.draw(made)
        for axes in made.axes:
            _number(axes.xaxis)
            _number(axes.yaxis)
        made.savefig(out, format=kind, dpi=_DPI if kind == "png" else 150,
                     metadata={"Date": None, "Creator": None} if kind == "svg" else {"Software": None})
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as exc:
        raise VmmError(f"{figure.title}: cannot be drawn with these numbers ({type(exc).__name__}: "
                       f"{one_line(str(exc))})") from None
    return out.getvalue()
