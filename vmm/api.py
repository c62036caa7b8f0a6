"""``vmm.Machine``: a machine, with all that is done to one.

    from vmm import Machine

    with Machine.launch("configs/quickstart.yaml") as machine:
        print(machine.dirty_rate(1.0).mib_per_s, "MiB/s")
        machine.snapshot("snapshots")
        machine.migrate("ipc:///tmp/there")         # where vmm receive waits

It is the ``Machine`` of vmm/client/machine.py, which knows a machine's memory, dirty log and life, with the consumers
of vmm/consumers/ as methods. vmm/aio.py has the same for asyncio. docs/python.md is for its users.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import msgspec

from .client.interrupts import sleep
from .client.machine import Flushed, SyncResult, list_machines
from .client.machine import Machine as _Machine
from .machine.report import Report

if TYPE_CHECKING:
    from .client.config import MachineConfig
    from .client.keeper import KeeperProcess
    from .consumers.migration.report import Options
    from .consumers.migration.report import Report as MigrationReport
    from .consumers.rate import DirtyRate
    from .consumers.snapshot import Manifest
    from .consumers.workingset import Recording
    from .machine.spec import MachineSpec

__all__ = ["Flushed", "Machine", "SyncResult", "as_config", "list_machines"]


def as_config(config: MachineConfig | MachineSpec | str | os.PathLike[str], overrides: Sequence[str] = (), *,
              name: str | None = None) -> MachineConfig | MachineSpec:
    """Of a file: read, with ``overrides`` as ``vmm launch --set`` has them. Raises VmmError, also for overrides of what
    is no file."""
    from .client.config import ConfigError, load_config

    if isinstance(config, str | os.PathLike):
        return load_config(Path(config), list(overrides), name=name)
    if overrides:
        raise ConfigError("overrides are for a configuration file; this one has been read already")
    return config


class Machine(_Machine):
    """A connection to one machine. Not thread-safe: open one per thread (``another``).

    A machine that was launched, restored or received here ends with its ``with`` (or ``close``). It ends with this
    process, too, unless it is let go (``detach=True``, ``let_go``): such a one is left with ``detach()``. One that was
    attached to keeps running. Whatever goes wrong raises VmmError, whose ``exit_code`` is that of the command line.
    """

    @classmethod
    def launch(cls, config: MachineConfig | MachineSpec | str | os.PathLike[str], *, name: str | None = None,
               overrides: Sequence[str] = (), trace: list[str] | None = None, trace_file: str = "",
               detach: bool = False, start: bool = True, console: str = "lines",
               keeper: KeeperProcess | None = None) -> Self:
        """Start a machine from a configuration (``load_config``) or its file, with ``overrides`` such as ``vcpus=8``.
        ``detach``: it lives on when this process has ended. ``start=False`` leaves the vCPUs before their first
        instruction until ``start()``. ``trace``, ``trace_file``: trace events, by patterns, and the file that they go
        into. Raises VmmError, with nothing left behind."""
        return super().launch(as_config(config, overrides, name=name), name=name, trace=trace, trace_file=trace_file,
                              detach=detach, start=start, console=console, keeper=keeper)

    def report(self) -> Report:
        """``status``, typed (vmm/machine/report.py). Raises VmmError."""
        return msgspec.convert(self.status(), Report)

    # --- measured -------------------------------------------------------------------------------------------------

    def dirty_rate(self, seconds: float = 1.0, mode: Literal["ring", "bitmap", "sampling"] | None = None, *,
                   unchanged: bool = False) -> DirtyRate:
        """Pages that the guest dirties per second, per vCPU and in all, measured for ``seconds`` (0.05 to 60).
        ``mode``: None: the one that says most. ``unchanged``: and how many of them have the content that they had.
        Raises VmmError."""
        from .consumers import rate

        return rate.measure(self, seconds, mode or rate.best_mode(self), unchanged=unchanged)

    def working_set(self, seconds: float = 10.0, interval: float = 0.1, *,
                    progress: Callable[[float], None] = lambda done: None,
                    wait: Callable[[float], bool] = sleep) -> Recording:
        """Which pages are dirtied in each ``interval`` (seconds), for ``seconds`` or until the machine ends; the
        recording can be saved and drawn (vmm/consumers/workingset.py). ``progress`` is told the share that is done.
        ``wait``: called with the seconds until the next interval; ends the recording early when it returns True. Raises
        VmmError."""
        from .consumers import workingset

        return workingset.record(self, interval, seconds, progress, wait)

    # --- kept, and moved ------------------------------------------------------------------------------------------

    def snapshot(self, directory: str | os.PathLike[str], *, incremental: bool = False, live: bool = False,
                 compression: Literal["none", "zstd"] = "none", working_set: float = 0.0,
                 progress: Callable[[int, int], None] = lambda done, total: None) -> Manifest:
        """Take a snapshot into this directory, which holds a chain of them. ``incremental``: only what was dirtied
        since the last. ``live``: the guest runs meanwhile, but for the end. ``working_set``: seconds before it in which
        is recorded what the guest dirties, for lazy restores. ``progress`` is told bytes done, and in all. Raises
        VmmError."""
        from .consumers import snapshot

        return snapshot.create(self, Path(directory), incremental=incremental, live=live, compression=compression,
                               working_set=working_set, progress=progress)

    @classmethod
    def restore(cls, directory: str | os.PathLike[str], snapshot: str | None = None, *, name: str | None = None,
                accel: str = "auto", detach: bool = False, start: bool = True, lazy: bool = False) -> Self:
        """Launch a machine as it was at ``snapshot`` (``0001``, …; None: the newest), on any accelerator, under
        ``name`` (None: the one that it had). ``lazy``: at once, with its memory read while it runs, by
        threads of this process. Raises VmmError, with nothing left behind."""
        from .consumers.snapshot import restore

        return cls.taken_over(restore(Path(directory), snapshot, machine_name=name, accel=accel, detach=detach,
                                      start=start, lazy=lazy))

    def migrate(self, address: str, options: Options | None = None, *,
                progress: Callable[[MigrationReport], None] = lambda report: None) -> MigrationReport:
        """Migrate the machine to where ``vmm receive`` (or ``receive``) waits: ``tcp://HOST:PORT`` or ``ipc://PATH``.
        It has left when this returns; ``progress`` is told about every tenth of a second. Raises MigrationError, with
        the machine still running here (its text says so where it is otherwise), and VmmError. Whatever ``progress``
        raises cancels it in the same way, until the machine is handed over."""
        from .consumers.migration.source import migrate

        return migrate(self, address, options, progress=progress)

    @classmethod
    def receive(cls, address: str, *, name: str | None = None, accel: str = "auto", detach: bool = False,
                key: str = "", peer: str = "", insecure: bool = False, timeout: float | None = None,
                waiting: Callable[[str], None] = lambda address: None) -> Self:
        """Wait at ``address`` for one machine that is migrated here, and run it, under ``name`` (None: the one that it
        had). ``key``, ``peer``: files of CURVE keys, which tcp needs unless it may be ``insecure``. ``timeout``:
        seconds to wait for a source. ``waiting`` is told the address once a source may connect. Raises VmmError."""
        from .consumers.migration.target import receive

        return cls.taken_over(receive(address, name=name, accel=accel, detach=detach, key=key, peer=peer,
                                      insecure=insecure, timeout=timeout, waiting=waiting))
