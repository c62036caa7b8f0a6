"""Where running machines live on this host, and what is left of those that died.

``$XDG_RUNTIME_DIR/shardvmm/<name>`` (else ``/tmp/shardvmm-<uid>/<name>``), mode 0700. The keeper
holds an exclusive flock on the directory's ``lock`` file for the machine's whole life, so that a
directory nobody locks is a left-over, whatever killed its processes.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ipc.process import remove_machine_files
from ipc.shm import list_segments, machine_prefix

from .errors import ExitCode, VmmError
from .names import check_machine_name, is_machine_name

__all__ = ["claim", "collect_garbage", "is_running", "leftovers", "machine_dir", "machine_names",
           "runtime_root"]

_SOCKET_PATH_MAX = 107  # sun_path, less its terminating NUL
_LONGEST_SOCKET = "requests"


def runtime_root() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.access(base, os.W_OK):
        return Path(base) / "shardvmm"
    return Path("/tmp") / f"shardvmm-{os.getuid()}"


def machine_dir(name: str) -> Path:
    """Raises VmmError where no machine may be called so: what is no name never becomes a path."""
    return runtime_root() / check_machine_name(name)


def is_running(name: str) -> bool:
    """Somebody holds the machine's lock."""
    try:
        fd = os.open(machine_dir(name) / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def claim(name: str) -> int:
    """Make the machine's directory and lock it for this process; the lock's fd.

    What an earlier machine of that name left behind is cleared first.
    Raises VmmError when a machine of that name runs.
    """
    directory = machine_dir(name)
    if len(str(directory / _LONGEST_SOCKET)) > _SOCKET_PATH_MAX:
        raise VmmError(f"the runtime directory {directory} is too long for a Unix socket: choose a shorter "
                       "name, or a shorter XDG_RUNTIME_DIR")
    try:
        root = runtime_root()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_uid != os.getuid() or root.stat().st_mode & 0o077:
            raise VmmError(f"the runtime directory {root} is open to other users: chmod 700 it, or remove it")
        if not is_running(name):
            remove_machine_files(name, directory)
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except FileNotFoundError:   # another machine's keeper took the empty root along just now
            root.mkdir(mode=0o700, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise VmmError(f"cannot make the runtime directory {directory}: {exc.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise VmmError(f"a machine named '{name}' is running already: choose another --name, or "
                       f"stop it with: vmm stop {name}") from None
    return fd


def machine_names() -> list[str]:
    """Names of running machines."""
    root = runtime_root()
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if is_machine_name(p.name) and p.is_dir() and is_running(p.name))


def leftovers() -> dict[str, list[str]]:
    """Segments and directories of machines that nobody runs any more, by machine name."""
    found: dict[str, list[str]] = {}
    root = runtime_root()
    if root.is_dir():
        for path in sorted(root.iterdir()):
            if is_machine_name(path.name) and path.is_dir() and not is_running(path.name):
                found.setdefault(path.name, []).append(str(path))
    mine = machine_prefix("")[:-1]
    running = machine_names()
    for segment in list_segments(mine):
        rest = segment[1 + len(mine):]
        # Names may hold dashes; the part after the machine's name never does (vmm/ram.py).
        name = rest.rsplit("-", 1)[0]
        if is_machine_name(name) and name not in running:
            found.setdefault(name, []).append(segment)
    return found


def collect_garbage(name: str | None = None) -> list[str]:
    """Remove left-overs (of one machine, or of all); what was removed.

    Raises VmmError when ``name`` is running.
    """
    if name is not None and is_running(name):
        raise VmmError(f"machine '{name}' is running: stop it with: vmm stop {name}", ExitCode.BAD_INPUT)
    names = [name] if name is not None else list(leftovers())
    removed: list[str] = []
    for each in names:
        removed += remove_machine_files(each, machine_dir(each))
    return removed
