"""``python -m vmm.consumers.migration.recoverer NAME``: finishes the migration of a machine whose source was killed
after the hand-over. The coordinator starts it (vmm/coordinator/recovery.py)."""

from __future__ import annotations

import sys

from ...client.machine import Machine
from ...errors import VmmError
from .source import recover
from .status import save_status

__all__ = ["main"]


def main(name: str) -> int:
    """The exit status."""
    try:
        with Machine.attach(name) as machine:
            recover(machine, progress=save_status)
    except VmmError as exc:
        print(f"vmm: error: machine '{name}': its migration is not finished: {exc}", file=sys.stderr)
        return int(exc.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
