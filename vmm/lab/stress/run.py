"""From a sweep to its results: what DIR/results.jsonl does not hold yet is measured, here or on a cluster, and each
result is added to it as it comes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path

from ...errors import ExitCode, VmmError
from ..cluster.points import Needs, Stopped, run_points
from .measure import measure
from .sweep import SWEEP, Point, PointResult, Settings, Sweep, load_results, open_results

__all__ = ["measure_point", "run"]


def _key(point: Point, settings: Settings) -> str:
    return json.dumps([asdict(point), asdict(settings)], sort_keys=True)


def run(sweep: Sweep, directory: Path, *, cluster: str | None = None, stop: Callable[[], bool] = lambda: False,
        progress: Callable[[Point, str], None] = lambda point, doing: None,
        done: Callable[[PointResult, bool], None] = lambda result, fresh: None) -> tuple[list[PointResult], bool]:
    """Measure what ``directory`` does not hold yet; the sweep's results in order, and whether all are there.

    ``cluster``: the address of a Ray cluster, each of whose nodes measures a point at a time; None: this host.
    ``stop`` is asked all the time; when it says True, the machines of the points at hand are ended and these points
    are dropped. ``progress`` is told what is being done, ``done`` each result: those that were found (not fresh), then
    the others as they come. A point that fails has its error as its result, and is measured again next time. Raises
    VmmError when DIR, or the cluster, cannot be used.
    """
    settings = sweep.settings()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / SWEEP).write_text(sweep.model_dump_json(indent=2) + "\n")
    except OSError as exc:
        raise VmmError(f"{directory}: cannot be written: {exc.strerror}") from None
    points = sweep.points()
    results: dict[Point, PointResult] = {}
    with open_results(directory) as add:
        found = {_key(r.point, r.settings): r for r in load_results(directory) if not r.error}
        for point in points:
            if (result := found.get(_key(point, settings))) is not None:
                results[point] = result
                done(result, False)
        left = [point for point in points if point not in results]
        complete = True
        # Figures of time: a point has its host for itself.
        with closing(run_points(left, partial(measure_point, settings), address=cluster,
                                needs=lambda point: Needs(whole=True, kvm=point.accel == "kvm"),
                                lost=partial(_lost, settings), stop=stop, progress=progress)) as measured:
            try:
                for point, result in measured:
                    add(result)
                    results[point] = result
                    done(result, True)
            except Stopped:
                complete = False
    return [results[point] for point in points if point in results], complete


def measure_point(settings: Settings, point: Point, stop: Callable[[], bool],
                  progress: Callable[[str], None]) -> PointResult:
    """On this host. A VmmError is the result's. Raises Stopped."""
    host = os.uname().nodename
    try:
        proof_specs = point.specs(settings, verify=True) if settings.verify is not None else []
        figures, proof = measure(point.specs(settings, verify=False), proof_specs, seconds=settings.seconds,
                                 warm_up=settings.warm_up, flushes=settings.flushes, stop=stop, progress=progress)
    except VmmError as exc:
        return PointResult(point, settings, [], [], str(exc), int(exc.exit_code), host)
    return PointResult(point, settings, figures, proof, host=host)


def _lost(settings: Settings, point: Point, text: str) -> PointResult:
    return PointResult(point, settings, [], [], text, int(ExitCode.WORKER_DIED))
