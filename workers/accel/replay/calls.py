"""The replay accelerator's loops, compiled (workers/accel/replay/loops.py).

Import this module late: the first import ever compiles (some seconds), later ones take 30 ms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipc.compiled.loader import Native

__all__ = ["produce", "reset"]

_native = Native("workers.accel.replay.loops", "ipc.compiled.atomics", "ipc.layout", "ipc.compiled.loops",
                 "workers.accel.replay.layout")


def produce(state: NDArray[Any], count: int) -> int:
    """Make ``count`` writes, or fewer; a value of Left. ``state``: PRODUCER, shape [1]. The vCPU thread's."""
    return int(_native.produce(state.ctypes.data, count))


def reset(state: NDArray[Any], bases: NDArray[np.int64]) -> int:
    """Free the harvested entries, in sequence, and protect their pages again; how many.

    ``bases``, int64 [slot ids]: a slot's first page, counted from that of the vCPU's share. The service
    thread's."""
    return int(_native.reset(state.ctypes.data, bases.ctypes.data, len(bases)))
