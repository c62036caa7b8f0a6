"""Ports of the host that lead into a machine, as they are written: [ADDRESS:]PORT[:INSIDE]."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ipc.oneline import one_line

__all__ = ["Forward", "parse_forward"]

_FORM = re.compile(r"(?:(?P<address>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]*[A-Za-z.-][A-Za-z0-9.-]*):)?"
                   r"(?P<port>[0-9]{1,5})(?::(?P<inside>[0-9]{1,5}))?")
_USUAL = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Forward:
    """``text``: as it was written. ``inside``: the port of the machine."""

    text: str
    address: str
    port: int
    inside: int

    @property
    def shown(self) -> str:
        """The port of the host."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def parse_forward(text: str) -> Forward:
    """Raises ValueError, whose text says why."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{one_line(text, 60)}: is not [ADDRESS:]PORT[:INSIDE]")
    port, inside = int(match["port"]), int(match["inside"] or match["port"])
    for each in (port, inside):
        if not 1 <= each <= 65535:
            raise ValueError(f"{text}: a port is from 1 to 65535")
    return Forward(text, (match["address"] or _USUAL).strip("[]"), port, inside)
