"""YAML as configurations need it: plain values, the line of each key, and bounds on what a text may make of itself.

Mappings, sequences, strings, numbers, booleans and null; dates stay text, other tags are refused. Aliases and merge
keys are followed, but never to more than :data:`VALUES_MAX` values in all, and nothing is nested deeper than
:data:`DEPTH_MAX`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import VmmError, one_line
from ..inputs import input_name, read_input

__all__ = ["DEPTH_MAX", "ConfigError", "Lines", "key_step", "key_text", "parse_value", "read_yaml"]

FILE_MAX = 256 << 10        # bytes
DEPTH_MAX = 32              # levels
VALUES_MAX = 1 << 16        # keys and values, each alias counted again
_NUMBER_MAX = 128           # bits of a whole number

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_TEXT = (_TAG + "str", _TAG + "timestamp", _TAG + "value")
_SCALARS = (*_TEXT, *(_TAG + t for t in ("null", "bool", "int", "float")))

#: The line of each key; a key is the steps that lead to it.
Lines = dict[tuple[str | int, ...], int]


class ConfigError(VmmError):
    """A configuration that cannot be used; one line per problem, each naming file, line and key."""


def key_text(at: tuple[str | int, ...]) -> str:
    """``memory.0.size``, on one line whatever the keys are."""
    return ".".join(one_line(str(step), 60) for step in at)


def key_step(text: str) -> str | int:
    """A part of a dotted key: a list's items go by their numbers."""
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text) else text


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """A file's mapping, and the line of each key in it. ``-`` is standard input. Raises ConfigError."""
    data = read_input(path, FILE_MAX, lambda path, what: ConfigError(f"{input_name(path)}: {what}"), pipes=True)
    name = input_name(path)
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text") from None
    document, lines = _parse(text, name)
    if not isinstance(document, dict):
        raise ConfigError(f"{name}: must be a mapping of keys to values")
    return document, lines


def parse_value(text: str, where: str) -> Any:
    """A value as it stands in a file, from a command line. Raises ConfigError, which begins with ``where``."""
    if len(text) > FILE_MAX:
        raise ConfigError(f"{where}: is too long")
    return _parse(text, where, line=False)[0]


class _Loader(yaml.SafeLoader):
    """Stops where nesting goes too deep; PyYAML would go on until Python's stack is full."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth == DEPTH_MAX:
            raise yaml.MarkedYAMLError(None, None, _too_deep(), self.peek_event().start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _too_deep() -> str:
    return f"nested deeper than {DEPTH_MAX} levels"


def _parse(text: str, where: str, *, line: bool = True) -> tuple[Any, Lines]:
    at_line = 0
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        except (ValueError, OverflowError):     # an escape beyond Unicode, a version of 5,000 digits
            at_line = loader.line + 1
            raise
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError) as exc:
        mark = getattr(exc, "problem_mark", None)
        if mark is not None:
            at_line = mark.line + 1
        elif isinstance(exc, yaml.reader.ReaderError):
            at_line = text.count("\n", 0, exc.position) + 1
        problem = "an escape sequence or a number is out of range"
        if isinstance(exc, yaml.YAMLError):
            problem = str(getattr(exc, "problem", None) or getattr(exc, "reason", None) or exc).partition("\n")[0]
        raise ConfigError(f"{where}{f':{at_line}' if line and at_line else ''}: invalid YAML: "
                          f"{one_line(problem)}") from None
    values = _Values(where if line else "", where)
    return (None if node is None else values.construct(node, ())), values.lines


class _Values:
    """Makes the values of one text."""

    def __init__(self, path: str, where: str) -> None:
        self._path = path           # "" where lines mean nothing
        self._where = where
        self._made = self._depth = 0
        self._scalars = yaml.constructor.SafeConstructor()
        self.lines: Lines = {}

    def _bad(self, node: yaml.Node, at: tuple[str | int, ...], what: str) -> ConfigError:
        where = f"{self._path}:{node.start_mark.line + 1}" if self._path else self._where
        key = key_text(at)
        return ConfigError(f"{where}: {key}: {what}" if key else f"{where}: {what}")

    def construct(self, node: yaml.Node, at: tuple[str | int, ...]) -> Any:
        """The plain Python value of a node. Raises ConfigError."""
        self._made += 1
        if self._made > VALUES_MAX:
            raise self._bad(node, (), f"more than {VALUES_MAX:,} values (an alias counts as all it expands to)")
        if self._depth == DEPTH_MAX:    # an alias within its own anchor
            raise self._bad(node, at[:1], _too_deep())
        self.lines[at] = node.start_mark.line + 1
        self._depth += 1
        try:
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return [self.construct(n, (*at, i)) for i, n in enumerate(node.value)]
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self._mapping(node, at)
            if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
                return self._scalar(node, at)
        finally:
            self._depth -= 1
        raise self._bad(node, at, f"unknown tag '{one_line(node.tag.replace(_TAG, '!!'), 60)}'")

    def _mapping(self, node: yaml.MappingNode, at: tuple[str | int, ...]) -> dict[str, Any]:
        """``<<: *defaults`` gives what the mapping itself does not; a key given twice is an error."""
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                for merged in reversed(self._merged(value_node, at)):   # the first one named has the last word
                    found.update(merged)
        given: set[str] = set()
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._bad(key_node, at, "a key must be a scalar")
            key = str(key_node.value)
            if key in given:
                raise self._bad(key_node, (*at, key), "given twice")
            given.add(key)
            found[key] = self.construct(value_node, (*at, key))
            self.lines[(*at, key)] = key_node.start_mark.line + 1
        return found

    def _merged(self, node: yaml.Node, at: tuple[str | int, ...]) -> list[dict[str, Any]]:
        made = [self.construct(n, at) for n in (node.value if isinstance(node, yaml.SequenceNode) else [node])]
        if not all(isinstance(m, dict) for m in made):
            raise self._bad(node, (*at, "<<"), "must be a mapping or a list of mappings")
        return made

    def _scalar(self, node: yaml.ScalarNode, at: tuple[str | int, ...]) -> Any:
        value: Any = str(node.value)
        if node.tag not in _TEXT:
            try:
                value = self._scalars.construct_object(node)
            except (yaml.YAMLError, ValueError, LookupError, OverflowError):
                # PyYAML's constructors believe a tag: ``!!int abc``, ``!!bool x``, more digits than Python takes.
                raise self._bad(node, at, f"not a valid {node.tag.removeprefix(_TAG)}: "
                                          f"'{one_line(value, 60)}'") from None
            if isinstance(value, int) and value.bit_length() > _NUMBER_MAX:
                raise self._bad(node, at, "the number is too large")
        elif any("\ud800" <= c <= "\udfff" for c in value):
            raise self._bad(node, at, "is not valid text (unpaired surrogate)")
        return value
