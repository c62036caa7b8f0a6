"""What a machine may be: one set of bounds, for a configuration file, an offer of another host, the manifest of a
snapshot, a specification made by a program, and memory that is plugged in.

``check_machine`` looks at a whole specification before anything is made of it: every number has bounds, every word
is one of a list, and nothing that came from elsewhere is a path (``arriving``). What depends on this host (room,
limits, what its kernel offers) is asked elsewhere (vmm/machine/room.py, vmm/machine/trackings.py,
vmm/client/accelerators.py, vmm/client/plan.py), as is what depends on the image (vmm/machine/loader.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from ipc.layout import MAX_SLOTS, MAX_VCPUS, RING_MAX, RING_MIN, RING_RESERVE
from ipc.messages import ProgramSpec, ReplaySpec
from ipc.shm import PAGE_SIZE
from workers.accel import registry

from ..errors import VmmError
from . import boot
from .events import check_pattern
from .forwards import parse_forward
from .names import check_machine_name
from .spec import REAPERS_MAX, MachineSpec, RamSlot
from .trackings import CHOICES

__all__ = ["GPA_MAX", "NICE_MAX", "NO_TREES", "REPLAY_GPA_MAX", "SECONDS_MAX", "STACK_MAX", "STACK_MIN",
           "SYSTEM_AREA", "RuleError", "Trees", "arriving", "check_machine", "check_new_slot", "check_quota",
           "check_ring", "check_slots", "check_stack", "fitting_ring"]

GPA_MAX = 1 << 40                       # RAM ends below it
REPLAY_GPA_MAX = 1 << 44                # nothing is mapped there: this is what the numbering of pages allows
SYSTEM_AREA = (boot.SYSTEM_GPA, boot.SYSTEM_GPA + 0x100_0000)
STACK_MIN, STACK_MAX = 1024, 1 << 30    # bytes
NICE_MAX = 19
SECONDS_MAX = 1e9                       # of any interval or timeout: 31 years
QUOTA_MAX = 1 << 40                     # pages per second
WRITES_MAX = 1 << 48                    # of a phase of a replay, of each vCPU
STRIDE_MAX = 1 << 32                    # pages
EXPONENT_MAX = 10.0
PHASES_MAX = 1000
RATE_MAX = 1e12                         # writes per second
SPEED_MAX = 1e6                         # of a replayed trace, against its own times
CONSOLES = ("lines", "streams", "terminal")     # of a program (ipc/messages.py)
FORWARDS_MAX = 64                       # ports of the host that lead into a machine
_PATTERNS = ("sequential", "strided", "random", "zipf")
_INJECTIONS = ("none", "lost", "extra")
_EVENT_PATTERNS_MAX = 64
_SHOWN_MAX, _SHOWN_LENGTH = 2048, 64      # CPU features, characters of the name of one
_PATH_MAX = 4095                        # bytes (PATH_MAX, less its NUL)


class Trees(NamedTuple):
    """Of a program that arrives: the files of this host that it has (``ProgramSpec``), which must be as they were
    elsewhere. ``files``: as far as they are directories, others it has read."""

    root: str = ""
    files: Mapping[str, str] = {}


NO_TREES = Trees()


class RuleError(VmmError, ValueError):
    """No machine may be so. ``key`` is that of the configuration file, with dots; ``text`` says why."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(f"{key}: {text}")
        self.key, self.text = key, text


def check_machine(spec: MachineSpec) -> None:
    """Everything about a machine that does not depend on this host. Raises RuleError, and VmmError for its name."""
    spec = _typed(spec)
    check_machine_name(spec.name)
    _one_of("accel", spec.accel, registry.names())
    can = spec.can
    _number("vcpus", spec.vcpus, 1, MAX_VCPUS)
    _one_of("privilege", spec.privilege, ("user", "kernel"))
    _number("nice", spec.nice, 0, NICE_MAX)
    check_ring(spec.ring_entries)
    _one_of("tracking", spec.tracking, ("", *CHOICES))
    _one_of("log", spec.log, ("auto", "always"))
    if spec.tracking == "ring" and not spec.ring_entries:
        raise RuleError("tracking", "ring needs a dirty_ring_size above 0")
    check_slots(spec.slots, mapped=can.guests)
    for slot in spec.slots:
        _number(f"slot {slot.id}: born", slot.born, 0, (1 << 63) - 1)
    check_stack(spec.stack_size)
    _check_guest(spec, can.guests)
    _check_times(spec)
    for quota in (spec.dirty_quota, *spec.dirty_quotas):
        check_quota(quota)
    if spec.dirty_quotas and len(spec.dirty_quotas) != spec.vcpus:
        raise RuleError("dirty_limit", f"{len(spec.dirty_quotas)} limits for {spec.vcpus} vCPUs")
    if any(spec.quotas) and not spec.ring_entries:
        raise RuleError("dirty_limit", "needs a dirty ring, but dirty_ring_size is 0")
    if len(spec.trace) > _EVENT_PATTERNS_MAX:
        raise RuleError("trace", f"must have at most {_EVENT_PATTERNS_MAX} patterns (got {len(spec.trace)})")
    for pattern in spec.trace:
        try:
            check_pattern(pattern)
        except VmmError as exc:
            raise RuleError("trace", str(exc)) from None
    if len(spec.shown) > _SHOWN_MAX or any(len(name) > _SHOWN_LENGTH or not name.isprintable() for name in spec.shown):
        raise RuleError("shown", f"must be at most {_SHOWN_MAX} names of CPU features")
    if spec.trace_file:
        _check_path("trace_file", spec.trace_file)
    if not can.guests:
        _check_replay(spec)
    elif spec.replay is not None or spec.replay_trace:
        wanted = " or ".join(registry.names("replay"))
        raise RuleError("replay", f"needs accel {wanted}, but accel is {spec.accel}")


def arriving(spec: MachineSpec, *, name: str, image: str, accel: str, linger: bool,
             trees: Trees = NO_TREES, incoming: bool = False) -> MachineSpec:
    """What a specification from elsewhere (an offer, a manifest) is here: under this name, on this accelerator,
    with the image at this path (a program has none), with these files for a program, and with RAM that whoever
    launches it fills in (``incoming``). Nothing of its own is used as a path or written to: where it traced to, and
    what it replayed, is the other host's business. Raises RuleError for what no machine may be."""
    program = None if spec.program is None else _arriving(spec.program, trees, linger=linger)
    found = msgspec.structs.replace(spec, name=name, image="" if program else image, accel=accel, linger=linger,
                                    incoming=incoming, links={}, trace=[], trace_file="", replay_trace="",
                                    program=program, continues=False, elapsed=0.0)
    check_machine(found)
    return found


def _arriving(program: ProgramSpec, trees: Trees, *, linger: bool) -> ProgramSpec:
    """Raises RuleError."""
    if program.root and not trees.root:
        raise RuleError("guest.root", "the program has files of a directory or a tar file, which it may not all have "
                                      "read yet: give the same here (--root)")
    if trees.root and not program.root:
        raise RuleError("guest.root", "the program had none where it comes from")
    if foreign := sorted({*trees.files} - {*program.files}):
        raise RuleError("guest.files", f"the program had no {foreign[0]} where it comes from")
    console = program.console
    if not linger and console == "terminal":
        raise RuleError("guest.console", "the program has a terminal, which somebody must be at: not with --detach")
    return msgspec.structs.replace(program, root=trees.root, files=dict(trees.files), arrives=True,
                                   console=console if linger else "lines")


def check_quota(pages_per_s: int) -> None:
    """A dirty limit; 0 is none. Raises RuleError."""
    _number("dirty_limit", pages_per_s, 0, QUOTA_MAX, "pages per second")


def check_ring(entries: int) -> None:
    """Entries of a dirty ring; 0 is none. Raises RuleError."""
    if entries and (entries & (entries - 1) or not RING_MIN <= entries <= RING_MAX):
        raise RuleError("dirty_ring_size", f"must be a power of two from {RING_MIN} to {RING_MAX}, or 0 for the "
                                           f"plain bitmap (got {_shown(entries)})")


def fitting_ring(slots: Sequence[RamSlot], largest: int) -> int:
    """Entries of a ring that all pages of the slots fit into, so that it is never full; ``largest`` at most."""
    pages = sum(slot.pages for slot in slots) + RING_RESERVE
    return min(max(RING_MIN, 1 << pages.bit_length()), largest)


def check_stack(size: int) -> None:
    """Bytes of each vCPU's stack. Raises RuleError."""
    if not STACK_MIN <= size <= STACK_MAX or size % 16:
        raise RuleError("stack_size", f"must be a multiple of 16 bytes, from {STACK_MIN} to {STACK_MAX} (got "
                                      f"{_shown(size)})")


def check_slots(slots: Sequence[RamSlot], *, mapped: bool) -> None:
    """A machine's memory slots, in the order of its file. Raises RuleError."""
    if not 1 <= len(slots) <= MAX_SLOTS:
        raise RuleError("memory", f"must have 1 to {MAX_SLOTS} slots (got {len(slots)})")
    taken = [("the system area", *SYSTEM_AREA)] if mapped else []
    ids: set[int] = set()
    for at, slot in enumerate(slots):
        key = f"memory.{at}"
        _check_slot(key, f"{key}.", slot, taken, GPA_MAX if mapped else REPLAY_GPA_MAX)
        if slot.id in ids:
            raise RuleError(f"{key}.slot", f"duplicate slot id {slot.id}")
        ids.add(slot.id)
        taken.append((key, slot.gpa, slot.gpa + slot.size))


def check_new_slot(slot: RamSlot, there: Iterable[RamSlot], *, mapped: bool, top: int) -> None:
    """A slot to be plugged in beside those that are ``there``; ``top``: first guest address that the machine cannot
    reach (a replayed one reaches all). Raises RuleError."""
    taken = [("the system area", *SYSTEM_AREA)] if mapped else []
    for other in there:
        if other.id == slot.id:     # there are ids for as many slots as there may be
            raise RuleError(f"slot {other.id}", "already exists")
        taken.append((f"slot {other.id}", other.gpa, other.gpa + other.size))
    _check_slot(f"slot {_shown(slot.id)}", "", slot, taken, min(top, GPA_MAX) if mapped else REPLAY_GPA_MAX)


def _check_slot(whole: str, prefix: str, slot: RamSlot, taken: Iterable[tuple[str, int, int]], top: int) -> None:
    """``whole`` is the key of the slot, ``prefix`` what the keys of its parts begin with."""
    _number(f"{prefix}slot", slot.id, 0, MAX_SLOTS - 1)
    if slot.size <= 0 or slot.size % PAGE_SIZE:
        raise RuleError(f"{prefix}size", f"must be a positive multiple of {PAGE_SIZE} bytes (got "
                                         f"{_shown(slot.size)})")
    if slot.gpa < 0 or slot.gpa % PAGE_SIZE:
        raise RuleError(f"{prefix}gpa", f"must be 0 or a positive multiple of {PAGE_SIZE} (got {_shown(slot.gpa)})")
    for part, value in (("gpa", slot.gpa), ("size", slot.size)):
        if value > top:
            raise RuleError(f"{prefix}{part}", f"{_shown(value)} is above {top:#x}")
    start, end = slot.gpa, slot.gpa + slot.size
    if end > top:
        raise RuleError(f"{prefix}size", f"ends at {end:#x}, above {top:#x}")
    for what, other_start, other_end in taken:
        if start < other_end and other_start < end:
            advice = ": what is more needs a slot of its own, from 4GiB on" if other_start == SYSTEM_AREA[0] else ""
            raise RuleError(whole, f"[{start:#x}, {end:#x}) overlaps {what} [{other_start:#x}, {other_end:#x}){advice}")


def _check_guest(spec: MachineSpec, guests: bool) -> None:
    if spec.program is not None:
        _check_program(spec, spec.program)
    elif guests:
        _check_path("guest.image", spec.image)
    elif spec.image:
        raise RuleError("guest.image", f"{spec.accel} runs no guest")
    if spec.load_address is not None:
        _number("guest.address", spec.load_address, 0, GPA_MAX - 1)
    if len(spec.params) > boot.PARAMS_MAX:
        raise RuleError("guest.params", f"must have at most {boot.PARAMS_MAX} values (got {len(spec.params)})")
    for value in spec.params:
        _number("guest.params", value, 0, (1 << 64) - 1)
    length = len(spec.cmdline.encode(errors="replace"))
    if length > boot.CMDLINE_MAX or not spec.cmdline.isprintable():
        raise RuleError("cmdline", f"must be at most {boot.CMDLINE_MAX} bytes of printable text")


def _check_program(spec: MachineSpec, program: ProgramSpec) -> None:
    if spec.can.programs:
        raise RuleError("accel", f"{spec.accel} {spec.can.programs}")
    if spec.image or spec.load_address is not None or spec.params or spec.privilege != "user":
        raise RuleError("guest.program", "is instead of an image, with its address, parameters and privilege")
    if spec.vcpus < 2:
        raise RuleError("guest.threads", "must be at least 1")
    if len(spec.slots) != 1:
        raise RuleError("memory", "must be one slot for a program")
    if not program.args:
        raise RuleError("guest.program", "has no name")
    for key, paths in (("guest.root", [program.root] if program.root else []),
                       ("guest.files", [*program.files, *program.files.values()]),
                       ("guest.directory", [program.directory])):
        for path in paths:
            _check_path(key, path)
    for key, texts in (("guest.program", [program.path]), ("guest.args", program.args), ("guest.env", program.env)):
        for text in texts:
            if "\0" in text:
                raise RuleError(key, "has a NUL character")
    for text in program.env:
        if "=" not in text[1:]:
            raise RuleError("guest.env", f"{text[:40]!a} is not NAME=value")
    if program.seed is not None:
        _number("guest.seed", program.seed, 0, (1 << 63) - 1)
    _one_of("guest.console", program.console, CONSOLES)
    if len(program.forward) > FORWARDS_MAX:
        raise RuleError("guest.forward", f"must be at most {FORWARDS_MAX} ports (got {len(program.forward)})")
    for text in program.forward:
        try:
            parse_forward(text)
        except ValueError as exc:
            raise RuleError("guest.forward", str(exc)) from None


def _check_times(spec: MachineSpec) -> None:
    if spec.timeout is not None:
        _seconds("timeout", spec.timeout)
    reaper = spec.reaper
    _one_of("reaper.mode", reaper.mode, ("adaptive", "fixed"))
    for name in ("interval", "min_interval", "max_interval"):
        _seconds(f"reaper.{name}", getattr(reaper, name))
    if reaper.min_interval > reaper.max_interval:
        raise RuleError("reaper.min_interval", "must not exceed max_interval")
    _number("reapers", reaper.reapers, 1, REAPERS_MAX)
    if spec.verify is not None:
        _seconds("verify.interval", spec.verify.interval)
        _one_of("verify.inject", spec.verify.inject, _INJECTIONS)


def _check_replay(spec: MachineSpec) -> None:
    replay = spec.replay
    if replay is None:
        raise RuleError("replay", f"is missing, but accel is {spec.accel}")
    if not spec.ring_entries or spec.tracking not in ("", *spec.can.trackings):
        raise RuleError("replay", "needs dirty rings and supports no other tracking mode")
    if bool(replay.phases) == bool(spec.replay_trace):
        raise RuleError("replay", "must have either phases or a trace")
    if spec.replay_trace:
        _check_path("replay.trace", spec.replay_trace)
    if replay.trace_segment:
        raise RuleError("replay.trace", "must not name a shared-memory segment")
    if len(replay.phases) > PHASES_MAX:
        raise RuleError("replay.phases", f"must be at most {PHASES_MAX} phases (got {len(replay.phases)})")
    _number("replay.rate", replay.rate, 0, RATE_MAX, "writes per second")
    _number("replay.seed", replay.seed, 0, (1 << 63) - 1)
    _number("replay.speed", replay.speed, 0, SPEED_MAX)
    _check_phases(replay)


def _check_phases(replay: ReplaySpec) -> None:
    for at, phase in enumerate(replay.phases):
        key = f"replay.phases.{at}"
        _one_of(f"{key}.pattern", phase.pattern, _PATTERNS)
        _number(f"{key}.writes", phase.writes, 0, WRITES_MAX)
        _number(f"{key}.stride", phase.stride, 1, STRIDE_MAX, "pages")
        if not 0 < phase.exponent <= EXPONENT_MAX:
            raise RuleError(f"{key}.exponent", f"must be above 0 and at most {EXPONENT_MAX:g} (got "
                                               f"{phase.exponent:g})")
        if not phase.writes and at < len(replay.phases) - 1:
            raise RuleError(key, "needs 'writes': only the last phase may run indefinitely")


def _typed(spec: MachineSpec) -> MachineSpec:
    """As its decoder has it. One that a program made may hold anything."""
    try:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=MachineSpec)
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise RuleError("machine", str(exc).replace("\n", " ")) from None


def _number(key: str, value: float, low: float, high: float, unit: str = "") -> None:
    if not low <= value <= high:        # so that it is false for NaN, too
        bounds = f"from {_shown(low)} to {_shown(high)}"
        raise RuleError(key, f"must be {bounds}{' ' + unit if unit else ''} (got {_shown(value)})")


def _seconds(key: str, value: float) -> None:
    if not 0 < value < SECONDS_MAX:
        raise RuleError(key, f"must be above 0 and below {SECONDS_MAX:g} seconds (got {_shown(value)})")


def _shown(value: float) -> str:
    """In a few characters, whatever it is: no number is too large to be said that it is too large."""
    if isinstance(value, int) and value.bit_length() <= 64:
        return str(value)
    if isinstance(value, int):
        return f"{'-' if value < 0 else ''}2**{value.bit_length() - 1} or more"
    return f"{value:g}"


def _one_of(key: str, value: str, words: Sequence[str]) -> None:
    if value not in words:
        raise RuleError(key, f"{value[:40]!a} is not one of {', '.join(w for w in words if w)}")


def _check_path(key: str, path: str) -> None:
    if not os.path.isabs(path) or "\0" in path or len(os.fsencode(path)) > _PATH_MAX:
        raise RuleError(key, f"{path[:100]!a} is not an absolute path")
