"""What a configuration may say: its keys, with their bounds and what they mean. The descriptions here are all that
there is: the published schema, ``vmm config explain`` and the files of ``vmm config new`` have them from here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    WithJsonSchema,
    model_validator,
)

from ipc.layout import MAX_SLOTS, MAX_VCPUS
from ipc.shm import PAGE_SIZE
from workers.accel.registry import capabilities, names

from ..errors import VmmError
from ..machine import rules
from ..machine.forwards import parse_forward
from ..machine.names import MACHINE_NAME, check_machine_name
from ..machine.spec import REAPERS_MAX, RamSlot
from .origins import ConfigError, Origins, key_step
from .units import DURATION, RATE, SIZE, parse_duration, parse_rate, parse_size

__all__ = ["Duration", "GuestConfig", "MachineConfig", "Rate", "ReaperConfig", "ReplayConfig", "Size", "VerifyConfig"]

_ACCELERATORS = ("auto", *names())


def _quantity(kind: str, number: str, pattern: str, examples: list[str]) -> WithJsonSchema:
    """A number, or a text with a unit. ``title``: what vmm config explain calls it."""
    return WithJsonSchema({"title": kind, "anyOf": [{"type": number}, {"type": "string", "pattern": pattern}],
                           "examples": examples})


Size = Annotated[int, BeforeValidator(parse_size),
                 _quantity("size", "integer", SIZE, ["64MiB", "64MB", "4099 pages", "0x1000"])]
Duration = Annotated[float, BeforeValidator(parse_duration), _quantity("duration", "number", DURATION,
                                                                       ["200ms", "1s", "5min"])]
Rate = Annotated[float, BeforeValidator(parse_rate), _quantity("rate", "number", RATE,
                                                               ["100MB/s", "64MiB/s", "10Gbit/s"])]


def _not_required(*keys: str) -> Any:
    """The file need not say them: something else gives them before it is validated."""
    def change(schema: dict[str, Any]) -> None:
        schema["required"] = [key for key in schema.get("required", []) if key not in keys]
        if not schema["required"]:
            del schema["required"]

    return change


def _title(model: type) -> str:
    """What an editor calls it: ``memory`` of MemoryConfig."""
    return re.sub(r"(?<!^)(?=[A-Z])", " ", model.__name__.removesuffix("Config")).lower()


class _Model(BaseModel):
    """``strict``: ``yes`` is not the number 1, nor "2" the number 2."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, model_title_generator=_title)


def _file_name(value: object) -> object:
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError("not a valid file name")
    return value


FileName = Annotated[Path, Field(strict=False), BeforeValidator(_file_name),
                     WithJsonSchema({"title": "file name", "type": "string", "minLength": 1})]


def _port(value: object) -> object:
    if isinstance(value, int):      # YAML takes 443:22 for a number, too
        raise ValueError('write it in quotation marks, as in "6379" or "8080:80"')
    if isinstance(value, str):
        parse_forward(value)
    return value


Port = Annotated[str, BeforeValidator(_port)]


class MemoryConfig(_Model):
    """A memory slot. Sizes and addresses are multiples of 4096 bytes."""

    model_config = ConfigDict(json_schema_extra=_not_required("slot"))

    slot: Annotated[int, Field(ge=0, lt=MAX_SLOTS, description="Id of the slot. Default: its place in the list.")]
    gpa: Annotated[Size, Field(description="Guest physical address at which it begins.")] = 0
    size: Annotated[Size, Field(description="Size of the slot.")]
    log: Annotated[bool, Field(description="Log the pages that are dirtied in it.")] = True


class GuestConfig(_Model):
    """What runs in the machine: a sample guest (workload), any static x86-64 ELF file or flat binary (image), or a
    Linux program (program; docs/linux.md)."""

    workload: Annotated[str | None, Field(description="Name of a sample guest; vmm guests lists them.")] = None
    image: Annotated[FileName | None, Field(
        description="Static x86-64 ELF file, or a flat binary (with address). Relative to the configuration.")] = None
    address: Annotated[Size | None, Field(
        description="Guest physical address at which a flat binary is loaded and entered.")] = None
    params: Annotated[Annotated[dict[str, int], Tag("names")] | Annotated[list[int], Tag("list")], Discriminator(
        lambda value: "list" if isinstance(value, list) else "names"), Field(
        description="Parameters of the workload by name, or of an image as a list of numbers, which it finds in its "
                    "boot information.")] = Field(default_factory=dict)
    program: Annotated[str | None, Field(
        description="Linux program: a path in root, or a name that is looked for there.")] = None
    args: Annotated[list[str], Field(description="Arguments of the program, without its name.")] = Field(
        default_factory=list)
    env: Annotated[dict[str, str], Field(description="Variables of the program's environment.")] = Field(
        default_factory=dict)
    root: Annotated[FileName | None, Field(
        description="Directory or tar file of the host that is the program's root. It is read, and never written "
                    "to.")] = None
    files: Annotated[dict[str, FileName], Field(
        description="Files and directories of the host that the program has: absolute path there, path here.")] = Field(
            default_factory=dict)
    directory: Annotated[str, Field(description="Directory in which the program starts.")] = "/"
    threads: Annotated[int, Field(ge=1, lt=MAX_VCPUS)] | None = Field(
        None, description="Threads that the program and its children may have at once. Default: 8.")
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = Field(
        None, description="Seed of the program's random numbers, which are then the same in each run.")
    forward: Annotated[list[Port], Field(
        description="Ports of the host that lead to the program's, as [ADDRESS:]PORT[:INSIDE] in quotation "
                    "marks.")] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> GuestConfig:
        if sum(x is not None for x in (self.workload, self.image, self.program)) != 1:
            raise ValueError("give exactly one of 'workload', 'image' and 'program'")
        given = self.model_fields_set
        if self.program is None and (extra := given & _PROGRAM_KEYS):
            raise ValueError(f"{min(extra)}: only valid with 'program'")
        if self.program is not None and "params" in given:
            raise ValueError("params: not valid with 'program': give 'args'")
        if self.address is not None and self.image is None:
            raise ValueError("address: only valid with 'image', for a flat binary")
        if self.workload is not None and not isinstance(self.params, dict):
            raise ValueError("params: those of a workload must be a mapping of names to values")
        return self


_PROGRAM_KEYS = frozenset({"args", "env", "root", "files", "directory", "threads", "seed", "forward"})

Pattern = Literal["sequential", "strided", "random", "zipf"]
_PATTERNS = ("sequential walks over the pages; strided writes every stride-th page; random writes random pages; zipf "
             "favours the first pages, more strongly with a larger exponent.")
_Writes = Annotated[int, Field(ge=0, le=rules.WRITES_MAX, description="Writes of each vCPU; 0: indefinitely.")]
_Stride = Annotated[int, Field(ge=1, le=rules.STRIDE_MAX)]
_Exponent = Annotated[float, Field(gt=0, le=rules.EXPONENT_MAX)]
_STRIDE = "Pages from one write to the next, with pattern: strided."
_EXPONENT = "Exponent of the distribution, with pattern: zipf."


class ReplayPhaseConfig(_Model):
    """Writes in one pattern."""

    pattern: Annotated[Pattern, Field(description=_PATTERNS)]
    writes: _Writes = 0
    stride: Annotated[_Stride | None, Field(description=_STRIDE)] = None
    exponent: Annotated[_Exponent | None, Field(description=_EXPONENT)] = None

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
    """What the replay accelerator dirties, instead of a guest: one pattern, several patterns in sequence (phases), or a
    recorded trace."""

    pattern: Annotated[Pattern | None, Field(description=_PATTERNS)] = None
    writes: _Writes = 0
    stride: Annotated[_Stride | None, Field(description=_STRIDE)] = None
    exponent: Annotated[_Exponent | None, Field(description=_EXPONENT)] = None
    phases: Annotated[list[ReplayPhaseConfig], Field(min_length=1, max_length=rules.PHASES_MAX)] | None = Field(
        None, description="Patterns one after the other, each with its own writes.")
    trace: Annotated[FileName | None, Field(
        description="File that vmm trace record made. Relative to the configuration.")] = None
    speed: Annotated[Literal["original", "full"] | Annotated[float, Field(gt=0, le=rules.SPEED_MAX)], Field(
        description="How fast a trace is replayed: at its own times, as fast as possible, or so many times "
                    "faster.")] = "original"
    rate: Annotated[float, Field(
        ge=0, le=rules.RATE_MAX,
        description="Writes per second of each vCPU; 0: as fast as possible.")] = 0.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63, description="Seed of the patterns' random numbers.")] = 0
    shared: Annotated[bool, Field(
        description="Every vCPU writes to all pages; otherwise each to its own share.")] = False
    repeat: Annotated[bool, Field(
        description="Every write makes a ring entry, not only the first since the page's reset.")] = False

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
    """When the coordinator reaps the dirty rings."""

    mode: Annotated[Literal["adaptive", "fixed"], Field(
        description="adaptive: by the rates at which rings fill; fixed: every interval, as QEMU does.")] = "adaptive"
    interval: Annotated[Duration, Field(description="Time between two reaps, with mode: fixed.")] = 1.0
    min_interval: Annotated[Duration, Field(
        description="Shortest time between two reaps, with mode: adaptive.")] = 0.001
    max_interval: Annotated[Duration, Field(
        description="Longest time between two reaps, with mode: adaptive.")] = 1.0
    reset: Annotated[Literal["late", "early"], Field(
        description="late: rings are reset when somebody asks for the log, or one would get full; early: with each "
                    "reap, as QEMU does.")] = "late"

    @model_validator(mode="after")
    def _check(self) -> ReaperConfig:
        if self.min_interval > self.max_interval:
            raise ValueError("min_interval: must not exceed max_interval")
        return self


class VerifyConfig(_Model):
    """How the machine verifies itself."""

    interval: Annotated[Duration, Field(description="Time between two rounds.")] = 0.2
    inject: Annotated[Literal["none", "lost", "extra"], Field(
        description="Falsify the log, to see that it is found out: lose a dirty page, or add a clean one.")] = "none"


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


def _verify_schema(schema: dict[str, Any]) -> None:
    schema["anyOf"].insert(0, {"type": "boolean"})


class MachineConfig(_Model):
    """A machine. Every key but memory and guest (or replay) has a default."""

    model_config = ConfigDict(json_schema_extra=_not_required("name"))

    name: Annotated[str, AfterValidator(_name), Field(
        description="Name of the machine. Default: that of the file.",
        json_schema_extra={"pattern": f"^{MACHINE_NAME}$"})]
    accel: Annotated[str, AfterValidator(_accelerator), Field(
        description="What runs the vCPUs: kvm, or the software CPU unicorn; replay has no CPU, and dirties pages by a "
                    "pattern. auto: kvm where it can be used, otherwise unicorn.",
        json_schema_extra={"enum": list(_ACCELERATORS)})] = "auto"
    vcpus: Annotated[int, Field(ge=1, le=MAX_VCPUS, description="Number of vCPUs; each is a process.")] = 1
    privilege: Annotated[Literal["user", "kernel"], Field(
        description="Privilege level of the guest: user is CPL 3, kernel CPL 0.")] = "user"
    nice: Annotated[int, Field(
        ge=0, le=rules.NICE_MAX,
        description="Niceness of the vCPU processes, as of nice(1); 19 leaves the processors to others.")] = 0
    dirty_ring_size: Annotated[int | Literal["auto"], BeforeValidator(_ring_size), Field(
        description="Entries of each vCPU's dirty ring, a power of two from 1024 up; 0: no rings. auto: as many as "
                    "all pages of the machine take, if the host allows that.")] = "auto"
    tracking: Annotated[Literal["ring", "bitmap", "uffd", "none", "auto"] | None, Field(
        description="How dirty pages are tracked. auto: rings, or bitmaps while rings cost the guest more. Default: "
                    "auto where dirty_ring_size is, otherwise ring, and bitmap where it is 0.")] = None
    log: Annotated[Literal["auto", "always"], Field(
        description="auto: the vCPUs log what they write while somebody needs it (a client, a limit, a recording); "
                    "always: from the start.")] = "auto"
    memory: Annotated[list[MemoryConfig], Field(
        min_length=1, description="Memory slots. Slots may have holes between them."), BeforeValidator(_number_slots)]
    guest: Annotated[GuestConfig | None, Field(description="What runs in the machine.")] = None
    replay: Annotated[ReplayConfig | None, Field(
        description="Instead of guest, for accel: replay: what dirties the pages.")] = None
    reaper: Annotated[ReaperConfig, Field(description="When the rings are reaped.")] = ReaperConfig()
    reapers: Annotated[int, Field(
        ge=1, le=REAPERS_MAX, description="Threads that harvest, each some of the rings.")] = 1
    verify: Annotated[VerifyConfig | None, BeforeValidator(_verify), Field(
        description="Prove at run time that no page is lost: each page is compared with what the log says of it. true: "
                    "with the defaults; false: not at all.", json_schema_extra=_verify_schema)] = None
    timeout: Annotated[Duration | None, Field(description="End the machine after this time. Default: never.")] = None
    dirty_limit: Annotated[Rate | None, Field(
        description="Rate to which the dirtying of each vCPU is limited. Default: none.")] = None
    stack_size: Annotated[Size, Field(description="Stack of each vCPU, a multiple of 16 bytes.")] = 16 << 10
    trace: Annotated[list[str], Field(
        description="Trace events to print, as patterns: kvm_dirty_ring_*.")] = Field(default_factory=list)
    #: Where its keys were given, for errors that come later.
    _origins: Origins | None = PrivateAttr(None)

    def error(self, key: str, message: str) -> ConfigError:
        """Of an error about ``key``, which was found later: with the place where that was given."""
        at = tuple(key_step(step) for step in key.split("."))
        return (self._origins or Origins("")).error(at, message)

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
        self._check_section()
        if self.guest is not None and self.guest.program is not None:
            if extra := self.model_fields_set & {"vcpus", "privilege", "stack_size"}:
                raise ValueError(f"{min(extra)}: not valid with a program (guest.threads says how many threads it may "
                                 "have)")
            if len(self.memory) > 1:
                raise ValueError("memory: must be one slot for a program")
        rules.check_stack(self.stack_size)
        rules.check_slots([RamSlot(m.slot, m.gpa, m.size) for m in self.memory], mapped=self.replay is None)
        return self

    def _check_section(self) -> None:
        """Guest or replay, and what goes with it. Raises ValueError."""
        if (self.guest is None) == (self.replay is None):
            raise ValueError("'guest' (or 'replay') is missing" if self.guest is None else
                             "replay: give either 'guest' or 'replay', not both")
        section = "guest" if self.accel == "auto" else capabilities(self.accel).section
        if self.replay is None and section != "guest":
            raise ValueError(f"accel: {self.accel} has no CPU for a guest: give '{section}' instead of 'guest'")
        if self.replay is None:
            return
        if self.accel != "auto" and section != "replay":
            raise ValueError(f"accel: {self.accel} runs a guest; 'replay' needs accel: "
                             f"{' or '.join(names('replay'))}")
        if self.tracking not in (None, "ring"):
            raise ValueError(f"tracking: {self.tracking} is not supported with replay, which needs dirty rings")
        if not self.dirty_ring_size:
            raise ValueError("dirty_ring_size: replay needs dirty rings, but 0 selects the plain bitmap")
