"""The dirty limit: how many pages per second a vCPU may dirty (workers/throttle.py holds it to that).

The user's limit stays; those of processes are added to it and go with them. The lowest applies.
"""

from __future__ import annotations

import msgspec

from ipc.steps import step

from ..errors import VmmError
from ..machine.rules import check_quota
from ..machine.spec import MachineSpec
from .core import Core
from .owners import Held, Hold
from .tracking import TrackingSwitch

__all__ = ["Limit", "Limits", "with_limits"]


class Limit(Hold):
    """A process' limits. ``quotas``: {vCPU: pages per second}, above 0."""

    quotas: dict[int, int] = msgspec.field(default_factory=dict)


class Limits:
    """``user``: of each vCPU, pages per second; 0: none."""

    def __init__(self, core: Core, tracking: TrackingSwitch) -> None:
        self._core = core
        self._tracking = tracking
        self.user = list(core.spec.quotas)
        self.held: Held[Limit] = Held(core.owners, lambda limit: self._lifted())

    def adopt(self, user: list[int], held: list[Limit]) -> None:
        """As a coordinator that died has left them."""
        self.user = list(user)
        self.held.adopt(held)
        self._follow()

    def set(self, pages_per_s: int, vcpu: int | None, hold: Limit | None) -> None:
        """Of one vCPU, or (None) of each; 0 lifts it. ``hold``: a process' (its quotas are not looked at); None:
        the user's. In force afterwards. Raises VmmError."""
        core = self._core
        core.require_not_ended()
        vcpus = self._checked(pages_per_s, vcpu)
        if pages_per_s and core.spec.ring_entries:  # auto: to a ring
            self._tracking.choose(limited=True)
        if pages_per_s and not core.parts.ring_entries:
            raise VmmError(f"a dirty limit needs dirty rings, but the tracking mode is {core.parts.tracking}")
        before = list(self.user)
        fresh = hold is not None and self.held.add(hold)
        there = None if hold is None else self.held.get(hold.token)
        quotas = {} if there is None else dict(there.quotas)
        for i in vcpus:
            if there is None:
                self.user[i] = pages_per_s
            elif pages_per_s:
                there.quotas[i] = pages_per_s
            else:
                there.quotas.pop(i, None)
        try:
            core.save()
        except BaseException:
            self.user = before
            if there is not None:
                there.quotas = quotas
                if fresh:
                    self.held.pop(there.token)
            raise
        step("limit-noted")
        self._follow()

    def give_back(self, token: str) -> bool:
        """A process' limits; False when there are none of that token."""
        if self.held.pop(token) is None:
            return False
        self._lifted()
        return True

    def _checked(self, pages_per_s: int, vcpu: int | None) -> range:
        count = len(self.user)
        check_quota(pages_per_s)
        if vcpu is None:
            return range(count)
        if not 0 <= vcpu < count:
            raise VmmError(f"there is no vCPU {vcpu} (existing vCPUs: 0 to {count - 1})")
        return range(vcpu, vcpu + 1)

    def quota(self, vcpu: int) -> int:
        """What applies to this vCPU: the lowest of all; 0: none."""
        quotas = [self.user[vcpu], *(limit.quotas.get(vcpu, 0) for limit in self.held)]
        return min((q for q in quotas if q), default=0)

    def _lifted(self) -> None:
        self._follow()
        self._core.save_if_possible()

    def _follow(self) -> None:
        for vcpu in self._core.vcpus.all:
            quota = self.quota(vcpu.index)
            if vcpu.control.dirty_quota != quota:
                vcpu.control.dirty_quota = quota
                if vcpu.running:
                    vcpu.kick()    # out of the guest, or out of its wait: the new quota counts at once


def with_limits(spec: MachineSpec, user: list[int]) -> MachineSpec:
    """The specification with a user's limits as they are now."""
    same = len(set(user)) == 1
    return msgspec.structs.replace(spec, dirty_quota=user[0] if same else 0,
                                   dirty_quotas=[] if same else list(user))
