"""A snapshot's manifest: what it says, and what of that is believed.

It comes from a file that anyone may have made: it is of bounded size, typed, and held against the rules for a
machine before anything is done with it. Nothing in it is used as a path.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import msgspec

from ipc.messages import UNREADABLE
from workers.accel.base import AccelError
from workers.state import StateError, check_states

from ...errors import VmmError, one_line
from ...inputs import open_input, read_input
from ...machine.loader import IMAGE_SIZE_MAX
from ...machine.names import check_snapshot_id, is_epoch, is_snapshot_id
from ...machine.rules import Trees, arriving
from ...machine.spec import MachineSpec
from .folder import SnapshotError, has_manifest, no_snapshot, sync_directory, sync_file
from .heat import unpacked
from .pagefile import PAGE

__all__ = ["FORMAT", "VERSION", "Compression", "Manifest", "SlotFile", "SnapshotError", "file_checksum",
           "load_manifest", "write_manifest"]

FORMAT = "shardvmm-snapshot"
VERSION = 2
_MANIFEST_MAX = 64 << 20    # bytes; 256 vCPU states of about 20 KiB are 5 MiB
_SYSTEM_MAX = 1 << 30       # bytes of the system slot

Compression = Literal["none", "zstd"]


class SlotFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One memory slot of a snapshot: where it was, and the files that its pages are in. ``working_set``: what of it was
    in use (heat.py); "": that is not known."""

    id: int
    gpa: int
    size: int
    log: bool
    born: int
    pages: int
    zero_pages: int
    checksum: str
    working_set: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``manifest.json`` says (docs/snapshots.md)."""

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
        """Of all its slots that are in its files."""
        return sum(s.pages for s in self.slots)


def _refuse(path: Path, what: str) -> SnapshotError:
    return SnapshotError(f"{one_line(str(path))}: {what}")


def load_manifest(directory: Path, name: str) -> Manifest:
    """Raises SnapshotError, and VmmError for a name that is not an id."""
    check_snapshot_id(name)
    if not has_manifest(directory / name):
        raise no_snapshot(directory, name)
    path = directory / name / "manifest.json"
    text = read_input(path, _MANIFEST_MAX, _refuse)
    checksum = read_input(path.with_suffix(".sum"), 1024, _refuse)
    if hashlib.blake2b(text, digest_size=32).hexdigest().encode() != checksum.strip():
        raise _refuse(path, "is damaged (its checksum does not match)")
    try:
        head = msgspec.json.decode(text)
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise _refuse(path, "is not a ShardVMM snapshot")
        if head.get("version") != VERSION:
            raise _refuse(path, f"has format version {one_line(str(head.get('version')), 20)}; this program supports "
                                f"version {VERSION}")
        manifest = msgspec.convert(head, Manifest)
    except UNREADABLE as exc:
        raise _refuse(path, f"is not a valid manifest: {one_line(str(exc))}") from None
    if manifest.id != name:
        raise _refuse(path, f"claims to be snapshot {one_line(manifest.id, 20)}")
    problem = _problem(manifest)
    if problem:
        raise _refuse(path, f"is not a valid manifest: {problem}")
    return manifest


def _problem(manifest: Manifest) -> str:
    """What in it is invalid; "" when nothing is."""
    spec, system = manifest.spec, manifest.system
    parent = manifest.parent
    if parent is not None and not (is_snapshot_id(parent) and int(parent) < int(manifest.id)):
        return "its parent is not an earlier snapshot"
    if not is_epoch(manifest.epoch):     # it becomes a client of the restored machine's dirty log
        return "its epoch is not one"
    try:
        if not spec.can.guests:
            return "its machine has no memory to restore"
        arriving(spec, name=spec.name, image="/image", accel=spec.accel, linger=True,
                 trees=Trees("/root" if spec.program is not None and spec.program.root else ""))
        check_states(manifest.vcpus, spec.vcpus, program=spec.program is not None)
    except (VmmError, StateError, AccelError) as exc:
        return one_line(str(exc))
    if [(s.id, s.gpa, s.size, s.log, s.born) for s in manifest.slots] != [
            (s.id, s.gpa, s.size, s.log, s.born) for s in spec.slots]:
        return "its memory slots differ from those of its machine"
    if any(not 0 <= s.zero_pages <= s.pages <= s.size // PAGE or s.size % PAGE or s.id < 0
           for s in (*manifest.slots, system)):
        return "a slot's id, size or page counts are invalid"
    try:
        for slot in (*manifest.slots, system):
            unpacked(slot.working_set, slot.size // PAGE)
    except ValueError as exc:
        return f"a slot's working set is invalid: {one_line(str(exc))}"
    if system.size > _SYSTEM_MAX:
        return "its system slot is too large"
    return ""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Raises OSError."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sum").write_text(hashlib.blake2b(text, digest_size=32).hexdigest() + "\n")
    sync_file(folder / "manifest.json")
    sync_file(folder / "manifest.sum")
    sync_directory(folder)


def file_checksum(path: Path) -> str:
    """BLAKE2b-256 of a guest image. Raises SnapshotError."""
    digest = hashlib.blake2b(digest_size=32)
    left = IMAGE_SIZE_MAX
    with open_input(path, _refuse) as file:
        try:
            while data := file.read(1 << 20):
                digest.update(data)
                left -= len(data)
                if left < 0:
                    raise _refuse(path, f"is too large: more than {IMAGE_SIZE_MAX} bytes")
        except OSError as exc:
            raise _refuse(path, f"cannot be read: {exc.strerror}") from None
    return digest.hexdigest()
