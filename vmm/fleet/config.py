"""The file of a fleet: its machines, how they are spread, and their snapshots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..client.config import load_config
from ..client.explain import explain
from ..client.models import Duration, FileName, MachineConfig
from ..client.origins import Key, Origins
from ..client.schema import PlainSchema
from ..client.yamlfile import read_yaml
from ..errors import VmmError
from ..machine.names import check_machine_name
from .lease import LEAST

__all__ = ["Snapshots", "Spread", "Wanted", "fleet_schema", "load_fleet"]

#: ``even``: where machines dirty least memory, and of these where most is free; ``pack``: where least is free that is
#: enough; ``apart``: as even, and no two machines of one entry on one host.
Spread = Literal["even", "pack", "apart"]

_COUNT_MAX = 1000
#: Bytes that a machine takes beside its RAM: its actor, coordinator and keeper; and for each vCPU (docs/scaling.md).
_BESIDE, _VCPU = 256 << 20, 16 << 20


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MachinesConfig(_Model):
    """Some machines of one configuration. ``cpus``: that each takes of its host's, as Ray counts them."""

    config: FileName                # of a machine, as for vmm launch
    name: str | None = None         # of the machine, or before -0, -1, …; default: the configuration's
    count: Annotated[int, Field(ge=1, le=_COUNT_MAX)] | None = None
    set: list[str] = Field(default_factory=list)        # key=value, as --set of vmm launch
    cpus: Annotated[float, Field(ge=0, strict=False)] | None = None     # default: one for each vCPU
    spread: Spread | None = None


class SnapshotsConfig(_Model):
    """Of every machine, by and by, into a folder of its own below ``directory``, which every host has."""

    directory: FileName
    every: Duration = 60.0
    keep: Annotated[int, Field(ge=1, le=1000)] = 10     # in a chain, before it is merged
    lease: Annotated[Duration, Field(ge=LEAST)] = 30.0    # how long a host may be cut off from the fleet


class FleetConfig(_Model):
    """The file."""

    machines: Annotated[list[MachinesConfig], Field(min_length=1)]
    spread: Spread = "even"         # of entries that do not say otherwise
    snapshots: SnapshotsConfig | None = None
    insecure: bool = False          # migrations between the hosts without keys


def fleet_schema() -> dict[str, Any]:
    """JSON schema of the file."""
    return {"$schema": "http://json-schema.org/draft-07/schema#",
            **FleetConfig.model_json_schema(schema_generator=PlainSchema)}


@dataclass(frozen=True)
class Snapshots:
    """``directory``: of this machine's chain. ``every``, ``lease``: seconds."""

    directory: Path
    every: float
    keep: int
    lease: float


@dataclass(frozen=True)
class Wanted:
    """A machine of a fleet. ``group``: the same for all of one entry. ``cpus``, ``memory`` (bytes): what it takes of a
    host."""

    name: str
    group: str
    config: MachineConfig
    cpus: float
    memory: int
    spread: Spread
    snapshots: Snapshots | None
    insecure: bool


def load_fleet(path: Path) -> list[Wanted]:
    """Each machine that the file asks for. Raises ConfigError, VmmError."""
    document, origins = read_yaml(path)
    try:
        fleet = FleetConfig.model_validate(document)
    except ValidationError as exc:
        raise explain(exc, origins, document, FleetConfig) from None
    found: dict[str, Wanted] = {}
    for number, entry in enumerate(fleet.machines):
        at = ("machines", number)
        for wanted in _machines(path.parent, fleet, entry, origins, at):
            if wanted.name in found:
                raise origins.error(at, f"there is a machine '{wanted.name}' already: give them another name")
            found[wanted.name] = wanted
    return list(found.values())


def _machines(folder: Path, fleet: FleetConfig, entry: MachinesConfig, origins: Origins, at: Key) -> list[Wanted]:
    config = load_config(folder / entry.config, entry.set, name=entry.name)
    names = [config.name] if entry.count is None else [f"{config.name}-{number}" for number in range(entry.count)]
    found = []
    for name in names:
        try:
            check_machine_name(name)
        except VmmError as exc:
            raise origins.error(at, str(exc)) from None
        snapshots = None
        if fleet.snapshots is not None:
            if config.replay is not None:
                raise origins.error(at, f"'{name}' runs accel: replay, which has no memory to take snapshots of")
            chains = (folder / fleet.snapshots.directory).resolve()
            snapshots = Snapshots(chains / name, fleet.snapshots.every, fleet.snapshots.keep,
                                  fleet.snapshots.lease)
        found.append(Wanted(
            name=name, group=config.name, config=config.model_copy(update={"name": name}),
            cpus=float(config.vcpus) if entry.cpus is None else entry.cpus, memory=_memory(config),
            spread=entry.spread or fleet.spread, snapshots=snapshots, insecure=fleet.insecure))
    return found


def _memory(config: MachineConfig) -> int:
    """Bytes that it takes of a host."""
    ram = 0 if config.replay is not None else sum(slot.size for slot in config.memory)
    return ram + _BESIDE + _VCPU * config.vcpus
