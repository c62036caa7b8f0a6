"""From a validated configuration to a machine that this host can run: accelerator, ring, bounds."""

from __future__ import annotations

from typing import Any

from .spec import MachineSpec

__all__ = ["plan"]


def plan(config: Any, *, name: str | None = None, trace: list[str] | None = None, trace_file: str = "",
         linger: bool = True) -> MachineSpec:
    """Resolve a MachineConfig. Raises VmmError, naming the key, when this host cannot run it."""
    raise NotImplementedError
