"""Merging a chain into one full snapshot, and deleting one."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from ipc.linux.files import exchange
from ipc.steps import step

from .chain import chain, list_snapshots, open_slot
from .folder import (
    SnapshotError,
    clear_leftovers,
    discard,
    foreign_file,
    locked,
    new_aside,
    remove,
    snapshot_ids,
    sync_directory,
    sync_file,
)
from .manifest import Manifest, SlotFile, load_manifest, write_manifest
from .pagefile import PAGE, PageWriter, compress
from .threads import Progress, behind

__all__ = ["delete", "merge"]


def merge(directory: Path, name: str | None = None,
          progress: Progress = lambda done, total: None) -> Manifest:
    """Make ``name`` (default: the newest) a full snapshot and drop those it was built on, unless another still
    needs them. Its own successors stay good. Raises SnapshotError and PageFileError, and the chain is as it was."""
    with locked(directory):
        try:
            return _merge(directory, name, progress)
        except OSError as exc:
            raise SnapshotError(f"{exc.filename or directory}: cannot be written: {exc.strerror}") from None


def _merge(directory: Path, name: str | None, progress: Progress) -> Manifest:
    manifests = chain(directory, name)
    clear_leftovers(directory)
    if len(manifests) == 1:
        return manifests[0]
    merged = _fold(directory, manifests, progress)
    for manifest in reversed(manifests[:-1]):
        if foreign_file(directory / manifest.id) or any(m.parent == manifest.id for m in list_snapshots(directory)):
            break
        remove(directory, manifest.id)
    return merged


def _fold(directory: Path, manifests: list[Manifest], progress: Progress) -> Manifest:
    """Have the last of these, each built on the one before it, hold what all of them do, built on what the first is
    built on. The others stay. Raises SnapshotError, PageFileError and OSError, and the chain is as it was."""
    newest = manifests[-1]
    aside = new_aside(directory, newest.id)
    try:
        total = sum(slot.size // PAGE for slot in newest.slots)     # there may be fewer, when it was not logged
        done = 0
        files = []
        for slot in newest.slots:
            with (PageWriter(aside, f"slot{slot.id}", slot.size // PAGE,
                             passing=newest.compression == "zstd") as writer,
                  open_slot(directory, manifests, slot) as pages):
                pages.merge_into(writer, behind(progress, done, total))
                files.append(_merged(slot, writer.finish()))
            done += slot.size // PAGE
            if newest.compression == "zstd":
                compress(aside, f"slot{slot.id}")
        for part in ("system.map", "system.mem", "image"):
            shutil.copyfile(directory / newest.id / part, aside / part)
            sync_file(aside / part)
        merged = msgspec.structs.replace(newest, parent=manifests[0].parent, slots=files)
        write_manifest(aside, merged)
        step("snapshot-merge-written")
        try:
            exchange(aside, directory / newest.id)
        except OSError as exc:
            raise SnapshotError(f"{directory / newest.id}: cannot be replaced: {exc.strerror}") from None
        step("snapshot-merge-exchanged")
    finally:
        discard(aside)      # by now it is the incremental one that was replaced
    sync_directory(directory)
    step("snapshot-merge-synced")
    return merged


def _merged(slot: SlotFile, finished: dict[str, int | str]) -> SlotFile:
    return msgspec.structs.replace(slot, **finished)


def delete(directory: Path, name: str, *, fold: bool = False,
           progress: Progress = lambda done, total: None) -> None:
    """Damaged or not. ``fold``: what is built on it gets its pages first, and is built on what it was built on. Raises
    SnapshotError when there is none of that name, or (without ``fold``) another was built on it; PageFileError when it
    cannot be folded."""
    with locked(directory):
        if name not in snapshot_ids(directory):
            load_manifest(directory, name)      # says what is wrong with the name
        children = [m.id for m in list_snapshots(directory) if m.parent == name]
        if children and not fold:
            raise SnapshotError(f"{directory / name}: needed by {', '.join(children)}: merge or delete that "
                                "first, or delete this one with --fold")
        foreign = foreign_file(directory / name)
        if foreign:
            raise SnapshotError(f"{directory / name / foreign}: is not a snapshot file: move it elsewhere first")
        try:
            clear_leftovers(directory)
            for child in children:
                _fold(directory, [load_manifest(directory, name), load_manifest(directory, child)], progress)
            remove(directory, name)
        except OSError as exc:
            raise SnapshotError(f"{exc.filename or directory}: cannot be removed: {exc.strerror}") from None
