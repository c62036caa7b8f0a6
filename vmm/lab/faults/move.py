"""A migration in the campaign: ``vmm receive`` and ``vmm migrate``, each a process that a fault can hit; and what a
person does where the two leave something to a person (docs/protocol.md, "Who runs the machine").

Never two, never none: when ``move`` returns, exactly one side has the machine. Which one it may be:

* without a kill it has moved: neither a stop, nor late messages, nor a coordinator that is replaced are a reason to
  fail;
* whoever else is killed, it has moved, or runs on at the source with nothing left at the target;
* a source that is left handed over, with nobody who finishes it, is for a person. There must have been a kill at the
  target. Where that has the machine, it is ended here; where nothing of it is left, it is resumed here by force.

One end is nobody's fault: a target's keeper that is killed takes its machine along, which has run there already
(``Ended``).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from ...client.machine import Machine
from ...errors import VmmError
from ...machine.names import belongings
from ...machine.runtime import end_at_once, is_running
from .delay import Relay
from .hit import Hit, find_pid
from .plan import Fault
from .process import PATIENCE, Process, until

__all__ = ["Ended", "Move", "end", "move"]


class Ended(Exception):
    """The machine has ended, as it must after what was done to it."""


@dataclass(frozen=True, slots=True)
class Move:
    """What is asked for. ``target``: the machine's name there. ``how``: precopy, postcopy or in-place. ``folder``: for
    sockets and what the processes say."""

    target: str
    accel: str
    how: str
    folder: Path


_OPTIONS = {"precopy": (), "postcopy": ("--postcopy", "--downtime", "1us"), "in-place": ("--in-place",)}


def move(source: Machine, wanted: Move, fault: Fault | None) -> tuple[bool, bool]:
    """Whether it has moved, and whether the fault has hit. Raises Ended, and VmmError for what must not be."""
    path = wanted.folder / wanted.target
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(Process(
            path.with_suffix(".receive"), "receive", f"ipc://{path}", "--name", wanted.target, "--accel", wanted.accel,
            "--detach", "--timeout", f"{PATIENCE:.0f}s"))
        until(lambda: "waiting at" in receiver.said or receiver.over, "vmm receive waits")
        if receiver.over:
            raise VmmError(f"vmm receive has ended: {receiver.said}")
        address = f"ipc://{path}"
        relay = None
        if fault is not None and fault.delay_ms:
            relay = stack.enter_context(Relay(path, fault.delay_ms))
            address = relay.address
        mover = stack.enter_context(Process(
            path.with_suffix(".migrate"), "migrate", source.name, address,
            *_OPTIONS[wanted.how]))
        if fault is None or relay is not None:
            mover.wait()
            hit = relay is not None and relay.held > 0
        else:
            with Hit(fault, lambda: _victim(fault.victim, source, wanted.target, mover, receiver), late=False) as hits:
                mover.wait()
            hit = hits.done
        return _settle(source, wanted, mover, receiver, fault if hit else None), hit


def _victim(victim: str, source: Machine, target: str, mover: Process, receiver: Process) -> int | None:
    """Its pid, once the target has begun to make the machine: before, nothing goes on that a fault could hurt."""
    if belongings(target).owner_pid() is None:
        return None
    match victim:
        case "source":
            return mover.pid
        case "target":
            return receiver.pid
    return find_pid(target if victim.startswith("target-") else source.name, victim.removeprefix("target-"))


def _settle(source: Machine, wanted: Move, mover: Process, receiver: Process, fault: Fault | None) -> bool:
    """The one that migrates has ended: whether the machine has moved. Raises Ended, where a receiver was killed that
    had taken the memory in place."""
    target = wanted.target
    killed = "" if fault is None or fault.stop_ms or fault.delay_ms else fault.victim
    if mover.wait() == 0:       # it has moved, and what is left of it here is about to go
        ends = {"gone"}
    else:
        ends = {"gone", "here"} if killed == "source" else {"gone", "here", "handed over"}
    until(lambda: _state(source) in ends, f"whose the machine is after: {mover.said}")
    match _state(source):
        case "gone":
            if not _has(target):
                if killed == "target-keeper":
                    raise Ended
                raise VmmError(f"the machine has left, and is not at the target, which says: {receiver.said}")
            if killed != "target" and (status := receiver.wait()):
                raise VmmError(f"the machine has moved, but vmm receive has ended with {status}: {receiver.said}")
            return True
        case "handed over":
            if not killed.startswith("target"):
                raise VmmError(f"the migration was left to a person: {mover.said}")
            receiver.end()
            if _has(target):
                source.stop()
                return True
            until(lambda: not belongings(target).left(), "nothing is left at the target")
            try:
                source.resume(force=True)
            except VmmError as exc:
                if wanted.how == "in-place" and "has been taken there" in str(exc):
                    raise Ended from None
                raise
            return False
    if killed in ("", "coordinator", "target-coordinator"):
        raise VmmError(f"the migration failed: {mover.said}; the target says: {receiver.said}")
    receiver.end()      # else it waits for five minutes for a source that was killed at the last moment
    until(lambda: not belongings(target).left(), "nothing is left at the target")
    return False


def _state(source: Machine) -> str:
    """``gone``, ``handed over``, ``leased`` (somebody migrates it) or ``here``."""
    try:
        status = source.status()
    except VmmError:
        if is_running(source.name):
            raise
        return "gone"
    if status["state"] == "ended":
        return "gone"
    if status["handed_over"]:
        return "handed over"
    return "leased" if any(each["what"] == "lease" for each in status["holders"]) else "here"


def _has(target: str) -> bool:
    """It is there, whole, or will not be."""
    found = ""

    def known() -> bool:
        nonlocal found
        try:
            with Machine.attach(target) as machine:
                status = machine.status()
            found = "incoming" if status["incoming"] else status["state"]
        except VmmError:
            found = "" if not is_running(target) else "unknown"
        return found in ("", "ended", "running", "paused")

    until(known, "the target has the machine, or not")
    return found in ("running", "paused")


def end(name: str) -> None:
    """Of a machine that nobody owns any more, whatever state it is in. Raises VmmError."""
    if is_running(name):
        with contextlib.suppress(VmmError):     # it has just ended
            end_at_once(name)
        until(lambda: not belongings(name).left(), f"machine '{name}' has ended")
