"""Launching a machine from a chain."""

from __future__ import annotations

from pathlib import Path

from ...client.machine import Machine
from ...machine.rules import NO_TREES, Trees, arriving
from .chain import Progress, chain, fill, layers
from .folder import SnapshotError
from .manifest import Manifest, file_checksum
from .pagefile import PAGE, read_pages

__all__ = ["restore"]


def restore(directory: Path, name: str | None = None, *, machine_name: str | None = None, accel: str = "auto",
            detach: bool = False, start: bool = True, trees: Trees = NO_TREES,
            progress: Progress = lambda done, total: None) -> Machine:
    """Launch a machine from a chain as it was at ``name`` (default: the newest), on any accelerator; with
    ``start=False`` it is left before its first instruction. ``trees``: files that its program has. Raises VmmError,
    with nothing left behind."""
    from ...client.accelerators import choose_accelerator

    manifests = chain(directory, name)
    newest = manifests[-1]
    folder = directory / newest.id
    if file_checksum(folder / "image") != newest.image_checksum:
        raise SnapshotError(f"{folder / 'image'}: is damaged (its checksum does not match)")
    spec = arriving(newest.spec, name=machine_name or newest.spec.name, image=str((folder / "image").resolve()),
                    accel=choose_accelerator(accel, programs=newest.spec.program is not None),
                    linger=not detach, trees=trees)
    machine = Machine.launch(spec, detach=detach, start=False)
    try:
        with machine.lease("incoming", f"from {folder}"):     # half restored, no other may start or write it
            total = sum(each.pages for slot in newest.slots for _, each in layers(directory, manifests, slot))
            done = 0
            for slot in newest.slots:
                memory = machine.ram(slot.id, writable=True)
                memory[:] = 0       # the loader has put the image there
                for count in fill(directory, manifests, slot, memory):
                    done += count
                    progress(done, total)
            if newest.spec.keeps_system:
                _restore_system(machine, folder, newest)
            machine.set_state(newest.vcpus)
            if start:
                machine.start()
    except BaseException:
        machine.stop()
        machine.close()
        raise
    return machine


def _restore_system(machine: Machine, folder: Path, manifest: Manifest) -> None:
    system = machine.system()
    if manifest.system.size != len(system):
        raise SnapshotError(f"{folder}: its system slot has {manifest.system.size} bytes, but this "
                            f"program expects {len(system)}")
    system[:] = 0
    for _ in read_pages(folder, "system", len(system) // PAGE, manifest.system.checksum, system):
        pass
