"""``python -m ipc.run MODULE ARGUMENT...``: how a process of this program begins and ends.

``MODULE.main(arguments)`` gives the exit status. What an import makes stays, so the collector is off until MODULE and
all that it imports is there, and never looks at it again: it would find no garbage, which takes a fifth of the
imports' time. At the end
what was printed is written, and the process is gone: Python's own way out would take all modules apart first.
(``main`` has closed what it had by then; the kernel does the rest.)
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import traceback

__all__ = ["main", "own_process", "python_module"]


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


if __name__ == "__main__":
    code = main(sys.argv[1], sys.argv[2:])
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:      # it was closed when this process began
            with contextlib.suppress(OSError, ValueError):      # nobody reads it
                stream.flush()
    os._exit(code)
