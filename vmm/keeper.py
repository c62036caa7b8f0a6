"""The keeper: a small process that outlives the coordinator, so that nothing else does.

``vmm launch`` starts it; it claims the machine's name, starts the coordinator and waits.

* The coordinator ends by itself: the keeper clears what may be left and passes on its exit status.
* The coordinator is killed: the workers stand on their own, so another coordinator is started, which
  carries on (invariant 5); after too many such deaths in a row the machine is torn down.
* The launching process goes away in the foreground (end of file on the life pipe): the machine ends.
* The keeper itself is killed: the kernel sends the coordinator SIGTERM, which ends the machine in
  order; were that one killed too, the workers see the end of the keeper's pipe, clear the files and
  go (workers/worker.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from ipc import process
from ipc.claims import Claim
from workers import zygote

from .errors import ExitCode, VmmError
from .runtime import claim, release

__all__ = ["main"]

_RESTARTS_MAX = 5           # deaths of the coordinator that are answered with another one
_REAP_TIMEOUT = 5.0         # seconds for killed children to be gone


class Keeper:
    def __init__(self, name: str, spec: bytes, taken: Claim, status_fd: int, life_fd: int) -> None:
        self._name = name
        self._claim = taken
        self._spec = spec
        self._status_fd = status_fd
        self._life_fd = life_fd
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._zygote: subprocess.Popen[bytes] | None = None     # kept: its end is nobody's warning
        self._signals = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Only the keeper holds the write end: it closes when the keeper ends, however that happens.
        self._alive_read, self._alive_write = os.pipe2(os.O_CLOEXEC)
        self._ready = False

    def run(self) -> int:
        signal.set_wakeup_fd(self._signals[1], warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self._terminate())
        restarts = 0
        while True:
            code = self._run_coordinator(recover=restarts > 0)
            if code >= 0 or not self._ready or restarts >= _RESTARTS_MAX:
                break
            restarts += 1
            print(f"vmm: machine '{self._name}': coordinator died ({signal.Signals(-code).name}), "
                  "another one takes over", file=sys.stderr)
        if code < 0 and not self._ready:
            self._tell(f"the coordinator died during set-up ({signal.Signals(-code).name})")
        return code if code >= 0 else int(ExitCode.WORKER_DIED)

    def _run_coordinator(self, *, recover: bool) -> int:
        """Start one and wait for its end; its return code (negative: the signal that killed it)."""
        read, write = os.pipe2(os.O_CLOEXEC)
        inherited = [write, self._alive_read, self._claim.fd]
        with contextlib.ExitStack() as stack:
            sock = -1
            if not recover:
                self._zygote, ours = zygote.start(self._alive_read)
                sock = stack.enter_context(ours).fileno()
                inherited.append(sock)
            self._coordinator = subprocess.Popen(
                process.python_module("vmm.coordinator", str(write), str(self._alive_read), str(os.getpid()),
                                      str(sock), str(self._claim.fd)), stdin=subprocess.PIPE, pass_fds=inherited)
        os.close(write)
        assert self._coordinator.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._coordinator.stdin as pipe:
            pipe.write(self._spec)
        pidfd = os.pidfd_open(self._coordinator.pid)
        try:
            return self._watch(pidfd, read)
        finally:
            os.close(pidfd)
            os.close(read)

    def _watch(self, pidfd: int, answer_fd: int) -> int:
        assert self._coordinator is not None
        watched = [pidfd, answer_fd, self._signals[0]] + ([self._life_fd] if self._life_fd >= 0 else [])
        while True:
            ready, _, _ = select.select(watched, [], [])
            if self._signals[0] in ready:
                os.read(self._signals[0], 64)
            if answer_fd in ready:
                line = os.read(answer_fd, 65536)
                if line:
                    self._ready = self._ready or b'"ready"' in line
                    self._pass_on(line)
                else:
                    watched.remove(answer_fd)
            if self._life_fd in ready:
                # Nothing is ever written there: readable means that the launching process is gone.
                watched.remove(self._life_fd)
                self._terminate()
            if pidfd in ready:
                return self._coordinator.wait()

    def _terminate(self) -> None:
        if self._coordinator is not None and self._coordinator.poll() is None:
            self._coordinator.terminate()

    def _pass_on(self, line: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self._status_fd, line)

    def _tell(self, error: str) -> None:
        self._pass_on(json.dumps({"error": error, "code": int(ExitCode.WORKER_DIED)}).encode() + b"\n")


def _kill_children(timeout: float) -> None:
    """Kill and reap whatever is left: the coordinator's workers came to us when it died."""
    deadline = time.monotonic() + timeout
    me = os.getpid()
    while time.monotonic() < deadline:
        children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main(argv: list[str]) -> int:
    """``python -m vmm.keeper NAME STATUS_FD LIFE_FD``; the machine's specification is on standard
    input. LIFE_FD is -1 for a machine that outlives whoever launched it."""
    name, status_fd, life_fd = argv[0], int(argv[1]), int(argv[2])
    process.set_name("vmm-keeper")
    process.set_subreaper()
    spec = sys.stdin.buffer.read()
    try:
        taken = claim(name)
    except VmmError as exc:
        os.write(status_fd, json.dumps({"error": str(exc), "code": int(exc.exit_code)}).encode() + b"\n")
        return int(exc.exit_code)
    try:
        return Keeper(name, spec, taken, status_fd, life_fd).run()
    finally:
        _kill_children(_REAP_TIMEOUT)
        release(taken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
