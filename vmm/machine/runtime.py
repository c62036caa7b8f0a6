"""Machines on this host: whose names are taken, who runs, and what is left of those that died.

A machine is its keeper's claim (ipc/claims.py), which its coordinator shares: as long as one of the two lives, the
name is taken, and nobody removes anything of it. What no claim covers is left over, whatever killed its processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from ipc.claims import Claim, ClaimError, Held
from ipc.shm import list_segments

from ..errors import ExitCode, VmmError
from .names import belongings, between_name, is_machine_name, machine_dir, machine_of, runtime_root, scope_prefix

__all__ = ["CONTINUES", "END", "KEEPER", "LET_GO", "PROGRAMS", "SOCKET_PATH_MAX", "adopt_claim", "await_upgrade",
           "claim", "collect_garbage", "end_at_once", "goes_on", "is_running", "is_tied", "is_upgrading", "leftovers",
           "machine_dir", "machine_names", "release", "runtime_root", "tie"]

#: What a launching process tells the keeper on its life pipe: end the machine; it lives on without me.
END, LET_GO = b"0", b"1"
#: Its name, as ps has it.
KEEPER = "vmm-keeper"
#: Its last argument, where the machine runs a Linux program: so much more is imported before the specification comes.
PROGRAMS = "programs"
#: And where it is the machine that was upgraded (``MachineSpec.continues``).
CONTINUES = "continues"
#: Bytes of a Unix socket's path: sun_path, less its terminating NUL.
SOCKET_PATH_MAX = 107
#: The longest name of a socket in a machine's directory; one that is made while it runs must be no longer.
LONGEST_SOCKET = "userfault"
_TIED = "tied"
_ROOT_TRIES = 10
_UPGRADE_PATIENCE = 10.0    # seconds


def is_running(name: str) -> bool:
    """Somebody holds the machine's claim. Raises VmmError for what is no name."""
    return belongings(name).held()


def is_upgrading(name: str) -> bool:
    """The machine of that name is being upgraded: where none runs, one will (vmm/consumers/migration/upgrade.py)."""
    return is_running(between_name(name))


def goes_on(name: str) -> bool:
    """A machine of that name runs, or will when its upgrade is through."""
    return is_upgrading(name) or is_running(name)      # in this order: where it is upgraded no more, it has its name


def await_upgrade(name: str) -> bool:
    """Whether a machine of that name runs, or does after all when its upgrade is through."""
    deadline = time.monotonic() + _UPGRADE_PATIENCE
    while not (running := is_running(name)) and is_upgrading(name) and time.monotonic() < deadline:
        time.sleep(0.01)
    return running or is_running(name)


def claim(name: str, *, continues: bool = False) -> Claim:
    """Take the name for this process, and make the machine's directory. What an earlier machine of that name left
    behind is cleared first. ``continues``: the machine is the one that has had it.

    Raises VmmError when a machine of that name runs, or is about to.
    """
    owned = belongings(name)
    directory = owned.directory
    if len(os.fsencode(directory / LONGEST_SOCKET)) > SOCKET_PATH_MAX:
        raise VmmError(f"the path of the runtime directory {directory} is too long for a Unix socket: choose a "
                       "shorter name or a shorter XDG_RUNTIME_DIR")
    if not continues and is_upgrading(name):
        raise VmmError(f"machine '{name}' is being upgraded: choose another --name, or if it does not end run "
                       f"vmm upgrade {name}")
    try:
        taken = owned.claim()
    except Held:
        raise VmmError(f"a machine named '{name}' is already running: choose another --name, or "
                       f"stop it with: vmm stop {name}") from None
    except ClaimError as exc:
        raise VmmError(f"machine '{name}': {exc}") from None
    try:
        _make_directory(directory)
    except OSError as exc:
        release(taken)
        raise VmmError(f"cannot create the runtime directory {directory}: {exc.strerror}") from None
    return taken


def _make_directory(directory: Path) -> None:
    """Raises OSError."""
    for last in [False] * (_ROOT_TRIES - 1) + [True]:
        with contextlib.suppress(FileExistsError):
            directory.parent.mkdir(mode=0o700)
        try:
            directory.mkdir(mode=0o700)
        except FileNotFoundError:   # another machine's keeper took the empty root along just now
            if last:
                raise
        else:
            return


def adopt_claim(name: str, fd: int) -> Claim:
    """The claim that a parent process has taken, by the descriptor that it has passed on."""
    os.set_inheritable(fd, False)
    return Claim(belongings(name), fd)


def release(taken: Claim) -> None:
    """The machine is over: nothing of it is left."""
    with contextlib.suppress(ClaimError):   # then it is vmm gc's
        taken.release()
    _remove_empty_root(taken.belongings.directory.parent)


def _remove_empty_root(root: Path) -> None:
    with contextlib.suppress(OSError):
        root.rmdir()    # the last machine takes it along


def end_at_once(name: str) -> int:
    """Have the keeper of a running machine kill all of it; the keeper's pid. Raises VmmError."""
    owned = belongings(name)
    pid = owned.owner_pid()
    if pid is None:
        raise VmmError(f"machine '{name}' has just ended", ExitCode.NO_MACHINE)
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        raise VmmError(f"machine '{name}' is ending: its keeper was killed", ExitCode.WORKER_DIED) from None
    try:
        # What holds the claim may be a coordinator whose keeper has died, and the pid somebody else's by now.
        if Path(f"/proc/{pid}/comm").read_text() == f"{KEEPER}\n" and owned.owner_pid() == pid:
            for signum in (signal.SIGQUIT, signal.SIGCONT):
                signal.pidfd_send_signal(fd, signum)
    except OSError:
        pass    # it has just ended
    finally:
        os.close(fd)
    return pid


def tie(name: str) -> None:
    """The running machine must end with the process that has launched it, so it cannot be upgraded: others start it
    elsewhere when that is lost (vmm/fleet/)."""
    with contextlib.suppress(OSError):      # it has just ended
        (machine_dir(name) / _TIED).touch(mode=0o600)


def is_tied(name: str) -> bool:
    """The same was said of it."""
    return (machine_dir(name) / _TIED).exists()


def machine_names() -> list[str]:
    """Names of running machines."""
    return [name for name in _known() if is_running(name)]


def _known() -> list[str]:
    """Of whom there is anything here."""
    found = {machine_of(segment[1:]) for segment in list_segments(scope_prefix())}
    with contextlib.suppress(OSError):
        found |= {p.name for p in runtime_root().iterdir() if is_machine_name(p.name)}
    return sorted(name for name in found if name is not None)


def leftovers() -> dict[str, list[str]]:
    """Segments, locks and directories of machines that nobody runs any more, by machine name."""
    found = {name: belongings(name).left() for name in _known() if not is_running(name)}
    return {name: left for name, left in found.items() if left}


def collect_garbage(name: str | None = None) -> list[str]:
    """Remove leftovers (of one machine, or of all); what was removed.

    Raises VmmError when ``name`` is running.
    """
    removed: list[str] = []
    for each in [name] if name is not None else list(leftovers()):
        try:
            cleared = belongings(each).clear()
        except ClaimError as exc:
            raise VmmError(f"machine '{each}': {exc}") from None
        if cleared is not None:
            removed += cleared
        elif name is not None:
            raise VmmError(f"machine '{name}' is running: stop it with: vmm stop {name}", ExitCode.BAD_INPUT)
    _remove_empty_root(runtime_root())
    return removed
