"""``python -m ipc.run MODULE ARGUMENT...``: how a process of this program begins and ends.

``MODULE.main(arguments)`` gives the exit status. What an import makes stays, so the collector is off until MODULE and
all that it imports is there, and never looks at it again: it would find no garbage, which takes a fifth of the
imports' time. At the end
what was printed is written, and the process is gone: Python's own way out would take all modules apart first.
(``main`` has closed what it had by then; the kernel does the rest.)

`Fork` is the same without a new interpreter: what this process has imported is there already, which saves a third of a
second of processor time where a few processes begin together. It is for a process that has one thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Collection, Sequence
from typing import NoReturn

__all__ = ["Fork", "main", "own_process", "python_module"]


def own_process(module: str, *arguments: str) -> list[str]:
    """The command line for ``module.main(arguments)`` in a process."""
    return python_module("ipc.run", module, *arguments)


def python_module(module: str, *arguments: str) -> list[str]:
    """The command line for a module that is a program by itself. ``-P``: the current directory is not looked into
    for modules. It is the user's, and may hold a numpy.py, or a folder called ipc."""
    return [sys.executable, "-P", "-m", module, *arguments]


def main(module: str, arguments: list[str]) -> int:
    """The exit status; 1 for an exception, which is printed."""
    gc.disable()
    try:
        work = importlib.import_module(module).main
        gc.freeze()
        gc.enable()
        return int(work(arguments))
    except Exception:
        traceback.print_exc()
        return 1


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:      # it was closed when this process began
            with contextlib.suppress(OSError, ValueError):      # nobody reads it
                stream.flush()
    os._exit(code)


class Fork:
    """A child in which ``module.main(arguments)`` runs; its methods are those of subprocess.Popen. It has ``streams``
    (standard input, output, error) and ``keep`` of the descriptors, and no handlers of signals."""

    def __init__(self, module: str, *arguments: str, shown: Sequence[str], streams: Sequence[int],
                 keep: Collection[int], session: bool = False) -> None:
        """``shown``: what others see as its command line, behind ``module``. ``session``: it has one of its own.
        Raises OSError."""
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            _begin(streams, keep, session)
            from .linux.process import set_command_line

            set_command_line([module, *shown])
            code = main(module, list(arguments))
        except BaseException:       # the frames above are the parent's
            traceback.print_exc()
        _leave(code)

    def poll(self) -> int | None:
        """The return code (negative: the signal that killed it), once it has ended."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        code = self._wait(0)
        assert code is not None
        return code

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:       # somebody else has waited for it
                self.returncode = 0
            else:
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _begin(streams: Sequence[int], keep: Collection[int], session: bool) -> None:
    """As a new process would be."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if session:
        os.setsid()
    for at, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, len(streams)) for fd in streams]):
        os.dup2(fd, at)
    sys.stdin = os.fdopen(0, closefd=False)     # there is none where it was closed
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    for each in os.listdir("/proc/self/fd"):
        if int(each) >= len(streams) and int(each) not in keep:
            with contextlib.suppress(OSError):      # that of the listing itself
                os.close(int(each))


if __name__ == "__main__":
    _leave(main(sys.argv[1], sys.argv[2:]))
