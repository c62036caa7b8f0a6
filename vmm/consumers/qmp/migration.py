"""``migrate`` and what belongs to it. The migration itself is a process of its own (../migration/background.py), which
goes on whatever becomes of this one; what is asked about it is answered from its report, so one that was begun by
``vmm migrate`` is seen here, too."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from ...errors import VmmError
from ..migration import background, control
from ..migration.addresses import parse_address
from ..migration.report import COMMITTED, OVER, Options
from ..migration.status import load_status
from ..migration.steering import CHANNELS_MAX, Changes
from .arguments import Arguments, Count
from .story import STATUS
from .wire import QmpError, shown

__all__ = ["Addressing", "Capabilities", "Migrate", "Migrations", "Parameters", "address_of"]

_Compression = Literal["none", "zlib", "zstd"]

#: Migration capabilities that can be on or off here, as they are at first.
_SWITCHES = {"auto-converge": True, "events": False, "multifd": False, "postcopy-ram": False, "return-path": True}
#: Others of QEMU's, which are off and stay so.
_OFF = frozenset({"background-snapshot", "block", "compress", "dirty-bitmaps", "late-block-activate",
                  "pause-before-switchover", "postcopy-blocktime", "postcopy-preempt", "rdma-pin-all", "release-ram",
                  "validate-uuid", "x-colo", "x-ignore-shared", "xbzrle", "zero-blocks", "zero-copy-send"})


@dataclass(frozen=True)
class Addressing:
    """Keys for tcp, which QMP has no words for: as in Options."""

    key: str = ""
    peer: str = ""
    insecure: bool = False


class Migrate(Arguments):
    """Of migrate. ``blk``, ``inc``: there is no disk. ``detach`` says nothing: it is always so."""

    uri: str
    blk: bool = False
    inc: bool = False
    detach: bool = True
    resume: bool = False


class Parameters(Arguments):
    """Of migrate-set-parameters; what is not given stays as it is."""

    max_bandwidth: Count | None = None      # bytes per second; 0: no limit
    downtime_limit: Annotated[int, msgspec.Meta(ge=0, le=2_000_000)] | None = None     # ms
    multifd_channels: Annotated[int, msgspec.Meta(ge=1, le=CHANNELS_MAX)] | None = None
    multifd_compression: _Compression | None = None


class _Switch(Arguments):
    capability: str
    state: bool


class Capabilities(Arguments):
    """Of migrate-set-capabilities."""

    capabilities: list[_Switch]


def address_of(uri: str) -> str:
    """As ``vmm migrate`` takes it, of ``tcp:HOST:PORT``, ``unix:PATH`` and what it takes itself. Raises QmpError,
    VmmError."""
    scheme, _, rest = uri.partition(":")
    if rest.startswith("//") and scheme in ("tcp", "ipc"):
        address = uri
    elif scheme == "tcp":
        if "," in rest:
            raise QmpError(f"uri '{shown(uri)}': options behind a comma cannot be had here")
        address = f"tcp://{rest}"
    elif scheme == "unix" and rest:
        address = f"ipc://{os.path.abspath(rest)}"
    else:
        raise QmpError(f"uri '{shown(uri)}': write tcp:HOST:PORT or unix:PATH, where vmm receive waits")
    return parse_address(address).text


class Migrations:
    """Of one machine: settings for the next one, the last one's report."""

    def __init__(self, machine: str, addressing: Addressing) -> None:
        self._machine = machine
        self._addressing = addressing
        self._switches = dict(_SWITCHES)
        self._options = Options(key=addressing.key, peer=addressing.peer, insecure=addressing.insecure)
        self._channels: int | None = None
        self._last: dict[str, Any] | None = None

    @property
    def tells(self) -> bool:
        """Events of migrations are wanted."""
        return self._switches["events"]

    def report(self) -> dict[str, Any] | None:
        """Of its last migration; None: it was never migrated, as far as is known. An upgrade is none."""
        with contextlib.suppress(VmmError):     # with the machine its report goes, before the last one is kept
            found = load_status(self._machine)
            self._last = self._last if found.get("upgrade") else found
        return self._last

    @property
    def _active(self) -> bool:
        found = self.report()
        return found is not None and found["direction"] == "outgoing" and found["status"] not in OVER

    # --- carried out ----------------------------------------------------------------------------------------------

    def begin(self, asked: Migrate) -> dict[str, Any]:
        """Raises QmpError, VmmError."""
        if asked.blk or asked.inc:
            raise QmpError("migrate: there is no disk that could go with the machine (blk, inc)")
        address = address_of(asked.uri)
        if self._active:
            raise QmpError(f"machine '{self._machine}' is being migrated already")
        background.begin(self._machine, address, self._wanted(), resume=asked.resume)
        return {}

    def _wanted(self) -> Options:
        channels = (self._channels or Options.channels) if self._switches["multifd"] else Options.channels
        return dataclasses.replace(self._options, channels=channels, converge=self._switches["auto-converge"])

    def cancel(self) -> dict[str, Any]:
        """Nothing, where none is under way. Raises VmmError for one that cannot be cancelled any more."""
        if self._active:
            background.cancel(self._machine)
        return {}

    def postcopy(self) -> dict[str, Any]:
        """Raises QmpError, VmmError."""
        if not self._switches["postcopy-ram"]:
            raise QmpError("switch on the migration capability postcopy-ram first (migrate-set-capabilities)")
        control.change(self._machine, Changes(postcopy=True))
        return {}

    def set(self, asked: Parameters) -> dict[str, Any]:
        """For migrations to come, and the one under way. Raises QmpError, VmmError."""
        if asked.multifd_compression == "zlib":
            raise QmpError("multifd-compression zlib cannot be had here: use zstd")
        changes: dict[str, Any] = {}
        if asked.max_bandwidth is not None:
            changes["bandwidth"] = float(asked.max_bandwidth)
        if asked.downtime_limit is not None:
            changes["downtime"] = asked.downtime_limit / 1000
        if asked.multifd_compression is not None:
            changes["compression"] = asked.multifd_compression
        if self._active:
            channels = asked.multifd_channels if self._switches["multifd"] else None
            control.change(self._machine, Changes(channels=channels, **changes))
        self._options = dataclasses.replace(self._options, **changes)
        self._channels = asked.multifd_channels or self._channels
        return {}

    def switch(self, asked: Capabilities) -> dict[str, Any]:
        """Raises QmpError, with nothing changed."""
        if self._active:
            raise QmpError("migration capabilities cannot be changed while the machine is being migrated")
        wanted = {each.capability: each.state for each in asked.capabilities}
        for name, state in wanted.items():
            if name not in _SWITCHES and name not in _OFF:
                raise QmpError(f"there is no migration capability '{shown(name)}' here")
            if state and name in _OFF:
                raise QmpError(f"the migration capability {name} cannot be had here")
        self._switches.update({name: state for name, state in wanted.items() if name in _SWITCHES})
        return {}

    # --- asked about ----------------------------------------------------------------------------------------------

    def capabilities(self) -> list[dict[str, Any]]:
        """All that QEMU has and that are known here."""
        states = dict.fromkeys(_OFF, False) | self._switches
        return [{"capability": name, "state": state} for name, state in sorted(states.items())]

    def parameters(self) -> dict[str, Any]:
        """Those that can be set."""
        options = self._options
        return {"max-bandwidth": round(options.bandwidth), "downtime-limit": round(options.downtime * 1000),
                "multifd-channels": self._channels or Options.channels, "multifd-compression": options.compression}

    def query(self) -> dict[str, Any]:
        """MigrationInfo; empty where there was none."""
        found = self.report()
        return {} if found is None else migration_info(found)


def migration_info(report: dict[str, Any]) -> dict[str, Any]:
    """QEMU's MigrationInfo of our report (vmm/consumers/migration/report.py)."""
    info: dict[str, Any] = {"status": STATUS[report["status"]], "total-time": round(report["total_time"])}
    if report["error"]:
        info["error-desc"] = report["error"]
    if report["status"] == "setup":
        return info
    info["setup-time"] = round(report["setup_time"])
    info["ram"] = _ram(report)
    if report["status"] in COMMITTED:
        info["downtime"] = round(report["downtime"])
    elif report["expected_downtime"] is not None:
        info["expected-downtime"] = round(report["expected_downtime"])
    if waits := report["postcopy_blocktime"]:
        info["postcopy-vcpu-blocktime"] = [round(each) for each in waits]
        info["postcopy-blocktime"] = round(min(waits))     # all vCPUs at once: no longer than the one that waited least
    return info


def _ram(report: dict[str, Any]) -> dict[str, Any]:
    ram, rounds = report["ram"], report["rounds"]
    running = sum(each["transferred"] for each in rounds if each["left"] is not None)
    stopped = sum(each["transferred"] for each in rounds if each["left"] is None)
    return {"transferred": ram["transferred"], "remaining": ram["remaining"], "total": ram["total"],
            "duplicate": ram["duplicate"], "skipped": 0, "normal": ram["normal"], "normal-bytes": ram["normal_bytes"],
            "dirty-pages-rate": ram["dirty_pages_rate"], "mbps": ram["mbps"],
            "dirty-sync-count": ram["dirty_sync_count"], "postcopy-requests": ram["postcopy_requests"],
            "page-size": ram["page_size"], "multifd-bytes": ram["transferred"],
            "pages-per-second": ram["pages_per_second"], "precopy-bytes": running, "downtime-bytes": stopped,
            "postcopy-bytes": max(0, ram["transferred"] - running - stopped) if ram["postcopy_pages"] else 0,
            "dirty-sync-missed-zero-copy": 0}
