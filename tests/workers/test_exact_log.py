"""The dirty log has what a guest wrote, and nothing that it only read: with rings and bitmaps, at either privilege,
in hot-added memory, after a slot was taken away and after a VM was made anew."""

from __future__ import annotations

import ctypes
import mmap
import struct
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bare import DATA, EXIT, Bare, bare
from machines import spec, until

from ipc.layout import SYSTEM_SLOT, DirtyGfn
from ipc.messages import ExitReason, SlotSpec
from ipc.shm import PAGE_SIZE, Segment
from vmm.client.machine import Machine
from vmm.machine import boot
from vmm.machine.names import segment_name
from workers.accel.base import ExitKind
from workers.accel.kvm import host
from workers.accel.kvm import tables as kvm_tables
from workers.accel.kvm.tables import PageTables
from workers.ports import PortEventKind

exact = pytest.mark.skipif(host.nested_paging(), reason="nested paging: KVM logs what it maps for a read")
ON_BOTH = [pytest.param("kvm", marks=[pytest.mark.kvm, exact]), pytest.param("unicorn")]

PAGES = 500
FIRST = DATA // PAGE_SIZE
STOP = bytes.fromhex("b800000000 e7f8".replace(" ", ""))    # the hypercall yield: here, a stop between two parts


def walk(access: str, first: int, pages: int) -> bytes:
    """Code that reads, or increments, a word in each of these pages."""
    body = bytes.fromhex({"read": "488b03", "write": "48ff03"}[access])
    return (b"\x48\xbb" + struct.pack("<Q", first * PAGE_SIZE)      # mov rbx, first
            + b"\x48\xc7\xc1" + struct.pack("<I", pages)            # mov rcx, pages
            + body + bytes.fromhex("4881c300100000 48ffc9 75f1".replace(" ", "")))


class Log:
    """What a bare vCPU has dirtied since the last time, as (slot, page), from its ring or its bitmaps."""

    def __init__(self, vcpu: Bare) -> None:
        self._vcpu = vcpu
        self._mapping: mmap.mmap | None = None
        self._next = 0

    def take(self) -> set[tuple[int, int]]:
        return self._entries() if self._vcpu.spec.ring_entries else self._bits()

    def _bits(self) -> set[tuple[int, int]]:
        found = set()
        for slot in self._vcpu.memory.slots.values():
            if slot.log_segment is not None:
                count = self._vcpu.accel.get_dirty_log(slot.spec.id)
                data = ctypes.string_at(slot.log_address, -(-slot.spec.size // PAGE_SIZE // 64) * 8)
                self._vcpu.accel.clear_dirty_log(slot.spec.id)
                here = {(slot.spec.id, i) for i in range(len(data) * 8) if data[i // 8] >> i % 8 & 1}
                assert len(here) == count
                found |= here
        return found

    def _entries(self) -> set[tuple[int, int]]:
        vcpu, count, found = self._vcpu, self._vcpu.spec.ring_entries, set()
        if vcpu.accel.vcpu_fd < 0:
            ring = vcpu.ring()
        else:
            self._mapping = self._mapping or mmap.mmap(vcpu.accel.vcpu_fd, count * 16, offset=64 * mmap.PAGESIZE)
            ring = (DirtyGfn * count).from_buffer(self._mapping)
        taken = 0
        while ring[self._next % count].flags == 1:
            entry = ring[self._next % count]
            entry.flags = 2
            found.add((int(entry.slot), int(entry.offset)))
            self._next += 1
            taken += 1
        del ring
        assert vcpu.accel.reset_ring(taken) == taken
        return found

    def forget(self) -> None:
        """The vCPU has another ring now."""
        if self._mapping is not None:
            self._mapping.close()
        self._mapping, self._next = None, 0


@contextmanager
def logged(accel: str, *parts: bytes, **arguments: Any) -> Iterator[tuple[Bare, Log]]:
    """A vCPU that stops after each of these parts."""
    with bare(accel, STOP.join(parts) + EXIT, **arguments) as vcpu:
        log = Log(vcpu)
        try:
            yield vcpu, log
        finally:
            log.forget()


def go(vcpu: Bare) -> None:
    """To the end of this part."""
    leave = vcpu.run()
    assert leave.kind is ExitKind.PORT, leave
    if leave.event is not None and leave.event.kind is PortEventKind.HYPERCALL:
        vcpu.accel.set_hypercall_result(0)


def pages_of(slot: int, first: int, pages: int) -> set[tuple[int, int]]:
    return {(slot, page) for page in range(first, first + pages)}


@pytest.mark.parametrize("privilege", ["user", "kernel"])
@pytest.mark.parametrize("ring", [0, 4096])
@pytest.mark.parametrize("accel", ON_BOTH)
def test_reads_leave_no_page_and_writes_leave_theirs(accel: str, ring: int, privilege: str) -> None:
    """In all of the memory: the image is read, too."""
    with logged(accel, walk("read", FIRST, PAGES), walk("write", FIRST + 100, 99), walk("read", FIRST, PAGES),
                walk("write", FIRST + 150, 60), ring=ring, privilege=privilege) as (vcpu, log):
        go(vcpu)
        assert log.take() == set()
        go(vcpu)
        assert log.take() == pages_of(0, FIRST + 100, 99)
        go(vcpu)
        assert log.take() == set()
        go(vcpu)
        assert log.take() == pages_of(0, FIRST + 150, 60)


@contextmanager
def another_slot(vcpu: Bare, slot_id: int, gpa: int, size: int) -> Iterator[SlotSpec]:
    """RAM for ``set_memslot``."""
    name = f"exact{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        ram = stack.enter_context(Segment.create(segment_name(name, "ram"), size))
        bits = stack.enter_context(Segment.create(segment_name(name, "vlog"), size // PAGE_SIZE // 8 + 8))
        slot = SlotSpec(id=slot_id, gpa=gpa, size=size, segment=ram.name, log=True, log_segment=bits.name)
        vcpu.memory.add(slot)
        yield slot
        if slot_id in vcpu.memory.slots:
            vcpu.memory.remove(slot_id)


@pytest.mark.parametrize("ring", [0, 4096])
@pytest.mark.parametrize("accel", ON_BOTH)
def test_hot_added_memory(accel: str, ring: int) -> None:
    """Not at the start of 2 MiB, and with a part of the last 2 MiB that is no RAM."""
    gpa, pages = (1 << 30) + 5 * PAGE_SIZE, 600
    at = gpa // PAGE_SIZE
    with logged(accel, walk("read", FIRST, 1), walk("read", at, pages), walk("write", at + 7, 550),
                walk("read", at, pages), ring=ring) as (vcpu, log):
        go(vcpu)
        with another_slot(vcpu, 3, gpa, pages * PAGE_SIZE) as slot:
            vcpu.accel.set_memslot(slot)
            go(vcpu)
            assert log.take() == set()
            go(vcpu)
            assert log.take() == pages_of(3, 7, 550)
            go(vcpu)
            assert log.take() == set()
            vcpu.accel.remove_memslot(3)


@pytest.mark.parametrize("ring", [0, 4096])
@pytest.mark.parametrize("accel", ON_BOTH)
def test_what_was_written_is_only_read_after_a_slot_has_gone(accel: str, ring: int) -> None:
    """KVM forgets every mapping then, and maps each page again at its next access."""
    with logged(accel, walk("write", FIRST, PAGES), walk("read", FIRST, PAGES), walk("write", FIRST + 9, 1),
                ring=ring) as (vcpu, log):
        go(vcpu)
        with another_slot(vcpu, 3, 1 << 30, 2 << 20) as slot:
            vcpu.accel.set_memslot(slot)
            assert log.take() == pages_of(0, FIRST, PAGES)
            vcpu.accel.remove_memslot(3)
        go(vcpu)
        assert log.take() == set()
        go(vcpu)
        assert log.take() == pages_of(0, FIRST + 9, 1)


@pytest.mark.parametrize("accel", ON_BOTH)
def test_what_was_written_is_only_read_after_a_ring_was_rebuilt(accel: str) -> None:
    with logged(accel, walk("write", FIRST, PAGES), walk("read", FIRST, PAGES), walk("write", FIRST + 9, 1),
                ring=4096) as (vcpu, log):
        go(vcpu)
        assert log.take() == pages_of(0, FIRST, PAGES)
        log.forget()
        vcpu.accel.rebuild_ring()
        go(vcpu)
        assert log.take() == set()
        go(vcpu)
        assert log.take() == pages_of(0, FIRST + 9, 1)


@pytest.mark.kvm
def test_memory_that_has_no_tables_of_its_own_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the most that tables may take: large pages, exact until the first write in one."""
    monkeypatch.setattr(kvm_tables, "TABLES_MAX", PAGE_SIZE)
    with logged("kvm", walk("read", FIRST, PAGES), walk("write", FIRST, 20), walk("read", FIRST, PAGES),
                ring=4096) as (vcpu, log):
        go(vcpu)
        if not host.nested_paging():
            assert log.take() == set()
        go(vcpu)
        assert log.take() >= pages_of(0, FIRST, 20)
        go(vcpu)
        assert log.take() <= pages_of(0, FIRST, 512)


#: vCPU 0 writes PAGES pages and ends. vCPU 1 sleeps until the host has written to the page FLAG, then reads them,
#: writes to the page behind it, and ends.
FLAG = FIRST + PAGES + 8


def two_vcpus() -> bytes:
    done = bytes.fromhex("31c0") + EXIT
    writer = walk("write", FIRST, PAGES) + done
    flag = struct.pack("<I", FLAG * PAGE_SIZE)
    # sleep 1 ms; cmp [flag], 0; je back
    wait = (bytes.fromhex("b803000000 bfe8030000 e7f8 833c25".replace(" ", "")) + flag
            + bytes.fromhex("00 74ea".replace(" ", "")))
    reader = (wait + walk("read", FIRST, PAGES) + bytes.fromhex("ff0425")
              + struct.pack("<I", (FLAG + 1) * PAGE_SIZE) + done)
    return bytes.fromhex("4885ff 0f85".replace(" ", "")) + struct.pack("<i", len(writer)) + writer + reader


@pytest.mark.parametrize("ring", [0, 4096])
@pytest.mark.parametrize("accel", ON_BOTH)
def test_what_another_vcpu_has_written_is_only_read(accel: str, ring: int, tmp_path: Path) -> None:
    image = tmp_path / "two.bin"
    image.write_bytes(two_vcpus())
    machine_spec = spec("", accel=accel, ring=ring, image=image, load_address=0x10_0000, params=[])
    with Machine.launch(machine_spec, start=False) as machine:
        machine.register("a")
        machine.start()
        until(lambda: machine.status()["vcpus"][0]["state"] == "exited", "the writer's end")
        assert machine.sync("a").slots[0] == [(FIRST, PAGES)]
        machine.write(FLAG * PAGE_SIZE, b"\1")
        until(lambda: machine.status()["vcpus"][1]["state"] == "exited", "the reader's end")
        assert machine.sync("a").slots[0] == [(FLAG, 2)]
        assert machine.wait(30)["exit_code"] == 0


# --- page tables of the guest's own ------------------------------------------------------------------------

TABLES = DATA + 0x10_0000


def own_tables(vcpu: Bare) -> None:
    """The same identity map, in RAM, with no accessed or dirty bit set."""
    def put(at: int, value: int) -> None:
        vcpu.ram[at:at + 8] = np.frombuffer(struct.pack("<Q", value), np.uint8)

    put(TABLES, TABLES + 0x1000 | 7)
    for gib in (0, 3):      # RAM; the system slot
        directory = TABLES + 0x2000 + gib * 0x1000
        put(TABLES + 0x1000 + 8 * gib, directory | 7)
        for i in range(512):
            put(directory + 8 * i, gib << 30 | i << 21 | 0x87)


LOAD_CR3 = bytes.fromhex("48c7c0") + struct.pack("<I", TABLES) + bytes.fromhex("0f22d8")


@pytest.mark.kvm
def test_what_the_page_walk_writes_into_a_guests_own_tables_is_logged() -> None:
    with logged("kvm", LOAD_CR3 + walk("write", FIRST, 3), privilege="kernel", ring=1024) as (vcpu, log):
        own_tables(vcpu)
        before = vcpu.ram.copy()
        go(vcpu)
        changed = set(np.flatnonzero((before != vcpu.ram).reshape(-1, PAGE_SIZE).any(axis=1)).tolist())
        assert {TABLES // PAGE_SIZE, FIRST} <= changed
        assert {(0, page) for page in changed} <= log.take()


def test_a_software_cpu_does_not_run_on_a_guests_own_tables() -> None:
    """It would write to them unseen."""
    with logged("unicorn", LOAD_CR3 + walk("write", FIRST, 3), privilege="kernel", ring=1024) as (vcpu, _):
        own_tables(vcpu)
        before = vcpu.ram.copy()
        leave = vcpu.run()
        assert (leave.kind, leave.reason) == (ExitKind.END, ExitReason.INTERNAL_ERROR)
        assert "the guest's own page tables" in leave.detail
        assert (before == vcpu.ram).all()


def test_a_software_cpu_may_load_the_machines_tables_again() -> None:
    with logged("unicorn", bytes.fromhex("0f20d8 0f22d8".replace(" ", "")), privilege="kernel") as (vcpu, _):
        go(vcpu)


def test_loading_cr3_at_cpl_3_is_a_protection_fault() -> None:
    with logged("unicorn", LOAD_CR3) as (vcpu, _):
        leave = vcpu.run()
        assert (leave.kind, leave.reason) == (ExitKind.END, ExitReason.EXCEPTION)
        assert "#GP" in leave.detail


# --- the tables ----------------------------------------------------------------------------------------------

GIB = 1 << 30
PRESENT, WRITABLE, USER, ACCESSED, DIRTY = 1, 2, 4, 0x20, 0x40


@contextmanager
def tables(top_gpa: int) -> Iterator[tuple[PageTables, int]]:
    """And CR3."""
    size = boot.system_size(2, top_gpa)
    with Segment.create(segment_name(f"exact{uuid.uuid4().hex[:8]}", "system"), size) as segment:
        view = memoryview(segment.buf)
        boot.write_system_slot(view, vcpu_count=2, slots=[], image_end=0, params=[], cmdline="", stack_size=16384,
                               top_gpa=top_gpa)
        cr3 = boot.boot_registers(0, vcpu_count=2, entry=0, stack_top=0)["cr3"]
        before = bytes(view)
        made = PageTables(SlotSpec(SYSTEM_SLOT, boot.SYSTEM_GPA, size, segment.name), cr3)
        try:
            yield made, cr3
        finally:
            made.close()
        assert bytes(view) == before    # they are the vCPU's alone
        view.release()


def leaf(made: PageTables, cr3: int, address: int) -> tuple[int, int, int]:
    """A page walk through the regions: (physical address, flags of the last entry, bytes that it maps)."""
    def entry(gpa: int) -> int:
        region = next(r for r in made.regions if r.gpa <= gpa < r.gpa + r.size)
        return int(ctypes.c_uint64.from_address(region.host_address + gpa - region.gpa).value)

    table = cr3
    for shift in (39, 30, 21, 12):
        found = entry(table + (address >> shift & 511) * 8)
        assert found & PRESENT
        table = found & 0x000F_FFFF_FFFF_F000
        if shift == 12 or found & 0x80:
            break
    return table + (address & (1 << shift) - 1), found & 0xFFF, 1 << shift


@pytest.mark.parametrize(("top", "gpa", "size"), [
    (GIB, 0, 4 * PAGE_SIZE), (GIB, 5 * PAGE_SIZE, 8 << 20), (8 * GIB, 4 * GIB - (4 << 20), 3 << 20),
    (600 * GIB, 599 * GIB, 2 << 20)])
def test_ram_has_small_pages_and_all_else_what_it_had(top: int, gpa: int, size: int) -> None:
    with tables(top) as (made, cr3):
        before = {a: leaf(made, cr3, a) for a in (gpa, 63 * GIB, boot.SYSTEM_GPA, boot.SYSTEM_GPA + PAGE_SIZE)}
        assert before[gpa][2] == 2 << 20
        slot = SlotSpec(0, gpa, size, "")
        assert made.cover(slot)
        assert not made.cover(slot)         # it is there already
        for address in (gpa, gpa + PAGE_SIZE, gpa + size - 1):
            physical, flags, mapped = leaf(made, cr3, address)
            assert (physical, mapped) == (address, PAGE_SIZE)
            assert flags == PRESENT | WRITABLE | USER | ACCESSED
        for address in (63 * GIB, boot.SYSTEM_GPA, boot.SYSTEM_GPA + PAGE_SIZE):
            assert leaf(made, cr3, address) == before[address]
        for one, two in ((a, b) for a in made.regions for b in made.regions if a != b):
            assert one.gpa + one.size <= two.gpa or two.gpa + two.size <= one.gpa
        assert all(region.gpa >= boot.mapped_top(top) for region in made.regions[1:])


def test_more_memory_needs_more_regions_and_what_was_written_can_be_forgotten() -> None:
    with tables(GIB) as (made, cr3):
        assert made.cover(SlotSpec(0, 0, 16 << 20, ""))
        assert made.cover(SlotSpec(1, GIB, GIB, ""))
        assert len(made.regions) == 3
        pool = made.regions[1]
        entries = (ctypes.c_uint64 * 512).from_address(pool.host_address)
        entries[3] |= DIRTY     # as the page walk would
        assert any(leaf(made, cr3, a)[1] & DIRTY for a in range(0, 16 << 20, PAGE_SIZE))
        made.forget_writes()
        assert not any(leaf(made, cr3, a)[1] & DIRTY for a in range(0, 16 << 20, PAGE_SIZE))


def test_tables_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm_tables, "TABLES_MAX", 3 * PAGE_SIZE)
    with tables(GIB) as (made, cr3):
        assert made.cover(SlotSpec(0, 0, 16 << 20, ""))
        found = [leaf(made, cr3, a) for a in range(0, 16 << 20, 2 << 20)]
        assert [size for _, _, size in found] == [PAGE_SIZE] * 3 + [2 << 20] * 5
        assert not any(flags & DIRTY for _, flags, _ in found)
        assert not made.cover(SlotSpec(1, GIB, 2 << 20, ""))
