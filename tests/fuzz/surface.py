"""What is tried on a reader: an input, what it may not do, and what came of it.

A hook of the interpreter's auditing sees what is done. It cannot be removed, so it heeds only what comes between the
two ends of a ``watched``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, settings

__all__ = ["SHORT", "Surface"]

SECONDS = 5.0           # of processor time that an input may take
MEMORY = 64 << 20       # bytes that a reader may have at once

#: Inputs per test, without --fuzz.
SHORT = 40
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod",
            "shutil.rmtree", "subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "os.system",
            "socket.connect", "socket.bind"}


class Guard:
    """``allowed``: the folder in which files may be changed; None: nobody is watched."""

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        if (writes or event in _CHANGES) and not str(arguments[0]).startswith((self.allowed, "/dev/kvm")):
            self.seen.append(f"{event} {arguments[:2]}")


GUARD = Guard()
sys.addaudithook(GUARD.hook)


class TooSlow(Exception):
    """An input took longer than SECONDS."""


class Surface:
    """What is tried on one reader, counted."""

    def __init__(self, folder: Path, inputs: int) -> None:
        self.folder, self.inputs = folder, inputs
        self.counts: Counter[str] = Counter()
        self.began = time.monotonic()
        self.seconds = SECONDS

    @contextlib.contextmanager
    def longer(self, seconds: float) -> Iterator[None]:
        """An input that is as large as it may be takes its time."""
        before, self.seconds = self.seconds, seconds
        try:
            yield
        finally:
            self.seconds = before

    def settings(self, share: int = 1) -> settings:
        """``share``: of a test that is so many times slower than others."""
        return settings(max_examples=max(10, self.inputs // share), deadline=None, database=None,
                        suppress_health_check=list(HealthCheck))

    def read(self, reader: Callable[[], object], *refusals: type[Exception], lines: bool = False) -> None:
        """It is read, or refused with one of these, in one line (``lines``: one for each fault in it).
        Whatever else it raises fails the test."""
        with watched(str(self.folder), self.seconds), bounded(MEMORY):
            try:
                reader()
            except refusals as error:
                hungry = isinstance(origin(error), MemoryError)
                text = str(error)
                self.counts["refused"] += 1
            else:
                hungry, text = False, "taken"
                self.counts["taken"] += 1
        assert not hungry, text
        assert text.strip()
        assert all(line.isprintable() for line in text.split("\n")), text
        assert lines or "\n" not in text


def origin(error: BaseException) -> BaseException:
    """What was raised first."""
    while error.__context__ is not None:
        error = error.__context__
    return error


@contextlib.contextmanager
def bounded(size: int) -> Iterator[None]:
    """No more memory than so many bytes beside what there is: MemoryError in what takes more."""
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextlib.contextmanager
def watched(folder: str, seconds: float) -> Iterator[None]:
    """In the main thread. ``seconds``: of processor time, for the host may be busy."""
    def late(signum: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    # What waits, or is in compiled code, which no signal's handler ends.
    faulthandler.dump_traceback_later(20 * seconds, exit=True)
    GUARD.allowed, GUARD.seen = folder, []
    try:
        yield
    finally:
        GUARD.allowed = None
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert not GUARD.seen, GUARD.seen
