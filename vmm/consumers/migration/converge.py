"""When a migration's guest is stopped, and which vCPUs are held to a rate before: decisions without I/O.

After every round of pre-copy the source says what was sent and what is dirty again, and is told how to continue. The
expected downtime is what is left divided by what was sent per second, counting pages with bytes alone: zero
pages, of which a restored machine's first round is full, cost next to nothing and say nothing about those that will
be sent while the guest stands still. To this come the pages that are dirtied until it does, and what the hand-over
takes beside the pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["LATE", "Convergence", "Forecast", "Next", "Round", "Rules"]

_THROTTLE_AFTER = 3         # rounds without convergence before vCPUs are held to a rate
_THROTTLE_STEP = 0.5        # of the quota, each further round
_THROTTLE_SHARE = 0.5       # of what can be sent that all of them may dirty, at first
_ZERO = 1 / 8              # of a page that has bytes: what one that is zero takes
_LEAST = 1 / 4              # of the downtime limit that pages may take, however long the hand-over does
_CONVERGING = 0.7           # of what was left before: a round that leaves less converges by itself


class Next(Enum):
    """What comes after a round."""

    ROUND = "another round"
    STOP = "the guest is stopped, the rest is sent"
    POSTCOPY = "the guest is stopped, and resumes at the target before the rest has arrived"
    CANCEL = "the migration is given up"


#: What comes when there was no end in time, by the words of Options.on_timeout.
LATE = {"cancel": Next.CANCEL, "force": Next.STOP, "postcopy": Next.POSTCOPY}


@dataclass(frozen=True, slots=True)
class Rules:
    """As in vmm.consumers.migration.report.Options."""

    downtime: float         # seconds
    max_rounds: int
    converge: bool
    postcopy: bool
    postcopy_after: int
    stall: float = 0.0      # seconds without less being left, after which
    late: Next = Next.CANCEL    # this comes; 0: never
    bandwidth: float = 0.0  # bytes per second that may be sent; 0: no cap


@dataclass(frozen=True, slots=True)
class Round:
    """``normal``: pages sent with their bytes; ``left``: pages dirty after it, of which so many are ``zero``;
    ``dirtied``: pages that each vCPU dirtied per second; ``sent``: bytes on the wire (0: not known), under this cap of
    the ``bandwidth`` (0: none)."""

    normal: int
    seconds: float
    left: int
    dirtied: list[float]
    zero: int = 0
    sent: int = 0
    bandwidth: float = 0.0
    since: float = 0.0      # seconds in which what is left was dirtied; 0: those of the round


@dataclass(frozen=True, slots=True)
class Forecast:
    """Whether what is left will fit into the downtime, if the guest goes on as in the last round; after how many more
    seconds and rounds, or with how many seconds of downtime after the last that the rules allow. ``dirtied``: pages
    that were dirty after the last round, by the second in which they became so, against ``rate``, which can be sent."""

    converges: bool
    seconds: float
    rounds: int
    downtime: float
    dirtied: float
    rate: float


class Convergence:
    """The rounds of one migration. ``beside``: seconds that the hand-over takes beside the pages; ``lag``: seconds
    until the guest stands still."""

    def __init__(self, rules: Rules, beside: float = 0.0, lag: float = 0.0) -> None:
        self._beside, self._lag = beside, lag
        #: They may be changed between rounds.
        self.rules = rules
        self._rounds = 0
        self._before: int | None = None     # pages left after the last round
        self._least: int | None = None      # and after any
        self._dirtied = 0.0                 # pages left by the last round, by the second (Round.since)
        #: Seconds of rounds since the one that left the least.
        self.stalled = 0.0
        self._measured: float | None = None     # pages per second of the last round that sent some with bytes,
        self._bytes = 0.0                       # what each was on the wire,
        self._cap = 0.0                         # and the cap of the bandwidth meanwhile
        #: {vCPU: pages per second it is held to}
        self.quotas: dict[int, int] = {}

    @property
    def rate(self) -> float | None:
        """Pages per second that can be sent, as in the last round, and under the cap there is now; None until some with
        bytes were."""
        if not (self._measured and self._bytes and self.rules.bandwidth):
            return self._measured
        return min(self._measured, self.rules.bandwidth / self._bytes)

    @property
    def budget(self) -> float:
        """Seconds of the downtime that there are for pages."""
        return max(self.rules.downtime - self._beside, self.rules.downtime * _LEAST)

    def expected_downtime(self, done: Round) -> float | None:
        """Seconds, should the guest be stopped after this round; None while that is not known."""
        needed = self._needed(done)
        return None if needed is None else self._beside + needed

    def fits(self, done: Round) -> bool:
        """What this round has left can be sent within the downtime."""
        needed = self._needed(done)
        return needed is not None and needed <= self.budget

    def _needed(self, done: Round) -> float | None:
        """Seconds for what this round has left."""
        weight = done.left - done.zero + done.zero * _ZERO + sum(done.dirtied) * self._lag
        if not weight:
            return 0.0
        return weight / self.rate if self.rate else None

    def forecast(self, left: int) -> Forecast | None:
        """With so many pages left; None while that is not known, as after a cap was raised."""
        rate, dirtied, rules = self.rate, self._dirtied, self.rules
        if not rate or (self._cap and not 0 < rules.bandwidth <= self._cap):
            return None
        seconds, rounds, now = 0.0, 0, float(left)
        while now > rate * self.budget and self._rounds + rounds < rules.max_rounds:
            seconds, rounds, now = seconds + now / rate, rounds + 1, now * dirtied / rate
            if dirtied >= rate:
                break       # no round leaves less
        return Forecast(now <= rate * self.budget, seconds, rounds, now / rate + self._beside, dirtied, rate)

    def after(self, done: Round, *, can_limit: bool) -> Next:
        """``quotas`` may have changed afterwards. ``can_limit``: vCPUs can be held to a rate."""
        self._rounds += 1
        if done.normal:
            self._measured, self._cap = done.normal / max(done.seconds, 1e-6), done.bandwidth
            self._bytes = done.sent / done.normal
        self._dirtied = done.left / max(done.since or done.seconds, 1e-6)
        if self._least is None or done.left < self._least:
            self._least, self.stalled = done.left, 0.0
        else:
            self.stalled += done.seconds
        rules = self.rules
        if self.fits(done):
            return Next.STOP
        if rules.postcopy and self._rounds >= rules.postcopy_after:
            return Next.POSTCOPY
        if self._rounds >= rules.max_rounds:
            return Next.STOP
        if rules.stall and self.stalled >= rules.stall:
            return rules.late
        if (rules.converge and can_limit and self.rate and self._rounds >= _THROTTLE_AFTER and self._before
                and done.left > self._before * _CONVERGING):
            self._hold_back(done.dirtied)
        self._before = done.left
        return Next.ROUND

    def _hold_back(self, dirtied: list[float]) -> None:
        """Limit the vCPUs that dirty most, until all together stay below what can be sent; the others are left
        alone. Again and again, to half each time."""
        if self.quotas:
            self.quotas = {vcpu: max(1, int(quota * _THROTTLE_STEP)) for vcpu, quota in self.quotas.items()}
            return
        assert self.rate is not None
        budget = self.rate * _THROTTLE_SHARE
        share = budget / len(dirtied)
        hot = [i for i, rate in enumerate(dirtied) if rate > share]
        calm = sum(rate for rate in dirtied if rate <= share)
        self.quotas = {vcpu: max(1, int((budget - calm) / len(hot))) for vcpu in hot}
