"""The coordinator's beginning and end: started by the keeper (vmm/coordinator/keeper.py).

It tells the keeper, in lines of JSON, ``{"ready": true}`` or ``{"error": …, "code": n}``; and, once it is decided
that the machine ends, ``{"done": exit status}``, before anything is torn down. A coordinator that ends without that
last line has failed, however it ended: the machine keeps running, and another one takes over.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec

from ipc.linux import process
from ipc.shm import Segment, SegmentError
from ipc.steps import step
from workers.zygote import Zygote

from ..errors import ExitCode, VmmError
from ..machine.log import log_to_keeper
from ..machine.names import slot_segment
from ..machine.rules import check_machine
from ..machine.runtime import adopt_claim, machine_dir, release
from ..machine.spec import MachineSpec, decode_spec
from . import STOP_TIMEOUT
from .confine import confine

if TYPE_CHECKING:
    from .loop import Coordinator

_log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """``vmm.coordinator.entry STATUS_FD KEEPER_FD KEEPER_PID ZYGOTE_FD CLAIM_FD TERMINAL_FD``; the
    specification is on standard input. ZYGOTE_FD is -1 for one that takes over from another: the workers are there.
    TERMINAL_FD: for trace events without a file."""
    status_fd, keeper_fd, keeper_pid, zygote_fd, claim_fd, terminal_fd = (int(a) for a in argv[:6])
    process.set_name("vmm-coordinator")
    process.set_time_slice(process.SERVICE_SLICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _early_stop)
    taken, code = None, ExitCode.STOPPED
    coordinator: Coordinator | None = None
    try:
        process.die_with_parent(signal.SIGTERM, keeper_pid)
        log_to_keeper("coordinator")
        faulthandler.enable()
        spec = decode_spec(sys.stdin.buffer.read())
        taken = adopt_claim(spec.name, claim_fd)
        if zygote_fd >= 0:      # one that takes over has it from the keeper
            check_machine(spec)
            _begin_memory(spec)
            if spec.incoming:
                Segment.settle()
                _tell(status_fd, memory=True)
        from .loop import Coordinator  # numpy and much else, while the memory is being made

        if zygote_fd >= 0:
            _compile_loops()
            if spec.program is None:
                Segment.settle()        # else it is awaited before the program starts (loop.py)
            confine(spec.image, spec.replay_trace, spec.trace_file)
        coordinator = Coordinator(spec, machine_dir(spec.name), keeper_fd,
                                  Zygote(zygote_fd) if zygote_fd >= 0 else None, terminal_fd)
        _tell(status_fd, ready=True)
        code = ExitCode(coordinator.run())
    except SystemExit:      # SIGTERM, before the loop could heed it
        pass
    except Exception as exc:
        if coordinator is not None or zygote_fd < 0:
            _log.exception("the coordinator failed: another one will take over")
            os._exit(ExitCode.BUG)      # the machine is not torn down
        code = _not_made(exc, status_fd)
    _tell(status_fd, done=int(code))
    step("done-said")
    if coordinator is not None:
        coordinator.close()
    if taken is not None and os.getppid() != keeper_pid:    # it was killed, and can no longer do it
        release(taken)
    return code


def _begin_memory(spec: MachineSpec) -> None:
    """It is reserved, which takes longer than all else that the kernel has to do."""
    if spec.can.guests:
        for slot in spec.slots:
            Segment.begin(slot_segment(spec.name, "ram", slot), slot.size, reserve=not spec.incoming,
                          link=spec.links.get(slot.id, ""))


def _compile_loops() -> None:
    """Where that has not been done: once confined, no coordinator can keep what it compiles."""
    from ipc.compiled import kept

    if not kept.is_kept(*kept.LOOPS):
        from ipc.compiled import calls  # noqa: F401  (once it is imported, it is compiled)


def _early_stop(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)       # one is enough
    signal.alarm(STOP_TIMEOUT)
    raise SystemExit(128 + signum)


def _not_made(exc: Exception, status_fd: int) -> ExitCode:
    """The machine could not be created; the exit status."""
    if isinstance(exc, VmmError):
        text, code = str(exc), exc.exit_code
    elif isinstance(exc, SegmentError):
        text, code = str(exc), ExitCode.BAD_INPUT
    elif isinstance(exc, OSError):
        text, code = f"cannot create the machine: {exc}", ExitCode.BAD_INPUT
    else:
        _log.exception("cannot create the machine")
        text, code = f"cannot create the machine: {type(exc).__name__}: {exc} (this is a bug)", ExitCode.BUG
    _tell(status_fd, error=text, code=int(code))
    return code


def _tell(status_fd: int, **fields: Any) -> None:
    """One JSON line to the keeper (it may have been killed: SIGTERM is on its way then)."""
    with contextlib.suppress(OSError):
        os.write(status_fd, msgspec.json.encode(fields) + b"\n")
