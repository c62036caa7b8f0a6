"""The machine as its coordinator has it: the core, its life, and an object for each family of verbs that keeps
something (vmm/coordinator/table.py has the table of all verbs)."""

from __future__ import annotations

from ..machine.report import Holder
from .clients import Clients
from .core import Core
from .incoming import Incoming
from .journal import Holds, Saved
from .leases import Leases
from .life import Life
from .limits import Limits
from .pauses import Pauses
from .recording import Recording
from .recovery import Recovery
from .tracking import TrackingSwitch
from .writes import HostWrites

__all__ = ["Families"]


class Families:
    """``asked_tracking``: one of vmm.machine.trackings.CHOICES."""

    def __init__(self, core: Core, asked_tracking: str) -> None:
        self.core = core
        self.life = Life(core)
        self.tracking = TrackingSwitch(core, asked_tracking)
        self.pauses = Pauses(core)
        recovery = Recovery(core.spec.name, core.owners, self._is_unfinished)
        self.leases = Leases(core, self.pauses, self.life.go, recovery.begin)
        self.limits = Limits(core, self.tracking)
        self.clients = Clients(core, self.tracking)
        self.recording = Recording(core, self.tracking)
        self.writes = HostWrites(core)
        self.incoming = Incoming(core, self.tracking)

    def _is_unfinished(self) -> bool:
        handed_over = self.pauses.handed_over
        return handed_over is not None and handed_over.unfinished

    def saved(self) -> Saved:
        """All of it, for a successor (vmm/coordinator/takeover.py)."""
        core, life, log = self.core, self.life, self.core.parts.log
        return Saved(
            restarts=core.restarts, generation=core.generation, requests=list(core.requests),
            slots=[slot.now for slot in log.slots.values()], reused=sorted(log.reused), clients=log.saved_clients(),
            holds=self._holds(), workers=[s.process for s in core.vcpus.all],
            exits={s.index: s.exited for s in core.vcpus.all if s.exited is not None},
            started=life.started, elapsed=life.elapsed_at_end, stopping=life.stopping,
            stopped_by=life.stopped_by,
            tracking=core.parts.tracking, asked_tracking=self.tracking.asked, logging=log.on,
            incoming=core.incoming,
            verification=core.verifier.result if core.verifier else None)

    def _holds(self) -> Holds:
        pauses, limits = self.pauses, self.limits
        return Holds(user_paused=pauses.user, pauses=list(pauses.held), handed_over=pauses.handed_over,
                     leases=list(self.leases.held), user_limits=limits.user, limits=list(limits.held),
                     clients=list(self.clients.held), writes=list(self.writes.held), incoming=self.incoming.owner)

    def holders(self) -> list[Holder]:
        """Who has what of the machine, for its report; pid 0: the user."""
        pauses, limits, recorder = self.pauses, self.limits, self.recording.owner
        holders: list[tuple[str, str, int]] = []
        if pauses.user:
            holders.append(("pause", "user", 0))
        if any(limits.user):
            holders.append(("limit", "user", 0))
        for what, held in (("pause", pauses.held), ("limit", limits.held)):
            holders += [(what, hold.why, hold.owner.pid) for hold in held]
        for client in self.core.parts.log.clients:
            owned = self.clients.held.get(client)
            holders.append(("client", client, owned.owner.pid if owned else 0))
        holders += [("lease", f"{lease.kind} {lease.why}", lease.owner.pid) for lease in self.leases.held]
        if recorder is not None:
            holders.append(("recording", "trace", recorder.pid))
        return [Holder(what=what, why=why, pid=pid) for what, why, pid in holders]
