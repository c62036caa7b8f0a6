"""The complete architectural state of a KVM vCPU, in and out (workers/state.py has the format). The vCPU is out
of the guest."""

from __future__ import annotations

import contextlib
import ctypes
from typing import TypeVar

import msgspec

from ... import msr
from ...state import EventsState, RegsState, SegmentsState, SegmentState, TableState, VcpuSaved
from ..base import AccelError
from . import api

__all__ = ["get_state", "set_msr", "set_state"]

_State = TypeVar("_State", bound=msgspec.Struct)

_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
#: A host that refuses one of these cannot run the guest on; all others it may not know.
_NEEDED_MSRS = frozenset(msr.STATE)
#: In the segment registers and control registers already.
_ELSEWHERE = frozenset({msr.FS_BASE, msr.GS_BASE, msr.EFER})


def get_state(kvm: int, vcpu: int) -> VcpuSaved:
    """Raises OSError."""
    regs, sregs, xsave, xcrs = api.Regs(), api.Sregs(), api.Xsave(), api.Xcrs()
    debug, events, mp_state = api.DebugRegs(), api.VcpuEvents(), api.MpState()
    api.ioctl(vcpu, api.GET_REGS, regs)
    api.ioctl(vcpu, api.GET_SREGS, sregs)
    api.ioctl(vcpu, api.GET_XSAVE, xsave)
    api.ioctl(vcpu, api.GET_XCRS, xcrs)
    api.ioctl(vcpu, api.GET_DEBUGREGS, debug)
    api.ioctl(vcpu, api.GET_VCPU_EVENTS, events)
    api.ioctl(vcpu, api.GET_MP_STATE, mp_state)
    return VcpuSaved(
        regs=_from(regs, RegsState),
        segments=SegmentsState(**{s: _from(getattr(sregs, s), SegmentState)
                                  for s in SegmentsState.__struct_fields__}),
        gdt=_from(sregs.gdt, TableState), idt=_from(sregs.idt, TableState),
        **{name: getattr(sregs, name) for name in _CONTROL},
        xcr0=next((x.value for x in xcrs.xcrs[:xcrs.nr_xcrs] if x.xcr == 0), 1),
        xsave=bytes(xsave.region), debug=(*debug.db, debug.dr6, debug.dr7), msrs=_get_msrs(kvm, vcpu),
        events=_from(events, EventsState), mp_state=mp_state.mp_state)


def _from(raw: ctypes.Structure, kind: type[_State]) -> _State:
    """KVM's structure as ours; the fields have the same names."""
    return kind(**{name: getattr(raw, name) for name in kind.__struct_fields__})


def set_state(vcpu: int, state: VcpuSaved) -> None:
    """Raises AccelError when this host cannot take it over."""
    regs, sregs, xcrs = api.Regs(**msgspec.structs.asdict(state.regs)), api.Sregs(), api.Xcrs()
    for name, segment in msgspec.structs.asdict(state.segments).items():
        setattr(sregs, name, api.Segment(**msgspec.structs.asdict(segment)))
    for name in ("gdt", "idt"):
        setattr(sregs, name, api.Dtable(**msgspec.structs.asdict(getattr(state, name))))
    for name in _CONTROL:
        setattr(sregs, name, getattr(state, name))
    xsave = api.Xsave.from_buffer_copy(state.xsave.ljust(ctypes.sizeof(api.Xsave), b"\0"))
    xcrs.nr_xcrs = 1
    xcrs.xcrs[0].value = state.xcr0
    debug = api.DebugRegs()
    debug.db[:] = state.debug[:4]
    debug.dr6, debug.dr7 = state.debug[4:]
    try:
        api.ioctl(vcpu, api.SET_SREGS, sregs)
        with contextlib.suppress(OSError):      # a host without XSAVE has no XCR0 to set
            api.ioctl(vcpu, api.SET_XCRS, xcrs)
        api.ioctl(vcpu, api.SET_XSAVE, xsave)
        api.ioctl(vcpu, api.SET_REGS, regs)
        api.ioctl(vcpu, api.SET_DEBUGREGS, debug)
        for index, value in state.msr_values.items():
            if not set_msr(vcpu, index, value) and index in _NEEDED_MSRS:
                raise AccelError(f"this host's KVM rejected MSR {index:#x} = {value:#x} of the saved state")
        api.ioctl(vcpu, api.SET_VCPU_EVENTS, api.VcpuEvents(**msgspec.structs.asdict(state.events)))
        api.ioctl(vcpu, api.SET_MP_STATE, api.MpState(state.mp_state))
    except OSError as exc:
        raise AccelError(f"this host's KVM rejected the saved vCPU state: {exc.strerror}") from None


def _get_msrs(kvm: int, vcpu: int) -> dict[str, int]:
    """Every MSR that KVM says it saves and that can be read, by its number in decimal."""
    known = api.MsrList(nmsrs=1024)
    api.ioctl(kvm, api.GET_MSR_INDEX_LIST, known)
    found = {}
    for index in known.indices[:known.nmsrs]:
        one = api.OneMsr(nmsrs=1, entry=api.MsrEntry(index=index))
        if index not in _ELSEWHERE and api.ioctl(vcpu, api.GET_MSRS, one) == 1:
            found[str(index)] = one.entry.data
    return found


def set_msr(vcpu: int, index: int, value: int) -> bool:
    """False when KVM does not take it (KVM_SET_MSRS counts those it took)."""
    return api.ioctl(vcpu, api.SET_MSRS, api.OneMsr(nmsrs=1, entry=api.MsrEntry(index=index, data=value))) == 1
