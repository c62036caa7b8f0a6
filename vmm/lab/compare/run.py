"""From a comparison's points to what was measured at each: here, or on the nodes of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from ..cluster.points import Needs, run_points
from .measure import Point, Settings, run_point

__all__ = ["key_of", "run"]

#: A machine of the grid, and the modes that are compared in it.
Chosen = tuple[Point, tuple[str, ...]]


def key_of(point: Point, modes: Sequence[str]) -> str:
    """Of ``points`` in what is kept."""
    return f"{point.label}: {', '.join(modes)}"


def run(points: Sequence[Chosen], settings: Settings, kept: dict[str, Any], *, cluster: str | None = None,
        done: Callable[[int], None] = lambda number: None,
        progress: Callable[[str], None] = lambda text: None) -> None:
    """Measure what ``kept`` does not hold yet, and add it as it comes: ``points``, {key: windows}, and ``hosts``,
    {key: name of the host}. ``cluster``: the address of a Ray cluster, each of whose nodes measures a point at a time;
    None: this host. ``done`` is told how many there are so far, at first too; ``progress`` what is being done. Raises
    VmmError."""
    hosts: dict[str, str] = kept.setdefault("hosts", {})
    left = list(dict.fromkeys(each for each in points if key_of(*each) not in kept["points"]))
    number = len(points) - len(left)
    done(number)
    # Figures of time: a point has its host for itself.
    with closing(run_points(left, partial(_measure, settings), address=cluster,
                            needs=lambda chosen: Needs(whole=True, kvm=settings.accel == "kvm"),
                            progress=lambda chosen, doing: progress(f"{chosen[0].label}: {doing}"))) as measured:
        for chosen, (host, windows) in measured:
            key, number = key_of(*chosen), number + 1
            kept["points"][key], hosts[key] = windows, host
            done(number)


def _measure(settings: Settings, chosen: Chosen, stop: Callable[[], bool],
             progress: Callable[[str], None]) -> tuple[str, list[dict[str, Any]]]:
    """On this host; its name with it. An interrupt ends it, with its machine."""
    point, modes = chosen
    return os.uname().nodename, run_point(point, modes, settings, progress)
