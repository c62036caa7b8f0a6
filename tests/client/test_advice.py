"""Choices that work badly are said, with their place; those that do not are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.client import advice as advices
from vmm.client.advice import advice
from vmm.client.config import load_config
from vmm.client.plan import plan
from workers.accel.base import Available

GUEST = "memory: [{size: 64MiB}]\nguest: {workload: random}\naccel: unicorn\n"
REPLAY = "memory: [{size: 1GiB}]\naccel: replay\n"


def said(path: Path, text: str) -> list[str]:
    path.write_text(text)
    config = load_config(path)
    return [each.text.removeprefix(f"{path}:") for each in advice(config, plan(config))]


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advices.os, "sched_getaffinity", lambda pid: {0, 1})


@pytest.mark.parametrize("text", [
    GUEST, GUEST + "vcpus: 2\n", GUEST + "dirty_ring_size: 1024\n",     # adaptive, of a rate that nobody knows
    GUEST + "reaper: {mode: fixed}\n",                                  # all pages fit
    GUEST + "dirty_ring_size: 1024\ndirty_limit: 1MB/s\nreaper: {mode: fixed}\n",       # 245 pages
    GUEST + "dirty_ring_size: 0\nreaper: {mode: fixed}\n",
    REPLAY + "vcpus: 64\nreplay: {pattern: random, rate: 100000}\n",    # producers are not the guest's time
    REPLAY.replace("1GiB", "1MiB") + "replay: {pattern: random, rate: 1e9}\n",          # each page once
])
def test_nothing_to_say(tmp_path: Path, text: str) -> None:
    assert said(tmp_path / "m.yaml", text.replace("1e9", "1000000000.0")) == []


@pytest.mark.parametrize(("text", "wanted"), [
    (GUEST + "vcpus: 3\n", "4:1: vcpus: 3 vCPUs share 2 cores"),
    # 448 entries a second is what fits: 1,024 less 576 in reserve.
    (GUEST + "dirty_ring_size: 1024\nreaper: {mode: fixed}\n",
     "4:1: dirty_ring_size: a ring of 1024 entries that is reaped every 1 s is full before that at more than 448"),
    (GUEST + "dirty_ring_size: 1024\ndirty_limit: 3670016\nreaper: {mode: fixed}\n",    # 896 pages/s
     "4:1: dirty_ring_size: a ring of 1024 entries is full 2 times between two reaps (1000 ms) at dirty_limit 3.67 MB"),
    (REPLAY + "dirty_ring_size: 1024\nreplay: {pattern: random, rate: 896000}\n",
     "3:1: dirty_ring_size: a ring of 1024 entries is full 2 times between two reaps (1 ms) at replay.rate 896000"),
])
def test_what_works_badly(tmp_path: Path, text: str, wanted: str) -> None:
    found, = said(tmp_path / "m.yaml", text)
    assert found.startswith(wanted), found


def test_that_cores_are_shared_is_left_out_where_it_is_not_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(GUEST + "vcpus: 3\n")
    config = load_config(path)
    assert advice(config, plan(config), sharing=False) == []


@pytest.mark.parametrize("emulates", [True, False])
def test_cpl_0_where_it_is_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulates: bool) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(GUEST + "privilege: kernel\n")
    config = load_config(path)
    spec = plan(config)
    monkeypatch.setattr(advices.registry, "available", lambda accel: Available(emulates_kernel=emulates))
    found = [each.text for each in advice(config, spec)]
    assert [":4:1: privilege: kernel: this host's KVM" in each for each in found] == [True] * emulates
