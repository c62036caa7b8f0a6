"""Which accelerator a machine gets. Without the configuration layer, whose imports take longer than the start of a
machine that runs a program."""

from __future__ import annotations

from workers.accel import registry

from ..errors import VmmError

__all__ = ["choose_accelerator"]


def choose_accelerator(wanted: str, section: str = "guest", *, programs: bool = False) -> str:
    """``auto`` is the first that can be used here, of those that take this section of the configuration, and Linux
    programs where they are wanted. Raises VmmError when the one that is wanted, or none, can be had."""
    reasons = []
    for name in registry.names(section) if wanted == "auto" else [wanted]:
        refused = registry.capabilities(name).programs if programs else ""
        found = registry.available(name)
        if not refused and not found.reason:
            return name
        reasons.append(f"{name} {refused}" if refused else f"{name} is not available here: {found.reason}")
    raise VmmError("; ".join(reasons))
