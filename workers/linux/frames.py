"""The pages of the machine's memory that programs get (page frames): which are free, how often each is mapped."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

__all__ = ["Frames", "NoFrames", "Run", "runs_of"]

#: Consecutive pages: the first one, how many.
Run = tuple[int, int]

_RUNS = 1024        # of free frames, after which neighbours are put together again


class NoFrames(Exception):
    """There are not so many free frames."""


class Frames:
    """``first``, ``count``: of the frames there are. Free ones hold zeros: whoever releases frames clears them."""

    def __init__(self, first: int, count: int) -> None:
        self._first = first
        self._uses = array("I", bytes(4 * count))
        self._free: list[Run] = [(first, count)] if count else []
        self.free = count

    def take(self, count: int) -> list[Run]:
        """So many frames, each used once, in as few runs as there are at hand. Raises NoFrames, and none is taken."""
        if count > self.free:
            raise NoFrames
        self.free -= count
        taken = []
        while count:
            first, length = self._free.pop()
            if length > count:
                self._free.append((first + count, length - count))
                length = count
            taken.append((first, length))
            self._use(first, length, 1)
            count -= length
        return taken

    def share(self, frame: int) -> None:
        """One use more."""
        self._uses[frame - self._first] += 1

    def uses(self, frame: int) -> int:
        return self._uses[frame - self._first]

    def drop(self, frames: Iterable[int]) -> list[Run]:
        """One use less of each; the runs of those that nobody uses now. They are free once they are ``give``\\ n back,
        cleared."""
        unused = []
        for frame in frames:
            at = frame - self._first
            self._uses[at] -= 1
            if not self._uses[at]:
                unused.append(frame)
        return runs_of(unused)

    def give(self, runs: Iterable[Run]) -> None:
        """They are clear, and free."""
        for run in runs:
            self._free.append(run)
            self.free += run[1]
        if len(self._free) > _RUNS:
            self._free = _merged(self._free)

    def restore(self, runs: Iterable[Run]) -> None:
        """As often as a frame is in one of them it is used; all others are free. Raises ValueError."""
        length = len(self._uses)
        self._uses = uses = array("I", bytes(4 * length))
        for first, count in runs:
            at = first - self._first
            if not 0 <= at <= at + count <= length:
                raise ValueError(f"{count} frames from {first} on are not there")
            for index in range(at, at + count):
                uses[index] += 1
        self._free = runs_of(self._first + at for at, each in enumerate(uses) if not each)
        self.free = uses.count(0)

    def _use(self, first: int, count: int, uses: int) -> None:
        at = first - self._first
        self._uses[at:at + count] = array("I", [uses]) * count


def runs_of(frames: Iterable[int]) -> list[Run]:
    """Frames in any order as runs, in ascending order."""
    return _merged([(frame, 1) for frame in frames])


def _merged(runs: list[Run]) -> list[Run]:
    merged: list[Run] = []
    for first, count in sorted(runs):
        if merged and merged[-1][0] + merged[-1][1] == first:
            merged[-1] = (merged[-1][0], merged[-1][1] + count)
        else:
            merged.append((first, count))
    return merged
