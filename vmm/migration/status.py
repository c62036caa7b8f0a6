"""The report of a machine's last migration, where ``vmm migrate status`` and ``cancel`` find it; and the process
that carries it out, told from another that has its number by now."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

from ..errors import VmmError
from ..runtime import machine_dir
from .report import OVER, Report

__all__ = ["interrupt", "load_status", "save_status", "started"]

_FILE = "migrate.json"


def started(pid: int) -> int:
    """When the process began, in clock ticks since the boot; 0 when there is none (or a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] in "ZX" else int(fields[19])


def _path(machine: str) -> Path:
    return machine_dir(machine) / _FILE


def save_status(report: Report) -> None:
    """Whole, or not at all: the machine may have gone, and its directory with it."""
    path = _path(report.machine)
    with contextlib.suppress(OSError):
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(report.as_dict()))
        aside.rename(path)


def load_status(machine: str) -> dict[str, Any]:
    """The report; one whose process was killed says so (status failed). Raises VmmError when the machine was not
    migrated, as far as is known."""
    try:
        found = dict(json.loads(_path(machine).read_text()))
    except (OSError, ValueError):
        raise VmmError(f"machine '{machine}' is not being migrated") from None
    if found["status"] not in OVER and not _alive(found):
        found["error"] = f"its process (pid {found['pid']}) was killed in status {found['status']}"
        found["status"] = "failed"
    return found


def _alive(report: dict[str, Any]) -> bool:
    return report["pid"] > 0 and started(report["pid"]) == report["pid_started"]


def interrupt(report: dict[str, Any]) -> bool:
    """Have the migration's process end it (SIGTERM); False when that process has gone. It, and no other that has
    its number by now: the pidfd is opened first, then its start is compared."""
    try:
        pidfd = os.pidfd_open(report["pid"])
    except OSError:
        return False
    try:
        if not _alive(report):
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
