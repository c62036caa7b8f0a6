"""The vDSO: the image in a process of the host, on parameters that are kept as in a machine; and as programs find
it."""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from system import FIRST, System

from workers.linux.frames import Frames
from workers.linux.program import start
from workers.linux.space import PAGE, PROT_EXEC, PROT_READ
from workers.linux.vdso import Line, Vdso, build, counter

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the image is of x86-64")

SECOND = 10**9
CLOCKS = {"realtime": 0, "monotonic": 1, "raw": 4, "realtime coarse": 5, "monotonic coarse": 6, "boottime": 7}
NAMES = ("clock_gettime", "gettimeofday", "time", "clock_getres", "getcpu")

#: Maps the parameters (a file) and the image, and calls it as it is told: the offset of a function comes with each.
HARNESS = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static char *image;
static int (*gettime)(int, struct timespec *);
static atomic_long latest;
static atomic_int ended;

static long nanoseconds(int clock)
{
	struct timespec t;
	gettime(clock, &t);
	return t.tv_sec * 1000000000 + t.tv_nsec;
}

/* What one thread has read, no other reads less than later. */
static void *race(void *none)
{
	long count = 0, back = 0;
	struct timespec t;
	while (!ended) {
		long before = latest;
		if (gettime(CLOCK_MONOTONIC, &t))
			continue;
		long found = t.tv_sec * 1000000000 + t.tv_nsec;
		if (found < before)
			back++;
		while (found > before && !atomic_compare_exchange_weak(&latest, &before, found))
			;
		count++;
	}
	printf("%ld %ld\n", count, back);
	return 0;
}

int main(int argc, char **argv)
{
	int parameters = open(argv[1], O_RDONLY), library = open(argv[2], O_RDONLY);
	image = (char *)mmap(0, 8192, PROT_READ, MAP_SHARED, parameters, 0) + 4096;
	mmap(image, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, library, 0);
	void *function = image + atol(argv[4]);
	struct timespec t, u;
	gettime = function;
	if (!strcmp(argv[3], "race")) {
		pthread_t threads[4];
		for (int i = 0; i < 4; i++)
			pthread_create(&threads[i], 0, race, 0);
		getchar();
		ended = 1;
		for (int i = 0; i < 4; i++)
			pthread_join(threads[i], 0);
	} else if (!strcmp(argv[3], "clock")) {
		int clock = atoi(argv[5]);
		for (int i = 0; i < 1000; i++) {
			clock_gettime(clock, &t);
			long found = nanoseconds(clock);
			clock_gettime(clock, &u);
			printf("%ld %ld %ld\n", t.tv_sec * 1000000000 + t.tv_nsec, found, u.tv_sec * 1000000000 + u.tv_nsec);
		}
	} else if (!strcmp(argv[3], "fails")) {
		printf("%d\n", gettime(atoi(argv[5]), &t));
	} else if (!strcmp(argv[3], "gettimeofday")) {
		struct timeval v;
		struct timezone z = {1, 1};
		int result = ((int (*)(void *, void *))function)(&v, &z);
		printf("%d %ld %ld %d %d\n", result, v.tv_sec, v.tv_usec, z.tz_minuteswest, z.tz_dsttime);
		printf("%d\n", ((int (*)(void *, void *))function)(0, 0));
	} else if (!strcmp(argv[3], "time")) {
		long there = 0, found = ((long (*)(long *))function)(&there);
		printf("%ld %ld %ld\n", found, there, ((long (*)(long *))function)(0));
	} else if (!strcmp(argv[3], "clock_getres")) {
		int result = gettime(atoi(argv[5]), &t);
		printf("%d %ld %ld %d\n", result, t.tv_sec, t.tv_nsec, gettime(atoi(argv[5]), 0));
	} else if (!strcmp(argv[3], "getcpu")) {
		unsigned cpu = -1, node = -1;
		long result = ((long (*)(unsigned *, unsigned *, void *))function)(&cpu, &node, 0);
		printf("%ld %u %u\n", result, cpu, node);
	}
	return 0;
}
"""


class Shared:
    """Frames in a file, the first one of which is the page of parameters."""

    def __init__(self, path: Path, count: int = 4) -> None:
        path.write_bytes(bytes(count * PAGE))
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), count * PAGE)
        self.writes = 0

    def read(self, frame: int, offset: int, count: int) -> bytes:
        at = (frame - FIRST) * PAGE + offset
        return self.map[at:at + count]

    def write(self, frame: int, offset: int, data: bytes | memoryview) -> None:
        at = (frame - FIRST) * PAGE + offset
        self.map[at:at + len(data)] = bytes(data)
        self.writes += 1

    def copy(self, source: int, target: int) -> None:
        raise NotImplementedError

    def clear(self, runs: list[tuple[int, int]], visitors: Iterable[int] = ()) -> None:
        raise NotImplementedError


class Kept:
    """A vDSO with its parameters in a file, and programs of the host that use it."""

    def __init__(self, folder: Path, image: Path, harness: Path, **clocks: Any) -> None:
        self.file, self.image, self.harness = folder / "parameters", image, harness
        self.memory = Shared(self.file)
        clocks = {"monotonic": time.monotonic_ns, "realtime": time.time_ns, "tsc": counter(), **clocks}
        self.vdso = Vdso(self.memory, Frames(FIRST, 4), **clocks)
        self.functions = symbols(image)

    def close(self) -> None:
        self.memory.map.close()

    def start(self) -> None:
        time.sleep(0.012)
        self.vdso.update()

    def command(self, what: str, function: str, *more: int) -> list[str]:
        return [str(self.harness), str(self.file), str(self.image), what, str(self.functions[function]),
                *map(str, more)]

    def run(self, what: str, function: str, *more: int) -> list[list[int]]:
        done = subprocess.run(self.command(what, function, *more), check=True, capture_output=True, text=True,
                              timeout=60)
        return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def symbols(image: Path) -> dict[str, int]:
    from elftools.elf.elffile import ELFFile

    with image.open("rb") as file:
        return {each.name: each["st_value"] for each in ELFFile(file).get_section_by_name(".dynsym").iter_symbols()}


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("harness")
    (folder / "h.c").write_text(HARNESS)
    subprocess.run(["cc", "-O2", "-pthread", "-o", folder / "h", folder / "h.c"], check=True, timeout=60)
    return folder / "h"


@pytest.fixture(params=["committed", "fresh"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """As it is here, and as this host's compiler makes it."""
    if request.param == "committed":
        return build.IMAGE
    if build.missing_tools():
        pytest.skip(f"not installed: {', '.join(build.missing_tools())}")
    build.build(tmp_path / "vdso.so")
    return tmp_path / "vdso.so"


@pytest.fixture
def kept(tmp_path: Path, image: Path, harness: Path) -> Iterator[Kept]:
    with contextlib.closing(Kept(tmp_path, image, harness)) as found:
        yield found


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each update is due."""
    monkeypatch.setattr("workers.linux.vdso.tsc._SOON", 0)
    monkeypatch.setattr("workers.linux.vdso.tsc.INTERVAL", 0)


# --- the image ---------------------------------------------------------------------------------------------------


def test_the_image_is_what_its_source_builds(tmp_path: Path) -> None:
    if build.missing_tools():
        pytest.skip(f"not installed: {', '.join(build.missing_tools())}")
    build.build(tmp_path / "vdso.so")
    if build.compiler(tmp_path / "vdso.so") != build.compiler(build.IMAGE):
        pytest.skip("another compiler has made it")
    assert not build.is_stale()


def test_it_is_what_libraries_look_for(image: Path) -> None:
    """One segment, nothing to relocate, and Linux's names and version."""
    from elftools.elf.elffile import ELFFile

    with image.open("rb") as file:
        elf = ELFFile(file)
        load, = [each for each in elf.iter_segments() if each["p_type"] == "PT_LOAD"]
        assert (load["p_offset"], load["p_vaddr"], load["p_flags"]) == (0, 0, PROT_READ | 4 | 1)
        tags = {each.entry.d_tag for each in elf.get_section_by_name(".dynamic").iter_tags()}
        assert tags >= {"DT_HASH", "DT_GNU_HASH", "DT_SYMTAB", "DT_STRTAB", "DT_VERSYM", "DT_VERDEF"}
        assert not tags & {"DT_RELA", "DT_REL", "DT_JMPREL", "DT_NEEDED", "DT_TEXTREL", "DT_INIT"}
        versions = elf.get_section_by_name(".gnu.version_d")
        assert [next(iter(names)).name for _, names in versions.iter_versions()] == ["linux-vdso.so.1", "LINUX_2.6"]
        found = {each.name: each["st_info"]["bind"] for each in elf.get_section_by_name(".dynsym").iter_symbols()}
    assert {found[f"__vdso_{name}"] for name in NAMES} == {"STB_GLOBAL"}
    assert {found[name] for name in NAMES} == {"STB_WEAK"}
    assert len(found) == 2 * len(NAMES) + 2


def test_build_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert build.main(["--check"]) == 2
    assert capsys.readouterr().err == "not installed: gcc, ld (Debian: apt install gcc binutils)\n"


# --- time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
def test_clocks_are_the_systems(kept: Kept, clock: int) -> None:
    """Between what the host says before and afterwards. Ours are those of time.monotonic and time.time: only they
    can be compared to the nanosecond."""
    kept.start()
    time.sleep(0.15)
    kept.vdso.update()
    off = [max(before - found, found - after, 0)
           for before, found, after in kept.run("clock", "__vdso_clock_gettime", 0 if clock == 5 else clock)]
    if clock in (0, 1, 5):
        assert sorted(off)[len(off) // 2] < 20_000
    # It is the vDSO's own: a frozen page gives a frozen clock.
    kept.memory.write(FIRST, 32, bytes(8))      # the rate
    assert len({found for _, found, _ in kept.run("clock", "__vdso_clock_gettime", clock)}) == 1


def test_without_parameters_it_asks_the_system(kept: Kept) -> None:
    for clock in (*CLOCKS.values(), 2, 3, 11):
        for before, found, after in kept.run("clock", "__vdso_clock_gettime", clock):
            assert before <= found <= after
    assert kept.run("fails", "__vdso_clock_gettime", 77) == [[-22]]


def test_what_it_has_no_clock_for(kept: Kept) -> None:
    kept.start()
    for clock in (2, 3, 11):
        for before, found, after in kept.run("clock", "__vdso_clock_gettime", clock):
            assert before <= found <= after
    for clock in (-1, 8 + 32, 77, 1 << 30):
        assert kept.run("fails", "__vdso_clock_gettime", clock) == [[-22]]


@pytest.mark.parametrize("started", [False, True])
def test_the_other_functions(kept: Kept, started: bool) -> None:
    if started:
        kept.start()
    before = time.time()
    (result, seconds, microseconds, *zone), (nothing,) = kept.run("gettimeofday", "__vdso_gettimeofday")
    assert (result, zone, nothing) == (0, [0, 0], 0)
    assert before - 0.001 <= seconds + microseconds / 1e6 <= time.time() + 0.001
    (found, there, again), = kept.run("time", "__vdso_time")
    assert found == there
    assert int(before) <= found <= again <= time.time()
    assert kept.run("clock_getres", "__vdso_clock_getres", 1) == [[0, 0, 1, 0]]
    assert kept.run("clock_getres", "__vdso_clock_getres", 77)[0][0] == -22
    (result, cpu, node), = kept.run("getcpu", "__vdso_getcpu")
    assert (result, node) == (0, 0)
    assert cpu in range(os.cpu_count() or 1)


def test_a_page_in_change_is_waited_for(kept: Kept) -> None:
    """And not for ever."""
    kept.start()
    kept.memory.write(FIRST, 0, struct.pack("<I", 7))
    for before, found, after in kept.run("clock", "__vdso_clock_gettime", 1):
        assert before <= found <= after


class Wild:
    """A clock that is set right all the time, back and forth."""

    def __init__(self) -> None:
        self.random, self.off = random.Random(1), 0

    def __call__(self) -> int:
        return time.monotonic_ns() + self.off

    def change(self) -> None:
        self.off += self.random.choice((-1, 1)) * self.random.choice((0, 30, 1000, 50_000, 20_000_000))


@pytest.mark.usefixtures("often")
def test_time_never_goes_back(tmp_path: Path, image: Path, harness: Path) -> None:
    """Four threads compare what they read, while the parameters change as often as they can. Where they would ask the
    system, which is not this host's, they are told that it has failed."""
    mute = tmp_path / "mute.so"
    mute.write_bytes(image.read_bytes().replace(b"\x0f\x05", b"\x0c\xff"))     # syscall: or $255, %al
    clock = Wild()
    with contextlib.closing(Kept(tmp_path, mute, harness, monotonic=clock)) as kept:
        kept.start()
        process = subprocess.Popen(kept.command("race", "__vdso_clock_gettime"), stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)
        end, last = time.monotonic() + 1.0, 0
        before = kept.memory.read(FIRST, 0, 4)
        while time.monotonic() < end:
            clock.change()
            kept.vdso.update()
            now = kept.vdso.monotonic()
            assert now >= last
            last = now
        assert kept.memory.read(FIRST, 0, 4) != before      # it was changed at all
        printed, _ = process.communicate("\n", timeout=60)
    rows = [tuple(map(int, line.split())) for line in printed.splitlines()]
    assert len(rows) == 4
    assert all(count > 1000 and not back for count, back in rows), rows


@given(st.lists(st.tuples(st.integers(1, 10**10), st.integers(-10**9, 10**9), st.integers(1 << 28, 1 << 34)),
                min_size=1))
def test_lines_are_never_behind_each_other(changes: list[tuple[int, int, int]]) -> None:
    line = Line(0, 0, 1 << 32)
    tsc = 0
    for steps, off, rate in changes:
        tsc += steps
        following = line.followed_by(tsc, max(0, line.at(tsc) + off), rate)
        for at in (tsc, tsc + 1, tsc + 10**9):
            assert following.at(tsc) >= line.at(tsc)
            assert following.at(at + 1) >= following.at(at) >= line.at(tsc)
        line = following


def test_a_lead_is_lost() -> None:
    """Within an interval, and until half of one is a lead of a second's tenth."""
    rate = 1 << 31          # two steps a nanosecond
    for lead in (10, 1000, 100_000_000):
        line = Line(0, lead, rate)
        line = line.followed_by(0, 0, rate)
        assert abs(line.at(2 * SECOND) - SECOND) <= 1


def test_updates_are_few(tmp_path: Path, harness: Path) -> None:
    with contextlib.closing(Kept(tmp_path, build.IMAGE, harness)) as kept:
        kept.start()
        before = kept.memory.writes
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            kept.vdso.update()
        assert 0 < kept.memory.writes - before <= 4 * 3


@pytest.mark.usefixtures("often")
def test_real_time_is_set(tmp_path: Path, harness: Path) -> None:
    """The host's clock jumps: so does this one, and the monotonic one does not."""
    off = 0
    with contextlib.closing(Kept(tmp_path, build.IMAGE, harness, realtime=lambda: time.time_ns() + off)) as kept:
        kept.start()
        for off in (-3600 * SECOND, 7 * SECOND):
            kept.vdso.update()
            now = time.time_ns() + off
            found = [row[1] for row in kept.run("clock", "__vdso_clock_gettime", 0)]
            assert all(now <= each < now + 10 * SECOND for each in found)
            assert abs(kept.vdso.monotonic() - time.monotonic_ns()) < 10_000_000


def test_where_the_counter_is_another_one(tmp_path: Path, harness: Path) -> None:
    with contextlib.closing(Kept(tmp_path, build.IMAGE, harness, tsc=None)) as kept:
        kept.start()
        assert kept.vdso.monotonic() <= time.monotonic_ns()
        assert kept.vdso.realtime() <= time.time_ns()
        for before, found, after in kept.run("clock", "__vdso_clock_gettime", 1):
            assert before <= found <= after


def test_restored_it_asks_until_it_knows_better(tmp_path: Path, harness: Path) -> None:
    with contextlib.closing(Kept(tmp_path, build.IMAGE, harness)) as kept:
        kept.start()
        sequence, mode = struct.unpack("<II", kept.memory.read(FIRST, 0, 8))
        assert mode == 1
        again = Vdso(kept.memory, Frames(FIRST, 4), monotonic=time.monotonic_ns, realtime=time.time_ns, tsc=counter(),
                     saved=kept.vdso.save())
        assert struct.unpack("<II", kept.memory.read(FIRST, 0, 8)) == (sequence, 1)     # nothing is touched yet
        again.update()
        assert struct.unpack("<II", kept.memory.read(FIRST, 0, 8)) == (sequence + 2, 0)
        time.sleep(0.012)
        again.update()
        assert struct.unpack("<II", kept.memory.read(FIRST, 0, 8)) == (sequence + 4, 1)


# --- in a program ------------------------------------------------------------------------------------------------


def made(system: System) -> Vdso:
    return Vdso(system.ram, system.pool, monotonic=time.monotonic_ns, realtime=time.time_ns, tsc=counter())


def test_a_program_finds_it() -> None:
    system = System(frames=4000, tables=100)
    vdso = made(system)
    path = os.path.realpath("/bin/true")
    found = start(system.space, lambda name: system.file(Path(os.fsdecode(name)).read_bytes()), os.fsencode(path),
                  [b"true"], [], random=bytes(16), vdso=vdso.map)
    values = struct.unpack("<48Q", system.space.read(found.rsp, 48 * 8))
    address = values[values.index(33) + 1]
    image = build.IMAGE.read_bytes()
    assert system.space.read(address, len(image)) == image
    assert struct.unpack("<I", system.space.read(address - PAGE + 4, 4)) == (1,)
    names = {each.name: each for each in system.space.mappings if each.name.startswith("v")}
    assert [(each.start * PAGE, each.prot) for each in names.values()] == [
        (address - PAGE, PROT_READ), (address, PROT_READ | PROT_EXEC)]


def test_processes_have_the_same_one() -> None:
    system = System(frames=200)
    vdso = made(system)
    free = system.pool.free
    address = vdso.map(system.space)
    system.space.read(address - PAGE, 2 * PAGE)
    assert system.pool.free == free
    assert system.space.place_of(address)[0] == vdso.frames[1]
    # Who makes it writable gets one of its own.
    system.space.protect(address, PAGE, 3)
    system.space.write(address, b"x")
    assert system.ram.read(vdso.frames[1], 0, 4) == b"\x7fELF"
    system.space.close()
    assert [system.pool.uses(frame) for frame in vdso.frames] == [1, 1]
