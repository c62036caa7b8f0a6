"""Recording a dirty trace: what is harvested goes into a queue, for the process that asked (vmm/record.py)."""

from __future__ import annotations

from ipc.shm import segment_name, unlink_segment

from ..errors import VmmError
from ..record import QUEUE, Recorder
from .core import Core
from .owners import Owner

__all__ = ["Recording"]


class Recording:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._owner: Owner | None = None

    def clear(self) -> None:
        """After a coordinator that died: a recording ends with it."""
        unlink_segment(segment_name(self._core.spec.name, QUEUE))

    def start(self, owner: int) -> None:
        """Until ``stop`` or the end of process ``owner``. Raises VmmError."""
        core = self._core
        core.require_not_ended()
        if not core.spec.ring_entries:
            raise VmmError(f"machine '{core.spec.name}' has plain dirty bitmaps, which do not say which "
                           "page came after which: a trace needs rings (dirty_ring_size)")
        if core.reaper.recorder is not None:
            raise VmmError(f"machine '{core.spec.name}' is being recorded already")
        core.flush()        # what was dirtied before does not belong to it
        core.reaper.recorder = Recorder(core.spec.name, core.parts.log.tables[0])
        try:
            self._owner = core.owners.watch(owner, self.close)
        except ProcessLookupError:
            self.close()

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
        self.close()

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
