"""Dirty rate, dirty limit, working set: counted, on guests whose pages are known from elsewhere. How exact the
limit is in time, on a quiet host, is measured by benchmarks/dirty_limit.py."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import replace, spec, until
from numpy.typing import NDArray

from vmm.client.machine import Machine
from vmm.consumers import workingset
from vmm.consumers.rate import MODES, measure
from vmm.errors import VmmError
from workers.throttle import TokenBucket

PAGE = 4096


@pytest.fixture
def busy(accel: str) -> Iterator[Machine]:
    """Two vCPUs that walk over their pages for ever; the dirty log of client ``other`` is watched."""
    walk = spec("sequential", accel=accel, mib=64, passes=0, timeout=None)
    with Machine.launch(walk) as machine:
        machine.register("other")
        yield machine


def entries(machine: Machine) -> int:
    """Ring entries harvested of all vCPUs."""
    return sum(v["dirty_pages"] for v in machine.status()["vcpus"])


# --- rate ------------------------------------------------------------------------------------------------


class Window:
    """The time that a measurement takes, in the hands of a test: stands for the module ``time`` in
    vmm.consumers.rate, where ``sleep`` does what is to happen meanwhile."""

    def __init__(self, happens: Callable[[], None]) -> None:
        self._happens = happens
        self.monotonic = time.monotonic

    def sleep(self, seconds: float) -> None:
        self._happens()


def dirtied(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> set[int]:
    """Pages that differ."""
    return set(np.flatnonzero((before.reshape(-1, PAGE) != after.reshape(-1, PAGE)).any(axis=1)).tolist())


@pytest.mark.parametrize("mode", MODES)
def test_a_rate_counts_what_the_guest_dirtied_in_its_time(accel: str, mode: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a guest's work happens while it is measured; memory itself says which pages it was."""
    walk = spec("sequential", accel=accel, mib=16, passes=1)
    with Machine.launch(walk, start=False) as machine:
        before = machine.ram(0).copy()

        def work() -> None:
            machine.start()
            until(lambda: machine.status()["state"] == "ended", "the guest's work is done", 60.0)

        monkeypatch.setattr("vmm.consumers.rate.time", Window(work))
        rate = measure(machine, 0.05, mode)  # type: ignore[arg-type]
        changed = dirtied(before, machine.ram(0))
        assert len(changed) > 3000      # of 4,099: what lies below the guest's image it does not walk over
        assert rate.pages_per_s == pytest.approx(rate.pages / rate.seconds)
        assert rate.mib_per_s == pytest.approx(rate.pages_per_s / 256)
        assert rate.mode == mode
        if mode == "sampling":      # an estimate, from 512 pages of the machine's
            share = len(changed) / machine.status()["slots"][0]["pages"]
            assert rate.pages / machine.status()["slots"][0]["pages"] == pytest.approx(share, abs=0.15)
            return
        # KVM may log a page that was read only, at its first access: of the image and the stacks.
        assert len(changed) <= rate.pages <= len(changed) + 2 * 8
        if mode == "ring":
            entries = [v["dirty_pages"] for v in machine.status()["vcpus"]]
            assert [v.pages for v in rate.vcpus] == entries
            assert rate.repeated == sum(entries) - rate.pages
            for vcpu in rate.vcpus:
                assert vcpu.pages_per_s == pytest.approx(vcpu.pages / rate.seconds)
                assert vcpu.mib_per_s == pytest.approx(vcpu.pages_per_s / 256)
        else:
            assert rate.vcpus == []


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_measures_and_disturbs_no_other_client(busy: Machine, mode: str,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    busy.pause()
    busy.sync("other")
    before = busy.ram(0).copy()
    start = entries(busy)
    busy.resume()
    monkeypatch.setattr("vmm.consumers.rate.time", Window(
        lambda: until(lambda: entries(busy) > start + 5000, "the guest gets on", 60.0)))
    rate = measure(busy, 0.2, mode)  # type: ignore[arg-type]
    assert rate.pages > 0
    assert (len(rate.vcpus) == 2) == (mode == "ring")
    busy.pause()
    dirty = {p for first, count in busy.sync("other").slots[0] for p in range(first, first + count)}
    assert dirtied(before, busy.ram(0)) <= dirty
    assert [c for c in busy.status()["clients"] if c.startswith("rate")] == []


def test_repeated_pages_are_told_apart(busy: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 MiB, walked over more than three times while it is measured."""
    start, pages = entries(busy), 64 << 20 >> 12
    monkeypatch.setattr("vmm.consumers.rate.time", Window(
        lambda: until(lambda: entries(busy) > start + 4 * pages, "the guest has come round", 60.0)))
    rate = measure(busy, 0.5)
    assert rate.pages <= pages + 3
    assert rate.repeated == sum(v.pages for v in rate.vcpus) - rate.pages
    assert rate.repeated > 2 * rate.pages


def test_times_out_of_bounds_are_said(busy: Machine) -> None:
    for seconds in (0.01, 61.0):
        with pytest.raises(VmmError, match="from 50 ms to 60 s"):
            measure(busy, seconds)


# --- limit -----------------------------------------------------------------------------------------------


BURST = 0.02        # seconds of its quota that a vCPU may have saved up (workers/throttle.py)


def vcpu_of(machine: Machine, index: int) -> dict[str, Any]:
    """Its statistics, when every ring has been harvested."""
    machine.sync("other")
    return dict(machine.status()["vcpus"][index])


def paid_for(machine: Machine, index: int) -> int:
    """Entries pushed by now, returned when the vCPU is known to have paid for them: it was held back since, and has
    then run on. (In the middle of a slice it may be ahead of its quota.)"""
    seen = vcpu_of(machine, index)
    until(lambda: vcpu_of(machine, index)["throttled_s"] > seen["throttled_s"], "held back")
    waited = vcpu_of(machine, index)["dirty_pages"]
    until(lambda: vcpu_of(machine, index)["dirty_pages"] > waited, "let go on")
    return int(seen["dirty_pages"])


@pytest.mark.parametrize("ring", [1024, 65536])
@pytest.mark.parametrize("megabytes", [1, 10])
def test_a_limit_is_never_exceeded_and_is_of_that_vcpu_alone(accel: str, ring: int, megabytes: int) -> None:
    """However the host's time is shared out: what a vCPU has dirtied when it runs on, its quota has paid for."""
    walk = spec("sequential", accel=accel, ring=ring, mib=128, passes=0, timeout=None)
    with Machine.launch(walk) as machine:
        machine.register("other")
        quota = round(megabytes * 1e6 / PAGE)
        began = time.monotonic()
        machine.dirty_limit(quota, 0)
        start = vcpu_of(machine, 0)["dirty_pages"]
        for _ in range(3):
            pushed = paid_for(machine, 0) - start
            assert pushed <= quota * (time.monotonic() - began + BURST) + 1
        assert pushed > 0
        other = machine.status()["vcpus"][1]
        assert (other["throttled_s"], other["dirty_limit_pages_per_s"]) == (0, 0)
        machine.dirty_limit(0)
        lifted, then = time.monotonic(), vcpu_of(machine, 0)
        until(lambda: vcpu_of(machine, 0)["dirty_pages"] - then["dirty_pages"]
              > quota * (time.monotonic() - lifted + BURST) + 1, "faster than the limit that was lifted", 60.0)
        assert vcpu_of(machine, 0)["throttled_s"] == then["throttled_s"]


def test_a_vcpu_below_its_quota_is_not_held_back(accel: str) -> None:
    slow = spec("sequential", accel=accel, mib=64, passes=0, spin=4000, timeout=None, vcpus=1)
    with Machine.launch(replace(slow, dirty_quota=200_000)) as machine:
        until(lambda: entries(machine) > 1000, "the guest gets on", 60.0)
        assert machine.status()["vcpus"][0]["throttled_s"] == 0


def test_a_limited_guest_still_pauses_syncs_and_stops(accel: str) -> None:
    """A wait of the bucket would be minutes, more than any of these is waited for."""
    walk = spec("sequential", accel=accel, mib=64, passes=0, timeout=None)
    with Machine.launch(replace(walk, dirty_quota=10)) as machine:
        machine.register("a")
        for _ in range(5):
            machine.pause()
            machine.sync("a")
            machine.resume()
        machine.stop()
        assert {v["exit_reason"] for v in machine.wait(30.0)["vcpus"]} == {"stopped"}


def test_what_cannot_be_limited_is_said(accel: str) -> None:
    with (Machine.launch(spec("idle", accel=accel, ring=0, milliseconds=0, timeout=None)) as machine,
          pytest.raises(VmmError, match="needs dirty rings")):
        machine.dirty_limit(100)
    with (Machine.launch(spec("idle", accel=accel, milliseconds=0, timeout=None)) as machine,
          pytest.raises(VmmError, match="there is no vCPU 7")):
        machine.dirty_limit(100, 7)


@given(st.integers(1, 300_000), st.lists(st.floats(1e-4, 0.02), min_size=50, max_size=50),
       st.integers(1_000, 3_000_000))
def test_a_bucket_holds_its_quota(quota: int, slices: list[float], speed: int) -> None:
    """Model: slices that dirty at ``speed``, then the wait that is asked for. Never above the quota, but for the
    burst and the last slice."""
    bucket = TokenBucket()
    now, pushed = 100.0, 0
    bucket.account(quota, now, 0, 0.0)
    start = now
    for length in slices:
        fresh = int(length * speed)
        pushed, now = pushed + fresh, now + length
        now += bucket.account(quota, now, pushed, length)
        assert pushed <= quota * (now - start) + max(1.0, quota * 0.02) + 1
    unused = quota * (now - start) - pushed
    assert unused <= max(1.0, quota * sum(slices)) + 1e-6     # it waits no longer than it has to


# --- a client whose process ends ------------------------------------------------------------------------------


def test_a_client_goes_with_its_process(busy: Machine) -> None:
    import subprocess
    import sys

    script = ("from vmm import Machine\nwith Machine.attach('t') as m:\n"
              "    m.register('passing', mine=True)\n    print(m.status()['clients'])\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert "passing" in done.stdout
    deadline = time.monotonic() + 10
    while "passing" in busy.status()["clients"]:
        assert time.monotonic() < deadline
    assert busy.status()["clients"] == ["other"]


# --- working set ------------------------------------------------------------------------------------------------


def test_a_recording_holds_what_was_dirtied(busy: Machine, tmp_path: Path) -> None:
    busy.sync("other")
    recording = workingset.record(busy, 0.05, 0.5)
    busy.pause()
    expected = {p for first, count in busy.sync("other").slots[0] for p in range(first, first + count)}
    recorded = set(recording.pages[0].tolist())
    assert recorded <= expected
    assert len(recorded) > 100
    assert recording.intervals >= 5
    assert recording.vcpu_entries.sum() >= len(recorded)
    assert recording.dirty_pages().sum() == len(recording.pages[0])
    recording.save(tmp_path / "ws.npz")
    again = workingset.load(tmp_path / "ws.npz")
    assert (again.pages[0] == recording.pages[0]).all()
    assert (again.times == recording.times).all()
    assert again.slots == recording.slots
    assert recording.working_set(1) <= recording.working_set(recording.intervals) == len(recorded)
    png = workingset.draw(again, "t")
    assert png.startswith(b"\x89PNG")
    page = workingset.page(again, "a <b>")
    assert "a &lt;b&gt;" in page
    assert not re.search(r'(src|href)="?http', page)
    embedded = re.search(r'base64,([^"]+)"', page)
    assert embedded is not None
    assert base64.b64decode(embedded[1]).startswith(b"\x89PNG")


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(b"nonsense")
    with pytest.raises(VmmError, match="is not a working-set recording"):
        workingset.load(path)
