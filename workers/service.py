"""The service thread of a worker: what the coordinator asks for over the requests socket is done and answered, one
request after the other, until it says Shutdown or nobody owns the machine any more."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import zmq

from ipc import sockets, userfault
from ipc.claims import Belongings, ClaimError
from ipc.layout import KICK_SIGNAL, Tracking
from ipc.messages import (
    ClearLog,
    Done,
    Failed,
    GetLog,
    GetState,
    MessageError,
    ProgramMaps,
    ProgramTrace,
    RebuildRing,
    RemoveMemslot,
    SendFd,
    SetMemslot,
    SetMemslots,
    SetState,
    SetTracking,
    Shutdown,
    SlotSpec,
    Userfault,
    WorkerSpec,
    decode_request,
    encode,
)
from ipc.shm import SegmentError

from .accel.base import Accelerator, AccelError
from .memory import GuestMemory
from .slots import Slots
from .state import Saved, StateError, SystemSaved, check_state, plain_state
from .vcpu import VcpuThread

if TYPE_CHECKING:
    from .linux.serve import SystemAccelerator
    from .tracking.uffd import SlotWrites

__all__ = ["FD_TIMEOUT", "Service", "slot_writes"]

FD_TIMEOUT = 10.0           # seconds to hand a descriptor over
_ORPHAN_GRACE = 3.0         # seconds an ownerless worker waits for a last Shutdown


class Service:
    """``close`` it when its thread has ended."""

    def __init__(self, spec: WorkerSpec, context: zmq.Context[zmq.Socket[bytes]], vcpu: VcpuThread) -> None:
        self._spec = spec
        self._context = context
        self._vcpu = vcpu
        self._userfault = userfault.Userfault(-1)   # open during post-copy
        #: With tracking ``uffd``.
        self.writes: SlotWrites | None = None

    def close(self) -> None:
        self._userfault.close()
        if self.writes is not None:
            self.writes.close()

    def serve(self) -> None:
        """Answer requests until Shutdown, or until nobody owns the machine any more."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL})
        sock = sockets.connect(self._context, zmq.DEALER, self._spec.request_endpoint,
                               identity=str(self._spec.index).encode())
        poller = zmq.Poller()
        poller.register(sock, zmq.POLLIN)
        if self._spec.keeper_fd >= 0:
            poller.register(self._spec.keeper_fd, zmq.POLLIN)
        deadline: float | None = None
        with sock:
            while not self._vcpu.shutdown:
                timeout = None if deadline is None else int(max(0.0, deadline - time.monotonic()) * 1000)
                events = dict(poller.poll(timeout))
                if sock in events:
                    self._serve_one(sock)
                elif deadline is not None and time.monotonic() >= deadline:
                    self._orphaned()
                elif self._spec.keeper_fd in events:
                    # The keeper is gone. A live coordinator ends the machine in order now.
                    poller.unregister(self._spec.keeper_fd)
                    deadline = time.monotonic() + _ORPHAN_GRACE

    def _serve_one(self, sock: zmq.Socket[bytes]) -> None:
        try:
            request = decode_request(sock.recv())
        except MessageError as exc:
            print(f"vcpu {self._spec.index}: {exc}", file=sys.stderr)
            return
        accel = self._vcpu.accel
        control = self._vcpu.control
        value = 0
        data = None
        try:
            match request:
                case SetMemslot(slot=slot):
                    self._slots(accel).set(slot)
                case SetMemslots(slots=slots):
                    self._slots(accel).set_all(slots)
                case RemoveMemslot(slot_id=slot_id):
                    self._slots(accel).remove(slot_id)
                case GetLog(slot_id=slot_id):
                    value = accel.get_dirty_log(slot_id) if self.writes is None else self.writes.get(slot_id)
                case ClearLog(slot_id=slot_id):
                    accel.clear_dirty_log(slot_id)
                case RebuildRing():
                    self._vcpu.do(accel.rebuild_ring)
                    control.pushed_total = 0
                    control.reset_total = 0
                    control.ring_generation += 1
                    self._vcpu.ring_full = False
                    self._vcpu.bucket.forget_ring()
                    if accel.vcpu_fd >= 0:
                        sockets.send_fd(self._spec.fd_socket, self._spec.index, accel.vcpu_fd, FD_TIMEOUT)
                    self._vcpu.wake_up()
                case SetTracking():
                    self._set_tracking(request)
                case SendFd():
                    if accel.vcpu_fd >= 0:
                        sockets.send_fd(self._spec.fd_socket, self._spec.index, accel.vcpu_fd, FD_TIMEOUT)
                        value = accel.kvm_run_size
                case GetState():
                    data = self._get_state(accel)
                case SetState():
                    state = check_state(request.state)
                    if isinstance(state, SystemSaved) is not self._spec.is_system:
                        raise StateError("this is the state of another kind of vCPU")
                    accel.set_state(state)
                    self._vcpu.restored_exit = state.exit
                case Userfault(socket=path):
                    data = self._wait_for_missing(path)
                case ProgramMaps(bitmaps=bitmaps):
                    data = self._of_system(lambda system: system.maps(bitmaps))
                case ProgramTrace(client=client, on=on, after=after):
                    data = self._of_system(lambda system: system.trace(client, on, after))
                case Shutdown():
                    self._vcpu.shutdown = True
        except (AccelError, StateError, SegmentError, userfault.UserfaultError, OSError, KeyError) as exc:
            sock.send(encode(Failed(request.seq, str(exc))))
            return
        except Exception as exc:    # a request may fail, whatever is in it; this thread goes on
            traceback.print_exc()
            sock.send(encode(Failed(request.seq, f"its worker failed: {type(exc).__name__}: {exc}")))
            return
        sock.send(encode(Done(request.seq, value, data)))
        if self._vcpu.shutdown:
            accel.interrupt()
            self._vcpu.wake_up()

    def _get_state(self, accel: Accelerator) -> dict[str, Any]:
        """A program's thread may have to be run for it: that is the vCPU thread's."""
        found: list[Saved] = []
        if self._spec.program is None:
            found.append(accel.get_state())
        else:
            self._vcpu.do(lambda: found.append(accel.get_state()))
        return plain_state(msgspec.structs.replace(found[0], exit=self._vcpu.exit))

    def _of_system(self, look: Callable[[SystemAccelerator], dict[str, Any]]) -> dict[str, Any]:
        """What there is to see of it between two of its calls, or where one of them waits for its log. Raises
        AccelError."""
        if not self._spec.is_system:
            raise AccelError(f"vCPU {self._spec.index} is not the system of a program")
        found: list[dict[str, Any]] = []
        system = cast("SystemAccelerator", self._vcpu.accel)
        self._vcpu.do(lambda: found.append(look(system)), running=True)
        return found[0]

    def _slots(self, accel: Accelerator) -> Slots:
        return Slots(self._vcpu.memory, accel, self.writes, self._spec.system_slot.id)

    def _set_tracking(self, request: SetTracking) -> None:
        """Repeated, it does nothing. Where the new way cannot be had, the old one stays in force."""
        spec = msgspec.structs.replace(self._spec, tracking=request.tracking, ring_entries=request.ring_entries,
                                       ring_segment=request.ring_segment)
        accel, control = self._vcpu.accel, self._vcpu.control
        if self._spec.mode == spec.mode and self._spec.ring_entries == spec.ring_entries:
            control.tracking = spec.mode
            return
        slots = self._vcpu.memory.slots
        for slot_id, name in request.log_segments.items():
            slots[slot_id].set_log_segment(name)
        logged = [s.spec for s in slots.values() if s.spec.id != spec.system_slot.id]
        writes = slot_writes(self._vcpu.memory, logged) if spec.mode is Tracking.UFFD else None
        try:
            self._vcpu.do(lambda: accel.set_tracking(spec))
        except BaseException:
            if writes is not None:
                writes.close()
            raise
        if self.writes is not None:
            self.writes.close()
        self.writes, self._spec = writes, spec
        self._vcpu.ring_full = False
        self._vcpu.bucket.forget_ring()
        control.pushed_total = control.reset_total = 0
        control.ring_entries = spec.ring_entries
        control.tracking = spec.mode
        self._vcpu.wake_up()

    def _wait_for_missing(self, path: str) -> dict[str, Any]:
        """Post-copy begins (``path``: who fills the pages) or ends. The fd stays open here too: should the other
        end go, nobody gets a zero page for one that is missing."""
        slots = [s for s in self._vcpu.memory.slots.values() if s.spec.id != self._spec.system_slot.id]
        if not path:
            if self._userfault.fd >= 0:     # the other end may still have its own copy open
                for slot in slots:
                    self._userfault.unregister(slot.host_address, slot.spec.size)
            self._userfault.close()
            self._vcpu.memory.is_arriving = False
            return {}
        if self._userfault.fd < 0:      # else the request is repeated, and the other end may have it already
            made = userfault.Userfault.make()
            try:
                for slot in slots:
                    made.register(slot.host_address, slot.spec.size)
            except BaseException:
                made.close()
                raise
            self._userfault = made
            self._vcpu.memory.is_arriving = True
        sockets.send_fd(path, self._spec.index, self._userfault.fd, FD_TIMEOUT)
        return {str(slot.spec.id): slot.host_address for slot in slots}

    def _orphaned(self) -> None:
        """Keeper and coordinator are both gone: leave nothing behind, then go."""
        # A coordinator that lives, or a machine that has the name by now, keeps all that it has.
        with contextlib.suppress(ClaimError):
            Belongings(self._spec.belongings, Path(self._spec.fd_socket).parent).clear()
        os._exit(1)  # the vCPU thread may be deep in the guest; there is nobody left to tell


def slot_writes(memory: GuestMemory, slots: list[SlotSpec]) -> SlotWrites:
    """Imported only now: it brings numpy along, and 10 MiB. Raises UserfaultError."""
    from .tracking.uffd import SlotWrites

    return SlotWrites(memory, slots)
