"""Recording a dirty trace: what is harvested goes into a queue, for the process that asked (vmm/record.py)."""

from __future__ import annotations

from ipc.steps import step

from ..errors import VmmError
from ..record import Recorder
from .core import Core
from .owners import Owner
from .tracking import TrackingSwitch

__all__ = ["Recording"]


class Recording:
    """It ends with the coordinator: whoever takes over removes its segment, and the trace says that it was
    interrupted."""

    def __init__(self, core: Core, tracking: TrackingSwitch) -> None:
        self._core = core
        self._tracking = tracking
        self._owner: Owner | None = None

    def start(self, owner: int) -> None:
        """Until ``stop`` or the end of process ``owner``. Raises VmmError and SegmentError."""
        core = self._core
        core.require_not_ended()
        if core.reaper.recorder is not None:
            raise VmmError(f"machine '{core.spec.name}' is being recorded already")
        self._tracking.choose(recorded=True)
        if not core.parts.ring_entries:
            how = (f"vmm tracking {core.spec.name} ring" if core.spec.ring_entries
                   else "launch it with a dirty_ring_size")
            raise VmmError(f"machine '{core.spec.name}' has tracking {core.parts.tracking}, which does not say "
                           f"which page came after which: a trace needs dirty rings ({how})")
        core.flush()        # what was dirtied before does not belong to it
        step("record-start")
        core.reaper.recorder = Recorder(core.spec.name, core.parts.log.tables[0])
        step("record-started")
        try:
            self._owner = core.owners.watch(owner, self.close)
        except ProcessLookupError:
            self.close()
            raise VmmError(f"process {owner}, which is to take the recording, is not there") from None
        core.carried_out()

    def step(self, running: bool) -> bool:
        """Reap now; False when the machine has ended."""
        self._require_recording()
        if running:
            self._core.reaper.reap()
        return self._core.state != "ended"

    def stop(self) -> None:
        """Flush, and end it."""
        self._require_recording()
        self._core.flush()
        step("record-stop")
        self.close()
        self._core.carried_out()
        step("record-stopped")

    def _require_recording(self) -> None:
        if self._core.reaper.recorder is None:
            raise VmmError(f"machine '{self._core.spec.name}' is not being recorded (any more)")

    def close(self) -> None:
        """Idempotent."""
        if self._owner is not None:
            self._owner.close()
            self._owner = None
        if self._core.reaper.recorder is not None:
            self._core.reaper.recorder.close()
            self._core.reaper.recorder = None
