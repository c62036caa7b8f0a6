"""``vmm.consumers.migration.guard NAME FD`` (ipc/run.py): does the rest of an upgrade (upgrade.py) whose process was
killed when the machine had new processes, and not its name. It is begun beforehand, and with what that process may do:
what a coordinator begins may do less (docs/decisions/0017)."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from types import TracebackType

from ipc.run import Fork, own_process
from ipc.steps import step

from ...client.machine import Machine
from ...errors import VmmError
from ...machine.names import between_name
from ...machine.runtime import is_running

__all__ = ["Guard", "main"]

_MODULE = "vmm.consumers.migration.guard"
_DONE = b"1"
_LOOK_EVERY = 0.02


class Guard:
    """The process, for as long as the ``with`` takes."""

    def __init__(self, name: str) -> None:
        read, write = os.pipe2(os.O_CLOEXEC)
        self._pipe = io.FileIO(write, "w")
        words = (name, str(read))
        self._process: subprocess.Popen[bytes] | Fork
        with io.FileIO(read, "r"), open(os.devnull, "r+b") as null:
            if threading.active_count() == 1:
                self._process = Fork(_MODULE, *words, shown=[name], keep=(read,), session=True,
                                     streams=(null.fileno(), null.fileno(), 2))
            else:
                self._process = subprocess.Popen(own_process(_MODULE, *words), stdin=null, stdout=null,
                                                 pass_fds=(read,), start_new_session=True)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 tb: TracebackType | None) -> None:
        with self._pipe:
            try:
                self._pipe.write(_DONE)
            except BrokenPipeError:     # it was killed
                pass
        self._process.wait()


def main(argv: list[str]) -> int:
    """The exit status."""
    name, fd = argv[0], int(argv[1])
    if os.read(fd, 1) == _DONE:
        return 0
    step("upgrade-guard")
    try:
        if _is_between(between_name(name)):
            from .upgrade import finish

            finish(name)
    except VmmError as exc:
        print(f"vmm: error: {exc}", file=sys.stderr)
        return int(exc.exit_code)
    return 0


def _is_between(between: str) -> bool:
    """The machine has new processes. Waits until that is decided: they go if they have not begun to run it."""
    while is_running(between):
        try:
            with Machine.attach_pinned(between) as machine:
                if machine.status()["state"] in ("running", "paused"):
                    return True
        except VmmError:
            pass        # it has just begun, or is going
        time.sleep(_LOOK_EVERY)
    return False
