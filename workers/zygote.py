"""Workers by fork: one process imports what an accelerator needs, and its forks are the workers.

Compiled kernels bring Numba along, 0.4 s of processor time and 100 MiB a process; of 256 workers that would be a
minute and more memory than the machine. A fork costs milliseconds and shares what was imported. The zygote has no
thread and no ZeroMQ context; it ends when the coordinator closes its socket (or dies), and its workers, which the
coordinator knows by their pidfds, are the keeper's children from then on.
"""

from __future__ import annotations

import gc
import os
import socket
import struct
import subprocess
import sys

__all__ = ["Zygote", "main"]

_PID = struct.Struct("<i")
_TIMEOUT = 60.0         # seconds; the first one ever compiles the kernels


class Zygote:
    """The coordinator's end. Starts the process; ``close`` it when every worker has been forked."""

    def __init__(self, accel: str, keeper_fd: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            inherited = [theirs.fileno()] + ([keeper_fd] if keeper_fd >= 0 else [])
            self._process = subprocess.Popen(
                [sys.executable, "-m", "workers.zygote", accel, str(theirs.fileno())], stdin=subprocess.DEVNULL,
                pass_fds=inherited, start_new_session=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
        ours.settimeout(_TIMEOUT)
        self._sock = ours

    def fork(self, spec_fd: int) -> int:
        """A worker that reads its WorkerSpec from this pipe; its pid. Raises OSError."""
        socket.send_fds(self._sock, [b"fork"], [spec_fd])
        answer = self._sock.recv(_PID.size)
        if len(answer) != _PID.size:
            raise ConnectionResetError("the process that forks workers has ended")
        return int(_PID.unpack(answer)[0])

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()
        self._process.wait()


def main(argv: list[str]) -> int:
    """``python -m workers.zygote ACCEL FD``: fork a worker for each pipe that comes over the socket FD."""
    from ipc import process

    from . import worker
    from .__main__ import run
    from .accel import AccelError, load

    process.set_name("vcpu-zygote")
    try:
        load(argv[0])
    except AccelError:
        pass        # each worker will say so itself
    assert worker       # imported for the forks
    gc.freeze()         # so that no collection in a fork touches, and so copies, what is shared
    with socket.socket(fileno=int(argv[1])) as sock:
        while True:
            data, fds, _, _ = socket.recv_fds(sock, 16, 1)
            if not data:
                return 0
            pid = os.fork()
            if pid == 0:
                sock.close()
                os.setsid()
                code = 1
                try:
                    code = run(fds[0])
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)      # not the zygote's way out
            os.close(fds[0])
            sock.send(_PID.pack(pid))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
