"""The hypercall port: whatever a guest asks for ends in a result, or in the end of that vCPU, with the reason."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bare import RAM_SIZE, Bare, bare
from machines import ACCELS, spec, until

from ipc.linux import futex
from vmm.client.machine import Machine
from vmm.errors import ExitCode
from vmm.machine.spec import MachineSpec, RamSlot
from workers.hypercalls import BadHypercall, carry_out
from workers.ports import PortEventKind

TIMEOUT = 60.0
LOAD = 0x10_0000
WORD = 0x20_0000            # of vCPU 0; vCPU 1 has the page behind it
SLOT_GPA = 0x1000_0000      # of the slot that is taken away
YIELD, WAIT, WAKE, SLEEP = range(4)
SLEEP_MS = 0x200
TOP = (1 << 64) - 1


@pytest.fixture(params=ACCELS)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def call(number: int, rdi: int, rsi: int = 0) -> bytes:
    """mov eax, number; mov rdi, …; mov rsi, …; out 0xf8, eax"""
    return (b"\xb8" + struct.pack("<I", number) + b"\x48\xbf" + struct.pack("<Q", rdi)
            + b"\x48\xbe" + struct.pack("<Q", rsi) + b"\xe7\xf8")


EXIT = b"\xe7\xf4"              # with what is in EAX
COUNT = b"\x48\xff\x04\x25" + struct.pack("<I", WORD + 0x1000) + b"\xeb\xf6"     # incq, and again


def guest(accel: str, tmp_path: Path, code: bytes, **changes: object) -> MachineSpec:
    """vCPU 0 runs ``code``; vCPU 1 counts, without end."""
    image = tmp_path / "guest.bin"
    # test rdi, rdi; jnz behind the code
    image.write_bytes(b"\x48\x85\xff\x0f\x85" + struct.pack("<i", len(code)) + code + COUNT)
    return spec("", accel=accel, image=image, load_address=LOAD, params=[], mib=4, timeout=None, **changes)


def counts(machine: Machine) -> None:
    """vCPU 1 is not concerned."""
    view = machine.ram(0)
    at = slice(WORD + 0x1000, WORD + 0x1008)
    before = bytes(view[at])
    until(lambda: bytes(view[at]) != before, "the other vCPU counts", TIMEOUT)


class Undisturbed:
    """A vCPU thread that nobody wants anything of."""

    def ends_in_hypercall(self) -> bool:
        return False

    def sleep(self, seconds: float | None = None) -> None:
        time.sleep(seconds or 0.0)


@contextmanager
def at_hypercall(accel: str, number: int, rdi: int, rsi: int) -> Iterator[Bare]:
    """A vCPU that has just made this one, and exits with its result."""
    with bare(accel, call(number, rdi, rsi) + EXIT) as vcpu:
        leave = vcpu.run()
        assert leave.event is not None
        assert leave.event.kind is PortEventKind.HYPERCALL
        yield vcpu


@pytest.mark.parametrize(("number", "rdi", "rsi", "result"), [
    (YIELD, TOP, TOP, 0), (WAIT, WORD, 5, 0), (WAIT, WORD, TOP, 0), (WAKE, WORD, 1, 0), (WAKE, WORD, 0, 0),
    (WAKE, WORD, TOP, 0), (SLEEP, 0, 0, 0), (4, 0, 0, 0xFFFF_FFFF), (0xFFFF_FFFF, TOP, TOP, 0xFFFF_FFFF),
])
def test_what_can_be_done_has_a_result(accel: str, number: int, rdi: int, rsi: int, result: int) -> None:
    with at_hypercall(accel, number, rdi, rsi) as vcpu:
        carry_out(Undisturbed(), vcpu.accel, vcpu.memory, vcpu.control)
        leave = vcpu.run()
        assert leave.event is not None
        assert (leave.event.kind, leave.event.value) == (PortEventKind.EXIT, result)


@pytest.mark.parametrize(("number", "gpa", "detail"), [
    (WAIT, WORD + 1, "0x200001 is not a multiple of 4"), (WAKE, WORD + 2, "0x200002 is not a multiple of 4"),
    (WAIT, 0x8000_0000, "0x80000000 is outside RAM"), (WAKE, 0x8000_0000, "0x80000000 is outside RAM"),
    (WAIT, TOP - 3, "outside RAM"), (WAKE, TOP, "is not a multiple of 4"), (WAIT, (1 << 63) + 8, "outside RAM"),
    (WAKE, RAM_SIZE, "outside RAM"),
])
def test_what_cannot_be_done_is_said(accel: str, number: int, gpa: int, detail: str) -> None:
    with at_hypercall(accel, number, gpa, 1) as vcpu, pytest.raises(BadHypercall, match=detail):
        carry_out(Undisturbed(), vcpu.accel, vcpu.memory, vcpu.control)


def test_a_bad_hypercall_ends_that_vcpu_with_the_reason(accel: str, tmp_path: Path) -> None:
    with Machine.launch(guest(accel, tmp_path, call(WAIT, WORD + 1) + EXIT)) as machine:
        until(lambda: bool(machine.status()["vcpus"][0]["detail"]), "its end, and why", TIMEOUT)
        vcpu = machine.status()["vcpus"][0]
        assert (vcpu["exit_reason"], vcpu["detail"]) == (
            "bad-address", f"hypercall: guest address {WORD + 1:#x} is not a multiple of 4")
        assert LOAD <= vcpu["registers"]["rip"] < LOAD + 100
        counts(machine)
        machine.stop()
        assert machine.wait(TIMEOUT)["exit_code"] == ExitCode.GUEST_CRASHED


def test_however_long_a_sleep_it_can_be_interrupted(accel: str, tmp_path: Path) -> None:
    with Machine.launch(guest(accel, tmp_path, call(SLEEP, TOP) + EXIT)) as machine:
        until(lambda: machine.status()["vcpus"][0]["state"] == "waiting", "it sleeps", TIMEOUT)
        machine.pause()
        until(lambda: machine.status()["vcpus"][0]["state"] == "paused", "it is paused", TIMEOUT)
        machine.resume()
        until(lambda: machine.status()["vcpus"][0]["state"] == "waiting", "it sleeps on", TIMEOUT)
        counts(machine)
        machine.stop()
        report = machine.wait(TIMEOUT)
        assert [v["exit_reason"] for v in report["vcpus"]] == ["stopped", "stopped"]


def test_a_wait_ends_when_its_slot_is_taken_away(accel: str, tmp_path: Path) -> None:
    slots = [RamSlot(0, 0, 4 << 20), RamSlot(1, SLOT_GPA, 1 << 20)]
    with Machine.launch(guest(accel, tmp_path, call(WAIT, SLOT_GPA) + EXIT, slots=slots)) as machine:
        until(lambda: machine.status()["vcpus"][0]["state"] == "waiting", "it waits", TIMEOUT)
        machine.memory_remove(1)
        until(lambda: bool(machine.status()["vcpus"][0]["detail"]), "its end, and why", TIMEOUT)
        vcpu = machine.status()["vcpus"][0]
        assert (vcpu["state"], vcpu["exit_reason"]) == ("exited", "bad-address")
        assert f"{SLOT_GPA:#x} is outside RAM" in vcpu["detail"]
        counts(machine)


def test_a_wake_of_nobody_wakes_nobody(accel: str) -> None:
    """The kernel would take 0 for 1."""
    with at_hypercall(accel, WAKE, WORD, 0) as vcpu:
        address = vcpu.memory.host_address(WORD)
        woken: list[bool] = []
        waiter = threading.Thread(target=lambda: woken.append(futex.wait(address, 0, TIMEOUT)))
        waiter.start()
        until(lambda: in_futex(waiter), "it waits", TIMEOUT)
        carry_out(Undisturbed(), vcpu.accel, vcpu.memory, vcpu.control)
        assert waiter.is_alive()
        assert futex.wake(address, 1) == 1
        waiter.join()


def in_futex(thread: threading.Thread) -> bool:
    """It sleeps in this call (proc_pid_syscall(5): its number comes first)."""
    return Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().split()[0] == "202"
