"""Samples (vmm/consumers/stats.py) as the text of the screen. What is not known is ``-``."""

from __future__ import annotations

from typing import NamedTuple

from ipc.shm import PAGE_SIZE

from ..consumers.stats import SlotStats, Stats, VcpuStats
from ..tables import size_text

__all__ = ["SLOT_COLUMNS", "VCPU_COLUMNS", "Column", "activity", "megabytes", "percent", "reaper_line", "short",
           "slot_row", "title", "vcpu_row"]


class Column(NamedTuple):
    """``width`` in characters, the blank before it among them. ``left``: where its text begins; else where it ends."""

    label: str
    width: int
    left: bool = False

    def padded(self, cell: str) -> str:
        """As wide as the column."""
        return f" {cell}".ljust(self.width) if self.left else cell.rjust(self.width)


#: 78 characters in all, so that they and a scroll bar have room in 80.
VCPU_COLUMNS = (Column("vCPU", 5), Column("state", 10, left=True), Column("exits/s", 9), Column("dirty MB/s", 11),
                Column("ring", 6), Column("full/s", 8), Column("stalled", 8), Column("throttled", 10),
                Column("limit MB/s", 11))
SLOT_COLUMNS = (Column("slot", 6), Column("size", 22, left=True), Column("logged", 7), Column("dirty pages", 14),
                Column("of the slot", 12))

UNKNOWN = "-"


def short(value: float | None) -> str:
    """A count in at most 6 characters: ``9,999``, ``12.3k``, ``4.56M``."""
    if value is None:
        return UNKNOWN
    if value < 9_999.5:
        return f"{value:,.0f}"
    for power, unit in ((3, "k"), (6, "M"), (9, "G"), (12, "T")):
        scaled = value / 10 ** power
        if scaled < 999.5:
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{value:.0e}"


def megabytes(pages_per_s: float | None) -> str:
    """MB/s, as dirty limits are written."""
    if pages_per_s is None:
        return UNKNOWN
    value = pages_per_s * PAGE_SIZE / 1e6
    return f"{value:,.1f}" if value < 9_999.95 else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """Of 0 to 1. What is not nothing is not shown as nothing."""
    if share is None:
        return UNKNOWN
    return "<1%" if 0 < share < 0.01 else f"{share:.0%}"


def title(stats: Stats, accelerator: str) -> str:
    """The machine, in one line."""
    tracking = f"tracking {stats.tracking}" + (f" ({stats.ring_entries:,} entries)" if stats.ring_entries else "")
    logging = "logging" if stats.logging else "not tracked" if stats.tracking == "none" else "not logging"
    return f"{stats.name}  {stats.state}  {stats.elapsed_s:,.1f} s  {accelerator}, {tracking}, {logging}"


def vcpu_row(vcpu: VcpuStats) -> tuple[str, ...]:
    """A cell for each of VCPU_COLUMNS."""
    return ("sys" if vcpu.accelerator == "system" else str(vcpu.index), vcpu.state, short(vcpu.exits_per_s),
            megabytes(vcpu.dirty_pages_per_s), percent(vcpu.ring_fill), short(vcpu.ring_full_exits_per_s),
            percent(vcpu.stalled), percent(vcpu.throttled), megabytes(vcpu.dirty_limit_pages_per_s))


def slot_row(slot: SlotStats) -> tuple[str, ...]:
    """A cell for each of SLOT_COLUMNS."""
    return (str(slot.id), size_text(slot.size), "yes" if slot.logged else "no", f"{slot.dirty:,}",
            percent(slot.dirty / slot.pages if slot.pages else None))


def reaper_line(stats: Stats) -> str:
    """The reaper, in about 80 characters at most."""
    reaper = stats.reaper
    text = f"reaper {reaper.mode} {reaper.state}: {short(reaper.iterations)} reaps"
    if reaper.interval_s is None:
        return f"{text}, none due: {'without rings' if stats.logging else 'it does not log'}"
    text += f", every {_time(reaper.interval_s)}"
    if reaper.reap_s is not None:
        text += f" for {_time(reaper.reap_s)} ({percent(reaper.reaping)})"
    return f"{text}, {short(reaper.flushes)} flushes"


def activity(stats: Stats) -> list[str]:
    """A line for the migration, and for each snapshot under way."""
    lines = []
    if stats.migration is not None:
        m = stats.migration
        downtime = "unknown" if m.expected_downtime_s is None else _time(m.expected_downtime_s)
        lines.append(f"migration {m.direction} {m.status}: rounds {m.rounds}, {m.remaining / 1e6:,.1f} MB left, "
                     f"downtime {downtime}, {m.peer}")
    for s in stats.snapshots:
        share = percent(s.done / s.total if s.total else None)
        lines.append(f"snapshot: rounds {s.rounds}, {s.done / 1e6:,.1f} of {s.total / 1e6:,.1f} MB ({share}), "
                     f"{s.directory}")
    return lines


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.0095 else f"{seconds * 1e3:.2f} ms"
