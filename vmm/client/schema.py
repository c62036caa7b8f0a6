"""The published JSON schema of the configuration file, and its keys one by one, read out of that schema: what may be
written for each, its default, and what it means (vmm/client/models.py has the words)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from ..errors import VmmError, one_line
from .models import MachineConfig

__all__ = ["KeyDoc", "PlainSchema", "config_schema", "find_key", "key_docs"]

_NONE = object()
_MACHINES = "machines"
_SEVERAL = ("Instead of one machine, several: their names, and the keys of each. A key beside machines holds for all "
            "that do not say otherwise. Keys that begin with x- are ignored: a place for anchors.")


class PlainSchema(GenerateJsonSchema):
    """Without titles that are only a key again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


def config_schema() -> dict[str, Any]:
    """Of the file: of one machine, or of several. Draft 7 is what language servers for YAML know best."""
    schema = MachineConfig.model_json_schema(schema_generator=PlainSchema)
    keys: dict[str, Any] = schema.pop("properties")
    required = schema.pop("required")
    machine = {"type": "object", "additionalProperties": False,
               "properties": {key: value for key, value in keys.items() if key != "name"}}
    schema["$defs"]["MachineOfSeveral"] = machine
    several = {"description": _SEVERAL, "type": "object", "minProperties": 1,
               "propertyNames": {"pattern": keys["name"]["pattern"]},
               "additionalProperties": {"$ref": "#/$defs/MachineOfSeveral"}}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema,
            "properties": {**keys, _MACHINES: several}, "patternProperties": {"^x-": True},
            "anyOf": [{"required": required}, {"required": [_MACHINES]}]}


@dataclass(frozen=True, slots=True)
class KeyDoc:
    """One key. ``name``: ``memory.N.size``, with N for the number of an item. ``kind``: what may be written.
    ``default``: None: it has none that a file could say. ``below``: keys that it has."""

    name: str
    kind: str
    description: str
    default: Any
    required: bool
    examples: tuple[str, ...]
    title: str                      # size, duration, rate, file name; ""
    below: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"key": self.name, "kind": self.kind, "description": self.description, "default": self.default,
                "required": self.required, "examples": list(self.examples), "keys": list(self.below)}


def key_docs() -> dict[str, KeyDoc]:
    """Every key, in the order of the models."""
    schema = config_schema()
    return {doc.name: doc for doc in _walk(schema, schema["$defs"], "", schema["anyOf"][0]["required"])}


def find_key(text: str) -> KeyDoc:
    """By its name, with or without the number of an item. Raises VmmError."""
    docs = key_docs()
    named = {_plain(name): doc for name, doc in docs.items()}
    if (found := named.get(_plain(text))) is not None:
        return found
    last = {name.rpartition(".")[2]: name for name in reversed(named)}
    near = difflib.get_close_matches(_plain(text), [*named, *last], n=1)
    if near:
        name = near[0] if near[0] in named else last[near[0]]
        raise VmmError(f"there is no key '{one_line(text, 60)}' (did you mean '{named[name].name}'?)")
    raise VmmError(f"there is no key '{one_line(text, 60)}'; vmm config explain lists them")


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "N" and not part.isdigit())


def _walk(node: dict[str, Any], defs: dict[str, Any], prefix: str, required: list[str]) -> Iterator[KeyDoc]:
    for key, value in node["properties"].items():
        name = f"{prefix}{key}"
        section, step = _section(value, defs)
        descends = section is not None and key != _MACHINES
        below = tuple(f"{name}{step}.{each}" for each in section["properties"]) if section and descends else ()
        title, examples = _quantity(value)
        default = value.get("default", _NONE)
        has = default is not _NONE and default is not None and not (descends and isinstance(default, dict))
        yield KeyDoc(name, _kind(value, defs), value.get("description", ""), default if has else None,
                     key in required, examples, title, below)
        if section and descends:
            yield from _walk(section, defs, f"{name}{step}.", section.get("required", []))


def _alternatives(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in node.get("anyOf") or node.get("oneOf") or [node] if each.get("type") != "null"]


def _section(node: dict[str, Any], defs: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """What has keys of its own, and the step that leads there (``.N`` in a list)."""
    for each in _alternatives(node):
        if each.get("type") == "array":
            found, _ = _section(each["items"], defs)
            if found is not None:
                return found, ".N"
        for part in (each, *each.get("allOf", [])):
            if "$ref" in part:
                return defs[part["$ref"].rpartition("/")[2]], ""
    return None, ""


def _quantity(node: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    for each in (node, *_alternatives(node)):
        if "title" in each:
            return each["title"], tuple(each.get("examples", ()))
    return "", ()


def _kind(node: dict[str, Any], defs: dict[str, Any]) -> str:
    """In words."""
    if "title" in node:
        return f"a {node['title']}"
    if "enum" in node:
        return _either([str(each) for each in node["enum"]])
    if "const" in node:
        return str(node["const"])
    if "$ref" in node or "allOf" in node or "properties" in node:
        return "a mapping"
    if "anyOf" in node or "oneOf" in node:
        return _either(list(dict.fromkeys(_kind(each, defs) for each in _alternatives(node))))
    kind = node.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(node)
    if kind == "array":
        return f"a list, each {_kind(node['items'], defs)}"
    if kind == "object":
        return f"a mapping of names, each to {_kind(node['additionalProperties'], defs)}"
    return {"boolean": "true or false", "string": "a text"}.get(str(kind), "anything")


def _bounds(node: dict[str, Any]) -> str:
    whole = node["type"] == "integer"
    least, most = node.get("minimum"), node.get("maximum")
    above, below = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    if whole and below is not None:
        most = below - 1
    if above is not None:
        return f" above {above:g}" + ("" if most is None else f", at most {most:g}")
    if least is None:
        return ""
    return f" from {least:g}" if most is None else f" from {least} to {most}"


def _either(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
