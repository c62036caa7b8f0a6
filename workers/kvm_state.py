"""The complete architectural state of a KVM vCPU, in the form that workers/accel.py describes: what a
snapshot stores, a migration sends, and a rebuilt ring is given back. The vCPU is out of the guest."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from typing import Any

from . import kvm_api as api
from .accel import STATE_VERSION, AccelError

__all__ = ["SEGMENTS", "get_state", "set_msr", "set_state"]

SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_SEGMENT_FIELDS = ("base", "limit", "selector", "type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable")
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
_EVENT_FIELDS = tuple(name for name, *_ in api.VcpuEvents._fields_ if name != "reserved")
#: A host that refuses one of these cannot run the guest on; all others it may not know.
_NEEDED_MSRS = frozenset({
    api.MSR_TSC, api.MSR_SYSENTER_CS, api.MSR_SYSENTER_ESP, api.MSR_SYSENTER_EIP, api.MSR_PAT, api.MSR_STAR,
    api.MSR_LSTAR, api.MSR_CSTAR, api.MSR_SYSCALL_MASK, api.MSR_KERNEL_GS_BASE})
#: In the segment registers and control registers already.
_ELSEWHERE = frozenset({api.MSR_FS_BASE, api.MSR_GS_BASE, api.MSR_EFER})


def get_state(kvm: int, vcpu: int) -> dict[str, Any]:
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
    return {
        "version": STATE_VERSION,
        "regs": {name: getattr(regs, name) for name, *_ in regs._fields_},
        "segments": {s: {f: getattr(getattr(sregs, s), f) for f in _SEGMENT_FIELDS} for s in SEGMENTS},
        "gdt": {"base": sregs.gdt.base, "limit": sregs.gdt.limit},
        "idt": {"base": sregs.idt.base, "limit": sregs.idt.limit},
        **{name: getattr(sregs, name) for name in _CONTROL},
        "xcr0": next((x.value for x in xcrs.xcrs[:xcrs.nr_xcrs] if x.xcr == 0), 1),
        "xsave": bytes(xsave.region),
        "debug": [*debug.db, debug.dr6, debug.dr7],
        "msrs": _get_msrs(kvm, vcpu),
        "events": {name: getattr(events, name) for name in _EVENT_FIELDS},
        "mp_state": mp_state.mp_state,
    }


def set_state(vcpu: int, state: Mapping[str, Any]) -> None:
    """Raises AccelError when this host cannot take it over."""
    if state.get("version") != STATE_VERSION:
        raise AccelError(f"vCPU state of version {state.get('version')}: this program knows {STATE_VERSION}")
    regs, sregs, xcrs = api.Regs(**state["regs"]), api.Sregs(), api.Xcrs()
    for name in SEGMENTS:
        setattr(sregs, name, api.Segment(**state["segments"][name]))
    sregs.gdt, sregs.idt = api.Dtable(**state["gdt"]), api.Dtable(**state["idt"])
    for name in _CONTROL:
        setattr(sregs, name, state[name])
    xsave = api.Xsave.from_buffer_copy(state["xsave"].ljust(ctypes.sizeof(api.Xsave), b"\0"))
    xcrs.nr_xcrs = 1
    xcrs.xcrs[0].value = state["xcr0"]
    debug = api.DebugRegs()
    debug.db[:] = state["debug"][:4]
    debug.dr6, debug.dr7 = state["debug"][4:]
    try:
        api.ioctl(vcpu, api.SET_SREGS, sregs)
        with contextlib.suppress(OSError):      # a host without XSAVE has no XCR0 to set
            api.ioctl(vcpu, api.SET_XCRS, xcrs)
        api.ioctl(vcpu, api.SET_XSAVE, xsave)
        api.ioctl(vcpu, api.SET_REGS, regs)
        api.ioctl(vcpu, api.SET_DEBUGREGS, debug)
        for index, value in state["msrs"].items():
            if not set_msr(vcpu, int(index), value) and int(index) in _NEEDED_MSRS:
                raise AccelError(f"this host's KVM refuses MSR {int(index):#x} = {value:#x} of the saved state")
        api.ioctl(vcpu, api.SET_VCPU_EVENTS, api.VcpuEvents(**state["events"]))
        api.ioctl(vcpu, api.SET_MP_STATE, api.MpState(state["mp_state"]))
    except OSError as exc:
        raise AccelError(f"this host's KVM refuses the saved vCPU state: {exc.strerror}") from None


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
