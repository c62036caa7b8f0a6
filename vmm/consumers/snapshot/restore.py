"""Launching a machine from a chain."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ipc.shm import data_extents, open_fd
from ipc.userfault import post_copy_missing

from ...client.machine import Machine
from ...errors import VmmError
from ...machine.rules import NO_TREES, Trees, arriving
from .chain import chain, open_slot
from .folder import SnapshotError
from .layers import SlotPages
from .lazy import Arriving
from .manifest import Manifest, file_checksum
from .pagefile import PAGE, read_pages
from .threads import Progress, behind

__all__ = ["restore"]


def restore(directory: Path, name: str | None = None, *, machine_name: str | None = None, accel: str = "auto",
            detach: bool = False, start: bool = True, trees: Trees = NO_TREES, lazy: bool = False,
            progress: Progress = lambda done, total: None) -> Machine:
    """Launch a machine from a chain as it was at ``name`` (default: the newest), on any accelerator; with
    ``start=False`` it is left before its first instruction. ``trees``: files that its program has. ``lazy``: it
    is returned at once, and its memory is read while it runs, by threads of this process, which must live as long
    (``status()["incoming"]``); with ``detach`` when all of it is there. Should that fail, the machine ends, and its
    report says why. Raises VmmError, with nothing left behind."""
    from ...client.accelerators import choose_accelerator

    if lazy and (lacking := post_copy_missing()):
        raise VmmError(f"a lazy restore is not possible here: {lacking}; restore without --lazy")
    manifests = chain(directory, name)
    newest = manifests[-1]
    folder = directory / newest.id
    if file_checksum(folder / "image") != newest.image_checksum:
        raise SnapshotError(f"{folder / 'image'}: is damaged (its checksum does not match)")
    spec = arriving(newest.spec, name=machine_name or newest.spec.name, image=str((folder / "image").resolve()),
                    accel=choose_accelerator(accel, programs=newest.spec.program is not None),
                    linger=not detach, trees=trees, lazy=lazy)
    with contextlib.ExitStack() as stack:
        slots = {slot.id: stack.enter_context(open_slot(directory, manifests, slot)) for slot in newest.slots}
        machine = Machine.launch(spec, detach=detach, start=False)
        coming: Arriving | None = None
        try:
            lease = machine.lease("incoming", f"from {folder}")     # half restored, no other may start or write it
            if lazy:
                coming = Arriving(machine, lease, slots, progress if detach else _nobody)
                stack.pop_all()
            else:
                _fill(machine, slots, progress)
            if newest.spec.keeps_system:
                _restore_system(machine, folder, newest)
            machine.set_state(newest.vcpus)
            if start:
                machine.start()
            if coming is None:
                lease.close()
            else:
                coming.start()
                if detach:
                    coming.wait()
        except BaseException:
            with contextlib.suppress(VmmError):     # it may have gone already
                machine.stop()
            machine.close()
            if coming is not None:
                coming.give_up()
            raise
    return machine


def _nobody(done: int, total: int) -> None:
    """Is told how far it is."""


def _fill(machine: Machine, slots: dict[int, SlotPages], progress: Progress) -> None:
    """The memory of a machine that was reserved. Raises VmmError."""
    total, before = sum(pages.pages for pages in slots.values()), 0
    for slot, pages in slots.items():
        fd = open_fd(machine.ram_segment(slot))
        try:
            memory = machine.ram(slot, writable=True)
            for start, end in data_extents(fd, len(memory)):        # what the loader has put there
                memory[start:end] = 0
            pages.copy_to([fd], behind(progress, before, total))
        except OSError as exc:
            raise SnapshotError(f"slot {slot} of machine '{machine.name}': cannot be filled: {exc.strerror}") from None
        finally:
            os.close(fd)
        before += pages.pages


def _restore_system(machine: Machine, folder: Path, manifest: Manifest) -> None:
    system = machine.system()
    if manifest.system.size != len(system):
        raise SnapshotError(f"{folder}: its system slot has {manifest.system.size} bytes, but this "
                            f"program expects {len(system)}")
    system[:] = 0
    for _ in read_pages(folder, "system", len(system) // PAGE, manifest.system.checksum, system):
        pass
