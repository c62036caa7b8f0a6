"""Processes that hold something of the machine: it goes when they do.

A holder is watched by its pidfd, so that a pid which is used again is never mistaken for it. The loop polls all of
them and calls back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

__all__ = ["Owner", "Owners"]


class Owner:
    """One process that holds one thing; ``close`` it when the thing is given back. ``pid`` in this namespace."""

    def __init__(self, owners: Owners, pid: int, on_end: Callable[[], None]) -> None:
        """Raises ProcessLookupError."""
        self.pid = pid
        self.on_end = on_end
        self.fd = os.pidfd_open(pid)
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

    def watch(self, pid: int, on_end: Callable[[], None]) -> Owner:
        """``on_end`` is called once that process has ended, unless the owner was closed before. Raises
        ProcessLookupError when there is no such process."""
        return Owner(self, pid, on_end)

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
