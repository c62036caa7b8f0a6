"""Processes that hold something of the machine: it goes when they do.

A process is its pid and its start time (ipc/linux/processid.py), so that a successor which adopts its holds never
takes another one for it that has its pid by now; while a coordinator lives it is watched by its pidfd. The loop
polls all of them and calls back.

Who asks is not told but seen: the pid is that of the peer of the control socket (SO_PEERCRED, as it is in the
coordinator's PID namespace), and the start time that comes with the verb must be that pid's.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import msgspec

from ipc.linux.processid import ProcessId, open_process

from ..errors import VmmError

__all__ = ["Held", "Hold", "Owners", "Watch", "unseen"]

_TOKEN_MAX = 64


class Watch:
    """``close`` it when the thing is given back."""

    def __init__(self, owners: Owners, process: ProcessId, on_end: Callable[[], None]) -> None:
        self.process = process
        self.on_end = on_end
        self._owners = owners

    def close(self) -> None:
        """Idempotent."""
        self._owners._drop(self)


class _Watched:
    """One process, by one descriptor whatever it holds."""

    def __init__(self, process: ProcessId) -> None:
        self.process = process
        self.fd = open_process(process)
        self.watches: list[Watch] = []


class Owners:
    """All of a machine's, for the loop's poll: the keys of ``watched`` are pidfds."""

    def __init__(self) -> None:
        self.watched: dict[int, _Watched] = {}
        self._poll = select.poll()
        self._by_process: dict[ProcessId, _Watched] = {}

    def watch(self, process: ProcessId, on_end: Callable[[], None]) -> Watch:
        """``on_end`` is called once that process has ended, unless the watch was closed before. Raises
        ProcessLookupError when it has gone already, and VmmError when there is no descriptor left to watch it
        by."""
        watched = self._by_process.get(process)
        if watched is None:
            try:
                watched = _Watched(process)
            except ProcessLookupError:
                raise
            except OSError as exc:
                raise VmmError(f"cannot watch process {process.pid}: {exc.strerror}") from None
            self._by_process[process] = self.watched[watched.fd] = watched
            self._poll.register(watched.fd, select.POLLIN)
        watch = Watch(self, process, on_end)
        watched.watches.append(watch)
        return watch

    def look(self) -> None:
        """Before a verb is carried out: a process that had ended when it was sent no longer holds anything. (The
        loop's poll may have found the verb alone.)"""
        if self.watched:
            self.ended([fd for fd, _ in self._poll.poll(0)])

    def ended(self, fds: Iterable[int]) -> None:
        """These pidfds have become readable. Each that is watched is told, also when one of them fails; the first
        failure is raised then."""
        failure: Exception | None = None
        for fd in fds:
            watched = self.watched.get(fd)
            while watched is not None and watched.watches:
                watch = watched.watches[0]
                watch.close()       # the last one closes the descriptor too
                try:
                    watch.on_end()
                except Exception as exc:
                    failure = failure or exc
        if failure is not None:
            raise failure

    def _drop(self, watch: Watch) -> None:
        watched = self._by_process.get(watch.process)
        if watched is None or watch not in watched.watches:
            return
        watched.watches.remove(watch)
        if not watched.watches:
            del self._by_process[watch.process], self.watched[watched.fd]
            self._poll.unregister(watched.fd)
            os.close(watched.fd)

    def close(self) -> None:
        for watched in list(self.watched.values()):
            for watch in list(watched.watches):
                watch.close()


class Hold(msgspec.Struct):
    """One thing that one process has. ``token`` names it, made up by who asks, so that a verb may be repeated;
    ``why`` is for people: what it does with it."""

    token: str
    why: str
    owner: ProcessId

    @property
    def who(self) -> str:
        return f"{self.why} (pid {self.owner.pid})"


H = TypeVar("H", bound=Hold)


class Held(Generic[H]):
    """Things of one kind that processes have, by token, in the order in which they came. ``gone`` is called with
    each whose process has ended, when it is out of the list."""

    def __init__(self, owners: Owners, gone: Callable[[H], None]) -> None:
        self._owners = owners
        self._gone = gone
        self._holds: dict[str, tuple[H, Watch]] = {}

    def __iter__(self) -> Iterator[H]:
        return iter([hold for hold, _ in self._holds.values()])

    def __len__(self) -> int:
        return len(self._holds)

    def get(self, token: str) -> H | None:
        found = self._holds.get(token)
        return found[0] if found else None

    def add(self, hold: H) -> bool:
        """False: it is there already (the verb was repeated). Raises VmmError when its process is not there, or the
        token is another's."""
        there = self.get(hold.token)
        if there is not None:
            if there.owner != hold.owner:
                raise VmmError(f"token '{hold.token}' is already held by {there.who}")
            return False
        if not 0 < len(hold.token) <= _TOKEN_MAX:
            raise VmmError(f"a token must have 1 to {_TOKEN_MAX} characters")
        try:
            self._put(hold)
        except ProcessLookupError:
            raise unseen(hold.owner) from None
        return True

    def pop(self, token: str) -> H | None:
        """Given back; None when there is none of that token (any more)."""
        found = self._holds.pop(token, None)
        if found is None:
            return None
        found[1].close()
        return found[0]

    def adopt(self, holds: Iterable[H]) -> list[H]:
        """As a coordinator that died has left them; those whose process has gone meanwhile, which are not taken."""
        gone = []
        for hold in holds:
            try:
                self._put(hold)
            except ProcessLookupError:
                gone.append(hold)
        return gone

    def _put(self, hold: H) -> None:
        self._holds[hold.token] = hold, self._owners.watch(hold.owner, lambda: self._ended(hold))

    def _ended(self, hold: H) -> None:
        if self.get(hold.token) is hold:
            del self._holds[hold.token]
            self._gone(hold)


def unseen(process: ProcessId) -> VmmError:
    """For a request to hold something for a process that is not there."""
    return VmmError(f"nothing can be held for process {process.pid or '(unknown)'}: the machine's coordinator "
                    "cannot identify it (it has ended, or runs in another PID or time namespace)")
