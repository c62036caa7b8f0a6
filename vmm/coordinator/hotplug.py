"""Memory slots at run time: plugged in, pulled out, their logging switched."""

from __future__ import annotations

from ipc.messages import RemoveMemslot, SetMemslot

from .. import boot
from ..errors import VmmError
from ..ram import MemorySlot
from ..rules import check_new_slot
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
            core.verifier.adopt(slot_id, dirty=True)
        core.save()


def add_slot(core: Core, spec: RamSlot) -> None:
    """Raises VmmError and SegmentError."""
    core.require_not_ended()
    core.require_whole_memory()
    check_new_slot(spec, [s.spec for s in core.parts.log.slots.values()], replay=core.spec.accel == "replay",
                   top=boot.mapped_top(max(s.gpa + s.size for s in core.spec.slots)))
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


def remove_slot(core: Core, slot_id: int, *, force: bool) -> None:
    """Invariant 6: stop the vCPUs, reap, sync the bitmap, remove in every shard, resume. Nothing can be dirtied
    between the last reap and the removal. ``force``: also one that the guest cannot run without. Raises
    VmmError."""
    core.require_not_ended()
    core.require_whole_memory()
    if not force and _holds_guest(core, _slot(core, slot_id)):
        raise VmmError(f"slot {slot_id} holds the guest's image or stacks, which it cannot run without (--force "
                       "removes it all the same)")
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


def _holds_guest(core: Core, slot: MemorySlot) -> bool:
    """Image or stacks: pages that were not the guest's to use when the machine was made."""
    made = {(s.id, s.born) for s in core.spec.slots}
    usable = core.parts.usable.get(slot.spec.id, (0, slot.pages))
    return (slot.spec.id, slot.spec.born) in made and usable != (0, slot.pages)


def _slot(core: Core, slot_id: int) -> MemorySlot:
    slots = core.parts.log.slots
    if slot_id not in slots:
        there = ", ".join(str(i) for i in slots)
        raise VmmError(f"there is no memory slot {slot_id} (there are: {there})")
    return slots[slot_id]
