"""A mode of dirty tracking in one file: no log, every page counts as dirtied (what a program has that cannot track,
as the worst case of a comparison)."""

from __future__ import annotations

from vmm.dirty.reaper import Reaper
from vmm.dirty.tracking.none import Nothing


class Everything(Nothing):
    name = "everything"
    logged = True

    def gather(self, reaper: Reaper) -> int:
        return reaper.log.mark_logged_slots()

    def drain(self, reaper: Reaper) -> int:
        return self.gather(reaper)
