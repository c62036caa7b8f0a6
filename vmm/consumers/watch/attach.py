"""The watcher's end of the helper, and what is refused before anything of the process is touched."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ipc.linux.foreign import has_memory, status
from ipc.linux.processid import ProcessId, identity
from ipc.run import own_process
from ipc.userfault import WRITE_ASYNC, Userfault, UserfaultError
from ipc.writelog import watching_missing

from ...errors import VmmError, one_line
from .threads import INSTEAD

__all__ = ["Attached", "attach", "check_target"]

_PATIENCE = 60.0        # seconds for the helper, which takes a fraction of one
_MESSAGE_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Attached:
    """A userfaultfd of another process. ``fault`` is the caller's to close: the mappings are ordinary ones then."""

    process: ProcessId
    fault: Userfault
    tid: int            # the thread that made it
    doing: str          # what that was at: a system call's name, "running"
    interrupted: bool   # its call ended with EINTR
    stopped: float      # seconds for which it stood still


def check_target(pid: int) -> ProcessId:
    """Raises VmmError for what cannot be a target at all, or not this user's."""
    try:
        process = identity(pid)
        told = status(pid)
    except OSError:
        raise VmmError(f"there is no process {pid}") from None
    name = one_line(told.get("Name", "?"))
    if told.get("Tgid") != str(pid):
        raise VmmError(f"{pid} is a thread of process {told.get('Tgid', '?')}: give that")
    if told.get("State", "?")[:1] in "ZX":
        raise VmmError(f"process {pid} ({name}) has ended")
    if "VmSize" not in told:
        raise VmmError(f"process {pid} ({name}) is a kernel thread: it has no memory of its own")
    if pid == os.getpid():
        raise VmmError(f"process {pid} is this command itself")
    try:
        with open(f"/proc/{pid}/mem", "rb"), open(f"/proc/{pid}/pagemap", "rb"):
            pass
        kind = _elf_class(pid)
    except PermissionError:
        raise VmmError(f"process {pid} ({name}) is not this user's to look into: run this as its user, as "
                       "root, or with CAP_SYS_PTRACE") from None
    except OSError as exc:
        raise VmmError(f"process {pid} ({name}) has ended" if not has_memory(pid) else
                       f"process {pid}: {exc.strerror}") from None
    if kind == 1:
        raise VmmError(f"process {pid} ({name}) is a 32-bit program: only 64-bit ones can be watched")
    return process


def _elf_class(pid: int) -> int:
    """1: 32 bits, 2: 64 bits; 0: it cannot be told."""
    try:
        return Path(f"/proc/{pid}/exe").open("rb").read(5)[4]
    except (FileNotFoundError, IndexError):     # it was deleted, on a file system that forgets
        return 0


def attach(process: ProcessId) -> Attached:
    """Have a helper process (injector.py) get a userfaultfd of ``process``. One of its threads stands still for some
    hundred microseconds. Raises VmmError, with nothing changed in the process."""
    if reason := watching_missing():
        raise VmmError(f"{reason} {INSTEAD}")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            # A session of its own: Ctrl-C and the end of a terminal are for the watcher, not for what it is doing.
            helper = subprocess.Popen(own_process("vmm.consumers.watch.injector", str(process.pid), str(process.start),
                                                  str(theirs.fileno())),
                                      pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            return _received(process, ours)
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                helper.wait(_PATIENCE)
            helper.kill()       # it may be, at any moment
            helper.wait()


def _received(process: ProcessId, helper: socket.socket) -> Attached:
    helper.settimeout(_PATIENCE)
    try:
        data, descriptors, _, _ = socket.recv_fds(helper, _MESSAGE_MAX, 1)
    except OSError as exc:
        data, descriptors, said = b"", [], f": {exc}"
    else:
        said = ""
    if not data:
        raise VmmError(f"the helper that gets a userfaultfd of process {process.pid} was ended before it had one{said};"
                       " the process runs on, and may hold one descriptor more (a userfaultfd that nothing uses)")
    told = json.loads(data)
    if told["error"] or not descriptors:
        raise VmmError(one_line(told["error"] or "no descriptor came"))
    os.set_inheritable(descriptors[0], False)
    try:
        fault = Userfault.adopt(descriptors[0], WRITE_ASYNC)
    except UserfaultError as exc:
        raise VmmError(f"process {process.pid}: {exc}") from None
    return Attached(process, fault, told["tid"], told["doing"], told["interrupted"], told["stopped"])
