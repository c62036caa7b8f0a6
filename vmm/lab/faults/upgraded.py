"""An upgrade in the campaign: ``vmm upgrade``, a process that a fault can hit.

Never two, never none, and never without its name: when ``upgrade`` returns, the machine goes on in one set of
processes, and nothing is left of the one in between. Only a kill of whoever carries it out may leave it in the old.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from ...client.machine import Machine
from ...errors import VmmError
from ...machine.names import belongings, between_name
from ...machine.runtime import is_running
from .hit import Hit, find_pid
from .plan import Fault
from .process import Process, until

__all__ = ["upgrade"]


def upgrade(machine: Machine, folder: Path, fault: Fault | None) -> bool:
    """Whether the fault has hit. Raises VmmError for what must not be."""
    name = machine.name
    keeper = belongings(name).owner_pid()
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(Process(folder / "upgrade", "upgrade", name))
        if fault is None:
            process.wait()
            hit = False
        else:
            with Hit(fault, lambda: _victim(fault.victim, machine, process), late=False) as hits:
                process.wait()
            hit = hits.done
        status, said = process.wait(), process.said
    killed = fault is not None and hit and fault.kills and fault.victim == "source"
    if status and not killed:
        raise VmmError(f"vmm upgrade has ended with {status}: {said}")
    until(lambda: _settled(name), f"the machine goes on under its name, after: {said}")
    if not killed and belongings(name).owner_pid() == keeper:
        raise VmmError(f"the machine has its old processes after: {said}")
    machine.goes_on()
    return hit


def _victim(victim: str, machine: Machine, process: Process) -> int | None:
    """Its pid, if there is one now. ``target-``: of the machine in between."""
    if victim == "source":
        return process.pid
    name = between_name(machine.name) if victim.startswith("target-") else machine.name
    return find_pid(name, victim.removeprefix("target-"))


def _settled(name: str) -> bool:
    """It has its name, and nobody is at work to give it other processes."""
    between = between_name(name)
    if is_running(between) or belongings(between).left() or not is_running(name):
        return False
    try:
        with Machine.attach_pinned(name) as machine:
            status = machine.status()
    except VmmError:
        return False        # one is going, or has just come
    return (status["state"] in ("running", "paused") and not status["handed_over"] and
            not any(each["what"] == "lease" for each in status["holders"]))
