"""Whether a target can run a machine, asked before anything of it is sent: all that is in the way, in one list.

The source says what the machine needs beside its specification (``needs``): the CPU features that its guest was shown,
here or where it has come from. Software that has seen one uses it for good, so a processor without it would crash the
guest later, at an instruction that it does not know."""

from __future__ import annotations

import msgspec

from workers.accel import registry
from workers.accel.base import AccelError
from workers.state import STATE_VERSION

from ...client.machine import Machine
from ...errors import VmmError
from ...machine.names import slot_segment
from ...machine.room import check_room
from ...machine.runtime import is_running
from ...machine.spec import MachineSpec, RamSlot
from ...machine.trackings import check_tracking
from .addresses import Address
from .offers import Limits, encodings, no_postcopy
from .report import Options
from .wire import Needs

__all__ = ["check_movable", "in_the_way", "needs", "not_in_place", "notes", "ram_segments", "specification"]

_LISTED = 12        # features that are named; of more, how many they are


def check_movable(machine: Machine) -> None:
    """Raises VmmError when it is not one that can be moved."""
    machine.require_state()
    if (state := machine.status()["state"]) not in ("running", "paused"):
        raise VmmError(f"machine '{machine.name}' cannot be migrated: it is {state}")


def specification(machine: Machine) -> MachineSpec:
    """Of the machine, with its slots as they are; its guest stands still for a moment. Raises VmmError when it is not
    one that can be moved."""
    check_movable(machine)
    with machine.paused("migration"):   # for its specification; the state that comes with it is not used
        return msgspec.convert(machine.state()["spec"], MachineSpec)


def ram_segments(machine: Machine) -> list[str]:
    """Names of its memory, whether that still has them or was taken by another machine. Raises VmmError."""
    return [slot_segment(machine.name, "ram", RamSlot(slot["id"], slot["gpa"], slot["size"], born=slot["born"]))
            for slot in machine.status()["slots"]]


def needs(spec: MachineSpec, options: Options) -> Needs:
    """Of a machine here."""
    shown = {*spec.shown, *registry.features(spec.accel)}
    return Needs(spec.accel, sorted(shown), options.compression,
                 options.postcopy or options.on_timeout == "postcopy", STATE_VERSION)


def not_in_place(address: Address, options: Options) -> str:
    """Why its memory cannot be handed over as it lies there; empty: it can."""
    if not address.local:
        return f"{address.text}: memory is handed over in place on one host: use ipc://PATH"
    if options.postcopy:
        return "memory that is handed over in place is there at once: leave out the post-copy"
    if options.keep_source:
        return "memory that is handed over in place is no longer here: no copy of the machine can be kept"
    return ""


def in_the_way(spec: MachineSpec, wanted: Needs, limits: Limits) -> list[str]:
    """Why this host cannot take the machine with this specification (as it would be here); empty: it can, as far as
    can be told."""
    found = limits.exceeded(spec)
    if is_running(spec.name):
        found.append(f"a machine named '{spec.name}' is already running at the target")
    for look in (lambda: check_room(spec), lambda: check_tracking(spec.asked_tracking, spec.accel, spec.ring_entries)):
        try:
            look()
        except (VmmError, AccelError) as exc:
            found.append(str(exc))
    largest = registry.available(spec.accel).ring_max
    if spec.ring_entries > largest > 0:
        found.append(f"its dirty rings have {spec.ring_entries} entries, and at most {largest} are possible at the "
                     "target")
    here = registry.features(spec.accel)
    if here and (missing := sorted({*wanted.features} - {*here})):
        found.append(f"its guest has seen CPU features that the target does not have: {_listed(missing)}")
    if spec.program is not None and wanted.features and not here:
        found.append(f"its program has begun on accel {wanted.accel}, for a processor that can do more than that of "
                     f"accel {spec.accel}")
    if wanted.compression not in encodings():
        found.append(f"pages compressed with {wanted.compression} cannot be read at the target")
    if wanted.postcopy and (why := no_postcopy()):
        found.append(f"post-copy is not possible at the target: {why}")
    if wanted.state_version != STATE_VERSION:
        found.append(f"its vCPU states are of version {wanted.state_version}, and the target reads {STATE_VERSION}")
    return found


def notes(spec: MachineSpec, wanted: Needs) -> list[str]:
    """What is in nobody's way, and should be known."""
    if wanted.features and not registry.features(spec.accel):
        return [f"accel {spec.accel} does not say which CPU features it has: a guest that uses one of "
                f"{wanted.accel}'s may crash there"]
    return []


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} others" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
