"""Snapshots of a machine's memory and state, full and incremental. How it is done is in vmm/consumers/snapshot/."""

from __future__ import annotations

from .consumers.snapshot import (
    Damaged,
    Manifest,
    PageFileError,
    SnapshotError,
    chain,
    create,
    delete,
    list_snapshots,
    load_manifest,
    merge,
    read_memory,
    restore,
    survey,
    verify,
)

__all__ = ["Damaged", "Manifest", "PageFileError", "SnapshotError", "chain", "create", "delete", "list_snapshots",
           "load_manifest", "merge", "read_memory", "restore", "survey", "verify"]
