"""epoll(7): who is interested in which files, and those of them that something has happened to.

    System.notify(source) -> Interest.happened -> pending -> Epoll.collect, which asks the file what can be done

What is pending is looked at again by ``collect``, and then no more (EPOLLET, EPOLLONESHOT) or again the next time. So
with EPOLLET each event is reported, also one that changes nothing about what can be done.
"""

from __future__ import annotations

import errno
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Protocol

from .channels import ERR, HUP, IN, RDNORM, Channel
from .inodes import Inode

if TYPE_CHECKING:
    from .openfiles import OpenFile
    from .state import Loading, Saving
    from .system import System

__all__ = ["EXCLUSIVE", "Epoll", "Interest", "Watcher", "load_interests", "save_interests"]

EXCLUSIVE, _WAKEUP, _ONESHOT, _EDGE = 1 << 28, 1 << 29, 1 << 30, 1 << 31    # uapi/linux/eventpoll.h
_HOW = EXCLUSIVE | _WAKEUP | _ONESHOT | _EDGE
_NESTED_MAX = 4             # EP_MAX_NESTS


class Watcher(Protocol):
    """Is told what happens to a source (``System.interests``)."""

    def happened(self, system: System, events: int) -> None:
        """``events``: which ones (0: any)."""


class Interest:
    """Of an epoll instance in a file, under the number that it had."""

    def __init__(self, epoll: Epoll, file: Channel, number: int) -> None:
        self.epoll, self.file, self.number = epoll, file, number
        self.events = self.data = 0

    def given(self, system: System) -> int:
        """What can be done of what it is about."""
        return self.file.ready(system) & self.events

    def happened(self, system: System, events: int) -> None:
        """``events``: which ones (0: any)."""
        if self.events & ~_HOW and (not events or events & self.given(system)):
            self.epoll.pending.setdefault(self)
            system.notify(self.epoll, IN if events else 0)

    def remove(self) -> None:
        self.epoll.forget(self)


class Epoll(Channel):
    """``everywhere``: all interests there are, by source. ``pending``: in the order in which they are reported."""

    __slots__ = ("_everywhere", "interests_of", "pending")

    timed = True
    label = b"anon_inode:[eventpoll]"

    def __init__(self, inode: Inode, flags: int, number: int = 0, *,
                 everywhere: dict[Hashable, list[Watcher]]) -> None:
        super().__init__(inode, flags, number)
        self._everywhere = everywhere
        self.interests_of: dict[tuple[int, OpenFile], Interest] = {}
        self.pending: dict[Interest, None] = {}

    @property
    def source(self) -> object:
        return self

    def closed(self) -> None:
        for each in tuple(self.interests_of.values()):
            self.forget(each)

    # --- what it is about ------------------------------------------------------------------------------------------

    def add(self, system: System, number: int, file: Channel, events: int, data: int) -> None:
        """Raises OSError."""
        if (number, file) in self.interests_of:
            raise OSError(errno.EEXIST, "")
        if isinstance(file, Epoll) and (file.leads_to(self) or self._above() + file.depth() > _NESTED_MAX):
            raise OSError(errno.ELOOP, "")
        interest = self.interests_of[number, file] = Interest(self, file, number)
        file.interests.append(interest)
        told = self._everywhere.setdefault(file.source, [])
        told.insert(len(told) if events & EXCLUSIVE else 0, interest)    # add_wait_queue: the last one first, or last
        self._set(system, interest, events, data)

    def modify(self, system: System, number: int, file: Channel, events: int, data: int) -> None:
        """Raises OSError."""
        interest = self._find(number, file)
        if interest.events & EXCLUSIVE or events & EXCLUSIVE:
            raise OSError(errno.EINVAL, "")
        self._set(system, interest, events, data)

    def remove(self, number: int, file: Channel) -> None:
        """Raises OSError."""
        self.forget(self._find(number, file))

    def _find(self, number: int, file: Channel) -> Interest:
        try:
            return self.interests_of[number, file]
        except KeyError:
            raise OSError(errno.ENOENT, "") from None

    def _set(self, system: System, interest: Interest, events: int, data: int) -> None:
        interest.events, interest.data = events | ERR | HUP, data
        if interest.given(system):
            interest.happened(system, 0)
        elif interest.file.timed:
            system.notify(self)         # whoever waits has another time to wait for

    def forget(self, interest: Interest) -> None:
        del self.interests_of[interest.number, interest.file]
        self.pending.pop(interest, None)
        interest.file.interests.remove(interest)
        source = interest.file.source
        self._everywhere[source].remove(interest)
        if not self._everywhere[source]:
            del self._everywhere[source]

    def depth(self) -> int:
        """Of epoll instances, one in another: this and those that it is about."""
        return 1 + max((each.file.depth() for each in self.interests_of.values() if isinstance(each.file, Epoll)),
                       default=0)

    def _above(self) -> int:
        """Of those that are about this."""
        return 1 + max((each.epoll._above() for each in self.interests), default=0) if self.interests else 0

    def leads_to(self, other: Epoll) -> bool:
        return self is other or any(each.file.leads_to(other) for each in self.interests_of.values()
                                    if isinstance(each.file, Epoll))

    # --- what has happened -----------------------------------------------------------------------------------------

    def collect(self, system: System, most: int) -> list[tuple[int, int]]:
        """(events, data) of so many, which are reported."""
        self.tick(system)
        found: list[tuple[int, int]] = []
        again: list[Interest] = []
        while self.pending and len(found) < most:
            interest = next(iter(self.pending))
            del self.pending[interest]
            given = interest.given(system)
            if not given:
                continue
            found.append((given, interest.data))
            if interest.events & _ONESHOT:
                interest.events &= _HOW
            elif not interest.events & _EDGE:
                again.append(interest)
        self.pending.update(dict.fromkeys(again))
        return found

    def ready(self, system: System) -> int:
        self.tick(system)
        for interest in tuple(self.pending):
            if interest.given(system):
                return IN | RDNORM
            del self.pending[interest]
        return 0

    def _timed(self) -> list[Channel]:
        return [each.file for each in self.interests_of.values() if each.file.timed]

    def due(self, system: System) -> int | None:
        return min((found for each in self._timed() if (found := each.due(system)) is not None), default=None)

    def tick(self, system: System) -> None:
        for each in self._timed():
            each.tick(system)

    # --- as data ---------------------------------------------------------------------------------------------------

    def save_links(self, saving: Saving) -> dict[str, Any]:
        return {"interests": [[number, saving.file(file), each.events, each.data]
                              for (number, file), each in self.interests_of.items()],
                "pending": [[each.number, each.file.number] for each in self.pending]}

    def link(self, loading: Loading, saved: dict[str, Any]) -> None:
        """``everywhere`` is not there yet (`save_interests`)."""
        self._everywhere = loading.system.interests
        self.interests_of = {}
        for number, at, events, data in saved["interests"]:
            interest = Interest(self, loading.channel(at), number)
            interest.events, interest.data = events, data
            self.interests_of[number, interest.file] = interest
        self.pending = {self.interests_of[number, loading.channel(at)]: None for number, at in saved["pending"]}


def save_interests(everywhere: dict[Hashable, list[Watcher]]) -> list[list[list[int]]]:
    """By source: the order in which they are told."""
    return [[[each.epoll.number, each.number, each.file.number] for each in watchers if isinstance(each, Interest)]
            for watchers in everywhere.values()]


def load_interests(loading: Loading, saved: list[list[list[int]]]) -> None:
    """Once all open files are there."""
    for group in saved:
        for epoll_number, number, file_number in reversed(group):
            epoll, file = loading.files[epoll_number], loading.channel(file_number)
            assert isinstance(epoll, Epoll)
            interest = epoll.interests_of[number, file]
            file.interests.append(interest)
            loading.system.interests.setdefault(file.source, []).insert(0, interest)
