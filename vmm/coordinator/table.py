"""Every verb of the control socket (vmm/machine/verbs.py), and what it calls."""

from __future__ import annotations

from typing import Any

import msgspec

from ipc.linux.processid import ProcessId

from ..errors import VmmError, one_line
from ..machine import verbs
from ..machine.spec import RamSlot
from . import hotplug, programs, vcpu_states
from .families import Families
from .leases import Change, Lease
from .life import ON_REQUEST
from .limits import Limit, with_limits
from .owners import Hold, unseen
from .server import Handler
from .status import machine_slots
from .writes import HostWrite

__all__ = ["handlers"]


def handlers(machine: Families) -> dict[type[verbs.Verb], Handler]:
    """What is called with each verb; it gives the answer's result, or raises."""
    core, life, pauses, leases = machine.core, machine.life, machine.pauses, machine.leases

    def allowed(change: Change, then: Handler) -> Handler:
        """Unless a lease keeps it out."""
        def handler(verb: Any) -> dict[str, Any] | None:
            leases.require(change, verb.lease)
            return then(verb)
        return handler

    def once(then: Handler) -> Handler:
        """Of a verb that must not be carried out twice when a client asks again (it did not get the answer)."""
        def handler(verb: verbs.Verb) -> dict[str, Any] | None:
            if verb.request and verb.request in core.requests:
                return None
            core.request = verb.request
            return then(verb)
        return handler

    return {
        verbs.Start: allowed(Change.START, lambda v: life.start(", ".join(pauses.holders))),
        verbs.Status: lambda v: life.final if life.final is not None else core.report(),
        verbs.Stop: lambda v: life.stop_or_go(_stopped_by(machine, v)),
        verbs.Release: lambda v: life.go(),
        verbs.State: lambda v: _state(machine),
        verbs.SetState: allowed(Change.STATE, lambda v: vcpu_states.set_states(core, v.vcpus)),
        verbs.Incoming: allowed(Change.STATE, lambda v: {
            "addresses": machine.incoming.expect(v.socket, _owner(machine, v))}),
        verbs.Arrived: allowed(Change.STATE, lambda v: machine.incoming.arrived()),
        verbs.Pause: lambda v: pauses.pause(Hold(v.token, v.why, _owner(machine, v)) if v.token else None),
        verbs.Resume: lambda v: {"held_by": pauses.resume(force=v.force, held=leases.at_hand_over)},
        verbs.TakeLease: lambda v: leases.take(
            Lease(v.token, v.why, _owner(machine, v), v.kind), recover=v.recover),
        verbs.Freeze: lambda v: _freeze(machine, v.token),
        verbs.Thaw: lambda v: leases.thaw(v.token),
        verbs.HandOver: lambda v: leases.hand_over(v.token, v.to),
        verbs.TakeBack: lambda v: leases.take_back(v.token),
        verbs.GiveBack: lambda v: _give_back(machine, v.token),
        verbs.Register: allowed(Change.REGISTER, lambda v: machine.clients.register(
            v.client, _owner(machine, v) if v.owner_start else None, v.like)),
        verbs.Unregister: lambda v: machine.clients.unregister(v.client, core.asker),
        verbs.MarkFor: lambda v: machine.clients.mark(v.client, v.slot, v.word, v.bits, core.asker),
        verbs.Sync: lambda v: machine.clients.sync(v.client, v.again, core.asker),
        verbs.Slots: lambda v: machine_slots(core),
        verbs.Mark: lambda v: _mark(machine, v),
        verbs.DirtyLimit: lambda v: machine.limits.set(
            v.pages_per_s, v.vcpu, Limit(v.token, v.why, _owner(machine, v)) if v.token else None),
        verbs.SetTracking: lambda v: _set_tracking(machine, v.tracking),
        verbs.LogStart: lambda v: hotplug.set_logging(core, v.slot, True),
        verbs.LogStop: allowed(Change.UNLOG, lambda v: hotplug.set_logging(core, v.slot, False)),
        verbs.RecordStart: once(lambda v: machine.recording.start(_owner(machine, v))),
        verbs.RecordStep: lambda v: {"going_on": machine.recording.step(pauses.running, core.asker)},
        verbs.RecordStop: once(lambda v: machine.recording.stop(core.asker)),
        verbs.ProgramMaps: lambda v: _maps(machine, v.client),
        verbs.ProgramTrace: lambda v: programs.trace(core, v.tracer, v.on, v.after),
        verbs.MemoryAdd: once(allowed(Change.SLOTS, lambda v: hotplug.add_slot(
            core, RamSlot(v.slot, v.gpa, v.size, v.log, born=core.new_generation())))),
        verbs.MemoryRemove: once(allowed(Change.SLOTS, lambda v: hotplug.remove_slot(
            core, v.slot, force=v.force))),
    }


# --- verbs that concern several families ----------------------------------------------------------


def _owner(machine: Families, verb: verbs.Owned) -> ProcessId:
    """Who sent it: the pid is seen, the start time told; they must fit together (vmm/coordinator/owners.py).
    Raises VmmError."""
    process = ProcessId(machine.core.asker, verb.owner_start)
    if not (process.pid and process.start > 0):
        raise unseen(process)
    return process


def _stopped_by(machine: Families, verb: verbs.Stop) -> str:
    """The cause that the machine's report will have. A migration stops the machine that it has handed over once it
    runs at the target."""
    handed_over = machine.pauses.handed_over
    if verb.why:
        return f"stopped: {one_line(verb.why)}"
    if handed_over is None:
        return ON_REQUEST
    if machine.leases.has_migration(verb.lease):
        return f"migrated to {handed_over.to}"
    return f"{ON_REQUEST}, after it was handed over to {handed_over.to}"


def _give_back(machine: Families, token: str) -> None:
    """Whatever it is that this token holds; nothing, if it was given back before."""
    if not machine.leases.end(token) and not machine.limits.give_back(token):
        machine.pauses.give_back(token)


def _freeze(machine: Families, token: str) -> dict[str, Any]:
    machine.leases.freeze(token)
    return {"writing": [write.who for write in machine.writes.held]}


def _mark(machine: Families, verb: verbs.Mark) -> None:
    if verb.when == "after":        # one that began before a freeze is over before what is dirty is looked at
        return machine.writes.end(verb.token)
    machine.leases.require(Change.HOST_WRITE, verb.lease)
    if verb.when == "made":
        return machine.core.parts.log.mark(verb.slot, verb.first, verb.count, verb.born)
    if verb.born is None:
        raise VmmError("the beginning of a write must name the slot's 'born'")
    machine.writes.begin(HostWrite(verb.token, verb.why, _owner(machine, verb), verb.slot, verb.born, verb.first,
                                   verb.count))


def _maps(machine: Families, client: str) -> dict[str, Any]:
    programs.require_program(machine.core)
    return programs.maps(machine.core, machine.clients.synced(client, machine.core.asker) if client else {})


def _set_tracking(machine: Families, asked: str) -> dict[str, Any]:
    if asked == "none":
        machine.leases.require(Change.UNLOG)
    return machine.tracking.ask(asked, [limit.who for limit in machine.limits.held])


def _state(machine: Families) -> dict[str, Any]:
    spec = with_limits(msgspec.structs.replace(machine.core.spec, tracking=machine.tracking.asked),
                       machine.limits.user)
    return {**vcpu_states.take_states(machine.core, spec, paused=machine.pauses.paused),
            "paused": machine.pauses.user}
