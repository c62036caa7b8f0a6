"""What threads are doing becomes data: a call that waits goes on waiting, and what a signal does to it is the same."""

from __future__ import annotations

import ctypes
import errno
import mmap
import signal
import struct
from collections.abc import Sequence
from typing import Any

import pytest
from kept import SECOND, Machine, packed
from twice import Out

from ipc.programs import REGISTERS, Answer, Kind, Mailbox, tables_page
from workers.linux.abi import number_of
from workers.linux.dispatch import Dispatcher
from workers.linux.signals import INIT_XSAVE
from workers.linux.space import PAGE
from workers.state import StateError

RAX, RIP, RSP, RDI = (REGISTERS.index(name) for name in ("rax", "rip", "rsp", "rdi"))
ARGUMENTS = [REGISTERS.index(name) for name in ("rdi", "rsi", "rdx", "r10", "r8", "r9")]
THREADS = 3
PLAIN = Answer.ROOT | Answer.FS | Answer.REGISTERS      # the XSAVE area is in the vCPU
FRESH = PLAIN | Answer.SET_XSAVE
HANDLER = struct.pack("<QQQQ", 0x4000, 0, 0, 0)
XSAVE = (INIT_XSAVE[:24] + b"\x7f\x1f" + INIT_XSAVE[26:]).ljust(PAGE, b"\0")


class Ram:
    """For futexes: of those here nobody is woken."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def host_address(self, frame: int, offset: int) -> int:
        return self._machine.system_launcher.host_address(frame, offset)


class Vcpus:
    """A machine, its dispatcher, and workers that do what they are told. The first thread of the program is on one."""

    def __init__(self) -> None:
        self.machine = Machine()
        thread = self.machine.thread
        self._connect()
        self.dispatcher.launch(thread, [0] * len(REGISTERS), 0x77)
        self.ready()

    def _connect(self) -> None:
        machine: Any = self.machine
        machine.system_launcher = machine.system.launcher
        self.memory = mmap.mmap(-1, tables_page(THREADS) * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.boxes = [Mailbox(self.memory, address, THREADS, index) for index in range(THREADS)]
        self.dispatcher = Dispatcher(machine.system, self.boxes, Ram(machine), lambda: None)    # type: ignore[arg-type]
        machine.system.launcher = self.dispatcher

    def ready(self, running: dict[int, list[int]] | None = None) -> None:
        """All workers are there; ``running``: registers that their vCPUs have."""
        for index, box in enumerate(self.boxes):
            for place, value in enumerate((running or {}).get(index, ())):
                box.registers[place] = value
            box.fs_base, box.xsave[:] = 0x99, XSAVE
            box.ask(Kind.READY)
        self.serve()

    def serve(self) -> None:
        while self.dispatcher.serve_asked(lambda: False) | self.dispatcher.serve_others():
            pass

    def call(self, index: int, name: str, *arguments: int | bytes, rip: int = 0x1002) -> None:
        """It is made, and served."""
        registers = [0x10 + at for at in range(len(REGISTERS))]
        registers[RAX], registers[RIP] = number_of(name), rip
        registers[RSP] = self.machine.scratch + 30 * PAGE
        at = self.machine.scratch + 8 * PAGE * (index + 1)
        for place, each in zip(ARGUMENTS, arguments, strict=False):
            if isinstance(each, bytes):
                self.machine.thread.process.space.write(at, each)
                each, at = at, at + 512
            registers[place] = each
        self.ask(index, Kind.CALL, registers)
        self.serve()

    def ask(self, index: int, kind: Kind, registers: list[int], *fault: int) -> None:
        box = self.boxes[index]
        for place, value in enumerate(registers):
            box.registers[place] = value
        box.ask(kind, *fault)

    def take(self, index: int) -> tuple[Answer, int] | None:
        """The answer; None: it waits still."""
        if self.boxes[index].waits:
            return None
        answer, result = self.boxes[index].take()
        return Answer(answer), result - (1 << 64) if result >> 63 else result

    def registers(self, index: int) -> list[int]:
        return list(self.boxes[index].registers)

    def new_thread(self) -> int:
        """On a vCPU of its own."""
        self.call(0, "clone", 0x10100)
        answer, tid = self.take(0) or (Answer(0), 0)
        assert tid > 0, (answer, tid)
        return next(index for index in range(1, THREADS) if self.take(index) is not None)

    def journey(self, ahead: int = 0) -> list[dict[str, Any]]:
        """What was saved of threads."""
        saved = packed(self.dispatcher.save())
        self.machine.journey(ahead)
        self._connect()
        self.dispatcher.load(saved, [])
        assert packed(self.dispatcher.save()) == saved
        return saved


@pytest.fixture
def vcpus() -> Vcpus:
    found = Vcpus()
    assert found.take(0) == (FRESH, 0)
    return found


def pipe(vcpus: Vcpus) -> tuple[int, int]:
    one, other = struct.unpack("<ii", vcpus.machine.call("pipe2", Out(8), 0)[1][0])
    return one, other


def test_a_thread_that_is_in_the_guest(vcpus: Vcpus) -> None:
    registers = list(range(18))
    saved, = vcpus.journey()
    assert (saved["registers"], saved["xsave"], saved["vcpu"]) == (None, None, 0)
    vcpus.ready({0: registers})
    assert vcpus.take(0) == (Answer.ROOT, 0)
    box = vcpus.boxes[0]
    assert (list(box.registers), box.fs_base, bytes(box.xsave)) == (registers, 0x99, XSAVE)
    assert box.root == vcpus.machine.thread.process.space.root


def test_what_is_missing(vcpus: Vcpus) -> None:
    saved, = vcpus.dispatcher.save()

    def load(*threads: dict[str, Any], ended: Sequence[int] = ()) -> None:
        system: Any = vcpus.machine.system
        Dispatcher(system, vcpus.boxes, None, lambda: None).load(list(threads), ended)      # type: ignore[arg-type]

    load(saved, ended=[1])
    load(saved | {"vcpu": None, "registers": [0] * 18, "xsave": b""})
    for change in ({"vcpu": None}, {"vcpu": None, "registers": [0] * 18}, {"registers": [0] * 17},
                   {"registers": [-1] * 18}, {"registers": 3}, {"xsave": bytes(5000)}, {"tid": 9}, {"vcpu": THREADS},
                   {"vcpu": -1}, {"vcpu": "0"}, {"call": True}, {"exception": [0, 0, 0]}, {"trap": [1, 2]}):
        with pytest.raises(StateError):
            load(saved | change)
    for threads, ended in (([saved, saved], []), ([saved], [0]), ([], [THREADS])):
        with pytest.raises(StateError):
            load(*threads, ended=ended)


def test_a_call_that_waits(vcpus: Vcpus) -> None:
    reading, writing = pipe(vcpus)
    other = vcpus.new_thread()
    vcpus.call(0, "read", reading, vcpus.machine.scratch, 10)
    assert vcpus.take(0) is None
    before = vcpus.registers(0)
    saved = vcpus.journey()
    found = next(each for each in saved if each["vcpu"] == 0)
    assert found["registers"] == [*before[:RIP], before[RIP] - 2, before[RIP + 1]]
    assert found["registers"][RAX] == 0
    vcpus.ready()
    assert vcpus.take(0) is None
    assert vcpus.registers(0) == before
    assert vcpus.take(other) == (Answer.ROOT, 0)
    vcpus.journey()             # once more, and nothing has been in the guest
    vcpus.ready()
    vcpus.take(other)
    vcpus.call(other, "write", writing, b"hello", 5)
    assert vcpus.take(0) == (PLAIN, 5)
    assert vcpus.registers(0) == [5, *before[1:]]
    assert bytes(vcpus.boxes[0].xsave) == XSAVE
    assert vcpus.take(other) == (Answer(0), 5)


def test_a_call_that_nobody_has_served_yet(vcpus: Vcpus) -> None:
    registers = [0] * 18
    registers[RAX], registers[RIP] = number_of("getpid"), 0x1002
    vcpus.ask(0, Kind.CALL, registers)
    vcpus.journey()
    vcpus.ready()
    assert vcpus.take(0) == (PLAIN, 1)
    assert vcpus.registers(0)[RIP] == 0x1002


def test_a_fault_that_nobody_has_served_yet(vcpus: Vcpus) -> None:
    vcpus.ask(0, Kind.FAULT, list(range(18)), 14, 4, vcpus.machine.scratch)
    vcpus.journey()
    vcpus.ready()
    assert vcpus.take(0) == (PLAIN, 0)
    assert vcpus.registers(0) == list(range(18))


@pytest.mark.parametrize("ahead", [0, -SECOND, 10**14])
def test_a_sleep(vcpus: Vcpus, ahead: int) -> None:
    vcpus.call(0, "nanosleep", struct.pack("<qq", 2, 0), 0)
    assert vcpus.take(0) is None
    vcpus.machine.pass_time(SECOND)
    vcpus.journey(ahead)
    vcpus.ready()
    vcpus.machine.pass_time(SECOND - 1)
    vcpus.serve()
    assert vcpus.take(0) is None
    vcpus.machine.pass_time(1)
    vcpus.serve()
    assert vcpus.take(0) == (PLAIN, 0)


def enter(vcpus: Vcpus, index: int) -> tuple[Answer, bytes]:
    """The worker gives its XSAVE area, and the handler begins; how, and what it will return to (struct ucontext)."""
    answer, _ = vcpus.take(index) or (Answer(0), 0)
    assert answer & Answer.GET_XSAVE, answer
    if not answer & Answer.SET_XSAVE:
        vcpus.boxes[index].xsave[:] = XSAVE
    assert bytes(vcpus.boxes[index].xsave) == XSAVE
    vcpus.boxes[index].ask(Kind.XSAVE)
    vcpus.serve()
    assert vcpus.take(index) == (Answer.REGISTERS | Answer.SET_XSAVE, 0)
    assert vcpus.registers(index)[RIP] == 0x4000
    return answer, vcpus.machine.thread.process.space.read(vcpus.registers(index)[RSP] + 8, 304)


def returns_to(context: bytes) -> tuple[int, int]:
    """(RAX, RIP)"""
    words = struct.unpack("<23Q", context[40:40 + 23 * 8])
    return words[13], words[16]


@pytest.mark.parametrize("when", ["before", "after", "later"])
@pytest.mark.parametrize(("name", "arguments"), [
    ("pause", ()), ("rt_sigsuspend", (bytes(8), 8)), ("ppoll", (b"", 0, 0, bytes(8), 8)), ("read", (0, 0, 10))])
def test_a_signal_and_a_call_that_waits(vcpus: Vcpus, when: str, name: str, arguments: tuple[Any, ...]) -> None:
    """It comes before the state is saved, or before the call is made again, or after that: the call has been
    interrupted, and is not made after the handler."""
    machine = vcpus.machine
    if name == "read":
        arguments = (pipe(vcpus)[0], machine.scratch, 10)
    machine.call("rt_sigaction", signal.SIGUSR1, HANDLER, 0, 8)
    if name in ("rt_sigsuspend", "ppoll"):
        machine.call("rt_sigprocmask", 0, struct.pack("<Q", 1 << signal.SIGUSR1 - 1), 0, 8)
    vcpus.call(0, name, *arguments)
    assert vcpus.take(0) is None
    if when == "before":
        machine.call("kill", 1, signal.SIGUSR1)
    vcpus.journey()
    if when == "after":
        machine.call("kill", 1, signal.SIGUSR1)
    vcpus.ready()
    if when == "later":
        assert vcpus.take(0) is None
        machine.call("kill", 1, signal.SIGUSR1)
        vcpus.serve()
    answer, context = enter(vcpus, 0)
    assert answer & PLAIN == PLAIN
    assert returns_to(context) == (-errno.EINTR & (1 << 64) - 1, 0x1002)
    mask, = struct.unpack_from("<Q", context, 296)
    assert mask == (1 << signal.SIGUSR1 - 1 if name in ("rt_sigsuspend", "ppoll") else 0)


def test_a_fault_that_is_a_signal(vcpus: Vcpus) -> None:
    """What the handler is told of it."""
    vcpus.machine.call("rt_sigaction", signal.SIGSEGV, HANDLER, 0, 8)
    registers = [0] * 18
    registers[RSP], registers[RIP] = vcpus.machine.scratch + 30 * PAGE, 0x1234
    vcpus.ask(0, Kind.FAULT, registers, 14, 6, 0x5000)
    vcpus.serve()
    answer, _ = vcpus.take(0) or (Answer(0), 0)
    assert answer & Answer.GET_XSAVE
    vcpus.boxes[0].xsave[:] = XSAVE
    vcpus.boxes[0].ask(Kind.XSAVE)
    saved = vcpus.journey()
    assert saved[0]["xsave"] == XSAVE
    assert saved[0]["trap"] == [6, 14, 0x5000]
    vcpus.ready()
    _, context = enter(vcpus, 0)
    error, vector, _, address = struct.unpack_from("<4Q", context, 192)
    assert (error, vector, address) == (6, 14, 0x5000)
    assert returns_to(context)[1] == 0x1234


def test_a_process_that_is_stopped(vcpus: Vcpus) -> None:
    """It stays so: a call that waits takes nothing, and who would go on does not."""
    machine = vcpus.machine
    reading, writing = pipe(vcpus)
    other = vcpus.new_thread()
    vcpus.call(0, "read", reading, machine.scratch, 10)
    machine.system.stop(machine.thread.process, signal.SIGSTOP)
    vcpus.call(other, "getpid")
    assert vcpus.take(other) is None
    machine.system.processes[1].files.get(writing).pipe.write(b"there", packets=False)      # type: ignore[attr-defined]
    vcpus.journey()
    vcpus.ready()
    assert (vcpus.take(0), vcpus.take(other)) == (None, None)
    assert machine.system.processes[1].files.get(reading).pipe.filled == 5      # type: ignore[attr-defined]
    machine.system._acts_at_once(machine.system.processes[1], signal.SIGCONT)
    vcpus.serve()
    assert vcpus.take(0) == (PLAIN, 5)
    assert vcpus.take(other) == (PLAIN, 1)


def test_what_a_stopped_thread_goes_on_with(vcpus: Vcpus) -> None:
    """Where its call has changed more than the result."""
    machine = vcpus.machine
    other = vcpus.new_thread()
    machine.system.stop(machine.thread.process, signal.SIGSTOP)
    vcpus.call(other, "arch_prctl", 0x1002, 0x6000)
    assert vcpus.take(other) is None
    machine.system._acts_at_once(machine.thread.process, signal.SIGCONT)
    vcpus.serve()
    answer, _ = vcpus.take(other) or (Answer(0), 0)
    assert answer & Answer.FS
    assert vcpus.boxes[other].fs_base == 0x6000


def test_threads_that_have_not_begun(vcpus: Vcpus) -> None:
    """And processor time, which does not begin again."""
    for _ in range(2):
        vcpus.new_thread()
    vcpus.machine.thread.cpu_ns = 5000
    machine = vcpus.machine
    registers = [7] * 18
    late = machine.system.new_thread(machine.thread.process, b"late")
    late.registers = registers
    vcpus.dispatcher.launch(late, registers, 0x11)
    saved = vcpus.journey()
    assert [each["vcpu"] for each in saved] == [0, 1, 2, None]
    vcpus.ready()
    # The last has not heard where it begins.
    assert [vcpus.take(index) for index in range(THREADS)] == [(Answer.ROOT, 0), (Answer.ROOT, 0), (FRESH, 0)]
    vcpus.call(1, "exit", 0)
    answer, _ = vcpus.take(1) or (Answer(0), 0)
    assert answer & Answer.IDLE
    vcpus.boxes[1].ask(Kind.READY)
    vcpus.serve()
    assert vcpus.take(1) == (FRESH, 7)
    assert (vcpus.registers(1), vcpus.boxes[1].fs_base, bytes(vcpus.boxes[1].xsave)) == (registers, 0x11, INIT_XSAVE)
    vcpus.boxes[0].cpu_ns = 300
    vcpus.call(0, "getpid")
    assert machine.system.threads[1].cpu_ns == 5300
