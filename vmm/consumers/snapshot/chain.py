"""Chains: which snapshots a directory holds, and what each is built on. A damaged one harms those that build on it,
and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .folder import SnapshotError, snapshot_ids
from .layers import SlotPages
from .manifest import Manifest, SlotFile, file_checksum, load_manifest
from .pagefile import PAGE, PageFile
from .threads import Progress, behind

__all__ = ["Damaged", "chain", "layers", "list_snapshots", "open_slot", "read_memory", "survey", "verify"]


@dataclass(frozen=True, slots=True)
class Damaged:
    """A snapshot whose manifest cannot be used; ``reason`` names the file."""

    id: str
    reason: str


def survey(directory: Path) -> list[Manifest | Damaged]:
    """Every snapshot of a chain's directory, the oldest first. Raises SnapshotError when there is no such
    directory."""
    found: list[Manifest | Damaged] = []
    for name in snapshot_ids(directory):
        try:
            found.append(load_manifest(directory, name))
        except SnapshotError as exc:
            found.append(Damaged(name, str(exc)))
    return found


def list_snapshots(directory: Path) -> list[Manifest]:
    """As ``survey``, without those that are damaged."""
    return [each for each in survey(directory) if isinstance(each, Manifest)]


def chain(directory: Path, name: str | None = None) -> list[Manifest]:
    """From the full snapshot to ``name`` (default: the newest). Raises SnapshotError for one that is not whole."""
    if name is None:
        there = snapshot_ids(directory)
        if not there:
            raise SnapshotError(f"{directory}: contains no snapshots")
        name = there[-1]
    found = [load_manifest(directory, name)]
    while (parent := found[0].parent) is not None:      # a smaller number each time
        try:
            found.insert(0, load_manifest(directory, parent))
        except SnapshotError as exc:
            raise SnapshotError(f"{directory / name}: depends on {parent}: {exc}") from None
    return found


def layers(directory: Path, manifests: list[Manifest], slot: SlotFile) -> Iterator[tuple[Path, SlotFile]]:
    """The files of the chain that hold pages of this very slot, oldest first."""
    for manifest in manifests:
        for each in manifest.slots:
            if (each.id, each.gpa, each.size, each.born) == (slot.id, slot.gpa, slot.size, slot.born):
                yield directory / manifest.id, each


def open_slot(directory: Path, manifests: list[Manifest], slot: SlotFile) -> SlotPages:
    """What the chain holds of this slot, to be read; close it. Raises PageFileError."""
    return SlotPages([(where, f"slot{slot.id}", each.checksum) for where, each in layers(directory, manifests, slot)],
                     slot.size // PAGE)


def read_memory(directory: Path, name: str | None = None) -> dict[int, NDArray[np.uint8]]:
    """The memory that a snapshot holds (default: the newest), {slot id: uint8[bytes]}. Raises SnapshotError,
    PageFileError."""
    manifests, found = chain(directory, name), {}
    for slot in manifests[-1].slots:
        memory = found[slot.id] = np.zeros(slot.size, np.uint8)
        with open_slot(directory, manifests, slot) as pages:
            pages.read_into(memory)
    return found


def verify(directory: Path, name: str | None = None,
           progress: Progress = lambda done, total: None) -> list[Manifest]:
    """Read every byte of a chain and compare; the chain. Raises SnapshotError and PageFileError with what is
    wrong."""
    manifests = chain(directory, name)
    total = sum(slot.pages for m in manifests for slot in (*m.slots, m.system))
    done = 0
    for manifest in manifests:
        folder = directory / manifest.id
        for slot in (*manifest.slots, manifest.system):
            file = "system" if slot is manifest.system else f"slot{slot.id}"
            with PageFile(folder, file, slot.size // PAGE, slot.checksum) as pages:
                done += pages.verify(behind(progress, done, total))
        if file_checksum(folder / "image") != manifest.image_checksum:
            raise SnapshotError(f"{folder / 'image'}: is damaged (its checksum does not match)")
    return manifests
