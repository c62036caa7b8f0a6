"""Chains of snapshots that go on after migrations and restores, with incremental ones. The oracle: what a chain holds
is the memory of the machine that stands still, byte by byte."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from machines import ACCELS, nothing_left, replace, spec, until
from migrations import Receiver, touched
from needs import missing

from vmm import migrate
from vmm.client.machine import Machine
from vmm.consumers import snapshot
from vmm.consumers.snapshot.pagefile import PAGE, read_pages
from vmm.errors import VmmError
from vmm.machine.spec import RamSlot
from vmm.migrate import Options

WAYS = {"precopy": Options(), "postcopy": Options(postcopy=True, downtime=0.0), "in-place": Options(in_place=True)}
_FIRST = 1600       # of some pages in slot 0 that the host writes to
_OTHER = (1 << 30) + 5 * PAGE + 3       # in slot 1
_FEW = 32           # pages; that ``touched`` marks are 8


SLOTS = [RamSlot(0, 0, 8 << 20), RamSlot(1, 1 << 30, 1 << 20)]


def busy(accel: str) -> Machine:
    """Some thousand writes per second, which leave the host's processors to others."""
    work = spec("random", accel=accel, name="source", slots=SLOTS, writes=0, timeout=None)
    return Machine.launch(replace(work, dirty_quota=2000))


def idle(accel: str) -> Machine:
    """Its guest writes next to nothing."""
    return Machine.launch(spec("idle", accel=accel, name="source", slots=SLOTS, timeout=None, milliseconds=0))


def held_by(directory: Path) -> dict[int, bytes]:
    """What the newest snapshot of the chain says that each slot has."""
    manifests = snapshot.chain(directory)
    found = {}
    for slot in manifests[-1].slots:
        memory = np.zeros(slot.size, np.uint8)
        for manifest in manifests:
            for each in manifest.slots:
                if (each.id, each.born) == (slot.id, slot.born):
                    for _ in read_pages(directory / manifest.id, f"slot{slot.id}", slot.size // PAGE, each.checksum,
                                        memory):
                        pass
        found[slot.id] = memory.tobytes()
    return found


def memory_of(machine: Machine) -> dict[int, bytes]:
    return {slot["id"]: machine.ram(slot["id"]).tobytes() for slot in machine.status()["slots"]}


def moved(machine: Machine, way: str, to: str, runtime_dir: Path) -> Machine:
    """The machine by the time that it is all there, under another name."""
    accel = machine.status()["accelerator"]
    receiver = Receiver(f"ipc://{runtime_dir}/{to}", accel=accel, name=to)
    with touched(machine.name) if way == "postcopy" else nullcontext():
        assert migrate.migrate(machine, f"ipc://{runtime_dir}/{to}", WAYS[way]).warnings == []
    machine.close()
    there = receiver.result()
    until(lambda: not [h for h in there.status()["holders"] if h["what"] == "lease"], "it is there")
    return there


@pytest.mark.parametrize("way", [pytest.param("precopy"), pytest.param("postcopy", marks=pytest.mark.postcopy),
                                 pytest.param("in-place")])
@pytest.mark.parametrize("accel", ACCELS)
def test_the_chain_goes_on_after_a_migration(accel: str, way: str, tmp_path: Path, runtime_dir: Path) -> None:
    """What was written before it, during it and after it is in the next snapshot, and what was not is not."""
    directory = tmp_path / "s"
    machine = idle(accel)
    try:
        machine.write(_FIRST * PAGE, b"x" * (64 * PAGE))
        snapshot.create(machine, directory)
        machine.write((_FIRST + 7) * PAGE, b"before")
        machine.write(_OTHER, b"before")
        machine = moved(machine, way, "target", runtime_dir)
        machine.write((_FIRST + 9) * PAGE, b"after")
        machine.pause()
        taken = snapshot.create(machine, directory, incremental=True)
        assert (taken.parent, taken.id) == ("0001", "0002")
        assert held_by(directory) == memory_of(machine)
        assert machine.read(_OTHER, 6) == b"before"
        assert taken.slots[1].pages == 1
        assert 2 <= taken.slots[0].pages < _FEW
        assert len([c for c in machine.status()["clients"] if c.startswith("snap")]) == 1
        assert not [c for c in machine.status()["clients"] if c.startswith("migrate")]
    finally:
        machine.close()


@pytest.mark.parametrize("accel", ACCELS)
@pytest.mark.parametrize("seed", range(2))
def test_any_sequence_of_snapshots_migrations_and_restores(accel: str, seed: int, tmp_path: Path,
                                                           runtime_dir: Path) -> None:
    """Two chains at once, which know nothing of each other."""
    chance = random.Random(seed)
    ways = [way for way in WAYS if way != "postcopy" or not missing("postcopy")]
    chains = [tmp_path / "a", tmp_path / "b"]
    machine = busy(accel)
    try:
        for directory in chains:
            snapshot.create(machine, directory)
        for number in range(5):
            first, directory = _FIRST + chance.randrange(64), chance.choice(chains)
            machine.write(first * PAGE, bytes([1 + chance.randrange(255)]) * chance.choice([1, PAGE, 3 * PAGE]))
            match chance.choice(["migrate", "migrate", "restore", "snapshot"]):
                case "migrate":
                    machine = moved(machine, chance.choice(ways), f"m{number}", runtime_dir)
                case "restore":     # of one chain: the other knows nothing of the machine that is launched
                    snapshot.create(machine, directory, incremental=True, live=chance.random() < 0.5)
                    machine.close()
                    machine = snapshot.restore(directory, machine_name=f"m{number}", accel=accel)
                    other = chains[1 - chains.index(directory)]
                    with pytest.raises(VmmError, match="has no record of what was dirtied since"):
                        snapshot.create(machine, other, incremental=True)
                    snapshot.create(machine, other)
                case "snapshot":
                    snapshot.create(machine, directory, incremental=True, live=chance.random() < 0.5)
            machine.pause()
            for each in chains:
                assert snapshot.create(machine, each, incremental=True).parent is not None
                assert held_by(each) == memory_of(machine)
            machine.resume()
    finally:
        machine.close()


def test_a_migration_that_fails_has_taken_nothing_from_the_chain(accel: str, tmp_path: Path, address: str) -> None:
    directory = tmp_path / "s"
    receiver = Receiver(address, accel=accel)
    with idle(accel) as machine:
        snapshot.create(machine, directory)
        machine.write(_OTHER, b"before")

        def cancel(report: migrate.Report) -> None:
            if report.status == "device":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            migrate.migrate(machine, address, progress=cancel)
        receiver.failure()
        assert nothing_left("target")
        machine.pause()
        taken = snapshot.create(machine, directory, incremental=True)
        assert (taken.slots[0].pages < _FEW, taken.slots[1].pages) == (True, 1)
        assert held_by(directory) == memory_of(machine)
        assert not [c for c in machine.status()["clients"] if c.startswith("migrate")]
