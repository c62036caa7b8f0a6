"""The grid as a picture: total time and downtime against the bandwidth, a line for each downtime limit."""

from __future__ import annotations

import io
from collections.abc import Sequence

from ... import optional
from .grid import Cell

__all__ = ["draw"]

_MARKS = ("o", "s", "^", "D", "v", "P")     # lines are told by their marks, not by colour alone


def draw(cells: Sequence[Cell], title: str) -> bytes:
    """A PNG. Raises MissingPackage without matplotlib."""
    figure = optional.figure(figsize=(8.5, 4), layout="constrained")
    figure.suptitle(title)
    for axes, name, label in zip(figure.subplots(1, 2), ("total", "downtime"), ("total time (s)", "downtime (ms)"),
                                 strict=True):
        scale = 1000 if name == "downtime" else 1
        for mark, limit in zip(_MARKS * len(cells), sorted({cell.downtime for cell in cells}), strict=False):
            line = [cell for cell in cells if cell.downtime == limit and cell.bandwidth]
            axes.plot([cell.bandwidth * 8 / 1e9 for cell in line],
                      [getattr(cell.found, name) * scale for cell in line],
                      marker=mark, label=f"limit {limit * 1000:g} ms")
        axes.set(xscale="log", xlabel="bandwidth (Gbit/s)", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    out = io.BytesIO()
    figure.savefig(out, dpi=110, format="png")
    return out.getvalue()
