"""Many migrations foretold: at several bandwidths and downtime limits; from which bandwidth on the guest converges by
itself; and what would help where it does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..migration.pages import PAGE
from ..migration.report import Options
from .costs import Costs
from .dirtying import Guest, Memory
from .simulate import Prediction, Way, simulate

__all__ = ["Cell", "Remedy", "Study"]

_LEAST, _MOST = 1e6, 125e9  # bytes per second between which a bandwidth is looked for: 8 Mbit/s, 1 Tbit/s
_LONGEST = 1e6              # seconds: any guest is handed over within them
_HALVINGS = 14
_EXACT = 1.02               # that a bandwidth, or a limit, is found to
_LOOKED_AT = 20             # bandwidths above, by as much each


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

    def least_bandwidth(self, tried: Iterable[float] = ()) -> float | None:
        """Bytes per second from which on it converges by itself, within the options' downtime limit; more than each of
        those ``tried`` with which it does not. None: at none, up to 1 Tbit/s."""
        def converges(bits: float) -> bool:
            return self._plain(bandwidth=bits / 8).by_itself

        def too_low(some: Iterable[float]) -> float:
            return max((bits for bits in some if not converges(bits)), default=0.0)

        low, most = too_low(each * 8 for each in tried) or _LEAST * 8, _MOST * 8
        while low < most and converges(most):
            _, found = _edge(converges, low, most)
            # Near the edge, a little more may have it throttled again, in a round that happens to leave more.
            low = too_low(found * _EXACT ** n for n in range(1, _LOOKED_AT))
            if not low:
                return found / 8
        return None

    def _plain(self, **changed: Any) -> Prediction:
        """Of pre-copy alone; throttled as the options say."""
        return self.predict(postcopy=False, stall=0.0, **changed)

    def having(self, **changed: Any) -> Study:
        """The same, with options that are ``changed``."""
        return Study(self._guest, self._memory, dataclasses.replace(self._options, **changed), self._way, self._costs,
                     self._limits)

    def remedies(self, least: float | None) -> list[Remedy]:
        """For a guest that does not converge by itself; none where it does. ``least``: its least bandwidth, with the
        same downtime limit."""
        if self._plain().by_itself:
            return []
        found = [] if least is None else [Remedy("bandwidth", least, self._plain(bandwidth=least))]
        _, longer = _edge(lambda limit: self._plain(downtime=limit).by_itself, self._options.downtime, _LONGEST)
        found.append(Remedy("downtime", longer, self._plain(downtime=longer)))
        if (limit := self._dirty_limit()) is not None:
            found.append(Remedy("dirty-limit", limit * PAGE, self._held(limit)))
        found.append(Remedy("converge", 0.0, self.predict(converge=True, postcopy=False)))
        found.append(Remedy("postcopy", 0.0, self.predict(postcopy=True)))
        return found

    def _held(self, limit: float) -> Prediction:
        """With each vCPU held to so many pages per second."""
        return self._simulate(dict.fromkeys(range(len(self._guest.vcpus)), limit), postcopy=False, stall=0.0)

    def _dirty_limit(self) -> float | None:
        """Pages per second: the highest limit for each vCPU with which it converges by itself."""
        def too_much(limit: float) -> bool:
            return not self._held(limit).by_itself

        least, most = 10.0, 10e6
        return None if too_much(least) else _edge(too_much, least, most)[0]


def _edge(holds: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Two values between, near one another, by halves of the way: with the first it does not hold, with the second it
    does, as with ``high``; ``low`` twice where it holds with that. Of three digits, so that what is shown is what was
    found."""
    if holds(low):
        return low, low
    for _ in range(_HALVINGS):
        if high / low < _EXACT:
            break
        middle = float(f"{(low * high) ** 0.5:.3g}")
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low, high
