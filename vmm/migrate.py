"""Live migration, the source's side: ``migrate`` a running machine to where a ``vmm receive`` waits, ``check`` whether
it could run there, ``recover`` one whose source was lost after the hand-over. How it is done is in
vmm/consumers/migration/."""

from __future__ import annotations

from .consumers.migration.checking import Checked, check
from .consumers.migration.report import MigrationError, Options, Report
from .consumers.migration.source import Source as _Source
from .consumers.migration.source import migrate, recover

__all__ = ["Checked", "MigrationError", "Options", "Report", "_Source", "check", "migrate", "recover"]
