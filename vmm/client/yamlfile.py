"""YAML as configurations need it: plain values, the place of each key, and bounds on what a text may make of itself.

Mappings, sequences, strings, numbers, booleans and null; dates stay text, other tags are refused. Aliases and merge
keys are followed, but never to more than :data:`VALUES_MAX` values in all, and nothing is nested deeper than
:data:`DEPTH_MAX`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..errors import one_line
from ..inputs import input_name, read_input
from .origins import ConfigError, Key, Origins, Place, key_text

__all__ = ["DEPTH_MAX", "parse_value", "read_yaml"]

FILE_MAX = 256 << 10        # bytes
DEPTH_MAX = 32              # levels
VALUES_MAX = 1 << 16        # keys and values, each alias counted again
_NUMBER_MAX = 128           # bits of a whole number

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_TEXT = (_TAG + "str", _TAG + "timestamp", _TAG + "value")
_SCALARS = (*_TEXT, *(_TAG + t for t in ("null", "bool", "int", "float")))


def read_yaml(path: Path) -> tuple[dict[str, Any], Origins]:
    """A file's mapping, and where each key in it is. ``-`` is standard input. Raises ConfigError."""
    data = read_input(path, FILE_MAX, lambda path, what: ConfigError(f"{input_name(path)}: {what}"), pipes=True)
    name = input_name(path)
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        before = data[:exc.start]
        place = Place(before.count(b"\n") + 1, len(before) - before.rfind(b"\n"))
        raise Origins(name, data.decode(errors="replace")).error_at(place, "not UTF-8 text") from None
    origins = Origins(name, text)
    document = _parse(text, origins, "")
    if not isinstance(document, dict):
        raise ConfigError(f"{name}: must be a mapping of keys to values")
    return document, origins


def parse_value(text: str, where: str) -> Any:
    """A value as it stands in a file, from a command line. Raises ConfigError, which begins with ``where``."""
    if len(text) > FILE_MAX:
        raise ConfigError(f"{where}: is too long")
    return _parse(text, Origins(where), where)


class _Loader(yaml.SafeLoader):
    """Stops where nesting goes too deep; PyYAML would go on until Python's stack is full."""

    depth = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        #: Where an item of a sequence is an alias: {(the sequence, its number): there}. Its node is that of the anchor.
        self.aliases: dict[tuple[int, int], yaml.Mark] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth == DEPTH_MAX:
            raise yaml.MarkedYAMLError(None, None, _too_deep(), self.peek_event().start_mark)
        if isinstance(parent, yaml.SequenceNode) and self.check_event(yaml.AliasEvent):
            self.aliases[id(parent), index] = self.peek_event().start_mark
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _too_deep() -> str:
    return f"nested deeper than {DEPTH_MAX} levels"


def _place(mark: yaml.Mark) -> Place:
    return Place(mark.line + 1, mark.column + 1)


def _parse(text: str, origins: Origins, where: str) -> Any:
    """``where``: what errors begin with, in place of the file and the line; ``origins`` gets the places of keys."""
    place: Place | None = None
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        except (ValueError, OverflowError):     # an escape beyond Unicode, a version of 5,000 digits
            place = Place(loader.line + 1, loader.column + 1)
            raise
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError) as exc:
        mark = getattr(exc, "problem_mark", None)
        if mark is not None:
            place = _place(mark)
        elif isinstance(exc, yaml.reader.ReaderError):
            place = Place(text.count("\n", 0, exc.position) + 1, exc.position - text.rfind("\n", 0, exc.position))
        problem = "an escape sequence or a number is out of range"
        if isinstance(exc, yaml.YAMLError):
            problem = str(getattr(exc, "problem", None) or getattr(exc, "reason", None) or exc).partition("\n")[0]
        said = f"invalid YAML: {one_line(problem)}"
        if where or place is None:
            raise ConfigError(f"{where or origins.name}: {said}") from None
        raise origins.error_at(place, said) from None
    values = _Values(origins, where, loader.aliases)
    return None if node is None else values.construct(node, ())


class _Values:
    """Makes the values of one text."""

    def __init__(self, origins: Origins, where: str, aliases: dict[tuple[int, int], yaml.Mark]) -> None:
        self._origins = origins
        self._where = where         # "" in a file
        self._aliases = aliases
        self._made = self._depth = 0
        self._scalars = yaml.constructor.SafeConstructor()

    def _bad(self, node: yaml.Node, at: Key, what: str) -> ConfigError:
        key = key_text(at)
        said = f"{key}: {what}" if key else what
        if self._where:
            return ConfigError(f"{self._where}: {said}")
        return self._origins.error_at(_place(node.start_mark), said)

    def construct(self, node: yaml.Node, at: Key, mark: yaml.Mark | None = None) -> Any:
        """The plain Python value of a node. ``mark``: where it is, if not where it was anchored. Raises ConfigError."""
        self._made += 1
        if self._made > VALUES_MAX:
            raise self._bad(node, (), f"more than {VALUES_MAX:,} values (an alias counts as all it expands to)")
        if self._depth == DEPTH_MAX:    # an alias within its own anchor
            raise self._bad(node, at[:1], _too_deep())
        self._origins.places[at] = _place(mark or node.start_mark)
        self._depth += 1
        try:
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return [self.construct(n, (*at, i), self._aliases.get((id(node), i)))
                        for i, n in enumerate(node.value)]
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self._mapping(node, at)
            if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
                return self._scalar(node, at)
        finally:
            self._depth -= 1
        raise self._bad(node, at, f"unknown tag '{one_line(node.tag.replace(_TAG, '!!'), 60)}'")

    def _mapping(self, node: yaml.MappingNode, at: Key) -> dict[str, Any]:
        """``<<: *defaults`` gives what the mapping itself does not; a key given twice is an error."""
        found: dict[str, Any] = {}
        place = self._origins.places[at]
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                for merged in self._merged(value_node, at):
                    found.update(merged)
                self._origins.places[at] = place    # and not where what is merged was anchored
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
            self._origins.places[(*at, key)] = _place(key_node.start_mark)
        return found

    def _merged(self, node: yaml.Node, at: Key) -> list[dict[str, Any]]:
        """In the order in which each overrides those before it: the first one named has the last word."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        made = [self.construct(n, at) for n in reversed(nodes)]
        if not all(isinstance(m, dict) for m in made):
            raise self._bad(node, (*at, "<<"), "must be a mapping or a list of mappings")
        return made

    def _scalar(self, node: yaml.ScalarNode, at: Key) -> Any:
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
