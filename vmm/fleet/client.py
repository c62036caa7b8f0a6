"""The command's end: the fleet of a cluster, and what is asked of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import ExitCode, VmmError
from ..lab.cluster.connection import connect
from .config import Wanted

__all__ = ["FleetClient", "fleet_of"]

_LOOK = 0.5                 # seconds between two looks at what has happened
_PATIENCE = 60.0            # seconds for a fleet to answer again
_HEAD = "node:__internal_head__"    # Ray's own resource of the cluster's head


class _Away(VmmError):
    """It will answer again."""


class FleetClient:
    """Each method raises VmmError; what was begun is carried out when whoever asked for it goes."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor

    def add(self, machines: list[Wanted], *, restored: bool, said: Callable[[str], None]) -> dict[str, list[str]]:
        """Start these, or none; {name: warnings}. ``said`` is told what happens meanwhile."""
        found: dict[str, list[str]] = self._ask("add", machines, restored, said=said)
        return found

    def overview(self, seconds: float = 0.0) -> dict[str, Any]:
        """See Fleet.overview. A fleet whose process was killed is waited for, since another takes its place."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                found: dict[str, Any] = self._ask("overview", seconds)
                return found
            except _Away:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_LOOK)

    def drain(self, node: str, at_most: int, said: Callable[[str], None]) -> list[dict[str, Any]]:
        """See Fleet.drain; ``said`` is told what happens meanwhile."""
        found: list[dict[str, Any]] = self._ask("drain", node, at_most, said=said)
        return found

    def stop(self, names: list[str]) -> list[str]:
        """End these machines (none: all); who they were. With its last machine the fleet itself ends."""
        found: list[str] = self._ask("stop", names)
        self.end_if_empty()
        return found

    def end_if_empty(self) -> None:
        """A fleet without machines ends."""
        if self._ask("end_if_empty"):
            with contextlib.suppress(self._ray.exceptions.RayError):    # it does so itself, somewhat later
                self._ray.kill(self._actor)

    def _ask(self, method: str, *arguments: Any, said: Callable[[str], None] | None = None) -> Any:
        errors, get = self._ray.exceptions, self._ray.get
        try:
            after = get(self._actor.next_event.remote(), timeout=_PATIENCE) if said else 0
            answer = getattr(self._actor, method).remote(*arguments)
            while said is not None:
                done, _ = self._ray.wait([answer], timeout=_LOOK)
                for event in get(self._actor.events.remote(after), timeout=_PATIENCE):
                    said(event.text)
                    after = event.number + 1
                if done:
                    break
            return get(answer)
        except errors.RayTaskError as exc:
            raise exc.cause from None
        except errors.ActorUnavailableError:
            raise _Away("the fleet's process was lost, and another takes its place: vmm fleet list shows what it has "
                        "done", ExitCode.WORKER_DIED) from None
        except errors.RayError as exc:
            raise VmmError(f"the fleet does not answer ({type(exc).__name__})", ExitCode.WORKER_DIED) from None


@contextlib.contextmanager
def fleet_of(address: str, *, made: bool = False) -> Iterator[FleetClient]:
    """Of the cluster at this address (vmm/lab/cluster/connection.py); ``made``: where it has none, one is made, on its
    head. Raises VmmError."""
    if address == "local":
        raise VmmError("--cluster local: it would end with this command; ray start --head starts one that stays")
    from .cluster import FLEET, NAMESPACE
    from .fleet import Fleet

    with connect(address, NAMESPACE) as ray:
        try:
            actor = ray.remote(Fleet).options(
                name=FLEET, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0, max_restarts=-1,
                resources={_HEAD: 0.001}).remote() if made else ray.get_actor(FLEET, namespace=NAMESPACE)
        except ValueError:
            raise VmmError(f"the cluster at {address} has no fleet: vmm fleet FILE starts one",
                           ExitCode.NO_MACHINE) from None
        yield FleetClient(ray, actor)
