"""Text from outside as a part of one line: in an error, a log, an answer."""

from __future__ import annotations

__all__ = ["one_line"]


def one_line(text: str, length: int = 200) -> str:
    """``text`` (a key, a file's name, a trace's header, a message's tag): what would end the line or steer a terminal
    is escaped, and what is longer than ``length`` characters is cut."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:length + 1])
    return shown if len(text) <= length else f"{shown[:length]}…"
