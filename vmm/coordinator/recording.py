"""Recording a dirty trace: what is harvested goes into a queue, for the process that asked
(vmm/consumers/trace.py)."""

from __future__ import annotations

from ipc.linux.processid import ProcessId
from ipc.steps import step

from ..dirty.recorder import Recorder
from ..errors import VmmError
from .core import Core
from .owners import Watch, unseen
from .tracking import TrackingSwitch

__all__ = ["Recording"]


class Recording:
    """It ends with the coordinator: a successor removes its segment, and the trace says that it was
    interrupted."""

    def __init__(self, core: Core, tracking: TrackingSwitch) -> None:
        self._core = core
        self._tracking = tracking
        self._owner: Watch | None = None

    @property
    def owner(self) -> ProcessId | None:
        """The process that records; None: none does."""
        return self._owner.process if self._owner is not None else None

    def start(self, owner: ProcessId) -> None:
        """Until ``stop`` or the end of process ``owner``. Raises VmmError and SegmentError."""
        core = self._core
        core.require_not_ended()
        if core.reaper.recorder is not None:
            pid = self._owner.process.pid if self._owner is not None else 0
            raise VmmError(f"machine '{core.spec.name}' is already being recorded (pid {pid})")
        self._tracking.choose(recorded=True)
        if not core.parts.ring_entries:
            how = (f"run vmm tracking {core.spec.name} ring" if core.spec.ring_entries
                   else "launch it with a dirty_ring_size")
            raise VmmError(f"machine '{core.spec.name}' has tracking mode {core.parts.tracking}, which does not "
                           f"record the order in which pages are dirtied: a trace needs dirty rings ({how})")
        core.flush()        # what was dirtied before does not belong to it
        step("record-start")
        core.reaper.recorder = Recorder(core.spec.name, core.parts.log.tables[0])
        step("record-started")
        try:
            self._owner = core.owners.watch(owner, self.close)
        except ProcessLookupError:
            self.close()
            raise unseen(owner) from None
        except VmmError:
            self.close()
            raise
        core.carried_out()

    def step(self, running: bool, asker: int) -> bool:
        """Reap now; False when the machine has ended. ``asker``: pid of who asks, whose recording it must be.
        Raises VmmError."""
        self._require_recording(asker)
        if running:
            self._core.reaper.reap()
        return self._core.state != "ended"

    def stop(self, asker: int) -> None:
        """Flush, and end it. Raises VmmError."""
        self._require_recording(asker)
        self._core.flush()
        step("record-stop")
        self.close()
        self._core.carried_out()
        step("record-stopped")

    def _require_recording(self, asker: int) -> None:
        if self._core.reaper.recorder is None:
            raise VmmError(f"machine '{self._core.spec.name}' is not being recorded (or no longer is)")
        if self._owner is not None and self._owner.process.pid != asker:
            raise VmmError(f"machine '{self._core.spec.name}' is being recorded by another process (pid "
                           f"{self._owner.process.pid})")

    def close(self) -> None:
        """Idempotent."""
        if self._owner is not None:
            self._owner.close()
            self._owner = None
        if self._core.reaper.recorder is not None:
            self._core.reaper.recorder.close()
            self._core.reaper.recorder = None
