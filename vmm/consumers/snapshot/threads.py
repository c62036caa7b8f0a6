"""Pages are read, checked and packed in several threads: what takes the time is the kernel's, XXH3's and zstd's, and
none of them holds Python's lock.

Where pages are only copied, one thread is as fast: a file is written by one at a time, and where the host has other
work, a second that waits for it costs more than it brings (docs/benchmarks.md).
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

__all__ = ["THREADS", "Progress", "behind", "in_order", "in_threads"]

Progress = Callable[[int, int], None]       # (pages done, pages in all)

#: More do not help: one file is written by one at a time.
THREADS = min(4, len(os.sched_getaffinity(0)))

_LOOK_EVERY = 0.1       # seconds between two looks at how far they are

_T = TypeVar("_T")
_R = TypeVar("_R")
_S = TypeVar("_S")


def behind(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    """Of a part of the work, as ``done``: so many pages of ``total`` were done before it."""
    return lambda count: progress(before + count, total)


def in_threads(items: Sequence[_T], scratch: Callable[[], _S], work: Callable[[_T, _S], int],
               done: Callable[[int], None] = lambda count: None, *, threads: int = THREADS) -> int:
    """``work`` on every item, in any order; ``scratch`` is made once for each of ``threads``. ``done`` is told by the
    calling thread, time and again and at the end, the sum of what ``work`` has returned, which is returned. Raises
    what ``work`` raises first, when every thread has come to rest; a KeyboardInterrupt too."""
    counter, over = itertools.count(), False
    sums = [0] * threads

    def run(number: int) -> None:
        own = scratch()
        while not over and (at := next(counter)) < len(items):
            sums[number] += work(items[at], own)

    with ThreadPoolExecutor(threads) as pool:
        try:
            running = [pool.submit(run, number) for number in range(min(threads, len(items)))]
            while running and wait(running, _LOOK_EVERY, FIRST_EXCEPTION).not_done:
                for each in running:
                    if each.done():
                        each.result()
                done(sum(sums))
            for each in running:
                each.result()
        finally:
            over = True
    done(sum(sums))
    return sum(sums)


def in_order(items: Sequence[_T], scratch: Callable[[], _S], work: Callable[[_T, _S], _R]) -> Generator[_R, None, None]:
    """What ``work`` returns for each item, in their order, a few items ahead of whoever takes it. Raises what it
    raises."""
    free = deque(scratch() for _ in range(THREADS))

    def run(item: _T) -> _R:
        own = free.popleft()        # as many as there are threads
        try:
            return work(item, own)
        finally:
            free.append(own)

    with ThreadPoolExecutor(THREADS) as pool:
        ahead: deque[Future[_R]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(run, item))
                if len(ahead) > 4 * THREADS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for each in ahead:
                each.cancel()
