"""Snapshots: full and incremental chains of a machine's memory and state.

A chain lives in one directory, a snapshot in a directory of its own below: ``0001``, ``0002``, …::

    manifest.json   format, parent, machine, slots with their checksums, vCPU states (docs/snapshots.md)
    manifest.sum    BLAKE2b-256 of manifest.json
    slot<id>.map, slot<id>.mem (or .zst)    vmm/pagefile.py
    system.map, system.mem                  the system slot, whole
    image           the guest image, for a host that does not have it

A snapshot is written aside (``.new-…``), synced, and renamed: a kill at any moment leaves the chain as it was.

Epochs. An incremental snapshot needs what was dirtied since its parent. A dirty-log client of its own gathers
that, registered at the parent's last moment under a name that the parent's manifest holds. It is copied, not
taken; it goes when the new snapshot is in its place. So a snapshot that fails has lost nothing, and no other
client notices.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from .errors import VmmError
from .machine import Machine
from .pagefile import PAGE, PageFileError, PageWriter, compress, read_pages
from .rules import RuleError, arriving
from .spec import MachineSpec

__all__ = ["Manifest", "PageFileError", "SnapshotError", "chain", "create", "delete", "list_snapshots",
           "load_manifest", "merge", "restore", "verify"]

FORMAT = "shardvmm-snapshot"
VERSION = 1
_LIVE_ROUNDS = 8            # of copying what was dirtied meanwhile, at most
_LIVE_ENOUGH = 512          # pages that are few enough to stop the guest for
_RENAME_EXCHANGE = 2        # renameat2(2)
_AT_FDCWD = -100

Compression = Literal["none", "zstd"]
Progress = Callable[[int, int], None]       # (pages done, pages in all)


class SnapshotError(VmmError):
    """A snapshot that is damaged, foreign, or not there; the text names the file."""


class SlotFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: int
    gpa: int
    size: int
    log: bool
    born: int
    pages: int
    zero_pages: int
    checksum: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: str
    version: int
    id: str
    parent: str | None
    created: str                # ISO 8601, UTC
    program: str                # version that wrote it
    accelerator: str            # that the machine ran on; it may be restored on another
    live: bool
    compression: Compression
    epoch: str                  # dirty-log client that gathers what comes after
    image_checksum: str
    spec: MachineSpec           # slots as they were
    slots: list[SlotFile]
    system: SlotFile
    vcpus: list[dict[str, Any]]

    @property
    def pages(self) -> int:
        return sum(s.pages for s in self.slots)


# --- reading a chain ------------------------------------------------------------------------------------------


def load_manifest(directory: Path, name: str) -> Manifest:
    """Raises SnapshotError."""
    path = directory / name / "manifest.json"
    try:
        text = path.read_bytes()
        checksum = path.with_suffix(".sum").read_text().strip()
    except OSError as exc:
        raise SnapshotError(f"{exc.filename}: cannot be read: {exc.strerror}") from None
    if hashlib.blake2b(text, digest_size=32).hexdigest() != checksum:
        raise SnapshotError(f"{path}: is damaged (its checksum does not match)")
    try:
        head = msgspec.json.decode(text)
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise SnapshotError(f"{path}: is no snapshot of this program")
        if head.get("version") != VERSION:
            raise SnapshotError(f"{path}: has format version {head.get('version')}; this program knows {VERSION}")
        manifest = msgspec.convert(head, Manifest)
    except msgspec.MsgspecError as exc:
        raise SnapshotError(f"{path}: is not a manifest: {exc}") from None
    if manifest.id != name:
        raise SnapshotError(f"{path}: says that it is snapshot {manifest.id}")
    return manifest


def list_snapshots(directory: Path) -> list[Manifest]:
    """Every snapshot of a chain's directory, oldest first. Raises SnapshotError."""
    if not directory.is_dir():
        raise SnapshotError(f"{directory}: is no directory")
    names = sorted(p.name for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [load_manifest(directory, name) for name in names]


def chain(directory: Path, name: str | None = None) -> list[Manifest]:
    """From the full snapshot to ``name`` (default: the newest). Raises SnapshotError for one that is not whole."""
    manifests = {m.id: m for m in list_snapshots(directory)}
    if not manifests:
        raise SnapshotError(f"{directory}: holds no snapshot")
    at: str | None = name if name is not None else max(manifests)
    found: list[Manifest] = []
    while at is not None:
        if at not in manifests or len(found) > len(manifests):
            raise SnapshotError(f"{directory / at}: is missing"
                                + (f", the parent of {found[0].id}" if found else ""))
        found.insert(0, manifests[at])
        at = manifests[at].parent
    return found


def _layers(directory: Path, manifests: list[Manifest], slot: SlotFile) -> Iterator[tuple[Path, SlotFile]]:
    """The files of the chain that hold pages of this very slot, oldest first."""
    for manifest in manifests:
        for each in manifest.slots:
            if (each.id, each.gpa, each.size, each.born) == (slot.id, slot.gpa, slot.size, slot.born):
                yield directory / manifest.id, each


def verify(directory: Path, name: str | None = None,
           progress: Progress = lambda done, total: None) -> list[Manifest]:
    """Read every byte of a chain and compare; the chain. Raises SnapshotError with what is wrong."""
    manifests = chain(directory, name)
    total = sum(slot.pages for m in manifests for slot in (*m.slots, m.system))
    done = 0
    for manifest in manifests:
        folder = directory / manifest.id
        for slot in (*manifest.slots, manifest.system):
            for _, count in read_pages(folder, _file_name(manifest, slot), slot.size // PAGE, slot.checksum):
                done += count
                progress(done, total)
        if _checksum(folder / "image") != manifest.image_checksum:
            raise SnapshotError(f"{folder / 'image'}: is damaged (its checksum does not match)")
    return manifests


def _file_name(manifest: Manifest, slot: SlotFile) -> str:
    return "system" if slot is manifest.system else f"slot{slot.id}"


def _checksum(path: Path) -> str:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=32).hexdigest()
    except OSError as exc:
        raise SnapshotError(f"{path}: cannot be read: {exc.strerror}") from None


# --- create -----------------------------------------------------------------------------------------------------


def create(machine: Machine, directory: Path, *, incremental: bool = False, live: bool = False,
           compression: Compression = "none", progress: Progress = lambda done, total: None) -> Manifest:
    """Take a snapshot. The machine is paused for it, or with ``live`` only for the last dirty pages and the
    vCPU states; it is as before when this returns, also when it fails. Raises VmmError."""
    machine.require_memory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise SnapshotError(f"{directory}: cannot be made: {exc.strerror}") from None
    with _locked(directory):
        return _create(machine, directory, incremental, live, compression, progress)


def _create(machine: Machine, directory: Path, incremental: bool, live: bool, compression: Compression,
            progress: Progress) -> Manifest:
    earlier = list_snapshots(directory)
    parent = _parent(machine, directory, earlier) if incremental else None
    name = f"{int(earlier[-1].id) + 1 if earlier else 1:04d}"
    _clear_leavings(directory)
    aside = directory / f".new-{name}-{uuid.uuid4().hex[:8]}"
    family = _family(directory)
    epoch = f"{family}_{uuid.uuid4().hex[:8]}"
    work = f"snapwork_{uuid.uuid4().hex[:8]}"
    try:
        aside.mkdir(mode=0o700)
        with contextlib.ExitStack() as stack:
            machine.register(work, mine=True, like=parent.epoch if parent else "")
            stack.callback(_forget, machine, work)
            taking = _Taking(machine, aside, work, whole=parent is None, progress=progress)
            stack.callback(taking.close)
            if live:
                taking.copy_while_it_runs()
            with _paused(machine):
                taking.finish_memory()
                machine.register(epoch)
                state = machine.state()
            manifest = taking.manifest(state, name, parent, live, compression, epoch)
            _write_manifest(aside, manifest)
            os.rename(aside, directory / name)
            _sync_directory(directory)
    except BaseException as exc:
        shutil.rmtree(aside, ignore_errors=True)
        _forget(machine, epoch)
        if isinstance(exc, OSError):
            raise SnapshotError(f"{exc.filename or directory}: cannot be written: {exc.strerror}") from None
        raise
    for client in machine.status()["clients"]:      # epochs that ended with this snapshot
        if client.startswith(family) and client != epoch:
            _forget(machine, client)
    return manifest


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One at a time changes a chain. Raises SnapshotError."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise SnapshotError(f"{directory}: {exc.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise SnapshotError(f"{directory}: another snapshot is being taken, merged or deleted there") from None
    finally:
        os.close(fd)


def _family(directory: Path) -> str:
    return "snap_" + hashlib.blake2b(os.fsencode(directory.resolve()), digest_size=4).hexdigest()


def _parent(machine: Machine, directory: Path, earlier: list[Manifest]) -> Manifest:
    if not earlier:
        raise SnapshotError(f"{directory}: holds no snapshot to build on: take a full one first")
    parent = earlier[-1]
    if parent.epoch not in machine.status()["clients"]:
        raise SnapshotError(f"{directory / parent.id}: machine '{machine.name}' does not know what was dirtied "
                            "since (it is another one, or was restored or restarted): take a full one")
    return parent


def _forget(machine: Machine, client: str) -> None:
    with contextlib.suppress(VmmError):
        machine.unregister(client)


def _clear_leavings(directory: Path) -> None:
    """What a snapshot that was killed has left. The caller holds the directory's lock."""
    for path in directory.glob(".*-*"):
        if path.is_dir() and path.name.startswith((".new-", ".old-")):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _paused(machine: Machine) -> Iterator[None]:
    """Paused for the time being, unless somebody had paused it already; resumed also if this process is killed."""
    if machine.status()["state"] == "paused":
        yield
        return
    machine.pause(mine=True)
    try:
        yield
    finally:
        machine.resume()


class _Taking:
    """The memory files of a snapshot while it is taken."""

    def __init__(self, machine: Machine, aside: Path, client: str, *, whole: bool, progress: Progress) -> None:
        self._machine = machine
        self._aside = aside
        self._client = client
        self._whole = whole
        self._progress = progress
        self._writers: dict[tuple[int, int], PageWriter] = {}
        self._done = 0

    def _slots(self) -> list[dict[str, Any]]:
        return list(self._machine.status()["slots"])

    def _writer(self, slot: dict[str, Any]) -> tuple[PageWriter, bool]:
        """The slot's file, and whether it is a new one."""
        key = (slot["id"], slot["born"])
        fresh = key not in self._writers
        if fresh:
            self._writers[key] = PageWriter(self._aside, f"slot{slot['id']}", slot["pages"])
        return self._writers[key], fresh

    def copy_while_it_runs(self) -> None:
        """Round after round, until what was dirtied in the last is little, or grows."""
        before = None
        for _ in range(_LIVE_ROUNDS):
            pages = self._round()
            if pages <= _LIVE_ENOUGH or (before is not None and pages > before // 2):
                return
            before = pages

    def _round(self) -> int:
        """Write what is new since the last round; pages."""
        self._machine.sync(self._client)
        total = 0
        todo = []
        for slot in self._slots():
            writer, fresh = self._writer(slot)
            dirty = np.flatnonzero(self._machine.bitmap(slot["id"], self._client).bools())
            if fresh and (self._whole or not slot["logged"]):
                dirty = np.arange(slot["pages"])    # nobody knows what changed in a slot that is not logged
            todo.append((slot, writer, dirty))
            total += len(dirty)
        for slot, writer, dirty in todo:
            memory = self._machine.ram(slot["id"])
            for at in range(0, len(dirty), 16384):
                part = dirty[at:at + 16384]
                writer.write(memory, part)
                self._done += len(part)
                self._progress(self._done, self._done + total - at - len(part))
        return total

    def finish_memory(self) -> None:
        """The guest stands still: the rest. Slots that are not logged are written again."""
        for slot in self._slots():
            if not slot["logged"]:
                writer, fresh = self._writer(slot)
                if not fresh:
                    writer.write(self._machine.ram(slot["id"]), np.arange(slot["pages"]))
        self._round()
        system = self._machine.system()
        self._system = PageWriter(self._aside, "system", len(system) // PAGE)
        self._system.write(system, np.arange(len(system) // PAGE))
        self._system_size = len(system)

    def manifest(self, state: dict[str, Any], name: str, parent: Manifest | None, live: bool,
                 compression: Compression, epoch: str) -> Manifest:
        spec = msgspec.convert(state["spec"], MachineSpec)
        files = []
        for slot in spec.slots:
            finished = self._writers[slot.id, slot.born].finish()
            files.append(_slot_file(slot.id, slot.gpa, slot.size, slot.log, slot.born, finished))
            if compression == "zstd":
                compress(self._aside, f"slot{slot.id}")
        system = _slot_file(0, 0, self._system_size, False, 0, self._system.finish())
        shutil.copyfile(spec.image, self._aside / "image")
        _sync_file(self._aside / "image")
        return Manifest(
            format=FORMAT, version=VERSION, id=name, parent=parent.id if parent else None,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            program=metadata.version("shardvmm"), accelerator=spec.accel, live=live, compression=compression,
            epoch=epoch, image_checksum=_checksum(self._aside / "image"), spec=spec, slots=files, system=system,
            vcpus=state["vcpus"])

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        if hasattr(self, "_system"):
            self._system.close()


def _slot_file(slot_id: int, gpa: int, size: int, log: bool, born: int, finished: dict[str, Any]) -> SlotFile:
    return SlotFile(slot_id, gpa, size, log, born, finished["pages"], finished["zero_pages"], finished["checksum"])


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sum").write_text(hashlib.blake2b(text, digest_size=32).hexdigest() + "\n")
    _sync_file(folder / "manifest.json")
    _sync_file(folder / "manifest.sum")
    _sync_directory(folder)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- restore ------------------------------------------------------------------------------------------------------


def restore(directory: Path, name: str | None = None, *, machine_name: str | None = None, accel: str = "auto",
            detach: bool = False, start: bool = True,
            progress: Progress = lambda done, total: None) -> Machine:
    """Launch a machine from a chain as it was at ``name`` (default: the newest), on any accelerator; with
    ``start=False`` it is left before its first instruction. Raises VmmError, with nothing left behind."""
    from .plan import choose_accelerator

    manifests = chain(directory, name)
    newest = manifests[-1]
    image = _image(directory / newest.id, newest)
    try:
        spec = arriving(newest.spec, name=machine_name or newest.spec.name, image=str(image),
                        accel=choose_accelerator(accel), linger=not detach)
    except RuleError as exc:
        raise SnapshotError(f"{directory / newest.id / 'manifest.json'}: a machine that cannot be: {exc}") from None
    machine = Machine.launch(spec, detach=detach, start=False)
    try:
        total = sum(each.pages for slot in newest.slots for _, each in _layers(directory, manifests, slot))
        done = 0
        for slot in newest.slots:
            memory = machine.ram(slot.id, writable=True)
            memory[:] = 0       # the loader has put the image there
            for folder, each in _layers(directory, manifests, slot):
                for _, count in read_pages(folder, f"slot{slot.id}", slot.size // PAGE, each.checksum, memory):
                    done += count
                    progress(done, total)
        _restore_system(machine, directory / newest.id, newest)
        machine.set_state(newest.vcpus)
        if start:
            machine.start()
    except BaseException:
        machine.stop()
        machine.close()
        raise
    return machine


def _image(folder: Path, manifest: Manifest) -> Path:
    if _checksum(folder / "image") != manifest.image_checksum:
        raise SnapshotError(f"{folder / 'image'}: is damaged (its checksum does not match)")
    return (folder / "image").resolve()


def _restore_system(machine: Machine, folder: Path, manifest: Manifest) -> None:
    system = machine.system()
    if manifest.system.size != len(system):
        raise SnapshotError(f"{folder}: its system slot has {manifest.system.size} bytes, this program's "
                            f"{len(system)}")
    system[:] = 0
    for _ in read_pages(folder, "system", len(system) // PAGE, manifest.system.checksum, system):
        pass


# --- merge, delete -----------------------------------------------------------------------------------------------


def merge(directory: Path, name: str | None = None,
          progress: Progress = lambda done, total: None) -> Manifest:
    """Make ``name`` (default: the newest) a full snapshot and drop those it was built on, unless another still
    needs them. Its own successors stay good. Raises SnapshotError."""
    with _locked(directory):
        return _merge(directory, name, progress)


def _merge(directory: Path, name: str | None, progress: Progress) -> Manifest:
    manifests = chain(directory, name)
    newest = manifests[-1]
    if len(manifests) == 1:
        return newest
    aside = directory / f".new-{newest.id}-{uuid.uuid4().hex[:8]}"
    try:
        aside.mkdir(mode=0o700)
        files = []
        total = sum(each.pages for slot in newest.slots for _, each in _layers(directory, manifests, slot))
        done = 0
        for slot in newest.slots:
            memory = np.zeros(slot.size, np.uint8)
            present = np.zeros(slot.size // PAGE, bool)
            for folder, each in _layers(directory, manifests, slot):
                for first, count in read_pages(folder, f"slot{slot.id}", slot.size // PAGE, each.checksum, memory):
                    present[first:first + count] = True
                    done += count
                    progress(done, total)
            with PageWriter(aside, f"slot{slot.id}", slot.size // PAGE) as writer:
                writer.write(memory, np.flatnonzero(present))
                files.append(_slot_file(slot.id, slot.gpa, slot.size, slot.log, slot.born, writer.finish()))
            if newest.compression == "zstd":
                compress(aside, f"slot{slot.id}")
        for part in ("system.map", "system.mem", "image"):
            shutil.copyfile(directory / newest.id / part, aside / part)
            _sync_file(aside / part)
        merged = msgspec.structs.replace(newest, parent=None, slots=files)
        _write_manifest(aside, merged)
        _exchange(aside, directory / newest.id)
    finally:
        shutil.rmtree(aside, ignore_errors=True)    # by now it is the incremental one that was replaced
    _sync_directory(directory)
    for manifest in reversed(manifests[:-1]):
        if any(m.parent == manifest.id for m in list_snapshots(directory)):
            break
        _remove(directory, manifest.id)
    return merged


def _exchange(a: Path, b: Path) -> None:
    """Swap two names in one step. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) != 0:
        error = ctypes.get_errno()
        raise SnapshotError(f"{b}: cannot be replaced: {os.strerror(error)}")


def delete(directory: Path, name: str) -> None:
    """Raises SnapshotError when there is none of that name, or another was built on it."""
    with _locked(directory):
        load_manifest(directory, name)
        children = [m.id for m in list_snapshots(directory) if m.parent == name]
        if children:
            raise SnapshotError(f"{directory / name}: {', '.join(children)} builds on it: merge or delete that "
                                "first")
        _remove(directory, name)


def _remove(directory: Path, name: str) -> None:
    aside = directory / f".old-{name}-{uuid.uuid4().hex[:8]}"
    os.rename(directory / name, aside)
    _sync_directory(directory)
    shutil.rmtree(aside)
