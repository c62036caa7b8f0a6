"""From what happens to a machine to the events that QMP tells of it: decisions without I/O.

The machine's own events (docs/protocol.md) come from its coordinator, which may be replaced: a pause that is told
twice is one STOP. A machine that is upgraded is paused in its old processes, and started in its new ones. A migration's
report is looked at now and then (server.py), so states that it surely went through in between are told too."""

from __future__ import annotations

from typing import Any

from ...errors import ExitCode

__all__ = ["STATUS", "Story", "Told"]

Told = list[tuple[str, dict[str, Any]]]

#: A migration's status, by that of its report (vmm/consumers/migration/report.py).
STATUS = {"setup": "setup", "active": "active", "device": "device", "handed-over": "device",
          "handed-over-paused": "postcopy-paused", "postcopy-active": "postcopy-active",
          "postcopy-paused": "postcopy-paused", "completed": "completed", "failed": "failed",
          "cancelled": "cancelled"}
#: Which come one after the other.
_WAY = ("setup", "active", "device", "completed")
_BEFORE_CANCELLED = "cancelling"

#: Why a vCPU ends whose guest is to blame (vmm/coordinator/outcome.py).
_PANICS = frozenset({"triple-fault", "exception", "bad-address", "unknown-port", "halt"})


class Story:
    """Of one machine, from when its report was this one (vmm/machine/report.py)."""

    def __init__(self, report: dict[str, Any]) -> None:
        self._stopped = report["state"] != "running"
        #: The client has asked for the end.
        self.quit = False
        self._panicked = False
        self._migration, self._status, self._passes = "", "", 0

    def looked(self, report: dict[str, Any]) -> Told:
        """It is so by now, and what came before may not have been heard."""
        return [] if report["state"] == "ended" else self._stands(report["state"] != "running")

    def _stands(self, stopped: bool) -> Told:
        before, self._stopped = self._stopped, stopped
        return [] if stopped == before else [("STOP" if stopped else "RESUME", {})]

    def _crashed(self) -> Told:
        told: Told = [] if self._panicked else [("GUEST_PANICKED", {"action": "poweroff"})]
        self._panicked = True
        return told

    def heard(self, event: dict[str, Any]) -> Told:
        """An event of the machine, other than its last."""
        kind = event["event"]
        if kind in ("paused", "resumed"):
            return self._stands(kind == "paused")
        if kind == "started":
            return self._stands(bool(event["held_by"]))
        if kind == "exit" and event["reason"] in _PANICS:
            return self._crashed()
        return []

    def ended(self, report: dict[str, Any]) -> Told:
        """The machine has ended, and does not go on elsewhere; its last report. What is known of its vCPUs by then
        counts, whoever had heard of it."""
        reasons = {vcpu["exit_reason"] for vcpu in report.get("vcpus", [])}
        told = self._crashed() if reasons & _PANICS else []
        if self.quit:
            reason = "host-qmp-quit"
        elif self._panicked:
            reason = "guest-panic"
        elif reasons == {"code"}:
            reason = "guest-shutdown"
        else:
            reason = "host-signal" if report["exit_code"] == ExitCode.STOPPED else "host-error"
        return [*told, ("SHUTDOWN", {"guest": reason.startswith("guest-"), "reason": reason})]

    def migration(self, report: dict[str, Any], *, tell: bool = True) -> Told:
        """The report of its last migration, of those that leave. ``tell``: somebody wants to know (QEMU's migration
        capability "events")."""
        if report["direction"] != "outgoing":
            return []
        if report["id"] != self._migration:
            self._migration, self._status, self._passes = report["id"], "", 0
        states = self._passed(STATUS[report["status"]])
        told: Told = [("MIGRATION", {"status": status}) for status in states]
        passes = report["ram"]["dirty_sync_count"] + (report["status"] == "active")    # begun
        at = states.index("active") + 1 if "active" in states else 0
        told[at:at] = [("MIGRATION_PASS", {"pass": n}) for n in range(self._passes + 1, passes + 1)]
        self._passes = max(self._passes, passes)
        return told if tell else []

    def _passed(self, status: str) -> list[str]:
        """States from the last one that was told up to this one."""
        before, self._status = self._status, status
        if status == before:
            return []
        if status in _WAY:
            first = _WAY.index(before) + 1 if before in _WAY else 0 if not before else _WAY.index(status)
            return list(_WAY[first:_WAY.index(status) + 1]) or [status]
        return ["setup"] * (not before) + [_BEFORE_CANCELLED] * (status == "cancelled") + [status]
