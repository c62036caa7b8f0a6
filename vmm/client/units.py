"""Sizes, durations and rates as users write them. Apart from the configuration, which takes long to import."""

from __future__ import annotations

import re

from ipc.shm import PAGE_SIZE

from ..errors import one_line
from ..machine import rules

__all__ = ["parse_duration", "parse_rate", "parse_size", "shown"]

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "pages": PAGE_SIZE}
_RATE_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30,
               "kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
_DECIMAL = r"([0-9]{1,20}(?:\.[0-9]{1,20})?)"


def shown(value: object) -> str:
    """A value that was given, in the error about it."""
    return one_line(repr(value), 60)


def parse_size(value: object) -> int:
    """Bytes from ``4096``, ``"0x1000"``, ``"64MiB"``, ``"4099 pages"``. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip()
    hint = ""
    if isinstance(value, str):
        if re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}", text):
            return int(text, 16)
        match = re.fullmatch(r"([0-9]{1,20})\s*([A-Za-z]*)", text)
        if match and match[2].lower() in _UNITS:
            return int(match[1]) * _UNITS[match[2].lower()]
        binary = f"{match[2][0].upper()}iB" if match and match[2] else ""
        if match and binary.lower() in _UNITS:
            hint = f" (did you mean {match[1]}{binary}?)"
    raise ValueError(f"{shown(text)} is not a size: write bytes, 0x… or a number with KiB, MiB, GiB or pages"
                     + hint)


def parse_duration(value: object) -> float:
    """Seconds from ``0.5``, ``"50ms"``, ``"1s"``, ``"2m"``. Raises ValueError."""
    seconds = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str):
        match = re.fullmatch(rf"{_DECIMAL}\s*(us|ms|s|m|h|)", value.strip())
        if match:
            seconds = float(match[1]) * _SECONDS[match[2]]
    if not 0 < seconds < rules.SECONDS_MAX:
        raise ValueError(f"{shown(value)} is not a duration: write seconds, or a number with us, ms, s, m or h")
    return seconds


def parse_rate(value: object) -> float:
    """Bytes per second from ``1000000``, ``"100MB/s"``, ``"64MiB/s"``, ``"10Gbit/s"`` (``/s`` is optional). Raises
    ValueError."""
    rate = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        rate = float(value)
    elif isinstance(value, str):
        match = re.fullmatch(rf"{_DECIMAL}\s*([A-Za-z]*)(?:/s)?", value.strip())
        if match and match[2].lower() in _RATE_UNITS:
            rate = float(match[1]) * _RATE_UNITS[match[2].lower()]
    if not 0 < rate < 1e15:
        raise ValueError(f"{shown(value)} is not a rate: write bytes per second, or a number with kB/s, MB/s, "
                         "GB/s, KiB/s, MiB/s, GiB/s, kbit/s, Mbit/s or Gbit/s")
    return rate
