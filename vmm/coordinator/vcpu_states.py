"""The vCPUs' architectural states: taken from a paused machine, given to one that has not started."""

from __future__ import annotations

from typing import Any

import msgspec

from ipc.messages import Done, GetState, SetState
from workers.state import Saved, StateError, check_states, plain_state

from ..errors import ExitCode, VmmError
from ..machine.spec import MachineSpec
from .core import Core

__all__ = ["set_states", "take_states"]


def take_states(core: Core, spec: MachineSpec, *, paused: bool) -> dict[str, Any]:
    """What a snapshot keeps beside the memory: ``spec``, ``vcpus``. ``spec``: the machine's, with what was set at
    run time; its slots are put in here. Raises VmmError."""
    core.require_state()
    if core.state != "running" or not paused:
        raise VmmError(f"machine '{core.spec.name}' is not paused")
    core.require_whole_memory()
    dead = [str(s.index) for s in core.vcpus.all if not s.alive]
    if dead:
        raise VmmError(f"vCPU {', '.join(dead)}: its worker has ended, and its state is lost", ExitCode.WORKER_DIED)
    replies: dict[int, Done] = {}
    # A program's system comes last: what its threads are about to ask it is in their mailboxes by then.
    for vcpus in ([s for s in core.vcpus.all if not spec.is_system(s.index)],
                  [s for s in core.vcpus.all if spec.is_system(s.index)]):
        replies |= core.vcpus.request(vcpus, lambda seq, s: GetState(seq))
    log = core.parts.log
    spec = msgspec.structs.replace(spec, slots=[slot.now for slot in log.slots.values()])
    gone = [str(s.index) for s in core.vcpus.all if s.index not in replies]
    if gone:
        raise VmmError(f"vCPU {', '.join(gone)}: its worker ended, and its state is lost", ExitCode.WORKER_DIED)
    states = _checked([replies[s.index].data for s in core.vcpus.all], core)
    return {"spec": msgspec.to_builtins(spec),
            "vcpus": [plain_state(state) for state in states]}


def _checked(states: list[Any], core: Core) -> list[Saved]:
    """Raises VmmError."""
    try:
        return check_states(states, len(core.vcpus.all), program=core.spec.program is not None)
    except StateError as exc:
        raise VmmError(str(exc)) from None


def set_states(core: Core, vcpus: list[dict[str, Any]]) -> None:
    """Before the start, with the memory in its place. Raises VmmError."""
    core.require_not_started()
    states = [plain_state(state) for state in _checked(vcpus, core)]
    core.vcpus.request(core.vcpus.all, lambda seq, s: SetState(seq, states[s.index]))
    if core.verifying and core.verifier is not None:
        core.verifier.restart()
