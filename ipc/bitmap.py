"""A dirty bitmap in shared memory with a summary, so that work follows what is dirty.

Words are uint64, little endian, page *p* of the slot at word ``p // 64`` bit ``p % 64`` (the layout
of KVM_GET_DIRTY_LOG). The summary has one bit a word-group of 64 words (4,096 pages, 16 MiB of guest
memory): clear means that the group's words are all zero. A set summary bit promises nothing.
Writers set the summary before the word, so that a writer that dies between leaves a set summary over
a clean group, never the other way round.

Only the coordinator writes a bitmap; consumers read.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .bitmap_sizes import GROUP_WORDS, bitmap_bytes, summary_words, word_count
from .shm import Segment

__all__ = ["GROUP_WORDS", "Bitmap", "bitmap_bytes", "dirty_ranges", "set_bit_indices", "slot_table",
           "summary_words", "word_count", "words_of_groups"]

U64 = NDArray[np.uint64]


def slot_table(max_slots: int) -> NDArray[np.uint64]:
    """An empty slot table for the harvest kernel: uint64 [max_slots, 3], a row a slot id: address of
    the staging words, address of the staging summary, pages (0: no such slot)."""
    return np.zeros((max_slots, 3), np.uint64)


class Bitmap:
    """A view of one bitmap: ``words`` (uint64, [word_count]) and ``summary`` (uint64).

    ``offset`` is the first byte within the segment, a multiple of 8.
    """

    def __init__(self, segment: Segment, offset: int, pages: int) -> None:
        self.pages = pages
        words = word_count(pages)
        self.words: U64 = np.frombuffer(segment.buf, np.uint64, words, offset)
        self.summary: U64 = np.frombuffer(segment.buf, np.uint64, summary_words(pages),
                                          offset + 8 * words)
        self.words_address = segment.address + offset
        self.summary_address = self.words_address + 8 * words

    def mark_range(self, first: int, count: int) -> None:
        """Set ``count`` pages from ``first`` (a host write, or a slot whose ring lost count).

        Raises IndexError outside the slot.
        """
        if first < 0 or count < 0 or first + count > self.pages:
            raise IndexError(f"pages {first}..{first + count} are outside a slot of {self.pages} pages")
        if count == 0:
            return
        last = first + count - 1
        set_bits(self.summary, first // (64 * GROUP_WORDS), last // (64 * GROUP_WORDS))
        set_bits(self.words, first, last)

    def merge(self, words: U64, at: int = 0) -> None:
        """OR in a plain bitmap without a summary (a kernel dirty log), shape [word_count], or a piece of one from
        word ``at`` on."""
        dirty = np.flatnonzero(words) + at
        if len(dirty) == 0:
            return
        for group in np.unique(dirty // GROUP_WORDS):
            self.summary[group // 64] |= np.uint64(1 << (int(group) % 64))
        self.words[at:at + len(words)] |= words

    def clear(self) -> None:
        """All clean; words first, then the summary."""
        self.words[:] = 0
        self.summary[:] = 0

    def count(self) -> int:
        """Set bits; looks only where the summary says that there may be some."""
        return int(np.bitwise_count(self.words[self.filled_words()]).sum())

    def filled_words(self) -> NDArray[np.int64]:
        """Numbers of the words that may not be zero, ascending."""
        return words_of_groups(set_bit_indices(self.summary), len(self.words))

    def get(self, page: int) -> bool:
        return bool(int(self.words[page // 64]) >> (page % 64) & 1)

    def bools(self) -> NDArray[np.bool_]:
        """A copy, one bool a page, shape [pages]."""
        return np.unpackbits(self.words.view(np.uint8), bitorder="little")[: self.pages].astype(bool)

    def ranges(self) -> list[tuple[int, int]]:
        return dirty_ranges(self.words, self.pages)


def set_bits(words: U64, first: int, last: int) -> None:
    """Set bits first..last (both included) of a little-endian uint64 array."""
    w0, w1 = first // 64, last // 64
    low = (~0 << (first % 64)) & 0xFFFF_FFFF_FFFF_FFFF
    high = 0xFFFF_FFFF_FFFF_FFFF >> (63 - last % 64)
    if w0 == w1:
        words[w0] |= np.uint64(low & high)
        return
    words[w0] |= np.uint64(low)
    words[w0 + 1 : w1] = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
    words[w1] |= np.uint64(high)


def dirty_ranges(words: U64, pages: int) -> list[tuple[int, int]]:
    """Runs of set bits as (first page, count), ascending."""
    if pages % 64:
        words = words.copy()
        words[-1] &= np.uint64((1 << pages % 64) - 1)
    # A run begins at a bit whose lower neighbour is clear and ends at one whose upper neighbour is. Word by word:
    # a bit a page unpacked would be 256 MiB of a 1 TiB slot.
    above, below = np.roll(words, -1), np.roll(words, 1)
    if len(words):
        above[-1] = below[0] = 0
    one, top = np.uint64(1), np.uint64(63)
    first = set_bit_indices(words & ~(words << one | below >> top))
    last = set_bit_indices(words & ~(words >> one | above << top))
    return list(zip(first.tolist(), (last - first + 1).tolist(), strict=True))


def words_of_groups(groups: NDArray[np.int64], words: int) -> NDArray[np.int64]:
    """Numbers of the words of these groups, of a bitmap of so many words."""
    at = (groups[:, None] * GROUP_WORDS + np.arange(GROUP_WORDS)).ravel()
    return at[at < words]


def set_bit_indices(words: U64) -> NDArray[np.int64]:
    """Indices of the bits that are set, ascending; the work follows the words that are not zero."""
    filled = np.flatnonzero(words)
    bits = np.unpackbits(words[filled].view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    word, bit = np.nonzero(bits)
    return filled[word] * 64 + bit
