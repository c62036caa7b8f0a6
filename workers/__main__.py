"""``python -m workers FD``: read a WorkerSpec (JSON) from the inherited descriptor FD and run it."""

from __future__ import annotations

import os
import sys

from ipc.messages import MessageError, decode_spec

from .worker import main

if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "rb") as pipe:
        text = pipe.read()
    try:
        spec = decode_spec(text)
    except MessageError as exc:
        sys.exit(f"vcpu worker: {exc}")
    sys.exit(main(spec))
