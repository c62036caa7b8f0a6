"""Signals that end a command: a handler that raises, and is heard.

Python runs handlers between any two steps of the main thread, those of a destructor too, and an exception that leaves
a destructor is printed and forgotten. There the signal has to come once more."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["raise_on"]

_AGAIN = 0.01       # seconds


def raise_on(signum: int, exception: Callable[[int], BaseException]) -> None:
    """From now on the signal raises ``exception(signum)`` in the main thread."""
    def handler(number: int, frame: FrameType | None) -> None:
        if _in_destructor(frame):
            timer = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()
            return
        raise exception(number)

    signal.signal(signum, handler)


def _in_destructor(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
