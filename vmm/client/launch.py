"""Starting a machine's keeper, and ending it again: the launching process's part of a machine's life."""

from __future__ import annotations

import contextlib
import os
import select
import time
from pathlib import Path

import msgspec

from ..errors import ExitCode, VmmError
from ..machine.names import belongings
from ..machine.runtime import END, LET_GO, collect_garbage
from ..machine.spec import MachineSpec, encode_spec
from .keeper import KeeperProcess

__all__ = ["Launched"]

_LAUNCH_TIMEOUT = 120.0     # seconds; the first launch ever compiles the loops
_END_TIMEOUT = 30.0         # a keeper gives its coordinator 20 s (vmm/coordinator/keeper.py)
_CLEAR_TIMEOUT = 30.0       # seconds; a coordinator without a keeper has 25 (vmm/coordinator/loop.py)


class Launched:
    """A keeper that this process has started, and whose machine is ready. It ends when this process does, unless it
    was ``let_go``. (The keeper watches this process; a child that forks off inherits nothing of that.)
    ``warnings``: what its user should know."""

    def __init__(self, spec: MachineSpec, *, quiet: bool, keeper: KeeperProcess | None = None) -> None:
        """``quiet``: nothing is printed by anybody. ``keeper``: one that has been started for this name, or for
        none. Of a machine whose memory comes from elsewhere (``spec.incoming``) that memory is there when this
        returns, and the machine is once it ``is_ready``. Raises VmmError, with nothing left behind."""
        self.spec, self.name = spec, spec.name
        self.warnings: list[str] = _replay_warnings(spec)
        begun = keeper or KeeperProcess(spec.name, quiet=quiet, programs=spec.program is not None)
        self.keeper, self._life, self._status = begun.take(), begun.life, begun.status
        self._deadline = time.monotonic() + _LAUNCH_TIMEOUT
        self._said = b""
        self._has_memory = False
        try:
            with contextlib.suppress(BrokenPipeError):
                begun.tell(spec.name, programs=spec.program is not None, continues=spec.continues,
                           spec=encode_spec(spec))
            while not (self.is_ready(wait=True) or (spec.incoming and self._has_memory)):
                pass
        except BaseException:
            self.end()
            raise

    def is_ready(self, *, wait: bool = False) -> bool:
        """The machine can be spoken to. ``wait``: until there is news. Raises VmmError with the keeper's reason why it
        never will be, or that it said nothing."""
        if self._status.closed:
            return True
        poll = select.poll()
        poll.register(self._status, select.POLLIN)
        left = max(0.0, self._deadline - time.monotonic())
        if not poll.poll(left * 1000 if wait else 0.0):
            if left:
                return False
            raise VmmError(f"machine '{self.name}' was not ready within {_LAUNCH_TIMEOUT:.0f} s",
                           ExitCode.WORKER_DIED)
        chunk = os.read(self._status.fileno(), 65536)
        if not chunk:
            raise VmmError(f"machine '{self.name}' did not start: its keeper ended (see vmm logs {self.name})",
                           ExitCode.WORKER_DIED)
        *lines, self._said = (self._said + chunk).split(b"\n")
        for answer in map(msgspec.json.decode, lines):
            if "error" in answer:
                raise VmmError(answer["error"], ExitCode(answer["code"]))
            if "ready" in answer:
                self._status.close()
                return True
            if "memory" in answer:
                self._has_memory = True
            else:
                self.warnings.append(answer["warning"])
        return False

    def let_go(self) -> None:
        """The machine lives on without this process. Idempotent."""
        self._say(LET_GO)

    def _say(self, word: bytes) -> None:
        """On the life pipe, for the last time."""
        if not self._life.closed:
            with contextlib.suppress(BrokenPipeError):
                self._life.write(word)
            self._life.close()

    def end(self) -> bool:
        """Have the machine end, in order if it can, and wait until nothing of it is left. False when its keeper was
        killed: a process of it may be there still."""
        self._status.close()
        if self._life.closed:
            self.keeper.terminate()
        self._say(END)
        if not self._has_ended(_END_TIMEOUT):
            self.keeper.kill()
        if self.keeper.wait() >= 0:
            return True
        # Its coordinator is sent SIGTERM by that, clears up, and lets the name go last (ipc/claims.py).
        owned = belongings(self.name)
        deadline = time.monotonic() + _CLEAR_TIMEOUT
        while owned.owner_pid() == self.keeper.pid and time.monotonic() < deadline:
            time.sleep(0.02)
        with contextlib.suppress(VmmError):
            collect_garbage(self.name)
        return False

    def _has_ended(self, seconds: float) -> bool:
        """The keeper, within this time. (Popen.wait with a timeout looks every 50 ms.)"""
        if self.keeper.returncode is not None:
            return True
        fd = os.pidfd_open(self.keeper.pid)
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            return bool(poll.poll(seconds * 1000))
        finally:
            os.close(fd)


def _replay_warnings(spec: MachineSpec) -> list[str]:
    """What the trace that is replayed does not have. Raises TraceError."""
    if not spec.replay_trace:
        return []
    from ..machine.tracefile import TraceReader

    with TraceReader(Path(spec.replay_trace)) as reader:
        lacking = reader.header.lacking
    return [f"{spec.replay_trace} was recorded from outside a process: {lacking}"] if lacking else []
