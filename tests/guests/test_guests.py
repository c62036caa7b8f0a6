"""The sample guests: images against sources, metadata against sources, and each image's work.

The images run here on a bare software CPU with nothing around it (no accelerator, no coordinator), one
instruction stream at a time; what they leave in memory is compared with a model in Python.
"""

from __future__ import annotations

import ctypes
import platform
import re
import struct
from collections.abc import Sequence

import pytest
from unicorn import UC_ARCH_X86, UC_HOOK_INSN, UC_MODE_64, UC_PROT_ALL, Uc, UcError
from unicorn import x86_const as x86

from vmm.guests import WORKLOADS, WorkloadError, build, resolve_params
from vmm.machine.boot import (
    SYSTEM_GPA,
    BootSlot,
    boot_registers,
    boot_slots,
    set_round,
    stack_top,
    system_size,
    write_system_slot,
)
from vmm.machine.loader import check_fits, load_image

PAGE = 4096
MASK = (1 << 64) - 1


# --- images and metadata --------------------------------------------------------------------------


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the guests are assembled on x86-64 only")
@pytest.mark.skipif(bool(build.missing_tools()), reason=f"not installed: {', '.join(build.missing_tools())}")
def test_images_are_what_their_sources_build():
    assert build.differing() == []


def test_build_check_reports_a_stale_image(monkeypatch, capsys):
    monkeypatch.setattr(build, "differing", lambda: ["hello"])
    assert build.main(["--check"]) == 1
    assert "hello.elf does not match what hello.S builds" in capsys.readouterr().err


def test_build_without_tools_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert build.main(["--check"]) == 2
    assert capsys.readouterr().err == "'as' is not installed (Debian: apt install binutils)\n"


def test_every_source_is_a_workload_and_has_its_image():
    assert {source.stem for source in build.sources()} == set(WORKLOADS)
    for name, workload in WORKLOADS.items():
        image = load_image(workload.image)
        assert workload.name == name
        assert image.entry == image.start == 0x100000
        assert image.end - image.start < PAGE


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=list(WORKLOADS))
def test_parameters_stand_where_the_source_reads_them(workload):
    source = (build.SOURCE_DIR / f"{workload.name}.S").read_text()
    numbers = {name.lower(): int(number)
               for name, number in re.findall(r"^\s*\.equ\s+PARAM_(\w+),\s*(\d+)", source, re.MULTILINE)}
    assert numbers == {param.name: place for place, param in enumerate(workload.params)}
    for param in workload.params:
        assert param.minimum <= param.default <= param.maximum
        assert param.help


def test_parameters_are_resolved_in_order():
    assert resolve_params("sequential", {}) == [4, 1, 0, 0]
    assert resolve_params("sequential", {"spin": 7, "passes": 0}) == [0, 1, 0, 7]


@pytest.mark.parametrize(("workload", "params", "message"), [
    ("sequental", {}, r"unknown workload 'sequental' \(did you mean 'sequential'\?\); choose from seq"),
    ("random", {"write": 1}, r"no parameter 'write' \(did you mean 'writes'\?\); choose from writes, seed"),
    ("random", {"colour": 1}, "no parameter 'colour'; choose from writes, seed, pages, spin"),
    ("hotspot", {"hot_percent": 101}, r"hot_percent must be from 0 to 100 \(got 101\)"),
    ("sequential", {"stride": 0}, "stride must be from 1 to"),
    ("hello", {"lines": True}, r"lines must be a whole number \(got True\)"),
    ("hello", {"lines": "2"}, r"lines must be a whole number \(got '2'\)"),
    ("hello", {3: 1}, "no parameter '3'"),
])
def test_wrong_parameters(workload, params, message):
    with pytest.raises(WorkloadError, match=message) as caught:
        resolve_params(workload, params)
    assert "\n" not in str(caught.value)


# --- a bare machine ---------------------------------------------------------------------------------


class BareMachine:
    """vCPUs that take turns of a few instructions over one memory, until all have exited."""

    # Two slots with a hole between them; the second one's page count is no multiple of anything.
    LAYOUT = ((0, 0, 2 << 20), (1, 0x4000_0000, 37 * PAGE))

    def __init__(self, workload: str, params: dict[str, int], vcpus: int = 1,
                 layout: Sequence[tuple[int, int, int]] = LAYOUT) -> None:
        image = load_image(WORKLOADS[workload].image)
        check_fits(image, [(gpa, size) for _, gpa, size in layout])
        self.vcpus = vcpus
        self.slots = boot_slots(layout, image.ranges, vcpu_count=vcpus, stack_size=PAGE)
        top = max(gpa + size for _, gpa, size in layout)
        size = system_size(vcpus, top)
        self.memory = {gpa: ctypes.create_string_buffer(size) for _, gpa, size in layout}
        self.memory[SYSTEM_GPA] = ctypes.create_string_buffer(size)
        self.system = memoryview(self.memory[SYSTEM_GPA]).cast("B")
        write_system_slot(self.system, vcpu_count=vcpus, slots=self.slots, image_end=image.end,
                          params=resolve_params(workload, params), cmdline="", stack_size=PAGE, top_gpa=top)
        for segment in image.segments:
            self.write(segment.gpa, segment.data)
        self.console = [bytearray() for _ in range(vcpus)]
        self.exit_codes: list[int | None] = [None] * vcpus
        self.hypercalls: list[tuple[int, int, int, int]] = []   # vCPU, number, RDI, ESI
        self.cpus = [self._cpu(index, image.entry) for index in range(vcpus)]
        self.clean = self.ram()

    def _find(self, gpa: int) -> tuple[ctypes.Array[ctypes.c_char], int]:
        for base, buffer in self.memory.items():
            if base <= gpa < base + len(buffer):
                return buffer, gpa - base
        raise KeyError(hex(gpa))

    def write(self, gpa: int, data: bytes) -> None:
        buffer, at = self._find(gpa)
        buffer[at:at + len(data)] = data

    def u64(self, gpa: int) -> int:
        buffer, at = self._find(gpa)
        return struct.unpack_from("<Q", buffer, at)[0]

    def ram(self) -> dict[int, bytes]:
        return {gpa: bytes(buffer) for gpa, buffer in self.memory.items()}

    def usable_pages(self) -> list[int]:
        """GPA of every usable page, in the guests' own count."""
        return [gpa for slot in self.slots for gpa in range(slot.usable_start, slot.usable_end, PAGE)]

    def share(self, index: int) -> list[int]:
        pages = self.usable_pages()
        return pages[index * len(pages) // self.vcpus:(index + 1) * len(pages) // self.vcpus]

    def _cpu(self, index: int, entry: int) -> Uc:
        cpu = Uc(UC_ARCH_X86, UC_MODE_64)
        for gpa, buffer in self.memory.items():
            cpu.mem_map_ptr(gpa, len(buffer), UC_PROT_ALL, ctypes.addressof(buffer))
        top = stack_top(index, self.slots[0].gpa + self.slots[0].size, PAGE)
        registers = boot_registers(index, vcpu_count=self.vcpus, entry=entry, stack_top=top)
        for name, number in (("rip", x86.UC_X86_REG_RIP), ("rsp", x86.UC_X86_REG_RSP),
                             ("rdi", x86.UC_X86_REG_RDI), ("rsi", x86.UC_X86_REG_RSI),
                             ("rdx", x86.UC_X86_REG_RDX)):
            cpu.reg_write(number, registers[name])

        def out(uc: Uc, port: int, size: int, value: int, _data: object) -> None:
            if port == 0x3F8:
                self.console[index].append(value)
                return
            if port == 0xF4:
                self.exit_codes[index] = value
            else:
                assert port == 0xF8, hex(port)
                self.hypercalls.append((index, value, uc.reg_read(x86.UC_X86_REG_RDI),
                                        uc.reg_read(x86.UC_X86_REG_ESI)))
            uc.emu_stop()

        cpu.hook_add(UC_HOOK_INSN, out, None, 1, 0, x86.UC_X86_INS_OUT)
        return cpu

    def step(self, index: int, instructions: int) -> None:
        """0 instructions: until the vCPU exits or makes a hypercall."""
        cpu = self.cpus[index]
        try:
            cpu.emu_start(cpu.reg_read(x86.UC_X86_REG_RIP), MASK, count=instructions)
        except UcError:
            # emu_stop lets the translated block end first, so the CPU may come to the ud2 after an exit
            if self.exit_codes[index] is None:
                raise

    def run(self, slice_length: int = 0) -> None:
        """Until every vCPU has exited. Hypercalls do nothing, which the contract allows of yield and
        sleep, and of wait because a guest must look again."""
        for _ in range(200_000):
            left = [index for index, code in enumerate(self.exit_codes) if code is None]
            if not left:
                assert self.memory[SYSTEM_GPA].raw == self.clean[SYSTEM_GPA], "a guest wrote a system page"
                return
            for index in left:
                self.step(index, slice_length)
        raise AssertionError(f"no end: {self.exit_codes}")

    def changed(self) -> dict[int, int]:
        """{GPA of a page: its first u64} of all RAM pages that are not as they were; nothing else in
        such a page may have changed."""
        found = {}
        for base, before in self.clean.items():
            if base == SYSTEM_GPA:
                continue
            after = self.memory[base].raw
            for at in range(0, len(before), PAGE):
                if after[at:at + PAGE] != before[at:at + PAGE]:
                    assert after[at + 8:at + PAGE] == before[at + 8:at + PAGE]
                    found[base + at] = self.u64(base + at)
        return found


class Xorshift:
    """The guests' generator, after guest.inc."""

    def __init__(self, seed: int, index: int) -> None:
        mixed = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
        self.state = ((mixed >> 30) ^ mixed) * 0xBF58476D1CE4E5B9 & MASK or 0xBF58476D1CE4E5B9

    def below(self, bound: int) -> int:
        state = self.state
        state ^= state << 13 & MASK
        state ^= state >> 7
        state ^= state << 17 & MASK
        self.state = state
        return state * bound >> 64


# --- the images at work -----------------------------------------------------------------------------


@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize(("params", "written"), [
    ({"passes": 1}, slice(None)),
    ({"passes": 2, "spin": 3}, slice(None)),
    ({"passes": 3, "stride": 7}, slice(None, None, 7)),
    ({"passes": 1, "stride": 100_000}, slice(None, 1)),
    ({"passes": 1, "pages": 11, "stride": 2}, slice(0, 11, 2)),
    ({"passes": 1, "pages": 1 << 20}, slice(None)),
])
def test_sequential(vcpus, params, written):
    machine = BareMachine("sequential", params, vcpus)
    machine.run()
    assert machine.exit_codes == [0] * vcpus
    expected = {gpa: params["passes"] for index in range(vcpus) for gpa in machine.share(index)[written]}
    assert machine.changed() == expected


def test_shares_cover_every_usable_page_once():
    layout = [(0, 0, 2 << 20), (3, 0x1000_0000, PAGE), (4, 0x1000_2000, PAGE), (7, 0x2_0000_0000, 5 * PAGE)]
    machine = BareMachine("sequential", {"passes": 1}, 7, layout)
    machine.run()
    assert machine.changed() == dict.fromkeys(machine.usable_pages(), 1)


def test_no_page_for_a_vcpu_is_an_exit_code_of_its_own():
    machine = BareMachine("sequential", {}, 2, [(0, 0x100000, 4 * PAGE)])
    machine.run()
    assert machine.exit_codes == [2, 0]  # one usable page, in the last share


def test_another_version_of_the_boot_information_is_refused():
    machine = BareMachine("hello", {})
    machine.system[8] = 2
    machine.clean = machine.ram()
    machine.run()
    assert machine.exit_codes == [3]


@pytest.mark.parametrize("params", [{"writes": 500}, {"writes": 300, "seed": MASK, "pages": 20, "spin": 2}])
def test_random(params):
    machine = BareMachine("random", params, 2)
    machine.run()
    expected: dict[int, int] = {}
    for index in range(2):
        share, draw = machine.share(index)[:params.get("pages")], Xorshift(params.get("seed", 1), index)
        for _ in range(params["writes"]):
            page = share[draw.below(len(share))]
            expected[page] = expected.get(page, 0) + 1
    assert machine.exit_codes == [0, 0]
    assert machine.changed() == expected


@pytest.mark.parametrize(("hot_percent", "hot_probability"),
                         [(10, 90), (0, 50), (100, 0), (30, 0), (50, 100)])
def test_hotspot(hot_percent, hot_probability):
    machine = BareMachine("hotspot", {"writes": 400, "seed": 9, "hot_percent": hot_percent,
                                      "hot_probability": hot_probability}, 2)
    machine.run()
    expected: dict[int, int] = {}
    for index in range(2):
        share, draw = machine.share(index), Xorshift(9, index)
        hot = max(1, len(share) * hot_percent // 100)
        for _ in range(400):
            if draw.below(100) < hot_probability or hot == len(share):
                page = share[draw.below(hot)]
            else:
                page = share[hot + draw.below(len(share) - hot)]
            expected[page] = expected.get(page, 0) + 1
    assert machine.exit_codes == [0, 0]
    assert machine.changed() == expected


def test_stamp_never_writes_a_value_twice_and_follows_the_round():
    machine = BareMachine("stamp", {"writes": 0, "pages": 5}, 2)
    share = [set(machine.share(index)[:5]) for index in range(2)]
    seen: set[int] = set()
    for number in (0, 1, 2, 0x1_0000_0003):  # only the low 24 bits fit
        set_round(machine.system, number)
        for _ in range(30):
            for index in range(2):
                before = {gpa: machine.u64(gpa) for gpa in share[index]}
                machine.step(index, 40)
                for gpa in share[index]:
                    value = machine.u64(gpa)
                    if value != before[gpa]:
                        assert value >> 32 & 0xFF == index
                        assert value not in seen
                        seen.add(value)
        newest = max(machine.changed().values(), key=lambda value: value & 0xFFFF_FFFF)
        assert newest >> 40 == number & 0xFF_FFFF
    assert set(machine.changed()) <= share[0] | share[1]


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("increments", [0, 1, 60])
def test_counter(mode, increments):
    machine = BareMachine("counter", {"increments": increments, "mode": mode}, 3)
    machine.run(slice_length=13)
    base = machine.slots[0].usable_start
    assert machine.exit_codes == [0, 0, 0]
    assert machine.u64(base) == 3 * increments
    assert machine.u64(base + 0x40) == 0
    assert machine.u64(base + 0x80) == 3
    assert all(number == 0 for _, number, _, _ in machine.hypercalls)  # yields only


def test_counter_yields_to_whoever_holds_the_lock():
    machine = BareMachine("counter", {"increments": 1, "mode": 2})
    lock = machine.slots[0].usable_start + 0x40
    machine.write(lock, b"\1")
    machine.step(0, 0)
    assert machine.hypercalls == [(0, 0, 0, 1)]
    machine.write(lock, b"\0")
    machine.run()
    assert machine.exit_codes == [0]


def test_counter_reports_a_wrong_sum():
    machine = BareMachine("counter", {"increments": 10}, 2)
    machine.write(machine.slots[0].usable_start, b"\7")
    machine.run()
    assert sorted(code or 0 for code in machine.exit_codes) == [0, 1]


@pytest.mark.parametrize(("milliseconds", "slices"),
                         [(1, [1000]), (50, [50_000]), (120, [50_000, 50_000, 20_000])])
def test_idle(milliseconds, slices):
    machine = BareMachine("idle", {"milliseconds": milliseconds})
    machine.run()
    assert [(number, time) for _, number, time, _ in machine.hypercalls] == [(3, time) for time in slices]
    assert machine.changed() == {}


def test_idle_for_ever_sleeps_on():
    machine = BareMachine("idle", {"milliseconds": 0})
    for _ in range(100):
        machine.step(0, 0)
    assert machine.exit_codes == [None]
    assert machine.hypercalls == [(0, 3, 50_000, 1)] * 100


@pytest.mark.parametrize("vcpus", [1, 12, 101])
def test_hello(vcpus):
    machine = BareMachine("hello", {"lines": 2}, vcpus)
    machine.run()
    assert machine.exit_codes == [0] * vcpus
    assert [bytes(text) for text in machine.console] == [
        f"hello from vCPU {index} of {vcpus}\n".encode() * 2 for index in range(vcpus)]
    assert machine.changed() == {}


@pytest.mark.parametrize("vcpus", [1, 2, 3])
def test_pingpong(vcpus):
    machine = BareMachine("pingpong", {"turns": 5}, vcpus)
    machine.run()
    token = machine.slots[0].usable_start
    assert machine.exit_codes == [0] * vcpus
    assert machine.changed() == {token: 5 * vcpus}
    waits = [call for call in machine.hypercalls if call[1] == 1]
    wakes = [call for call in machine.hypercalls if call[1] == 2]
    assert len(wakes) == 5 * vcpus
    assert all(address == token for _, _, address, _ in waits + wakes)


def test_no_guest_uses_its_stack():
    """A push would dirty a page, often without changing it; so no guest has one."""
    for name in WORKLOADS:
        machine = BareMachine(name, {"passes": 1} if name == "sequential" else {}, 2)
        slot: BootSlot = machine.slots[0]
        for index in range(2):
            machine.step(index, 2000)
        assert not any(machine.memory[0].raw[slot.usable_end:]), name
