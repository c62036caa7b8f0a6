"""A live migration of a guest, without one: the rounds, the hand-over, and what is sent after it. What is decided is
decided by the migration's own code; time goes by as bytes take it on the wire, or pages at either end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..migration.converge import Next, Round
from ..migration.hot import Todo, pages
from ..migration.pages import PAGE
from ..migration.precopy import rules
from ..migration.report import Options
from ..migration.rounds import Rounds
from .costs import Costs
from .dirtying import Guest, Memory

__all__ = ["Outcome", "PredictedRound", "Prediction", "Way", "outcome_text", "simulate"]

_NUMBER = 4                 # bytes of a page's number
_MESSAGE = 0.3              # of a page's number: what a message's head adds to each, about
_EPSILON = 1e-6

Outcome = str               # "converges", "forced", "postcopy", "cancelled"


@dataclass(frozen=True, slots=True)
class Way:
    """To the target. ``latency``: seconds that a message takes there. ``ratio``: of pages with bytes, what compression
    makes of them, as bytes before by bytes after."""

    latency: float = 0.0
    ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class PredictedRound:
    """``pages`` sent, in ``seconds``; ``left``: dirty after it, ``dirtied``: pages per second meanwhile."""

    pages: int
    seconds: float
    left: int
    dirtied: float


@dataclass
class Prediction:
    """``outcome``: "converges" (what is left fits into the downtime, perhaps only since vCPUs are ``throttled``),
    "forced" (the rounds were used up), "postcopy", "cancelled". Times in seconds, ``transferred`` in bytes.
    ``pending``: pages that follow after the hand-over, and the guest may wait for. ``throttled``: {vCPU: pages per
    second it was held to at the end}. ``short``: a round took longer than was recorded, so that more pages may get
    dirty in it than are known."""

    outcome: Outcome = ""
    total: float = 0.0
    downtime: float = 0.0
    transferred: float = 0.0
    pending: int = 0
    short: bool = False
    rounds: list[PredictedRound] = field(default_factory=list)
    throttled: dict[int, int] = field(default_factory=dict)

    @property
    def by_itself(self) -> bool:
        """It converges, and no vCPU is throttled for it."""
        return self.outcome == "converges" and not self.throttled

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times in milliseconds, as in a migration's report."""
        found = asdict(self)
        return found | {"total": self.total * 1000, "downtime": self.downtime * 1000,
                        "transferred": round(self.transferred)}


def outcome_text(outcome: Outcome, throttled: Mapping[Any, int]) -> str:
    """For a person: whether it converges by itself, or since these vCPUs are throttled."""
    return f"{outcome}, throttled" if outcome == "converges" and throttled else outcome


class _Sending:
    """How long pages take, and what they are on the wire."""

    def __init__(self, options: Options, way: Way, costs: Costs) -> None:
        self._bandwidth, self._ratio, self._zero = options.bandwidth, way.ratio, costs.zero
        self._page = costs.per_page(options.channels, compresses=options.compression != "none")
        self.there_and_back = 2 * way.latency

    def size(self, filled: int, zero: int) -> float:
        """Bytes."""
        return filled * (PAGE / self._ratio + _NUMBER * (1 + _MESSAGE)) + zero * _NUMBER * (1 + _MESSAGE)

    def seconds(self, filled: int, zero: int) -> float:
        handled = filled * self._page + zero * self._zero
        return max(handled, self.size(filled, zero) / self._bandwidth) if self._bandwidth else handled


def simulate(guest: Guest, memory: Memory, options: Options, way: Way | None = None, costs: Costs | None = None,
             limits: dict[int, float] | None = None) -> Prediction:
    """The migration of this guest, from its beginning, with these options. ``limits``: {vCPU: pages per second} that it
    is held to anyway. Of ``options``, what concerns time and rounds counts; ``timeout`` does not."""
    way, costs = way or Way(), costs or Costs()
    sending, found, running = _Sending(options, way, costs), Prediction(), guest.begin()
    running.run(costs.setup + sending.there_and_back)
    found.total = costs.setup + sending.there_and_back
    rounds = Rounds(rules(options), memory.sizes, memory.touched, costs.standstill)
    zero = pages(memory.touched) - memory.filled
    while True:
        count = pages(rounds.todo)
        seconds = _send(found, sending, count - zero, zero) + costs.round + sending.there_and_back
        dirtied = running.run(seconds, _quotas(rounds, limits))
        left = rounds.over({}, _known(dirtied.pages, memory))
        done = Round(count - zero, max(seconds, _EPSILON), left, [each / seconds for each in dirtied.vcpus])
        found.total += seconds
        found.short |= seconds > guest.seconds
        found.rounds.append(PredictedRound(count, seconds, left, sum(done.dirtied)))
        what = rounds.decide(done, can_limit=True)
        zero = 0
        if what is not Next.ROUND:
            break
        rounds.begin()
    found.throttled = dict(rounds.convergence.quotas)
    if what is Next.CANCEL:
        found.outcome = "cancelled"
        return found
    dirtied = running.run(costs.standstill / 2, _quotas(rounds, limits))      # until it does stand still
    rounds.over(rounds.todo, _known(dirtied.pages, memory))
    _stop(found, rounds, sending, costs, postcopy=what is Next.POSTCOPY)
    found.outcome = ("postcopy" if what is Next.POSTCOPY else
                     "converges" if rounds.convergence.fits(done) else "forced")
    return found


def _send(found: Prediction, sending: _Sending, filled: int, zero: int) -> float:
    found.transferred += sending.size(filled, zero)
    return sending.seconds(filled, zero)


def _stop(found: Prediction, rounds: Rounds, sending: _Sending, costs: Costs, *, postcopy: bool) -> None:
    """The guest stands still, until it goes on at the target; and what is sent after that."""
    left = pages(rounds.todo)
    found.downtime = costs.hand_over + costs.answers * sending.there_and_back
    last = _send(found, sending, left, 0)
    if postcopy:
        found.pending = left
        found.total += found.downtime + last
    else:
        found.downtime += last
        found.total += found.downtime


def _quotas(rounds: Rounds, limits: dict[int, float] | None) -> dict[int, float]:
    """The lower of the migration's and those there are anyway."""
    found: dict[int, float] = dict(limits or {})
    for vcpu, quota in rounds.convergence.quotas.items():
        found[vcpu] = min(quota, found.get(vcpu, quota))
    return found


def _known(dirty: Todo, memory: Memory) -> Todo:
    """Of the slots that there are."""
    return {slot: numbers for slot, numbers in dirty.items() if slot in memory.sizes}
