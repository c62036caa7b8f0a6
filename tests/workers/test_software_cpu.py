"""The software CPU in this process: what it logs, where it stops, and its locked instructions, which are
compared with the host's own CPU."""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable
from typing import Any

import pytest
from bare import CODE, DATA, EXIT, NativeCode, bare
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ipc.messages import ExitReason
from ipc.shm import PAGE_SIZE
from workers.accel.base import ExitKind
from workers.accel.unicorn.context import SEEN_BLOCKS
from workers.accel.unicorn.decode import PortAccess
from workers.ports import PortEventKind

CF, PF, AF, ZF, SF, OF = 1, 4, 0x10, 0x40, 0x80, 0x800
ARITHMETIC = CF | PF | AF | ZF | SF | OF


def hexes(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


# --- locked instructions against the host -----------------------------------------------------------

#: name: (opcode for 8 bits, opcode otherwise, ModRM and what follows, flags that are defined).
#: The memory operand is (%rsi), the register operand RCX.
_FORMS: dict[str, tuple[str, str, str, int]] = {
    "add": ("00", "01", "0e", ARITHMETIC), "or": ("08", "09", "0e", ARITHMETIC & ~AF),
    "adc": ("10", "11", "0e", ARITHMETIC), "sbb": ("18", "19", "0e", ARITHMETIC),
    "and": ("20", "21", "0e", ARITHMETIC & ~AF), "sub": ("28", "29", "0e", ARITHMETIC),
    "xor": ("30", "31", "0e", ARITHMETIC & ~AF), "add $": ("80", "83", "06f7", ARITHMETIC),
    "sbb $": ("80", "83", "1e80", ARITHMETIC), "inc": ("fe", "ff", "06", ARITHMETIC),
    "dec": ("fe", "ff", "0e", ARITHMETIC), "not": ("f6", "f7", "16", ARITHMETIC),
    "neg": ("f6", "f7", "1e", ARITHMETIC), "xchg": ("86", "87", "0e", ARITHMETIC),
    "cmpxchg": ("0fb0", "0fb1", "0e", ARITHMETIC), "xadd": ("0fc0", "0fc1", "0e", ARITHMETIC),
    "bts": ("", "0fab", "0e", CF | ZF), "btr": ("", "0fb3", "0e", CF | ZF), "btc": ("", "0fbb", "0e", CF | ZF),
    "bts $": ("", "0fba", "2e2d", CF | ZF), "btr $": ("", "0fba", "360f", CF | ZF),
    "btc $": ("", "0fba", "3eff", CF | ZF),
    "cmpxchg8b": ("", "0fc7", "0e", ARITHMETIC),        # with REX.W it is cmpxchg16b
}
_PREFIXES = {1: "", 2: "66", 4: "", 8: ""}


def encode(name: str, size: int) -> bytes:
    small, large, rest, _ = _FORMS[name]
    rex = "48" if size == 8 else ""
    return hexes("f0" + _PREFIXES[size] + rex + (small if size == 1 else large) + rest)


words = st.one_of(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x7FFF_FFFF, 0x8000_0000,
                                   0xFFFF_FFFF, 1 << 63, (1 << 64) - 1]), st.integers(0, (1 << 64) - 1))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the oracle is an x86-64 host")
@pytest.mark.parametrize(("name", "size"), [
    (name, size) for name, form in _FORMS.items() for size in (1, 2, 4, 8)
    if (form[0] or size > 1) and not (name == "cmpxchg8b" and size == 2)])
@settings(max_examples=6, deadline=None)
@given(memory=words, upper=words, rax=words, rbx=words, rcx=words, rdx=words,
       flags=st.integers(0, 63).map(lambda n: sum(f for i, f in enumerate((CF, PF, AF, ZF, SF, OF)) if n >> i & 1)),
       equal=st.booleans())
@example(memory=0xFFFF_FFFF_FFFF_FFFF, upper=0, rax=0, rbx=2, rcx=1, rdx=0, flags=CF, equal=True)
def test_locked_instructions_do_what_the_host_does(name: str, size: int, memory: int, upper: int, rax: int,
                                                   rbx: int, rcx: int, rdx: int, flags: int,
                                                   equal: bool) -> None:
    code = encode(name, size)
    if name in ("bts", "btr", "btc"):
        rcx %= 1024     # bits of the page's first bytes
    if equal:           # so that the compare of cmpxchg is met as often as not
        rax = memory & (1 << 8 * size) - 1 | rax & ~((1 << 8 * size) - 1) if name == "cmpxchg" else memory
        if name == "cmpxchg8b":
            rax, rdx = (memory & 0xFFFF_FFFF, memory >> 32) if size != 8 else (memory, upper)
    words_before = memory.to_bytes(8, "little") + upper.to_bytes(8, "little")

    raw = ctypes.create_string_buffer(256 + 16)
    at = -(-ctypes.addressof(raw) // 16) * 16
    ctypes.memmove(at, words_before, 16)
    native = NativeCode(code)(rax, rbx, rcx, rdx, 0x202 | flags, at)
    native_memory = ctypes.string_at(at, 256)

    with bare("unicorn", code + EXIT, rax=rax, rbx=rbx, rcx=rcx, rdx=rdx, rsi=DATA,
              rflags=0x3002 | flags) as vcpu:
        vcpu.ram[DATA:DATA + 16] = list(words_before)
        assert vcpu.run().kind is ExitKind.PORT
        registers = vcpu.accel.registers()
        defined = _FORMS[name][3]
        assert vcpu.ram[DATA:DATA + 256].tobytes() == native_memory
        for register, value in zip(("rax", "rbx", "rcx", "rdx"), native, strict=False):
            assert registers[register] == value, register
        assert registers["rflags"] & defined == native[4] & defined
        assert registers["rip"] == CODE + len(code) + len(EXIT)
        assert vcpu.harvest() == [DATA // PAGE_SIZE]        # also when cmpxchg failed: it writes all the same


@pytest.mark.parametrize(("code", "gpa"), [
    ("f0 48 ff 83 00100000", DATA + 0x1000),            # lock incq 0x1000(%rbx)
    ("f0 48 ff 04 cb", DATA + 8 * 0x200),               # lock incq (%rbx,%rcx,8)
    ("f0 48 ff 05 f8ff0f00", DATA),                     # lock incq 0xffff8(%rip)
    ("f0 67 48 ff 03", DATA),                           # lock incq (%ebx)
    ("f0 64 48 ff 03", DATA),                           # lock incq %fs:(%rbx), base 0
])
def test_operand_addresses(code: str, gpa: int) -> None:
    with bare("unicorn", hexes(code) + EXIT, rbx=DATA, rcx=0x200) as vcpu:
        assert vcpu.run().kind is ExitKind.PORT
        assert vcpu.word(gpa) == 1
        assert vcpu.harvest() == [gpa // PAGE_SIZE]


def test_locked_instruction_across_a_page_logs_both() -> None:
    with bare("unicorn", hexes("f0 48 ff 03") + EXIT, rbx=DATA + 0xFFC) as vcpu:
        vcpu.run()
        assert vcpu.word(DATA + 0xFFC) == 1
        assert vcpu.harvest() == [DATA // PAGE_SIZE, DATA // PAGE_SIZE + 1]


def test_locked_instruction_outside_ram_is_a_bad_address() -> None:
    with bare("unicorn", hexes("f0 48 ff 03") + EXIT, rbx=0x8000_0000) as vcpu:
        leave = vcpu.run()
        assert leave.reason is ExitReason.BAD_ADDRESS
        assert "0x80000000" in leave.detail
        assert leave.registers is not None
        assert leave.registers["rip"] == CODE


# --- what is logged ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "pages"), [
    ("48 89 03", [0]),                                  # mov %rax, (%rbx)
    ("48 89 83 fc0f0000", [0, 1]),                      # a store across a page
    ("48 ff 03 48 ff 03", [0]),                         # twice the same page, one entry
    ("48 8b 03", []),                                   # a load
    ("b9 00300000 48 89 df f3 aa", [0, 1, 2]),          # rep stosb of three pages
    ("48 0f c3 03", [0]),                               # movnti
    ("0f 11 83 f80f0000", [0, 1]),                      # movups across a page
    ("48 89 e5 48 89 dc 54", [-1]),                     # push, below (%rbx)
])
def test_every_kind_of_store_is_logged(code: str, pages: list[int]) -> None:
    with bare("unicorn", hexes(code) + EXIT, rbx=DATA) as vcpu:
        assert vcpu.run().kind is ExitKind.PORT
        assert sorted(vcpu.harvest()) == [DATA // PAGE_SIZE + p for p in pages]


def test_a_slot_that_is_not_logged_has_no_entries() -> None:
    with bare("unicorn", hexes("48 89 03") + EXIT, rbx=DATA, log=False) as vcpu:
        vcpu.run()
        assert vcpu.harvest() == []


# incq (%rbx); add $4096, %rbx; dec %rcx; jnz back
_WALK = hexes("48 ff 03  48 81 c3 00100000  48 ff c9  75 f1") + EXIT


def test_soft_full_stops_early_and_a_reset_lets_it_go_on() -> None:
    """900 pages through a ring of 1,024: each is logged once, none twice, none lost."""
    pages = 900
    with bare("unicorn", _WALK, rbx=DATA, rcx=pages, ram_size=16 << 20) as vcpu:
        seen: list[int] = []
        leave = vcpu.run()
        while leave.kind is ExitKind.RING_FULL:
            fresh = vcpu.harvest()
            assert 1024 - 64 - 512 <= len(fresh) < 1024
            seen += fresh
            assert vcpu.run().kind is ExitKind.RING_FULL     # still full: nothing was reset
            vcpu.control.reset_total += vcpu.accel.reset_ring(len(fresh))
            leave = vcpu.run()
        assert leave.kind is ExitKind.PORT
        seen += vcpu.harvest()
        assert sorted(seen) == list(range(DATA // PAGE_SIZE, DATA // PAGE_SIZE + pages))
        assert len(seen) > 1024 - 64 - 512


def test_reset_has_the_next_write_logged_again() -> None:
    loop = hexes("48 ff 03 e7 f8 48 ff 03 e7 f8 48 ff 03") + EXIT      # incq, hypercall, incq, …
    with bare("unicorn", loop, rbx=DATA) as vcpu:
        page = DATA // PAGE_SIZE
        vcpu.run()
        assert vcpu.harvest() == [page]
        assert vcpu.run().kind is ExitKind.PORT                         # no reset: no entry
        assert vcpu.accel.reset_ring(1) == 1
        vcpu.control.reset_total += 1
        assert vcpu.run().kind is ExitKind.PORT
        assert vcpu.harvest() == [page]
        assert vcpu.word(DATA) == 3


def test_a_ring_with_no_room_left_says_that_it_has_lost_count() -> None:
    """One block that dirties more pages than the reserve has entries: resets free nothing until the ring
    is rebuilt, which is what tells the coordinator (invariant 3)."""
    stores = b"".join(hexes("48 89 83") + (n * 2 * PAGE_SIZE).to_bytes(4, "little") for n in range(500))
    filler = hexes("48 ff 03 48 81 c3 00100000 48 ff c9 75 f1")     # the walk: up to the soft limit, nearly
    code = filler + hexes("bb 00004000") + stores + EXIT            # then mov $0x400000, %ebx
    with bare("unicorn", code, rax=1, rbx=DATA, rcx=440, ram_size=16 << 20) as vcpu:
        # Every store of the long block lies across two pages.
        vcpu.ram[CODE + len(filler) + 1:CODE + len(filler) + 5] = list((0x40_0000 - 4).to_bytes(4, "little"))
        assert vcpu.run().kind is ExitKind.RING_FULL
        assert len(vcpu.harvest()) == 1024
        assert vcpu.accel.reset_ring(1024) == 0
        assert vcpu.run().kind is ExitKind.RING_FULL
        vcpu.accel.rebuild_ring()
        assert vcpu.run().kind is ExitKind.PORT
        for n in range(500):
            assert vcpu.word(0x40_0000 - 4 + n * 2 * PAGE_SIZE) == 1


def test_bitmap_mode() -> None:
    code = hexes("48 ff 03 e7 f8 48 ff 03 48 ff 83 00100000") + EXIT
    with bare("unicorn", code, rbx=DATA, ring=0) as vcpu:
        def log() -> list[int]:
            size = -(-len(vcpu.ram) // PAGE_SIZE // 8) + 1
            data = ctypes.string_at(vcpu.memory.slots[0].log_address, size)
            return [i for i in range(size * 8) if data[i // 8] >> i % 8 & 1]

        page = DATA // PAGE_SIZE
        vcpu.run()
        assert vcpu.accel.get_dirty_log(0) == 1
        assert log() == [page]
        vcpu.accel.clear_dirty_log(0)
        assert vcpu.accel.get_dirty_log(0) == 0
        vcpu.run()
        assert vcpu.accel.get_dirty_log(0) == 2
        assert log() == [page, page + 1]


# --- stops ------------------------------------------------------------------------------------------------


def test_kicks_do_not_repeat_or_skip_an_instruction() -> None:
    """incq in a loop, under a storm of kicks and resets from another thread: the sum is exact."""
    rounds = 2_000_000
    loop = hexes("48 ff 03 48 ff c9 75 f8") + EXIT
    with bare("unicorn", loop, rbx=DATA, rcx=rounds) as vcpu:
        done = threading.Event()

        def storm() -> None:
            while not done.wait(0.0003):    # so that the guest gets on in between
                vcpu.accel.interrupt()
                vcpu.accel.reset_ring(0)

        thread = threading.Thread(target=storm)
        thread.start()
        kicks = 0
        try:
            while True:
                vcpu.accel.clear_immediate_exit()
                leave = vcpu.accel.run()
                if leave.kind is not ExitKind.KICKED:
                    break
                kicks += 1
        finally:
            done.set()
            thread.join()
        assert leave.kind is ExitKind.PORT
        assert vcpu.word(DATA) == rounds
        assert kicks > 10


def test_an_interrupt_before_the_entry_is_not_lost() -> None:
    with bare("unicorn", hexes("eb fe")) as vcpu:       # jmp .
        vcpu.accel.clear_immediate_exit()
        vcpu.accel.interrupt()
        assert vcpu.accel.run().kind is ExitKind.KICKED


@pytest.mark.parametrize("change", [
    lambda accel: accel._look_at(CODE, 4),
    lambda accel: accel._forget_code(),
    lambda accel: accel._port_once(PortAccess(write=False, size=1, port=0x3FD, string=True, repeated=False), 0x3FD),
], ids=["a block is looked at", "code is forgotten", "ins"])
def test_nobody_changes_page_flags_or_memory_while_pages_are_reset(change: Callable[[Any], object]) -> None:
    """A flag written back by another thread would be a page that is never logged again, and a store between its log
    entry and the page's reset one that is in no log."""
    with bare("unicorn", hexes("90 90 90 90") + EXIT, rdi=DATA) as vcpu:
        accel: Any = vcpu.accel
        thread = threading.Thread(target=change, args=(accel,))
        with accel._outside():      # as a reset does
            flags, ram = accel._pages._slots[0].flags.copy(), vcpu.ram.copy()
            thread.start()
            thread.join(0.3)        # it must not get anywhere, however long
            assert thread.is_alive()
            assert (accel._pages._slots[0].flags == flags).all()
            assert (vcpu.ram == ram).all()
        thread.join(60.0)
        assert not thread.is_alive()


def test_a_port_write_stops_right_behind_itself() -> None:
    code = hexes("b8 07000000 e7 f8 ff c0 ff c0") + EXIT    # hypercall 7, then eax += 2
    with bare("unicorn", code, rdi=5, rsi=6) as vcpu:
        leave = vcpu.run()
        assert leave.event is not None
        assert leave.event.kind is PortEventKind.HYPERCALL
        assert vcpu.accel.hypercall_args() == (7, 5, 6)
        vcpu.accel.set_hypercall_result(40)
        leave = vcpu.run()
        assert leave.event is not None
        assert (leave.event.kind, leave.event.value) == (PortEventKind.EXIT, 42)


def test_string_port_access() -> None:
    """rep outsb to the console, from RSI; ins writes memory and logs it."""
    code = hexes("66 ba f803 b9 03000000 48 89 de f3 6e 66 ba fd03 48 89 df 48 81 c7 00100000 6c") + EXIT
    with bare("unicorn", code, rbx=DATA) as vcpu:
        vcpu.ram[DATA:DATA + 3] = list(b"hi\n")
        vcpu.run()
        assert vcpu.console == [b"hi\n"]
        assert vcpu.word(DATA + 0x1000, 1) == 0x20
        assert vcpu.harvest() == [DATA // PAGE_SIZE + 1]


def test_code_that_the_guest_rewrites() -> None:
    """lock incq becomes lock decq, and nops a lock incq, after both were run."""
    # 0: lock incq (%rbx); nop x4; hypercall; then RCX-selected patch by the host's hand: the guest stores.
    code = hexes("f0 48 ff 03  90 90 90 90  e7 f8"          # the pair, then out
                 "c6 47 03 0b"                              # movb $0x0b, 3(%rdi): incq -> decq
                 "c7 47 04 f0 48 ff 03"                     # movl: nops -> lock incq (%rbx)
                 "ff e7")                                   # jmp *%rdi
    with bare("unicorn", code, rbx=DATA, rdi=CODE) as vcpu:
        assert vcpu.run().kind is ExitKind.PORT
        assert vcpu.word(DATA) == 1
        for _ in range(3):
            assert vcpu.run().kind is ExitKind.PORT
            assert vcpu.word(DATA) == 1                     # -1 + 1
        assert CODE // PAGE_SIZE in vcpu.harvest()


def test_a_store_to_code_that_was_run_just_before_a_port_access() -> None:
    """What was known of the code is forgotten, and the access is carried out all the same; once."""
    code = hexes("eb 06 000000000000"       # jmp 8
                 "c605 f2ffffff 06"         # 8: movb $6, 1: what is there already
                 "e7 f8 48 ffc3")           # hypercall; inc %rbx
    with bare("unicorn", code + EXIT, rbx=5) as vcpu:
        leave = vcpu.run()
        assert leave.event is not None
        assert leave.event.kind is PortEventKind.HYPERCALL
        assert vcpu.accel.registers()["rbx"] == 5
        leave = vcpu.run()
        assert leave.event is not None
        assert leave.event.kind is PortEventKind.EXIT
        assert vcpu.accel.registers()["rbx"] == 6
        assert vcpu.harvest() == [CODE // PAGE_SIZE]


def test_more_blocks_than_are_remembered() -> None:
    """Twice over a chain of more blocks than the table of those looked at takes before it is emptied. One in 64 has
    a locked instruction, which must not be left alone: none is run twice, or without its hook, or not logged."""
    locked, plain = hexes("f0 48 ff 03 eb 00"), hexes("90 90 90 90 eb 00")      # lock incq (%rbx), or nops; jmp on
    blocks = SEEN_BLOCKS // 2 + 500
    chain = b"".join(plain if number % 64 else locked for number in range(blocks))
    to_its_start = (-(len(chain) + 10)).to_bytes(4, "little", signed=True)
    back = hexes("e7 f8 ff c9 0f 85") + to_its_start        # hypercall; dec %ecx; jnz
    assert CODE + len(chain) + len(back) + PAGE_SIZE < DATA
    with bare("unicorn", chain + back + EXIT, rbx=DATA, rcx=2) as vcpu:
        for turn in (1, 2):
            leave = vcpu.run()
            assert leave.event is not None
            assert leave.event.kind is PortEventKind.HYPERCALL
            assert vcpu.word(DATA) == turn * -(-blocks // 64)
            assert vcpu.harvest() == [DATA // PAGE_SIZE]
            assert vcpu.accel.reset_ring(1) == 1
            vcpu.control.reset_total += 1
        leave = vcpu.run()
        assert leave.event is not None
        assert leave.event.kind is PortEventKind.EXIT


# --- ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "reason", "detail", "offset"), [
    ("90 0f 0b", ExitReason.EXCEPTION, "#UD", 1),
    ("31 c9 f7 f1", ExitReason.EXCEPTION, "#DE", 2),
    ("f4", ExitReason.EXCEPTION, "#GP", 0),                                  # hlt at CPL 3
    ("0f 05", ExitReason.EXCEPTION, "#UD", 0),                               # syscall
    ("b8 00000080 8b 00", ExitReason.BAD_ADDRESS, "read of 4 bytes at 0x80000000", 5),
    ("b8 00000080 89 00", ExitReason.BAD_ADDRESS, "write of 4 bytes at 0x80000000", 5),
    ("48 b8 0000000000010000 89 00", ExitReason.BAD_ADDRESS, "0x10000000000", 10),
    ("e6 55", ExitReason.UNKNOWN_PORT, "write to unknown port 0x55 (1 bytes)", 0),
    ("66 ba 3412 ed", ExitReason.UNKNOWN_PORT, "read from unknown port 0x1234 (4 bytes)", 4),
    ("48 b8 001000f000000000 8b 00", ExitReason.BAD_ADDRESS, "0xf0001000", 10),  # the machine's own pages
])
def test_how_a_guest_ends(code: str, reason: ExitReason, detail: str, offset: int) -> None:
    with bare("unicorn", hexes(code)) as vcpu:
        leave = vcpu.run()
        assert leave.kind is ExitKind.END
        assert leave.reason is reason
        assert detail in leave.detail
        assert leave.registers is not None
        assert leave.registers["rip"] == CODE + offset


def test_halt_at_kernel_privilege() -> None:
    with bare("unicorn", hexes("f4"), privilege="kernel") as vcpu:
        assert vcpu.run().reason is ExitReason.HALT


def test_an_exception_without_an_idt_is_a_triple_fault() -> None:
    code = hexes("0f 01 1b 0f 0b")      # lidt (%rbx); ud2
    with bare("unicorn", code, privilege="kernel", rbx=DATA) as vcpu:
        assert vcpu.run().reason is ExitReason.TRIPLE_FAULT
