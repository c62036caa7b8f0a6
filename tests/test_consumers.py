"""Dirty rate, dirty limit, working set: measured on guests whose rate is known from elsewhere."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import ACCELS, replace, spec

from vmm import workingset
from vmm.dirtyrate import MODES, measure
from vmm.errors import VmmError
from vmm.machine import Machine
from workers.throttle import TokenBucket

PAGE = 4096


@pytest.fixture(params=ACCELS)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def busy(accel: str) -> Iterator[Machine]:
    """Two vCPUs that walk over their pages for ever; the dirty log of client ``other`` is watched."""
    walk = spec("sequential", accel=accel, mib=64, passes=0, timeout=None)
    with Machine.launch(walk) as machine:
        machine.register("other")
        yield machine


def words(machine: Machine) -> int:
    """What the guest itself has counted: one a page written."""
    return int(machine.ram(0).view(np.uint64).reshape(-1, 512)[:, 0][512:-16].sum())


# --- rate ------------------------------------------------------------------------------------------------


@pytest.mark.timing
def test_the_rate_is_what_the_guest_counted(accel: str) -> None:
    """Under a limit of 20,000 pages a second, a guest that walks over more pages than that dirties each page
    once: its own counters say how many."""
    walk = spec("sequential", accel=accel, mib=512, passes=0, timeout=None, vcpus=1)
    with Machine.launch(replace(walk, dirty_quota=20_000)) as machine:
        measure(machine, 0.2)       # the bucket has settled
        machine.pause()
        before = words(machine)
        began = time.monotonic()
        machine.resume()
        rate = measure(machine, 1.0)
        machine.pause()
        counted = (words(machine) - before) / (time.monotonic() - began)
        assert rate.pages_per_s == pytest.approx(counted, rel=0.15)
        assert rate.vcpus[0].pages_per_s == pytest.approx(20_000, rel=0.05)
        assert rate.mib_per_s == pytest.approx(rate.pages_per_s / 256)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_measures_and_disturbs_no_other_client(busy: Machine, mode: str) -> None:
    before = busy.ram(0).copy()
    busy.sync("other")
    rate = measure(busy, 0.2, mode)  # type: ignore[arg-type]
    assert rate.pages > 0
    assert (len(rate.vcpus) == 2) == (mode == "ring")
    busy.pause()
    dirty = {p for first, count in busy.sync("other").slots[0] for p in range(first, first + count)}
    after = busy.ram(0)
    changed = set(np.flatnonzero((before.reshape(-1, PAGE) != after.reshape(-1, PAGE)).any(axis=1)).tolist())
    assert len(changed - dirty) <= 2 * 2        # changed before the sync above, and not since
    assert [c for c in busy.status()["clients"] if c.startswith("rate")] == []


def test_repeated_pages_are_told_apart(busy: Machine) -> None:
    """32 MiB a vCPU at full speed: walked over many times in the time measured."""
    rate = measure(busy, 0.5)
    assert rate.pages <= 64 << 20 >> 12
    assert rate.repeated == sum(v.pages for v in rate.vcpus) - rate.pages
    assert rate.repeated > rate.pages


def test_times_out_of_bounds_are_said(busy: Machine) -> None:
    for seconds in (0.01, 61.0):
        with pytest.raises(VmmError, match="from 50 ms to 60 s"):
            measure(busy, seconds)


# --- limit -----------------------------------------------------------------------------------------------


@pytest.mark.timing
@pytest.mark.parametrize("ring", [1024, 65536])
@pytest.mark.parametrize("megabytes", [1, 300])
def test_the_limit_is_reached_at_once_and_the_other_vcpu_is_left_alone(accel: str, ring: int,
                                                                        megabytes: int) -> None:
    walk = spec("sequential", accel=accel, ring=ring, mib=512, passes=0, timeout=None)
    with Machine.launch(walk) as machine:
        quota = round(megabytes * 1e6 / PAGE)
        machine.dirty_limit(quota, 0)
        measure(machine, 0.5)
        limited, free = measure(machine, 1.5).vcpus
        tolerance = max(0.05 * quota, 2e6 / PAGE)
        assert abs(limited.pages_per_s - quota) <= tolerance
        assert free.pages_per_s > limited.pages_per_s
        vcpus = machine.status()["vcpus"]
        assert vcpus[0]["throttled_s"] > 0.1
        assert vcpus[1]["throttled_s"] == 0
        machine.dirty_limit(0)
        again = measure(machine, 0.5).vcpus[0]
        assert again.pages_per_s > quota + tolerance
        assert machine.status()["vcpus"][0]["throttled_s"] == pytest.approx(
            vcpus[0]["throttled_s"], abs=3.0)


@pytest.mark.timing
def test_a_vcpu_below_its_quota_is_not_held_back(accel: str) -> None:
    slow = spec("sequential", accel=accel, mib=64, passes=0, spin=20_000, timeout=None, vcpus=1)
    with Machine.launch(replace(slow, dirty_quota=200_000)) as machine:
        measure(machine, 1.0)
        assert machine.status()["vcpus"][0]["throttled_s"] < 0.02


def test_a_limited_guest_still_pauses_syncs_and_stops_at_once(accel: str) -> None:
    walk = spec("sequential", accel=accel, mib=64, passes=0, timeout=None)
    with Machine.launch(replace(walk, dirty_quota=10)) as machine:
        for _ in range(5):
            began = time.monotonic()
            machine.pause()
            machine.resume()
            assert time.monotonic() - began < 5.0      # a wait of the bucket would be minutes
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
