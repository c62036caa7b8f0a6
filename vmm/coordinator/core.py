"""What the coordinator's modules share: the machine's parts, its state, and checks that many verbs begin with."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ipc.layout import ExitReason, VcpuState
from ipc.messages import ProgramCalls
from ipc.shm import is_named, is_same, unlink_segment

from ..dirty.parts import Parts
from ..dirty.reaper import Reaper
from ..dirty.verify import AnyVerifier
from ..errors import ExitCode, VmmError, no_memory
from ..machine.events import Tracer
from ..machine.spec import MachineSpec
from ..vcpus.handle import VcpuHandle
from ..vcpus.pool import VcpuPool
from .owners import Owners

__all__ = ["Core"]

_CALL_TIMEOUT = 30.0        # seconds for a program's system to come to the end of a call
_REQUESTS = 64      # a client has one under way at a time


class Core:
    """``state``: starting, ready, running, ended (a pause is vmm/coordinator/pauses.py's). ``tell`` gives an
    event to every client that wants it, ``report`` makes the machine's, ``write_journal`` writes down what is now,
    or raises VmmError; None: not yet, until all that a predecessor has left has been taken over."""

    def __init__(self, spec: MachineSpec, directory: Path, tracer: Tracer) -> None:
        self.spec = spec
        self.directory = directory
        self.tracer = tracer
        self.owners = Owners()
        self.state = "starting"
        #: Its memory comes from elsewhere, and whoever launched it is to have it alone (leases.py).
        self.incoming = False
        #: {slot: segment}: of another machine, whose memory this one has from when it is started.
        self.links: dict[int, str] = {}
        self.verifier: AnyVerifier | None = None
        self.parts: Parts
        self.vcpus: VcpuPool
        self.reaper: Reaper
        self.tell: Callable[[dict[str, Any]], None]
        self.report: Callable[[], dict[str, Any]]
        self.write_journal: Callable[[], None] | None = None
        #: The last attempt to write the journal has failed.
        self.unsaved = False
        #: The last that was given to a slot or a client.
        self.generation = 0
        #: What is being served: the client's name for it, the same when it asks again; "" where it has none.
        self.request = ""
        #: Process id of the client that asks for it; 0: it is in a PID namespace that is not seen from here.
        self.asker = 0
        #: Those that are not to be carried out twice, and have been.
        self.requests: deque[str] = deque(maxlen=_REQUESTS)
        #: Coordinators of this machine that died.
        self.restarts = 0
        #: Of this coordinator's loop.
        self.turns = 0
        #: Of a machine that runs Linux programs: what its system has served.
        self.program_calls: ProgramCalls | None = None
        #: Pages of RAM are missing still (post-copy, a lazy restore).
        self.pages_missing = False
        #: Why workers were killed that might have waited for such a page for ever.
        self.killed_for = ExitReason.NONE
        #: For people: what was lost with which the guest can never continue.
        self.lost = ""

    def take_memory(self) -> None:
        """Handed over in place: from here on the machine that had it cannot run with it (pauses.py). Once it is
        written down that this one runs, and before its guest does. May be repeated."""
        for slot, other in self.links.items():
            found = self.parts.log.slots.get(slot)
            if found is not None and is_same(found.ram.name, other):    # not a later machine's of that name
                unlink_segment(other)

    @property
    def given_away(self) -> bool:
        """Another machine has taken this one's memory, and writes to it."""
        return self.spec.can.guests and not all(is_named(slot.ram.name) for slot in self.parts.log.slots.values())

    # --- the journal --------------------------------------------------------------------------

    def new_generation(self) -> int:
        """A number that nothing of this machine had before."""
        self.generation = max(time.time_ns(), self.generation + 1)
        return self.generation

    def save(self, *, done: bool = False) -> None:
        """Write the journal, before anything relies on what it is to say. ``done``: the request has been carried out
        with this, and must not be again. Raises VmmError, and the caller takes back what it has changed."""
        if self.write_journal is None:
            return
        if done:
            self.carried_out()
        try:
            self.write_journal()
        except VmmError:
            if done and self.request:
                self.requests.pop()
            raise
        self.unsaved = False
        self.parts.log.committed()

    def carried_out(self) -> None:
        """What is being served must not be done again."""
        if self.request:
            self.requests.append(self.request)

    def save_if_possible(self) -> None:
        """For what no client waits for, and what a process gives back, or leaves when it ends: that must not fail
        because the journal cannot be written; it is tried again. Should this coordinator die before, its successor
        finds that the process has gone, or at the worst holds for it what it had given back, until it has."""
        try:
            self.save()
        except VmmError as exc:
            if not self.unsaved:
                self.warn(str(exc))
            self.unsaved = True

    def warn(self, text: str) -> None:
        """Something that a user should know; the machine keeps running."""
        self.tell({"event": "warning", "text": text})

    @property
    def live(self) -> list[VcpuHandle]:
        """Those whose process is there."""
        return [s for s in self.vcpus.all if s.alive]

    @property
    def verifying(self) -> bool:
        """The verifier reads all memory; not before all of it is there. And it looks into the log."""
        return self.verifier is not None and not self.pages_missing and self.parts.mode.logged

    def flush(self) -> None:
        if self.state == "running":
            self.reaper.flush()

    def drain_and_verify(self) -> None:
        """With every vCPU paused."""
        assert self.verifier is not None
        self.reaper.drain()
        self.verifier.round()

    def finish_call(self) -> None:
        """With every vCPU paused: a program's system that stands in the middle of a call, because its ring is full,
        goes on to the end of it. So it can be saved."""
        if self.spec.program is None:
            return
        system, deadline = self.vcpus.all[-1], time.monotonic() + _CALL_TIMEOUT
        while system.alive and system.control.state == VcpuState.IN_CALL and time.monotonic() < deadline:
            self.reaper.wake("ring-full")
            self.vcpus.resume([system])
            self.vcpus.pause([system])

    # --- checks; each raises VmmError ---------------------------------------------------------

    def require_not_ended(self) -> None:
        if self.state == "ended":
            raise VmmError(f"machine '{self.spec.name}' has ended", ExitCode.NO_MACHINE)

    def require_not_started(self) -> None:
        if self.state != "ready":
            raise VmmError(f"machine '{self.spec.name}' has already been started")

    def require_whole_memory(self) -> None:
        if self.pages_missing:
            raise VmmError(f"machine '{self.spec.name}': its memory is still arriving (post-copy); wait until it is "
                           "complete")

    def require_state(self) -> None:
        if not self.spec.can.guests:
            raise VmmError(no_memory(self.spec.name))
