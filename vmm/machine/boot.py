"""What a vCPU finds at its first instruction: the guest contract, and the structures that make it.

The guest contract, version 1
=============================
An image starts at its entry point in 64-bit mode, paging on, interrupts never coming, at CPL 3 with
IOPL 3 (``privilege: user``) or at CPL 0 (``privilege: kernel``). General registers are zero but for

====  =====================================================================================
RDI   index of this vCPU, from 0
RSI   number of vCPUs
RDX   GPA of the boot-information page
RSP   top of this vCPU's own stack, a multiple of 16. The stacks lie at the top of the first RAM
      slot, vCPU 0's highest
====  =====================================================================================

All RAM is identity-mapped, readable, writable and executable at either level. SSE2 is on; AVX,
``syscall`` (#UD) and SMEP/SMAP are off. The ports are those of workers/ports.py. A CPU exception ends
the vCPU with its vector and registers, unless an image at CPL 0 has loaded an IDT of its own. A
guest may read the boot-information page and touch nothing else of the system slot: at CPL 3 that is a
page fault.

Boot-information page (little-endian, read-only at CPL 3)
---------------------------------------------------------
======  =========  ==========================================================================
0x000   8 bytes    magic ``SHARDVM1``
0x008   u32        version of this layout: 1
0x00c   u32        bytes of the header, up to the first slot entry: 0x200
0x010   u32        vCPUs
0x014   u32        slot entries below (the machine's first 64 slots, as they were at its start)
0x018   u64        round; the host raises it while the guest runs (verification)
0x020   u64        first GPA after the image
0x028   u64        bytes of each vCPU's stack
0x030   u32        parameters given below
0x040   u64 x 16   parameters, unused ones 0
0x100   256 bytes  command line, NUL-terminated
0x200   40 x 64    slots: u32 id, u32 flags (0), u64 GPA, u64 size, u64 usable start, u64 usable end
======  =========  ==========================================================================

``usable start`` to ``usable end`` is the part of a slot, in whole pages, that holds neither image nor
stack: free for the guest's own use. It may be empty.

The system slot
===============
All of the above but RAM lies in one memory slot of its own at ``SYSTEM_GPA``, never dirty-logged::

    page 0          boot information
    page 1          IDT (32 gates), then their stubs, then the syscall stub
    page 2 + 3 i    vCPU i: TSS, GDT, I/O permission bitmap, and from the end of its three pages
                    downwards its exception stack
    page 2 + 3 n    PML4, page table of the slot's first 2 MiB, PDPTs, page directories

Every entry of every table has its accessed and dirty bits set beforehand, segment descriptors too:
a page walk that set them would write into memory that nobody logs, and would cost an exit under some
hypervisors. The identity map is of 2 MiB pages, but for the slot's own first 2 MiB. A KVM vCPU runs on a private
copy of these tables with smaller entries, so that its log is exact (workers/accel/kvm/tables.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ipc import gates, programs
from ipc.shm import PAGE_SIZE
from workers.ports import PORT_FAULT

from ..errors import VmmError

__all__ = ["BOOT_SLOTS_MAX", "BOOT_VERSION", "CMDLINE_MAX", "DEFAULT_STACK_SIZE", "PARAMS_MAX", "SYSTEM_GPA",
           "TOP_GPA_MAX", "BootError", "BootSlot", "boot_info_gpa", "boot_registers", "boot_slots",
           "mapped_top", "program_registers", "set_round", "stack_top", "system_size", "write_program_slot",
           "write_system_slot"]

SYSTEM_GPA = 0xF000_0000           # in the hole below 4 GiB where PCs have devices, not RAM
TOP_GPA_MAX = 1 << 44              # 16 TiB: 64 MiB of page tables, still below the local APIC's page
BOOT_MAGIC = b"SHARDVM1"
BOOT_VERSION = 1
BOOT_SLOTS_MAX = 64
PARAMS_MAX = 16
CMDLINE_MAX = 255                  # bytes, without the NUL
DEFAULT_STACK_SIZE = 16 << 10

_LARGE_PAGE = 2 << 20
_GIB = 1 << 30
_MAPPED_MIN = 64 * _GIB            # an address below, outside RAM, reaches the accelerator as itself

# --- boot-information page -------------------------------------------------------------------
_HEADER = struct.Struct("<8sIIIIQQQI")
_PARAMS = struct.Struct(f"<{PARAMS_MAX}Q")
_SLOT = struct.Struct("<IIQQQQ")
_ROUND_AT = 0x18
_PARAMS_AT = 0x40
_CMDLINE_AT = 0x100
_SLOTS_AT = 0x200

# --- pages of the system slot ------------------------------------------------------------------
_BOOT_INFO_PAGE = 0
_IDT_PAGE = 1
_VCPU_PAGE = 2       # the first vCPU's first page
_VCPU_PAGES = 3      # a vCPU: TSS, GDT, I/O permission bitmap, exception stack

# --- x86: page-table entries (Intel SDM vol. 3, 4.5) ------------------------------------------
_PTE_P = 1 << 0
_PTE_W = 1 << 1
_PTE_U = 1 << 2
_PTE_A = 1 << 5
_PTE_D = 1 << 6
_PTE_PS = 1 << 7
_TABLE = _PTE_P | _PTE_W | _PTE_U | _PTE_A | _PTE_D  # D is ignored in a table pointer
_RAM_PAGE = _TABLE | _PTE_PS
_SUPERVISOR_PAGE = _PTE_P | _PTE_W | _PTE_A | _PTE_D
_READ_ONLY_PAGE = _PTE_P | _PTE_U | _PTE_A | _PTE_D

# --- x86: segments. Descriptors have their accessed (TSS: busy) bit set ------------------------
_SEL_KERNEL_CODE, _SEL_KERNEL_DATA = 0x08, 0x10
_SEL_USER_CODE, _SEL_USER_DATA, _SEL_TSS = 0x1B, 0x23, 0x28
_GDT = struct.pack(
    "<5Q", 0,
    0x00AF_9B00_0000_FFFF,   # kernel code, 64 bit
    0x00CF_9300_0000_FFFF,   # kernel data
    0x00AF_FB00_0000_FFFF,   # user code, 64 bit
    0x00CF_F300_0000_FFFF,   # user data
)
_GDT_SIZE = len(_GDT) + 16   # and the TSS descriptor
# Of a Linux program: as sysret wants them, user code behind user data.
_SEL_PROGRAM_DATA, _SEL_PROGRAM_CODE, _SEL_PROGRAM_TSS = 0x23, 0x2B, 0x30
_PROGRAM_GDT = struct.pack("<6Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0, 0x00CF_F300_0000_FFFF,
                           0x00AF_FB00_0000_FFFF)
_TSS = struct.Struct("<I 3Q Q 7Q Q H H")  # reserved, RSP0-2, reserved, IST1-7, reserved x 2, I/O map
_TSS_AT, _GDT_AT = 0x000, 0x080  # in the vCPU's pages
# A KVM that runs guests without hardware virtualisation (page-table based, nested) cannot give the
# guest a real IOPL of 3 and decides by this bitmap: all zero, every port may be used at CPL 3.
_IO_BITMAP_AT = 0x200
_IO_BITMAP_SIZE = 0x10000 // 8
_TSS_LIMIT = _IO_BITMAP_AT + _IO_BITMAP_SIZE    # and the byte of ones that must end the bitmap

# --- x86: exceptions ---------------------------------------------------------------------------
_VECTORS = 32
_HAS_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17, 21, 29, 30})
_USER_VECTORS = frozenset({3, 4})  # int3 and into may be used at CPL 3, and report as what they are
_GATE = struct.Struct("<HHBBHII")
_STUBS_AT = _VECTORS * _GATE.size
_STUB_SIZE = 16
_SYSCALL_AT = _STUBS_AT + _VECTORS * _STUB_SIZE

# --- x86: control registers and flags ------------------------------------------------------------
_CR0 = 0x8001_0033   # PG WP NE ET MP PE
_CR4 = 0x620         # OSXMMEXCPT OSFXSR PAE
_EFER = 0xD00        # NXE LMA LME; without SCE a stray syscall is #UD and not a jump to LSTAR = 0
_RFLAGS = 0x3002     # IOPL 3, and bit 1, which is always set

# --- Linux programs (ipc/programs.py) ----------------------------------------------------------
_CR4_FSGSBASE, _CR4_OSXSAVE = 1 << 16, 1 << 18
_EFER_SCE = 1
_SYSCALL_FLAGS = 0x47700    # cleared by ``syscall``: TF IF DF IOPL NT AC, as Linux has it
_SYSCALL_STUB = bytes([0xE6, programs.PORT_CALL, 0xF4])      # out %al, $PORT_CALL; hlt
_VSYSCALLS = (96, 201, 309)     # gettimeofday, time, getcpu: one each 1024 bytes


class BootError(VmmError):
    """What was asked for does not fit the boot structures; the text is fit for a user."""


@dataclass(frozen=True, slots=True)
class BootSlot:
    """A RAM slot as the guest is told of it. All but ``id`` in bytes; usable part [start, end)."""

    id: int
    gpa: int
    size: int
    usable_start: int
    usable_end: int


def mapped_top(top_gpa: int) -> int:
    """First GPA that is not identity-mapped, for RAM that ends at ``top_gpa``. Raises BootError."""
    if top_gpa > TOP_GPA_MAX:
        raise BootError(f"memory ends at {top_gpa:#x}: at most {TOP_GPA_MAX:#x} (16 TiB) can be mapped")
    return max(_MAPPED_MIN, -(-top_gpa // _GIB) * _GIB)


def _table_counts(top_gpa: int) -> tuple[int, int]:
    """(page-directory-pointer tables, page directories) of the identity map."""
    directories = mapped_top(top_gpa) // _GIB
    return -(-directories // 512), directories


def system_size(vcpu_count: int, top_gpa: int) -> int:
    """Bytes of the system slot, a multiple of 4096. Raises BootError."""
    pointer_tables, directories = _table_counts(top_gpa)
    return (_VCPU_PAGE + vcpu_count * _VCPU_PAGES + 2 + pointer_tables + directories) * PAGE_SIZE


def boot_info_gpa(vcpu_count: int = 0) -> int:
    """GPA of the boot-information page (the same for every machine)."""
    return SYSTEM_GPA + _BOOT_INFO_PAGE * PAGE_SIZE


def stack_top(index: int, slot_end: int, stack_size: int = DEFAULT_STACK_SIZE) -> int:
    """Initial RSP of vCPU ``index``; ``slot_end`` is the first GPA after the first RAM slot."""
    return slot_end - index * stack_size


def boot_slots(slots: Iterable[tuple[int, int, int]], image: Iterable[tuple[int, int]], *,
               vcpu_count: int, stack_size: int = DEFAULT_STACK_SIZE) -> list[BootSlot]:
    """Work out the usable part of each slot.

    ``slots`` are (id, gpa, size), the first of them the one that takes the stacks; ``image`` are the
    [start, end) ranges of GPAs that the image fills. Memory below the image in the same slot counts as
    used too. Raises BootError when the stacks do not fit above the image.
    """
    if stack_size <= 0 or stack_size % 16:
        raise BootError(f"stack size {stack_size}: must be a positive multiple of 16 bytes")
    segments = list(image)
    found: list[BootSlot] = []
    for number, (slot_id, gpa, size) in enumerate(slots):
        end = gpa + size
        start = max([gpa, *(min(e, end) for s, e in segments if s < end and e > gpa)])
        start = -(-start // PAGE_SIZE) * PAGE_SIZE
        usable_end = end - (vcpu_count * stack_size if number == 0 else 0)
        usable_end = usable_end // PAGE_SIZE * PAGE_SIZE
        if number == 0 and usable_end < start:
            raise BootError(f"memory slot {slot_id} is too small: {size} bytes do not hold the image and "
                            f"{vcpu_count} stacks of {stack_size} bytes")
        found.append(BootSlot(slot_id, gpa, size, start, usable_end))
    return found


def write_system_slot(buf: memoryview, *, vcpu_count: int, slots: Sequence[BootSlot], image_end: int,
                      params: Sequence[int], cmdline: str, stack_size: int, top_gpa: int) -> None:
    """Fill ``buf``, the system slot's memory (``system_size`` bytes at least), for a machine's start.

    ``params`` are up to 16 values of 64 bits; ``cmdline`` up to 255 bytes of UTF-8. Raises BootError.
    """
    size = system_size(vcpu_count, top_gpa)
    if len(buf) < size:
        raise BootError(f"the system slot needs {size} bytes, but its memory has {len(buf)}")
    buf[:size] = bytes(size)
    _write_boot_info(buf, vcpu_count, slots, image_end, params, cmdline, stack_size)
    _write_idt(buf, _IDT_PAGE, SYSTEM_GPA)
    for index in range(vcpu_count):
        _write_vcpu_page(buf, _VCPU_PAGE + index * _VCPU_PAGES, SYSTEM_GPA, _GDT, every_port=True)
    _write_page_tables(buf, vcpu_count, top_gpa)


def set_round(buf: memoryview, number: int) -> None:
    """Raise the round that guests read. One aligned 64-bit store: a guest never reads half of it."""
    buf[_ROUND_AT:_ROUND_AT + 8].cast("B").cast("Q")[0] = number


def boot_registers(index: int, *, vcpu_count: int, entry: int, stack_top: int,
                   privilege: str = "user") -> dict[str, int]:
    """Registers of vCPU ``index`` before its first instruction; those not named are zero.

    ``cs``, ``ss`` and ``ds`` (for DS, ES, FS and GS) and ``tr_selector`` are selectors; segments are
    flat. ``cpl`` is 3 for ``privilege`` "user", 0 for "kernel". ``lstar`` is for MSR_LSTAR: KVM on
    page tables alone enters it on ``syscall`` although EFER.SCE is clear. There waits a ud2 in a
    supervisor page, so the vCPU ends in an exception all the same and does not run whatever lies at
    address 0; RCX has the guest's RIP.
    """
    user = privilege == "user"
    page = SYSTEM_GPA + (_VCPU_PAGE + index * _VCPU_PAGES) * PAGE_SIZE
    return {
        "rip": entry,
        "rsp": stack_top,
        "rdi": index,
        "rsi": vcpu_count,
        "rdx": boot_info_gpa(),
        "rflags": _RFLAGS,
        "cr0": _CR0,
        "cr3": SYSTEM_GPA + (_VCPU_PAGE + vcpu_count * _VCPU_PAGES) * PAGE_SIZE,
        "cr4": _CR4,
        "efer": _EFER,
        "lstar": SYSTEM_GPA + _IDT_PAGE * PAGE_SIZE + _SYSCALL_AT,
        "cpl": 3 if user else 0,
        "cs": _SEL_USER_CODE if user else _SEL_KERNEL_CODE,
        "ss": _SEL_USER_DATA if user else _SEL_KERNEL_DATA,
        "ds": _SEL_USER_DATA if user else _SEL_KERNEL_DATA,
        "gdt_base": page + _GDT_AT,
        "gdt_limit": _GDT_SIZE - 1,
        "idt_base": SYSTEM_GPA + _IDT_PAGE * PAGE_SIZE,
        "idt_limit": _VECTORS * _GATE.size - 1,
        "tr_selector": _SEL_TSS,
        "tss_base": page + _TSS_AT,
        "tss_limit": _TSS_LIMIT,
    }


def write_program_slot(buf: memoryview, *, threads: int) -> None:
    """The system slot of a machine for Linux programs, zero until now (ipc/programs.py has its pages)."""
    _write_idt(buf, programs.IDT_PAGE, programs.SYSTEM_ADDRESS)
    entry = programs.ENTRY_PAGE * PAGE_SIZE
    buf[entry:entry + len(_SYSCALL_STUB)] = _SYSCALL_STUB
    for at, number in enumerate(_VSYSCALLS):
        code = b"\xb8" + number.to_bytes(4, "little") + b"\x0f\x05\xc3"      # mov $number, %eax; syscall; ret
        place = programs.VSYSCALL_PAGE * PAGE_SIZE + at * 1024
        buf[place:place + len(code)] = code
    for index in range(threads):
        page = programs.gate_page(threads, index)
        code = gates.gate(threads, desk=PAGE_SIZE, bell=(programs.BELL_PAGE - page) * PAGE_SIZE,
                          waits=(programs.WAITS_PAGE - page) * PAGE_SIZE)
        buf[page * PAGE_SIZE:page * PAGE_SIZE + len(code)] = code
        _write_vcpu_page(buf, programs.VCPU_PAGE + index * programs.VCPU_PAGES, programs.SYSTEM_ADDRESS,
                         _PROGRAM_GDT, every_port=False)


def program_registers(index: int) -> dict[str, int]:
    """Registers of thread vCPU ``index`` as long as it has no thread, named as in `boot_registers`; ``star``,
    ``fmask`` and ``lstar`` are those of ``syscall``. Its page tables and where it begins it is told later."""
    page = programs.SYSTEM_ADDRESS + (programs.VCPU_PAGE + index * programs.VCPU_PAGES) * PAGE_SIZE
    return {
        "rip": 0, "rsp": 0, "rflags": 0x202, "cr0": _CR0, "cr3": 0,
        "cr4": _CR4 | _CR4_FSGSBASE | _CR4_OSXSAVE, "efer": _EFER | _EFER_SCE,
        "star": _SEL_KERNEL_CODE << 32 | (_SEL_PROGRAM_DATA - 8 & ~3) << 48, "fmask": _SYSCALL_FLAGS,
        "lstar": programs.SYSTEM_ADDRESS + programs.ENTRY_PAGE * PAGE_SIZE,
        "cpl": 3, "cs": _SEL_PROGRAM_CODE, "ss": _SEL_PROGRAM_DATA, "ds": _SEL_PROGRAM_DATA,
        "gdt_base": page + _GDT_AT, "gdt_limit": len(_PROGRAM_GDT) + 15,
        "idt_base": programs.SYSTEM_ADDRESS + programs.IDT_PAGE * PAGE_SIZE,
        "idt_limit": _VECTORS * _GATE.size - 1,
        "tr_selector": _SEL_PROGRAM_TSS, "tss_base": page + _TSS_AT, "tss_limit": _TSS_LIMIT,
    }


def _write_boot_info(buf: memoryview, vcpu_count: int, slots: Sequence[BootSlot], image_end: int,
                     params: Sequence[int], cmdline: str, stack_size: int) -> None:
    text = cmdline.encode()
    if len(text) > CMDLINE_MAX or b"\0" in text:
        raise BootError(f"the guest's command line is {len(text)} bytes: at most {CMDLINE_MAX}, and no NUL")
    if len(params) > PARAMS_MAX or not all(0 <= value < 1 << 64 for value in params):
        raise BootError(f"guest parameters: at most {PARAMS_MAX}, each from 0 to 2**64 - 1")
    listed = slots[:BOOT_SLOTS_MAX]
    base = _BOOT_INFO_PAGE * PAGE_SIZE
    _HEADER.pack_into(buf, base, BOOT_MAGIC, BOOT_VERSION, _SLOTS_AT, vcpu_count, len(listed), 0, image_end,
                      stack_size, len(params))
    _PARAMS.pack_into(buf, base + _PARAMS_AT, *params, *[0] * (PARAMS_MAX - len(params)))
    buf[base + _CMDLINE_AT:base + _CMDLINE_AT + len(text)] = text
    for number, slot in enumerate(listed):
        _SLOT.pack_into(buf, base + _SLOTS_AT + number * _SLOT.size, slot.id, 0, slot.gpa, slot.size,
                        slot.usable_start, slot.usable_end)


def _stub(vector: int) -> bytes:
    """Exception stub. It changes no register but RSP and leaves at RSP: vector, error code (0 where
    the CPU pushes none), RIP, CS, RFLAGS, RSP, SS; then it tells the worker, which does not come back."""
    code = b"" if vector in _HAS_ERROR_CODE else b"\x6a\x00"  # push $0
    code += bytes([0x6A, vector])                             # push $vector
    code += bytes([0xE6, PORT_FAULT])                         # out  %al, $0xf0
    code += b"\xf4"                                           # 1: hlt
    code += b"\xeb\xfd"                                       # jmp  1b
    return code


def _write_idt(buf: memoryview, page: int, start: int) -> None:
    """``start``: where the guest has the slot."""
    base = page * PAGE_SIZE
    for vector in range(_VECTORS):
        at = _STUBS_AT + vector * _STUB_SIZE
        code = _stub(vector)
        buf[base + at:base + at + len(code)] = code
        address = start + base + at
        dpl = 3 if vector in _USER_VECTORS else 0
        _GATE.pack_into(buf, base + vector * _GATE.size, address & 0xFFFF, _SEL_KERNEL_CODE,
                        1,                  # IST1
                        0x8E | dpl << 5,    # present, 64-bit interrupt gate
                        address >> 16 & 0xFFFF, address >> 32, 0)
    buf[base + _SYSCALL_AT:base + _SYSCALL_AT + 2] = b"\x0f\x0b"  # ud2


def _write_vcpu_page(buf: memoryview, page: int, start: int, gdt: bytes, *, every_port: bool) -> None:
    """``start``: where the guest has the slot. ``every_port``: else that of system calls only."""
    base = page * PAGE_SIZE
    stack = start + base + _VCPU_PAGES * PAGE_SIZE  # RSP0 for gates without IST that an image might add
    _TSS.pack_into(buf, base + _TSS_AT, 0, stack, 0, 0, 0, stack, 0, 0, 0, 0, 0, 0, 0, 0,
                   _IO_BITMAP_AT)
    if not every_port:
        bitmap = base + _IO_BITMAP_AT
        buf[bitmap:bitmap + _IO_BITMAP_SIZE] = b"\xff" * _IO_BITMAP_SIZE
        buf[bitmap + programs.PORT_CALL // 8] = 0xFF & ~(1 << programs.PORT_CALL % 8)
    buf[base + _TSS_LIMIT] = 0xFF
    tss = start + base + _TSS_AT
    descriptor = struct.pack("<HHBBBBII", _TSS_LIMIT, tss & 0xFFFF, tss >> 16 & 0xFF,
                             0x8B,     # present, 64-bit TSS, busy (it is loaded already)
                             0, tss >> 24 & 0xFF, tss >> 32, 0)
    table = gdt + descriptor
    buf[base + _GDT_AT:base + _GDT_AT + len(table)] = table


def _write_page_tables(buf: memoryview, vcpu_count: int, top_gpa: int) -> None:
    import numpy as np  # whoever checks a specification has no use for it

    pointer_tables, directories = _table_counts(top_gpa)
    entries = np.frombuffer(buf, dtype="<u8", count=system_size(vcpu_count, top_gpa) // 8)

    first = _VCPU_PAGE + vcpu_count * _VCPU_PAGES
    pml4, own_table, pdpt, directory = first, first + 1, first + 2, first + 2 + pointer_tables

    def fill(page: int, count: int, start: int, step: int, bits: int) -> None:
        at = page * (PAGE_SIZE // 8)
        entries[at:at + count] = np.uint64(start | bits) + np.arange(count, dtype=np.uint64) * np.uint64(step)

    fill(pml4, pointer_tables, SYSTEM_GPA + pdpt * PAGE_SIZE, PAGE_SIZE, _TABLE)
    fill(pdpt, directories, SYSTEM_GPA + directory * PAGE_SIZE, PAGE_SIZE, _TABLE)
    fill(directory, directories * 512, 0, _LARGE_PAGE, _RAM_PAGE)

    # The slot's own pages: for the supervisor only (the exception stubs), but for the boot
    # information, which a guest at CPL 3 reads. A wild store can then not unmap the machine.
    own = directory * 512 + SYSTEM_GPA // _LARGE_PAGE
    large_pages = -(-system_size(vcpu_count, top_gpa) // _LARGE_PAGE)
    entries[own:own + large_pages] &= np.uint64(~_PTE_U & (1 << 64) - 1)
    entries[own] = SYSTEM_GPA + own_table * PAGE_SIZE | _TABLE
    fill(own_table, 512, SYSTEM_GPA, PAGE_SIZE, _SUPERVISOR_PAGE)
    entries[own_table * 512 + _BOOT_INFO_PAGE] = (SYSTEM_GPA + _BOOT_INFO_PAGE * PAGE_SIZE) | _READ_ONLY_PAGE
