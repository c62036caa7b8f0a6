"""One vCPU process: what its threads work on is made here, and they are started.

The **vCPU thread** is the process's main thread (workers/vcpu.py): it enters the guest, because the kick signal
must interrupt exactly that thread. The **reset thread** (workers/resets.py) resets the ring while the guest runs.
The **service thread** (workers/service.py) answers the coordinator's requests, which are rare.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import zmq

from ipc import sandbox, sockets, userfault
from ipc.bell import Doorbell
from ipc.lanes import Lane
from ipc.layout import PROTOCOL_VERSION, Tracking, VcpuState, control_error, vcpu_control
from ipc.linux import process
from ipc.messages import Console, Hello, Notification, WorkerSpec, encode
from ipc.shm import Segment, SegmentError

from .accel.base import Accelerator, AccelError
from .accel.registry import load, load_program
from .memory import GuestMemory
from .ports import PortBus
from .programs import ProgramThread
from .resets import serve_resets
from .service import FD_TIMEOUT, Service, slot_writes
from .vcpu import VcpuThread

__all__ = ["Worker", "main"]


class Worker:
    """What the threads of a worker work on: made, set up, closed."""

    def __init__(self, spec: WorkerSpec, unconfined: str = "") -> None:
        """``unconfined``: why it must not run a guest."""
        self._spec = spec
        self._unconfined = unconfined
        self._open = contextlib.ExitStack()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._open.callback(context.term)
        self._notify = self._open.enter_context(sockets.connect(context, zmq.PUSH, spec.notify_endpoint))
        segment = Segment.open(spec.control_segment)
        self._control = vcpu_control(segment.address, spec.index)
        self._control_segment = segment
        self._memory = GuestMemory()
        self._open.callback(self._memory.close)
        ports = PortBus(lambda data: self._say(Console(spec.index, data)))
        self.vcpu = VcpuThread(spec.index, self._control, self._memory, ports, self._say,
                               Lane.of_vcpu(segment.address, spec.vcpu_count, spec.index))
        self.service = Service(spec, context, self.vcpu)
        #: Of a vCPU that runs a thread of a Linux program.
        self.program: ProgramThread | None = None

    def set_up(self) -> bool:
        """Build the vCPU and say Hello; False (and the reason said) when it cannot be had."""
        spec = self._spec
        try:
            if spec.version != PROTOCOL_VERSION:
                raise AccelError(f"was asked to speak protocol {spec.version}, but speaks {PROTOCOL_VERSION}")
            if self._unconfined:
                raise AccelError(self._unconfined)
            wrong = control_error(self._control_segment.address, self._control_segment.size)
            if wrong:
                raise AccelError(wrong)
            self._control.pid = os.getpid()
            self.vcpu.bell = self._open.enter_context(contextlib.closing(Doorbell(Path(spec.fd_socket).parent)))
            for slot in [*spec.slots, spec.system_slot]:
                self._memory.add(slot)
            if spec.mode is Tracking.UFFD:
                self.service.writes = slot_writes(self._memory, spec.slots)
            accel = self._open.enter_context(contextlib.closing(self._make_accelerator()))
            self.vcpu.accel = accel
            if accel.vcpu_fd >= 0:
                sockets.send_fd(spec.fd_socket, spec.index, accel.vcpu_fd, FD_TIMEOUT)
        except (AccelError, SegmentError, userfault.UserfaultError, OSError) as exc:
            self._say(Hello(spec.index, os.getpid(), error=str(exc)))
            return False
        self._control.tracking = spec.mode
        self._control.state = VcpuState.READY
        self._say(Hello(spec.index, os.getpid(), kvm_run_size=accel.kvm_run_size,
                        ring_entries=spec.ring_entries))
        return True

    def _make_accelerator(self) -> Accelerator:
        """Raises AccelError, SegmentError and OSError."""
        spec, memory, control, ports = self._spec, self._memory, self._control, self.vcpu.ports
        if spec.program is None:
            return load(spec.accel)(spec, memory, control, ports)
        if spec.is_system:
            from .linux.serve import SystemAccelerator  # a worker with a CPU has no use for it

            cpu = load_program(spec.accel)
            return SystemAccelerator(spec, memory, control, ports, self.vcpu, host_tsc=cpu.sees_host_tsc(),
                                     sees_holes=cpu.sees_holes)
        accel = load_program(spec.accel)(spec, memory, control, ports)
        self.program = accel.server = ProgramThread(spec, memory, control, accel)
        self.vcpu.away = self.program
        self._open.callback(self.program.close)
        return accel

    def _say(self, message: Notification) -> None:
        self._notify.send(encode(message))

    def close(self) -> None:
        """When all threads have ended but this one."""
        self.service.close()
        self.vcpu.close()
        self._open.close()


def main(spec: WorkerSpec, confinement: sandbox.VcpuConfinement | None = None) -> int:
    """The process: 0 after an orderly Shutdown, 1 when the vCPU could not be set up. ``confinement``: made ready for
    the machine that it is forked for."""
    process.set_name(f"vcpu{spec.index}")
    process.set_time_slice(process.SERVICE_SLICE)   # of all threads but the vCPU's: they inherit it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator decides what a Ctrl-C means
    if spec.nice:
        process.set_group_nice(spec.nice)   # by a file, so before those are out of reach
    unconfined = ""
    try:
        program = spec.program
        listed = [Path(each) for each in (program.root, *program.files.values()) if each
                  ] if program is not None and spec.is_system else []
        directory = Path(spec.fd_socket).parent
        if confinement is None or confinement.directory != directory:
            confinement = sandbox.VcpuConfinement(directory)
        confinement.apply(listed)
    except sandbox.SandboxError as exc:
        unconfined = str(exc)       # said once it can say something
    worker = Worker(spec, unconfined)
    worker.vcpu.catch_kicks()
    ok = worker.set_up()
    if ok:
        service = threading.Thread(target=worker.service.serve, name="service", daemon=True)
        service.start()
        threading.Thread(target=serve_resets, args=(worker.vcpu,), name="reset", daemon=True).start()
        if worker.program is not None:
            threading.Thread(target=worker.program.serve_attention, args=(lambda: worker.vcpu.shutdown,),
                             name="attention", daemon=True).start()
        process.set_time_slice(0.0)     # the vCPU's own thread computes: an ordinary one
        if spec.nice:
            process.set_nice(spec.nice)
        worker.vcpu.run()
        service.join()
    worker.close()
    return 0 if ok else 1
