"""Migrations foretold: the simulation against what can be worked out by hand, and against a migration that happens."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from command import vmm, vmm_here
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.cli.predict import _print_remedies
from vmm.client.machine import Machine
from vmm.client.units import parse_duration, parse_rate
from vmm.consumers.migration.report import Options
from vmm.consumers.predict.costs import Costs
from vmm.consumers.predict.dirtying import Guest, Memory
from vmm.consumers.predict.grid import Study
from vmm.consumers.predict.rings import fit
from vmm.consumers.predict.simulate import Prediction, simulate
from vmm.errors import VmmError
from vmm.machine.spec import RamSlot
from vmm.machine.tracefile import Trace, TraceHeader, TraceWriter, pack

PAGE = 4096
MEMORY = 1 << 16            # pages
#: Bytes alone take time, but for what a host without a cap sends at.
FREE = Costs(0.0, 1e-7, 0.0, 0.0, 0.0, 0.0, 0.0, 0)


def walk(rate: int, seconds: float = 4.0, pages: int = MEMORY, step: float = 0.01) -> Trace:
    """A vCPU that dirties ``rate`` pages per second, one after the other, all of ``pages`` in turn."""
    records, count = round(seconds / step), round(rate * step)
    numbers = np.arange(records * count) % pages
    times = (np.arange(1, records + 1) * round(step * 1e9)).astype(np.uint64)
    return Trace(times, (np.arange(1, records + 1) * count).astype(np.uint64), pack(np.zeros_like(numbers), numbers))


def by_hand(rate: float, bandwidth: float, downtime: float, rounds: int,
            memory: int = MEMORY) -> tuple[list[int], float]:
    """Pages of each round, and left in the end, of a guest that dirties pages one after the other at this rate and
    repeats none within a round."""
    sent, left = [memory], 0.0
    while True:
        left = rate * sent[-1] * PAGE / bandwidth
        if left * PAGE / bandwidth <= downtime or len(sent) == rounds:
            return sent, left
        sent.append(int(left))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80).map(lambda n: n * 100), st.integers(30, 400), st.sampled_from([0.03, 0.1, 0.3]))
def test_rounds_are_those_of_a_geometric_series(rate: int, megabytes: int, downtime: float) -> None:
    """Each round's pages are what was dirtied in the time of the one before."""
    bandwidth = megabytes * 1e6
    wanted, left = by_hand(rate, bandwidth, downtime, 6)
    first = Memory({0: 1 << 20}, {0: np.arange(MEMORY)}, MEMORY)
    found = simulate(Guest([walk(rate, 20.0, 1 << 20)], 20.0), first, Options(
        bandwidth=bandwidth, downtime=downtime, max_rounds=6, converge=False), costs=FREE)
    limit = downtime * bandwidth / PAGE
    if any(abs(each - limit) < 0.02 * limit + 2 for each in (*wanted[1:], left)):
        return      # which side of the limit it is on hangs on a page
    assert len(found.rounds) == len(wanted)
    assert not found.short
    assert [each.pages for each in found.rounds] == pytest.approx(wanted, rel=0.02, abs=3)
    assert found.downtime == pytest.approx(left * PAGE / bandwidth, rel=0.03, abs=1e-3)
    assert found.total == pytest.approx((sum(wanted) + left) * PAGE / bandwidth, rel=0.02)
    assert found.outcome == ("converges" if left < limit else "forced")


def test_zero_pages_cost_next_to_nothing() -> None:
    guest = Guest([walk(100)], 4.0)
    whole, half = (simulate(guest, Memory.whole({0: MEMORY}, filled), Options(bandwidth=100e6), costs=FREE)
                   for filled in (1.0, 0.5))
    assert half.transferred / whole.transferred == pytest.approx(0.5, abs=0.02)


def test_a_guest_goes_round_its_trace() -> None:
    """Three times as long as it was recorded: as often each page; in between, half of the entries in half the time."""
    guest = Guest([walk(1000, seconds=1.0, pages=100_000)], 1.0).begin()
    assert len(guest.run(0.5).pages[0]) == pytest.approx(500, abs=12)
    assert len(guest.run(2.5).pages[0]) == 1000
    assert len(guest.run(0.25).pages[0]) == pytest.approx(250, abs=12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 0.7), min_size=1, max_size=8), st.integers(10, 3000))
def test_a_vcpu_that_is_held_to_a_rate_dirties_no_more(pieces: list[float], quota: int) -> None:
    """And nothing is left out: what comes next is what would have come next."""
    guest = Guest([walk(2000, pages=1 << 20)], 4.0).begin()
    pages = []
    for seconds in pieces:
        found = guest.run(seconds, {0: quota}).pages.get(0, np.zeros(0, np.int64))
        assert len(found) <= max(quota * seconds, 0) + 1e-9
        pages += found.tolist()
    least = int(pages[0]) if pages else 0
    assert sorted(set(pages)) == list(range(least, least + len(set(pages))))


def test_throttling_converges_where_nothing_else_does() -> None:
    guest, memory = Guest([walk(40_000)], 4.0), Memory.whole({0: MEMORY})
    plain = simulate(guest, memory, Options(bandwidth=60e6, converge=False), costs=FREE)
    held = simulate(guest, memory, Options(bandwidth=60e6), costs=FREE)
    assert (plain.outcome, plain.throttled) == ("forced", {})
    assert held.outcome == "converges"
    assert held.throttled[0] * PAGE < 60e6
    assert held.downtime < plain.downtime


def test_postcopy_stands_still_for_no_page() -> None:
    found = simulate(Guest([walk(40_000)], 4.0), Memory.whole({0: MEMORY}), Options(bandwidth=60e6, postcopy=True))
    assert found.outcome == "postcopy"
    assert found.pending > 0
    assert found.downtime < 0.05 < found.pending * PAGE / 60e6


@settings(max_examples=6, deadline=None)
@given(st.integers(10, 400).map(lambda n: n * 100), st.sampled_from([0.02, 0.05, 0.3, 1.0]), st.booleans(),
       st.sampled_from([2, 30]))
def test_from_the_least_bandwidth_on_it_converges_unthrottled_within_the_limit(rate: int, downtime: float,
                                                                               converge: bool, rounds: int) -> None:
    """Of the study's limit, not of the default one; at less it does not, which the rounds by hand say too."""
    options = Options(downtime=downtime, converge=converge, max_rounds=rounds)
    first = 1 << 12
    guest, memory = Guest([walk(rate, 10.0, 1 << 19)], 10.0), Memory({0: 1 << 19}, {0: np.arange(first)}, first)
    least = Study(guest, memory, options, costs=FREE).least_bandwidth()
    assert least is not None
    for share, wanted in ((0.9, False), (1.03, True), (1.5, True), (4.0, True)):
        found = simulate(guest, memory, dataclasses.replace(options, bandwidth=least * share), costs=FREE)
        assert (found.outcome == "converges" and not found.throttled) == wanted
        assert found.downtime <= downtime or not wanted
    for share, wanted in ((0.9, False), (1.1, True)) if not converge else ():
        left = by_hand(rate, least * share, downtime, rounds, first)[1]
        assert (left * PAGE / (least * share) <= downtime) == wanted


@pytest.mark.parametrize("downtime", [0.05, 0.3])
def test_at_no_bandwidth_above_the_least_is_it_throttled_again(downtime: float) -> None:
    """Of guests that write to pages at random: a round leaves now more, now less of what was left before."""
    for seed in range(6):
        random = np.random.default_rng(seed)
        part = walk(9000)
        numbers = np.where(random.random(len(part.entries)) < 0.5, random.integers(0, 1 << 10, len(part.entries)),
                           random.integers(0, 1 << 15, len(part.entries)))
        guest = Guest([Trace(part.times, part.ends, pack(np.zeros_like(numbers), numbers))], 4.0)
        memory, options = Memory.whole({0: 1 << 15}), Options(downtime=downtime)
        least = Study(guest, memory, options, costs=FREE).least_bandwidth()
        assert least is not None
        for n in range(19):
            found = simulate(guest, memory, dataclasses.replace(options, bandwidth=least * 1.02 ** n), costs=FREE)
            assert (found.outcome, found.throttled) == ("converges", {})


def test_the_least_bandwidth_is_more_than_any_with_which_it_does_not() -> None:
    """Of a guest that does not converge at some that are higher than others at which it does."""
    class Odd(Study):
        def predict(self, **changed: Any) -> Prediction:
            good = 10e6 <= changed["bandwidth"] < 400e6 or changed["bandwidth"] >= 5e9
            return Prediction("converges" if good else "forced")

    study = Odd(Guest([walk(100)], 4.0), Memory.whole({0: MEMORY}), Options())
    assert study.least_bandwidth([20e6, 1e9, 10e9]) == pytest.approx(5e9, rel=0.03)
    assert study.least_bandwidth([1e6]) == pytest.approx(10e6, rel=0.03)
    never = Study(Guest([walk(20_000)], 4.0), Memory.whole({0: MEMORY}), Options(downtime=1e-9, max_rounds=1))
    assert never.least_bandwidth([1e6, 125e9]) is None


@pytest.mark.parametrize("downtime", [0.02, 0.3])
def test_each_remedy_is_one(downtime: float) -> None:
    guest, memory = Guest([walk(40_000)], 4.0), Memory.whole({0: MEMORY})
    options = Options(bandwidth=60e6, downtime=downtime)
    study = Study(guest, memory, options, costs=FREE)
    found = {each.what: each for each in study.remedies(study.least_bandwidth([options.bandwidth]))}
    assert {*found} == {"bandwidth", "downtime", "dirty-limit", "converge", "postcopy"}
    assert all(each.found.outcome == "converges" for name, each in found.items() if name != "postcopy")
    assert all(found[name].found.by_itself for name in ("bandwidth", "downtime", "dirty-limit"))
    assert found["converge"].found.throttled
    assert found["bandwidth"].value > options.bandwidth
    assert found["downtime"].value > downtime
    assert study.predict(downtime=found["downtime"].value * 1.02).by_itself
    assert not study.predict(downtime=found["downtime"].value * 0.9).by_itself
    more = Study(guest, memory, options, costs=FREE, limits={0: found["dirty-limit"].value / PAGE * 1.1})
    assert not more.predict().by_itself
    assert study.remedies(None)
    assert not Study(guest, memory, Options(bandwidth=10e9, downtime=downtime), costs=FREE).remedies(None)


@pytest.mark.parametrize(("rate", "entries"), [(1000, 1024), (10_000, 2048), (300_000, 32768), (660_000, None)])
def test_a_ring_that_holds_what_is_dirtied(rate: int, entries: int | None) -> None:
    """Of an interval of 0.1 s, and KVM's reserve."""
    found = fit(Guest([walk(rate, pages=1 << 20)], 4.0), 0.1)
    assert (found.most, found.entries) == (pytest.approx(rate / 10, rel=0.02), entries)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    part = walk(5000)
    header = TraceHeader(machine="m", accelerator="kvm", vcpus=1, ring_entries=4096,
                         slots=[RamSlot(0, 0, MEMORY * PAGE)], interval=0.01)
    with TraceWriter(tmp_path / "t", header) as writer:
        begin = 0
        for time_ns, end in zip(part.times.tolist(), part.ends.tolist(), strict=True):
            writer.append(time_ns, 0, part.entries[begin:end])
            begin = end
        writer.finish()
    return tmp_path / "t"


def test_from_a_trace(trace: Path, tmp_path: Path) -> None:
    shown = vmm("predict", "--trace", str(trace), "--bandwidth", "10MB/s", "--bandwidth", "1Gbit/s", "--png",
                str(tmp_path / "p.png"))
    assert "It converges by itself at" in shown.stdout
    assert "What helps:" in shown.stdout
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"
    found = json.loads(vmm("predict", "--trace", str(trace), "--bandwidth", "1Gbit/s", "--filled", "64MiB",
                           "--json").stdout)
    assert found["grid"][0]["bandwidth"] == 125e6
    assert found["filled"] == 64 << 20
    assert found["remedies"] == []
    assert found["least_bandwidth"] < 125e6


def test_each_limit_has_its_least_bandwidth(trace: Path) -> None:
    """What is said of them agrees with what comes of each; what helps is of the lowest of both."""
    asked = ["predict", "--trace", str(trace), "--bandwidth", "20MB/s", "--bandwidth", "25MB/s", "--bandwidth",
             "1Gbit/s", "--downtime", "300ms", "--downtime", "10ms"]
    found = json.loads(vmm(*asked, "--json").stdout)
    least = {each["downtime_limit"]: each["bandwidth"] for each in found["least_bandwidths"]}
    assert [*least] == [10, 300]
    assert least[300] < least[10] == found["least_bandwidth"]
    for cell in found["grid"]:
        assert (cell["outcome"] == "converges" and not cell["throttled"]) == (
            cell["bandwidth"] >= least[cell["downtime_limit"]])
    more = next(each for each in found["remedies"] if each["what"] == "bandwidth")
    assert (more["value"], more["outcome"], more["throttled"]) == (least[10], "converges", {})
    shown = vmm(*asked).stdout
    said = re.findall(r"It converges by itself at (.*) Gbit/s .* and above, with a downtime limit of (.*) ms\.", shown)
    assert {float(limit): float(bandwidth) * 1e9 / 8 for bandwidth, limit in said} == pytest.approx(least)
    assert "At 0.16 Gbit/s and 10 ms it does not" in shown
    assert len(re.findall("converges, throttled", shown)) == sum(
        cell["outcome"] == "converges" and bool(cell["throttled"]) for cell in found["grid"]) > 0


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "say what to predict from"), (["name", "--trace", "t"], "say what to predict from"),
    (["--trace", "/nowhere"], "/nowhere: "), (["name", "--filled", "1MiB"], "--filled is for --trace"),
    (["name", "--ram"], "--ram: is for --pid")])
def test_what_cannot_be_is_one_line(arguments: list[str], said: str) -> None:
    done = vmm_here("predict", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_trace_of_no_time_is_refused() -> None:
    with pytest.raises(VmmError, match="no time at all"):
        Guest([], 0.0)


def test_a_machine_goes_on(running: Machine) -> None:
    """It is recorded; the memory that it is said to have is what it has."""
    done = vmm("predict", running.name, "--time", "300ms", "--json")
    found, slots = json.loads(done.stdout), running.status()["slots"]
    assert running.status()["state"] == "running"
    assert found["memory"] == sum(each["size"] for each in slots)
    filled = sum(int(running.ram(each["id"]).reshape(-1, PAGE).any(axis=1).sum()) for each in slots) * PAGE
    assert 0 < found["filled"] <= filled


@pytest.mark.watch
def test_of_a_process() -> None:
    """One that writes to every page of 4 MiB, again and again; it converges, however slow the way is."""
    code = "b = bytearray(4 << 20)\nprint(flush=True)\nwhile True: b[::4096] = bytes(1024)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        done = vmm("predict", "--pid", str(process.pid), "--time", "1s", "--interval", "100ms", "--downtime", "1s",
                   "--filled", "1MiB", "--json")
        process.kill()
    found = json.loads(done.stdout)
    assert found["vcpus"] == 1
    assert found["filled"] == 1 << 20
    assert 1 << 10 <= found["rings"][0]["most"] < 4 << 10


def test_what_is_suggested_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    """Values of a thousand and more, too: as an option takes them."""
    found = SimpleNamespace(total=1.0, downtime=1.0, outcome="converges", rounds=[], throttled={}, pending=0)
    cell = SimpleNamespace(bandwidth=1.25e12, downtime=0.3)
    _print_remedies([SimpleNamespace(what=what, value=value, found=found) for what, value in    # type: ignore[misc]
                     (("downtime", 12.0), ("dirty-limit", 12_345e6))], cell)                    # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert "At 10,000 Gbit/s and " in said
    downtime, limit = re.search(r"--downtime (\S+),", said), re.search(r"set NAME (\S+):", said)
    assert downtime is not None
    assert limit is not None
    assert parse_duration(downtime[1]) == 12.0
    assert parse_rate(limit[1]) == 12_340e6      # of four digits
