"""Channels of pages end when they are told to, also after a signal has interrupted whoever gives them work."""

from __future__ import annotations

import inspect
import socket
import sys
import threading
from types import FrameType
from typing import Any

import pytest
from machines import until

from vmm.consumers.migration.channels import Channels
from vmm.consumers.migration.streams import Stream


class Interrupt(Exception):
    """What a handler of a signal throws."""


def throw_in_notify(frame: FrameType, event: str, argument: Any) -> Any:
    """When a waiter of a condition was woken, and is about to be struck out."""
    if frame.f_code is threading.Condition.notify.__code__ and event == "line":
        lines, first = inspect.getsourcelines(threading.Condition.notify)
        if "waiters.remove(" in lines[frame.f_lineno - first]:
            sys.settrace(None)
            raise Interrupt
    return throw_in_notify


def test_they_end_after_an_interrupt_in_the_middle_of_a_put() -> None:
    """One ``notify`` goes to somebody who does not wait any more then; the other channel slept for ever."""
    pairs = [socket.socketpair() for _ in range(3)]
    channels = Channels([Stream(here) for here, _ in pairs], "token", "none", 0.0, lambda message, size: None,
                        sums=False)
    waiting = channels._jobs.not_empty._waiters         # type: ignore[attr-defined]
    until(lambda: len(waiting) == 2, "both channels wait for work")
    job: Any = object()         # of which nothing can be sent
    before = sys.gettrace()
    try:
        sys.settrace(throw_in_notify)
        with pytest.raises(Interrupt):
            channels.put(job, 1.0)
    finally:
        sys.settrace(before)
    until(lambda: len(waiting) == 3, "both wait again, and one who does not is before them")
    closing = threading.Thread(target=channels.close, daemon=True)
    closing.start()
    closing.join(10.0)
    try:
        assert not closing.is_alive()
    finally:
        with channels._jobs.mutex:
            channels._jobs.not_empty.notify_all()
        closing.join(10.0)
        for _, there in pairs:
            there.close()
