"""Which thread is used and which is not; and its registers as a signal frame has them."""

from __future__ import annotations

import struct

import pytest

from ipc.linux.foreign import Mapping
from ipc.linux.ptrace import Registers
from vmm.consumers.watch.frame import RED_ZONE, after_restart, build, frame_room
from vmm.consumers.watch.threads import stack_unfit

MINUS = 1 << 64
NEEDED = 8192

MAIN = Mapping(0x7FF0_0000, 0x7FF2_1000, "rw-p", 0, "[stack]")
HEAP = Mapping(0x1000_0000, 0x1080_0000, "rw-p", 0, "")
GUARD = Mapping(0x2000_0000, 0x2000_1000, "---p", 0, "")
STACK = Mapping(0x2000_1000, 0x2080_1000, "rw-p", 0, "")
RESERVED = Mapping(0x3000_0000, 0x4000_0000, "---p", 0, "")
BEHIND = Mapping(0x4000_0000, 0x4080_0000, "rw-p", 0, "")
FILE = Mapping(0x5000_0000, 0x5080_0000, "rw-p", 7, "/tmp/x")
THERE = [HEAP, GUARD, STACK, RESERVED, BEHIND, FILE, MAIN]


def at(rsp: int, fs_base: int = 0, cs: int = 0x33) -> Registers:
    return Registers(rsp=rsp, fs_base=fs_base, cs=cs)


@pytest.mark.parametrize(("registers", "main", "reason"), [
    (at(MAIN.end - 4096), True, ""),
    (at(MAIN.start + NEEDED), True, ""),
    (at(MAIN.start + NEEDED - 16), True, "at the end of its stack"),
    (at(MAIN.end - 4096), False, "on the stack of another thread"),
    (at(STACK.end - 8192, STACK.end - 4096), False, ""),
    (at(STACK.start + 16384, STACK.end - 4096), False, "near the end of its stack"),
    (at(STACK.end - 4096, STACK.end - 8192), False, "not that of its thread"),
    (at(STACK.end - 8192, MAIN.start), False, "not that of its thread"),
    (at(HEAP.end - 8192, HEAP.end - 4096), False, "without a guard below it"),
    (at(BEHIND.end - 8192, BEHIND.end - 4096), False, "without a guard below it"),      # a reservation is no guard
    (at(FILE.end - 8192, FILE.end - 4096), False, "of its program's own"),
    (at(0x6000_0000), False, "without a stack"),
    (at(MAIN.end - 4096, cs=0x23), True, "in 32-bit code")])
def test_only_what_is_known_to_be_a_stack_is_one(registers: Registers, main: bool, reason: str) -> None:
    found = stack_unfit(registers, THERE, main, NEEDED)
    assert found == reason if not reason else reason in found


@pytest.mark.parametrize(("rax", "call", "then"), [
    (MINUS - 512, 202, (202, -2)), (MINUS - 513, 61, (61, -2)), (MINUS - 514, 271, (271, -2)),
    (MINUS - 516, 230, (MINUS - 4, 0)), (MINUS - 4, 232, (MINUS - 4, 0)), (7, 0, (7, 0)),
    (MINUS - 512, MINUS - 1, (MINUS - 512, 0))], ids=["again", "again-always", "again-without-handler", "rest-of-sleep",
                                                      "interrupted", "done", "in-no-call"])
def test_a_call_that_was_interrupted_is_made_again(rax: int, call: int, then: tuple[int, int]) -> None:
    found = after_restart(Registers(rax=rax, orig_rax=call, rip=0x1000))
    assert (found.rax, found.rip - 0x1000, found.orig_rax) == (*then, MINUS - 1)


def state(size: int, features: int, there: int) -> bytes:
    return bytes(464) + struct.pack("<Q", features) + bytes(40) + struct.pack("<Q", there) + bytes(size - 520)


@pytest.mark.parametrize("rsp", [0x7FFF_FF00, 0x7FFF_FF08, 0x7FFF_FF38])
def test_a_frame_is_below_the_red_zone_and_lies_as_the_processor_wants_it(rsp: int) -> None:
    whole = state(832, 7, 7)
    found = build(Registers(rsp=rsp, rip=0x1234, orig_rax=MINUS - 1), whole, 0xF0, 0x5678)
    assert found.address + len(found.data) <= rsp - RED_ZONE
    assert rsp - found.address <= frame_room(whole)
    assert found.stack == found.address
    assert found.stack % 16 == 8
    assert found.data[:8] == struct.pack("<Q", 0x5678)
    saved = found.data[48:48 + 144]
    assert struct.unpack_from("<Q", saved, 120)[0] == rsp
    assert struct.unpack_from("<Q", saved, 128)[0] == 0x1234
    (fpstate,) = struct.unpack_from("<Q", found.data, 48 + 184)
    assert fpstate % 64 == 0
    there = found.data[fpstate - found.address:]
    assert struct.unpack_from("<IIQI", there, 464) == (0x46505853, 836, 7, 832)
    assert there[832:] == struct.pack("<I", 0x46505845)
    assert found.data[304:312] == struct.pack("<Q", 0xF0)


def test_tiles_are_left_out_unless_they_are_used() -> None:
    """AMX: features 17 and 18; a thread that has not asked for them has a smaller frame."""
    tiles = 3 << 17
    found = build(Registers(rsp=1 << 30, orig_rax=MINUS - 1), state(11008, 7 | tiles, 7), 0, 0)
    (fpstate,) = struct.unpack_from("<Q", found.data, 48 + 184)
    assert struct.unpack_from("<IIQI", found.data, fpstate - found.address + 464) == (0x46505853, 2756, 7, 2752)
    with pytest.raises(ValueError, match="AMX"):
        build(Registers(rsp=1 << 30), state(11008, 7 | tiles, 7 | 1 << 18), 0, 0)
    with pytest.raises(ValueError, match="no XSAVE"):
        build(Registers(rsp=1 << 30), bytes(512), 0, 0)
