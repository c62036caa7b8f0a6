"""The reset of a worker's ring, by one of two threads.

The **reset thread** resets the ring *while the guest runs*, so that a reap in time costs the guest nothing but a TLB
flush; it sleeps on a futex in the control block (ipc/ring.py). A vCPU that is out of the guest for a full ring resets
it itself, which saves waking one thread and being woken by it.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from ipc.layout import KICK_SIGNAL, VcpuControl
from ipc.ring import ResetRequests

if TYPE_CHECKING:
    from .accel.base import Accelerator
    from .vcpu import VcpuThread

__all__ = ["Resets", "serve_resets"]


class Resets:
    """What the coordinator asks for, carried out once, by whichever thread comes first."""

    def __init__(self, index: int, control: VcpuControl) -> None:
        self.requests = ResetRequests(control)
        self._index, self._control = index, control
        self._lock = threading.Lock()

    def carry_out(self, accel: Accelerator) -> bool:
        """False: there is no request."""
        with self._lock:
            request = self.requests.pending
            if request is None:
                return False
            self._reset(accel, self.requests.expected())
            self.requests.answer(request)
            return True

    def _reset(self, accel: Accelerator, expected: int) -> None:
        """What is missing in the end the coordinator sees by the totals."""
        if not expected:
            return
        began = time.perf_counter_ns()
        try:
            self._control.reset_total += accel.reset_ring(expected)
        except Exception as exc:    # whatever it is, the count does not match then, and the coordinator sees that
            print(f"vcpu {self._index}: reset of its ring: {exc}", file=sys.stderr)
        self._control.resets += 1
        self._control.reset_ns += time.perf_counter_ns() - began


def serve_resets(vcpu: VcpuThread) -> None:
    """The reset thread, until the process ends: whenever the coordinator has raised reset_request. A vCPU that waits at
    ring-full goes on then."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
    while not vcpu.shutdown:
        vcpu.resets.requests.wait()
        if vcpu.resets.carry_out(vcpu.accel):
            vcpu.ring_full = False
            vcpu.wake_up()
