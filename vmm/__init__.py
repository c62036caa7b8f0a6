"""The machine: configuration, memory, coordinator, dirty log and its consumers, control API, CLI.

The Python API is ``vmm.Machine``, ``vmm.load_config`` and ``vmm.VmmError``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client.config import load_config
    from .client.machine import Machine
    from .errors import VmmError

__all__ = ["Machine", "VmmError", "load_config"]

_HOMES = {"Machine": ".machine", "VmmError": ".errors", "load_config": ".config"}


def __getattr__(name: str) -> Any:
    """Imported at first use: the coordinator and the keeper are modules of this package too, and need
    neither pydantic nor the client."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vmm' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
