"""Snapshots: full and incremental chains of a machine's memory and state.

A chain lives in one directory, a snapshot in a directory of its own below: ``0001``, ``0002``, …::

    manifest.json   format, parent, machine, slots with their checksums, vCPU states (docs/snapshots.md)
    manifest.sum    BLAKE2b-256 of manifest.json
    slot<id>.map, slot<id>.mem (or .zst)    vmm/consumers/snapshot/pagefile.py, pagemap.py
    system.map, system.mem                  the system slot, whole
    image           the guest image, for a host that does not have it

Whatever else is in the directory is not this program's: it is neither read nor removed.

    folder      names and files that are a snapshot's, the lock, removal
    manifest    the manifest: what it says, and what of that is believed
    chain       which snapshots there are, what one is built on, verification
    layers      what a chain holds of one slot
    pagefile, pagemap, threads  page files, written and read by several threads
    take, restore, merge    what is done with them
    underway    how far one is that is being taken
    aside       pages of a live snapshot, in memory until the guest runs again
    heat        what was in use when a snapshot was taken
    lazy        memory that is read while the guest runs
"""

from __future__ import annotations

from .chain import Damaged, chain, list_snapshots, read_memory, survey, verify
from .manifest import Manifest, SnapshotError, load_manifest
from .merge import delete, merge
from .pagefile import PageFileError
from .restore import restore, restore_many
from .take import NoParent, create
from .underway import snapshot_underway

__all__ = ["Damaged", "Manifest", "NoParent", "PageFileError", "SnapshotError", "chain", "create", "delete",
           "list_snapshots", "load_manifest", "merge", "read_memory", "restore", "restore_many", "snapshot_underway",
           "survey", "verify"]
