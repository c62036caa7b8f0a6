"""What the coordinator's modules share: the machine's parts, its state, and checks that many verbs begin with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..build import Parts
from ..errors import ExitCode, VmmError, no_memory
from ..reaper import Reaper
from ..shards import Shard, Shards
from ..spec import MachineSpec
from ..trace import Tracer
from ..verify import AnyVerifier
from .owners import Owners

__all__ = ["Core"]


class Core:
    """``state``: starting, ready, running, ended (a pause is vmm/coordinator/pauses.py's). ``tell`` gives an
    event to every client that wants it, ``save`` writes the journal."""

    def __init__(self, spec: MachineSpec, directory: Path, tracer: Tracer) -> None:
        self.spec = spec
        self.directory = directory
        self.tracer = tracer
        self.owners = Owners()
        self.state = "starting"
        self.verifier: AnyVerifier | None = None
        self.parts: Parts
        self.shards: Shards
        self.reaper: Reaper
        self.tell: Callable[[dict[str, Any]], None]
        self.save: Callable[[], None]
        #: Pages of RAM are missing still (post-copy).
        self.pages_missing = False

    def save_if_possible(self) -> None:
        """For what a process gives back, or leaves when it ends: that must not fail because the journal cannot be
        written, and the next entry makes up for it. Should this coordinator die before, its successor finds that
        the process has gone, or at the worst holds for it what it had given back, until it has."""
        try:
            self.save()
        except OSError as exc:
            self.tell({"event": "warning", "text": f"its journal was not written: {exc.strerror}"})

    @property
    def live(self) -> list[Shard]:
        """Those whose process is there."""
        return [s for s in self.shards.all if s.alive]

    @property
    def verifying(self) -> bool:
        """The verifier reads all memory; not before all of it is there. And it looks into the log."""
        return self.verifier is not None and not self.pages_missing and self.parts.tracking != "none"

    def flush(self) -> None:
        if self.state == "running":
            self.reaper.flush()

    def verify_from_here(self) -> None:
        """The memory was replaced: this is what it begins with."""
        assert self.verifier is not None
        for slot_id in self.parts.log.slots:
            self.verifier.forget(slot_id)
            self.verifier.adopt(slot_id)

    def drain_and_verify(self) -> None:
        """With every vCPU paused."""
        assert self.verifier is not None
        self.reaper.drain()
        self.verifier.round()

    # --- checks; each raises VmmError ---------------------------------------------------------

    def require_not_ended(self) -> None:
        if self.state == "ended":
            raise VmmError(f"machine '{self.spec.name}' has ended", ExitCode.NO_MACHINE)

    def require_not_started(self) -> None:
        if self.state != "ready":
            raise VmmError(f"machine '{self.spec.name}' has started already")

    def require_whole_memory(self) -> None:
        if self.pages_missing:
            raise VmmError(f"machine '{self.spec.name}': its memory is still on its way here (post-copy)")

    def require_memory(self) -> None:
        if self.spec.accel == "replay":
            raise VmmError(no_memory(self.spec.name))
