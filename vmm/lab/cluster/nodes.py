"""Points as tasks of a Ray cluster.

A node says what it has by custom resources, which it is started with: ``host: 1``, and ``kvm: 1`` where guests can run
on KVM. A point that measures time takes ``host`` whole; one that shares a host takes its cores, and so little of
``host`` that any number of such points fit, but none beside one that has it whole. Where no node has ``host``, a point
that measures time asks for as many CPUs as the largest node has. ``kvm`` is only asked for: any number of points use
it.

Ray runs a point again elsewhere when its node, or its process there, is lost. A point that fails by itself has an
exception or an error as its result, and is not run again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Generic, TypeVar

from ipc.linux.process import not_nice

from ...errors import VmmError
from .connection import HOST, KVM, PART
from .points import Needs, Stopped, Work

__all__ = ["Nodes"]

P = TypeVar("P")
R = TypeVar("R")

_RETRIES = 3            # of a point whose node, or process, was lost
_AHEAD = 256            # points that are with Ray at once
_LOOK = 0.2             # seconds between two looks at ``stop``
_ALONE = 60.0           # seconds without a node that has what is needed, until that is an error
_CANCEL_TIMEOUT = 30.0  # for points to end their machines


class Nodes(Generic[P, R]):
    """On the nodes of a cluster, in the order in which they have room."""

    def __init__(self, ray: Any, work: Work[P, R], needs: Callable[[P], Needs],
                 lost: Callable[[P, str], R] | None, stop: Callable[[], bool],
                 progress: Callable[[P, str], None]) -> None:
        self._ray, self._work, self._needs, self._lost = ray, work, needs, lost
        self._stop, self._progress = stop, progress
        self._points: deque[P] = deque()
        self._options: dict[Needs, dict[str, Any]] = {}     # of Ray's, by what is needed
        self._alone_since: float | None = None

    def submit(self, point: P) -> None:
        """To be run. Raises VmmError when no node has what it needs."""
        needs = self._needs(point)
        if needs not in self._options:
            self._options[needs] = self._choose(needs, str(point))
        self._points.append(point)

    def results(self) -> Iterator[tuple[P, R]]:
        """Raises Stopped, VmmError, and what the work raises."""
        ray = self._ray
        run = ray.remote(_run)
        work = ray.put(self._work)      # once, however large it is, and however many points
        running: dict[Any, P] = {}
        try:
            while self._points or running:
                while self._points and len(running) < _AHEAD:
                    point = self._points.popleft()
                    running[run.options(**self._options[self._needs(point)]).remote(work, point)] = point
                self._progress(next(iter(running.values())), f"and {len(self._points) + len(running) - 1} more on the "
                                                             "cluster")
                ended, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK)
                if self._stop():
                    raise Stopped
                for ref in ended:
                    point = running.pop(ref)
                    yield point, self._result(ref, point)
                if not ended:
                    self._check_nodes(list(running.values()))
        finally:
            self._cancel(list(running))

    def _result(self, ref: Any, point: P) -> R:
        errors = self._ray.exceptions
        try:
            result: R = self._ray.get(ref)
            return result
        except errors.RayTaskError as exc:
            cause = exc.cause
            if isinstance(cause, ImportError):
                raise VmmError(f"a node of the cluster cannot run points: {cause}: install the same shardvmm on each"
                               ) from None
            raise cause from None
        except errors.RayError as exc:      # its node or its process, and those of each retry
            text = f"lost with its node, {_RETRIES + 1} times ({type(exc).__name__})"
            if self._lost is None:
                raise VmmError(f"{point}: {text}") from None
            return self._lost(point, text)

    def _fitting(self, needs: Needs) -> list[dict[str, float]]:
        """Resources of the nodes that have what is needed, busy ones included."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [has for has in nodes if has.get("CPU") and (has.get(KVM) or not needs.kvm)
                and (needs.whole or has["CPU"] >= needs.cores)]

    def _choose(self, needs: Needs, point: str) -> dict[str, Any]:
        nodes = self._fitting(needs)
        if not nodes:
            raise VmmError(self._missing(needs, point))
        hosts = any(has.get(HOST) for has in nodes)
        resources = {KVM: PART} if needs.kvm else {}
        if hosts:
            resources[HOST] = 1.0 if needs.whole else PART
        cpus = needs.cores if not needs.whole else 0 if hosts else max(has["CPU"] for has in nodes)
        return {"num_cpus": cpus, "resources": resources, "max_retries": _RETRIES, "retry_exceptions": False}

    def _missing(self, needs: Needs, point: str) -> str:
        if needs.kvm and self._fitting(replace(needs, kvm=False)):
            return (f"no node of the cluster has the resource kvm, which '{point}' needs: start nodes that have KVM "
                    "with ray start --resources '{\"host\": 1, \"kvm\": 1}'")
        cores = "" if needs.whole else f" with {needs.cores} CPUs"
        return f"the cluster has no node{cores} for '{point}'"

    def _check_nodes(self, running: list[P]) -> None:
        """Nodes may be lost, and others come; but not for ever."""
        without = next((p for p in running if not self._room(self._needs(p))), None)
        if without is None:
            self._alone_since = None
            return
        self._alone_since = self._alone_since or time.monotonic()
        if time.monotonic() - self._alone_since > _ALONE:
            raise VmmError(f"no node is left for '{without}': the others' results are kept")

    def _room(self, needs: Needs) -> bool:
        wanted = self._options[needs]
        return any(has["CPU"] >= wanted["num_cpus"] and all(has.get(k, 0) >= v for k, v in wanted["resources"].items())
                   for has in self._fitting(needs))

    def _cancel(self, refs: list[Any]) -> None:
        """Each is interrupted as by Ctrl-C, and ends its machines."""
        for ref in refs:
            self._ray.cancel(ref, force=False)
        if refs:
            self._ray.wait(refs, num_returns=len(refs), timeout=_CANCEL_TIMEOUT)


def _run(work: Work[P, R], point: P) -> R:
    """On a node, in a process of Ray's. Raises what the work raises."""
    not_nice()
    return work(point, lambda: False, lambda doing: None)
