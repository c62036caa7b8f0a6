"""The YAML file of a machine: its schema, and errors that name file, line and key."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from ipc.layout import MAX_SLOTS, MAX_VCPUS

from .boot import SYSTEM_GPA
from .errors import VmmError
from .names import MACHINE_NAME
from .spec import REAPERS_MAX

__all__ = ["ConfigError", "MachineConfig", "config_schema", "explain", "load_config", "parse_duration",
           "parse_rate", "parse_size", "read_yaml"]

PAGE = 4096
RING_MIN, RING_MAX = 1024, 65536
SYSTEM_AREA = (SYSTEM_GPA, SYSTEM_GPA + 0x100_0000)
GPA_MAX = 1 << 40
REPLAY_GPA_MAX = 1 << 44        # nothing is mapped there: this is what the numbering of pages allows

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "pages": PAGE}
_RATE_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


class ConfigError(VmmError):
    """A configuration that cannot be used; one line a problem, each naming file, line and key."""


def parse_size(value: object) -> int:
    """Bytes from ``4096``, ``"0x1000"``, ``"64MiB"``, ``"4099 pages"``. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip()
    if isinstance(value, str):
        if re.fullmatch(r"0[xX][0-9a-fA-F]+", text):
            return int(text, 16)
        match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text)
        if match and match[2].lower() in _UNITS:
            return int(match[1]) * _UNITS[match[2].lower()]
    raise ValueError(f"{text!r} is not a size: write bytes, 0x… or a number with KiB, MiB, GiB or pages")


def parse_duration(value: object) -> float:
    """Seconds from ``0.5``, ``"50ms"``, ``"1s"``, ``"2m"``. Raises ValueError."""
    seconds = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s|m|h|)", value.strip())
        if match:
            seconds = float(match[1]) * _SECONDS[match[2]]
    if not 0 < seconds < 1e9:
        raise ValueError(f"{value!r} is not a duration: write seconds, or a number with us, ms, s, m or h")
    return seconds


def parse_rate(value: object) -> float:
    """Bytes a second from ``1000000``, ``"100MB/s"``, ``"64MiB/s"`` (``/s`` may be left out). Raises ValueError."""
    rate = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        rate = float(value)
    elif isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)(?:/s)?", value.strip())
        if match and match[2].lower() in _RATE_UNITS:
            rate = float(match[1]) * _RATE_UNITS[match[2].lower()]
    if not 0 < rate < 1e15:
        raise ValueError(f"{value!r} is not a rate: write bytes a second, or a number with kB/s, MB/s, GB/s, "
                         "KiB/s, MiB/s or GiB/s")
    return rate


Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
Rate = Annotated[float, BeforeValidator(parse_rate)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MemoryConfig(_Model):
    """One memory slot; sizes and addresses are multiples of 4096 bytes."""

    slot: Annotated[int, Field(ge=0, lt=MAX_SLOTS)]
    gpa: Size = 0
    size: Size
    log: bool = True

    @model_validator(mode="after")
    def _check(self) -> MemoryConfig:
        if self.size <= 0 or self.size % PAGE:
            raise ValueError(f"size: {self.size} must be a positive multiple of {PAGE} bytes")
        if self.gpa < 0 or self.gpa % PAGE:
            raise ValueError(f"gpa: {self.gpa:#x} must be a multiple of {PAGE}")
        return self


class GuestConfig(_Model):
    """A sample guest by ``workload``, or any static x86-64 ELF (or flat binary) by ``image``."""

    workload: str | None = None
    image: Path | None = None
    address: Size | None = None
    params: dict[str, int] | list[int] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> GuestConfig:
        if (self.workload is None) == (self.image is None):
            raise ValueError("give exactly one of 'workload' and 'image'")
        if self.address is not None and self.image is None:
            raise ValueError("'address' goes with the 'image' of a flat binary")
        if self.workload is not None and not isinstance(self.params, dict):
            raise ValueError("the params of a workload are names with values")
        return self


Pattern = Literal["sequential", "strided", "random", "zipf"]


class ReplayPhaseConfig(_Model):
    """Writes in one pattern: ``sequential`` walks over the pages, ``strided`` takes each ``stride``-th,
    ``random`` any, ``zipf`` the first ones most often, the more so the larger its ``exponent``."""

    pattern: Pattern
    writes: Annotated[int, Field(ge=0, le=1 << 48)] = 0     # of each vCPU; 0: for ever
    stride: Annotated[int, Field(ge=1, le=1 << 32)] | None = None       # pages
    exponent: Annotated[float, Field(gt=0, le=10)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ReplayPhaseConfig:
        _check_pattern(self.pattern, self.stride, self.exponent)
        return self


def _check_pattern(pattern: str | None, stride: int | None, exponent: float | None) -> None:
    for key, value, owner in (("stride", stride, "strided"), ("exponent", exponent, "zipf")):
        if value is None and pattern == owner:
            raise ValueError(f"pattern: {owner} needs '{key}'")
        if value is not None and pattern != owner:
            raise ValueError(f"{key}: goes with pattern: {owner}")


class ReplayConfig(_Model):
    """What the replay accelerator dirties: one pattern, several one after another, or a recorded trace."""

    pattern: Pattern | None = None
    writes: Annotated[int, Field(ge=0, le=1 << 48)] = 0     # of each vCPU; 0: for ever
    stride: Annotated[int, Field(ge=1, le=1 << 32)] | None = None       # pages
    exponent: Annotated[float, Field(gt=0, le=10)] | None = None
    phases: Annotated[list[ReplayPhaseConfig], Field(min_length=1)] | None = None
    trace: Path | None = None       # a file of ``vmm trace record``
    speed: Literal["original", "full"] | Annotated[float, Field(gt=0, le=1e6)] = "original"
    rate: Annotated[float, Field(ge=0, le=1e12)] = 0.0      # writes a second of each vCPU; 0: as fast as it can
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
            raise ValueError("writes: goes with 'pattern'; a phase has its own")
        if self.trace is None and "speed" in given:
            raise ValueError("speed: goes with 'trace'")
        if self.trace is not None and (extra := given & {"rate", "seed", "shared"}):
            raise ValueError(f"{min(extra)}: a trace has its own")
        for i, phase in enumerate((self.phases or [])[:-1]):
            if not phase.writes:
                raise ValueError(f"phases.{i}: needs 'writes': only the last phase may go on for ever")
        return self


class ReaperConfig(_Model):
    mode: Literal["adaptive", "fixed"] = "adaptive"
    interval: Duration = 1.0        # fixed: the period, as the seed's
    min_interval: Duration = 0.001
    max_interval: Duration = 1.0

    @model_validator(mode="after")
    def _check(self) -> ReaperConfig:
        if self.min_interval > self.max_interval:
            raise ValueError("min_interval: is above max_interval")
        return self


class VerifyConfig(_Model):
    interval: Duration = 0.2
    inject: Literal["none", "lost", "extra"] = "none"


def _verify(value: object) -> object:
    if value is True:
        return {}
    return None if value is False else value


def _number_slots(value: object) -> object:
    """A slot's default id is its place in the list."""
    if isinstance(value, list):
        return [{"slot": i, **v} if isinstance(v, dict) else v for i, v in enumerate(value)]
    return value


class MachineConfig(_Model):
    """A machine. Every key but ``memory`` and ``guest`` (or ``replay``) has a default."""

    name: Annotated[str, Field(pattern=f"^{MACHINE_NAME}$")]
    accel: Literal["auto", "kvm", "unicorn", "replay"] = "auto"
    vcpus: Annotated[int, Field(ge=1, le=MAX_VCPUS)] = 1
    privilege: Literal["user", "kernel"] = "user"
    dirty_ring_size: int = 4096     # entries of a ring; 0: without rings
    #: None: ring, or bitmap where dirty_ring_size is 0.
    tracking: Literal["ring", "bitmap", "uffd", "none", "auto"] | None = None
    memory: Annotated[list[MemoryConfig], Field(min_length=1), BeforeValidator(_number_slots)]
    guest: GuestConfig | None = None
    replay: ReplayConfig | None = None      # instead of a guest
    reaper: ReaperConfig = ReaperConfig()
    reapers: Annotated[int, Field(ge=1, le=REAPERS_MAX)] = 1    # threads that harvest, each some of the rings
    verify: Annotated[VerifyConfig | None, BeforeValidator(_verify)] = None
    timeout: Duration | None = None
    dirty_limit: Rate | None = None     # bytes a second of each vCPU
    stack_size: Size = 16 << 10
    trace: list[str] = Field(default_factory=list)
    #: Where each key was given: "file:line" or "--set …", for errors that come later.
    _origins: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)

    def where(self, key: str) -> str:
        """``file:line: key`` for an error about ``key``."""
        at: tuple[str | int, ...] = tuple(int(s) if s.isdigit() else s for s in key.split("."))
        while at and at not in self._origins:
            at = at[:-1]
        origin = self._origins.get(at)
        return f"{origin}: {key}" if origin else key

    @model_validator(mode="after")
    def _check(self) -> MachineConfig:
        entries = self.dirty_ring_size
        if entries and (entries & (entries - 1) or not RING_MIN <= entries <= RING_MAX):
            raise ValueError(f"dirty_ring_size: {entries} entries must be a power of two from {RING_MIN} to "
                             f"{RING_MAX}, or 0 for the plain bitmap")
        if self.tracking == "ring" and not entries:
            raise ValueError("tracking: ring needs a dirty_ring_size above 0")
        if self.tracking == "none" and self.verify is not None:
            raise ValueError("tracking: none leaves nothing to verify (verify is on)")
        if self.dirty_limit is not None and (not entries or self.dirty_limit < PAGE):
            raise ValueError("dirty_limit: " + ("needs a dirty ring, and dirty_ring_size is 0" if not entries
                                                else f"{self.dirty_limit:g} is less than a page a second"))
        if self.dirty_limit is not None and self.tracking not in (None, "ring", "auto"):
            raise ValueError(f"dirty_limit: needs a dirty ring, and tracking is {self.tracking}")
        if (self.guest is None) == (self.replay is None):
            raise ValueError("'guest' is missing (or 'replay')" if self.guest is None else
                             "replay: give one of 'guest' and 'replay'")
        if self.replay is None and self.accel == "replay":
            raise ValueError("accel: replay has no CPU for a guest: give 'replay' instead of 'guest'")
        if self.replay is not None and self.accel not in ("auto", "replay"):
            raise ValueError(f"accel: {self.accel} runs a guest; 'replay' needs accel: replay")
        if self.replay is not None and self.tracking not in (None, "ring"):
            raise ValueError(f"tracking: {self.tracking} cannot be: replay drives dirty rings")
        if self.replay is not None and not entries:
            raise ValueError("dirty_ring_size: replay drives dirty rings, and 0 is the plain bitmap")
        if self.stack_size < 1024 or self.stack_size % 16:
            raise ValueError("stack_size: must be a multiple of 16, at least 1024 bytes")
        taken: list[tuple[int, int, str]] = [] if self.replay else [(*SYSTEM_AREA, "the system area")]
        top = REPLAY_GPA_MAX if self.replay else GPA_MAX
        ids: set[int] = set()
        for i, memory in enumerate(self.memory):
            start, end = memory.gpa, memory.gpa + memory.size
            if end > top:
                raise ValueError(f"memory.{i}.size: ends at {end:#x}, above {top:#x}")
            if memory.slot in ids:
                raise ValueError(f"memory.{i}.slot: slot {memory.slot} is there twice")
            ids.add(memory.slot)
            for other_start, other_end, what in taken:
                if start < other_end and other_start < end:
                    raise ValueError(f"memory.{i}: [{start:#x}, {end:#x}) overlaps {what} "
                                     f"[{other_start:#x}, {other_end:#x})")
            taken.append((start, end, f"memory.{i}"))
        return self


def config_schema() -> dict[str, Any]:
    """JSON schema of the file."""
    return MachineConfig.model_json_schema()


# --- loading -----------------------------------------------------------------------------------------


Lines = dict[tuple[str | int, ...], int]


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """A file's mapping, and the line of each key in it. Raises ConfigError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    lines: Lines = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        document = _construct(node, (), lines, path) if node is not None else None
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = str(getattr(exc, "problem", None) or exc).splitlines()[0]
        raise ConfigError(f"{path}{where}: not YAML: {problem}") from None
    except RecursionError:      # an alias within its own anchor, or brackets beyond reason
        raise ConfigError(f"{path}: not a configuration: nested without end") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    return document, lines


def load_config(path: str | Path, overrides: list[str] | None = None) -> MachineConfig:
    """Read and validate a file, after ``key.path=value`` overrides. Raises ConfigError."""
    path = Path(path)
    document, lines = read_yaml(path)
    set_keys = {}
    for override in overrides or []:
        set_keys[_override(document, override)] = f"--set {override}"
    document.setdefault("name", re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-") or "vm")
    try:
        config = MachineConfig.model_validate(document)
    except ValidationError as exc:
        raise explain(exc, path, lines, set_keys, document) from None
    for section, file in (("guest", "image"), ("replay", "trace")):
        model = getattr(config, section)
        given = getattr(model, file, None)
        if given is not None and not given.is_absolute():
            config = config.model_copy(
                update={section: model.model_copy(update={file: (path.parent / given).resolve()})})
    config._origins.update({at: f"{path}:{line}" for at, line in lines.items()})
    config._origins.update(set_keys)
    return config


def _construct(node: yaml.Node, at: tuple[str | int, ...], lines: Lines, path: Path) -> Any:
    """Plain Python values of a node tree, noting each key's line; a key given twice is an error."""
    lines[at] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in found:
                raise ConfigError(f"{path}:{key_node.start_mark.line + 1}: "
                                  f"{'.'.join(map(str, (*at, key)))}: given twice")
            found[key] = _construct(value_node, (*at, key), lines, path)
            lines[(*at, key)] = key_node.start_mark.line + 1
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_construct(n, (*at, i), lines, path) for i, n in enumerate(node.value)]
    return yaml.safe_load(yaml.serialize(node))


def _override(document: dict[str, Any], text: str) -> tuple[str | int, ...]:
    """Apply one ``--set``; the path that it set. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text}: write key=value, for example vcpus=8")
    steps: list[str | int] = []
    target: Any = document
    parts = key.split(".")
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                raise ConfigError(f"--set {text}: {'.'.join(map(str, steps))} has no item {part}")
            step: str | int = int(part)
        elif isinstance(target, dict):
            step = part
        else:
            raise ConfigError(f"--set {text}: {'.'.join(map(str, steps))} is not a mapping")
        steps.append(step)
        if last:
            try:
                target[step] = yaml.safe_load(value)
            except yaml.YAMLError:
                raise ConfigError(f"--set {text}: the value is not YAML") from None
        elif isinstance(target, dict):
            if not isinstance(target.get(part), dict | list):
                target[part] = {}
            target = target[part]
        else:
            target = target[step]
    return tuple(steps)


def explain(exc: ValidationError, path: Path, lines: Lines, set_keys: dict[tuple[str | int, ...], str],
            document: dict[str, Any], model: type[BaseModel] = MachineConfig) -> ConfigError:
    """What pydantic found, a line a problem. ``set_keys``: keys that were given on the command line, and how.
    ``model``: what the document was validated as."""
    return ConfigError("\n".join(_explain(error, path, lines, set_keys, document, model) for error in exc.errors()))


def _explain(error: Any, path: Path, lines: Lines, set_keys: dict[tuple[str | int, ...], str],
             document: dict[str, Any], model: type[BaseModel]) -> str:
    """One line: where, which key, what is wrong."""
    message = error["msg"].removeprefix("Value error, ")
    at = tuple(error["loc"])
    named = re.match(r"([a-z_]+(?:\.[a-z0-9_]+)*): (.*)", message)
    if named:   # a check over several keys names the one it is about itself
        at += tuple(int(s) if s.isdigit() else s for s in named[1].split("."))
        message = named[2]
    while at and at not in lines and at not in set_keys and not _holds(document, at):
        at = at[:-1]    # pydantic's own steps (a union's member, for one) are not keys
    if error["type"] == "extra_forbidden":
        message = f"unknown key{_nearest(at, model)}"
    elif error["type"] == "missing":
        at = tuple(error["loc"])
        message = "missing"
    else:
        given = error.get("input")
        if error["type"] != "value_error" and isinstance(given, str | int | float | bool):
            message = f"{message[0].lower()}{message[1:]} (not {given!r})"
    key = ".".join(map(str, at))
    for set_path, text in set_keys.items():
        if at[: len(set_path)] == set_path:
            return f"{text}: {key}: {message}"
    probe = at
    while probe not in lines and probe:
        probe = probe[:-1]
    where = f"{path}:{lines.get(probe, 1)}"
    return f"{where}: {key}: {message}" if key else f"{where}: {message}"


def _holds(document: Any, at: tuple[str | int, ...]) -> bool:
    for step in at:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _nearest(at: tuple[str | int, ...], model: type[BaseModel]) -> str:
    """`` (did you mean …?)`` for a misspelt key, from the model it stands in."""
    for step in at[:-1]:
        field = model.model_fields.get(str(step))
        model = (_model_in(field.annotation) if field else None) or model
    names = list(model.model_fields)
    near = difflib.get_close_matches(str(at[-1]), names, n=1)
    return f" (did you mean '{near[0]}'?)" if near else f"; there are: {', '.join(names)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds: itself, or one of a list or union of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
