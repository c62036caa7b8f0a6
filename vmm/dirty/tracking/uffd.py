"""Tracking ``uffd``: each worker's own page tables, write-protected by userfaultfd and read with PAGEMAP_SCAN
(ipc/writelog.py), gathered as plain bitmaps are."""

from __future__ import annotations

from .bitmap import Bitmap

__all__ = ["WriteProtect"]


class WriteProtect(Bitmap):
    """Bitmaps that a worker makes of its own page tables."""

    name = "uffd"
    _protected = True
