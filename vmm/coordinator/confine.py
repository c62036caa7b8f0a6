"""The files that keeper and coordinator can still reach once a machine runs (ipc/sandbox.py)."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ipc.sandbox import SandboxError, confine_machine

from ..errors import VmmError
from ..machine.records import state_root
from ..machine.runtime import runtime_root

__all__ = ["confine"]


def confine(image: str, replay_trace: str, trace_file: str) -> None:
    """Those of the specification (absolute paths, or empty), and the directories of machines. Before any thread is
    made. Raises VmmError."""
    write = [runtime_root()]
    with contextlib.suppress(OSError):      # no home directory: nothing is kept of the machine
        write.append(state_root())
    if trace_file:
        write.append(Path(trace_file) if Path(trace_file).exists() else Path(trace_file).parent)
    try:    # the last machine takes the runtime root along
        confine_machine([Path(path) for path in (image, replay_trace) if path], write, runtime_root().parent)
    except SandboxError as exc:
        raise VmmError(str(exc)) from None
