"""Guests that are no programs: bytes at random, and instructions at random. The machine ends as it says, and nothing of
it but the guest."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from machines import ACCELS, nothing_left, spec
from surface import Surface

from vmm.client.machine import Machine
from vmm.errors import ExitCode
from vmm.machine.records import log_path

VCPUS = 8           # programs of a machine: each vCPU has its own
LOAD = 0x10_0000
PROGRAM = 4096      # bytes
SECONDS = 1.0       # that a machine may run

#: mov rax, rdi (the vCPU's index); shl rax, 12; lea rcx, [rip + 0xff2] (LOAD + 4096); add rax, rcx; jmp rax
ENTER = bytes.fromhex("4889f8 48c1e00c 488d0df20f0000 4801c8 ffe0")

#: What random bytes seldom are, and what a CPU in software may not be up to.
PIECES = [bytes.fromhex(text) for text in (
    # system, ports
    "0f05", "0f34", "0f01c1", "0f01d9", "0fa2", "0f31", "0f30", "0f32", "f4", "cc", "cd80", "cd03", "0f0b", "ee",
    "ef", "ec", "ed", "e6f4", "e7f8", "66ed",
    # control registers, returns
    "0f20c0", "0f22d8", "0f22e0", "0f01d0", "0f01f8", "0f01d1", "0f09", "0f08", "0f06", "cf", "48cf", "cb", "9d",
    "9c", "fa", "fb",
    # strings, stack
    "f3a4", "f348ab", "f3aa", "f2ae", "fd", "fc", "f348a5", "c8ffff02", "c9", "50", "58", "5c", "54",
    # locked
    "f00fb10b", "f0480fb10b", "f00fc10b", "f0480fc70b", "f083030f", "f0fe03", "f087", "480fc70b", "f0480fab0b",
    "f00fb303",
    # xsave, fpu
    "0fae03", "480fae03", "0fae0b", "0fae23", "0fae2b", "0fc733", "0fc7f0", "0fae13", "0fae1b", "dfe0", "d9d0",
    "dd33", "dd23",
    # vectors
    "c5fc10", "c4e27d", "62f17c48", "0f3800", "66450f3a0f", "0f77", "0f18", "0f0d03", "0fc38b",
    # jumps, prefixes
    "ebfe", "e8fbffffff", "ff13", "ff23", "ff2b", "ff1b", "ea", "6766", "2e66", "f0f0f0", "4f4f4f",
    "262626262626262626262626262626",
    # memory
    "488b03", "488903", "488b04250000", "48a1", "48a3", "c7030000", "4889e3", "4889d3", "488d1d00000000", "4831db",
    "48ffcb",
)]


def program(chance: random.Random) -> bytes:
    """Registers that point somewhere, then instructions, or what may be some."""
    code = bytearray()
    for register in range(8):       # mov r64, imm64
        value = chance.choice([0, LOAD, LOAD + PROGRAM * chance.randrange(10), 0x3F8, 0xF8, 0xF4, 3, 1 << 47, -1,
                               (1 << 64) - 8, chance.getrandbits(64), chance.getrandbits(23)])
        if register != 4 or chance.random() < 0.3:      # the stack is often left where it is
            code += bytes([0x48, 0xB8 + register]) + (value % (1 << 64)).to_bytes(8, "little")
    while len(code) < chance.choice([40, 200, PROGRAM]):
        code += chance.choice(PIECES) if chance.random() < 0.5 else chance.randbytes(chance.randrange(1, 8))
    return bytes(code[:PROGRAM]).ljust(PROGRAM, chance.choice([b"\0", b"\xf4", b"\x90", b"\xc3"]))


@pytest.mark.parametrize("accel", ACCELS)
def test_random_code(surface: Surface, accel: str, tmp_path: Path) -> None:
    """On the software CPU at length; on KVM, whose host is shared, a few at CPL 3."""
    software = accel != "kvm"
    image = tmp_path / "image"
    for seed in range(max(2, surface.inputs // 10 // VCPUS) if software else 2):
        chance = random.Random(seed)
        image.write_bytes(ENTER.ljust(PROGRAM, b"\xf4") + b"".join(program(chance) for _ in range(VCPUS)))
        made = spec("", accel=accel, name="fuzz-code", image=image, load_address=LOAD, params=[], vcpus=VCPUS, mib=4,
                    timeout=SECONDS, privilege="kernel" if software and seed % 2 else "user")
        with Machine.launch(made) as machine:
            report = machine.wait(60.0)
        ended = {vcpu["exit_reason"]: vcpu["detail"] for vcpu in report["vcpus"]}
        assert report["exit_code"] in (ExitCode.OK, ExitCode.GUEST_FAILED, ExitCode.GUEST_CRASHED, ExitCode.TIMEOUT), (
            seed, report)
        assert not any("its worker" in detail for detail in ended.values()), (seed, ended)
        assert report["coordinator"]["restarts"] == 0, seed
        assert "Traceback" not in log_path("fuzz-code").read_text(), seed
        assert nothing_left("fuzz-code"), seed
        surface.counts["taken"] += sum(vcpu["exit_reason"] == "timeout" for vcpu in report["vcpus"])
        surface.counts["refused"] += sum(vcpu["exit_reason"] != "timeout" for vcpu in report["vcpus"])
