"""The modes of dirty tracking that there are, by name (vmm/machine/trackings.py says which a host can have)."""

from __future__ import annotations

from .base import TrackingMode
from .bitmap import Bitmap
from .none import Nothing
from .ring import Ring
from .uffd import WriteProtect

__all__ = ["TRACKING_MODES", "tracking_mode"]

_ALL: tuple[TrackingMode, ...] = (Ring(), Bitmap(), WriteProtect(), Nothing())
TRACKING_MODES = {mode.name: mode for mode in _ALL}


def tracking_mode(name: str) -> TrackingMode:
    """``name``: one of vmm.machine.trackings.MODES."""
    return TRACKING_MODES[name]
