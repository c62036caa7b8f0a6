"""Live migration, the target's side: ``receive`` one machine. How it is done is in vmm/migration/."""

from __future__ import annotations

from .migration.target import ReceiveError, receive

__all__ = ["ReceiveError", "receive"]
