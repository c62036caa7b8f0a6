"""The hot loops, compiled: harvest, publish, fold, clear (loops.py).

Import this module late: the first import ever compiles (some seconds), later ones take 30 ms.
"""

from __future__ import annotations

from ..bitmap import Bitmap, summary_words, word_count
from .kept import LOOPS
from .loader import Native

__all__ = ["clear", "fold", "harvest", "publish", "take"]

_native = Native(*LOOPS)


def harvest(ring: int, entries: int, fetch: int, limit: int, table: int, slots: int, out: int, pages: int = 0,
            room: int = 0) -> None:
    """Harvest one ring in sequence (QEMU: kvm_dirty_ring_reap_one).

    For each DIRTY entry from index ``fetch``: set its bit in the slot's staging bitmap, then
    release-store RESET. An entry found in RESET already was harvested by a predecessor that died
    before it could store its fetch index: its staging bit is set, so it is only counted. ``limit``
    bounds the entries taken and must not exceed those that await no reset,
    ``entries - (fetch_total - reset_total)``: so a ring's own RESET entries are never taken for such
    leavings.

    ``ring``, ``table``, ``out`` and ``pages`` are addresses: of the ring; of the slot table, ``slots`` rows
    (ipc.bitmap.slot_table); of four uint64 that take the entries harvested, those dropped as bad, slot word and
    offset of the last entry; of ``room`` triples uint64 (fetch index, slot word, offset) for tracing.
    """
    _native.harvest(ring, entries, fetch, limit, table, slots, out, pages, room)


def publish(src: Bitmap, dst: Bitmap) -> int:
    """``dst |= src; src = 0``, group by group; the number of bits that were new in ``dst``.

    Each group is set in ``dst`` before it is cleared in ``src``, and the summary of ``src`` last:
    repeating an interrupted call is harmless. Serves staging -> slot bitmap.
    """
    words, summary = word_count(src.pages), summary_words(src.pages)
    return int(_native.publish(src.words_address, dst.words_address, words, summary))


def fold(src: Bitmap, dst: Bitmap) -> None:
    """``dst |= src`` where src is dirty; src unchanged. Serves slot bitmap -> client bitmaps."""
    _native.fold(src.words_address, dst.words_address, word_count(src.pages), summary_words(src.pages))


def clear(bitmap: Bitmap) -> None:
    """Zero a bitmap where its summary says that something may be set; the summary last."""
    _native.clear(bitmap.words_address, word_count(bitmap.pages), summary_words(bitmap.pages))


def take(slot: Bitmap, pending: Bitmap, synced: Bitmap) -> int:
    """What fold(slot, pending), clear(slot), clear(synced) and publish(pending, synced) come to, in one pass over
    memory: for a log with a single client. The number of bits in ``synced``."""
    words, summary = word_count(slot.pages), summary_words(slot.pages)
    return int(_native.take(slot.words_address, pending.words_address, synced.words_address, words, summary))
