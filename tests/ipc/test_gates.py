"""Gates: their code, run by a processor that is none of KVM's, stopped behind each of its instructions."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from ipc.gates import DESK_REGISTERS, DONE, FUTEX, INSIDE, LEAST_ANSWER, Looks, Stop, Waits, gate, stopped_at

unicorn = pytest.importorskip("unicorn")
x86 = pytest.importorskip("unicorn.x86_const")

PAGE = 4096
BELL, WAITS, GATE, DESK, STACK, PROGRAM = 0x10_0000, 0x10_1000, 0x20_0000, 0x20_1000, 0x30_0000, 0x40_0002
THREADS = 5
NAMES = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
         "rip", "eflags")
IDS = [getattr(x86, f"UC_X86_REG_{name.upper()}") for name in NAMES]
CALL, RESULT = 39, 0x1234_5678_9ABC
FREE = 0

#: Of a program: arithmetic flags, direction, ID.
FLAGS = 0x202 | 0x8D5 | 0x400 | 0x20_0000
FMASK = 0x47700


@dataclass
class Step:
    """Before an instruction: where, and all that there is."""

    place: int
    state: int
    registers: dict[str, int]
    desk: dict[str, int]


class Processor:
    """It stands behind ``syscall``. ``answer``: the system, each time that the state of the mailbox is looked at: the
    number of looks so far; it gives the new state."""

    def __init__(self, *, looks: int = 5, asleep: bool = False, call: int = CALL, flags: int = FLAGS,
                 waits: Callable[[memoryview], None] = lambda page: None, moved: dict[str, int] | None = None,
                 answer: Callable[[int], int] = lambda looked: INSIDE, seed: int = 1) -> None:
        self.cpu = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        for at in (BELL, WAITS, GATE, DESK, STACK, PROGRAM & -PAGE):
            self.cpu.mem_map(at, PAGE)
        self.cpu.mem_write(GATE, gate(THREADS, desk=DESK - GATE, bell=BELL - GATE, waits=WAITS - GATE))
        waits(memoryview(page := bytearray(PAGE)))
        page[0xFFC] = asleep
        self.cpu.mem_write(WAITS, bytes(page))
        self.looks = Looks(memoryview(table := bytearray(PAGE)))
        self.looks.begin(set(range(512)) - {CALL})
        table[0x400 + 2 * CALL:0x402 + 2 * CALL] = struct.pack("<H", looks)
        self.looks.close()
        self.cpu.mem_write(DESK, bytes(table))
        chance = random.Random(seed)
        self.before = {name: chance.getrandbits(64) for name in NAMES}
        self.before |= {"rax": call, "rsp": STACK + 0x800, "rcx": PROGRAM, "r11": flags, "rip": GATE,
                        "eflags": flags & ~FMASK | 2} | (moved or {})
        for name, number in zip(NAMES, IDS, strict=True):
            self.cpu.reg_write(number, self.before[name])
        self.stack = bytes(chance.randbytes(PAGE))
        self.cpu.mem_write(STACK, self.stack)
        self.looked, self.answer = 0, answer
        self.left = False
        self.cpu.hook_add(unicorn.UC_HOOK_MEM_READ, self._look, begin=DESK, end=DESK + 3)
        self.cpu.hook_add(unicorn.UC_HOOK_INSN, self._out, aux1=x86.UC_X86_INS_OUT)

    def _look(self, *_: object) -> None:
        self.looked += 1
        state = self.answer(self.looked)
        if state == DONE:
            self.cpu.mem_write(DESK + DESK_REGISTERS, RESULT.to_bytes(8, "little"))
        self.cpu.mem_write(DESK, struct.pack("<I", state))

    def _out(self, cpu: object, port: int, size: int, value: int, *_: object) -> None:
        assert (port, size) == (0xF1, 1)
        self.left = True
        self.cpu.emu_stop()

    def registers(self) -> dict[str, int]:
        return dict(zip(NAMES, map(self.cpu.reg_read, IDS), strict=True))

    def desk(self) -> dict[str, int]:
        return dict(zip(NAMES, struct.unpack("<18Q", self.cpu.mem_read(DESK + DESK_REGISTERS, 144)), strict=True))

    @property
    def state(self) -> int:
        return int(struct.unpack("<I", self.cpu.mem_read(DESK, 4))[0])

    @property
    def rung(self) -> bool:
        return bool(self.cpu.mem_read(BELL, 1)[0])

    def steps(self) -> Iterator[Step]:
        """All, to the port or back to the program."""
        while not self.left and (place := self.cpu.reg_read(x86.UC_X86_REG_RIP)) != PROGRAM:
            yield Step(place - GATE, self.state, self.registers(), self.desk())
            self.cpu.emu_start(place, 0, count=1)

    def run(self) -> None:
        assert 0 < sum(1 for _ in self.steps()) < 10_000

    def as_called(self) -> dict[str, int]:
        """The program's registers when it goes on, but for the result."""
        flags = self.before["r11"] & 0x24_0DD5 | 0x202
        return self.before | {"rip": PROGRAM, "eflags": flags}


WORD = STACK + 0x7C4


def waker(waits: Callable[[memoryview], None] = lambda page: None, *, word: int = WORD,
          operation: int = 1) -> Processor:
    return Processor(call=FUTEX, waits=waits, moved={"rdi": word, "rsi": 0xABC << 32 | operation, "rdx": 1})


def said(index: int, word: int = WORD, *, over: bool = False) -> Callable[[memoryview], None]:
    """By a worker, that it waits on this word."""
    def say(page: memoryview) -> None:
        waits = Waits(page, index)
        waits.begin(word)
        if over:
            waits.end()
        waits.close()

    return say


def moved(page: memoryview) -> None:
    waits = Waits(page, 0)
    waits.move()
    waits.close()


def as_seen(registers: dict[str, int], *but: str) -> dict[str, int]:
    return {name: value for name, value in registers.items() if name not in but}


def test_an_answer_that_comes_in_time_is_taken_without_leaving() -> None:
    cpu = Processor(answer=lambda looked: DONE if looked == 3 else INSIDE)
    cpu.run()
    assert not cpu.left
    assert cpu.rung
    assert cpu.state == FREE
    assert as_seen(cpu.registers(), "eflags") == as_seen(cpu.as_called() | {"rax": RESULT}, "eflags")
    assert (cpu.registers()["eflags"] ^ FLAGS) & 0x24_0DD5 == 0
    assert bytes(cpu.cpu.mem_read(STACK, PAGE)) == cpu.stack        # its red zone too
    assert cpu.cpu.mem_read(DESK + 0x800 + 2 * CALL, 2) == b"\1\0"


@pytest.mark.parametrize(("cpu", "asked"), [
    (lambda: Processor(looks=0), False),
    (lambda: Processor(call=512), False),
    (lambda: Processor(call=(1 << 64) - 1), False),
    (lambda: Processor(call=CALL + 1), False),
    (lambda: Processor(flags=FLAGS | 0x100), False),        # single steps
    (lambda: Processor(asleep=True), True),
    (lambda: Processor(looks=7), True),
    (lambda: Processor(answer=lambda looked: LEAST_ANSWER), True),
    (lambda: Processor(answer=lambda looked: 3), True),
], ids=["no looks", "no number", "negative", "outside", "trap", "asleep", "in vain", "more than a result", "held"])
def test_a_call_that_is_left_to_the_worker_has_all_registers(cpu: Callable[[], Processor], asked: bool) -> None:
    found = cpu()
    found.run()
    assert found.left
    assert as_seen(found.registers(), "rip", "eflags") == as_seen(found.before, "rip", "eflags")
    assert (found.state != FREE) is asked
    assert found.rung is asked
    if asked:
        assert found.desk() == found.as_called()


@pytest.mark.parametrize(("cpu", "answered"), [
    (lambda: waker(), True),
    (lambda: waker(operation=0x81), True),
    (lambda: waker(said(0)), False),
    (lambda: waker(said(THREADS - 1)), False),
    (lambda: waker(said(2, WORD + 5 * PAGE)), False),       # the same page, perhaps, mapped elsewhere
    (lambda: waker(said(2, WORD + 4)), True),
    (lambda: waker(said(2, over=True)), True),
    (lambda: waker(said(0, STACK), word=STACK), False),
    (lambda: waker(said(0, STACK + PAGE - 4), word=STACK), True),
    (lambda: waker(moved), False),
    *((lambda operation=operation: waker(operation=operation), False)
      for operation in (0, 2, 3, 9, 10, 0x80, 0x101, 0x181)),
    (lambda: waker(word=WORD + 2), False),
    (lambda: waker(word=WORD + (1 << 47)), False),
    (lambda: waker(word=1 << 63), False),
])
def test_to_wake_nobody_needs_nobody(cpu: Callable[[], Processor], answered: bool) -> None:
    """Else the worker has the call, with all registers."""
    found = cpu()
    found.run()
    assert found.left is not answered
    if answered:
        assert as_seen(found.registers(), "eflags") == as_seen(found.as_called() | {"rax": 0}, "eflags")
        assert (found.registers()["eflags"] ^ FLAGS) & 0x24_0DD5 == 0
    else:
        assert as_seen(found.registers(), "rip", "eflags") == as_seen(found.before, "rip", "eflags")
    assert found.state == FREE
    assert not found.rung
    assert bytes(found.cpu.mem_read(STACK, PAGE)) == found.stack


def test_a_word_that_is_not_there_is_a_fault_of_the_gate_from_which_the_worker_has_the_call() -> None:
    found = waker(word=0x7000_0000)
    with pytest.raises(unicorn.UcError):
        found.run()
    registers = found.registers()
    assert stopped_at(registers["rip"] - GATE) is Stop.WAKING
    assert found.state == FREE
    as_left = registers | {name: found.desk()[name] for name in ("rcx", "r11")} | {"rax": FUTEX}
    assert as_seen(as_left, "rip", "eflags") == as_seen(found.before, "rip", "eflags")


def test_it_looks_as_often_as_it_is_told() -> None:
    found = Processor(looks=7)
    found.run()
    assert found.looked == 7


@pytest.mark.parametrize("cpu", [
    lambda: Processor(answer=lambda looked: DONE if looked == 2 else INSIDE), lambda: Processor(looks=0),
    lambda: Processor(asleep=True), lambda: Processor(looks=2), lambda: Processor(answer=lambda looked: LEAST_ANSWER),
    lambda: waker(), lambda: waker(said(3))])
def test_wherever_it_is_stopped_the_program_goes_on_as_if_it_had_not_been(cpu: Callable[[], Processor]) -> None:
    """The state says whether the call has been made; the registers are where `Stop` says. A call is never lost, and
    never made twice: it is asked for when the state says so, and no more once the answer has been taken."""
    found = cpu()
    seen = set()
    asked = taken = False
    for step in found.steps():
        stop = stopped_at(step.place)
        assert stop is not None
        seen.add(stop)
        asked = asked or step.state == INSIDE
        now = dict(step.registers)
        if stop is Stop.BACK:
            taken = True
            assert step.state == FREE
            now |= {name: step.desk[name] for name in ("rax", "rcx", "rsp", "r11", "rip", "eflags")}
            assert now == found.as_called() | {"rax": 0 if found.before["rax"] == FUTEX else RESULT}
            continue
        assert not taken
        assert asked is (step.state != FREE)
        if stop is not Stop.ENTERED:
            now |= {name: step.desk[name] for name in ("rcx", "r11")}
        if stop is Stop.WAKING:
            now |= {"rax": FUTEX}
        but = ("rip", "eflags", *(("rax",) if step.state == DONE else ()))
        assert as_seen(now, *but) == as_seen(found.before, *but)
        if step.state == INSIDE:
            assert step.desk == found.as_called()
    waking = [Stop.WAKING] if found.before["rax"] == FUTEX else []
    assert seen == {Stop.ENTERED, Stop.BEGUN, *waking, *([] if found.left else [Stop.BACK])}
    assert stopped_at(-1) is None
    assert stopped_at(len(gate(1, desk=0, bell=0, waits=0))) is None


def test_a_call_for_which_looking_is_of_no_use_is_left_to_the_worker_more_and_more_often() -> None:
    desk = bytearray(PAGE)
    looks = Looks(memoryview(desk))

    def makes(number: int) -> bool:
        return bool(struct.unpack_from("<H", desk, 0x400 + 2 * number)[0])

    try:
        assert not makes(1)
        looks.begin([7])
        assert [makes(each) for each in (1, 7, 511)] == [True, False, True]
        for most in (1, 3, 7, 15, 31, 63, 127, 127):
            looks.in_vain(1)
            assert not makes(1)
            assert makes(2)
            count = 0
            while not makes(1):
                looks.passed(1)
                count += 1
            assert count == most
        desk[0x802] = 1             # an answer has come in time
        looks.in_vain(1)
        looks.passed(1)
        assert makes(1)
        looks.in_vain(7)
        looks.in_vain(1 << 40)
        looks.passed(7)
        looks.passed(1 << 40)
        assert not makes(7)
    finally:
        looks.close()
