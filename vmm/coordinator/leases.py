"""Leases: a process has the machine for something that others must not disturb.

What each kind keeps out stands in ``_KEPT_OUT``, and nowhere else; whoever carries out a verb asks here first
(``Leases.require``). A lease ends with its process. Two do not exclude one another unless the table says so: two
snapshots at once each have their own client of the dirty log, and their own pause.

**Freeze** is for the last copy of a machine's memory. Until the lease ends (or thaws) the guest stands still, and
no host write can begin. Those that have begun are told to whoever freezes, who asks again until there are none
before it looks what is dirty; so whatever it finds then is all there is.

**Commit** makes the pause of a frozen machine permanent: it belongs to another host from then on.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable

from ipc.steps import step

from ..errors import VmmError
from .core import Core
from .owners import Held, Hold
from .pauses import HandedOver, Pauses

__all__ = ["KINDS", "Change", "Lease", "Leases"]


_log = logging.getLogger(__name__)


class Change(enum.StrEnum):
    """What a client may want to do to a machine. The value completes "… cannot" in error messages."""

    MIGRATION = "be migrated"
    SNAPSHOT = "have a snapshot taken"
    INCOMING = "be received"
    SLOTS = "have its memory slots changed"
    UNLOG = "have its dirty logging stopped"
    START = "be started"
    STATE = "have its state set"
    HOST_WRITE = "be written to by the host"
    REGISTER = "take a new dirty-log client"


#: What a lease of each kind keeps every process from, its own too.
_KEPT_OUT = {
    "migration": {Change.MIGRATION, Change.SNAPSHOT, Change.INCOMING, Change.SLOTS, Change.UNLOG},
    "snapshot": {Change.MIGRATION, Change.INCOMING, Change.SLOTS, Change.UNLOG},
    "incoming": {Change.MIGRATION, Change.SNAPSHOT, Change.INCOMING, Change.SLOTS},
}
#: And what it keeps everybody from who does not show the lease's token.
_KEPT_OUT_OTHERS = {
    "incoming": {Change.START, Change.STATE, Change.HOST_WRITE, Change.REGISTER},
}
#: What a machine that was handed over is kept from: its memory is still being sent, or no longer current.
_KEPT_OUT_HANDED_OVER = {Change.HOST_WRITE, Change.SLOTS}
KINDS = tuple(_KEPT_OUT)

#: What is in progress, and what can be done about it; with {name} and {why}.
_IN_PROGRESS = {
    "migration": ("it is being migrated {why}", "wait for it, or run vmm migrate cancel {name}"),
    "snapshot": ("a snapshot is being taken {why}", "wait until it is done"),
    "incoming": ("it is still arriving {why}", "wait until it has arrived"),
}


class Lease(Hold):
    """What a process has of the machine as long as it lives; ``frozen``: and the guest stands still."""

    kind: str
    frozen: bool = False

    @property
    def who(self) -> str:
        return f"{self.kind} {self.why} (pid {self.owner.pid})"


class Leases:
    """``abandoned`` is called when the process of a machine that was arriving has gone before it was started,
    ``unfinished`` when that of a migration has gone after the machine was handed over."""

    def __init__(self, core: Core, pauses: Pauses, abandoned: Callable[[], None],
                 unfinished: Callable[[], None]) -> None:
        self._core = core
        self._pauses = pauses
        self._abandoned = abandoned
        self._unfinished = unfinished
        self.held: Held[Lease] = Held(core.owners, self._gone)

    def adopt(self, leases: list[Lease]) -> None:
        """As a coordinator that died has left them. After the pauses."""
        handed_over = self._pauses.handed_over
        for lease in self.held.adopt(leases):
            self._gone(lease)
        if handed_over is not None and handed_over.unfinished and not self.at_hand_over:
            self._unfinished()      # whatever process the last coordinator had begun: only one can have the lease

    def require(self, change: Change, token: str = "", *, but: str = "") -> None:
        """Raises VmmError when a lease keeps this out; ``token``: of the lease that whoever asks shows; ``but``: of
        one that does not count."""
        name = self._core.spec.name
        for lease in self.held:
            if lease.token == but:
                continue
            others = _KEPT_OUT_OTHERS.get(lease.kind, set())
            if change in _KEPT_OUT[lease.kind] or (change in others and lease.token != token):
                what, advice = (text.format(name=name, why=lease.why) for text in _IN_PROGRESS[lease.kind])
                raise VmmError(f"machine '{name}' cannot {change.value} now: {what} (pid {lease.owner.pid}); "
                               f"{advice}")
            if change is Change.HOST_WRITE and lease.frozen:
                raise VmmError(f"machine '{name}' cannot {change.value} now: its memory is being copied for the "
                               f"last time ({lease.who}); wait for that")
        if self._is_awaited and change is not Change.INCOMING and change in (
                _KEPT_OUT["incoming"] | _KEPT_OUT_OTHERS["incoming"]):
            raise VmmError(f"machine '{name}' cannot {change.value} now: it is still arriving; wait until it has "
                           "arrived")
        handed_over = self._pauses.handed_over
        if handed_over is not None and change in _KEPT_OUT_HANDED_OVER:
            raise VmmError(f"machine '{name}' cannot {change.value}: it was handed over to {handed_over.to}")

    @property
    def _is_awaited(self) -> bool:
        """Its memory comes from elsewhere, and who brings it has no lease yet."""
        return (self._core.incoming and self._core.state == "ready"
                and not any(lease.kind == "incoming" for lease in self.held))

    @property
    def at_hand_over(self) -> str:
        """The process that has the machine for a migration, for people; empty: none."""
        return next((lease.who for lease in self.held if lease.kind == "migration"), "")

    def has_migration(self, token: str) -> bool:
        """This lease is there, and a migration's."""
        lease = self.held.get(token)
        return lease is not None and lease.kind == "migration"

    # --- verbs; all may be repeated --------------------------------------------------------------

    def take(self, lease: Lease, *, recover: bool) -> None:
        """``recover``: a migration that continues with a machine which was handed over. Raises VmmError."""
        core, name = self._core, self._core.spec.name
        core.require_not_ended()
        if lease.kind not in KINDS:
            raise VmmError(f"unknown lease '{lease.kind}' (choose from {', '.join(KINDS)})")
        self.require(Change[lease.kind.upper()], but=lease.token)
        handed_over = self._pauses.handed_over
        if lease.kind == "incoming":
            if self.held.get(lease.token) is None:
                core.require_not_started()
        elif recover and handed_over is None:
            raise VmmError(f"machine '{name}' has not been handed over, or has been taken back since")
        elif handed_over is not None and not recover and self.held.get(lease.token) is None:
            raise VmmError(f"machine '{name}' was handed over to {handed_over.to}")
        if not self.held.add(lease):
            return
        self._pauses.unfinished(False)
        try:
            core.save()
        except BaseException:
            self.held.pop(lease.token)
            self._pauses.unfinished(handed_over is not None and handed_over.unfinished)
            raise
        if lease.kind == "incoming":
            _log.info("it arrives %s", lease.why)
        step("lease-noted")

    def freeze(self, token: str) -> None:
        """May be asked for again and again, until no write is under way. Raises VmmError."""
        lease = self._lease(token)
        if lease.frozen and self._pauses.held.get(token) is not None:
            return
        before, lease.frozen = lease.frozen, True
        try:
            self._core.save()
            step("freeze-noted")
            self._pauses.pause(Hold(lease.token, f"{lease.kind} {lease.why}", lease.owner))
        except BaseException:
            lease.frozen = before
            self._core.save_if_possible()
            raise

    def thaw(self, token: str) -> None:
        """Host writes may begin; the guest continues, if nothing else holds it."""
        lease = self._lease(token)
        lease.frozen = False
        if not self._pauses.give_back(token):
            self._core.save_if_possible()

    def hand_over(self, token: str, to: str) -> None:
        """The machine is no longer this host's, from before this returns. Raises VmmError."""
        lease = self._lease(token)
        if lease.kind != "migration":
            raise VmmError(f"only a migration can hand over a machine (this lease is of kind {lease.kind})")
        if not lease.frozen and self._pauses.handed_over is None:
            raise VmmError(f"machine '{self._core.spec.name}' is not frozen and cannot be handed over")
        self._pauses.hand_over(HandedOver(to, lease.owner))

    def take_back(self, token: str) -> None:
        """It was not taken. Raises VmmError."""
        self._lease(token)
        self._pauses.hand_over(None)

    def end(self, token: str) -> bool:
        """False when there is no lease of that token."""
        lease = self.held.pop(token)
        if lease is None:
            return False
        if lease.kind == "incoming":
            self._core.incoming = False     # it has arrived, started or not
        if not self._pauses.give_back(token):
            self._core.save_if_possible()
        return True

    def _lease(self, token: str) -> Lease:
        self._core.require_not_ended()
        lease = self.held.get(token)
        if lease is None:
            raise VmmError(f"machine '{self._core.spec.name}': this lease has ended")
        return lease

    def _gone(self, lease: Lease) -> None:
        """Its process has ended; its pause goes the same way."""
        if lease.kind == "incoming" and self._core.state == "ready":
            self._core.tell({"event": "incoming-lost",
                             "detail": f"{lease.who} ended before the machine was started"})
            self._abandoned()
        elif lease.kind == "migration" and self._pauses.handed_over is not None:
            self._pauses.unfinished(True)       # noted first: should this coordinator die now, the next one begins it
            self._core.save_if_possible()
            step("unfinished-noted")
            self._unfinished()
        else:
            self._core.save_if_possible()
