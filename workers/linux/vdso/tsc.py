"""The processor's time stamp counter, and what the clocks say at one of its values."""

from __future__ import annotations

import ctypes
import errno
import mmap
import platform
from collections.abc import Callable
from dataclasses import dataclass

from ipc.linux.libc import LIBC, check

__all__ = ["INTERVAL", "SHIFT", "Rate", "Sample", "counter"]

#: Rates are nanoseconds a step, in units of 2^-32.
SHIFT = 32

#: mfence; lfence; rdtsc; lfence; shl $32, %rdx; or %rdx, %rax; ret
_CODE = bytes.fromhex("0faef0 0faee8 0f31 0faee8 48c1e220 4809d0 c3")
_PAGE = 4096
_TRIES = 8

_MILLISECOND = 10**6
#: Over which the rate is measured at least, and at most; and how long one holds: as long as it was measured, within
#: these. Nanoseconds.
_SHORTEST, _LONGEST = 10 * _MILLISECOND, 60_000 * _MILLISECOND
_SOON, INTERVAL = 100 * _MILLISECOND, 1000 * _MILLISECOND


def counter() -> Callable[[], int]:
    """Reads it, when all that was stored before can be seen. Raises OSError where there is none, or no code may be
    made."""
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, "")
    memory = mmap.mmap(-1, _PAGE)
    memory.write(_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    check(LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(_PAGE), mmap.PROT_READ | mmap.PROT_EXEC))
    function = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    function.memory = memory        # type: ignore[attr-defined]    # as long as the function
    return function


@dataclass(frozen=True, slots=True)
class Sample:
    """What the clocks said, in nanoseconds, when the counter was ``tsc``."""

    tsc: int
    monotonic: int
    realtime: int


class Rate:
    """Of the counter that ``tsc`` reads, against clocks in nanoseconds. It is measured over the longest time, but not
    for ever: clocks are set right by changing their own rate (adjtimex(2))."""

    def __init__(self, tsc: Callable[[], int], monotonic: Callable[[], int], realtime: Callable[[], int]) -> None:
        self.tsc, self._monotonic, self._realtime = tsc, monotonic, realtime
        self._first = self._anchor = self._last = self._take()
        self._due = self._first.monotonic + _SHORTEST

    @property
    def due(self) -> int:
        """Nanoseconds until it can be measured again."""
        return self._due - self._monotonic()

    def measure(self) -> tuple[Sample, int]:
        """(now, rate), once it is due."""
        sample = self._take()
        if sample.monotonic - self._anchor.monotonic > _LONGEST:
            self._anchor = self._last
        self._last = sample
        self._due = sample.monotonic + min(INTERVAL, max(_SOON, sample.monotonic - self._first.monotonic))
        passed, steps = sample.monotonic - self._anchor.monotonic, sample.tsc - self._anchor.tsc
        return sample, (passed << SHIFT) // max(1, steps)

    def _take(self) -> Sample:
        """The best of some tries: this process can lose the processor at any time."""
        monotonic, tsc = _closest(self._monotonic, self.tsc)
        realtime, then = _closest(self._realtime, self._monotonic)
        return Sample(tsc, monotonic, realtime - then + monotonic)


def _closest(clock: Callable[[], int], around: Callable[[], int]) -> tuple[int, int]:
    """What a clock says, and the middle of what another one does before and after that."""
    tries = []
    for _ in range(_TRIES):
        before, found, after = around(), clock(), around()
        tries.append((after - before, found, (before + after) // 2))
    _, found, middle = min(tries)
    return found, middle
