"""What the guest writes to its consoles, in whole lines of whole characters."""

from __future__ import annotations

import codecs
from collections.abc import Callable

__all__ = ["Consoles"]

_LINE = 8192        # characters; a longer line is broken


class Consoles:
    """``put(vcpu, text)`` is given one or more lines; only the last text of a vCPU, or of a line that is too long,
    may end without a newline. A worker sends bytes as they gather (workers/ports.py): characters and lines may come
    in pieces."""

    def __init__(self, put: Callable[[int, str], None]) -> None:
        self._put = put
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        self._begun: dict[int, str] = {}

    def write(self, vcpu: int, data: bytes, *, final: bool = False) -> None:
        """``final``: nothing comes after it."""
        decoder = self._decoders.setdefault(vcpu, codecs.getincrementaldecoder("utf-8")("replace"))
        whole, newline, rest = (self._begun.pop(vcpu, "") + decoder.decode(data, final)).rpartition("\n")
        if whole or newline:
            self._put(vcpu, whole + newline)
        while len(rest) > _LINE or (final and rest):
            self._put(vcpu, rest[:_LINE])
            rest = rest[_LINE:]
        if rest:
            self._begun[vcpu] = rest
