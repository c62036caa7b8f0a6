"""``vmm stress``: a sweep over what a machine's speed depends on, point by point.

A :class:`Sweep` (configs/stress.yaml, or flags) has axes; every combination of their values, ``repeat`` times, is
a :class:`Point`. Its :class:`PointResult` is a line of DIR/results.jsonl, written at once and synced, so that an
interrupted sweep goes on where it stopped (run.py).
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from ipc.linux.files import open_locked
from workers.accel import registry

from ...client.accelerators import choose_accelerator
from ...client.explain import explain
from ...client.models import Duration, MachineConfig, Rate, ReaperConfig, Size, VerifyConfig
from ...client.origins import Key, Origins
from ...client.plan import plan
from ...client.samples import find_config
from ...client.yamlfile import read_yaml
from ...errors import VmmError
from ...guests import WORKLOADS, WorkloadError, get_workload
from ...inputs import read_input
from ...machine.spec import MachineSpec
from ...tables import digits_text, size_text
from .measure import Figures, Proof

__all__ = ["Point", "PointResult", "Settings", "Sweep", "load_results", "load_sweep", "open_results", "sweep_of"]

RESULTS = "results.jsonl"
SWEEP = "sweep.json"

#: Parameters of sample guests for which 0 means indefinitely.
_ENDLESS = ("passes", "writes", "milliseconds")
#: Which axis a key of a machine's configuration comes from.
_AXES = {"vcpus": "vcpus", "dirty_ring_size": "ring", "guest": "workload", "replay": "workload", "reaper": "reaper",
         "accel": "accel", "memory": "ram", "dirty_limit": "dirty_limit", "verify": "verify"}


def _list(value: object) -> object:
    """A single value stands for a list of one."""
    return value if isinstance(value, list) else [value]


def _message(exc: ValidationError) -> str:
    """Of the first problem."""
    text = exc.errors()[0]["msg"].removeprefix("Value error, ")
    return f"{text[0].lower()}{text[1:]}"


def _same_as(model: type[BaseModel], key: str) -> AfterValidator:
    """What that key of a machine's configuration takes, and nothing else."""
    annotation: Any = model.model_fields[key].annotation
    adapter: TypeAdapter[Any] = TypeAdapter(annotation)

    def check(value: object) -> object:
        try:
            return adapter.validate_python(value)
        except ValidationError as exc:
            raise ValueError(f"{_message(exc)} (got {value!r})") from None

    return AfterValidator(check)


def _workload(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _limit(value: object) -> object:
    return None if value == "none" else value


def _verify(value: object) -> object:
    if value is True:
        return VerifyConfig(interval=_PROOF_INTERVAL)
    return None if value is False else value


_POINTS_MAX = 100_000
_RESULTS_MAX = 1 << 30      # bytes
_PROOF_INTERVAL = 0.1       # seconds between rounds: many rounds in a short proof


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WorkloadConfig(_Model):
    """A sample guest (with accel: replay, a pattern) and its parameters; without an end unless they set one."""

    name: str
    params: dict[str, int | float | bool] = Field(default_factory=dict)


_T = TypeVar("_T")
_Axis = Annotated[list[_T], BeforeValidator(_list), Field(min_length=1)]


class Sweep(_Model):
    """Axes (lists, or single values), then what all points share."""

    accel: Annotated[_Axis[Annotated[str, _same_as(MachineConfig, "accel")]], Field(
        description="Accelerators.")] = ["auto"]
    workload: Annotated[_Axis[Annotated[WorkloadConfig, BeforeValidator(_workload)]], Field(
        description="Sample guests that run indefinitely; with accel: replay, patterns.")] = [
            WorkloadConfig(name="random")]
    ram: Annotated[_Axis[Size], Field(description="Guest RAM sizes.")] = [256 << 20]
    dirty_limit: Annotated[_Axis[Annotated[Rate | None, BeforeValidator(_limit)]], Field(
        description="Dirty limits of each vCPU; none: no limit.")] = [None]
    ring: Annotated[_Axis[int], Field(description="Ring sizes in entries; 0: the plain bitmap.")] = [4096]
    reaper: Annotated[_Axis[Annotated[str, _same_as(ReaperConfig, "mode")]], Field(
        description="Reaper modes: adaptive, fixed.")] = ["adaptive"]
    vcpus: Annotated[_Axis[int], Field(description="Numbers of vCPUs.")] = [1, 2, 4]
    machines: Annotated[int, Field(ge=1, le=64, description="Machines that run at once at each point.")] = 1
    repeat: Annotated[int, Field(ge=1, le=100, description="Repetitions of each point.")] = 1
    seconds: Annotated[Duration, Field(description="Length of the timed window of each point.")] = 2.0
    warm_up: Annotated[Duration, Field(description="Time before the timed window.")] = 0.5
    flushes: Annotated[int, Field(ge=0, le=1000, description="Flushes that are timed after it, one by one.")] = 20
    verify: Annotated[VerifyConfig | None, BeforeValidator(_verify), Field(
        description="A second, verified run of each point; false: none.")] = VerifyConfig(interval=_PROOF_INTERVAL)
    machine: Annotated[dict[str, Any], Field(
        description="Further keys of every machine's configuration.")] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Sweep:
        for key in self.machine:
            if key == "name" or (key in _AXES and key != "reaper"):
                axis = f": use {_AXES[key]}" if key in _AXES else ""
                raise ValueError(f"machine.{key}: is set by the sweep{axis}")
        axes = (self.accel, self.workload, self.ram, self.dirty_limit, self.ring, self.reaper, self.vcpus)
        points = self.repeat * math.prod(len(axis) for axis in axes)
        if points > _POINTS_MAX:
            raise ValueError(f"the sweep has {points:,} points, but at most {_POINTS_MAX:,} are allowed")
        return self

    def points(self) -> list[Point]:
        """Every combination, repetition by repetition: what drifts meanwhile touches all of them alike."""
        axes = itertools.product(range(self.repeat), self.accel, self.workload, self.ram, self.dirty_limit,
                                 self.ring, self.reaper, self.vcpus)
        points = (Point(accel=choose_accelerator(accel) if accel == "auto" else accel, workload=workload.name,
                        params=tuple(sorted(workload.params.items())), ram=ram, dirty_limit=limit, ring=ring,
                        reaper=reaper, vcpus=vcpus, machines=self.machines, repetition=repetition)
                  for repetition, accel, workload, ram, limit, ring, reaper, vcpus in axes)
        return list(dict.fromkeys(points))      # a value given twice is one point

    def settings(self) -> Settings:
        verify = None if self.verify is None else self.verify.model_dump()
        return Settings(self.seconds, self.warm_up, self.flushes, verify, self.machine)


@dataclass(frozen=True, slots=True)
class Settings:
    """What all points of a sweep share. Seconds; ``verify`` None: no proof; ``machine``: keys of a machine's
    configuration."""

    seconds: float
    warm_up: float
    flushes: int
    verify: dict[str, Any] | None
    machine: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Point:
    """One combination. ``ram`` in bytes, ``ring`` in entries, ``dirty_limit`` in bytes per second of each vCPU."""

    accel: str
    workload: str
    params: tuple[tuple[str, float], ...]
    ram: int
    dirty_limit: float | None
    ring: int
    reaper: str
    vcpus: int
    machines: int
    repetition: int

    def __str__(self) -> str:
        many = f"{self.machines} machines of " if self.machines > 1 else ""
        return (f"{self.accel}, {self.load}, {many}{self.vcpus} vCPU{'s' if self.vcpus > 1 else ''}, {self.rings}, "
                f"{self.reaper}, {size_text(self.ram)}")

    @property
    def load(self) -> str:
        """The guest and its parameters, and what it is held to."""
        text = self.workload + "".join(f" {name} {value:g}" for name, value in self.params)
        return text + (f", at most {digits_text(self.dirty_limit / 1e6, 6)} MB/s" if self.dirty_limit else "")

    @property
    def rings(self) -> str:
        return f"ring {self.ring:,}" if self.ring else "bitmap"

    def configuration(self, settings: Settings, *, verify: bool) -> MachineConfig:
        """Raises ValidationError, VmmError."""
        shared = dict(settings.machine)
        # What a page costs on its way is measured, not how often a guest dirties one that nobody has asked for yet.
        reaper = {"reset": "early", **shared.pop("reaper", {}), "mode": self.reaper}
        document: dict[str, Any] = {
            "name": "stress", "accel": self.accel, "vcpus": self.vcpus, "dirty_ring_size": self.ring,
            "memory": [{"size": self.ram}], "log": "always", "dirty_limit": self.dirty_limit, "reaper": reaper,
            "verify": settings.verify if verify else None, **self._guest(), **shared}
        return MachineConfig.model_validate(document)

    def _guest(self) -> dict[str, Any]:
        if self.accel in registry.names("replay"):
            return {"replay": {"pattern": self.workload, **dict(self.params)}}
        try:
            known = [p.name for p in get_workload(self.workload).params]
        except WorkloadError as exc:
            raise VmmError(f"guest.workload: {exc}") from None
        endless = {name: 0 for name in _ENDLESS if name in known}
        if not endless:
            goes_on = [w.name for w in WORKLOADS.values() if any(p.name in _ENDLESS for p in w.params)]
            raise VmmError(f"guest.workload: {self.workload} ends by itself; use one that can run indefinitely: "
                           f"{', '.join(goes_on)}")
        return {"guest": {"workload": self.workload, "params": {**endless, **dict(self.params)}}}

    def specs(self, settings: Settings, *, verify: bool) -> list[MachineSpec]:
        """One per machine. Raises ValidationError, VmmError."""
        config = self.configuration(settings, verify=verify)
        return [plan(config, name=f"stress-{os.getpid()}-{i}") for i in range(self.machines)]


@dataclass(frozen=True, slots=True)
class PointResult:
    """``figures`` and ``proof`` have one entry per machine; ``error`` says why they are missing."""

    point: Point
    settings: Settings
    figures: list[Figures]
    proof: list[Proof]
    error: str = ""
    exit_code: int = 0          # of that error
    host: str = ""              # where it was measured

    @property
    def lost(self) -> int:
        return sum(p.lost for p in self.proof)

    @property
    def surplus(self) -> int:
        return sum(p.surplus for p in self.proof)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# --- the sweep's file ---------------------------------------------------------------------------------


def load_sweep(path: Path | None, flags: dict[str, tuple[str, Any]] | None = None, *, here: bool = True) -> Sweep:
    """From a file (or an example by its name, or the defaults), after flags: {key: (flag as it was given, value)}.
    Every point is planned, so that a sweep which cannot run says so at once; not ``here``: those whose accelerator
    this host does not have are only read. Raises ConfigError, naming file and line, or the flag."""
    path = None if path is None else find_config(path)
    return sweep_of(*(read_yaml(path) if path is not None else ({}, Origins(""))), flags, here=here)


def sweep_of(document: dict[str, Any], origins: Origins, flags: dict[str, tuple[str, Any]] | None = None, *,
             here: bool = True) -> Sweep:
    """As ``load_sweep``, of what ``read_yaml`` has read. Raises ConfigError."""
    for key, (flag, value) in (flags or {}).items():
        document[key] = value
        origins.given[key,] = flag
    try:
        sweep = Sweep.model_validate(document)
    except ValidationError as exc:
        raise explain(exc, origins, document, Sweep) from None
    _check_points(sweep, origins, here)
    return sweep


def _check_points(sweep: Sweep, origins: Origins, here: bool) -> None:
    settings = sweep.settings()
    for point in sweep.points():
        if point.repetition:
            break
        verify = settings.verify is not None
        try:
            if here or not registry.available(point.accel).reason:
                point.specs(settings, verify=verify)
            else:
                point.configuration(settings, verify=verify)
        except ValidationError as exc:
            key = ".".join(map(str, exc.errors()[0]["loc"]))
            text = f"{key}: {_message(exc)}" if key else _message(exc)
        except VmmError as exc:
            text = str(exc)
        else:
            continue
        key, colon, message = text.partition(": ")
        axis = _AXES.get(key.partition(".")[0]) if colon else None
        if axis is None:
            axis, message = "machine", text
        at = _position(sweep, axis, point)
        raise origins.error(at[:1] if at[:1] in origins.given else at, message)


def _position(sweep: Sweep, axis: str, point: Point) -> Key:
    """Of the point's value in its axis."""
    values = getattr(sweep, axis)
    if axis in ("machine", "verify"):
        return (axis,)
    if axis == "workload":
        return axis, next(i for i, w in enumerate(values) if (w.name, tuple(sorted(w.params.items())))
                          == (point.workload, point.params))
    wanted = getattr(point, axis)
    return axis, values.index(wanted) if wanted in values else 0


# --- results ------------------------------------------------------------------------------------------


def _result(document: dict[str, Any]) -> PointResult:
    """Raises KeyError, TypeError for what is not a result of this version."""
    point = document["point"]
    point["params"] = tuple((name, value) for name, value in point["params"])
    return PointResult(Point(**point), Settings(**document["settings"]),
                       [Figures(**{**f, "flushes": [tuple(s) for s in f["flushes"]]}) for f in document["figures"]],
                       [Proof(**p) for p in document["proof"]], document["error"], document["exit_code"],
                       document.get("host", ""))


def load_results(directory: Path) -> list[PointResult]:
    """What DIR/results.jsonl holds. A last line that was cut off by a crash is left out. Raises VmmError."""
    path = directory / RESULTS
    try:
        path.stat()
    except FileNotFoundError:
        return []
    except OSError:
        pass        # reading it says what is wrong
    lines = read_input(path, _RESULTS_MAX).split(b"\n")
    results = []
    for number, line in enumerate(lines[:-1], 1):   # the last one is empty, or has no end
        if not line:
            continue
        try:
            results.append(_result(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise VmmError(f"{path}:{number}: is not a result of this version: use another --output") from None
    return results


@contextmanager
def open_results(directory: Path) -> Iterator[Callable[[PointResult], None]]:
    """Adds results to the file, which is this process's alone meanwhile. Raises VmmError."""
    path = directory / RESULTS
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(open_locked(path, os.O_RDWR | os.O_CREAT, 0o644))
        except BlockingIOError:
            raise VmmError(f"{path}: another sweep is writing there: use another --output") from None
        except OSError as exc:
            raise VmmError(f"{path}: cannot be written: {exc.strerror}") from None
        whole = os.pread(fd, os.fstat(fd).st_size, 0).rpartition(b"\n")
        os.ftruncate(fd, len(whole[0]) + len(whole[1]))     # what a crash has cut off
        os.lseek(fd, 0, os.SEEK_END)

        def add(result: PointResult) -> None:
            os.write(fd, json.dumps(result.as_dict()).encode() + b"\n")
            os.fsync(fd)

        yield add
