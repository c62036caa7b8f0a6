"""The KVM accelerator in this process: ring, bitmap, ends, state. What comes of whole machines is in
test_machine.py."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from bare import CODE, DATA, EXIT, RAM_SIZE, STATEFUL, Bare, bare, finish_stateful
from hypothesis import given
from hypothesis import strategies as st

from ipc.layout import DirtyGfn
from ipc.messages import ExitReason
from ipc.shm import PAGE_SIZE
from workers.accel.base import AccelError, ExitKind
from workers.accel.kvm import host
from workers.ports import PortEventKind

pytestmark = pytest.mark.kvm


def hexes(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


class Ring:
    """The kernel's ring as the coordinator sees it, harvested in plain Python."""

    def __init__(self, vcpu: Bare) -> None:
        self._count = vcpu.spec.ring_entries
        self._map = mmap.mmap(vcpu.accel.vcpu_fd, self._count * 16, offset=64 * mmap.PAGESIZE)
        self._entries = (DirtyGfn * self._count).from_buffer(self._map)
        self._next = 0

    def harvest(self) -> list[int]:
        found = []
        while self._entries[self._next % self._count].flags == 1:
            entry = self._entries[self._next % self._count]
            entry.flags = 2
            assert entry.slot == 0
            found.append(int(entry.offset))
            self._next += 1
        return found

    def close(self) -> None:
        del self._entries
        self._map.close()


@contextmanager
def ring_of(vcpu: Bare) -> Iterator[Ring]:
    ring = Ring(vcpu)
    yield ring
    ring.close()


# incq (%rbx); add $4096, %rbx; dec %rcx; jnz back
WALK = hexes("48 ff 03  48 81 c3 00100000  48 ff c9  75 f1") + EXIT


def test_entries_name_the_pages_written() -> None:
    with bare("kvm", WALK, rbx=DATA, rcx=5) as vcpu, ring_of(vcpu) as ring:
        assert vcpu.run().kind is ExitKind.PORT
        assert [p for p in ring.harvest() if p >= DATA // PAGE_SIZE] == [DATA // PAGE_SIZE + i for i in range(5)]


def test_ring_full_until_a_reset_has_freed_entries() -> None:
    pages = 3000
    with bare("kvm", WALK, rbx=DATA, rcx=pages, ram_size=32 << 20) as vcpu, ring_of(vcpu) as ring:
        seen: list[int] = []
        fulls = 0
        leave = vcpu.run()
        while leave.kind is ExitKind.RING_FULL:
            fulls += 1
            assert vcpu.run().kind is ExitKind.RING_FULL     # stays raised
            fresh = ring.harvest()
            assert 0 < len(fresh) < 1024
            seen += fresh
            assert vcpu.accel.reset_ring(len(fresh)) == len(fresh)
            leave = vcpu.run()
        assert fulls >= 2
        seen += ring.harvest()
        first = DATA // PAGE_SIZE
        seen = [p for p in seen if p >= first]
        assert sorted(set(seen)) == list(range(first, first + pages))
        # The store that met the full ring had its entry already, and gets another one when it is retried.
        assert len(seen) <= pages + fulls


def test_a_reset_that_is_short_is_said_to_be() -> None:
    with bare("kvm", WALK, rbx=DATA, rcx=5) as vcpu, ring_of(vcpu) as ring:
        vcpu.run()
        count = len(ring.harvest())
        assert vcpu.accel.reset_ring(count + 7) == count


@pytest.mark.parametrize("entries", [0x300, 512, 1023, 1025, 1 << 20])
def test_ring_bounds_are_said(entries: int) -> None:
    info = host.probe()
    with pytest.raises(AccelError, match=f"from 1024 to {info.max_entries}"), bare("kvm", b"\xf4", ring=entries):
        pass


@given(st.integers(1, 1 << 22))
def test_ring_size_rule(entries: int) -> None:
    info = host.KvmInfo(True, True, "DIRTY_LOG_RING", 65536, "")
    allowed = {1024, 2048, 4096, 8192, 16384, 32768, 65536}
    assert (host.ring_size_error(entries, info) == "") == (entries in allowed)


def test_the_largest_ring() -> None:
    with bare("kvm", WALK, rbx=DATA, rcx=5, ring=host.probe().max_entries) as vcpu, ring_of(vcpu) as ring:
        assert vcpu.run().kind is ExitKind.PORT
        assert len(ring.harvest()) >= 5


def test_bitmap_of_a_slot_that_is_no_multiple_of_64_pages() -> None:
    assert RAM_SIZE // PAGE_SIZE % 64
    last = RAM_SIZE // PAGE_SIZE - 1
    code = hexes("48 ff 03 e7 f8 48 ff 03 48 ff 01") + EXIT
    with bare("kvm", code, ring=0, rbx=DATA, rcx=last * PAGE_SIZE) as vcpu:
        def log() -> set[int]:
            count = vcpu.accel.get_dirty_log(0)
            data = ctypes.string_at(vcpu.memory.slots[0].log_address, -(-(last + 1) // 64) * 8)
            found = {i for i in range(len(data) * 8) if data[i // 8] >> i % 8 & 1}
            assert count == len(found)
            return {p for p in found if p >= DATA // PAGE_SIZE}

        vcpu.run()
        assert log() == {DATA // PAGE_SIZE}
        vcpu.accel.clear_dirty_log(0)
        assert log() == set()
        vcpu.run()
        assert log() == {DATA // PAGE_SIZE, last}
        vcpu.accel.clear_dirty_log(0)
        assert log() == set()


# --- ports and ends --------------------------------------------------------------------------------------


def test_a_hypercall_and_its_result() -> None:
    code = hexes("b8 07000000 e7 f8 ff c0 ff c0") + EXIT
    with bare("kvm", code, rdi=5, rsi=6) as vcpu:
        leave = vcpu.run()
        assert leave.event is not None
        assert leave.event.kind is PortEventKind.HYPERCALL
        assert vcpu.accel.hypercall_args() == (7, 5, 6)
        vcpu.accel.set_hypercall_result(40)
        leave = vcpu.run()
        assert leave.event is not None
        assert (leave.event.kind, leave.event.value) == (PortEventKind.EXIT, 42)


def test_string_port_access() -> None:
    code = hexes("66 ba f803 b9 03000000 48 89 de f3 6e 66 ba fd03 48 89 df 48 81 c7 00100000 6c") + EXIT
    with bare("kvm", code, rbx=DATA) as vcpu:
        vcpu.ram[DATA:DATA + 3] = list(b"hi\n")
        vcpu.run()
        assert vcpu.console == [b"hi\n"]
        assert vcpu.word(DATA + 0x1000, 1) == 0x20


@pytest.mark.parametrize(("code", "reason", "detail", "offset"), [
    ("90 0f 0b", ExitReason.EXCEPTION, "#UD", 1),
    ("31 c9 f7 f1", ExitReason.EXCEPTION, "#DE", 2),
    ("f4", ExitReason.EXCEPTION, "#GP", 0),
    ("b8 00000080 8b 00", ExitReason.BAD_ADDRESS, "read of 4 bytes at 0x80000000", 5),
    ("b8 00000080 89 00", ExitReason.BAD_ADDRESS, "write of 4 bytes at 0x80000000", 5),
    ("48 b8 0000000000010000 89 00", ExitReason.BAD_ADDRESS, "write at 0x10000000000, not mapped", 10),
    ("48 b8 001000f000000000 8b 00", ExitReason.BAD_ADDRESS, "read at 0xf0001000, not permitted", 10),
    ("e6 55", ExitReason.UNKNOWN_PORT, "write to unknown port 0x55 (1 bytes)", 0),
    ("66 ba 3412 ed", ExitReason.UNKNOWN_PORT, "read from unknown port 0x1234 (4 bytes)", 4),
])
def test_how_a_guest_ends(code: str, reason: ExitReason, detail: str, offset: int) -> None:
    with bare("kvm", hexes(code), r15=0x1234_5678_9ABC) as vcpu:
        leave = vcpu.run()
        assert leave.kind is ExitKind.END
        assert leave.reason is reason, leave
        assert detail in leave.detail
        assert leave.registers is not None
        # Of an access that it emulates, KVM may have moved RIP behind the instruction already.
        behind = len(hexes(code)) if leave.reason is ExitReason.UNKNOWN_PORT or "write of" in detail else offset
        assert leave.registers["rip"] - CODE in (offset, behind)
        assert leave.registers["r15"] == 0x1234_5678_9ABC
        assert leave.registers["cs"] & 3 == 3


def test_halt_and_triple_fault_at_kernel_privilege() -> None:
    with bare("kvm", hexes("f4"), privilege="kernel") as vcpu:
        assert vcpu.run().reason is ExitReason.HALT
    with bare("kvm", hexes("0f 01 1b 0f 0b"), privilege="kernel", rbx=DATA) as vcpu:     # lidt (%rbx); ud2
        assert vcpu.run().reason is ExitReason.TRIPLE_FAULT


# --- state ------------------------------------------------------------------------------------------------


def test_a_rebuilt_ring_keeps_the_vcpu_and_starts_anew() -> None:
    with bare("kvm", STATEFUL, rax=0x1122_3344_5566_7788, r14=99, rcx=DATA) as vcpu:
        before = len(os.listdir("/proc/self/fd"))
        vcpu.run()
        vcpu.accel.set_hypercall_result(0)
        vcpu.accel.rebuild_ring()
        assert len(os.listdir("/proc/self/fd")) == before
        with ring_of(vcpu) as ring:
            assert ring.harvest() == []
            finish_stateful(vcpu)
            assert DATA // PAGE_SIZE in ring.harvest()


# --- nothing left -----------------------------------------------------------------------------------------


def descriptors() -> list[str]:
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):       # the directory's own
            found.append(path.readlink().name)
    return sorted(name for name in found if "kvm" in name)


def test_close_leaves_no_descriptor_and_no_mapping() -> None:
    before = descriptors()
    with bare("kvm", WALK, rbx=DATA, rcx=5) as vcpu:
        vcpu.run()
        assert "kvm-vcpu" in " ".join(descriptors())
    with pytest.raises(AccelError), bare("kvm", b"\xf4", ring=512):
        pass
    assert descriptors() == before
    assert "kvm-vcpu" not in Path("/proc/self/maps").read_text()
    vcpu.accel.close()      # once more: harmless
