"""What goes in which round of pre-copy, and what comes after it: no I/O. The migration itself goes by it
(vmm/consumers/migration/precopy.py), and so does whoever foretells one (vmm/consumers/predict).

    rounds = Rounds(rules, sizes, first)
    # send rounds.todo; then, with what was not sent of it and what was dirtied meanwhile:
    left = rounds.over(rest, dirty)
    if rounds.decide(Round(...), can_limit=True) is Next.ROUND:
        rounds.begin()
"""

from __future__ import annotations

from collections.abc import Mapping

from .converge import Convergence, Next, Round, Rules
from .hot import Hot, Todo, joined, pages

__all__ = ["Rounds"]

#: Of what a first standstill takes: what the last one takes beside the pages, and how long until the guest is in it.
_BESIDE, _LAG = 2.0, 0.5


class Rounds:
    """``sizes``: pages of each logged slot; ``first``: what the first round sends; ``standstill``: seconds that it took
    to have the guest stand still for a moment, and to ask all of it."""

    def __init__(self, rules: Rules, sizes: Mapping[int, int], first: Todo, standstill: float = 0.0) -> None:
        self.convergence = Convergence(rules, standstill * _BESIDE, standstill * _LAG)
        #: What is to be sent in this round; when it is over, what is left.
        self.todo = first
        #: Of what is left, pages that wait for the last round.
        self.held: Todo = {}
        self._sizes = dict(sizes)
        self._hot = Hot()
        self._dirty: Todo = {}

    def over(self, rest: Todo, dirty: Todo) -> int:
        """A round is: ``rest`` of it was not sent, ``dirty`` was dirtied meanwhile. The pages that are left."""
        self.todo, self._dirty = joined(joined(rest, self.held), dirty), dirty
        return pages(self.todo)

    def decide(self, done: Round, *, can_limit: bool) -> Next:
        """What comes after the round that is over. ``can_limit``: vCPUs can be held to a rate."""
        return self.convergence.after(done, can_limit=can_limit)

    def begin(self) -> None:
        """The next round: ``todo`` of what is left, but for what is ``held``."""
        self._hot.look(self._dirty, {slot: self._sizes[slot] for slot in self._dirty})
        convergence = self.convergence
        self.todo, self.held = self._hot.split(self.todo, convergence.budget * (convergence.rate or 0.0))
