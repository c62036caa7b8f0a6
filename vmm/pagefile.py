"""Files that hold some pages of a memory slot, as snapshots have them: reading and writing them
(vmm/consumers/snapshot/pagefile.py)."""

from __future__ import annotations

from .consumers.snapshot.pagefile import PAGE, PageFileError, PageWriter, compress, iter_pages, read_pages

__all__ = ["PAGE", "PageFileError", "PageWriter", "compress", "iter_pages", "read_pages"]
