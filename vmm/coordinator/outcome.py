"""What the end of a machine means: its exit code, and the cause for people."""

from __future__ import annotations

from ipc.layout import ExitReason

from ..errors import ExitCode
from .core import Core

__all__ = ["cause_of", "exit_code", "reason_text"]

_CRASHES = frozenset({ExitReason.TRIPLE_FAULT, ExitReason.EXCEPTION, ExitReason.BAD_ADDRESS,
                      ExitReason.UNKNOWN_PORT, ExitReason.INTERNAL_ERROR, ExitReason.HALT})
_DEATHS = frozenset({ExitReason.WORKER_DIED, ExitReason.UNKNOWN})


def reason_text(reason: ExitReason) -> str:
    return reason.name.lower().replace("_", "-")


def exit_code(core: Core) -> ExitCode:
    """The worst of what happened, in the order of what a user must know first."""
    reasons = {ExitReason(s.control.exit_reason) for s in core.vcpus.all}
    if core.killed_for != ExitReason.NONE:
        reasons = reasons - _DEATHS | {core.killed_for}
    if core.verifier is not None and not core.verifier.result.ok:
        return ExitCode.VERIFY_FAILED
    if reasons & _DEATHS:
        return ExitCode.WORKER_DIED
    if reasons & _CRASHES:
        return ExitCode.GUEST_CRASHED
    if ExitReason.TIMEOUT in reasons:
        return ExitCode.TIMEOUT
    if ExitReason.STOPPED in reasons:
        return ExitCode.STOPPED
    if any(s.control.exit_code for s in core.vcpus.all):
        return ExitCode.GUEST_FAILED
    return ExitCode.OK


def cause_of(core: Core, stopped_by: str) -> str:
    """Why the machine has ended, for people: what its exit code is about. ``stopped_by``: if it was stopped."""
    code = exit_code(core)
    if code is ExitCode.VERIFY_FAILED:
        assert core.verifier is not None
        result = core.verifier.result
        return f"verification failed: {result.lost_pages} pages lost, {result.surplus_pages} surplus"
    if code in (ExitCode.WORKER_DIED, ExitCode.GUEST_CRASHED):
        causes = [core.lost] if core.lost else []
        causes += [f"vCPU {s.index}: {reason_text(reason)}" for s in core.vcpus.all
                   if (reason := ExitReason(s.control.exit_reason)) in _CRASHES | {ExitReason.WORKER_DIED}]
        return "; ".join(causes)
    if code is ExitCode.GUEST_FAILED:
        return "; ".join(f"vCPU {s.index} ended with code {s.control.exit_code}" for s in core.vcpus.all
                         if s.control.exit_code)
    return {ExitCode.TIMEOUT: "timeout", ExitCode.STOPPED: stopped_by}.get(code, "every vCPU ended with code 0")
