"""A machine's keeper as a process that this one starts, before it is known what the machine is: while the keeper and
those that come from it import what they need, this process makes the specification. Imports next to nothing."""

from __future__ import annotations

import io
import os
import subprocess
import threading

from ipc.run import Fork, own_process

from ..machine.names import check_machine_name
from ..machine.runtime import CONTINUES, PROGRAMS

__all__ = ["KeeperProcess"]

_MODULE = "vmm.coordinator.keeper"


class KeeperProcess:
    """It waits for the specification on ``stdin``. ``status``: what it says comes out of this pipe; ``life``:
    what it is told of this process goes into that one. ``give_up``, or hand it to a ``Launched`` (launch.py)."""

    def __init__(self, name: str, *, quiet: bool, programs: bool = False, fork: bool = False) -> None:
        """``quiet``: nothing is printed by anybody. ``programs``: the machine runs a Linux program. ``fork``: this
        process has imported little else than what a keeper needs, so where it has one thread there is no new
        interpreter. ``name`` may be empty, for a machine that nobody knows yet: it takes no name then, and
        imports all that it can. Raises VmmError."""
        if name:
            check_machine_name(name)
        self.name = name
        life, self.life = _pipe()
        self.status, say = _pipe()
        spec, self.stdin = _pipe()
        words = (name, str(say.fileno()), str(life.fileno()), str(os.getpid()), *([PROGRAMS] if programs else []))
        keep = (say.fileno(), life.fileno())
        self.process: subprocess.Popen[bytes] | Fork
        with life, say, spec, open(os.devnull, "wb") as null:
            try:
                if fork and threading.active_count() == 1:
                    self.process = Fork(_MODULE, *words, shown=[name], keep=keep, session=True,
                                        streams=(spec.fileno(), null.fileno(), null.fileno() if quiet else 2))
                else:
                    self.process = subprocess.Popen(
                        own_process(_MODULE, *words), stdin=spec, stdout=null, stderr=null if quiet else None,
                        pass_fds=keep, start_new_session=True)
            except BaseException:
                self._close()
                raise
        self._waits = True

    @property
    def waits(self) -> bool:
        """Nobody has taken it yet, or given it up."""
        return self._waits

    def take(self) -> subprocess.Popen[bytes] | Fork:
        """It is somebody else's now, with both pipes."""
        self._waits = False
        return self.process

    def tell(self, name: str, *, programs: bool, continues: bool, spec: bytes) -> None:
        """What the machine is. Raises BrokenPipeError where the keeper has ended."""
        with self.stdin as stdin:
            if not self.name:
                stdin.write(f"{name} {PROGRAMS * programs} {CONTINUES * continues}\n".encode())
            stdin.write(spec)

    def give_up(self) -> None:
        """There is no machine: wait until nothing is left. Nothing, if it has been taken. Idempotent."""
        if self._waits:
            self._waits = False
            self.stdin.close()
            self.process.wait()
            self._close()

    def _close(self) -> None:
        for each in (self.stdin, self.life, self.status):
            each.close()


def _pipe() -> tuple[io.FileIO, io.FileIO]:
    """Its ends for reading and for writing, close-on-exec."""
    read, write = os.pipe2(os.O_CLOEXEC)
    return io.FileIO(read, "r"), io.FileIO(write, "w")
