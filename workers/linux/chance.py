"""Random bytes of a machine that was given a seed."""

from __future__ import annotations

import random
import struct

__all__ = ["Chance"]

_VERSION, _STATE = 3, struct.Struct("<625I")      # of random.Random.getstate


class Chance:
    """Gives so many bytes at each call: the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, count: int) -> bytes:
        return self._random.randbytes(count)

    def save(self) -> bytes:
        return _STATE.pack(*self._random.getstate()[1])

    @classmethod
    def load(cls, saved: bytes) -> Chance:
        """It goes on. Raises struct.error."""
        found = cls(0)
        found._random.setstate((_VERSION, _STATE.unpack(saved), None))
        return found
