"""Episodes: a machine, and a list of events for it. Drawn from a seed, printed, and read again: the same every time."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec

from workers.accel import registry

from ...errors import VmmError
from ...machine.trackings import check_tracking

__all__ = ["COLD_SLOT", "HOT_SLOT", "Episode", "Event", "Fault", "draw_episode", "possible"]

COLD_SLOT, HOT_SLOT = 1, 5          # memory slots beside the guest's own: always there; plugged and unplugged
KILLS = 5                           # of coordinators in an episode: the sixth within a minute ends a machine
_MODES = ("ring", "bitmap", "uffd", "auto")
_RINGS = (1024, 4096, 65536)


class Fault(msgspec.Struct, frozen=True):
    """``victim``: coordinator, keeper, or vcpu0, …; ``stop_ms``: SIGSTOP, and SIGCONT after so long; 0: SIGKILL.
    ``after_ms``: after the event it goes with has begun."""

    victim: str
    stop_ms: int
    after_ms: float

    def __str__(self) -> str:
        what = f"stop {self.victim} for {self.stop_ms} ms" if self.stop_ms else f"kill {self.victim}"
        return f"{what} after {self.after_ms:g} ms"


class Event(msgspec.Struct, frozen=True):
    """Something that a client does (vmm/lab/faults/run.py has what), and what goes wrong meanwhile."""

    do: str
    arguments: tuple[int | str, ...] = ()
    fault: Fault | None = None

    def __str__(self) -> str:
        text = " ".join(map(str, (self.do, *self.arguments)))
        return f"{text}   | {self.fault}" if self.fault else text


class Episode(msgspec.Struct, frozen=True):
    """A machine, and what happens to it. ``number``: its place in the campaign."""

    seed: int
    number: int
    accel: str
    tracking: str
    vcpus: int
    ring: int
    mib: int
    verify: bool
    events: tuple[Event, ...] = ()

    def __str__(self) -> str:
        return (f"seed {self.seed}, episode {self.number}: {self.accel}, tracking {self.tracking}, {self.vcpus} vCPUs, "
                f"ring {self.ring}, {self.mib} MiB{', verifier on' if self.verify else ''}")

    @property
    def faults(self) -> int:
        return sum(each.fault is not None for each in self.events)


def possible(accels: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """{accelerator with a CPU: modes of dirty tracking} that this host can have; of ``accels``, if any are named.
    Raises VmmError when there is none."""
    unknown = [accel for accel in accels if accel not in registry.names("guest")]
    if unknown:
        raise VmmError(f"unknown accelerator '{unknown[0]}' (choose from {', '.join(registry.names('guest'))})")
    found = {}
    for accel in accels or registry.names("guest"):
        modes = tuple(mode for mode in _MODES if _can(accel, mode))
        if modes:
            found[accel] = modes
    if not found:
        raise VmmError(f"no machine can be run here with accelerator {', '.join(accels) or 'kvm or unicorn'} (see vmm "
                       "doctor)")
    return found


def _can(accel: str, mode: str) -> bool:
    try:
        if registry.available(accel).reason:
            return False
        check_tracking(mode, accel, _RINGS[0])
    except VmmError:
        return False
    return True


def draw_episode(seed: int, number: int, can: dict[str, tuple[str, ...]]) -> Episode:
    """The ``number``-th of the campaign of ``seed``, on a host that can do this."""
    dice = random.Random(f"{seed}/{number}")
    accel = dice.choice(sorted(can))
    vcpus = dice.randint(1, 3)
    return Episode(seed, number, accel, dice.choice(can[accel]), vcpus, dice.choice(_RINGS), dice.choice((2, 4, 16)),
                   dice.random() < 0.5, tuple(_events(dice, vcpus, can[accel])))


def _events(dice: random.Random, vcpus: int, modes: tuple[str, ...]) -> list[Event]:
    """Each can be done where it stands, whatever went wrong before it."""
    events = [Event("start"), Event("check")]
    hot, paused, unlogged, kills, alive = False, False, set[int](), 0, vcpus
    for _ in range(dice.randint(8, 24)):
        do = dice.choice(("look", "look", "check", "run", "write", "plug", "log", "tracking", "snapshot",
                          "client", "pause", "migrate"))
        arguments: tuple[int | str, ...] = ()
        if do == "write":
            arguments = (dice.choice((COLD_SLOT, HOT_SLOT) if hot else (COLD_SLOT,)), dice.randrange(256))
        elif do == "plug":
            do, hot = ("unplug" if hot else "plug"), not hot
            unlogged.discard(HOT_SLOT)
        elif do == "log":
            slot = dice.choice((COLD_SLOT, HOT_SLOT) if hot else (COLD_SLOT,))
            do = "log-start" if slot in unlogged else "log-stop"
            unlogged ^= {slot}
            arguments = (slot,)
        elif do == "tracking":
            arguments = (dice.choice(modes),)
        elif (do == "snapshot" and unlogged) or (do in ("snapshot", "migrate") and alive < vcpus):
            continue        # a snapshot needs a log of all that changes, and both need the state of every vCPU
        elif do == "pause":
            do, paused = ("resume" if paused else "pause"), not paused
        fault = None
        if dice.random() < 0.7:
            victim = dice.choice(("coordinator", "coordinator", "coordinator", "keeper",
                                  *(f"vcpu{i}" for i in range(vcpus))))
            kill = dice.random() < 0.5
            if victim == "coordinator" and kill and kills == KILLS:
                kill = False
            if victim == "keeper" or (victim.startswith("vcpu") and (alive == 1 or dice.random() < 0.8)):
                kill = False            # of a killed keeper the machine is to end; of its last vCPU too
            kills += victim == "coordinator" and kill
            alive -= victim.startswith("vcpu") and kill
            fault = Fault(victim, 0 if kill else dice.choice((1, 5, 20, 100)), round(dice.expovariate(1 / 8), 2))
        events.append(Event(do, arguments, fault))
    return [*events, Event("check"), Event("stop")]
