"""Looking at a word of shared memory before sleeping on it, and what keeps the order of looking and telling."""

from __future__ import annotations

import threading
import time
from itertools import repeat

__all__ = ["Spin", "fence"]

#: Seconds of looking before somebody sleeps: as long as an answer takes and two switches of processes.
_PATIENCE = 160e-6
#: Looks between two looks at the clock, at 20 to 40 ns each.
_LOOKS = 100
#: How often in a row it is not tried after it was of no use, at most.
_PAUSE_MAX = 127

_lock = threading.Lock()


def fence() -> None:
    """No load behind this is made before a store in front of it: a lock is taken with a locked instruction."""
    _lock.acquire()
    _lock.release()


class Spin:
    """Looking for a while before sleeping, which costs two switches of processes. Where that was of no use (because the
    other side takes long, or has no processor to run on) it is not tried the next time, or the next 3, 7, ... times:
    a few short looks would never find out that it pays again."""

    def __init__(self, patience: float = _PATIENCE) -> None:
        """``patience``: seconds."""
        self._patience = int(patience * 1e9)
        self._pause = self._left = 0

    def until(self, word: memoryview, value: int) -> bool:
        """The word (of 32 bits, the first of the view) has this value, or a higher one."""
        if self._left:
            self._left -= 1
            return word[0] >= value
        end = time.perf_counter_ns() + self._patience
        while time.perf_counter_ns() < end:
            for _ in repeat(None, _LOOKS):
                if word[0] >= value:
                    self._pause = 0
                    return True
        return self._in_vain()

    def until_not(self, word: memoryview, value: int) -> bool:
        """It has another."""
        if self._left:
            self._left -= 1
            return word[0] != value
        end = time.perf_counter_ns() + self._patience
        while time.perf_counter_ns() < end:
            for _ in repeat(None, _LOOKS):
                if word[0] != value:
                    self._pause = 0
                    return True
        return self._in_vain()

    def _in_vain(self) -> bool:
        self._pause = self._left = min(2 * self._pause + 1, _PAUSE_MAX)
        return False
