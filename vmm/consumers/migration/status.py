"""The report of a machine's last migration, where ``vmm migrate status`` and ``cancel`` find it; and the process
that carries it out, told from another that has its number by now.

It lies in the machine's runtime directory while the machine is there. How it went is kept with the machine's record
(vmm/machine/records.py), too: a machine that has moved is not there any more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
from pathlib import Path
from typing import Any

import msgspec

from ipc.linux.processid import ProcessId, open_process

from ...errors import ExitCode, VmmError
from ...machine import records
from ...machine.runtime import is_running, machine_dir
from .report import COMMITTED, OVER, Report

__all__ = ["continued", "interrupt", "load_status", "save_status"]

_FILE = "migrate.json"


def save_status(report: Report) -> None:
    """Whole, or not at all: the machine may have gone, and its directory with it."""
    text = json.dumps(report.as_dict())
    with contextlib.suppress(OSError):
        _write(machine_dir(report.machine) / _FILE, text)
    if report.status in OVER:
        with contextlib.suppress(OSError):
            _write(records.migration_path(report.machine), text)


def _write(path: Path, text: str) -> None:
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(text)
    aside.rename(path)


def load_status(machine: str) -> dict[str, Any]:
    """The report; one whose process was killed says so. Raises VmmError when the machine was not migrated, as far
    as is known."""
    found = _read(machine)
    if found["status"] not in OVER and not _alive(found):
        found["error"] = f"its process (pid {found['pid']}) was killed in status {found['status']}"
        if found["status"] not in COMMITTED or found["direction"] == "incoming":    # else another takes over
            found["status"] = "failed"
    return found


def continued(report: Report) -> Report:
    """``report``, of a migration that another process began, with what that one had counted and measured."""
    try:
        before = msgspec.convert(_read(report.machine), Report)
    except (VmmError, msgspec.ValidationError):
        return report
    if before.id != report.id:
        return report
    return dataclasses.replace(before, target=report.target, pid=report.pid, pid_started=report.pid_started, error="")


def _read(machine: str) -> dict[str, Any]:
    there = is_running(machine)
    try:
        path = machine_dir(machine) / _FILE if there else records.migration_path(machine)
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        if not there:
            raise records.no_machine(machine) from None
        raise VmmError(f"machine '{machine}' is not being migrated", ExitCode.BAD_INPUT) from None


def _process(report: dict[str, Any]) -> ProcessId:
    return ProcessId(report["pid"], report["pid_started"])


def _alive(report: dict[str, Any]) -> bool:
    """Not so of one that has ended and was not waited for yet."""
    try:
        fd = open_process(_process(report))
    except OSError:
        return False
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return not poll.poll(0)
    finally:
        os.close(fd)


def interrupt(report: dict[str, Any]) -> None:
    """Have the migration's process end it (SIGTERM): it, and no other that has its number by now."""
    with contextlib.suppress(ProcessLookupError):
        fd = open_process(_process(report))
        try:
            signal.pidfd_send_signal(fd, signal.SIGTERM)
        finally:
            os.close(fd)
