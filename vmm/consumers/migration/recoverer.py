"""``vmm.consumers.migration.recoverer NAME`` (ipc/run.py): finishes the migration of a machine whose source was killed
after the hand-over. The coordinator starts it (vmm/coordinator/recovery.py)."""

from __future__ import annotations

import sys

from ipc.steps import step

from ...client.machine import Machine
from ...errors import VmmError
from .source import recover

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """The exit status."""
    name = argv[0]
    step("recoverer-begun")
    try:
        with Machine.attach(name) as machine:
            recover(machine)
    except VmmError as exc:
        print(f"vmm: error: machine '{name}': its migration could not be finished: {exc}", file=sys.stderr)
        return int(exc.exit_code)
    return 0
