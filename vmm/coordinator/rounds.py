"""The verifier's rounds: every ``verify.interval`` seconds all vCPUs are paused, the rings drained, and the log
compared with memory (vmm/dirty/verify.py)."""

from __future__ import annotations

import time

from ..dirty.verify import Verification, make_verifier
from ..machine import boot
from ..machine.spec import VerifySpec
from .core import Core

__all__ = ["Rounds"]


class Rounds:
    """Of a machine that is verified, and of one that is not (none are due)."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._round = 0
        self._next: float | None = None     # seconds of CLOCK_MONOTONIC; None: the guest has not run yet

    @property
    def _spec(self) -> VerifySpec | None:
        return self._core.spec.verify

    def begin(self, predecessors: Verification | None = None, *, started: bool = False) -> None:
        """Make the verifier; ``predecessors``: what it had found under a coordinator that died. ``started``: that one
        had let the guest run: the round that it may have been in is made up for at once. Raises SegmentError."""
        core = self._core
        if self._spec is None:
            return
        core.verifier = make_verifier(self._spec, core.parts.log, core.vcpus.all, core.parts.control,
                                      core.parts.usable, predecessors, memory=core.spec.can.guests)
        if started:
            self._next = time.monotonic()

    def left(self, now: float) -> float | None:
        """Seconds until a round is due, with the guest running; None: none will be."""
        if not self._core.verifying or self._spec is None:
            return None
        if self._next is None:
            self._next = now + self._spec.interval
        return self._next - now

    def run(self) -> None:
        """A round."""
        core = self._core
        assert self._spec is not None
        with core.vcpus.all_paused():
            core.drain_and_verify()
            core.save_if_possible()
            self._round += 1
            boot.set_round(memoryview(core.parts.system.buf), self._round)
        self._next = time.monotonic() + self._spec.interval

    def close(self) -> None:
        """Idempotent."""
        if self._core.verifier is not None:
            self._core.verifier.close()
