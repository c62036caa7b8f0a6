"""What is on a QMP connection: JSON values, one after the other, each way.

A client may send them without a line break in between, or spread over many lines, so it is by its brackets that a
value is known to be whole. A control character other than white space, or a byte that no UTF-8 has, sets reading back
to the beginning (QEMU's way out for a client that does not know what it has sent).
"""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec

from ipc.messages import UNREADABLE

from ...errors import one_line

__all__ = ["QmpError", "Request", "Splitter", "TooLong", "decode_request", "encode", "event", "shown"]

_MOST = 1 << 20             # bytes of one value
_SHOWN = 100                # characters of a name that came from a client
_SPACE = b" \t\r\n"
_OPEN, _CLOSE, _QUOTE, _ESCAPE = b"{[", b"}]", ord('"'), ord("\\")
_NO_UTF8 = 0xFE             # and above


class QmpError(Exception):
    """A command that was not carried out. ``kind``: one of QEMU's error classes (QapiErrorClass)."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.kind = kind


class TooLong(Exception):
    """A value of more bytes than anybody needs."""


class Splitter:
    """Puts values together from what is received."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._text = bytearray()
        self._depth = 0
        self._string = self._escaped = False

    def feed(self, data: bytes) -> list[bytes | None]:
        """Values that are whole now; None stands for what was thrown away. Raises TooLong."""
        found: list[bytes | None] = []
        for byte in data:
            if byte >= _NO_UTF8 or (byte < 0x20 and (self._string or byte not in _SPACE)):
                self._begin()
                found.append(None)
            elif self._text or byte not in _SPACE:
                if len(self._text) == _MOST:
                    raise TooLong
                if self._add(byte):
                    found.append(bytes(self._text))
                    self._begin()
        return found

    def _add(self, byte: int) -> bool:
        """A value is whole with this."""
        self._text.append(byte)
        if self._string:
            self._string = self._escaped or byte != _QUOTE
            self._escaped = byte == _ESCAPE and not self._escaped
        elif byte == _QUOTE:
            self._string = True
        elif byte in _OPEN:
            self._depth += 1
        elif byte in _CLOSE:
            self._depth -= 1
        elif byte not in _SPACE:
            return False
        return self._depth <= 0 and not self._string


class Request(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A command as it is sent; ``id`` comes back with its answer."""

    execute: str
    arguments: dict[str, Any] = {}
    id: Any = msgspec.UNSET


class _Envelope(msgspec.Struct):
    """What can be read of a request that is none."""

    id: Any = msgspec.UNSET


_requests = msgspec.json.Decoder(Request)
_envelopes = msgspec.json.Decoder(_Envelope)


def decode_request(text: bytes) -> tuple[Request | None, Any, str]:
    """A request; or None, with why not. And the id (msgspec.UNSET: it has none), whatever the bytes are."""
    try:
        found = _requests.decode(text)
        return found, found.id, ""
    except UNREADABLE as exc:
        wrong = f"not a QMP command: {one_line(str(exc))}"
    try:
        return None, _envelopes.decode(text).id, wrong
    except UNREADABLE:
        return None, msgspec.UNSET, wrong


def encode(document: dict[str, Any]) -> bytes:
    """A line, in ASCII as QEMU's are. Values of UNSET are left out."""
    text = json.dumps({k: v for k, v in document.items() if v is not msgspec.UNSET}, separators=(",", ":"))
    return text.encode() + b"\r\n"


def shown(name: str) -> str:
    """What a client calls something, as a part of what is answered."""
    return one_line(name, _SHOWN)


def event(name: str, data: dict[str, Any] | None = None) -> bytes:
    """An event that happens now."""
    now = time.time_ns()
    stamp = {"seconds": now // 10**9, "microseconds": now // 1000 % 10**6}
    return encode({"event": name, "timestamp": stamp, "data": data if data else msgspec.UNSET})
