"""Sizes, durations and rates as people write them, the same everywhere: in files, for options, as arguments. Apart from
the configuration, which takes long to import.

MB is 10^6 bytes and MiB 2^20, as the IEC has it; so is kB 10^3. A unit of sizes or rates is understood in any case, but
for Mb and its like, which some mean bits by; units of durations are in lower case. The patterns are also those of the
published schema: they keep to what Python and ECMA-262 (JSON schema) have in common.
"""

from __future__ import annotations

import re

from ipc.shm import PAGE_SIZE

from ..errors import one_line
from ..machine import rules

__all__ = ["DURATION", "RATE", "SIZE", "parse_duration", "parse_rate", "parse_size", "shown"]

_UNITS = {"": 1, "b": 1, "page": PAGE_SIZE, "pages": PAGE_SIZE,
          **{f"{prefix}b": 10 ** (3 * n) for n, prefix in enumerate("kmgt", 1)},
          **{f"{prefix}ib": 1 << (10 * n) for n, prefix in enumerate("kmgt", 1)}}
_BITS = {f"{prefix}bit": 10 ** (3 * n) for n, prefix in enumerate(("", "k", "m", "g", "t"))}
_SECOND = 10 ** 6       # in what the units of a duration are counted in
_MICROSECONDS = {"us": 1, "ms": 1000, "s": _SECOND, "": _SECOND, "m": 60 * _SECOND, "min": 60 * _SECOND,
                 "h": 3600 * _SECOND}

_DECIMAL = r"([0-9]{1,20}(?:\.[0-9]{1,20})?)"
_BYTES = r"|[Bb]|[kmgt][Bb]|[KMGT]B|[KkMmGgTt][Ii][Bb]|[Pp][Aa][Gg][Ee][Ss]?"
#: What matches is a number and a unit, or one in hexadecimal.
SIZE = rf"^\s*(?:(0[xX][0-9a-fA-F]{{1,16}})|{_DECIMAL}[ \t]*({_BYTES}))\s*$"
DURATION = rf"^\s*{_DECIMAL}[ \t]*(us|ms|s|m|min|h|)\s*$"
RATE = rf"^\s*{_DECIMAL}[ \t]*({_BYTES}|[KkMmGgTt]?[Bb][Ii][Tt])(?:/s)?\s*$"

_RATE_MAX = 10 ** 15    # bytes per second
#: What was written where a unit of bytes was meant: ``64M``, ``64Mb``.
_NEARLY = re.compile(rf"{_DECIMAL}[ \t]*([KkMmGgTt])(b?)(?:/s)?")


def shown(value: object) -> str:
    """A value that was given, in the error about it."""
    return one_line(repr(value), 60)


def parse_size(value: object) -> int:
    """Bytes from ``4096``, ``"0x1000"``, ``"64MiB"``, ``"64MB"``, ``"1.5GiB"``, ``"4099 pages"``. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.match(SIZE, value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{shown(str(value).strip())} is not a size: write bytes, 0x… or a number with KiB, MiB, GiB, "
                         f"TiB, kB, MB, GB, TB or pages{_meant(value, '{0}{1}iB', '{0}{2}B')}")
    if match[1]:
        return int(match[1], 16)
    number, parts = _number(match[2])
    size, rest = divmod(number * _UNITS[match[3].lower()], parts)
    if rest:
        raise ValueError(f"{shown(str(value).strip())} is not a whole number of bytes")
    return size


def parse_duration(value: object) -> float:
    """Seconds from ``0.5``, ``"50ms"``, ``"1s"``, ``"5min"``, ``"2h"``. Raises ValueError."""
    seconds = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and (match := re.match(DURATION, value)):
        number, parts = _number(match[1])
        seconds = number * _MICROSECONDS[match[2]] / (parts * _SECOND)
    if not 0 < seconds < rules.SECONDS_MAX:
        raise ValueError(f"{shown(value)} is not a duration: write seconds, or a number with us, ms, s, min (or m) or "
                         "h")
    return seconds


def parse_rate(value: object) -> float:
    """Bytes per second from ``1000000``, ``"100MB/s"``, ``"64MiB/s"``, ``"500 pages/s"``, ``"10Gbit/s"`` (``/s`` is
    optional). Raises ValueError."""
    rate = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        rate = float(value)
    elif isinstance(value, str) and (match := re.match(RATE, value)):
        (number, parts), unit = _number(match[1]), match[2].lower()
        rate = number * _BITS[unit] / (parts * 8) if unit in _BITS else number * _UNITS[unit] / parts
    if not 0 < rate < _RATE_MAX:
        raise ValueError(f"{shown(value)} is not a rate: write bytes per second, or a number with kB/s, MB/s, GB/s, "
                         "KiB/s, MiB/s, GiB/s, pages/s, kbit/s, Mbit/s or "
                         f"Gbit/s{_meant(value, '{0}{2}B/s', '{0}{2}bit/s')}")
    return rate


def _number(text: str) -> tuple[int, int]:
    """``1.5`` is 15 of 10 parts: exact, whatever its digits."""
    whole, _, part = text.partition(".")
    return int(whole + part), 10 ** len(part)


def _meant(value: object, first: str, second: str) -> str:
    """`` (did you mean …?)`` for ``64M`` and ``64Mb``. 0 of the texts: the number; 1, 2: the binary and decimal
    prefix."""
    match = _NEARLY.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return ""
    prefix = match[2].upper()
    texts = [text.format(match[1], prefix, "k" if prefix == "K" else prefix) for text in (first, second)]
    return f" (did you mean {texts[0]} or {texts[1]}?)"
