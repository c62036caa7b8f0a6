"""The state of a vCPU: what a snapshot stores, a migration sends, and ``set-state`` is given.

One format for every accelerator, so that what was saved on one runs on another. Outside of a process it is plain
data (JSON with ``xsave`` in base64, MessagePack with ``xsave`` as bytes); :func:`check_state` is the one way from
there to the structs below, and :func:`plain_state` the way back. Names, widths and meanings are those of KVM's
structures (Linux ``Documentation/virt/kvm/api.rst``: KVM_GET_REGS, _SREGS, _XSAVE, _XCRS, _DEBUGREGS, _MSRS,
_VCPU_EVENTS, _MP_STATE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from ipc.messages import DETAIL_MAX, ExitReason

__all__ = ["STATE_VERSION", "EventsState", "ExitState", "RegsState", "Saved", "SegmentState", "SegmentsState",
           "StateError", "SystemSaved", "TableState", "VcpuSaved", "check_state", "check_states", "plain_state"]

#: Version of the format below.
STATE_VERSION = 1

XSAVE_MAX = 4096            # bytes: struct kvm_xsave
_XSAVE_MIN = 512 + 64       # FXSAVE image and header
_MSRS_MAX = 4096
_SYSTEM_MAX = 40 << 20       # bytes

U8 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 8)]
U16 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
U64 = Annotated[int, msgspec.Meta(ge=0)]        # below 2**64 by _Part: msgspec's own bounds are of 63 bits
I32 = Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]


class StateError(Exception):
    """Not the state of a vCPU; the text is fit for a user."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, int) and value >> 64 > 0:
                raise ValueError(f"{name} is {value:#x}, which has more than 64 bits")


class RegsState(_Part, frozen=True):
    """General registers, instruction pointer and flags."""

    rax: U64
    rbx: U64
    rcx: U64
    rdx: U64
    rsi: U64
    rdi: U64
    rsp: U64
    rbp: U64
    r8: U64
    r9: U64
    r10: U64
    r11: U64
    r12: U64
    r13: U64
    r14: U64
    r15: U64
    rip: U64
    rflags: U64


class SegmentState(_Part, frozen=True):
    """A segment register with its descriptor, field by field."""

    base: U64
    limit: U32
    selector: U16
    type: U8
    present: U8
    dpl: U8
    db: U8
    s: U8
    l: U8  # noqa: E741
    g: U8
    avl: U8
    unusable: U8


class SegmentsState(_Part, frozen=True):
    """All of them."""

    cs: SegmentState
    ds: SegmentState
    es: SegmentState
    fs: SegmentState
    gs: SegmentState
    ss: SegmentState
    tr: SegmentState
    ldt: SegmentState


class TableState(_Part, frozen=True):
    """GDTR or IDTR."""

    base: U64
    limit: U16


class EventsState(_Part, frozen=True):
    """Exceptions and interrupts under way (struct kvm_vcpu_events)."""

    exception_injected: U8
    exception_nr: U8
    exception_has_error_code: U8
    exception_pending: U8
    exception_error_code: U32
    interrupt_injected: U8
    interrupt_nr: U8
    interrupt_soft: U8
    interrupt_shadow: U8
    nmi_injected: U8
    nmi_pending: U8
    nmi_masked: U8
    nmi_pad: U8
    sipi_vector: U32
    flags: U32
    smi_smm: U8
    smi_pending: U8
    smi_smm_inside_nmi: U8
    smi_latched_init: U8
    triple_fault_pending: U8
    exception_has_payload: U8
    exception_payload: U64


class ExitState(_Part, frozen=True):
    """How the guest ended on a vCPU that had ended when it was saved."""

    reason: ExitReason
    code: I32
    detail: Annotated[str, msgspec.Meta(max_length=DETAIL_MAX)]

    def __post_init__(self) -> None:
        # A vCPU whose worker has died has no state to be saved.
        if self.reason in (ExitReason.NONE, ExitReason.WORKER_DIED, ExitReason.UNKNOWN):
            raise ValueError(f"reason {self.reason.name} is not valid for a saved vCPU")


class VcpuSaved(_Part, frozen=True, kw_only=True):
    """The complete architectural state of a vCPU, and how it ended if it had."""

    version: int = STATE_VERSION
    regs: RegsState
    segments: SegmentsState
    gdt: TableState
    idt: TableState
    cr0: U64
    cr2: U64
    cr3: U64
    cr4: U64
    cr8: U64
    efer: U64
    apic_base: U64
    xcr0: U64
    #: The XSAVE area in its standard form (Intel SDM vol. 1, 13.4).
    xsave: Annotated[bytes, msgspec.Meta(min_length=_XSAVE_MIN, max_length=XSAVE_MAX)]
    #: DR0 to DR3, DR6, DR7.
    debug: tuple[U64, U64, U64, U64, U64, U64]
    #: {number in decimal: value}
    msrs: Annotated[dict[str, U64], msgspec.Meta(max_length=_MSRS_MAX)]
    events: EventsState
    mp_state: U32
    exit: ExitState | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(value >> 64 for value in (*self.debug, *self.msrs.values())):
            raise ValueError("a debug register or an MSR has more than 64 bits")
        for number in self.msrs:
            if not (number.isascii() and number.isdigit() and len(number) <= 10 and int(number) < 1 << 32):
                raise ValueError(f"'{number[:20]}' is not an MSR number")

    @property
    def msr_values(self) -> dict[int, int]:
        """{MSR: value}"""
        return {int(number): value for number, value in self.msrs.items()}


class SystemSaved(_Part, frozen=True, kw_only=True):
    """Of the vCPU that is a program's system: everything that it has, and its threads (workers/linux/state.py)."""

    version: int = STATE_VERSION
    #: Packed by ``pack``; what is in it is looked at when a system is made of it.
    system: Annotated[bytes, msgspec.Meta(max_length=_SYSTEM_MAX)]
    exit: ExitState | None = None


Saved = VcpuSaved | SystemSaved


def check_state(data: Any) -> Saved:
    """The state in ``data``, which may be anything (decoded JSON or MessagePack). Raises StateError, one line
    that names the field."""
    version = data.get("version") if isinstance(data, Mapping) else None
    if isinstance(version, int) and version != STATE_VERSION:
        raise StateError(f"vCPU state version {version} is not supported: this program reads version "
                         f"{STATE_VERSION}")
    try:
        if isinstance(data, Mapping) and "system" in data:
            return msgspec.convert(data, SystemSaved)
        return msgspec.convert(data, VcpuSaved)
    except msgspec.ValidationError as exc:
        raise StateError(f"not a valid vCPU state: {exc}") from None


def check_states(data: Sequence[Any], vcpus: int, *, program: bool) -> list[Saved]:
    """The states of all vCPUs of a machine that has so many; of a ``program``'s the last is its system. Raises
    StateError, which names the vCPU."""
    if len(data) != vcpus:
        raise StateError(f"states of {len(data)} vCPUs for a machine with {vcpus}")
    states = []
    for index, one in enumerate(data):
        try:
            state = check_state(one)
        except StateError as exc:
            raise StateError(f"vcpu {index}: {exc}") from None
        wanted = SystemSaved if program and index == vcpus - 1 else VcpuSaved
        if not isinstance(state, wanted):
            raise StateError(f"vcpu {index}: is not the state of a {'system' if wanted is SystemSaved else 'CPU'}")
        states.append(state)
    return states


def plain_state(state: Saved) -> dict[str, Any]:
    """As plain data: ``xsave``, ``system`` as bytes, ``exit`` only where there is one."""
    found: dict[str, Any] = msgspec.to_builtins(state, builtin_types=(bytes,))
    if state.exit is None:
        del found["exit"]
    return found
