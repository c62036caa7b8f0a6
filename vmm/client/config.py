"""The YAML file of a machine: its schema, and errors that name file, line and key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from ipc.layout import MAX_SLOTS, MAX_VCPUS
from ipc.shm import PAGE_SIZE
from workers.accel.registry import capabilities, names

from ..errors import VmmError, one_line
from ..inputs import input_name
from ..machine import rules
from ..machine.forwards import parse_forward
from ..machine.names import MACHINE_NAME, check_machine_name
from ..machine.spec import REAPERS_MAX, RamSlot
from .explain import explain
from .samples import find_config
from .units import parse_duration, parse_rate, parse_size
from .yamlfile import DEPTH_MAX, ConfigError, key_step, key_text, parse_value, read_yaml

__all__ = ["ConfigError", "MachineConfig", "config_schema", "load_config"]

_ACCELERATORS = ("auto", *names())


Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
Rate = Annotated[float, BeforeValidator(parse_rate)]


class _Model(BaseModel):
    """``strict``: ``yes`` is not the number 1, nor "2" the number 2."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _file_name(value: object) -> object:
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError("not a valid file name")
    return value


FileName = Annotated[Path, Field(strict=False), BeforeValidator(_file_name)]


def _port(value: object) -> object:
    if isinstance(value, int):      # YAML takes 443:22 for a number, too
        raise ValueError('write it in quotation marks, as in "6379" or "8080:80"')
    if isinstance(value, str):
        parse_forward(value)
    return value


Port = Annotated[str, BeforeValidator(_port)]


class MemoryConfig(_Model):
    """One memory slot; sizes and addresses are multiples of 4096 bytes."""

    slot: Annotated[int, Field(ge=0, lt=MAX_SLOTS)]
    gpa: Size = 0
    size: Size
    log: bool = True


class GuestConfig(_Model):
    """A sample guest (``workload``), any static x86-64 ELF file or flat binary (``image``), or a Linux program
    (``program``; docs/linux.md)."""

    workload: str | None = None
    image: FileName | None = None
    address: Size | None = None
    params: dict[str, int] | list[int] = Field(default_factory=dict)
    #: As the program itself is named where it runs: a path in ``root``, or a name that is looked for there.
    program: str | None = None
    args: list[str] = Field(default_factory=list)       # without its name
    env: dict[str, str] = Field(default_factory=dict)
    root: FileName | None = None        # a directory or a tar file of the host: what there is, read-only
    files: dict[str, FileName] = Field(default_factory=dict)    # {absolute path there: on the host}
    directory: str = "/"                # where it starts
    threads: Annotated[int, Field(ge=1, lt=MAX_VCPUS)] | None = None    # that it may have at once
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None         # of its random numbers
    forward: list[Port] = Field(default_factory=list)   # ports of the host: [ADDRESS:]PORT[:INSIDE]

    @model_validator(mode="after")
    def _check(self) -> GuestConfig:
        if sum(x is not None for x in (self.workload, self.image, self.program)) != 1:
            raise ValueError("give exactly one of 'workload', 'image' and 'program'")
        given = self.model_fields_set
        if self.program is None and (extra := given & _PROGRAM_KEYS):
            raise ValueError(f"'{min(extra)}' is only valid with 'program'")
        if self.program is not None and "params" in given:
            raise ValueError("'params' is not valid with 'program': give 'args'")
        if self.address is not None and self.image is None:
            raise ValueError("'address' is only valid with 'image', for a flat binary")
        if self.workload is not None and not isinstance(self.params, dict):
            raise ValueError("the params of a workload must be a mapping of names to values")
        return self


_PROGRAM_KEYS = frozenset({"args", "env", "root", "files", "directory", "threads", "seed", "forward"})

Pattern = Literal["sequential", "strided", "random", "zipf"]


class ReplayPhaseConfig(_Model):
    """Writes in one pattern: ``sequential`` walks over the pages, ``strided`` writes every ``stride``-th page,
    ``random`` writes random pages, ``zipf`` favours the first pages, more strongly with a larger ``exponent``."""

    pattern: Pattern
    writes: Annotated[int, Field(ge=0, le=rules.WRITES_MAX)] = 0     # per vCPU; 0: indefinitely
    stride: Annotated[int, Field(ge=1, le=rules.STRIDE_MAX)] | None = None       # pages
    exponent: Annotated[float, Field(gt=0, le=rules.EXPONENT_MAX)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ReplayPhaseConfig:
        _check_pattern(self.pattern, self.stride, self.exponent)
        return self


def _check_pattern(pattern: str | None, stride: int | None, exponent: float | None) -> None:
    for key, value, owner in (("stride", stride, "strided"), ("exponent", exponent, "zipf")):
        if value is None and pattern == owner:
            raise ValueError(f"pattern: {owner} needs '{key}'")
        if value is not None and pattern != owner:
            raise ValueError(f"{key}: only valid with pattern: {owner}")


class ReplayConfig(_Model):
    """What the replay accelerator dirties: one pattern, several patterns in sequence, or a recorded trace."""

    pattern: Pattern | None = None
    writes: Annotated[int, Field(ge=0, le=rules.WRITES_MAX)] = 0     # per vCPU; 0: indefinitely
    stride: Annotated[int, Field(ge=1, le=rules.STRIDE_MAX)] | None = None       # pages
    exponent: Annotated[float, Field(gt=0, le=rules.EXPONENT_MAX)] | None = None
    phases: Annotated[list[ReplayPhaseConfig], Field(min_length=1, max_length=rules.PHASES_MAX)] | None = None
    trace: FileName | None = None       # a file of ``vmm trace record``
    speed: Literal["original", "full"] | Annotated[float, Field(gt=0, le=rules.SPEED_MAX)] = "original"
    #: Writes per second of each vCPU; 0: as fast as it can.
    rate: Annotated[float, Field(ge=0, le=rules.RATE_MAX)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    shared: bool = False            # every vCPU writes to all pages, else each to its own share
    repeat: bool = False            # each write makes a ring entry, not only the first since the page's reset

    @model_validator(mode="after")
    def _check(self) -> ReplayConfig:
        if sum(x is not None for x in (self.pattern, self.phases, self.trace)) != 1:
            raise ValueError("give exactly one of 'pattern', 'phases' and 'trace'")
        _check_pattern(self.pattern, self.stride, self.exponent)
        given = self.model_fields_set
        if self.pattern is None and "writes" in given:
            raise ValueError("writes: only valid with 'pattern'; each phase has its own")
        if self.trace is None and "speed" in given:
            raise ValueError("speed: only valid with 'trace'")
        if self.trace is not None and (extra := given & {"rate", "seed", "shared"}):
            raise ValueError(f"{min(extra)}: not valid with 'trace', which has its own")
        for i, phase in enumerate((self.phases or [])[:-1]):
            if not phase.writes:
                raise ValueError(f"phases.{i}: needs 'writes': only the last phase may run indefinitely")
        return self


class ReaperConfig(_Model):
    mode: Literal["adaptive", "fixed"] = "adaptive"
    interval: Duration = 1.0        # fixed: the period, as QEMU's
    min_interval: Duration = 0.001
    max_interval: Duration = 1.0
    reset: Literal["late", "early"] = "late"    # early: whatever is reaped is protected again at once, as QEMU does

    @model_validator(mode="after")
    def _check(self) -> ReaperConfig:
        if self.min_interval > self.max_interval:
            raise ValueError("min_interval: must not exceed max_interval")
        return self


class VerifyConfig(_Model):
    interval: Duration = 0.2
    inject: Literal["none", "lost", "extra"] = "none"


def _ring_size(value: object) -> object:
    if isinstance(value, str) and value != "auto":
        raise ValueError("must be a number of entries, or auto")
    return value


def _verify(value: object) -> object:
    if value is True:
        return {}
    return None if value is False else value


def _number_slots(value: object) -> object:
    """A slot's default id is its place in the list."""
    if isinstance(value, list):
        return [{"slot": i, **v} if isinstance(v, dict) else v for i, v in enumerate(value)]
    return value


def _name(value: str) -> str:
    try:
        return check_machine_name(value)
    except VmmError as exc:
        raise ValueError(f"{exc} (--name sets another one)") from None


def _accelerator(value: str) -> str:
    if value not in _ACCELERATORS:
        *others, last = (repr(name) for name in _ACCELERATORS)
        raise ValueError(f"input should be {', '.join(others)} or {last}")
    return value


class MachineConfig(_Model):
    """A machine. Every key except ``memory`` and ``guest`` (or ``replay``) has a default."""

    name: Annotated[str, AfterValidator(_name), Field(json_schema_extra={"pattern": f"^{MACHINE_NAME}$"})]
    accel: Annotated[str, AfterValidator(_accelerator),
                     Field(json_schema_extra={"enum": list(_ACCELERATORS)})] = "auto"
    vcpus: Annotated[int, Field(ge=1, le=MAX_VCPUS)] = 1
    privilege: Literal["user", "kernel"] = "user"
    #: Of the vCPU processes, as nice(1) has it.
    nice: Annotated[int, Field(ge=0, le=rules.NICE_MAX)] = 0
    #: Entries of a ring; 0: without rings; auto: as many as fit all of the machine's pages, if there may be such.
    dirty_ring_size: Annotated[int | Literal["auto"], BeforeValidator(_ring_size)] = "auto"
    #: None: auto where dirty_ring_size is, ring where it is a number, bitmap where it is 0. (To replay takes rings.)
    tracking: Literal["ring", "bitmap", "uffd", "none", "auto"] | None = None
    #: auto: the vCPUs log what they write while somebody needs it; always: from the start.
    log: Literal["auto", "always"] = "auto"
    memory: Annotated[list[MemoryConfig], Field(min_length=1), BeforeValidator(_number_slots)]
    guest: GuestConfig | None = None
    replay: ReplayConfig | None = None      # instead of a guest
    reaper: ReaperConfig = ReaperConfig()
    reapers: Annotated[int, Field(ge=1, le=REAPERS_MAX)] = 1    # threads that harvest, each some of the rings
    verify: Annotated[VerifyConfig | None, BeforeValidator(_verify)] = None
    timeout: Duration | None = None
    dirty_limit: Rate | None = None     # bytes per second of each vCPU
    stack_size: Size = 16 << 10
    trace: list[str] = Field(default_factory=list)
    #: Where each key was given: "file:line" or "--set …", for errors that come later.
    _origins: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)

    def where(self, key: str) -> str:
        """``file:line: key`` for an error about ``key``, on one line whatever the key is."""
        at: tuple[str | int, ...] = tuple(key_step(s) for s in key.split("."))
        key = key_text(at)
        while at and at not in self._origins:
            at = at[:-1]
        origin = self._origins.get(at)
        return f"{origin}: {key}" if origin else key

    @model_validator(mode="after")
    def _check(self) -> MachineConfig:
        entries = self.dirty_ring_size
        if entries != "auto":
            rules.check_ring(entries)
        if self.tracking == "ring" and not entries:
            raise ValueError("tracking: ring needs a dirty_ring_size above 0")
        if self.tracking == "none" and self.verify is not None:
            raise ValueError("tracking: none leaves nothing to verify, but verify is on")
        if self.tracking == "none" and self.log == "always":
            raise ValueError("tracking: none leaves nothing to log, but log is always")
        if self.dirty_limit is not None and (not entries or self.dirty_limit < PAGE_SIZE):
            raise ValueError("dirty_limit: " + ("needs a dirty ring, but dirty_ring_size is 0" if not entries
                                                else f"{self.dirty_limit:g} is less than one page per second"))
        if self.dirty_limit is not None and self.tracking not in (None, "ring", "auto"):
            raise ValueError(f"dirty_limit: needs a dirty ring, but tracking is {self.tracking}")
        if (self.guest is None) == (self.replay is None):
            raise ValueError("'guest' (or 'replay') is missing" if self.guest is None else
                             "replay: give either 'guest' or 'replay', not both")
        section = "guest" if self.accel == "auto" else capabilities(self.accel).section
        if self.replay is None and section != "guest":
            raise ValueError(f"accel: {self.accel} has no CPU for a guest: give '{section}' instead of 'guest'")
        if self.replay is not None and self.accel != "auto" and section != "replay":
            raise ValueError(f"accel: {self.accel} runs a guest; 'replay' needs accel: "
                             f"{' or '.join(names('replay'))}")
        if self.replay is not None and self.tracking not in (None, "ring"):
            raise ValueError(f"tracking: {self.tracking} is not supported with replay, which needs dirty rings")
        if self.replay is not None and not entries:
            raise ValueError("dirty_ring_size: replay needs dirty rings, but 0 selects the plain bitmap")
        if self.guest is not None and self.guest.program is not None:
            if extra := self.model_fields_set & {"vcpus", "privilege", "stack_size"}:
                raise ValueError(f"{min(extra)}: not valid with a program (guest.threads says how many threads it may "
                                 "have)")
            if len(self.memory) > 1:
                raise ValueError("memory: must be one slot for a program")
        rules.check_stack(self.stack_size)
        rules.check_slots([RamSlot(m.slot, m.gpa, m.size) for m in self.memory], mapped=self.replay is None)
        return self


def config_schema() -> dict[str, Any]:
    """JSON schema of the file."""
    return MachineConfig.model_json_schema()


# --- loading -----------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: list[str] | None = None, *, name: str | None = None) -> MachineConfig:
    """Read and validate a file, or an example by its name (samples.py), after ``key.path=value`` overrides; ``name``:
    of the machine, whatever the file says. Raises ConfigError."""
    path = find_config(path)
    document, lines = read_yaml(path)
    set_keys: dict[tuple[str | int, ...], str] = {}
    for override in overrides or []:
        set_keys[_override(document, override)] = f"--set {one_line(override, 80)}"
    if name is not None:
        document["name"] = name
        set_keys["name",] = f"--name {one_line(name, 80)}"
    document.setdefault("name", re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:32].strip("-") or "vm")
    try:
        config = MachineConfig.model_validate(document)
    except ValidationError as exc:
        raise explain(exc, path, lines, set_keys, document, MachineConfig) from None
    for section, file in (("guest", "image"), ("guest", "root"), ("replay", "trace")):
        model = getattr(config, section)
        given = getattr(model, file, None)
        if given is not None and not given.is_absolute():
            config = config.model_copy(
                update={section: model.model_copy(update={file: (path.parent / given).resolve()})})
    if config.guest is not None and config.guest.files:
        files = {inside: (path.parent / outside).resolve() for inside, outside in config.guest.files.items()}
        config = config.model_copy(update={"guest": config.guest.model_copy(update={"files": files})})
    config._origins.update({at: f"{input_name(path)}:{line}" for at, line in lines.items()})
    config._origins.update(set_keys)
    return config


def _override(document: dict[str, Any], text: str) -> tuple[str | int, ...]:
    """Apply one ``--set``; the path that it set. Raises ConfigError."""
    where = f"--set {one_line(text, 80)}"
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{where}: write key=value, for example vcpus=8")
    parts = key.split(".")
    if len(parts) > DEPTH_MAX:
        raise ConfigError(f"{where}: nested deeper than {DEPTH_MAX} levels")
    given = parse_value(value, where)
    steps: list[str | int] = []
    target: Any = document
    for i, part in enumerate(parts):
        step: str | int = part
        if isinstance(target, list):
            step = key_step(part)
            if not isinstance(step, int) or step >= len(target):
                raise ConfigError(f"{where}: {key_text(tuple(steps))} has no item {one_line(part, 60)}")
        elif not isinstance(target, dict):
            raise ConfigError(f"{where}: {key_text(tuple(steps))} is not a mapping")
        steps.append(step)
        if i == len(parts) - 1:
            target[step] = given
        else:
            if isinstance(target, dict) and not isinstance(target.get(part), dict | list):
                target[part] = {}
            target = target[step]
    return tuple(steps)
