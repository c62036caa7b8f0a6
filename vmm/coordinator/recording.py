"""Recording a dirty trace: what is harvested goes into a queue, for the process that asked (vmm/record.py)."""

from __future__ import annotations

from ipc.processid import ProcessId
from ipc.shm import unlink_segment

from ..errors import VmmError
from ..names import segment_name
from ..record import QUEUE, Recorder
from .core import Core
from .owners import Watch, unseen

__all__ = ["Recording"]


class Recording:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._owner: Watch | None = None

    def clear(self) -> None:
        """After a coordinator that died: a recording ends with it."""
        unlink_segment(segment_name(self._core.spec.name, QUEUE))

    @property
    def owner(self) -> ProcessId | None:
        """Who records; None: nobody."""
        return self._owner.process if self._owner is not None else None

    def start(self, owner: ProcessId) -> None:
        """Until ``stop`` or the end of process ``owner``. Raises VmmError."""
        core = self._core
        core.require_not_ended()
        if not core.spec.ring_entries:
            raise VmmError(f"machine '{core.spec.name}' has plain dirty bitmaps, which do not say which "
                           "page came after which: a trace needs rings (dirty_ring_size)")
        if core.reaper.recorder is not None:
            pid = self._owner.process.pid if self._owner is not None else 0
            raise VmmError(f"machine '{core.spec.name}' is being recorded already (pid {pid})")
        core.flush()        # what was dirtied before does not belong to it
        core.reaper.recorder = Recorder(core.spec.name, core.parts.log.tables[0])
        try:
            self._owner = core.owners.watch(owner, self.close)
        except ProcessLookupError:
            self.close()
            raise unseen(owner) from None
        except VmmError:
            self.close()
            raise

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
        self.close()

    def _require_recording(self, asker: int) -> None:
        if self._core.reaper.recorder is None:
            raise VmmError(f"machine '{self._core.spec.name}' is not being recorded (any more)")
        if self._owner is not None and self._owner.process.pid != asker:
            raise VmmError(f"machine '{self._core.spec.name}' is being recorded by another process "
                           f"({self._owner.process.pid})")

    def close(self) -> None:
        """Idempotent."""
        if self._owner is not None:
            self._owner.close()
            self._owner = None
        if self._core.reaper.recorder is not None:
            self._core.reaper.recorder.close()
            self._core.reaper.recorder = None
