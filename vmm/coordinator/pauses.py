"""What keeps the guest paused. It runs when nothing does.

There is one pause of the user's (``vmm pause``), any number of those of processes, and that of a machine which was
handed over to another host, which stays until the machine is taken back.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ipc.linux.processid import ProcessId
from ipc.shm import is_named
from ipc.steps import step

from ..errors import VmmError
from .core import Core
from .owners import Held, Hold

__all__ = ["HandedOver", "Pauses"]


class HandedOver(msgspec.Struct, frozen=True):
    """The machine was given to another host: it must not run here again, unless it is taken back."""

    to: str             # where, for people
    by: ProcessId       # the process that did it; it may have gone
    unfinished: bool = False    # it was killed before the target ran the machine, and no other has taken over yet


class Pauses:
    """``user``: the user has paused it. ``held``: the pauses of processes."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.user = False
        self.held: Held[Hold] = Held(core.owners, lambda hold: self._given_back())
        self.handed_over: HandedOver | None = None
        self._standing = False      # all vCPUs are paused on this module's account

    @property
    def paused(self) -> bool:
        """The guest is to stand still."""
        return self.user or len(self.held) > 0 or self.handed_over is not None

    @property
    def running(self) -> bool:
        """The guest has been started, has not ended, and nothing keeps it paused."""
        return self._core.state == "running" and not self.paused

    @property
    def holders(self) -> list[str]:
        """Everything that keeps it paused, for people."""
        return ([f"handed over to {self.handed_over.to}"] if self.handed_over else []) + \
               (["the user"] if self.user else []) + [hold.who for hold in self.held]

    def adopt(self, user: bool, held: list[Hold], handed_over: HandedOver | None) -> None:
        """As a coordinator that died has left it; the vCPUs stand still."""
        self.user, self.handed_over = user, handed_over
        self.held.adopt(held)
        self._follow()

    def pause(self, hold: Hold | None) -> None:
        """For a process, or (None) for the user. Every vCPU is out of the guest afterwards. May be repeated. Raises
        VmmError, with nothing held."""
        self._core.require_not_ended()
        if hold is None:
            self._pause_for_user()
        elif self.held.add(hold):
            try:
                self._stand()
            except BaseException:
                self.held.pop(hold.token)
                self._given_back()
                raise

    def _pause_for_user(self) -> None:
        if self.user:
            return
        self.user = True
        try:
            self._stand()
        except BaseException:
            self.user = False
            self._given_back()
            raise

    def _stand(self) -> None:
        self._core.save()
        step("pause-noted")
        self._follow()
        step("pause-standing")

    def resume(self, *, force: bool, held: str) -> list[str]:
        """Take back the user's pause; what still keeps it paused. ``force``: also a machine that was
        handed over; ``held``: what has it while that is under way, for people. Raises VmmError."""
        core = self._core
        core.require_not_ended()
        if self.handed_over is not None:
            to = self.handed_over.to
            if held:
                raise VmmError(f"machine '{core.spec.name}' was handed over to {to}, and {held} is still in "
                               "progress")
            if not force:
                raise VmmError(f"machine '{core.spec.name}' was handed over to {to} and runs there. If it is lost "
                               f"there for good, vmm resume --force {core.spec.name} resumes it here from the "
                               "hand-over")
            # Who takes over memory in place takes its names first (vmm/consumers/migration/target.py).
            if not all(is_named(slot.ram.name) for slot in core.parts.log.slots.values()):
                raise VmmError(f"machine '{core.spec.name}' was handed over to {to} in place, and its memory has been "
                               f"taken there: it cannot run here again; end it with: vmm stop {core.spec.name}")
        before = self.user, self.handed_over
        self.user, self.handed_over = False, None
        try:
            core.save()
        except BaseException:
            self.user, self.handed_over = before
            raise
        step("resume-noted")
        self._follow()
        return self.holders

    def give_back(self, token: str) -> bool:
        """A process' pause; False when there is none of that token."""
        if self.held.pop(token) is None:
            return False
        self._given_back()
        return True

    def hand_over(self, handed_over: HandedOver | None) -> None:
        """Stay paused whatever becomes of who asks, and of this coordinator; None takes that back. May be repeated.
        Raises VmmError with nothing changed."""
        before = self.handed_over
        self.handed_over = handed_over
        try:
            self._core.save()
        except BaseException:
            self.handed_over = before
            raise
        step("hand-over-noted")
        self._follow()

    def unfinished(self, yes: bool) -> None:
        """The migration that has handed over the machine needs a process that finishes it, or does not."""
        if self.handed_over is not None:
            self.handed_over = msgspec.structs.replace(self.handed_over, unfinished=yes)

    def _given_back(self) -> None:
        """A process no longer has a pause. The journal need not be told at once: a successor finds a pause whose
        process has gone, or the one that gave it back asks again."""
        self._follow()
        self._core.save_if_possible()

    def _follow(self) -> None:
        """Stop or let go, where that has not been done yet."""
        if self.paused == self._standing or self._core.state == "ended":
            return
        self._standing = not self._standing
        if self._standing:
            try:
                self._core.vcpus.pause_all()
                self._core.finish_call()
            except BaseException:
                self._standing = False      # it has let all of them go again
                raise
            self._tell({"event": "paused", "by": ", ".join(self.holders)})
        else:
            self._core.vcpus.resume_all()
            self._tell({"event": "resumed"})

    def tell_if_running(self) -> None:
        """By a coordinator that has taken over: the one that died may not have come to it."""
        if self.running:
            self._tell({"event": "resumed"})

    def _tell(self, event: dict[str, Any]) -> None:
        """Not of a guest that has not begun: it stands still anyway, and ``started`` says who keeps it paused."""
        if self._core.state == "running":
            self._core.tell(event)
