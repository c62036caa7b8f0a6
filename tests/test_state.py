"""A vCPU's state, moved between accelerators: the guest goes on as if nothing had happened."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from bare import DATA, STATEFUL, STATEFUL_REGISTERS, bare, finish_stateful
from machines import ACCELS

from workers.accel import AccelError

#: MSRs that go on by themselves: time stamp, APIC timer, paravirtual clocks.
_DRIFTING = {str(m) for m in (0x10, 0x6E0, 0x11, 0x12, 0x4B56_4D00, 0x4B56_4D01, 0x4000_0020)}


@pytest.mark.parametrize("target", ACCELS)
@pytest.mark.parametrize("source", ACCELS)
@pytest.mark.parametrize("privilege", ["user", "kernel"])
def test_state_moves(source: str, target: str, privilege: str) -> None:
    if privilege == "kernel" and "kvm" in (source, target):
        pytest.skip("SSE at CPL 0 cannot be had where KVM emulates it")
    with bare(source, STATEFUL, privilege=privilege, **STATEFUL_REGISTERS) as first:
        first.run()
        first.accel.set_hypercall_result(0)
        sent = msgspec.msgpack.encode(first.accel.get_state())
        before = first.accel.registers()
    state: dict[str, Any] = msgspec.msgpack.decode(sent)
    with bare(target, STATEFUL, privilege=privilege) as second:
        second.accel.set_state(state)
        assert second.accel.registers() == before
        again = second.accel.get_state()
        if source == target:
            assert {k: v for k, v in again.items() if k != "msrs"} == {
                k: v for k, v in state.items() if k != "msrs"}
            assert ({k: v for k, v in again["msrs"].items() if k not in _DRIFTING}
                    == {k: v for k, v in state["msrs"].items() if k not in _DRIFTING})
        for part in ("regs", "segments", "gdt", "idt", "debug"):
            assert part == "segments" or again[part] == state[part], part
        for name in ("cs", "ss", "ds", "fs", "gs", "tr"):
            for field in ("base", "limit", "selector", "dpl", "l", "type"):
                assert again["segments"][name][field] == state["segments"][name][field], (name, field)
        finish_stateful(second)


@pytest.mark.parametrize("accel", ACCELS)
def test_state_of_another_version_is_refused(accel: str) -> None:
    with bare(accel, b"\xf4") as vcpu, pytest.raises(AccelError, match="version 99"):
        vcpu.accel.set_state({"version": 99})


def test_what_the_software_cpu_does_not_have_is_refused() -> None:
    with bare("unicorn", STATEFUL, rcx=DATA) as vcpu:
        state = vcpu.accel.get_state()
        with pytest.raises(AccelError, match="extended registers"):
            vcpu.accel.set_state(state | {"xcr0": 7})
        with pytest.raises(AccelError, match="event under way"):
            vcpu.accel.set_state(state | {"events": state["events"] | {"nmi_pending": 1}})
