"""What a target takes: a machine as it is offered, and what may have changed of it by the time its state comes."""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

from ipc.userfault import Userfault, UserfaultError
from workers.accel.base import AccelError

from ...errors import VmmError
from ...machine.rules import NO_TREES, Trees, arriving, check_machine
from ...machine.spec import MachineSpec
from ...optional import lz4_block
from .wire import Offer, WireError

__all__ = ["ANY", "Limits", "check_settings", "encodings", "no_postcopy", "taken"]

_MIB = 1 << 20
_TOKEN = re.compile(r"[0-9a-f]{32}")
_SEGMENT = re.compile(r"/shardvmm\.[^/]+\.ram[0-9]+\.[0-9a-f]+")


class Limits(NamedTuple):
    """The largest machine that is taken; 0: any."""

    memory: int = 0     # bytes
    vcpus: int = 0

    def exceeded(self, spec: MachineSpec) -> list[str]:
        """Why it is not."""
        memory = sum(slot.size for slot in spec.slots)
        found = []
        if self.memory and memory > self.memory:
            found.append(f"it has {memory / _MIB:,.2f} MiB of memory, and at most {self.memory / _MIB:,.2f} MiB are "
                         "taken at the target")
        if self.vcpus and spec.vcpus > self.vcpus:
            found.append(f"it has {spec.vcpus} vCPUs, and at most {self.vcpus} are taken at the target")
        return found


ANY = Limits()


def taken(offer: Offer, *, name: str, accel: str, image: str, linger: bool, trees: Trees = NO_TREES) -> MachineSpec:
    """The offered machine as it is to be here. Raises WireError for one that cannot be."""
    if not _TOKEN.fullmatch(offer.token):
        raise WireError("the source offered a machine without a valid token")
    try:
        if not offer.spec.can.guests:
            raise WireError("the source offered a machine that has no memory")
        if offer.segments and set(offer.segments) != {slot.id for slot in offer.spec.slots}:
            raise WireError("the source offered segments of other slots than the machine has")
        if not all(_SEGMENT.fullmatch(name) for name in offer.segments.values()):
            raise WireError("the source offered segments that are not a machine's")
        shown = sorted({*offer.spec.shown, *offer.needs.features})
        here = arriving(msgspec.structs.replace(offer.spec, shown=shown), name=name, accel=accel, image=image,
                        linger=linger, trees=trees, incoming=True)
        return msgspec.structs.replace(here, links=offer.segments)
    except (VmmError, AccelError) as exc:
        raise WireError(f"the source offered an invalid machine: {exc}") from None


def no_postcopy() -> str:
    """Why there can be no post-copy here; empty: there can."""
    try:
        Userfault.make().close()
    except UserfaultError as exc:
        return str(exc)
    return ""


def encodings() -> list[str]:
    """Those of pages that can be read here."""
    try:
        lz4_block()
    except VmmError:
        return ["none", "zstd"]
    return ["none", "zstd", "lz4"]


def check_settings(spec: MachineSpec, offered: MachineSpec) -> None:
    """``spec`` differs from what was offered in nothing but what a user may set at run time: tracking, logging of
    slots, dirty limits. Raises WireError."""
    before = {(s.id, s.gpa, s.size, s.born) for s in offered.slots}
    if {(s.id, s.gpa, s.size, s.born) for s in spec.slots} != before or len(spec.slots) != len(offered.slots):
        raise WireError("the source's memory slots differ from those that it offered")
    same = msgspec.structs.replace(spec, slots=offered.slots, tracking=offered.tracking,
                                   dirty_quotas=offered.dirty_quotas)
    if same != offered:
        raise WireError("the source's machine differs from the one that it offered")
    try:
        check_machine(spec)
    except VmmError as exc:
        raise WireError(f"the source sent invalid settings: {exc}") from None
