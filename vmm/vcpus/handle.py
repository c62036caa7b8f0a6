"""One vCPU worker as the coordinator has it: its process, its control block, its ring; and how it is kicked.

A worker is known by its pidfd, never by its pid: a signal to a pidfd cannot hit a stranger, and a coordinator that
replaces one that died can watch workers that are not its children.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal

from ipc.layout import IMMEDIATE_EXIT_OFFSET, KICK_SIGNAL, VcpuControl, VcpuState
from ipc.linux.processid import ProcessId, identity, open_process
from ipc.messages import Exited, ExitReason
from ipc.ring import RingReader

__all__ = ["VcpuHandle"]


class VcpuHandle:
    """When the worker has died its ``ring`` is harvested once more (vmm/dirty/reaper.py) and forgotten;
    ``control.collected`` says so to a coordinator that takes over."""

    def __init__(self, index: int, control: VcpuControl, entries: int) -> None:
        self.index = index
        self.control = control
        self.ring = RingReader(control, entries)
        self.exited: Exited | None = None
        self.process = ProcessId(0, 0)
        self.pidfd = -1
        #: Why its process has ended, where that is known.
        self.fate = ""
        self._run: mmap.mmap | None = None
        self._immediate: ctypes.c_uint8 | None = None

    # --- life ------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self.pidfd >= 0

    @property
    def running(self) -> bool:
        """The guest has not ended on this vCPU."""
        return self.alive and self.control.state != VcpuState.EXITED

    @property
    def pid(self) -> int:
        return self.process.pid

    def watch(self, pid: int) -> None:
        """A process that has just been made. Raises ProcessLookupError."""
        self.pidfd = os.pidfd_open(pid)
        try:
            self.process = identity(pid)
            signal.pidfd_send_signal(self.pidfd, 0)
        except ProcessLookupError:      # it has gone, and the pid may be another's: it must not be used again
            self.process = ProcessId(pid, 0)

    def adopt(self, process: ProcessId) -> None:
        """Its process as it was written down (not as the control block has it, which the worker itself writes).
        Raises ProcessLookupError when that has gone."""
        self.process = process
        self.pidfd = open_process(process)

    def signal(self, signum: int) -> None:
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, signum)
            except ProcessLookupError:
                pass  # its death is seen in the poll loop

    def mark_dead(self) -> None:
        """The process is gone. Its ring stays mapped: what it logged can still be harvested."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        if self.control.state != VcpuState.EXITED:
            self.control.exit_reason = ExitReason.WORKER_DIED
            self.control.state = VcpuState.DEAD

    # --- what it has sent ------------------------------------------------------------------------

    def map_vcpu(self, fd: int, run_size: int) -> None:
        """Map kvm_run and the kernel's ring through the vCPU fd; the fd is closed. Raises OSError and ValueError
        where it is not that of a vCPU."""
        try:
            self.unmap()
            self._run = mmap.mmap(fd, run_size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            anchor = ctypes.c_uint8.from_buffer(self._run, IMMEDIATE_EXIT_OFFSET)
            self._immediate = ctypes.c_uint8.from_address(ctypes.addressof(anchor))
            del anchor
            self.ring.map_kvm(fd)
        finally:
            os.close(fd)

    @property
    def run_size(self) -> int:
        """Bytes of kvm_run, as it is mapped; 0 where there is none."""
        return 0 if self._run is None else len(self._run)

    def unmap(self) -> None:
        """Idempotent."""
        self._immediate = None
        self.ring.forget()
        if self._run is not None:
            self._run.close()
            self._run = None

    # --- kick ------------------------------------------------------------------------------------

    def kick(self) -> None:
        """Ask the vCPU out of the guest: request, immediate-exit flag, signal, in this order."""
        self.control.kick_request = (self.control.kick_request + 1) & 0xFFFF_FFFF
        self.repeat_kick()

    def repeat_kick(self) -> None:
        """The part of a kick that may be repeated."""
        if self._immediate is not None:
            self._immediate.value = 1
        self.control.immediate_exit = 1
        self.signal(KICK_SIGNAL)

    @property
    def kick_pending(self) -> bool:
        return self.running and self.control.kick_ack != self.control.kick_request
