"""Workers by fork: one process imports what workers need, and its forks are the workers.

A Python process with its imports takes 90 ms of processor time to start, and 0.6 s with the software CPU's compiled
hooks; of 256 workers that would be a minute, and more memory than the machine has. A fork takes milliseconds and
shares what was imported. The keeper starts this process before the coordinator, so that its imports take no time of
a launch; it has no thread and no ZeroMQ context, and ends when the coordinator closes its socket (or dies). Its
workers, which the coordinator knows by their pidfds, are the keeper's children from then on.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

from ipc import sandbox
from ipc.linux import process
from ipc.run import own_process

__all__ = ["Zygote", "main", "start"]

_PID = struct.Struct("<i")
_TIMEOUT = 60.0         # seconds; the first one ever compiles hooks


def start(keeper_fd: int, log_fd: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Without a keeper, which forks it: the process, and the socket for ``Zygote``. What it and its workers print goes
    to ``log_fd``."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        started = subprocess.Popen(
            own_process("workers.zygote", str(theirs.fileno()), ""), stdin=subprocess.DEVNULL,
            stdout=log_fd, stderr=log_fd,
            pass_fds=[theirs.fileno(), keeper_fd], start_new_session=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})     # forks have no use for its threads
    return started, ours


class Zygote:
    """The coordinator's end. ``close`` it when every worker has been forked."""

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=fd)
        self._sock.settimeout(_TIMEOUT)

    def fork(self, accel: str, spec_fd: int) -> int:
        """A worker that reads its WorkerSpec from this pipe; its pid. Raises OSError."""
        socket.send_fds(self._sock, [accel.encode()], [spec_fd])
        answer = self._sock.recv(_PID.size)
        if len(answer) != _PID.size:
            raise ConnectionResetError("the process that forks workers has ended")
        return int(_PID.unpack(answer)[0])

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()


def main(argv: list[str]) -> int:
    """``workers.zygote FD DIRECTORY [programs]`` (ipc/run.py): fork a worker for each (accelerator, pipe) that comes
    over the socket. DIRECTORY: that of the machine, whose workers' confinement is made ready; it may be empty.
    ``programs``: they run a Linux program."""
    from .__main__ import run
    from .accel.base import AccelError
    from .accel.registry import load, load_program, names

    process.set_name("vcpu-zygote")
    sandbox.missing()       # imports what each worker will need for it
    confinement = None
    if argv[1]:
        with contextlib.suppress(sandbox.SandboxError):     # each worker says so itself
            confinement = sandbox.VcpuConfinement(Path(argv[1]))
    with contextlib.suppress(AccelError):
        load(names()[0])    # the usual one, while nobody waits
    if argv[2:]:
        from .linux import serve  # noqa: F401  (one of the workers is the system)

        with contextlib.suppress(AccelError):
            load_program(names()[0])
    with socket.socket(fileno=int(argv[0])) as sock:
        while True:
            name, fds, _, _ = socket.recv_fds(sock, 16, 1)
            if not name:
                return 0
            with contextlib.suppress(AccelError):       # each worker says so itself
                load(name.decode())
            gc.freeze()     # so that no collection in a fork touches, and so copies, what is shared
            pid = os.fork()
            if pid == 0:
                sock.close()
                os.setsid()
                code = 1
                try:
                    code = run(fds[0], confinement)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)      # not the zygote's way out
            os.close(fds[0])
            sock.send(_PID.pack(pid))
