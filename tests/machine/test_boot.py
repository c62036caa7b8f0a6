"""The boot structures, decoded again field by field, and walked as a CPU would walk them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import pytest

from vmm.machine import boot
from vmm.machine.boot import (
    BootError,
    BootSlot,
    boot_registers,
    boot_slots,
    set_round,
    system_size,
    write_system_slot,
)

PAGE = 4096
GIB = 1 << 30
SLOTS = [BootSlot(0, 0, 64 << 20, 0x101000, 0x3FF8000), BootSlot(5, GIB, 77 * PAGE, GIB, GIB + 77 * PAGE)]


def system(vcpu_count: int = 2, top_gpa: int = GIB + 77 * PAGE, **changes) -> memoryview:
    """A system slot's memory, written over memory that was not zero."""
    buf = memoryview(bytearray(b"\xff" * (system_size(vcpu_count, top_gpa) + PAGE)))
    arguments = {"slots": SLOTS, "image_end": 0x100FFF, "params": [7, 8], "cmdline": "a=1",
                 "stack_size": 16384}
    write_system_slot(buf, vcpu_count=vcpu_count, top_gpa=top_gpa, **{**arguments, **changes})
    return buf


def at(buf: memoryview, gpa: int, fmt: str) -> tuple:
    return struct.unpack_from("<" + fmt, buf, gpa - boot.SYSTEM_GPA)


def registers(index: int = 0, vcpu_count: int = 2, privilege: str = "user") -> dict[str, int]:
    return boot_registers(index, vcpu_count=vcpu_count, entry=0x100000, stack_top=0x4000000,
                          privilege=privilege)


# --- boot information --------------------------------------------------------------------------------


def test_boot_information_page():
    buf = system()
    gpa = boot.boot_info_gpa(2)
    assert at(buf, gpa, "8sIIIIQQQII") == (b"SHARDVM1", 1, 0x200, 2, 2, 0, 0x100FFF, 16384, 2, 0)
    assert at(buf, gpa + 0x40, "16Q") == (7, 8, *[0] * 14)
    assert at(buf, gpa + 0x100, "256s")[0] == b"a=1" + bytes(253)
    assert at(buf, gpa + 0x200, "IIQQQQ") == (0, 0, 0, 64 << 20, 0x101000, 0x3FF8000)
    assert at(buf, gpa + 0x228, "IIQQQQ") == (5, 0, GIB, 77 * PAGE, GIB, GIB + 77 * PAGE)
    assert not any(buf[0x250:PAGE])


def test_boot_information_lists_the_first_64_slots():
    slots = [BootSlot(number, number * GIB, GIB, number * GIB, number * GIB + GIB) for number in range(70)]
    buf = system(slots=slots, top_gpa=70 * GIB)
    assert at(buf, boot.SYSTEM_GPA + 0x14, "I") == (64,)
    assert at(buf, boot.SYSTEM_GPA + 0x200 + 63 * 40, "I") == (63,)
    assert not any(buf[0x200 + 64 * 40:PAGE])


def test_nothing_is_written_behind_the_slot():
    assert bytes(system()[-PAGE:]) == b"\xff" * PAGE


def test_round():
    buf = system()
    before = bytes(buf)
    set_round(buf, 0x0102030405060708)
    assert at(buf, boot.SYSTEM_GPA + 0x18, "Q") == (0x0102030405060708,)
    set_round(buf, 0)
    assert bytes(buf) == before


@pytest.mark.parametrize(("changes", "message"), [
    ({"cmdline": "x" * 256}, "command line is 256 bytes: at most 255"),
    ({"cmdline": "é" * 128}, "command line is 256 bytes"),
    ({"cmdline": "a\0b"}, "no NUL"),
    ({"params": [0] * 17}, "at most 16"),
    ({"params": [-1]}, "from 0 to"),
    ({"params": [1 << 64]}, "from 0 to"),
])
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(BootError, match=message):
        system(**changes)


def test_longest_command_line_keeps_its_nul():
    assert at(system(cmdline="x" * 255), boot.SYSTEM_GPA + 0x100, "256s")[0] == b"x" * 255 + b"\0"


def test_too_small_a_buffer_is_refused():
    with pytest.raises(BootError, match="the system slot needs"):
        write_system_slot(memoryview(bytearray(PAGE)), vcpu_count=1, slots=[], image_end=0, params=[],
                          cmdline="", stack_size=PAGE, top_gpa=GIB)


# --- usable memory ------------------------------------------------------------------------------------


def test_usable_memory_lies_between_image_and_stacks():
    assert boot_slots([(0, 0, 1 << 20), (3, 4 << 20, 5 * PAGE)], [(0x1000, 0x2345)], vcpu_count=3,
                      stack_size=16384) == [
        BootSlot(0, 0, 1 << 20, 0x3000, (1 << 20) - 3 * 16384),
        BootSlot(3, 4 << 20, 5 * PAGE, 4 << 20, (4 << 20) + 5 * PAGE),
    ]


def test_image_in_another_slot_than_the_stacks():
    first, second = boot_slots([(0, 0, 1 << 20), (1, 1 << 20, 1 << 20)],
                               [(0x100000, 0x100010), (0x101000, 0x101001)], vcpu_count=1)
    assert (first.usable_start, first.usable_end) == (0, (1 << 20) - 16384)
    assert (second.usable_start, second.usable_end) == (0x102000, 2 << 20)


def test_segment_across_two_slots_that_touch():
    first, second = boot_slots([(1, 1 << 20, 1 << 20), (0, 0, 1 << 20)], [(0xFF000, 0x100800)], vcpu_count=1)
    assert first.usable_start == 0x101000
    assert second.usable_start == second.usable_end == 1 << 20


def test_odd_stacks_leave_whole_pages():
    slot, = boot_slots([(0, 0, 1 << 20)], [], vcpu_count=3, stack_size=1040)
    assert slot.usable_end == (1 << 20) - PAGE
    assert [boot.stack_top(index, 1 << 20, 1040) for index in range(2)] == [1 << 20, (1 << 20) - 1040]


@pytest.mark.parametrize(("size", "stack_size", "message"), [
    (8 * PAGE, 16384, "memory slot 0 is too small: 32768 bytes do not hold the image and 2 stacks of 16384"),
    (1 << 20, 1001, "stack size 1001: must be a positive multiple of 16"),
    (1 << 20, 0, "stack size 0: "),
])
def test_stacks_that_do_not_fit(size, stack_size, message):
    with pytest.raises(BootError, match=message):
        boot_slots([(0, 0, size)], [(0, 100)], vcpu_count=2, stack_size=stack_size)


# --- paging ----------------------------------------------------------------------------------------


@dataclass
class Translation:
    physical: int
    writable: bool
    user: bool
    flags: list[int]  # of every level's entry


def translate(buf: memoryview, cr3: int, virtual: int) -> Translation | None:
    """A CPU's page walk; None is a page fault."""
    table, flags = cr3, []
    for shift in (39, 30, 21, 12):
        entry, = at(buf, table + (virtual >> shift & 511) * 8, "Q")
        flags.append(entry & 0xFFF)
        if not entry & 1:
            return None
        table = entry & 0x000F_FFFF_FFFF_F000
        if shift == 12 or entry & 0x80:
            offset = virtual & (1 << shift) - 1
            assert table & (1 << shift) - 1 == 0
            return Translation(table + offset, all(f & 2 for f in flags), all(f & 4 for f in flags), flags)
    raise AssertionError("unreachable")


@pytest.mark.parametrize(("vcpu_count", "top_gpa", "mapped"), [
    (1, 1 << 20, 64 * GIB),
    (2, 64 * GIB, 64 * GIB),
    (256, 64 * GIB + 1, 65 * GIB),
    (3, 513 * GIB, 513 * GIB),      # a second page-directory-pointer table
    (1, 1 << 44, 1 << 44),
])
def test_identity_map(vcpu_count, top_gpa, mapped):
    buf = system(vcpu_count, top_gpa)
    cr3 = registers(0, vcpu_count)["cr3"]
    end = boot.SYSTEM_GPA + system_size(vcpu_count, top_gpa)
    near_system = [boot.SYSTEM_GPA - 1, -(-end // (2 << 20)) * (2 << 20)]
    for virtual in [0, 0x100000, 0x12345678, mapped // 2 + 0x1234, mapped - 1, *near_system]:
        found = translate(buf, cr3, virtual)
        assert found is not None
        assert found.physical == virtual
        assert found.writable
        assert found.user
        assert all(flags & 0x60 == 0x60 for flags in found.flags)  # accessed and dirty already
    assert translate(buf, cr3, mapped) is None
    assert translate(buf, cr3, 1 << 46) is None


@pytest.mark.parametrize("vcpu_count", [1, 256])
@pytest.mark.parametrize("top_gpa", [GIB, 1 << 41])  # the latter's page tables fill more than 2 MiB
def test_system_slot_is_for_the_supervisor_but_for_boot_information(vcpu_count, top_gpa):
    buf = system(vcpu_count, top_gpa)
    cr3 = registers(0, vcpu_count)["cr3"]
    for gpa in range(boot.SYSTEM_GPA, boot.SYSTEM_GPA + system_size(vcpu_count, top_gpa), PAGE):
        found = translate(buf, cr3, gpa)
        assert found is not None
        assert found.physical == gpa
        assert all(flags & 0x60 == 0x60 for flags in found.flags)
        if gpa == boot.boot_info_gpa():
            assert found.user
            assert not found.writable
        else:
            assert not found.user
            assert found.writable


def test_memory_beyond_the_limit_is_refused():
    with pytest.raises(BootError, match="at most 0x100000000000"):
        system_size(1, boot.TOP_GPA_MAX + 1)


def test_system_slot_stays_below_the_apic():
    assert boot.SYSTEM_GPA + system_size(256, boot.TOP_GPA_MAX) <= 0xFEC0_0000


# --- segments, exceptions ------------------------------------------------------------------------------


@pytest.mark.parametrize(("privilege", "cpl"), [("user", 3), ("kernel", 0)])
def test_registers(privilege, cpl):
    regs = registers(1, privilege=privilege)
    assert (regs["rip"], regs["rsp"], regs["rdi"], regs["rsi"]) == (0x100000, 0x4000000, 1, 2)
    assert regs["rdx"] == boot.boot_info_gpa(2)
    assert regs["rflags"] == 0x3002
    assert regs["cpl"] == cpl
    assert {regs[name] & 3 for name in ("cs", "ss", "ds")} == {cpl}
    assert regs["cr0"] & 0x8001_0001 == 0x8001_0001   # PG, WP, PE
    assert regs["cr4"] & 0x30_0000 == 0               # no SMEP, no SMAP
    assert regs["efer"] == 0xD00                      # NXE, LMA, LME, no SCE


@pytest.mark.parametrize("privilege", ["user", "kernel"])
def test_descriptors(privilege):
    buf = system()
    regs = registers(1, privilege=privilege)

    def descriptor(selector: int) -> int:
        assert selector & ~7 < regs["gdt_limit"]
        return at(buf, regs["gdt_base"] + (selector & ~7), "Q")[0]

    assert descriptor(0) == 0
    code, data = descriptor(regs["cs"]), descriptor(regs["ss"])
    assert code >> 40 & 0x9F == 0x9B        # present, code, readable, accessed
    assert data >> 40 & 0x9F == 0x93        # present, data, writable, accessed
    assert code >> 53 & 3 == 1              # 64 bit
    assert code >> 45 & 3 == data >> 45 & 3 == regs["cpl"]

    low, high = at(buf, regs["gdt_base"] + regs["tr_selector"], "QQ")
    assert regs["tr_selector"] + 15 == regs["gdt_limit"]
    assert low >> 40 & 0xFF == 0x8B         # present, busy 64-bit TSS
    assert low & 0xFFFF == regs["tss_limit"]
    assert (low >> 16 & 0xFF_FFFF) | (low >> 56) << 24 | high << 32 == regs["tss_base"]


def test_each_vcpu_has_its_own_exception_stack():
    buf = system(256)
    stacks = []
    for index in range(256):
        regs = registers(index, 256)
        ist1, = at(buf, regs["tss_base"] + 36, "Q")
        assert ist1 % 16 == 0
        tables_end = max(regs["gdt_base"] + regs["gdt_limit"], regs["tss_base"] + regs["tss_limit"])
        assert tables_end < ist1 - 512   # room below for the frame
        stacks.append(ist1)
    assert len(set(stacks)) == 256
    assert max(stacks) <= registers(0, 256)["cr3"]


def test_every_port_is_permitted_at_cpl_3():
    """For hypervisors that do not give the guest a real IOPL of 3."""
    buf = system()
    regs = registers()
    bitmap_at, = at(buf, regs["tss_base"] + 102, "H")
    assert regs["gdt_base"] + regs["gdt_limit"] < regs["tss_base"] + bitmap_at
    assert bitmap_at + 0x10000 // 8 == regs["tss_limit"]
    *bitmap, last = at(buf, regs["tss_base"] + bitmap_at, "8193B")
    assert not any(bitmap)
    assert last == 0xFF


def test_every_exception_leads_to_its_stub():
    buf = system()
    regs = registers()
    assert regs["idt_limit"] == 32 * 16 - 1
    with_error_code = {8, 10, 11, 12, 13, 14, 17, 21, 29, 30}
    for vector in range(32):
        low, selector, ist, kind, middle, high, zero = at(buf, regs["idt_base"] + vector * 16, "HHBBHII")
        assert (selector, ist, kind & 0x9F, zero) == (0x08, 1, 0x8E, 0)
        assert kind >> 5 & 3 == (3 if vector in (3, 4) else 0)
        code = bytes(buf[(low | middle << 16 | high << 32) - boot.SYSTEM_GPA:][:16])
        dummy = b"" if vector in with_error_code else b"\x6a\x00"
        assert code.startswith(dummy + bytes([0x6A, vector]) + b"\xe6\xf0" + b"\xf4\xeb\xfd")


def test_syscall_leads_to_an_invalid_instruction():
    assert at(system(), registers()["lstar"], "2s") == (b"\x0f\x0b",)
