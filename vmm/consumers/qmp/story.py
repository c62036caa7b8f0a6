"""From what happens to a machine to the events that QMP tells of it: decisions without I/O.

The machine's own events (docs/protocol.md) come from its coordinator, which may be replaced: a pause that is told
twice is one STOP. A migration's report is looked at now and then (server.py), so states that it surely went through
in between are told too."""

from __future__ import annotations

from typing import Any

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
_CLEAN = frozenset({"code"})


class Story:
    """Of one machine, from when somebody looks. ``stopped``: its guest stood still then."""

    def __init__(self, *, stopped: bool) -> None:
        self.stopped = stopped
        #: The client has asked for the end.
        self.quit = False
        self._panicked = False
        self._reasons: set[str] = set()
        self._migration, self._status, self._passes = "", "", 0

    def heard(self, event: dict[str, Any]) -> Told:
        """An event of the machine, other than its last."""
        kind = event["event"]
        if kind == "paused" and not self.stopped:
            self.stopped = True
            return [("STOP", {})]
        if kind == "resumed" and self.stopped:
            self.stopped = False
            return [("RESUME", {})]
        if kind == "exit":
            self._reasons.add(event["reason"])
            if event["reason"] in _PANICS and not self._panicked:
                self._panicked = True
                return [("GUEST_PANICKED", {"action": "poweroff"})]
        return []

    def ended(self) -> Told:
        """The machine has ended, and does not go on elsewhere."""
        guest = bool(self._reasons) and self._reasons <= _CLEAN | _PANICS
        if self.quit:
            guest, reason = False, "host-qmp-quit"
        elif self._panicked:
            reason = "guest-panic"
        elif guest:
            reason = "guest-shutdown"
        else:
            reason = "host-signal" if self._reasons <= {"stopped", "code"} and self._reasons else "host-error"
        return [("SHUTDOWN", {"guest": guest, "reason": reason})]

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
