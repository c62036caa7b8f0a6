"""Tracking ``none``: the guest runs at full speed, and what it dirties is unknown."""

from __future__ import annotations

from ...vcpus.handle import VcpuHandle
from ...vcpus.pool import VcpuPool
from ..parts import Parts
from ..reaper import Reaper

__all__ = ["Nothing"]


class Nothing:
    """No log."""

    name = "none"
    rings, logs, logged = False, False, False

    def need(self, parts: Parts, *, fresh: bool) -> None:
        """Nothing."""

    def gather(self, reaper: Reaper) -> int:
        return 0

    def drain(self, reaper: Reaper) -> int:
        return 0

    def switch_in(self, parts: Parts, vcpus: VcpuPool) -> None:
        """Nothing."""

    def segments(self, parts: Parts, vcpu: VcpuHandle) -> tuple[str, dict[int, str]]:
        return "", {}
