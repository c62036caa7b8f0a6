"""Episodes one after the other, until so many faults have hit; what they came to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from ipc.userfault import post_copy_missing

from .plan import Episode, draw_episode, possible
from .run import Outcome, run_episode
from .shrink import shrink

__all__ = ["Campaign", "Failure", "run_campaign"]

_SHRINK_SECONDS = 300.0


class Failure(msgspec.Struct):
    """What was found, and how to see it again."""

    episode: Episode
    problem: str
    shortest: Episode       # that fails in the same way


class Campaign(msgspec.Struct):
    """What came of it. Counts: ``machines`` by what they were (``accelerator/tracking``), ``hits`` by what was done to
    whom, ``done`` events by what they were."""

    seed: int
    episodes: int = 0
    events: int = 0
    faults: int = 0
    seconds: float = 0.0
    takeovers: int = 0          # coordinators that were replaced
    lost_workers: int = 0
    compared_pages: int = 0     # at the clients' end
    dirty_pages: int = 0        # that the clients were told of
    machines: dict[str, int] = {}
    hits: dict[str, int] = {}
    done: dict[str, int] = {}
    failure: Failure | None = None

    def add(self, episode: Episode, outcome: Outcome) -> None:
        """An episode is over."""
        self.episodes += 1
        for name in ("events", "faults", "seconds", "takeovers", "lost_workers", "compared_pages", "dirty_pages"):
            setattr(self, name, getattr(self, name) + getattr(outcome, name))
        for counts, more in ((self.machines, {f"{episode.accel}/{episode.tracking}": 1}), (self.hits, outcome.hits),
                             (self.done, outcome.done)):
            for name, count in more.items():
                counts[name] = counts.get(name, 0) + count


def run_campaign(faults: int, seed: int, accels: Sequence[str], *, stop: Callable[[], bool] = lambda: False,
                 done: Callable[[Campaign, Episode, Outcome], None] = lambda campaign, episode, outcome: None,
                 replay: Episode | None = None) -> Campaign:
    """Until ``faults`` have hit, ``stop`` says so, or something is wrong. ``done`` is told after each episode.
    ``replay``: this one again and again, none that is drawn. Raises VmmError where no machine can be had."""
    can, postcopy = possible(accels), not post_copy_missing()
    campaign = Campaign(seed)
    while campaign.faults < faults and campaign.failure is None and not stop():
        episode = replay or draw_episode(seed, campaign.episodes, can, postcopy=postcopy)
        outcome = run_episode(episode)
        campaign.add(episode, outcome)
        if outcome.problem:
            shortest = shrink(episode, outcome, run_episode, _SHRINK_SECONDS)
            campaign.failure = Failure(episode, outcome.problem, shortest)
        done(campaign, episode, outcome)
        if replay is not None and not replay.faults:
            break           # once is as good as often
    return campaign
