"""Files that hold some pages of a memory slot, as snapshots have them: reading and writing them
(vmm/consumers/snapshot/pagefile.py)."""

from __future__ import annotations

from .consumers.snapshot.pagefile import PageFileError, PageWriter, compress, iter_pages, read_pages

__all__ = ["PageFileError", "PageWriter", "compress", "iter_pages", "read_pages"]
