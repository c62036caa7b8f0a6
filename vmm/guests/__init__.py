"""The sample guests: workloads that a configuration names, with their parameters.

Each is one image beside its source; ``python -m vmm.guests.build`` rebuilds them. A parameter's place
in ``Workload.params`` is its place in the boot-information page.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ..errors import VmmError, one_line

__all__ = ["WORKLOADS", "Param", "Workload", "WorkloadError", "get_workload", "resolve_params"]

_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1


class WorkloadError(VmmError):
    """An unknown workload or parameter, or a value out of range; the text is fit for a user. ``param``: which
    parameter it is about."""

    def __init__(self, message: str, param: str = "") -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Param:
    """One whole-number parameter, ``minimum`` <= value <= ``maximum``."""

    name: str
    default: int
    minimum: int
    maximum: int
    help: str


@dataclass(frozen=True, slots=True)
class Workload:
    """A sample guest."""

    name: str
    description: str
    params: tuple[Param, ...]
    #: It ends by itself (unless a 0 asks for no end) with the same RAM every time, whatever the
    #: accelerator and however the vCPUs interleave.
    deterministic: bool = True
    #: Every store changes the page it dirties, so that a dirty page that has not changed is a surplus.
    exact: bool = True

    @property
    def image(self) -> Path:
        """The ELF image."""
        return Path(str(resources.files(__name__) / f"{self.name}.elf"))


_WRITES = Param("writes", 100_000, 0, _U32, "pages to write, per vCPU; 0: indefinitely")
_SEED = Param("seed", 1, 0, _U64, "seed of the random numbers")
_PAGES = Param("pages", 0, 0, _U32, "pages of its share that a vCPU uses; 0: all")
_SPIN = Param("spin", 0, 0, _U32, "pause instructions after each write, to lower the rate")

_ALL = (
    Workload("sequential", "each vCPU walks over its own pages and increments a word in each", (
        Param("passes", 4, 0, _U32, "walks over the share; 0: indefinitely"),
        Param("stride", 1, 1, 1 << 20, "pages from one write to the next"),
        _PAGES, _SPIN,
    )),
    Workload("random", "each vCPU increments words in random pages of its own share",
             (_WRITES, _SEED, _PAGES, _SPIN)),
    Workload("hotspot", "like random, but a few hot pages take most of the writes", (
        _WRITES,
        Param("hot_percent", 10, 0, 100, "share of the pages that is hot (at least one page)"),
        Param("hot_probability", 90, 0, 100, "percent of the writes that go to hot pages"),
        _SEED, _PAGES, _SPIN,
    )),
    Workload("stamp", "each vCPU stamps round, vCPU and a sequence number into random pages of its share",
             (_WRITES, _SEED, _PAGES, _SPIN), deterministic=False),
    Workload("counter", "all vCPUs raise one counter under a lock; the last to finish checks the sum", (
        Param("increments", 100_000, 0, _U32, "increments per vCPU"),
        Param("mode", 0, 0, 3, "0 lock inc; 1 lock cmpxchg spinlock, locked release; 2 xchg spinlock, plain "
                               "release; 3 lock cmpxchg spinlock, plain release"),
    ), exact=False),
    Workload("idle", "sleeps and writes nothing",
             (Param("milliseconds", 1000, 0, _U32, "time until it ends; 0: indefinitely"),)),
    Workload("hello", "each vCPU greets on the console",
             (Param("lines", 1, 0, _U32, "lines per vCPU"),)),
    Workload("pingpong", "the vCPUs take turns, waiting for and waking one another",
             (Param("turns", 1000, 0, (1 << 24) - 1, "turns per vCPU"),)),
)

#: Every sample guest by its name.
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _ALL}


def get_workload(name: str) -> Workload:
    """Raises WorkloadError, which lists the workloads there are."""
    workload = WORKLOADS.get(name)
    if workload is None:
        raise WorkloadError(f"unknown workload '{one_line(str(name), 60)}'{_suggestion(name, WORKLOADS)}; "
                            f"choose from {', '.join(WORKLOADS)}")
    return workload


def resolve_params(workload_name: str, params: Mapping[str, int]) -> list[int]:
    """The values for the boot-information page, defaults filled in. Raises WorkloadError."""
    workload = get_workload(workload_name)
    known = {param.name: param for param in workload.params}
    for name, value in params.items():
        if name not in known:
            raise WorkloadError(f"workload {workload.name} has no parameter '{one_line(str(name), 60)}'"
                                f"{_suggestion(name, known)}; choose from {', '.join(known)}", name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise WorkloadError(f"workload {workload.name}: {name} must be a whole number (got {value!r})", name)
        low, high = known[name].minimum, known[name].maximum
        if not low <= value <= high:
            raise WorkloadError(f"workload {workload.name}: {name} must be from {low} to {high} (got {value})", name)
    return [params.get(param.name, param.default) for param in workload.params]


def _suggestion(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
