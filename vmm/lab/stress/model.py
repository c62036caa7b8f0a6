"""The scaling model: what grows with vCPUs, what with dirtied pages, what with RAM.

Each quantity is a sum of terms, fitted by least squares over the sweep's points, for each accelerator apart.
Wall-clock times are fitted where the machines had the cores they wanted (by the scheduler's own count of the time
that a process was ready and waited); CPU time and memory over all points. A term whose value is the same
at all points cannot be told from the constant and is left out. There are to be twice as many points as terms.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipc.layout import RING_RESERVE

from ...dirty.schedule import FILL_TARGET
from .measure import Figures
from .sweep import Point, PointResult

__all__ = ["Fit", "Term", "busy_at", "fit_all", "fit_terms"]

_CONSTANT = "constant"
_WAITED = 1.0               # of the time run, at most, for a wall-clock time that shows the work and not the queue
_GIB = 1 << 30
_TRUSTED = 0.9              # R squared below which nothing is extrapolated


@dataclass(frozen=True, slots=True)
class Term:
    """``value`` in the fit's unit for one of ``name``; ``error``: its standard error."""

    name: str
    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Fit:
    """``left_out``: terms that did not vary. ``free``: those for which no cost was found. ``contended``: points not
    used, for want of cores."""

    accel: str
    quantity: str
    unit: str
    terms: list[Term]
    r2: float
    points: int
    contended: int
    left_out: list[str]
    free: list[str]

    def term(self, name: str) -> float:
        """0.0 where it was left out."""
        return next((t.value for t in self.terms if t.name == name), 0.0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Quantity:
    name: str
    unit: str
    value: Callable[[Point, Figures], float | None]     # None: this point says nothing of it
    terms: dict[str, Callable[[Point, Figures], float]]
    uncontended: bool


def _flush_us(point: Point, f: Figures) -> float | None:
    return statistics.median(us for us, _ in f.flushes) if f.flushes else None


def _flush_pages(point: Point, f: Figures) -> float:
    return statistics.median(pages for _, pages in f.flushes) if f.flushes else 0.0


def _vcpus(point: Point, f: Figures) -> float:
    return float(point.vcpus)


def _ram(point: Point, f: Figures) -> float:
    return point.ram / _GIB


QUANTITIES = (
    _Quantity("flush", "us", _flush_us, {"vCPU": _vcpus, "dirty page": _flush_pages, "GiB of RAM": _ram}, True),
    _Quantity("reap", "us", lambda p, f: f.reap_us if p.ring else None,
              {"ring": _vcpus, "entry": lambda p, f: f.entries_per_reap, "GiB of RAM": _ram}, True),
    _Quantity("launch", "ms", lambda p, f: f.launch_s * 1e3, {"vCPU": _vcpus, "GiB of RAM": _ram}, True),
    _Quantity("memory beyond RAM", "MiB", lambda p, f: f.pss_mib, {"vCPU": _vcpus, "GiB of RAM": _ram}, False),
    _Quantity("coordinator CPU", "us/s", lambda p, f: f.coordinator_cpu * 1e6 if p.ring else None,
              {"reap": lambda p, f: f.reaps / f.seconds, "ring reaped": lambda p, f: p.vcpus * f.reaps / f.seconds,
               "entry": lambda p, f: f.reaped_per_s}, False),
)


def fit_terms(columns: dict[str, NDArray[np.float64]], values: NDArray[np.float64],
              ) -> tuple[list[Term], float, list[str], list[str]]:
    """Least squares of ``values`` [n] over a constant and ``columns`` [n] each: terms, R squared, columns that do
    not vary, columns without a cost. No term costs less than nothing: the one that would most so is taken out, and
    the others are fitted again. No terms at all where there are less than twice as many points."""
    varied = {name: c for name, c in columns.items() if np.ptp(c) > 1e-9 * max(1.0, float(np.abs(c).max()))}
    left_out = [name for name in columns if name not in varied]
    free: list[str] = []
    while True:
        names = [_CONSTANT, *varied]
        matrix = np.column_stack([np.ones_like(values), *varied.values()])
        scale = np.abs(matrix).max(axis=0)      # columns of one size: entries are millions, rings a few
        matrix /= scale
        if len(values) < 2 * len(names) or np.linalg.matrix_rank(matrix) < len(names):
            return [], 0.0, left_out, free
        solved, *_ = np.linalg.lstsq(matrix, values, rcond=None)
        worst = min(range(1, len(names)), key=lambda i: solved[i], default=0)
        if worst == 0 or solved[worst] >= -1e-9 * float(np.abs(values).max()):
            break
        del varied[names[worst]]
        free.append(names[worst])
    residual = values - matrix @ solved
    variance = float(residual @ residual) / (len(values) - len(names))
    errors = np.sqrt(variance * np.diag(np.linalg.inv(matrix.T @ matrix))) / scale
    around = values - values.mean()
    total = float(around @ around)
    r2 = 1.0 - float(residual @ residual) / total if total > 0 else 1.0
    terms = [Term(n, float(v), float(e)) for n, v, e in zip(names, solved / scale, errors, strict=True)]
    return terms, r2, left_out, free


def _contended(result: PointResult) -> bool:
    """The machines had to wait for cores, be it because of this point's own vCPUs or of another program."""
    ran = sum(f.coordinator_cpu + f.workers_cpu for f in result.figures)
    return sum(f.coordinator_waited + f.workers_waited for f in result.figures) > _WAITED * ran


def fit_all(results: Sequence[PointResult]) -> list[Fit]:
    """Every quantity that the points say something of, for each accelerator."""
    fits = []
    for accel in sorted({r.point.accel for r in results}):
        samples = [(r.point, f, _contended(r)) for r in results if r.point.accel == accel for f in r.figures]
        for quantity in QUANTITIES:
            told = [(p, f, crowd, value) for p, f, crowd in samples if (value := quantity.value(p, f)) is not None]
            used = [s for s in told if not quantity.uncontended or not s[2]]
            if not used:
                continue
            columns = {name: np.array([term(p, f) for p, f, _, _ in used]) for name, term in quantity.terms.items()}
            terms, r2, left_out, free = fit_terms(columns, np.array([value for *_, value in used]))
            if terms:
                fits.append(Fit(accel, quantity.name, quantity.unit, terms, r2, len(used), len(told) - len(used),
                                left_out, free))
    return fits


def busy_at(fit: Fit, pages_per_s: float, ring: int) -> float | None:
    """Extrapolated from the fit of the coordinator's CPU: at how many vCPUs, each dirtying so many pages per second
    into rings of so many entries, one reaper saturates a core. All rings are reaped at the pace of the
    fastest (as the adaptive reaper does it). None where the fit is poor, or has no cost for them."""
    reaps = pages_per_s / (FILL_TARGET * max(1, ring - RING_RESERVE))
    per_vcpu = reaps * fit.term("ring reaped") + pages_per_s * fit.term("entry")
    left = 1e6 - fit.term(_CONSTANT) - reaps * fit.term("reap")
    return max(0.0, left / per_vcpu) if per_vcpu > 0 and fit.r2 >= _TRUSTED else None
