"""Points of a sweep: each is work by itself, and its result is wanted as soon as it is there.

:func:`run_points` gives them to an executor and yields their results. There are two: this process, one point after the
other (:class:`Here`), and the nodes of a Ray cluster (nodes.py). What is done with the points and the results is the
caller's, and the same for both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["Executor", "Here", "Needs", "Stopped", "Work", "run_points"]

P = TypeVar("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

#: What is done at a point: (point, stop, progress) -> result. It asks ``stop`` all the time, raises Stopped once that
#: says True, and tells ``progress`` what it does. For a cluster it is picklable, and so are points and results.
Work = Callable[[P, Callable[[], bool], Callable[[str], None]], R]


class Stopped(Exception):
    """The caller wants no more."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a point asks of its host. ``whole``: nothing else runs there meanwhile, because it measures time; otherwise
    ``cores`` of it."""

    whole: bool = True
    kvm: bool = False
    cores: int = 1


class Executor(Protocol[P, R_co]):
    """Takes points, then gives the result of each as it comes."""

    def submit(self, point: P) -> None:
        """To be run."""

    def results(self) -> Iterator[tuple[P, R_co]]:
        """Of all that were submitted, each once, in any order. Raises Stopped, and what the work raises."""


class Here(Generic[P, R]):
    """In this process, in order."""

    def __init__(self, work: Work[P, R], stop: Callable[[], bool], progress: Callable[[P, str], None]) -> None:
        self._work, self._stop, self._progress = work, stop, progress
        self._points: deque[P] = deque()

    def submit(self, point: P) -> None:
        """To be run when its result is asked for."""
        self._points.append(point)

    def results(self) -> Iterator[tuple[P, R]]:
        """Raises Stopped, and what the work raises."""
        while self._points:
            point = self._points.popleft()
            yield point, self._work(point, self._stop, partial(self._progress, point))


def run_points(points: Iterable[P], work: Work[P, R], *, address: str | None = None,
               needs: Callable[[P], Needs] = lambda point: Needs(),
               lost: Callable[[P, str], R] | None = None,
               stop: Callable[[], bool] = lambda: False,
               progress: Callable[[P, str], None] = lambda point, doing: None) -> Generator[tuple[P, R], None, None]:
    """Do ``work`` at each point, and yield (point, result) as results come.

    ``address``: of a Ray cluster (nodes.py: ``auto``, ``HOST:PORT``, ``local``); None: here, one after the other.
    ``needs`` and ``lost`` are for a cluster: what a point asks of a node, and the result of a point that was lost with
    its node each time it was tried (None: that is an error). Close the generator where it is left early (contextlib.
    closing): what still runs is ended then. Raises Stopped, VmmError, and what the work raises.
    """
    wanted = list(points)
    if not wanted:
        return
    with ExitStack() as stack:
        executor: Executor[P, R] = Here(work, stop, progress)
        if address is not None:
            from .connection import connect
            from .nodes import Nodes

            ray: Any = stack.enter_context(connect(address))
            executor = Nodes(ray, work, needs, lost, stop, progress)
        for point in wanted:
            executor.submit(point)
        yield from executor.results()
