"""The report of a machine, typed: what ``vmm status --json``, ``Machine.status`` and ``Machine.wait`` show, and
what is kept of a machine that has ended. docs/report.schema.json is its JSON schema (``vmm schema report``).

``VERSION`` changes when a field is renamed, goes, or means something else; a field that comes does not change it.
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

__all__ = ["VERSION", "CoordinatorReport", "Holder", "ProgramReport", "ReaperReport", "Report", "SlotReport",
           "VcpuReport", "VerificationReport", "report_schema"]

VERSION = 1


class CoordinatorReport(msgspec.Struct, frozen=True, kw_only=True):
    """The coordinator that answers."""

    pid: int
    restarts: int               # how many coordinators have died before this one
    turns: int                  # of its loop
    bad_messages: int           # of workers, dropped
    program: str                # version of this program


class VcpuReport(msgspec.Struct, frozen=True, kw_only=True):
    """One vCPU; counts and times since its start."""

    index: int
    pid: int
    accelerator: str
    state: str                  # new, ready, running, ring-full, in-call, waiting, paused, throttled, exited, dead,
                                # unknown
    exit_reason: str | None     # None: its guest has not ended
    exit_code: int | None
    detail: str
    registers: dict[str, int] | None    # of a guest that ended badly
    dirty_pages: int            # entries harvested, or bits gathered
    ring_used: int              # entries that are not free now: harvested and not reset, or not harvested
    ring_full_exits: int
    resets: int
    reset_s: float              # seconds in reset calls
    ring_rebuilds: int          # after the ring's counts did not match
    bad_entries: int            # dropped: as_id, slot or offset cannot be
    guest_entries: int
    guest_s: float              # seconds in the guest, at ring-full, throttled; each is counted when it is over
    stalled_s: float
    dirty_limit_pages_per_s: int    # 0: none
    throttled_s: float


class ProgramReport(msgspec.Struct, frozen=True, kw_only=True):
    """The Linux program of a machine."""

    args: list[str]
    exit_status: int | None     # as a shell has it; None: it has not ended, or not by itself
    calls: int                  # system calls and faults that its system has served
    missing_calls: dict[str, int]   # that it does not know (ENOSYS): {name: how often}
    refused_threads: int        # threads and processes that there was no vCPU for (EAGAIN)
    unchanged_dirty_pages: int | None = None    # of all dirty pages that the verifier has looked at, those whose
                                    # content was what it had been; None: without verification


class ReaperReport(msgspec.Struct, frozen=True, kw_only=True):
    """The reaper; counts and times since the machine's start."""

    mode: str                   # adaptive, fixed
    state: str                  # NONE, WAIT, REAPING
    iterations: int
    pages: int                  # entries reaped
    microseconds: int           # in reaps
    flushes: int
    interval_s: float | None    # seconds from the last reap to the next, as planned; None: nothing is reaped now


class SlotReport(msgspec.Struct, frozen=True, kw_only=True):
    """One memory slot as it is now."""

    id: int
    gpa: int                    # bytes
    size: int                   # bytes
    pages: int
    dirty: int                  # pages dirtied since the clients' last sync
    logged: bool
    born: int                   # which of the slots that have had this id


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A process that holds something of the machine."""

    what: str                   # pause, limit, client, lease, recording
    why: str                    # for people
    pid: int                    # 0: the user, who is not a process


class VerificationReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the verifier found; ``ok``: no page lost and, where that counts as a failure, no surplus page."""

    rounds: int
    checked_pages: int
    dirty_pages: int
    lost_pages: int
    surplus_pages: int
    excused_pages: int
    injected: str
    first_findings: list[str]
    surplus_is_failure: bool
    ok: bool


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """``exit_code``, ``cause``, ``ended_at``: None until the machine has ended. Where no process of the machine was
    left to write a full report (states ``failed`` and ``lost``), only these, name and state are present."""

    version: int = VERSION
    name: str
    state: str                  # ready, running, paused, ended
    elapsed_s: float            # since its start
    exit_code: int | None
    cause: str | None
    ended_at: str | None        # ISO 8601, UTC
    accelerator: str
    tracking: str               # as it is: ring, bitmap, uffd, none
    tracking_asked: str         # as it was asked for; also auto
    tracking_switches: int
    logging: bool               # the vCPUs log what they write: somebody needs it, or log is always
    ring_entries: int           # 0: without rings now
    can_limit: bool             # a dirty limit can be had
    coordinator: CoordinatorReport
    vcpus: list[VcpuReport]
    reaper: ReaperReport
    slots: list[SlotReport]
    clients: list[str]
    holders: list[Holder]
    handed_over: str            # address of the migration target that has it by now; empty: nobody has
    incoming: bool              # post-copy: some of its memory has not arrived yet
    verification: VerificationReport | None
    program: ProgramReport | None = None


def report_schema() -> dict[str, Any]:
    """JSON schema of ``Report``."""
    schema: dict[str, Any] = msgspec.json.schema(Report)
    for each in schema["$defs"].values():   # whether their lines are indented depends on the library's version
        if "description" in each:
            each["description"] = inspect.cleandoc(each["description"])
    return schema
