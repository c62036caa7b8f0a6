"""Live migration, the target's side: ``receive`` one machine, or ``receive_all`` that come. How it is done is in
vmm/consumers/migration/."""

from __future__ import annotations

from .consumers.migration.offers import Limits
from .consumers.migration.target import ReceiveError, receive, receive_all

__all__ = ["Limits", "ReceiveError", "receive", "receive_all"]
