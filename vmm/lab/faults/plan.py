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
_LIMITS = (100, 2000, 100_000)      # pages per second


class Fault(msgspec.Struct, frozen=True):
    """``victim``: coordinator, keeper, or vcpu0, …, of the machine; while it migrates also source and target (the two
    processes that move it), target-coordinator, target-keeper, target-vcpu0, …, and messages (between the two); while
    it is upgraded source (the process that does it) and the target's, which are those of the machine in between.
    ``stop_ms``: SIGSTOP, and SIGCONT after so long; ``delay_ms``: each message comes later by up to so much; neither:
    SIGKILL. ``after_ms``: after the event it goes with has begun, of a migration: after the victim is there, and the
    target has begun to make the machine."""

    victim: str
    stop_ms: int
    after_ms: float
    delay_ms: int = 0

    def __str__(self) -> str:
        if self.delay_ms:
            return f"delay {self.victim} by up to {self.delay_ms} ms"
        what = f"stop {self.victim} for {self.stop_ms} ms" if self.stop_ms else f"kill {self.victim}"
        return f"{what} after {self.after_ms:g} ms"

    @property
    def kind(self) -> str:
        """What is done to whom, to count it by."""
        what = "delay" if self.delay_ms else "stop" if self.stop_ms else "kill"
        return f"{what} {self.victim.rstrip('0123456789')}"

    @property
    def kills(self) -> bool:
        return not self.stop_ms and not self.delay_ms


class Event(msgspec.Struct, frozen=True):
    """Something that a client does (vmm/lab/faults/run.py has what), and what goes wrong meanwhile."""

    do: str
    arguments: tuple[int | str, ...] = ()
    fault: Fault | None = None

    def __str__(self) -> str:
        text = " ".join(map(str, (self.do, *self.arguments)))
        return f"{text}   | {self.fault}" if self.fault else text

    @property
    def kind(self) -> str:
        """What it is, to count it by."""
        return f"{self.do} {self.arguments[0]}" if self.do == "migrate" else self.do


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


def draw_episode(seed: int, number: int, can: dict[str, tuple[str, ...]], *, postcopy: bool) -> Episode:
    """The ``number``-th of the campaign of ``seed``, on a host that can do this."""
    dice = random.Random(f"{seed}/{number}")
    accel = dice.choice(sorted(can))
    vcpus = dice.randint(1, 3)
    tracking = dice.choice(can[accel])
    ring, mib, verify = dice.choice(_RINGS), dice.choice((2, 4, 16)), dice.random() < 0.5
    events = _Events(dice, can, accel, tracking, vcpus, postcopy=postcopy).draw()
    return Episode(seed, number, accel, tracking, vcpus, ring, mib, verify, tuple(events))


class _Events:
    """Each can be done where it stands, whatever went wrong before it."""

    def __init__(self, dice: random.Random, can: dict[str, tuple[str, ...]], accel: str, tracking: str, vcpus: int, *,
                 postcopy: bool) -> None:
        self._dice = dice
        self._can = can
        self._postcopy = postcopy
        self._accel = accel
        self._vcpus = vcpus
        self._mode = tracking       # "": not known, a vCPU was killed while it was switched
        self._limited = False       # or may be
        self._hot = self._paused = False
        self._unlogged: set[int] = set()
        self._kills = 0
        self._alive = vcpus         # at least

    def draw(self) -> list[Event]:
        dice = self._dice
        events = [Event("start"), Event("check")]
        for _ in range(dice.randint(8, 24)):
            event = self._event(dice.choice((
                "look", "look", "check", "run", "write", "plug", "log", "tracking", "snapshot", "client", "nobody",
                "pause", "migrate", "migrate", "upgrade", "limit", "record")))
            if event is not None:
                events.append(event)
        return [*events, Event("check"), Event("stop")]

    def _event(self, do: str) -> Event | None:
        """None: not now."""
        dice = self._dice
        slots = (COLD_SLOT, HOT_SLOT) if self._hot else (COLD_SLOT,)
        arguments: tuple[int | str, ...] = ()
        match do:
            case "write":
                arguments = (dice.choice(slots), dice.randrange(256))
            case "plug":
                do, self._hot = ("unplug" if self._hot else "plug"), not self._hot
                self._unlogged.discard(HOT_SLOT)
            case "log":
                slot = dice.choice(slots)
                do = "log-start" if slot in self._unlogged else "log-stop"
                self._unlogged ^= {slot}
                arguments = (slot,)
            case "tracking":        # a limit needs rings
                arguments = (dice.choice([mode for mode in self._can[self._accel]
                                          if mode in ("ring", "auto") or not self._limited]),)
            case "limit":
                if not self._limited and not self._rings:
                    return None
                arguments = (0 if self._limited else dice.choice(_LIMITS),)
            case "record":
                if not self._rings:
                    return None
            case "snapshot":        # needs a log of all that changes, and the state of every vCPU
                if self._unlogged or self._alive < self._vcpus:
                    return None
            case "pause":
                do, self._paused = ("resume" if self._paused else "pause"), not self._paused
            case "migrate" | "upgrade":
                if self._alive < self._vcpus:
                    return None
                if do == "migrate":
                    arguments = self._way()
        fault = self._fault(do)
        self._note(do, arguments, fault)
        return Event(do, arguments, fault)

    @property
    def _rings(self) -> bool:
        """There are some, or will be where they are needed."""
        return self._mode == "ring" or (self._mode == "auto" and "ring" in self._can[self._accel])

    def _way(self) -> tuple[str, str]:
        """Of a migration: how, and to which accelerator."""
        accels = [accel for accel in sorted(self._can) if accel == self._accel or self._mode in self._can[accel]]
        ways = ("precopy", "in-place", *(["postcopy"] if self._postcopy else []))
        return self._dice.choice(ways), self._dice.choice(accels)

    def _fault(self, do: str) -> Fault | None:
        dice = self._dice
        if dice.random() > (0.9 if do in ("migrate", "upgrade") else 0.7):
            return None
        vcpus = [f"vcpu{i}" for i in range(self._vcpus)]
        victims = ["coordinator", "coordinator", "coordinator", "keeper", *vcpus]
        after = round(dice.expovariate(1 / 8), 2)
        if do == "migrate":
            victims += ["source", "source", "target", "target", "target-coordinator", "target-coordinator",
                        "target-keeper", *(f"target-{vcpu}" for vcpu in vcpus), "messages", "messages"]
            after = round(dice.expovariate(1 / 200), 2)
        elif do == "upgrade":
            victims += ["source", "source", "source", "target-coordinator", *(f"target-{vcpu}" for vcpu in vcpus)]
            after = round(dice.expovariate(1 / 200), 2)
        victim = dice.choice(victims)
        if victim == "messages":
            return Fault(victim, 0, 0.0, dice.choice((1, 5, 20, 100)))
        kill = dice.random() < 0.5
        if victim.endswith("coordinator"):
            kill = kill and self._kills < KILLS
        elif victim == "keeper":
            kill = False            # the machine is to end of it; of its last vCPU too
        elif "vcpu" in victim:
            kill = kill and self._alive > 1 and do != "upgrade" and dice.random() < 0.2
        return Fault(victim, 0 if kill else dice.choice((1, 5, 20, 100)), after)

    def _note(self, do: str, arguments: tuple[int | str, ...], fault: Fault | None) -> None:
        """What is known afterwards."""
        kills = fault is not None and fault.kills
        uncertain = kills and fault is not None and "vcpu" in fault.victim
        self._kills += kills and fault is not None and fault.victim.endswith("coordinator")
        self._alive -= uncertain
        if do == "tracking":
            self._mode = "" if uncertain else str(arguments[0])
        elif do == "limit":
            self._limited = bool(arguments[0]) or uncertain
        elif do == "migrate" and arguments[1] != self._accel:
            both = {accel: self._can[accel] for accel in (self._accel, str(arguments[1]))}
            modes = set.intersection(*(set(each) for each in both.values()))
            # It may not have moved: from here on only what both can do.
            self._can = {accel: tuple(mode for mode in each if mode in modes) for accel, each in both.items()}
