"""The machine, around its vCPUs. Three programs live here, and what they share:

    machine/        what a coordinator and its clients both know
    vcpus/, dirty/, coordinator/
                    the coordinator: its workers, the way of a dirtied page, its loop, its journal and its verbs;
                    and the keeper, which replaces a coordinator that has died
    client/, consumers/
                    a program's end: ``Machine``, and who needs dirty pages
    cli/, lab/      the command line; measuring
    serve/, top/    metrics for Prometheus; a machine as it runs, on a terminal
    guests/         the sample guests

The Python API is what ``dir(vmm)`` shows (docs/python.md): ``Machine`` (api.py), ``AsyncMachine`` (aio.py), what they
take and return, and the modules ``vmm.snapshot``, ``vmm.migrate``, ``vmm.receive``, ``vmm.pagefile`` and
``vmm.tracefile``. pytest_plugin.py is for those who test with machines.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import migrate, pagefile, receive, snapshot, tracefile
    from .aio import AsyncMachine
    from .api import Machine
    from .client.config import MachineConfig, load_config, load_configs
    from .client.machine import Flushed, SyncResult, list_machines
    from .consumers.migration.report import MigrationError, Options
    from .consumers.migration.report import Report as MigrationReport
    from .consumers.rate import DirtyRate
    from .consumers.snapshot import Manifest
    from .consumers.workingset import Recording
    from .errors import ExitCode, VmmError
    from .machine.report import Report
    from .version import VERSION as __version__

__all__ = ["AsyncMachine", "DirtyRate", "ExitCode", "Flushed", "Machine", "MachineConfig", "Manifest", "MigrationError",
           "MigrationReport", "Options", "Recording", "Report", "SyncResult", "VmmError", "__version__",
           "list_machines", "load_config", "load_configs", "migrate", "pagefile", "receive", "snapshot", "tracefile"]

#: Where each is: module, and name there (empty: the module).
_HOMES = {
    "AsyncMachine": (".aio", "AsyncMachine"), "DirtyRate": (".consumers.rate", "DirtyRate"),
    "ExitCode": (".errors", "ExitCode"), "Flushed": (".client.machine", "Flushed"), "Machine": (".api", "Machine"),
    "MachineConfig": (".client.config", "MachineConfig"), "Manifest": (".consumers.snapshot", "Manifest"),
    "MigrationError": (".consumers.migration.report", "MigrationError"),
    "MigrationReport": (".consumers.migration.report", "Report"), "Options": (".consumers.migration.report", "Options"),
    "Recording": (".consumers.workingset", "Recording"), "Report": (".machine.report", "Report"),
    "SyncResult": (".client.machine", "SyncResult"), "VmmError": (".errors", "VmmError"),
    "__version__": (".version", "VERSION"), "list_machines": (".client.machine", "list_machines"),
    "load_config": (".client.config", "load_config"), "load_configs": (".client.config", "load_configs"),
    "migrate": (".migrate", ""), "pagefile": (".pagefile", ""), "receive": (".receive", ""),
    "snapshot": (".snapshot", ""), "tracefile": (".tracefile", "")}


def __getattr__(name: str) -> Any:
    """Imported at first use: the coordinator and the keeper are modules of this package too, and need
    neither pydantic nor the client. Raises AttributeError."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vmm' has no attribute '{name}'")
    module, there = _HOMES[name]
    home = importlib.import_module(module, __name__)
    return getattr(home, there) if there else home


def __dir__() -> list[str]:
    return sorted(__all__)
