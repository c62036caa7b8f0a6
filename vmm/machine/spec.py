"""What a coordinator is told: a fully resolved machine, without defaults and without a YAML file.

Made from a MachineConfig by :mod:`vmm.client.plan`; plain msgspec structs, so that neither the coordinator
nor its replacement has to import the configuration layer.
"""

from __future__ import annotations

import msgspec

from ipc.messages import ProgramSpec, ReplaySpec
from ipc.shm import PAGE_SIZE
from workers.accel import registry
from workers.accel.base import Capabilities

__all__ = ["REAPERS_MAX", "MachineSpec", "RamSlot", "ReaperSpec", "VerifySpec", "decode_spec", "encode_spec"]


REAPERS_MAX = 64


class RamSlot(msgspec.Struct, frozen=True):
    """A memory slot."""

    id: int
    gpa: int            # bytes
    size: int           # bytes, a multiple of 4096
    log: bool = True
    born: int = 0       # tells it from an earlier slot of the same id, place and size (snapshot chains)

    @property
    def pages(self) -> int:
        return self.size // PAGE_SIZE


class ReaperSpec(msgspec.Struct, frozen=True):
    """All times in seconds."""

    mode: str = "adaptive"      # "adaptive" | "fixed"
    interval: float = 1.0       # fixed: the period (the seed sleeps 1 s)
    min_interval: float = 0.001
    max_interval: float = 1.0
    reapers: int = 1            # threads that harvest, each some of the rings
    reset: str = "late"         # "late": when somebody asks, or a ring gets full; "early": with every reap


class VerifySpec(msgspec.Struct, frozen=True):
    """The verifier."""

    interval: float = 0.2       # seconds between rounds
    inject: str = "none"        # "none" | "lost" | "extra": the verifier's own self-test
    surplus_is_failure: bool = True  # false for guests that may store a value already there


class MachineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A machine, with every default filled in."""

    name: str
    accel: str                  # a folder of workers/accel
    vcpus: int
    privilege: str              # "user" | "kernel"
    ring_entries: int           # of a ring, when there are rings; 0: there never are
    slots: list[RamSlot]
    image: str                  # absolute path; "" with replay or a program
    load_address: int | None    # flat binaries only
    params: list[int]
    cmdline: str
    stack_size: int             # bytes per vCPU
    reaper: ReaperSpec
    verify: VerifySpec | None
    timeout: float | None       # seconds
    trace: list[str]
    trace_file: str             # "" is standard error
    dirty_quota: int = 0        # pages per second of each vCPU; 0: no limit
    dirty_quotas: list[int] = []    # of each vCPU by itself, where they differ; empty: dirty_quota
    tracking: str = ""          # one of trackings.CHOICES; empty: ring, or bitmap where there is no ring
    log: str = "auto"           # "auto": the vCPUs log while somebody needs it; "always"
    replay: ReplaySpec | None = None    # accel replay: what is dirtied
    replay_trace: str = ""      # absolute path of the trace that it is to be taken from
    program: ProgramSpec | None = None  # a Linux program instead of an image: all vCPUs but the last, which is
                                        # its system, are for its threads
    nice: int = 0               # of the vCPU processes, 0 to 19
    shown: list[str] = []       # CPU features that the guest was shown where it ran before it came here
    linger: bool                # stay after the end until a client releases the machine
    incoming: bool = False      # its memory comes from elsewhere: nothing is loaded, and whoever launches it reserves
                                # what he does not fill before it starts
    links: dict[int, str] = {}  # with incoming: segments that are its memory already, by slot (another machine's,
                                # which is handed over in place)
    continues: bool = False     # it is one that was upgraded: its record goes on
    elapsed: float = 0.0        # seconds that its guest had run before it was upgraded

    @property
    def can(self) -> Capabilities:
        """What its accelerator can. Raises AccelError where this program has none called so."""
        return registry.capabilities(self.accel)

    @property
    def threads(self) -> int:
        """vCPUs for the threads of a program; 0 without a program."""
        return 0 if self.program is None else self.vcpus - 1

    def is_system(self, vcpu: int) -> bool:
        """It has no CPU, but serves the system calls of the others."""
        return self.program is not None and vcpu == self.threads

    @property
    def keeps_system(self) -> bool:
        """What is in its system slot belongs to its state; all that a program has there follows from its system's."""
        return self.program is None

    def has_kernel_ring(self, vcpu: int) -> bool:
        """The kernel makes the dirty ring of this vCPU; else it is a segment."""
        return self.can.kernel_ring and not self.is_system(vcpu)

    @property
    def quotas(self) -> list[int]:
        """Pages per second that each vCPU may dirty; 0: no limit."""
        return self.dirty_quotas or [self.dirty_quota] * self.vcpus

    @property
    def asked_tracking(self) -> str:
        return self.tracking or ("ring" if self.ring_entries else "bitmap")


def encode_spec(spec: MachineSpec) -> bytes:
    return msgspec.json.encode(spec)


def decode_spec(text: bytes) -> MachineSpec:
    return msgspec.json.decode(text, type=MachineSpec)
