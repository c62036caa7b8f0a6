"""``python -m vmm.coordinator``: started by the keeper (vmm/keeper.py)."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

import msgspec

from ipc import process
from ipc.shm import SegmentError
from workers.zygote import Zygote

from ..errors import ExitCode, VmmError
from ..rules import check_machine
from ..runtime import adopt_claim, machine_dir, release
from ..spec import MachineSpec, decode_spec
from .loop import Coordinator


def _answer(status_fd: int, **fields: Any) -> None:
    """One JSON line to whoever launches the machine (it may have gone)."""
    try:
        os.write(status_fd, msgspec.json.encode(fields) + b"\n")
        os.close(status_fd)
    except OSError:
        pass


def main(argv: list[str]) -> int:
    """``python -m vmm.coordinator STATUS_FD KEEPER_FD KEEPER_PID ZYGOTE_FD CLAIM_FD``; the specification is on
    standard input. ZYGOTE_FD is -1 for one that takes over from another: the workers are there."""
    status_fd, keeper_fd, keeper_pid, zygote_fd, claim_fd = (int(a) for a in argv[:5])
    process.set_name("vmm-coordinator")
    process.set_time_slice(process.SERVICE_SLICE)
    process.die_with_parent(signal.SIGTERM, keeper_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = decode_spec(sys.stdin.buffer.read())
    taken = adopt_claim(spec.name, claim_fd)
    try:
        return _run(spec, status_fd, keeper_fd, zygote_fd)
    finally:
        if os.getppid() != keeper_pid:      # it was killed, and cannot do it any more
            release(taken)


def _run(spec: MachineSpec, status_fd: int, keeper_fd: int, zygote_fd: int) -> int:
    """The machine from here to its end; the exit status."""
    coordinator: Coordinator | None = None

    def early_stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, early_stop)
    try:
        check_machine(spec)
        coordinator = Coordinator(spec, machine_dir(spec.name), keeper_fd,
                                  Zygote(zygote_fd) if zygote_fd >= 0 else None)
    except (VmmError, SegmentError) as exc:
        _answer(status_fd, error=str(exc), code=int(getattr(exc, "exit_code", ExitCode.BAD_INPUT)))
        return int(getattr(exc, "exit_code", ExitCode.BAD_INPUT))
    coordinator.catch_signals()
    try:
        _answer(status_fd, ready=True, pid=os.getpid())
        return coordinator.run()
    except VmmError as exc:
        print(f"vmm: error: machine '{spec.name}': {exc}", file=sys.stderr)
        return int(exc.exit_code)
    finally:
        coordinator.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
