"""A command, and all processes that it starts, with a disk that fails: as SQLite tries itself, but below the processes.
A seccomp filter hands each system call on files to this process (SECCOMP_RET_USER_NOTIF, seccomp_unotify(2)), which
lets it go on or fail. So it fails in whatever library of whatever process makes it.

As a program (``python failing_io.py SOCKET ARGUMENTS...``) it runs the command under that filter.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Call", "FailingRun", "run_failing"]

#: By what their first arguments are.
_OF_FD = [
    "fallocate", "fdatasync", "fsync", "ftruncate", "getdents64", "pread64", "preadv", "pwrite64", "pwritev",
    "read", "readv", "sendfile", "write", "writev"]
_OF_PATH = ["mkdir", "open", "rename", "rmdir", "unlink"]
_OF_DIRECTORY_AND_PATH = ["mkdirat", "openat", "renameat", "renameat2", "unlinkat"]

#: What a full disk refuses (an open only where it makes a file).
_TAKES_ROOM = [
    "fallocate", "ftruncate", "mkdir", "mkdirat", "open", "openat", "pwrite64", "pwritev", "sendfile", "write",
    "writev"]

# uapi/linux/seccomp.h
_NOTIFICATION = struct.Struct("<QII iIQ 6Q")
_RESPONSE = struct.Struct("<QqiI")
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1
_PATH_MAX = 4096


@dataclass(frozen=True)
class Call:
    """A system call: its name, and the path that it was about. ``takes_room``: a full disk refuses it."""

    name: str
    path: str
    takes_room: bool


@dataclass
class FailingRun:
    """``calls``: those that were about the folders, in their order; ``failed``: those that were made to fail."""

    code: int = 0
    out: str = ""
    error: str = ""
    calls: list[Call] = field(default_factory=list)
    failed: list[Call] = field(default_factory=list)


def run_failing(arguments: Sequence[str], folders: Sequence[Path], fails: Callable[[int, Call], int], seconds: float,
                **environment: str) -> FailingRun:
    """The command, until it and all that it has started have ended. ``fails(n, call)``: the errno that the n-th call
    (from 0) about something beneath ``folders`` gets, or 0. Raises TimeoutError."""
    ran = FailingRun()
    inside = tuple(str(folder.resolve()) + "/" for folder in folders)
    deadline = time.monotonic() + seconds
    ours, theirs = socket.socketpair()
    with ours, subprocess.Popen([sys.executable, __file__, str(theirs.fileno()), *arguments], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, pass_fds=[theirs.fileno()],
                                env={**os.environ, **environment}) as process:
        theirs.close()
        ours.settimeout(seconds)
        listener = socket.recv_fds(ours, 1, 1)[1][0]
        try:
            while _await(listener, deadline):
                _decide(listener, inside, fails, ran)
        except BaseException:
            process.kill()
            raise
        finally:
            os.close(listener)      # what waits for an answer now fails
        ran.out, ran.error = process.communicate(timeout=seconds)
    ran.code = process.returncode
    return ran


def _await(listener: int, deadline: float) -> bool:
    """A call waits; False when nobody is left who could make one. Raises TimeoutError."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    found = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    if not found:
        raise TimeoutError("the command has not ended")
    return bool(found[0][1] & select.POLLIN)


def _decide(listener: int, inside: tuple[str, ...], fails: Callable[[int, Call], int], ran: FailingRun) -> None:
    import pyseccomp

    asked = array.array("B", bytes(_NOTIFICATION.size))
    try:
        fcntl.ioctl(listener, _RECEIVE, asked)
    except FileNotFoundError:       # it has been killed, or a signal has come
        return
    identity, pid, _, number, machine, _, *arguments = _NOTIFICATION.unpack(asked)
    name = pyseccomp.resolve_syscall(machine if machine != _X86_64 else pyseccomp.system_arch(), number).decode()
    error = 0
    try:
        path = _path(pid, name, arguments)
    except OSError:                 # it has gone, or names nothing
        path = ""
    if path.startswith(inside):
        call = Call(name, path, name in _TAKES_ROOM and ("open" not in name or _makes(name, arguments)))
        error = fails(len(ran.calls), call)
        ran.calls.append(call)
        if error:
            ran.failed.append(call)
    try:
        fcntl.ioctl(listener, _SEND, _RESPONSE.pack(identity, 0, -error, 0 if error else _CONTINUE))
    except FileNotFoundError:
        return


_X86_64 = 0xC000003E        # AUDIT_ARCH_X86_64


def _makes(name: str, arguments: list[int]) -> bool:
    return bool(arguments[2 if name == "openat" else 1] & os.O_CREAT)


def _path(pid: int, name: str, arguments: list[int]) -> str:
    """What the call is about. Raises OSError."""
    if name in _OF_FD:
        return os.readlink(f"/proc/{pid}/fd/{arguments[0]}")
    beneath, pointer = (arguments[0], arguments[1]) if name in _OF_DIRECTORY_AND_PATH else (None, arguments[0])
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        text = b""
        while b"\0" not in text and len(text) < _PATH_MAX:      # up to the end of a page at a time
            at = pointer + len(text)
            memory.seek(at)
            text += memory.read(4096 - at % 4096)
    path = os.fsdecode(text.partition(b"\0")[0])
    signed = None if beneath is None else struct.unpack("<i", struct.pack("<I", beneath & 0xFFFFFFFF))[0]
    start = "cwd" if signed in (None, -100) else f"fd/{signed}"       # AT_FDCWD
    return path if path.startswith("/") else os.path.join(os.readlink(f"/proc/{pid}/{start}"), path)


def main() -> None:
    import pyseccomp

    connection = socket.socket(fileno=int(sys.argv[1]))
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in (*_OF_FD, *_OF_PATH, *_OF_DIRECTORY_AND_PATH):
        rules.add_rule(pyseccomp.NOTIFY, name)
    rules.load()
    # pyseccomp takes notifications in the process that has the filter only; the library has the descriptor.
    socket.send_fds(connection, [b"f"], [pyseccomp._libseccomp.seccomp_notify_fd(rules._filter)])
    connection.close()
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])


if __name__ == "__main__":
    main()
