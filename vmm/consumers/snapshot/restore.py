"""Launching machines from a chain."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ipc.shm import SegmentError, open_fd, reserve, room
from ipc.userfault import post_copy_missing

from ...client.machine import Machine
from ...errors import VmmError
from ...machine.names import check_machine_name, slot_segment
from ...machine.room import shared_memory
from ...machine.rules import NO_TREES, Trees, arriving
from ...machine.spec import MachineSpec, RamSlot
from .chain import chain, open_slot
from .folder import SnapshotError
from .heat import unpacked
from .layers import SlotPages
from .lazy import Arriving, Shared
from .manifest import Manifest, file_checksum
from .pagefile import PAGE, PageFileError
from .threads import Progress, behind

__all__ = ["restore", "restore_many"]

_COUNT_MAX = 1000
_ATTEMPTS = 5       # to open a chain that others change meanwhile


def _nobody(done: int, total: int) -> None:
    """Is told how far it is."""


def restore(directory: Path, name: str | None = None, *, machine_name: str | None = None, accel: str = "auto",
            detach: bool = False, start: bool = True, trees: Trees = NO_TREES, lazy: bool = False,
            progress: Progress = _nobody) -> Machine:
    """Launch a machine from a chain as it was at ``name`` (default: the newest), on any accelerator; with
    ``start=False`` it is left before its first instruction. ``trees``: files that its program has. ``lazy``: it
    is returned at once, and its memory is read while it runs, by threads of this process, which must live as long
    (``status()["incoming"]``); with ``detach`` when all of it is there. Should that fail, the machine ends, and its
    report says why. Raises VmmError, with nothing left behind."""
    return _restore(directory, name, lambda given: [machine_name or given], accel, detach=detach, start=start,
                    trees=trees, lazy=lazy, progress=progress)[0]


def restore_many(directory: Path, name: str | None = None, *, count: int, machine_name: str | None = None,
                 accel: str = "auto", detach: bool = False, start: bool = True, trees: Trees = NO_TREES,
                 lazy: bool = False, progress: Progress = _nobody) -> list[Machine]:
    """As ``restore``, so many machines: ``machine_name`` (default: the machine's name in the snapshot) with ``-0``,
    ``-1``, … behind it. Unless ``lazy``, each page is read once for all of them. Raises VmmError, with nothing left
    behind, also when there is no room for all of them."""
    if not 1 <= count <= _COUNT_MAX:
        raise VmmError(f"there cannot be {count} machines: the count must be from 1 to {_COUNT_MAX}")
    return _restore(directory, name, lambda given: [f"{machine_name or given}-{number}" for number in range(count)],
                    accel, detach=detach, start=start, trees=trees, lazy=lazy, progress=progress)


@dataclass(frozen=True)
class _Opened:
    """A chain's files, that are open: whatever becomes of it, this can be read."""

    manifest: Manifest
    slots: dict[int, SlotPages]
    system: SlotPages


def _open(directory: Path, name: str | None, stack: contextlib.ExitStack) -> _Opened:
    """``stack`` closes them. Raises SnapshotError and PageFileError."""
    for attempt in range(_ATTEMPTS):
        manifests = chain(directory, name)
        newest = manifests[-1]
        files = contextlib.ExitStack()
        try:
            found = _Opened(
                newest,
                {slot.id: files.enter_context(open_slot(directory, manifests, slot)) for slot in newest.slots},
                files.enter_context(SlotPages([(directory / newest.id, "system", newest.system.checksum)],
                                              newest.system.size // PAGE)))
        except PageFileError:
            files.close()
            # A merge may have replaced files between the manifest and them.
            if attempt == _ATTEMPTS - 1 or chain(directory, name) == manifests:
                raise
            continue
        stack.enter_context(files)
        return found
    raise AssertionError


def _restore(directory: Path, name: str | None, names: Callable[[str], list[str]], accel: str, *, detach: bool,
             start: bool, trees: Trees, lazy: bool, progress: Progress) -> list[Machine]:
    """Machines of these names, given the one that it had. Raises VmmError."""
    from ...client.accelerators import choose_accelerator

    if lazy and (lacking := post_copy_missing()):
        raise VmmError(f"a lazy restore is not possible here: {lacking}; restore without --lazy")
    with contextlib.ExitStack() as stack:
        opened = _open(directory, name, stack)
        saved = opened.manifest
        folder = directory / saved.id
        spec = arriving(saved.spec, name=saved.spec.name, image=_image(folder, saved, stack),
                        accel=choose_accelerator(accel, programs=saved.spec.program is not None),
                        linger=not detach, trees=trees, incoming=True)
        wanted = names(spec.name)
        _check(spec, wanted)
        machines: list[Machine] = []
        ready = 0
        coming: list[Arriving] = []
        heat = {slot.id: unpacked(slot.working_set, slot.size // PAGE) for slot in saved.slots}
        shared = Shared(stack)
        try:
            for each in wanted:
                machines.append(Machine.launch(msgspec.structs.replace(spec, name=each), detach=detach, start=False))
            gone: SegmentError | None = None
            try:
                if not lazy:
                    _fill(wanted, spec.slots, opened.slots, progress)       # while their processes begin
            except SegmentError as exc:
                gone = exc
            for machine in machines:
                machine.is_ready(wait=True)
                ready += 1
            if gone is not None:
                raise VmmError(str(gone))
            leases = [machine.lease("incoming", f"from {folder}") for machine in machines]  # half restored, no other
            if lazy:                                                                # may start or write to them
                for machine, lease in zip(machines, leases, strict=True):
                    coming.append(Arriving(machine, lease, opened.slots, heat, shared,
                                           progress if detach and len(machines) == 1 else _nobody))
            for number, machine in enumerate(machines):
                if saved.spec.keeps_system:
                    _restore_system(machine, folder, opened.system)
                machine.set_state(saved.vcpus)
                machine.register(saved.epoch)       # what is dirtied from here on is what the next snapshot needs
                if start:
                    machine.start()
                if lazy:
                    coming[number].start()
                else:
                    leases[number].close()
            for arrives in coming if detach else ():
                arrives.wait()
        except BaseException:
            for number, machine in enumerate(machines):
                if number < ready:
                    with contextlib.suppress(VmmError):     # it may have gone already
                        machine.stop()
                machine.close()
            for arrives in coming:
                arrives.give_up()
            raise
        if coming:
            shared.keep()
    return machines


def _image(folder: Path, saved: Manifest, stack: contextlib.ExitStack) -> str:
    """A copy of the guest's image: the machine's coordinator reads it later, when the chain may be another. ``stack``
    removes it. Raises SnapshotError."""
    image = folder / "image"
    if file_checksum(image) != saved.image_checksum:
        raise SnapshotError(f"{image}: is damaged (its checksum does not match)")
    try:
        copy = stack.enter_context(tempfile.NamedTemporaryFile(prefix="shardvmm-image-"))     # noqa: SIM115
        shutil.copyfile(image, copy.name)
    except OSError as exc:
        raise SnapshotError(f"{image}: cannot be copied: {exc.strerror}") from None
    return copy.name


def _check(spec: MachineSpec, names: list[str]) -> None:
    """Raises VmmError where there cannot be as many machines."""
    for each in names:
        check_machine_name(each)
    needed, there = shared_memory(spec) * len(names), room()
    if needed > there.free and len(names) > 1:
        raise VmmError(there.shortage(f"the {len(names)} machines", needed))


def _fill(names: list[str], slots: list[RamSlot], saved: dict[int, SlotPages], progress: Progress) -> None:
    """Memory of these machines, which is all holes: who writes to a hole through a descriptor is told when there is no
    room. Raises VmmError, and SegmentError for a machine that has gone."""
    total, before = sum(pages.pages for pages in saved.values()), 0
    for slot in slots:
        pages = saved[slot.id]
        with contextlib.ExitStack() as stack:
            fds = []
            for name in names:
                fds.append(open_fd(slot_segment(name, "ram", slot)))
                stack.callback(os.close, fds[-1])
            try:
                pages.copy_to(fds, behind(progress, before, total))
                for fd in fds if pages.pages < pages.total else ():
                    reserve(fd, 0, pages.total * PAGE)       # the rest is zero
            except OSError as exc:
                raise SnapshotError(f"slot {slot.id} of machine '{names[0]}': cannot be filled: "
                                    f"{exc.strerror}") from None
        before += pages.pages


def _restore_system(machine: Machine, folder: Path, pages: SlotPages) -> None:
    system = machine.system()
    if pages.total * PAGE != len(system):
        raise SnapshotError(f"{folder}: its system slot has {pages.total * PAGE} bytes, but this program expects "
                            f"{len(system)}")
    system[:] = 0
    pages.read_into(system)
