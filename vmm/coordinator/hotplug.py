"""Memory slots at run time: plugged in, pulled out, their logging switched.

Each verb changes the journal once (vmm/coordinator/journal.py says in which order): whoever takes over before that
finds the machine as it was, and the client's second try does the work; whoever takes over after it makes the
workers follow, and drops the segments that nothing uses. The vCPUs stand still from before the first worker is told
until after the last, also when the coordinator is replaced in between.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from ipc.messages import AnyRequest, RemoveMemslot, SetMemslot, SetMemslots
from ipc.steps import step

from ..errors import VmmError
from ..machine import boot
from ..machine.memory import MemorySlot
from ..machine.rules import check_new_slot
from ..machine.spec import RamSlot
from ..vcpus.handle import VcpuHandle
from .core import Core

__all__ = ["add_slot", "remove_slot", "set_log", "set_logging", "tell_slots"]


def set_logging(core: Core, slot_id: int, on: bool) -> None:
    """Switch dirty logging of one slot. Switching it off reaps first: what was written while it was on is in the
    log. Switching it on marks all of it first: what was written while it was off is not known. Raises VmmError,
    with the logging as it was."""
    core.require_not_ended()
    core.require_whole_memory()
    slot = _slot(core, slot_id)
    if slot.logged == on:
        return
    with core.vcpus.all_paused():
        core.reaper.drain()
        step("log-drained")
        if on:
            core.parts.log.mark_all(slot_id)
        step("log-marked")
        slot.logged = on
        try:
            core.save()
        except VmmError:
            slot.logged = not on
            raise
        step("log-committed")
        try:
            core.vcpus.request(core.live, _telling(core, slot))
        except VmmError:
            slot.logged = not on
            core.save_if_possible()
            _insist(core, _telling(core, slot))
            raise
        step("log-set")


def set_log(core: Core, on: bool) -> None:
    """Have the vCPUs log, all slots that are logged, or none, because nobody needs it (docs/decisions/0020). There
    should be no client when it is switched on: one that is there is told all. Raises VmmError, with the log as it
    was."""
    log = core.parts.log
    if log.on == on:
        return
    with core.vcpus.all_paused():
        core.reaper.drain()
        step("logging-drained")
        if on and log.clients:
            log.mark_logged_slots()
        log.on = on
        try:
            core.save()
        except VmmError:
            log.on = not on
            raise
        step("logging-committed")
        try:
            tell_slots(core)
        except VmmError:
            log.on = not on
            core.save_if_possible()
            _insist(core, _telling_all(core))
            raise
        step("logging-set")
    if core.parts.reaps:
        core.reaper.schedule.plan(time.monotonic(), core.reaper.room())


def tell_slots(core: Core) -> None:
    """Every worker has the slots that the machine has, logged as they are to be. Raises VmmError."""
    core.vcpus.request(core.live, _telling_all(core))


def _telling_all(core: Core) -> Callable[[int, VcpuHandle], AnyRequest]:
    log = core.parts.log
    return lambda seq, s: SetMemslots(seq, [log.slot_spec(slot, s.index) for slot in log.slots.values()])


def add_slot(core: Core, spec: RamSlot) -> None:
    """Raises VmmError and SegmentError, with the machine as it was, in every worker."""
    core.require_not_ended()
    core.require_whole_memory()
    check_new_slot(spec, [s.spec for s in core.parts.log.slots.values()], mapped=core.spec.can.guests,
                   top=boot.mapped_top(max(s.gpa + s.size for s in core.spec.slots)))
    with contextlib.ExitStack() as undo:
        slot = core.parts.new_slot(spec, create=True)
        undo.callback(slot.close)
        step("memory-add-made")
        core.parts.log.add_slot(slot)
        undo.callback(core.parts.log.discard_slot, spec.id)
        step("memory-add-logged")
        if core.verifier is not None:
            core.verifier.adopt(spec.id)
            undo.callback(core.verifier.forget, spec.id)
        with core.vcpus.all_paused(), contextlib.ExitStack() as undo_paused:
            undo_paused.callback(_insist, core, lambda seq, s: RemoveMemslot(seq, spec.id))
            core.vcpus.request(core.live, _telling(core, slot))
            step("memory-add-set")
            core.save(done=True)
            step("memory-add-committed")
            undo_paused.pop_all()
        undo.pop_all()


def remove_slot(core: Core, slot_id: int, *, force: bool) -> None:
    """Invariant 6: stop the vCPUs, reap, sync the bitmap, remove in every worker, resume. Nothing can be dirtied
    between the last reap and the removal. ``force``: also one that the guest cannot run without. Raises VmmError,
    with the slot still there."""
    core.require_not_ended()
    core.require_whole_memory()
    slot = _slot(core, slot_id)
    if not force and _holds_guest(core, slot):
        raise VmmError(f"slot {slot_id} holds the guest's image or stacks, which it cannot run without (--force "
                       "removes it anyway)")
    log = core.parts.log
    if len(log.slots) == 1:
        raise VmmError(f"slot {slot_id} is the machine's only memory slot and cannot be removed")
    with core.vcpus.all_paused():
        core.reaper.drain()
        if core.verifying:
            core.drain_and_verify()
        step("memory-remove-drained")
        if not log.logs(slot) or not core.parts.mode.logged:
            log.mark_all(slot_id)
        log.retire_slot(slot_id)
        step("memory-remove-retired")
        try:
            core.save(done=True)
        except VmmError:
            log.unretire_slot(slot)
            raise
        step("memory-remove-committed")
        _insist(core, lambda seq, s: RemoveMemslot(seq, slot_id))
        step("memory-remove-set")
        if core.verifier is not None:
            core.verifier.forget(slot_id)
        slot.close()


def _telling(core: Core, slot: MemorySlot) -> Callable[[int, VcpuHandle], AnyRequest]:
    return lambda seq, s: SetMemslot(seq, core.parts.log.slot_spec(slot, s.index))


def _insist(core: Core, make: Callable[[int, VcpuHandle], AnyRequest]) -> None:
    """Every worker follows, or goes: one that has other memory than the machine must not keep running."""
    for vcpu in core.live:
        try:
            core.vcpus.request([vcpu], make)
        except VmmError as exc:
            core.vcpus.give_up([vcpu], f"did not apply a change of the machine's memory slots: {exc}")


def _holds_guest(core: Core, slot: MemorySlot) -> bool:
    """Image or stacks: pages that were not the guest's to use when the machine was made."""
    made = {(s.id, s.born) for s in core.spec.slots}
    usable = core.parts.usable.get(slot.spec.id, (0, slot.pages))
    return (slot.spec.id, slot.spec.born) in made and usable != (0, slot.pages)


def _slot(core: Core, slot_id: int) -> MemorySlot:
    slots = core.parts.log.slots
    if slot_id not in slots:
        there = ", ".join(str(i) for i in slots)
        raise VmmError(f"there is no memory slot {slot_id} (existing slots: {there})")
    return slots[slot_id]
