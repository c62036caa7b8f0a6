"""What the system of a machine's Linux programs knows of them: it is asked, wherever it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ipc.messages import AnyRequest, BitmapPlace, ProgramMaps, ProgramTrace

from ..errors import ExitCode, VmmError
from .core import Core

__all__ = ["maps", "require_program", "trace"]


def maps(core: Core, bitmaps: dict[int, BitmapPlace]) -> dict[str, Any]:
    """Raises VmmError."""
    core.require_not_ended()
    return _ask(core, lambda seq: ProgramMaps(seq, bitmaps))


def trace(core: Core, tracer: str, on: bool, after: int) -> dict[str, Any]:
    """Also of a machine that has ended (``ended``), as long as it is there. Raises VmmError."""
    found = _ask(core, lambda seq: ProgramTrace(seq, tracer, on, after))
    return {**found, "ended": core.state == "ended"}


def require_program(core: Core) -> None:
    """Raises VmmError."""
    if core.spec.program is None:
        raise VmmError(f"machine '{core.spec.name}' runs no Linux program (see vmm run)")


def _ask(core: Core, make: Callable[[int], AnyRequest]) -> dict[str, Any]:
    require_program(core)
    system = core.vcpus.all[core.spec.threads]
    replies = core.vcpus.request([system], lambda seq, _: make(seq))
    if system.index not in replies:
        raise VmmError(f"machine '{core.spec.name}': the process that serves its programs has ended",
                       ExitCode.WORKER_DIED)
    return replies[system.index].data or {}
