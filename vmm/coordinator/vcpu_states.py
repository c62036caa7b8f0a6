"""The vCPUs' architectural states: taken from a paused machine, given to one that has not started."""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from ipc.messages import GetState, SetState

from ..errors import ExitCode, VmmError
from .core import Core

__all__ = ["set_states", "take_states"]


def take_states(core: Core, *, paused: bool, tracking: str) -> dict[str, Any]:
    """What a snapshot keeps beside the memory: ``spec``, ``vcpus``. ``tracking``: what was asked for. Raises
    VmmError."""
    core.require_memory()
    if core.state != "running" or not paused:
        raise VmmError(f"machine '{core.spec.name}' is not paused")
    core.require_whole_memory()
    dead = [str(s.index) for s in core.shards.all if not s.alive]
    if dead:
        raise VmmError(f"vCPU {', '.join(dead)}: its worker is gone, and its state with it", ExitCode.WORKER_DIED)
    replies = core.shards.request(core.shards.all, lambda seq, s: GetState(seq))
    log = core.parts.log
    spec = msgspec.structs.replace(core.spec, slots=[slot.now for slot in log.slots.values()], tracking=tracking)
    vcpus = []
    for shard in core.shards.all:
        state = dict(replies[shard.index].data or {})
        if shard.exited is not None:
            state["exit"] = {"reason": int(shard.exited.reason), "code": shard.exited.code,
                             "detail": shard.exited.detail}
        vcpus.append(state)
    return {"spec": msgspec.to_builtins(spec), "vcpus": vcpus}


def set_states(core: Core, vcpus: list[dict[str, Any]]) -> None:
    """Before the start, with the memory in its place. Raises VmmError."""
    core.require_not_started()
    if len(vcpus) != len(core.shards.all):
        raise VmmError(f"states of {len(vcpus)} vCPUs for a machine of {len(core.shards.all)}")
    try:
        states = [{**v, "xsave": base64.b64decode(v["xsave"], validate=True)} for v in vcpus]
    except (KeyError, TypeError, ValueError) as exc:
        raise VmmError(f"not the state of a vCPU: {exc}") from None
    core.shards.request(core.shards.all, lambda seq, s: SetState(seq, states[s.index]))
    if core.verifying and core.verifier is not None:
        core.verifier.restart()
