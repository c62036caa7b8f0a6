"""What a target takes: a machine as it is offered, and what may have changed of it by the time its state comes."""

from __future__ import annotations

import re

import msgspec

from ipc.layout import MAX_SLOTS, MAX_VCPUS

from .. import boot
from ..names import check_machine_name
from ..spec import REAPERS_MAX, MachineSpec
from ..tracking import CHOICES
from .pages import PAGE
from .wire import Offer, WireError

__all__ = ["check_offer", "check_settings"]

_TOKEN = re.compile(r"[0-9a-f]{32}")


def check_offer(offer: Offer) -> None:
    """Raises VmmError."""
    if not _TOKEN.fullmatch(offer.token):
        raise WireError("the source offers a machine without a token")
    check_machine_name(offer.spec.name)
    _check_spec(offer.spec)


def check_settings(spec: MachineSpec, offered: MachineSpec) -> None:
    """``spec`` differs from what was offered in nothing but what a user may set at run time: tracking, logging of
    slots, dirty limits. Raises WireError."""
    _check_spec(spec)
    before = {(s.id, s.gpa, s.size, s.born) for s in offered.slots}
    if {(s.id, s.gpa, s.size, s.born) for s in spec.slots} != before or len(spec.slots) != len(offered.slots):
        raise WireError("the source's memory slots are not those that it offered")
    same = msgspec.structs.replace(spec, slots=offered.slots, tracking=offered.tracking,
                                   dirty_quotas=offered.dirty_quotas)
    if same != offered:
        raise WireError("the source's machine is not the one that it offered")


def _check_spec(spec: MachineSpec) -> None:
    """A specification that came over the wire: what a configuration file is held to. Raises VmmError."""
    def need(good: bool, what: str) -> None:
        if not good:
            raise WireError(f"the source offers {what}")

    entries = spec.ring_entries
    need(1 <= spec.vcpus <= MAX_VCPUS, f"{spec.vcpus} vCPUs")
    need(entries == 0 or (entries & entries - 1 == 0 and 1024 <= entries <= 65536), f"rings of {entries} entries")
    need(spec.tracking in ("", *CHOICES) and (entries > 0 or spec.tracking != "ring"),
         f"tracking '{spec.tracking}' with rings of {entries} entries")
    need(spec.privilege in ("user", "kernel"), f"privilege '{spec.privilege}'")
    need(1024 <= spec.stack_size <= 1 << 30 and spec.stack_size % 16 == 0, f"stacks of {spec.stack_size} bytes")
    need(len(spec.params) <= boot.PARAMS_MAX and all(0 <= p < 1 << 64 for p in spec.params), "parameters")
    need(len(spec.cmdline.encode()) <= boot.CMDLINE_MAX, "a command line that is too long")
    need(spec.reaper.mode in ("adaptive", "fixed"), f"reaper '{spec.reaper.mode}'")
    need(1 <= spec.reaper.reapers <= REAPERS_MAX, f"{spec.reaper.reapers} reapers")
    need(0 < spec.reaper.min_interval <= spec.reaper.max_interval and spec.reaper.interval > 0, "reaper intervals")
    need(len(spec.quotas) == spec.vcpus, f"dirty limits of {len(spec.quotas)} vCPUs")
    need(all(0 <= quota < 1 << 40 for quota in (spec.dirty_quota, *spec.quotas)), "a dirty limit out of bounds")
    need(0 < len(spec.slots) <= MAX_SLOTS, f"{len(spec.slots)} memory slots")
    need(len({s.id for s in spec.slots}) == len(spec.slots), "two slots of one id")
    taken = [(boot.SYSTEM_GPA, boot.SYSTEM_GPA + 0x100_0000)]
    for slot in spec.slots:
        start, end = slot.gpa, slot.gpa + slot.size
        need(0 <= slot.id < MAX_SLOTS and slot.size > 0 and not slot.size % PAGE and start >= 0 and not start % PAGE
             and end <= boot.TOP_GPA_MAX, f"slot {slot.id} at {start:#x} of {slot.size} bytes")
        need(all(end <= s or e <= start for s, e in taken), f"slot {slot.id}, which overlaps another")
        taken.append((start, end))


