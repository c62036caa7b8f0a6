"""Entry point of ``vmm``. It imports next to nothing, so that whoever interrupts the program while it loads the
rest of itself sees no traceback, and takes care of standard output, which may be full or not be read any more."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import signal
import sys
from types import FrameType

__all__ = ["main"]


_ALLOCATIONS = 50_000       # between two collections: more than the imports of most verbs make


class _Lost(BaseException):
    """Standard output cannot be written. No error of the program's: whoever handles those lets it through."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror)
        self.errno = error.errno


class _StandardOutput(io.FileIO):
    """Descriptor 1. Its errors are told from those of every other file."""

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as exc:
            raise _Lost(exc) from None


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)      # nothing has been begun


def main() -> None:
    """Every expected error is one line on standard error and an exit status."""
    _occupy_standard()
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler    # else it is ignored: so be it
    if interruptible:
        signal.signal(signal.SIGINT, _leave)
    gc.disable()        # it would find no garbage in what an import makes, and takes a fourth of its time (ipc/run.py)
    from ..errors import ExitCode
    from .commands import run

    gc.freeze()
    gc.set_threshold(_ALLOCATIONS)
    gc.enable()
    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _replace_stdout()
    try:
        code = run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except _Lost as exc:
        # Nothing more can be said there; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 128 + signal.SIGPIPE     # whoever read it has gone, and knows
        if exc.errno != errno.EPIPE:
            code = ExitCode.OUTPUT
            with contextlib.suppress(OSError):
                print(f"vmm: error: standard output: cannot be written: {exc}", file=sys.stderr)
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            sys.stderr.flush()
    os._exit(code)      # Python's own way out would take all modules apart first (ipc/run.py)


def _occupy_standard() -> None:
    """A standard stream that is closed leaves its number to something else, which the processes of a machine would not
    inherit under it."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _replace_stdout() -> None:
    if sys.stdout is None:      # it was closed: nothing is written there
        return
    there = sys.stdout
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_StandardOutput(1, "wb", closefd=False)), encoding=there.encoding,
        errors="surrogateescape", line_buffering=there.isatty())
