"""Taking a snapshot.

It is written aside (``.new-…``), synced, and renamed: a kill at any moment leaves the chain as it was.

Epochs. An incremental snapshot needs what was dirtied since its parent. A dirty-log client of its own gathers
that, registered under a name that the parent's manifest holds as soon as the guest stands still, before the last
pages are copied: a page that is written by the host meanwhile is in the epoch, and at worst copied once too often.
It is copied, not taken; it goes when the new snapshot is in its place. So a snapshot that fails has lost nothing,
and no other client notices.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ipc.shm import open_fd
from ipc.steps import step

from ...client.machine import Machine
from ...errors import VmmError
from ...machine.spec import MachineSpec
from .aside import Aside
from .chain import survey
from .folder import SnapshotError, clear_leftovers, discard, locked, new_aside, next_id, sync_directory, sync_file
from .heat import Heat
from .manifest import FORMAT, VERSION, Compression, Manifest, SlotFile, file_checksum, write_manifest
from .pagefile import PAGE, PageWriter, compress
from .pagemap import Words, all_pages
from .threads import Progress, behind
from .underway import Underway

__all__ = ["NoParent", "create"]

_LIVE_ROUNDS = 8            # of copying what was dirtied meanwhile, at most
_LOOKS = 4                  # at what the guest dirties, for its working set
_LIVE_ENOUGH = 512          # pages that are few enough to stop the guest for


class NoParent(SnapshotError):
    """There is none that an incremental snapshot could be built on: a full one can be taken."""


def create(machine: Machine, directory: Path, *, incremental: bool = False, live: bool = False,
           compression: Compression = "none", working_set: float = 0.0,
           progress: Progress = lambda done, total: None) -> Manifest:
    """Take a snapshot. The machine is paused for it, or with ``live`` only for the last dirty pages and the
    vCPU states; it is as before when this returns, also when it fails. A migration, hotplug and the end of dirty
    logging are kept out meanwhile. ``working_set``: seconds before it in which is recorded what the guest dirties, for
    lazy restores. Raises VmmError, NoParent among them."""
    machine.require_state()
    if incremental and not os.path.lexists(directory):
        raise _nothing_to_build_on(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise SnapshotError(f"{directory}: cannot be created: {exc.strerror}") from None
    with (locked(directory), machine.lease("snapshot", f"into {directory}"),
          contextlib.closing(Underway(machine.name, directory)) as underway):
        return _create(machine, directory, incremental, live, compression, working_set, progress, underway)


def _create(machine: Machine, directory: Path, incremental: bool, live: bool, compression: Compression,
            working_set: float, progress: Progress, underway: Underway) -> Manifest:
    parent = _parent(machine, directory) if incremental else None
    family = _family(directory)
    epoch = f"{family}_{uuid.uuid4().hex[:8]}"
    work = f"snapwork_{uuid.uuid4().hex[:8]}"
    aside: Path | None = None
    try:
        clear_leftovers(directory)
        name = next_id(directory)
        aside = new_aside(directory, name)
        with contextlib.ExitStack() as stack:
            machine.register(work, mine=True, like=parent.epoch if parent else "")
            stack.callback(_forget, machine, work)
            taking = _Taking(machine, aside, work, whole=parent is None, packed=compression == "zstd",
                             progress=progress, underway=underway)
            stack.callback(taking.close)
            if working_set:
                taking.watch(working_set)
            if live:
                taking.copy_while_it_runs()
                taking.set_aside_while_it_runs()
            with machine.paused("snapshot"):
                machine.register(epoch)     # before the last pages are looked for: nothing falls between the two
                step("snapshot-epoch")
                taking.finish_memory()
                taking.take_state()
            taking.write_what_was_set_aside()
            manifest = taking.manifest(name, parent, live, compression, epoch)
            write_manifest(aside, manifest)
            step("snapshot-written")
            os.rename(aside, directory / name)
            step("snapshot-renamed")
            sync_directory(directory)
    except BaseException as exc:
        if aside is None or aside.exists():     # else it has got its name: it is there, and its epoch stays
            _forget(machine, epoch)
        if aside is not None:
            discard(aside)
        if isinstance(exc, OSError):
            raise SnapshotError(f"{exc.filename or directory}: cannot be written: {exc.strerror}") from None
        raise
    for client in machine.status()["clients"]:      # epochs that ended with this snapshot
        if client != epoch and (client.startswith(family) or (parent is not None and client == parent.epoch)):
            _forget(machine, client)
            step("snapshot-epoch-dropped")
    return manifest


def _family(directory: Path) -> str:
    return "snap_" + hashlib.blake2b(os.fsencode(directory.resolve()), digest_size=4).hexdigest()


def _nothing_to_build_on(directory: Path) -> NoParent:
    return NoParent(f"{directory}: contains no snapshot to build on: take a full one first")


def _parent(machine: Machine, directory: Path) -> Manifest:
    there = survey(directory)
    if not there:
        raise _nothing_to_build_on(directory)
    newest = there[-1]
    if not isinstance(newest, Manifest):
        raise NoParent(f"{newest.reason}: take a full snapshot, or delete the damaged one first")
    clients = machine.status()["clients"]
    # Not always the newest: another machine that was restored from this chain may have gone on with it, too.
    parent = next((m for m in reversed(there) if isinstance(m, Manifest) and m.epoch in clients), None)
    if parent is None:
        raise NoParent(f"{directory / newest.id}: machine '{machine.name}' has no record of what was "
                       "dirtied since (it is another machine, or its dirty-log client was dropped): "
                       "take a full one")
    return parent


def _forget(machine: Machine, client: str) -> None:
    with contextlib.suppress(VmmError):
        machine.unregister(client)


class _Taking:
    """The memory files of a snapshot while it is taken."""

    def __init__(self, machine: Machine, aside: Path, client: str, *, whole: bool, packed: bool,
                 progress: Progress, underway: Underway) -> None:
        self._machine = machine
        self._folder = aside
        self._client = client
        self._whole = whole
        self._packed = packed
        self._told = progress
        self._underway = underway
        self._writers: dict[tuple[int, int], PageWriter] = {}
        self._heat: dict[tuple[int, int], Heat] = {}
        self._done = 0
        self._last = 0      # pages of the last round
        self._aside: Aside | None = None

    def _progress(self, done: int, total: int) -> None:
        self._underway.tell(done, total)
        self._told(done, total)

    def _slots(self) -> list[dict[str, Any]]:
        return list(self._machine.status()["slots"])

    def _writer(self, slot: dict[str, Any]) -> tuple[PageWriter, bool]:
        """The slot's file, and whether it is a new one."""
        key = (slot["id"], slot["born"])
        fresh = key not in self._writers
        if fresh:
            self._writers[key] = PageWriter(self._folder, f"slot{slot['id']}", slot["pages"],
                                            passing=self._packed)
        return self._writers[key], fresh

    def watch(self, seconds: float) -> None:
        """For so long, what the guest dirties."""
        client = f"snapwatch_{uuid.uuid4().hex[:8]}"
        self._machine.register(client, mine=True)
        try:
            for _ in range(_LOOKS):
                time.sleep(seconds / _LOOKS)
                self._machine.collect(client)
                for slot in self._slots():
                    self._note_heat(slot, self._machine.bitmap(slot["id"], client).words)
        finally:
            _forget(self._machine, client)

    def _note_heat(self, slot: dict[str, Any], words: Words) -> None:
        heat = self._heat.setdefault((slot["id"], slot["born"]), Heat(slot["pages"]))
        heat.add(words & all_pages(slot["pages"]))

    def copy_while_it_runs(self) -> None:
        """Round after round, until what was dirtied in the last is little, or grows."""
        before = None
        for _ in range(_LIVE_ROUNDS):
            pages = self._round()
            if pages <= _LIVE_ENOUGH or (before is not None and pages > before // 2):
                return
            before = pages

    def set_aside_while_it_runs(self) -> None:
        """As above, but into memory: what is left for the pause is little then, whatever the size of the machine and
        the speed of the disk."""
        self._aside = Aside(self._last + self._last // 4)
        for slot in self._slots():
            self._aside.map(self._machine.ram(slot["id"]))
        self.copy_while_it_runs()

    def write_what_was_set_aside(self) -> None:
        """Into the files; the guest runs again."""
        if self._aside is not None:
            before, self._done = self._done, self._done + self._aside.pages
            self._aside.write(self._progress, before, self._done)

    def _dirty(self) -> tuple[int, list[tuple[dict[str, Any], PageWriter, Words]]]:
        """What is new since the last round; how many pages."""
        self._machine.collect(self._client)
        total = 0
        todo = []
        for slot in self._slots():
            writer, fresh = self._writer(slot)
            dirty = self._machine.bitmap(slot["id"], self._client).words & all_pages(slot["pages"])
            if fresh and (self._whole or not slot["logged"]):
                dirty = all_pages(slot["pages"])    # it is unknown what changed in a slot that is not logged
            elif not fresh:
                self._note_heat(slot, dirty)
            todo.append((slot, writer, dirty))
            total += int(np.bitwise_count(dirty).sum())
        return total, todo

    def _round(self) -> int:
        """Write what is new since the last round, or set it aside if there is room for it; pages."""
        total, todo = self._dirty()
        self._last = total
        self._underway.begin_round()
        self._underway.tell(self._done, self._done + total)
        if self._aside is not None and self._aside.has_room(total):
            for slot, writer, dirty in todo:
                self._aside.copy(writer, self._machine.ram(slot["id"]), dirty)
            return total
        self.write_what_was_set_aside()     # it is older
        before, self._done = self._done, self._done + total
        for slot, writer, dirty in todo:
            self._copy(slot, writer, dirty, behind(self._progress, before, self._done))
            before += int(np.bitwise_count(dirty).sum())
        return total

    def _copy(self, slot: dict[str, Any], writer: PageWriter, words: Words, done: Callable[[int], None]) -> None:
        fd = open_fd(self._machine.ram_segment(slot["id"]))
        try:
            writer.copy(fd, words, done)
        finally:
            os.close(fd)

    def finish_memory(self) -> None:
        """The guest stands still: the rest. Slots that are not logged are written again."""
        for slot in self._slots():
            if not slot["logged"]:
                writer, fresh = self._writer(slot)
                if not fresh:
                    self._copy(slot, writer, all_pages(slot["pages"]), lambda count: None)
        self._round()

    def take_state(self) -> None:
        """And the system slot."""
        state = self._machine.state()
        self._spec, self._vcpus = msgspec.convert(state["spec"], MachineSpec), state["vcpus"]
        self._system = self._machine.system().copy()

    def manifest(self, name: str, parent: Manifest | None, live: bool, compression: Compression,
                 epoch: str) -> Manifest:
        spec, files = self._spec, []
        for slot in spec.slots:
            finished = self._writers[slot.id, slot.born].finish()
            heat = self._heat.get((slot.id, slot.born))
            files.append(msgspec.structs.replace(
                _slot_file(slot.id, slot.gpa, slot.size, slot.log, slot.born, finished),
                working_set=heat.packed() if heat is not None else ""))
            if compression == "zstd":
                compress(self._folder, f"slot{slot.id}")
        with PageWriter(self._folder, "system", len(self._system) // PAGE) as writer:
            if spec.keeps_system:
                writer.put(0, self._system)
            system = _slot_file(0, 0, len(self._system), False, 0, writer.finish())
        if spec.image:
            shutil.copyfile(spec.image, self._folder / "image")
        else:
            (self._folder / "image").touch()
        sync_file(self._folder / "image")
        return Manifest(
            format=FORMAT, version=VERSION, id=name, parent=parent.id if parent else None,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            program=metadata.version("shardvmm"), accelerator=spec.accel, live=live, compression=compression,
            epoch=epoch, image_checksum=file_checksum(self._folder / "image"), spec=spec, slots=files, system=system,
            vcpus=self._vcpus)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def _slot_file(slot_id: int, gpa: int, size: int, log: bool, born: int, finished: dict[str, Any]) -> SlotFile:
    return SlotFile(slot_id, gpa, size, log, born, finished["pages"], finished["zero_pages"], finished["checksum"])
