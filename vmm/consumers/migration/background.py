"""A migration by a process of its own, which outlives whoever begins it; and its end, where that is asked for. Which
process it is stands in its report (status.py).

``vmm.consumers.migration.background NAME ADDRESS ID OPTIONS RECOVER`` (ipc/run.py) carries one out."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from ipc.run import own_process

from ...client.machine import Machine
from ...errors import ExitCode, VmmError
from .report import COMMITTED, OVER, Options
from .source import migrate, recover
from .status import interrupt, load_status

__all__ = ["begin", "begin_command", "cancel", "main"]

_BEGIN_PATIENCE = 60.0      # seconds
_CANCEL_PATIENCE = 15.0
_LOOK_EVERY = 0.02


def begin(name: str, address: str, options: Options, *, resume: bool = False) -> str:
    """Migrate the machine, or (``resume``) finish a migration whose source was lost after the hand-over; its id, once
    it has said where it is. Raises VmmError when it did not come to that."""
    migration_id = uuid.uuid4().hex[:8]
    text = msgspec.json.encode(options).decode()
    begin_command(name, own_process("vmm.consumers.migration.background", name, address, migration_id, text,
                                    "resume" if resume else ""), migration_id)
    return migration_id


def begin_command(name: str, command: Sequence[str], migration_id: str) -> None:
    """Start a process that migrates this machine, under this id, and wait until it has said where it is. Raises
    VmmError, with what it has said, when it ended before."""
    with tempfile.TemporaryFile() as errors:    # a pipe would break when this process has gone
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
                                   start_new_session=True)
        deadline = time.monotonic() + _BEGIN_PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(VmmError):
                if load_status(name)["id"] == migration_id:
                    break
            time.sleep(_LOOK_EVERY)
        if process.poll():
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().removeprefix("vmm: error: ")
            raise VmmError(said or "the migration could not be started", _exit_code(process.returncode))


def _exit_code(status: int) -> ExitCode:
    return ExitCode(status) if status in list(ExitCode) else ExitCode.MIGRATION_FAILED


def cancel(name: str) -> dict[str, Any]:
    """Have the migration of this machine end, with the machine running on here; its report then. Raises VmmError when
    there is none, it cannot be cancelled any more, or it does not end."""
    found = load_status(name)
    _refuse_to_cancel(found)
    if found["status"] in OVER:
        raise VmmError(f"no migration of machine '{name}' is in progress (last one: {found['status']})")
    interrupt(found)
    deadline = time.monotonic() + _CANCEL_PATIENCE
    while found["status"] not in OVER and found["status"] not in COMMITTED:
        if time.monotonic() > deadline:
            raise VmmError(f"the migration of '{name}' did not end within {_CANCEL_PATIENCE:.0f} s",
                           ExitCode.MIGRATION_FAILED)
        time.sleep(_LOOK_EVERY)
        found = load_status(name)
    _refuse_to_cancel(found)
    return found


def _refuse_to_cancel(report: dict[str, Any]) -> None:
    name, target = report["machine"], report["target"]
    if report["direction"] == "incoming":
        raise VmmError(f"machine '{name}' is not being migrated: it came here from {target}"
                       if report["status"] in OVER else
                       f"machine '{name}' is arriving here: cancel that where it comes from, or run vmm stop {name}")
    if report["status"] == "completed":
        raise VmmError(f"machine '{name}' has already been migrated to {target}")
    if report["status"] in COMMITTED:
        raise VmmError(f"machine '{name}' has already been handed over to {target}: the migration can no longer be "
                       "cancelled")


def main(argv: list[str]) -> int:
    """The exit status."""
    name, address, migration_id, options, resume = argv
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Machine.attach(name) as machine:
            asked = msgspec.json.decode(options, type=Options)
            if resume:
                recover(machine, address, asked, migration_id=migration_id)
            else:
                migrate(machine, address, asked, migration_id=migration_id, early=True)
    except VmmError as exc:
        print(f"vmm: error: {exc}", file=sys.stderr)
        return int(exc.exit_code)
    except KeyboardInterrupt:
        return 128 + signal.SIGTERM
    return 0
