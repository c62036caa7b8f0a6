"""How large a dirty bitmap is (ipc/bitmap.py), for those that have no use for numpy."""

from __future__ import annotations

__all__ = ["GROUP_WORDS", "bitmap_bytes", "summary_words", "word_count"]

GROUP_WORDS = 64


def word_count(pages: int) -> int:
    return -(-pages // 64)


def summary_words(pages: int) -> int:
    groups = -(-word_count(pages) // GROUP_WORDS)
    return -(-groups // 64)


def bitmap_bytes(pages: int) -> int:
    """Bytes of one bitmap with its summary."""
    return 8 * (word_count(pages) + summary_words(pages))
