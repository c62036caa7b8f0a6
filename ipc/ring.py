"""The writing side of a software ring, for whoever plays a vCPU without a kernel's help: the software CPU's
hooks and the replay accelerator. (The reading side is :func:`ipc.compiled.harvest`.)"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from .compiled.atomics import store_release_u64, store_u64
from .layout import DIRTY_GFN_F_DIRTY

__all__ = ["publish_entry"]

_DIRTY = np.uint64(DIRTY_GFN_F_DIRTY)


@njit(types.void(types.int64, types.uint64, types.uint64), cache=True, inline="always")
def publish_entry(entry, slot_word, page):  # type: ignore[no-untyped-def]
    """Fill in the entry at this address and publish it. Flags and slot share a word: one release store shows
    both, and the offset before them."""
    store_u64(entry + 8, page)
    store_release_u64(entry, _DIRTY | (slot_word << np.uint64(32)))
