"""The reset thread of a worker: it resets the ring *while the guest runs*, so that a reap in time costs the guest
nothing but a TLB flush; it sleeps on a futex in the control block (ipc/ring.py)."""

from __future__ import annotations

import signal
import sys
import time

from ipc.layout import KICK_SIGNAL
from ipc.ring import ResetRequests

from .vcpu import VcpuThread

__all__ = ["serve_resets"]


def serve_resets(vcpu: VcpuThread) -> None:
    """Whenever the coordinator has raised reset_request, until the process ends. A vCPU that waits at ring-full
    goes on then."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
    requests = ResetRequests(vcpu.control)
    while not vcpu.shutdown:
        request = requests.wait()
        if request is None:
            continue
        _reset(vcpu, requests.expected())
        requests.answer(request)
        vcpu.ring_full = False
        vcpu.wake_up()


def _reset(vcpu: VcpuThread, expected: int) -> None:
    """The call is repeated while it is short. What is missing in the end the coordinator sees by the totals."""
    if not expected:
        return
    began = time.perf_counter_ns()
    try:
        vcpu.control.reset_total += vcpu.accel.reset_ring(expected)
    except Exception as exc:    # whatever it is, the count does not match then, and the coordinator sees that
        print(f"vcpu {vcpu.index}: reset of its ring: {exc}", file=sys.stderr)
    vcpu.control.resets += 1
    vcpu.control.reset_ns += time.perf_counter_ns() - began
