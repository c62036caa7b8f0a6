"""Memory slots at run time: plugged in, pulled out, their logging switched."""

from __future__ import annotations

from ipc.layout import MAX_SLOTS
from ipc.messages import RemoveMemslot, SetMemslot

from .. import boot
from ..errors import VmmError
from ..ram import MemorySlot
from ..spec import RamSlot
from .core import Core

__all__ = ["add_slot", "remove_slot", "set_logging"]


def set_logging(core: Core, slot_id: int, on: bool) -> None:
    """Switch dirty logging of one slot. Switching it off reaps first: what was written while it was on is in the
    log. Raises VmmError."""
    core.require_not_ended()
    core.require_whole_memory()
    slot = _slot(core, slot_id)
    if slot.logged == on:
        return
    with core.shards.all_paused():
        core.reaper.drain()
        slot.logged = on
        core.shards.request(core.live, lambda seq, s: SetMemslot(seq, slot.worker_spec(s.index)))
        if on and core.verifier is not None:
            core.verifier.forget(slot_id)
            core.verifier.adopt(slot_id)
        core.save()


def add_slot(core: Core, spec: RamSlot) -> None:
    """Raises VmmError and SegmentError."""
    core.require_not_ended()
    core.require_whole_memory()
    _check_new_slot(core, spec)
    slot = core.parts.new_slot(spec, create=True)
    try:
        with core.shards.all_paused():
            core.shards.request(core.live, lambda seq, s: SetMemslot(seq, slot.worker_spec(s.index)))
            core.parts.log.add_slot(slot)
            if core.verifier is not None:
                core.verifier.adopt(spec.id)
            core.save()
    except BaseException:
        if spec.id not in core.parts.log.slots:
            slot.close()
        raise


def remove_slot(core: Core, slot_id: int) -> None:
    """Invariant 6: stop the vCPUs, reap, sync the bitmap, remove in every shard, resume. Nothing can be dirtied
    between the last reap and the removal. Raises VmmError."""
    core.require_not_ended()
    core.require_whole_memory()
    _slot(core, slot_id)
    log = core.parts.log
    if len(log.slots) == 1:
        raise VmmError(f"slot {slot_id} is the machine's only memory")
    with core.shards.all_paused():
        if core.verifier is not None:
            core.drain_and_verify()
            core.verifier.forget(slot_id)
        core.reaper.drain()
        slot = log.remove_slot(slot_id)
        core.shards.request(core.live, lambda seq, s: RemoveMemslot(seq, slot_id))
        slot.close()
        core.save()


def _slot(core: Core, slot_id: int) -> MemorySlot:
    slots = core.parts.log.slots
    if slot_id not in slots:
        there = ", ".join(str(i) for i in slots)
        raise VmmError(f"there is no memory slot {slot_id} (there are: {there})")
    return slots[slot_id]


def _check_new_slot(core: Core, spec: RamSlot) -> None:
    where = f"slot {spec.id}"
    slots = core.parts.log.slots
    if not 0 <= spec.id < MAX_SLOTS:
        raise VmmError(f"{where}: slot ids are 0 to {MAX_SLOTS - 1}")
    if spec.id in slots:
        raise VmmError(f"{where}: there is one already")
    if spec.size <= 0 or spec.size % 4096 or spec.gpa % 4096 or spec.gpa < 0:
        raise VmmError(f"{where}: gpa {spec.gpa:#x} and size {spec.size:#x} must be multiples of 4096")
    taken = [(f"slot {i}", s.spec.gpa, s.spec.size) for i, s in slots.items()]
    if core.spec.accel != "replay":
        top = boot.mapped_top(max(s.gpa + s.size for s in core.spec.slots))
        if spec.gpa + spec.size > top:
            raise VmmError(f"{where}: ends at {spec.gpa + spec.size:#x}, the machine maps up to {top:#x}")
        taken.append(("the system area", boot.SYSTEM_GPA, max(core.parts.system.size, 0x100_0000)))
    for what, gpa, size in taken:
        if spec.gpa < gpa + size and gpa < spec.gpa + spec.size:
            raise VmmError(f"{where}: [{spec.gpa:#x}, {spec.gpa + spec.size:#x}) overlaps {what} "
                           f"[{gpa:#x}, {gpa + size:#x})")
