"""Live migration, the target's side: ``receive`` one machine. How it is done is in vmm/consumers/migration/."""

from __future__ import annotations

from .consumers.migration.target import ReceiveError, receive

__all__ = ["ReceiveError", "receive"]
