"""Where each key of a configuration was given, and errors that say so: file, line, column, key, and the line itself; or
the option that gave it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..errors import VmmError, one_line

__all__ = ["ConfigError", "Key", "Origins", "Place", "Problem", "key_step", "key_text"]

#: The steps that lead to a key.
Key = tuple[str | int, ...]

_LINE_END = re.compile("\r\n|[\n\r\x85\u2028\u2029]")      # as PyYAML counts lines
_MESSAGE = 500          # characters
_EXCERPT = 100          # columns of a line that is shown
_BEFORE = 60            # and of those, so many before the one that is meant


class Place(NamedTuple):
    """In a file; both count from 1."""

    line: int
    column: int


class Problem(NamedTuple):
    """``text``: on one line, where and what; ``excerpt``: the line that it is about, with a mark; empty: there is
    none."""

    text: str
    excerpt: str = ""


class ConfigError(VmmError):
    """A configuration that cannot be used; one line per problem, each naming its place and key."""

    def __init__(self, *problems: str | Problem) -> None:
        self.problems = [Problem(each) if isinstance(each, str) else each for each in problems]
        super().__init__("\n".join(each.text for each in self.problems))

    def told(self) -> Iterable[str]:
        """With the lines of the file."""
        for text, excerpt in self.problems:
            yield f"error: {text}"
            if excerpt:
                yield excerpt


def key_text(at: Key) -> str:
    """``memory.0.size``, on one line whatever the keys are."""
    return ".".join(one_line(str(step), 60) for step in at)


def key_step(text: str) -> str | int:
    """A part of a dotted key: a list's items go by their numbers."""
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text) else text


@dataclass
class Origins:
    """Of one document. ``name``: of its file; ``text``: what stands there; ``places``: of its keys; ``given``: keys
    that were given by options, and how. ``below``: it is a part of the file, of which errors speak by the whole key,
    but for the ``shared`` ones, which stand at its top."""

    name: str
    text: str = ""
    places: dict[Key, Place] = field(default_factory=dict)
    given: dict[Key, str] = field(default_factory=dict)
    below: Key = ()
    shared: frozenset[str] = frozenset()

    def part(self, below: Key, shared: frozenset[str]) -> Origins:
        """The mapping ``below``, and what holds for it of the keys at the top."""
        depth = len(below)
        places = {at: place for at, place in self.places.items() if at and at[0] in shared}
        places |= {at[depth:]: place for at, place in self.places.items() if at[:depth] == below}
        return replace(self, places=places, given=dict(self.given), below=below, shared=shared)

    def place(self, at: Key) -> Place | None:
        """Of this key in the file, or of the nearest one above it that is there."""
        while at and at not in self.places:
            at = at[:-1]
        return self.places.get(at)

    def problem(self, at: Key, message: str) -> Problem:
        """``message`` is about this key."""
        message = one_line(message, _MESSAGE)
        for given, option in self.given.items():
            if at[:len(given)] == given:
                named = key_text(at) if option.startswith("--set ") or at != given else ""
                return Problem(f"{option}: {named}: {message}" if named else f"{option}: {message}")
        if at and (below := [option for given, option in self.given.items() if given[:len(at)] == at]):
            message += f" (with {', '.join(below)})"
        key = key_text(at if at and at[0] in self.shared else (*self.below, *at))
        said = f"{key}: {message}" if key else message
        place = self.place(at)
        if place is None:
            return Problem(f"{self.name}: {said}" if self.text else said)
        return self.problem_at(place, said)

    def problem_at(self, place: Place, message: str) -> Problem:
        """``message`` is about this place, and names its key itself."""
        lines = _LINE_END.split(self.text)
        excerpt = _excerpt(lines[place.line - 1], place) if place.line <= len(lines) else ""
        return Problem(f"{self.name}:{place.line}:{place.column}: {message}", excerpt)

    def error(self, at: Key, message: str) -> ConfigError:
        """As ``problem``."""
        return ConfigError(self.problem(at, message))

    def error_at(self, place: Place, message: str) -> ConfigError:
        """As ``problem_at``."""
        return ConfigError(self.problem_at(place, message))


def _excerpt(line: str, place: Place) -> str:
    """``    5 | vcpsu: 2`` and a mark below the column, whatever there is in the line; "" where there is nothing."""
    if not line.strip():
        return ""
    first = max(0, place.column - 1 - _BEFORE)
    part = line.rstrip()[first:first + _EXCERPT]
    text = "".join(c if c.isprintable() else " " if c == "\t" else "?" for c in part)
    before = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text[:place.column - 1 - first])
    head = f"{place.line:>5} | "
    return f"{head}{'…' if first else ''}{text}\n{' ' * (len(head) - 2)}| {' ' * (before + bool(first))}^"
