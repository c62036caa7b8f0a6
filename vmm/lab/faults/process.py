"""A ``vmm`` that the campaign runs and a fault may hit; and how it waits."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from ipc.run import python_module

from ...errors import VmmError

__all__ = ["PATIENCE", "Process", "until"]

PATIENCE = 60.0             # seconds for whatever is to come about
_LOOK_EVERY = 0.02


class Process:
    """A ``vmm`` of its own; what it says goes into a file. ``with`` it: nothing of it is left."""

    def __init__(self, path: Path, *arguments: str) -> None:
        self._path = path
        with open(path, "wb") as out:
            self._process = subprocess.Popen(python_module("vmm", *arguments), stdin=subprocess.DEVNULL, stdout=out,
                                             stderr=out, start_new_session=True)
        self.pid = self._process.pid

    @property
    def said(self) -> str:
        return self._path.read_text(errors="replace").strip()

    @property
    def over(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> int:
        """Its exit status. Raises VmmError."""
        try:
            return self._process.wait(3 * PATIENCE)        # a target that is silent is given a minute
        except subprocess.TimeoutExpired:
            raise VmmError(f"{self._path.suffix[1:]} has not ended: {self.said}") from None

    def end(self) -> None:
        """As a person does, with Ctrl-C's cousin."""
        if not self.over:
            self._process.send_signal(signal.SIGTERM)
        self.wait()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()


def until(condition: Callable[[], bool], what: str) -> None:
    """Raises VmmError."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise VmmError(f"not within {PATIENCE:.0f} s: {what}")
        time.sleep(_LOOK_EVERY)
