"""Locks on files, as data: flock(2)'s on whole files, and fcntl(2)'s on ranges. Nobody waits here: a refusal says who
is in the way, and whoever called waits."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from typing import Any

__all__ = ["FOREVER", "Held", "Lock", "Locks"]

#: The end of a range that goes on to the end, wherever that is.
FOREVER = 2**63


@dataclass(frozen=True, slots=True)
class Lock:
    """Bytes ``start`` to ``end``. ``owner``: of fcntl(2)'s locks the number of a process, or for one that belongs to
    an open file (F_OFD_SETLK) that file's number, negated; of flock(2)'s always the file's number."""

    owner: int
    exclusive: bool
    start: int = 0
    end: int = FOREVER


class Held(OSError):
    """EAGAIN. ``lock`` is the first that is in the way."""

    def __init__(self, lock: Lock) -> None:
        super().__init__(errno.EAGAIN, "")
        self.lock = lock


class Locks:
    """Of one file."""

    __slots__ = ("_ranges", "_whole")

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        self._whole: list[Lock] = [Lock(*each) for each in saved["whole"]] if saved else []
        self._ranges: list[Lock] = [Lock(*each) for each in saved["ranges"]] if saved else []

    def save(self) -> dict[str, Any]:
        return {"whole": [list(astuple(each)) for each in self._whole],
                "ranges": [list(astuple(each)) for each in self._ranges]}

    def __bool__(self) -> bool:
        return bool(self._whole or self._ranges)

    def flock(self, owner: int, operation: int) -> None:
        """``operation``: LOCK_SH, LOCK_EX or LOCK_UN. A lock of another kind that the owner had is gone also when the
        new one is refused. Raises Held."""
        new = Lock(owner, operation == fcntl.LOCK_EX)
        if operation != fcntl.LOCK_UN and new in self._whole:
            return
        self._whole = [each for each in self._whole if each.owner != owner]
        if operation == fcntl.LOCK_UN:
            return
        for each in self._whole:
            if each.exclusive or new.exclusive:
                raise Held(each)
        self._whole.append(new)

    def conflict(self, wanted: Lock) -> Lock | None:
        """F_GETLK: the first lock on a range of it that is in the way."""
        for each in self._ranges:
            if (each.owner != wanted.owner and each.start < wanted.end and wanted.start < each.end
                    and (each.exclusive or wanted.exclusive)):
                return each
        return None

    def lock(self, wanted: Lock) -> None:
        """F_SETLK: also in place of what the owner had there. Raises Held, and nothing is changed."""
        found = self.conflict(wanted)
        if found is not None:
            raise Held(found)
        self._replace(wanted.owner, [*self._without(wanted.owner, wanted.start, wanted.end), wanted])

    def unlock(self, owner: int, start: int = 0, end: int = FOREVER) -> None:
        """F_UNLCK; with the owner alone, all that it has, as when a process closes any descriptor of the file."""
        self._replace(owner, self._without(owner, start, end))

    def _without(self, owner: int, start: int, end: int) -> Iterable[Lock]:
        """What remains of the owner's when it has none in the range."""
        for each in self._ranges:
            if each.owner == owner:
                if each.start < start:
                    yield replace(each, end=min(each.end, start))
                if each.end > end:
                    yield replace(each, start=max(each.start, end))

    def _replace(self, owner: int, own: Iterable[Lock]) -> None:
        """Locks of one owner stay together, in the order of their addresses; owners in the order they came in."""
        joined: list[Lock] = []
        for each in sorted(own, key=lambda lock: lock.start):
            if joined and joined[-1].end == each.start and joined[-1].exclusive == each.exclusive:
                joined[-1] = replace(joined[-1], end=each.end)
            else:
                joined.append(each)
        at = next((index for index, each in enumerate(self._ranges) if each.owner == owner), len(self._ranges))
        others = [each for each in self._ranges if each.owner != owner]
        self._ranges = others[:at] + joined + others[at:]
