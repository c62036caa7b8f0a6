"""Processes that hold something of the machine: it goes when they do.

A holder is watched by its pidfd, and written down with its start time (ipc/process.py): a pid that is used again is
never mistaken for it, by this coordinator or by the next. The loop polls all of them and calls back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from ipc.process import ProcessId, open_process

__all__ = ["Owner", "Owners"]


class Owner:
    """One process that holds one thing; ``close`` it when the thing is given back. ``process``: who it is."""

    def __init__(self, owners: Owners, who: int | ProcessId, on_end: Callable[[], None]) -> None:
        """Raises ProcessLookupError."""
        self.fd, self.process = open_process(who)
        self.on_end = on_end
        self._owners = owners
        owners.watched[self.fd] = self

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            del self._owners.watched[self.fd]
            os.close(self.fd)
            self.fd = -1


class Owners:
    """All of a machine's, for the loop's poll."""

    def __init__(self) -> None:
        self.watched: dict[int, Owner] = {}

    def watch(self, who: int | ProcessId, on_end: Callable[[], None]) -> Owner:
        """``who``: a pid of this namespace, or a process as it was written down. ``on_end`` is called once it has
        ended, unless the owner was closed before. Raises ProcessLookupError when there is no such process."""
        return Owner(self, who, on_end)

    def ended(self, fds: Iterable[int]) -> None:
        """These pidfds have become readable."""
        for fd in fds:
            owner = self.watched.get(fd)    # an earlier one's end may have closed it
            if owner is not None:
                owner.close()
                owner.on_end()

    def close(self) -> None:
        for owner in list(self.watched.values()):
            owner.close()
