"""What pydantic finds wrong with a document, said for people: where, which key, what."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from ..errors import one_line
from ..inputs import input_name
from .units import shown
from .yamlfile import ConfigError, Lines, key_step, key_text

__all__ = ["explain", "shown"]

_PROBLEMS_SHOWN = 20


def explain(exc: ValidationError, path: Path, lines: Lines, set_keys: dict[tuple[str | int, ...], str],
            document: dict[str, Any], model: type[BaseModel]) -> ConfigError:
    """What pydantic found, a line per problem. ``set_keys``: keys that were given on the command line, and how.
    ``model``: what the document was validated as."""
    problems = exc.errors()
    found = [_explain(error, path, lines, set_keys, document, model) for error in problems[:_PROBLEMS_SHOWN]]
    if len(problems) > _PROBLEMS_SHOWN:
        found.append(f"{input_name(path)}: and {len(problems) - _PROBLEMS_SHOWN} more problems")
    return ConfigError("\n".join(found))


def _explain(error: Any, path: Path, lines: Lines, set_keys: dict[tuple[str | int, ...], str],
             document: dict[str, Any], model: type[BaseModel]) -> str:
    """One line: where, which key, what is wrong."""
    message = error["msg"].removeprefix("Value error, ")
    at = tuple(error["loc"])
    named = re.match(r"([a-z_]+(?:\.[a-z0-9_]+)*): (.*)", message)
    if named:   # a check over several keys names the one it is about itself
        at += tuple(key_step(s) for s in named[1].split("."))
        message = named[2]
    while at and at not in lines and at not in set_keys and not _holds(document, at):
        at = at[:-1]    # pydantic's own steps (a union's member, for one) are not keys
    if error["type"] == "extra_forbidden":
        message = f"unknown key{_nearest(at, model)}"
    elif error["type"] == "missing":
        at = tuple(error["loc"])
        message = "missing"
    else:
        given = error.get("input")
        if error["type"] != "value_error" and isinstance(given, str | int | float | bool):
            message = f"{message[0].lower()}{message[1:]} (got {shown(given)})"
    key = key_text(at)
    for set_path, text in set_keys.items():
        if at[: len(set_path)] == set_path:
            return f"{text}: {key}: {one_line(message, 500)}"
    probe = at
    while probe not in lines and probe:
        probe = probe[:-1]
    where = f"{input_name(path)}:{lines.get(probe, 1)}"
    message = one_line(message, 500)
    return f"{where}: {key}: {message}" if key else f"{where}: {message}"


def _holds(document: Any, at: tuple[str | int, ...]) -> bool:
    for step in at:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _nearest(at: tuple[str | int, ...], model: type[BaseModel]) -> str:
    """`` (did you mean …?)`` for a misspelt key, from the model it stands in."""
    for step in at[:-1]:
        field = model.model_fields.get(str(step))
        model = (_model_in(field.annotation) if field else None) or model
    names = list(model.model_fields)
    near = difflib.get_close_matches(str(at[-1]), names, n=1)
    return f" (did you mean '{near[0]}'?)" if near else f"; valid keys: {', '.join(names)}"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds: itself, or one of a list or union of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
