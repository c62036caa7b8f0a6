"""``python -m workers FD``: read a WorkerSpec (JSON) from the inherited descriptor FD and run it."""

from __future__ import annotations

import os
import sys

from ipc.messages import MessageError, decode_spec
from ipc.sandbox import VcpuConfinement

from .process import main

__all__ = ["run"]


def run(fd: int, confinement: VcpuConfinement | None = None) -> int:
    """One worker, from its specification in this pipe to its end; the exit status. ``confinement``: as in `main`."""
    with os.fdopen(fd, "rb") as pipe:
        text = pipe.read()
    try:
        spec = decode_spec(text)
    except MessageError as exc:
        print(f"vcpu worker: {exc}", file=sys.stderr)
        return 1
    return main(spec, confinement)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1])))
