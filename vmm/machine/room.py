"""What a machine takes of this host, and whether it can have that, asked before anything is made: shared memory,
memory of its processes, address space, descriptors. Beyond a limit the kernel ends processes without a word, or
libraries abort.

The figures of processes are measured, and rather too small than too large: a machine that could just have run is
not refused.
"""

from __future__ import annotations

import resource

from ipc.bitmap_sizes import bitmap_bytes, word_count
from ipc.layout import control_size
from ipc.shm import room

from ..errors import VmmError
from .spec import MachineSpec
from .trackings import BITMAPS

__all__ = ["CLIENT_DESCRIPTORS", "RoomError", "address_space", "check_room", "descriptors", "private_memory",
           "shared_memory"]

_MIB = 1 << 20
#: Descriptors of a coordinator without a vCPU or slot.
_BASE_DESCRIPTORS = 32
#: Those that are kept for its clients.
CLIENT_DESCRIPTORS = 64
#: Of each vCPU: pidfd, two connections, ring and kvm_run.
_VCPU_DESCRIPTORS = 5
#: Address space of processes beside the guest's memory, and of each thread that harvests, MiB.
_COORDINATOR_SPACE, _THREAD_SPACE = 400, 64


class RoomError(VmmError):
    """This host cannot give what the machine needs. ``key`` is that of the configuration file, ``text`` says what
    is missing, and what can be done."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(f"{key}: {text}")
        self.key, self.text = key, text


def shared_memory(spec: MachineSpec) -> int:
    """Bytes that its segments take: RAM (with ``verify``, a copy too), bitmaps, software rings."""
    replay, verify = not spec.can.guests, spec.verify is not None
    total = control_size(spec.vcpus)
    for slot in spec.slots:
        if not replay:
            total += slot.size * ((slot.id not in spec.links) + verify)
        total += bitmap_bytes(slot.pages) * (spec.reaper.reapers + 1 + (2 if replay and verify else 0))
        if spec.asked_tracking in BITMAPS:
            total += 8 * word_count(slot.pages) * spec.vcpus
    total += 16 * spec.ring_entries * sum(not spec.has_kernel_ring(index) for index in range(spec.vcpus))
    return total


def private_memory(spec: MachineSpec) -> int:
    """Bytes that its processes take beside that."""
    return (spec.can.base_memory + spec.can.worker_memory * spec.vcpus) * _MIB


def address_space(spec: MachineSpec) -> int:
    """Bytes of address space that the largest of its processes needs. Workers map the RAM, the coordinator all;
    replay has RAM that takes no memory, but is mapped."""
    ram = sum(s.size for s in spec.slots)
    coordinator = (_COORDINATOR_SPACE + _THREAD_SPACE * (spec.reaper.reapers - 1)) * _MIB + shared_memory(spec)
    return max(coordinator + (0 if spec.can.guests else ram), spec.can.space * _MIB + ram)


def descriptors(spec: MachineSpec) -> int:
    """That its coordinator needs, some of them for clients. A segment takes one as long as it is mapped."""
    slots = len(spec.slots)
    each = 2 + (1 if spec.verify is not None else 0) + (spec.vcpus if spec.asked_tracking in BITMAPS else 0)
    return _BASE_DESCRIPTORS + CLIENT_DESCRIPTORS + _VCPU_DESCRIPTORS * spec.vcpus + each * slots


def check_room(spec: MachineSpec) -> None:
    """Raises RoomError."""
    copy = spec.verify is not None and spec.can.guests
    what = "the machine (RAM and the verifier's copy of it)" if copy else "the machine"
    needed, there = shared_memory(spec), room()
    if there.of_cgroup:
        needed += private_memory(spec)
    if needed > there.free:
        raise RoomError("memory", there.shortage(what, needed))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and descriptors(spec) > hard:
        raise RoomError("vcpus", f"the hard limit of open files is {hard}, but the machine needs "
                                 f"{descriptors(spec)} (see ulimit -Hn; raise it, or use fewer vCPUs or slots)")
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    space = address_space(spec)
    if soft != resource.RLIM_INFINITY and space > soft:
        raise RoomError("memory", f"the address space limit is {soft >> 20} MiB, but a process of the machine "
                                  f"needs {space >> 20} MiB (see ulimit -v; raise it, or use less memory)")
