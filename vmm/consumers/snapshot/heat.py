"""Which part of a slot its guest had in use when it was saved: how often pages of each block of 64 were dirtied then.

A lazy restore brings these blocks first. A byte for each block (0: none of its pages was dirtied), compressed with
zlib, in base64: at most some kilobytes for each GiB of memory.
"""

from __future__ import annotations

import base64
import binascii
import zlib

import numpy as np
from numpy.typing import NDArray

from ipc.bitmap import word_count

from .pagemap import Words

__all__ = ["Heat", "unpacked"]

_MOST = 255


class Heat:
    """Of one slot of ``pages`` pages."""

    def __init__(self, pages: int) -> None:
        self._blocks = np.zeros(word_count(pages), np.uint64)

    def add(self, words: Words) -> None:
        """These pages were dirtied during another while; all whiles are about as long."""
        self._blocks += np.bitwise_count(words)

    def packed(self) -> str:
        """For the manifest; "" when nothing is known."""
        if not self._blocks.any():
            return ""
        return base64.b64encode(zlib.compress(np.minimum(self._blocks, _MOST).astype(np.uint8).tobytes())).decode()


def unpacked(text: str, pages: int) -> NDArray[np.uint8]:
    """Of each block of a slot of ``pages`` pages, uint8 [blocks]. Raises ValueError."""
    count = word_count(pages)
    if not text:
        return np.zeros(count, np.uint8)
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(base64.b64decode(text, validate=True), count + 1)
    except (binascii.Error, zlib.error) as exc:
        raise ValueError(str(exc)) from None
    if len(found) != count or not unpacker.eof:
        raise ValueError(f"it is not one of {count} blocks")
    return np.frombuffer(found, np.uint8)
