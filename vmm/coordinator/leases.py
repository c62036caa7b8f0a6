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
from collections.abc import Callable

from ipc.steps import step

from ..errors import VmmError
from .core import Core
from .owners import Held, Hold
from .pauses import HandedOver, Pauses

__all__ = ["KINDS", "Change", "Lease", "Leases"]


class Change(enum.StrEnum):
    """What somebody may want to do to a machine. The value completes "… cannot" for people."""

    MIGRATION = "be migrated"
    SNAPSHOT = "be saved"
    INCOMING = "arrive"
    SLOTS = "have its memory slots changed"
    UNLOG = "do without its dirty log"
    START = "be started"
    STATE = "be given another state"
    HOST_WRITE = "be written to by the host"
    REGISTER = "have a new client of its dirty log"


#: What a lease of each kind keeps everybody from, its own process too.
_KEPT_OUT = {
    "migration": {Change.MIGRATION, Change.SNAPSHOT, Change.INCOMING, Change.SLOTS, Change.UNLOG},
    "snapshot": {Change.MIGRATION, Change.INCOMING, Change.SLOTS, Change.UNLOG},
    "incoming": {Change.MIGRATION, Change.SNAPSHOT, Change.INCOMING, Change.SLOTS},
}
#: And what everybody but who shows the lease's token.
_KEPT_OUT_OTHERS = {
    "incoming": {Change.START, Change.STATE, Change.HOST_WRITE, Change.REGISTER},
}
#: What a machine that was handed over is kept from: its memory is still being sent, or not to be had any more.
_KEPT_OUT_HANDED_OVER = {Change.HOST_WRITE, Change.SLOTS}
KINDS = tuple(_KEPT_OUT)

#: What it is that goes on, and what can be done about it; with {name} and {why}.
_GOES_ON = {
    "migration": ("it is being migrated {why}", "vmm migrate cancel {name}, or wait for it"),
    "snapshot": ("a snapshot is being taken {why}", "wait for it"),
    "incoming": ("it is arriving {why}", "wait until it is here"),
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
        for lease in self.held.adopt(leases):
            self._gone(lease)

    def require(self, change: Change, token: str = "", *, but: str = "") -> None:
        """Raises VmmError when a lease keeps this out; ``token``: of the lease that whoever asks shows; ``but``: of
        one that does not count."""
        name = self._core.spec.name
        for lease in self.held:
            if lease.token == but:
                continue
            others = _KEPT_OUT_OTHERS.get(lease.kind, set())
            if change in _KEPT_OUT[lease.kind] or (change in others and lease.token != token):
                what, advice = (text.format(name=name, why=lease.why) for text in _GOES_ON[lease.kind])
                raise VmmError(f"machine '{name}' cannot {change.value} now: {what} (pid {lease.owner.pid}): "
                               f"{advice}")
            if change is Change.HOST_WRITE and lease.frozen:
                raise VmmError(f"machine '{name}' cannot {change.value} now: its memory is being copied for the "
                               f"last time by {lease.who}")
        handed_over = self._pauses.handed_over
        if handed_over is not None and change in _KEPT_OUT_HANDED_OVER:
            raise VmmError(f"machine '{name}' cannot {change.value}: it was handed over to {handed_over.to}")

    @property
    def at_hand_over(self) -> str:
        """Who has the machine for a migration, for people; empty: nobody."""
        return next((lease.who for lease in self.held if lease.kind == "migration"), "")

    # --- verbs; all may be repeated --------------------------------------------------------------

    def take(self, lease: Lease, *, recover: bool) -> None:
        """``recover``: a migration that goes on with a machine which was handed over. Raises VmmError."""
        core, name = self._core, self._core.spec.name
        core.require_not_ended()
        if lease.kind not in KINDS:
            raise VmmError(f"unknown lease '{lease.kind}' (there are: {', '.join(KINDS)})")
        self.require(Change[lease.kind.upper()], but=lease.token)
        handed_over = self._pauses.handed_over
        if lease.kind == "incoming":
            if self.held.get(lease.token) is None:
                core.require_not_started()
        elif recover and handed_over is None:
            raise VmmError(f"machine '{name}' was not handed over, or has been taken back since")
        elif handed_over is not None and not recover and self.held.get(lease.token) is None:
            raise VmmError(f"machine '{name}' was handed over to {handed_over.to}")
        if not self.held.add(lease):
            return
        try:
            core.save()
        except BaseException:
            self.held.pop(lease.token)
            raise
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
        """Host writes may begin; the guest runs on, if nobody else holds it."""
        lease = self._lease(token)
        lease.frozen = False
        if not self._pauses.give_back(token):
            self._core.save_if_possible()

    def hand_over(self, token: str, to: str) -> None:
        """The machine is not this host's any more, from before this returns. Raises VmmError."""
        lease = self._lease(token)
        if lease.kind != "migration":
            raise VmmError(f"a machine is handed over by a migration, not by a {lease.kind}")
        if not lease.frozen and self._pauses.handed_over is None:
            raise VmmError(f"machine '{self._core.spec.name}' is not frozen: it cannot be handed over")
        self._pauses.hand_over(HandedOver(to, lease.owner))

    def take_back(self, token: str) -> None:
        """It was not taken. Raises VmmError."""
        self._lease(token)
        self._pauses.hand_over(None)

    def end(self, token: str) -> bool:
        """False when there is none of that token."""
        if self.held.pop(token) is None:
            return False
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
            self._core.save_if_possible()
            self._unfinished()
        else:
            self._core.save_if_possible()
