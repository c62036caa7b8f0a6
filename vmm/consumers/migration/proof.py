"""That source and target have one /dev/shm: only then is memory handed over in place. Names say nothing of that, since
another container on this host may have segments of the same names. So the source puts the migration's token, which
nobody else knows, into a segment, and the target looks whether it is there."""

from __future__ import annotations

import contextlib
import hmac
import re
from collections.abc import Iterator

from ipc.shm import PAGE_SIZE, Segment, SegmentError

from ...machine.names import segment_name

__all__ = ["is_proven", "proof"]

_NAME = re.compile(r"/shardvmm\.[0-9a-z.-]{1,120}")


@contextlib.contextmanager
def proof(machine: str, token: str) -> Iterator[str]:
    """The name of a segment of this machine that holds the token; it is there as long as the ``with``. Raises
    SegmentError."""
    with contextlib.closing(Segment.create(segment_name(machine, f"proof.{token[:8]}"), PAGE_SIZE)) as segment:
        segment.buf[:len(token)] = token.encode()
        yield segment.name


def is_proven(name: str, token: str) -> bool:
    """A segment of this name holds the token here."""
    if not _NAME.fullmatch(name):
        return False
    try:
        with contextlib.closing(Segment.open(name)) as segment:
            return hmac.compare_digest(bytes(segment.buf[:len(token)]), token.encode())
    except SegmentError:
        return False
