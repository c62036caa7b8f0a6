"""Many migrations foretold: at several bandwidths and downtime limits; from which bandwidth on the guest converges by
itself; and what would help where it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..migration.pages import PAGE
from ..migration.report import Options
from .costs import Costs
from .dirtying import Guest, Memory
from .simulate import Prediction, Way, simulate

__all__ = ["Cell", "Remedy", "Study"]

_LEAST, _MOST = 1e6, 125e9  # bytes per second between which a bandwidth is looked for: 8 Mbit/s, 1 Tbit/s
_HALVINGS = 14
_EXACT = 1.02               # that a bandwidth, or a limit, is found to


@dataclass(frozen=True, slots=True)
class Cell:
    """``bandwidth`` in bytes per second (0: no cap), ``downtime``: the limit, in seconds."""

    bandwidth: float
    downtime: float
    found: Prediction

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"bandwidth": self.bandwidth, "downtime_limit": self.downtime * 1000, **self.found.as_dict()}


@dataclass(frozen=True, slots=True)
class Remedy:
    """What would help a guest that does not converge by itself. ``what``: "bandwidth" (``value`` in bytes per second),
    "downtime" (seconds), "dirty-limit" (bytes per second of each vCPU), "converge", "postcopy"; the last two have no
    value. ``found``: what comes of it."""

    what: str
    value: float
    found: Prediction

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"what": self.what, "value": self.value, **self.found.as_dict()}


class Study:
    """Of one guest. ``options``: for all that is not said otherwise."""

    def __init__(self, guest: Guest, memory: Memory, options: Options, way: Way | None = None,
                 costs: Costs | None = None, limits: dict[int, float] | None = None) -> None:
        self._guest, self._memory, self._options = guest, memory, options
        self._way, self._costs, self._limits = way, costs, limits

    def predict(self, **changed: Any) -> Prediction:
        """With options that are ``changed``."""
        return self._simulate(self._limits, **changed)

    def _simulate(self, limits: dict[int, float] | None, **changed: Any) -> Prediction:
        return simulate(self._guest, self._memory, dataclasses.replace(self._options, **changed), self._way,
                        self._costs, limits)

    def cell(self, bandwidth: float, downtime: float) -> Cell:
        """With this bandwidth (bytes per second) and this limit (seconds)."""
        return Cell(bandwidth, downtime, self.predict(bandwidth=bandwidth, downtime=downtime))

    def least_bandwidth(self) -> float | None:
        """Bytes per second from which on it converges by itself: no vCPU is throttled, no round is the last for being
        the last. None: at none, a host that sends without a cap included."""
        def converges(bandwidth: float) -> bool:
            return self._by_itself(bandwidth=bandwidth).outcome == "converges"

        if not converges(0.0):
            return None
        return _MOST if not converges(_MOST) else _least(converges, _LEAST, _MOST)

    def _by_itself(self, **changed: Any) -> Prediction:
        return self.predict(converge=False, postcopy=False, stall=0.0, **changed)

    def having(self, **changed: Any) -> Study:
        """The same, with options that are ``changed``."""
        return Study(self._guest, self._memory, dataclasses.replace(self._options, **changed), self._way, self._costs,
                     self._limits)

    def remedies(self, least: float | None) -> list[Remedy]:
        """For a guest that does not converge by itself; none where it does. ``least``: its least bandwidth."""
        plain = self._by_itself()
        if plain.outcome == "converges":
            return []
        found = [] if least is None else [Remedy("bandwidth", least, self._by_itself(bandwidth=least))]
        found.append(Remedy("downtime", plain.downtime, plain))
        if (limit := self._dirty_limit()) is not None:
            limits = dict.fromkeys(range(len(self._guest.vcpus)), limit)
            found.append(Remedy("dirty-limit", limit * PAGE, self._simulate(limits, converge=False, postcopy=False)))
        found.append(Remedy("converge", 0.0, self.predict(converge=True, postcopy=False)))
        found.append(Remedy("postcopy", 0.0, self.predict(postcopy=True)))
        return found

    def _dirty_limit(self) -> float | None:
        """Pages per second: the highest limit for each vCPU with which it converges."""
        def too_much(limit: float) -> bool:
            limits = dict.fromkeys(range(len(self._guest.vcpus)), limit)
            return self._simulate(limits, converge=False, postcopy=False).outcome != "converges"

        least, most = 10.0, 10e6
        if too_much(least):
            return None
        return _least(too_much, least, most) / _EXACT


def _least(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The least value between that ``holds`` (it does for all that are higher), by halves of the way."""
    if holds(low):
        return low
    for _ in range(_HALVINGS):
        if high / low < _EXACT:
            break
        middle = (low * high) ** 0.5
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
