"""A grid of predictions, each a point by itself: here, or on the nodes of a Ray cluster."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import closing
from functools import partial

from ..consumers.predict.grid import Cell, Study
from .cluster.points import Needs, run_points

__all__ = ["predict_grid"]

_Point = tuple[float, float]        # bandwidth, downtime limit


def predict_grid(study: Study, bandwidths: list[float], downtimes: list[float], *, cluster: str | None = None,
                 progress: Callable[[], None] = lambda: None) -> list[Cell]:
    """Every bandwidth (bytes per second) with every limit (seconds), in this order. ``cluster``: the address of a Ray
    cluster, of whose nodes each point takes one core; None: here, one after the other. ``progress`` is called after
    each. Raises VmmError."""
    points = list(itertools.product(bandwidths, downtimes))
    found: dict[_Point, Cell] = {}
    with closing(run_points(points, partial(_cell, study), address=cluster,
                            needs=lambda point: Needs(whole=False))) as cells:
        for point, cell in cells:
            found[point] = cell
            progress()
    return [found[point] for point in points]


def _cell(study: Study, point: _Point, stop: Callable[[], bool], progress: Callable[[str], None]) -> Cell:
    return study.cell(*point)
