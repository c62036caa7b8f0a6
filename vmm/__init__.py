"""The machine, around its vCPUs. Three programs live here, and what they share:

    machine/        what a coordinator and its clients both know
    vcpus/, dirty/, coordinator/
                    the coordinator: its workers, the way of a dirtied page, its loop, its journal and its verbs;
                    and the keeper, which replaces a coordinator that has died
    client/, consumers/
                    a program's end: ``Machine``, and who needs dirty pages
    cli/, lab/      the command line; measuring
    guests/         the sample guests

The Python API is ``vmm.Machine``, ``vmm.load_config``, ``vmm.load_configs``, ``vmm.VmmError``, and the modules
``vmm.snapshot``, ``vmm.migrate``, ``vmm.receive``, ``vmm.pagefile`` and ``vmm.tracefile``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client.config import load_config, load_configs
    from .client.machine import Machine
    from .errors import VmmError

__all__ = ["Machine", "VmmError", "load_config", "load_configs"]

_HOMES = {"Machine": ".client.machine", "VmmError": ".errors", "load_config": ".client.config",
          "load_configs": ".client.config"}


def __getattr__(name: str) -> Any:
    """Imported at first use: the coordinator and the keeper are modules of this package too, and need
    neither pydantic nor the client."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vmm' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    """With what is imported at first use."""
    return sorted({*globals(), *__all__})
