"""What ``vmm maps``, ``vmm strace`` and ``vmm dirty-rate`` show of a program, against what it does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from inside import compiled
from machines import spec, until

from vmm.client.machine import Machine
from vmm.consumers.programs import map_rates
from vmm.consumers.rate import measure
from vmm.errors import VmmError

_T = TypeVar("_T")

_PIECES = {"heap": 40, "stack": 100, "anonymous": 300, "file": 20, "same": 50}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for name in ("bin", "dev", "proc", "tmp"):
        (folder / name).mkdir()
    return folder


@contextmanager
def running(root: Path, name: str, *options: str, lines: int = 1) -> Iterator[tuple[Machine, list[str]]]:
    """The program in a machine of that name, and the first lines that it has written."""
    command = [sys.executable, "-m", "vmm", "run", "--root", str(root), "--name", name, *options, "--",
               compiled(root, name)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as ran:
        assert ran.stdout is not None
        try:
            said = [ran.stdout.readline().strip() for _ in range(lines)]
            machine = Machine.attach(name)
            try:
                yield machine, said
            finally:
                machine.detach()
        finally:
            ran.terminate()
            ran.wait(30)


def vmm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vmm", *arguments], capture_output=True, text=True, timeout=100,
                          check=False)


def asked(*arguments: str) -> Any:
    done = vmm(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def within(maps: dict[str, Any], address: int) -> dict[str, Any]:
    found, = (each for each in maps["processes"][0]["mappings"] if each["start"] <= address < each["end"])
    return dict(found)


def by_name(maps: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Its threads. The first one is named after the program before it has a name of its own."""
    return {each["name"]: each for each in maps["processes"][0]["threads"]}


def begin(machine: Machine, said: list[str]) -> dict[str, int]:
    """Until all threads of ``dirtier`` have their names, and have written to all of their pages; where those are."""
    places = {name: int(at, 16) for name, at, _ in map(str.split, said)}

    def begun() -> bool:
        maps = machine.program_maps()
        return {"idle", *_PIECES} <= set(by_name(maps)) and all(
            within(maps, places[name])["resident_pages"] >= pages for name, pages in _PIECES.items())

    until(begun, "all threads are at work")
    return places


def long_enough(take: Callable[[float], _T], is_enough: Callable[[_T], bool]) -> _T:
    """``take`` of so many seconds that every thread has had a turn: on a busy host that may be some."""
    for seconds in (0.3, 1.0, 3.0, 10.0):
        if is_enough(found := take(seconds)):
            break
    return found


@pytest.mark.kvm
def test_dirtied_pages_are_those_of_their_mapping_and_thread(root: Path) -> None:
    with running(root, "dirtier", lines=6) as (machine, said):
        places = begin(machine, said)
        before: dict[str, Any] = {}

        def take(seconds: float) -> dict[str, Any]:
            before.update(machine.status()["reaper"])
            return dict(map_rates(machine, seconds))

        maps = long_enough(take, lambda found: all(
            within(found, places[name])["dirty_pages"] >= pages for name, pages in _PIECES.items()))
        after = machine.status()["reaper"]
        whats = {"heap": "[heap]", "stack": "[stack]", "file": "/tmp/dirtied"}
        for name, pages in _PIECES.items():
            mapping = within(maps, places[name])
            if name in whats:
                assert mapping["what"] == whats[name]
            # On the stack there are frames of its functions too, and in the heap the first thread's own variables.
            assert pages <= mapping["dirty_pages"] <= pages + {"stack": 4, "heap": 1}.get(name, 0), name
            assert mapping["pages_per_s"] == pytest.approx(mapping["dirty_pages"] / maps["seconds"])
        assert within(maps, places["file"])["rights"] == "rw-s"
        assert maps["dirty_pages"] >= sum(_PIECES.values())
        assert maps["cached_pages"] <= 1        # the page of the clocks, which it does not look at
        assert maps["free_pages"] == 0
        # A page makes an entry again only after it was reaped; a thread writes to some pages of its own stack too.
        reaps = after["iterations"] - before["iterations"] + after["flushes"] - before["flushes"] + 1
        threads = by_name(maps)
        for name, pages in _PIECES.items():
            assert pages <= threads[name]["dirty_pages"] <= (pages + 4) * reaps, name
        assert threads["idle"]["dirty_pages"] == 0
        assert not any(each["changed"] for each in threads.values())
        system, = maps["other_vcpus"]
        assert system["system"]
        assert system["vcpu"] == len(machine.status()["vcpus"]) - 1
        shown = vmm("maps", machine.name, "--rate", "200ms")
        assert shown.returncode == 0, shown.stderr
        assert re.search(r"[0-9a-f]+-[0-9a-f]+ │ rwxp +│ +300 │ +300 │ ", shown.stdout)
        assert "/tmp/dirtied" in shown.stdout
        assert "system" in shown.stdout


@pytest.mark.kvm
def test_a_trace_has_the_names_of_the_threads(root: Path, tmp_path: Path) -> None:
    with running(root, "dirtier", lines=6) as (machine, said):
        begin(machine, said)
        threads = by_name(machine.program_maps())

        def take(seconds: float) -> dict[str, Any]:
            (tmp_path / "t").unlink(missing_ok=True)
            assert vmm("trace", "record", machine.name, str(tmp_path / "t"), "--time", f"{seconds}s").returncode == 0
            return dict(asked("trace", "info", str(tmp_path / "t")))

        found = long_enough(take, lambda found: all(
            found["vcpus"][threads[name]["vcpu"]]["pages"] >= pages for name, pages in _PIECES.items()))
        for name, pages in _PIECES.items():
            vcpu = found["vcpus"][threads[name]["vcpu"]]
            assert vcpu["thread"] == name
            assert vcpu["pages"] >= pages
        assert found["vcpus"][-1]["thread"] == "system"
        assert "(anonymous): " in vmm("trace", "info", str(tmp_path / "t")).stdout


@pytest.mark.kvm
def test_maps_are_shown_of_a_machine_that_stands_still(root: Path) -> None:
    with running(root, "dirtier", lines=6) as (machine, _):
        machine.pause()
        paused = asked("maps", machine.name)
        assert asked("maps", machine.name) == paused
        still = asked("maps", machine.name, "--rate", "100ms")
        assert still["dirty_pages"] == 0
        machine.resume()
        assert [each["pid"] for each in paused["processes"]] == [1]
        assert paused["processes"][0]["program"] == "/bin/dirtier"
        assert all(each["resident_pages"] <= (each["end"] - each["start"]) // 4096
                   for each in paused["processes"][0]["mappings"])
        with pytest.raises(VmmError, match="no dirty-log client 'nobody'"):
            machine.program_maps("nobody")


@pytest.mark.kvm
def test_pages_that_are_dirtied_with_what_they_held_are_counted(root: Path) -> None:
    with running(root, "dirtier", "--verify", lines=6) as (machine, said):
        begin(machine, said)
        changed = sum(_PIECES.values()) - _PIECES["same"]
        rate = long_enough(lambda seconds: measure(machine, seconds, unchanged=True),
                           lambda found: found.pages - (found.unchanged or 0) >= changed)
        assert rate.unchanged is not None
        # Not what has changed; of the threads' own stacks and of the system's pages, there may be some.
        assert _PIECES["same"] <= rate.unchanged <= rate.pages - changed
        assert measure(machine, 0.1).unchanged is None
        shown = vmm("dirty-rate", machine.name, "--unchanged")
        assert re.search(r"of the dirty pages, \d+ \(\d+\.\d%\) had the content they had before", shown.stdout)
        assert "--unchanged" in vmm("dirty-rate", machine.name, "--mode", "sampling", "--unchanged").stderr
        until(lambda: bool(machine.status()["verification"]["rounds"] > 3), "rounds")
        report = machine.status()
        found, program = report["verification"], report["program"]
        assert found["ok"]
        assert not found["first_findings"]
        assert _PIECES["same"] <= program["unchanged_dirty_pages"] == found["surplus_pages"] + found["excused_pages"]
        assert "had the content they had before" in vmm("status", machine.name).stdout


@pytest.mark.kvm
def test_calls_are_shown_with_arguments_results_and_times(root: Path) -> None:
    with running(root, "calls") as (machine, _):
        shown = vmm("strace", machine.name, "--time", "500ms")
        assert shown.returncode == 0, shown.stderr
        assert not shown.stderr
        lines = shown.stdout.splitlines()
        assert all(re.fullmatch(r"\[1\] \w+\(.*\) = .+ <\d+\.\d{6}>", line) for line in lines)
        made = [re.sub(r" <.*", "", line) for line in lines]
        once = made[(first := made.index('[1] openat(AT_FDCWD, "/tmp/written", 0x242, 0640) = 3')):first + 7]
        assert once == [
            '[1] openat(AT_FDCWD, "/tmp/written", 0x242, 0640) = 3', '[1] write(3, "hello\\n", 6) = 6',
            "[1] lseek(3, 0, 0) = 0", '[1] read(3, "hello\\n", 64) = 6', "[1] close(3) = 0",
            '[1] openat(AT_FDCWD, "/nowhere/at all", 0x0, 0) = -1 ENOENT (No such file or directory)',
            "[1] close(77) = -1 EBADF (Bad file descriptor)"]
        counts = asked("strace", machine.name, "--time", "500ms", "--count")
        counted = {each["name"]: each for each in counts["calls"]}
        assert counted["openat"]["calls"] == pytest.approx(2 * counted["read"]["calls"], abs=2)
        assert counted["close"]["errors"] == pytest.approx(counted["close"]["calls"] / 2, abs=1)
        assert counted["clock_nanosleep"]["mean_s"] >= 0.009
        assert not vmm("strace", machine.name, "--time", "200ms", "--process", "99").stdout


@pytest.mark.kvm
def test_calls_are_shown_until_the_program_has_ended(root: Path) -> None:
    """The last one too."""
    with running(root, "calls") as (machine, _), subprocess.Popen(
            [sys.executable, "-m", "vmm", "strace", machine.name], stdout=subprocess.PIPE, text=True) as tracing:
        assert tracing.stdout is not None
        assert tracing.stdout.readline()
        machine.stop()
        assert tracing.stdout.read()
        assert tracing.wait(30) == 0


@pytest.mark.kvm
def test_nothing_is_kept_for_a_client_that_was_killed(root: Path) -> None:
    with running(root, "calls") as (machine, _):
        with subprocess.Popen([sys.executable, "-m", "vmm", "strace", machine.name], stdout=subprocess.PIPE,
                              text=True) as tracing:
            assert tracing.stdout is not None
            assert tracing.stdout.readline()
            os.kill(tracing.pid, signal.SIGKILL)

        def made() -> int:
            """So far. (Nothing is kept for who asks so.)"""
            return int(machine.program_trace("looks", on=False)["next"])

        def stands_still() -> bool:
            before = made()
            time.sleep(0.3)         # of a program that makes calls all the time
            return made() == before

        until(stands_still, "the system keeps no calls any more", 15.0)
        assert machine.status()["state"] == "running"


@pytest.mark.parametrize("verb", ["maps", "strace"])
def test_a_machine_without_a_program_says_so(verb: str) -> None:
    with Machine.launch(spec("idle", accel="unicorn", milliseconds=0, timeout=None)) as machine:
        done = vmm(verb, machine.name)
        assert done.returncode == 2
        assert done.stderr == f"vmm: error: machine '{machine.name}' runs no Linux program (see vmm run)\n"
