"""What is kept of a machine beyond its end: its log and its last report.

``$XDG_STATE_HOME/shardvmm/<scope>-<name>/`` (else ``~/.local/state/…``), mode 0700, with ``log``, ``log.1``
(vmm/machine/log.py) and, once it has ended, ``report.json``; ``migration.json`` if it was migrated. It lies there
from the start, so that it is there whatever ends the machine. ``scope`` tells runtime directories apart
(vmm/machine/names.py): two machines of one name may run under two of them.

One record for each name, that of the last machine called so; the oldest go when there are more than KEPT, or after
KEPT_DAYS. A keeper holds a flock on its machine's ``lock`` there, and for a moment that of the whole directory,
while it makes a record and removes old ones.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ipc.linux.files import lock_within, open_locked

from ..errors import ExitCode, VmmError
from .names import check_machine_name, is_machine_name, scope
from .runtime import goes_on, is_running, is_upgrading, machine_names

__all__ = ["BY_SIGTERM", "KEPT", "KEPT_DAYS", "UPGRADED", "Record", "ended_names", "log_path",
           "migration_path", "no_machine", "now", "outcome", "remove_records", "state_root", "write_report"]

#: All that a coordinator knows of why it is to end the machine; its keeper may know more (``Record.explain``).
BY_SIGTERM = "stopped by SIGTERM"
#: Why a machine was stopped that goes on in other processes.
UPGRADED = "it was upgraded, and goes on in new processes"
KEPT = 64           # machines
KEPT_DAYS = 30
_LOCK_TIMEOUT = 5.0     # seconds
_REPORT, _LOG, _LOCK, _MIGRATION = "report.json", "log", "lock", "migration.json"


def state_root() -> Path:
    """Raises OSError where this user has no home directory."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):     # a relative one is to be ignored (XDG Base Directory Specification)
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            raise OSError("there is no home directory: set XDG_STATE_HOME")
        base = os.path.join(home, ".local", "state")
    return Path(base) / "shardvmm"


def _directory(name: str) -> Path:
    """Raises VmmError where no machine may be called so, and OSError."""
    return state_root() / f"{scope()}-{check_machine_name(name)}"


def log_path(name: str) -> Path:
    """Of the machine that is called so, or was."""
    return _directory(name) / _LOG


def migration_path(name: str) -> Path:
    """Of the report of the last migration of the machine that is called so, or was
    (vmm/consumers/migration/status.py)."""
    return _directory(name) / _MIGRATION


class Record:
    """The keeper's hold on its machine's record; it is empty at first."""

    def __init__(self, name: str, *, goes_on: bool = False) -> None:
        """``goes_on``: of a machine that was upgraded, whose log stays. Raises OSError."""
        self.directory = _directory(name)
        with _locked(state_root()):
            self.directory.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in self.directory.iterdir():
                if path.name != _LOCK and not (goes_on and path.name != _REPORT):
                    path.unlink()
            _prune(state_root(), KEPT, KEPT_DAYS * 86400.0)

    @property
    def log_path(self) -> Path:
        return self.directory / _LOG

    @property
    def reported(self) -> bool:
        """Its machine has left a report."""
        return (self.directory / _REPORT).exists()

    def explain(self, why: str) -> None:
        """The machine's report does not say why it was stopped: it was for this. Raises OSError."""
        path = self.directory / _REPORT
        report = json.loads(path.read_text())
        if report["cause"].startswith(BY_SIGTERM):
            _write(path, {**report, "cause": report["cause"].replace(BY_SIGTERM, f"stopped: {why}")})

    def close(self) -> None:
        os.close(self._lock)


def write_report(name: str, report: dict[str, Any]) -> None:
    """The machine has ended. Raises OSError."""
    _write(_directory(name) / _REPORT, report)


def _write(path: Path, report: dict[str, Any]) -> None:
    aside = path.with_name(path.name + ".new")
    aside.write_text(json.dumps(report))
    aside.rename(path)


def outcome(name: str) -> dict[str, Any] | None:
    """The last report of a machine that does not run any more, as vmm/coordinator/status.py has it; None: there is
    none of that name. Without ``vcpus`` if there was nobody to make one: states ``failed`` (it did not start) and
    ``lost`` (all of its processes were killed)."""
    if goes_on(name):
        return None
    try:
        path = _directory(name) / _REPORT
        if path.exists():
            return dict(json.loads(path.read_text()))
        if log_path(name).exists():
            return {"name": name, "state": "lost", "exit_code": int(ExitCode.WORKER_DIED),
                    "cause": "its processes were killed before they could write a report",
                    "ended_at": _iso(log_path(name).stat().st_mtime)}
    except (OSError, ValueError):
        pass
    return None


def no_machine(name: str) -> VmmError:
    """What is said to whoever asks a machine for something that only a running one can do."""
    if is_upgrading(name):
        return VmmError(f"machine '{name}' is being upgraded, and has not got its name back: run vmm upgrade {name}",
                        ExitCode.NO_MACHINE)
    ended = outcome(name)
    if ended is not None:
        return VmmError(f"machine '{name}' is no longer running: {ended['cause']} (see vmm status {name}, "
                        f"vmm logs {name})", ExitCode.NO_MACHINE)
    names = machine_names()
    there = f"running: {', '.join(names)}" if names else "none is running"
    return VmmError(f"no machine named '{name}' ({there})", ExitCode.NO_MACHINE)


def ended_names() -> list[str]:
    """Of machines of this runtime directory that have ended and left something."""
    prefix = f"{scope()}-"
    try:
        found = [p.name.removeprefix(prefix) for p in state_root().iterdir() if p.name.startswith(prefix)]
    except OSError:
        return []
    return sorted(name for name in found if is_machine_name(name) and not is_running(name))


def remove_records(name: str | None = None) -> list[str]:
    """Logs and reports of machines that have ended (of one, or of all of this runtime directory); what was removed.
    Raises OSError."""
    removed = []
    with _locked(state_root()):
        for each in ended_names() if name is None else [name]:
            path = _directory(each)
            if path.is_dir() and _take(path, shutil.rmtree):
                removed.append(str(path))
    return removed


def now() -> str:
    """For ``ended_at``: ISO 8601, UTC."""
    return _iso(time.time())


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Nobody else makes or removes records meanwhile. Raises OSError."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            lock_within(fd, _LOCK_TIMEOUT)
        except TimeoutError:
            raise TimeoutError(f"{root / _LOCK} is locked by another process") from None
        yield
    finally:
        os.close(fd)


def _prune(root: Path, kept: int, seconds: float) -> None:
    """Remove records of machines that do not run: those beyond the ``kept`` newest, those older than that, and those
    that are empty, whose keepers were killed before they had a lock. For the holder of ``_locked``: nobody is just
    making one."""
    ages = []
    for path in root.iterdir():
        with contextlib.suppress(OSError):
            if path.is_dir():
                if times := [p.stat().st_mtime for p in path.iterdir()]:
                    ages.append((time.time() - max(times), path))
                else:
                    path.rmdir()
    ended = [(age, path) for age, path in sorted(ages) if _take(path, lambda path: None)]
    for place, (age, path) in enumerate(ended):
        if place >= kept or age > seconds:
            _take(path, shutil.rmtree)


def _take(path: Path, act: Callable[[Path], None]) -> bool:
    """Do this to a record whose machine does not run; False when it does, or this is no record."""
    try:
        with open_locked(path / _LOCK, os.O_RDWR):
            act(path)
    except OSError:
        return False
    return True
