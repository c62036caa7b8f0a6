"""What pydantic finds wrong with a document, said for people: where, which key, what."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from .origins import ConfigError, Key, Origins, Problem, key_step
from .units import shown

__all__ = ["explain", "shown"]

_PROBLEMS_SHOWN = 20


def explain(exc: ValidationError, origins: Origins, document: dict[str, Any], model: type[BaseModel]) -> ConfigError:
    """What pydantic found, a line per problem, in the order of the file. ``model``: what the document was validated
    as."""
    problems = [_explain(error, document, model) for error in exc.errors()]
    problems.sort(key=lambda problem: origins.place(problem[0]) or (0, 0))
    found = list(dict.fromkeys(origins.problem(at, message) for at, message in problems))       # each once
    if len(found) > _PROBLEMS_SHOWN:
        found[_PROBLEMS_SHOWN:] = [Problem(f"{origins.name}: and {len(found) - _PROBLEMS_SHOWN} more problems")]
    return ConfigError(*found)


def _explain(error: Any, document: dict[str, Any], model: type[BaseModel]) -> tuple[Key, str]:
    """Which key, and what is wrong."""
    message = error["msg"].removeprefix("Value error, ")
    at = _steps(error["loc"], document)
    named = re.match(r"([a-z_]+(?:\.[a-z0-9_]+)*): (.*)", message)
    if named:   # a check over several keys names the one it is about itself
        at = _steps((*at, *(key_step(s) for s in named[1].split("."))), document)
        message = named[2]
    if error["type"] == "extra_forbidden":
        message = f"unknown key{_nearest(at, model)}"
    elif error["type"] == "missing":
        at = (*at, error["loc"][-1])
        message = "missing"
    else:
        given = error.get("input")
        if error["type"] != "value_error" and isinstance(given, str | int | float | bool):
            message = f"{message[0].lower()}{message[1:]} (got {shown(given)})"
    return at, message


def _steps(given: Iterable[str | int], document: Any) -> Key:
    """Those that lead somewhere in the document: pydantic has others of its own (a union's member, for one)."""
    at: list[str | int] = []
    for step in given:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            continue
        at.append(step)
    return tuple(at)


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
