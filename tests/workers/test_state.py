"""A vCPU's state, moved between accelerators: the guest goes on as if nothing had happened."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bare import DATA, EXIT, STATEFUL, STATEFUL_REGISTERS, Bare, bare, finish_stateful
from machines import ACCELS, spec, until

from ipc.messages import ExitReason
from vmm.client.machine import Machine
from vmm.errors import VmmError
from workers.accel.base import AccelError
from workers.ports import PortEventKind
from workers.state import ExitState, StateError, SystemSaved, VcpuSaved, check_state, check_states, plain_state

#: MSRs that go on by themselves: time stamp, APIC timer, paravirtual clocks.
_DRIFTING = {str(m) for m in (0x10, 0x6E0, 0x11, 0x12, 0x4B56_4D00, 0x4B56_4D01, 0x4000_0020)}


#: Stops for a hypercall, then puts R14 into RBX, and R15 to memory at RCX: nothing that KVM cannot emulate.
PLAIN = bytes.fromhex("e7f8 4c89f3 4c8939 31c0".replace(" ", "")) + EXIT
PLAIN_REGISTERS = {"r14": 99, "r15": 0x8877_6655_4433_2211, "rcx": DATA}


def finish_plain(vcpu: Bare) -> None:
    leave = vcpu.run()
    assert leave.event is not None
    assert leave.event.kind is PortEventKind.EXIT
    assert vcpu.accel.registers()["rbx"] == 99
    assert vcpu.word(DATA) == 0x8877_6655_4433_2211


@pytest.mark.parametrize("target", ACCELS)
@pytest.mark.parametrize("source", ACCELS)
@pytest.mark.parametrize("privilege", ["user", "kernel"])
def test_state_moves(source: str, target: str, privilege: str) -> None:
    """(At CPL 0 without SSE where KVM is one of the two: it may have to emulate the guest.)"""
    full = privilege == "user" or "kvm" not in (source, target)
    code, registers, finish = ((STATEFUL, STATEFUL_REGISTERS, finish_stateful) if full
                               else (PLAIN, PLAIN_REGISTERS, finish_plain))
    with bare(source, code, privilege=privilege, **registers) as first:
        first.run()
        first.accel.set_hypercall_result(0)
        sent = msgspec.msgpack.encode(plain_state(first.accel.get_state()))
        before = first.accel.registers()
    state = check_state(msgspec.msgpack.decode(sent))
    with bare(target, code, privilege=privilege) as second:
        second.accel.set_state(state)
        assert second.accel.registers() == before
        again = second.accel.get_state()
        if source == target:
            assert msgspec.structs.replace(again, msrs={}) == msgspec.structs.replace(state, msrs={})
            assert ({k: v for k, v in again.msrs.items() if k not in _DRIFTING}
                    == {k: v for k, v in state.msrs.items() if k not in _DRIFTING})
        for part in ("regs", "gdt", "idt", "debug"):
            assert getattr(again, part) == getattr(state, part), part
        for name in ("cs", "ss", "ds", "fs", "gs", "tr"):
            for field in ("base", "limit", "selector", "dpl", "l", "type"):
                assert (getattr(getattr(again.segments, name), field)
                        == getattr(getattr(state.segments, name), field)), (name, field)
        finish(second)


def test_what_the_software_cpu_does_not_have_is_refused() -> None:
    with bare("unicorn", STATEFUL, rcx=DATA) as vcpu:
        state = vcpu.accel.get_state()
        with pytest.raises(AccelError, match="extended registers"):
            vcpu.accel.set_state(msgspec.structs.replace(state, xcr0=7))
        pending = msgspec.structs.replace(state.events, nmi_pending=1)
        with pytest.raises(AccelError, match="pending event"):
            vcpu.accel.set_state(msgspec.structs.replace(state, events=pending))


@pytest.mark.parametrize("accel", ACCELS)
def test_a_state_that_is_none_fails_at_once_and_a_good_one_is_taken_then(accel: str, tmp_path: Path) -> None:
    """It goes through the coordinator to the workers, whose service threads live on."""
    with Machine.launch(spec("idle", accel=accel, milliseconds=0, timeout=None), start=False) as machine:
        machine.start()
        machine.pause()
        good = machine.state()["vcpus"]
        machine.resume()
    with Machine.launch(spec("idle", accel=accel, milliseconds=0, timeout=None), start=False) as machine:
        for changes in ({"regs": {"rax": "x"}}, {"segments": []}, {"debug": [0]}, {"msrs": {"16": "x"}},
                        {"exit": {"reason": 77, "code": 0, "detail": ""}}, {"exit": {}}):
            with pytest.raises(VmmError, match="vcpu 1: not a valid vCPU state"):
                machine.set_state([good[0], {**good[1], **changes}])
        with pytest.raises(VmmError, match="states of 1 vCPUs for a machine with 2"):
            machine.set_state(good[:1])
        # Well-formed, but not what this CPU can be: the worker says so.
        with pytest.raises(VmmError, match="vcpu 1: "):
            machine.set_state([good[0], {**good[1], "efer": 0, "cr0": 1 << 31}])
        machine.set_state(good)
        machine.start()
        until(lambda: all(v["state"] == "waiting" for v in machine.status()["vcpus"]), "both sleep again", 60.0)


@pytest.mark.parametrize("accel", ACCELS)
def test_a_vcpu_that_had_ended_has_ended_when_it_is_restored(accel: str, tmp_path: Path) -> None:
    """vCPU 0 exits with code 7, vCPU 1 sleeps: so it is in the machine that goes on, and no step is made."""
    image = tmp_path / "guest.bin"
    # test rdi, rdi; jnz behind; mov eax, 7; exit; sleep for ever
    code = "4885ff 7507 b807000000 e7f4 b803000000 48c7c7ffffff7f e7f8 ebf0"
    image.write_bytes(bytes.fromhex(code.replace(" ", "")))
    machine_spec = spec("", accel=accel, image=image, load_address=0x10_0000, params=[], mib=4, timeout=None)
    with Machine.launch(machine_spec) as first:
        until(lambda: [v["state"] for v in first.status()["vcpus"]] == ["exited", "waiting"], "7 and a sleep", 60.0)
        first.pause()
        states = first.state()["vcpus"]
        memory = first.ram(0).copy()
    assert states[0]["exit"] == {"reason": 1, "code": 7, "detail": ""}
    assert "exit" not in states[1]
    with Machine.launch(machine_spec, start=False) as second:
        second.ram(0, writable=True)[:] = memory
        second.set_state(states)
        second.pause()
        second.start()
        kept = second.state()["vcpus"]      # it has not been let go on from where it was
        assert (kept[0]["exit"], "exit" in kept[1]) == (states[0]["exit"], False)
        second.resume()
        until(lambda: [v["state"] for v in second.status()["vcpus"]] == ["exited", "waiting"], "the same", 60.0)
        vcpu = second.status()["vcpus"][0]
        assert (vcpu["exit_reason"], vcpu["exit_code"], vcpu["guest_entries"]) == ("code", 7, 0)


# --- the format ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved() -> VcpuSaved:
    with bare("unicorn", STATEFUL, rcx=DATA) as vcpu:
        return vcpu.accel.get_state()


def test_a_state_survives_every_way_out_of_the_process(saved: VcpuSaved) -> None:
    ended = msgspec.structs.replace(saved, exit=ExitState(ExitReason.CODE, -7, "why"))
    for state in (saved, ended):
        plain = plain_state(state)
        assert check_state(plain) == state
        assert check_state(msgspec.msgpack.decode(msgspec.msgpack.encode(plain))) == state
        text = {**plain, "xsave": base64.b64encode(plain["xsave"]).decode()}
        assert check_state(json.loads(json.dumps(text))) == state
    assert "exit" not in plain_state(saved)


def test_all_64_bits_are_taken(saved: VcpuSaved) -> None:
    top = (1 << 64) - 1
    plain = plain_state(saved)
    plain["regs"]["rax"] = plain["cr2"] = plain["msrs"]["16"] = top
    assert check_state(plain).regs.rax == top


#: What the state says instead -> what the error must name.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"version": 99}, "version 99 is not supported: this program reads version 1"),
    ({"version": "1"}, "version"),
    ({"regs": "x"}, r"\$\.regs"), ({"regs": {"rax": "x"}}, "regs"), ({"regs": {}}, "rax"),
    ({"regs.rax": "x"}, r"\$\.regs\.rax"), ({"regs.rax": 1 << 64}, "more than 64 bits"),
    ({"regs.rax": -1}, r"\$\.regs\.rax"), ({"regs.rax": True}, r"\$\.regs\.rax"), ({"regs.xyz": 1}, "xyz"),
    ({"segments": []}, r"\$\.segments"), ({"segments.cs": None}, r"\$\.segments\.cs"),
    ({"segments.cs.selector": 1 << 16}, "selector"), ({"segments.cs.dpl": 256}, "dpl"),
    ({"gdt.limit": 1 << 16}, "limit"), ({"cr3": 1.5}, "cr3"), ({"cr3": 1 << 64}, "cr3"),
    ({"xsave": b""}, "xsave"), ({"xsave": bytes(4097)}, "xsave"), ({"xsave": "%"}, "xsave"),
    ({"xsave": 4}, "xsave"),
    ({"debug": [0] * 5}, "debug"), ({"debug": ["x"] * 6}, "debug"), ({"debug": [1 << 64] * 6}, "debug"),
    ({"msrs": {"x": 1}}, "'x' is not an MSR number"), ({"msrs": {"99999999999": 1}}, "not an MSR number"),
    ({"msrs": {"16": "x"}}, "msrs"), ({"msrs": {"16": 1 << 64}}, "MSR"), ({"msrs": [1]}, "msrs"),
    ({"msrs": {"\u0661": 1}}, "not an MSR number"),
    ({"events.nmi_pending": 300}, "nmi_pending"), ({"mp_state": -1}, "mp_state"), ({"colour": "red"}, "colour"),
    ({"exit": {}}, r"\$\.exit|reason"), ({"exit": "ended"}, "exit"),
    ({"exit": {"reason": 77, "code": 0, "detail": ""}}, "reason UNKNOWN"),
    ({"exit": {"reason": "1", "code": 0, "detail": ""}}, "reason"),
    ({"exit": {"reason": 0, "code": 0, "detail": ""}}, "reason NONE"),
    ({"exit": {"reason": 10, "code": 0, "detail": ""}}, "reason WORKER_DIED"),
    ({"exit": {"reason": 1, "code": "0", "detail": ""}}, "code"),
    ({"exit": {"reason": 1, "code": 1 << 31, "detail": ""}}, "code"),
    ({"exit": {"reason": 1, "code": 0, "detail": 5}}, "detail"),
    ({"exit": {"reason": 1, "code": 0, "detail": "x" * 1001}}, "detail"),
]


def changed(state: VcpuSaved, changes: dict[str, Any]) -> dict[str, Any]:
    plain = plain_state(state)
    for path, value in changes.items():
        *parents, last = path.split(".")
        at = plain
        for name in parents:
            at = at[name]
        at[last] = value
    return plain


@pytest.mark.parametrize(("changes", "error"), WRONG)
def test_what_is_not_a_state_is_one_line_that_names_the_field(saved: VcpuSaved, changes: dict[str, Any],
                                                              error: str) -> None:
    with pytest.raises(StateError, match=error) as caught:
        check_state(changed(saved, changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, 5, "x", [], {}, {"version": 1}, [[]], b"x"])
def test_anything_else_is_not_a_state_either(data: Any) -> None:
    with pytest.raises(StateError):
        check_state(data)


def test_states_of_a_machine(saved: VcpuSaved) -> None:
    plain = plain_state(saved)
    assert check_states([plain, plain], 2, program=False) == [saved, saved]
    system = plain_state(SystemSaved(system=b"anything"))
    assert check_states([plain, system], 2, program=True) == [saved, SystemSaved(system=b"anything")]
    for states, program in (([plain, system], False), ([plain, plain], True), ([system, plain], True)):
        with pytest.raises(StateError, match=r"vcpu [01]: is not the state of a"):
            check_states(states, 2, program=program)
    with pytest.raises(StateError, match="states of 1 vCPUs for a machine with 2"):
        check_states([plain], 2, program=False)
    with pytest.raises(StateError, match=r"vcpu 1: not a valid vCPU state: .*cr3"):
        check_states([plain, changed(saved, {"cr3": None})], 2, program=False)
