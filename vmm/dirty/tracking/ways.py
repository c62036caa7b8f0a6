"""The ways of dirty tracking that there are, by name (vmm/machine/trackings.py says which a host can have)."""

from __future__ import annotations

from .base import Way
from .bitmap import Bitmap
from .none import Nothing
from .ring import Ring
from .uffd import WriteProtect

__all__ = ["WAYS", "way"]

WAYS: dict[str, Way] = {each.name: each for each in (Ring(), Bitmap(), WriteProtect(), Nothing())}


def way(name: str) -> Way:
    """``name``: one of vmm.machine.trackings.MODES."""
    return WAYS[name]
