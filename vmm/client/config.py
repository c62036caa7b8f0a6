"""The YAML file of a machine, or of several: loaded and validated, with errors that name file, line, column and key.

    vcpus: 2                        # holds for all of them, unless they say otherwise
    memory: [{size: 64MiB}]
    x-fast: &fast {spin: 0}         # ignored: a place for what is used elsewhere (*fast)
    machines:
      web: {guest: {workload: random, params: *fast}}
      db: {vcpus: 4, guest: {workload: stamp}}
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import VmmError, one_line
from ..inputs import input_name
from ..machine.names import check_machine_name
from .explain import explain
from .models import (
    Duration,
    GuestConfig,
    MachineConfig,
    Rate,
    ReaperConfig,
    ReplayConfig,
    Size,
    VerifyConfig,
)
from .origins import ConfigError, Key, Origins, key_step, key_text
from .samples import find_config
from .yamlfile import DEPTH_MAX, parse_value, read_yaml

__all__ = ["ConfigError", "Duration", "GuestConfig", "MachineConfig", "Option", "Rate", "ReaperConfig", "ReplayConfig",
           "Size", "VerifyConfig", "configs_of", "load_config", "load_configs"]

#: A key that an option of its own gives: (the option as it was given, key, value).
Option = tuple[str, str, Any]

_MACHINES = "machines"
_IGNORED = "x-"         # what keys begin with that only hold anchors


def load_config(path: str | Path, overrides: Sequence[str] = (), *, name: str | None = None,
                machine: str | None = None, options: Sequence[Option] = ()) -> MachineConfig:
    """Read and validate a file of one machine, after ``key.path=value`` overrides; ``name``: of the machine, whatever
    the file says. ``machine``: of a file of several, this one. Raises ConfigError."""
    given = [*options, *([(f"--name {one_line(name, 80)}", "name", name)] if name is not None else [])]
    found = load_configs(path, overrides, options=given, machine=machine)
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise ConfigError(f"{input_name(Path(path))}: has several machines: say which of {names}")
    return found[0]


def load_configs(path: str | Path, overrides: Sequence[str] = (), *, machine: str | None = None,
                 options: Sequence[Option] = ()) -> list[MachineConfig]:
    """Read and validate a file, or an example by its name (samples.py), of one machine or of several; ``machine``: only
    this one of several. Overrides and options hold for each, but for ``machines.NAME.key=value``. Raises
    ConfigError."""
    path = find_config(path)
    return configs_of(path, *read_yaml(path), overrides, machine=machine, options=options)


def configs_of(path: Path, document: dict[str, Any], origins: Origins, overrides: Sequence[str] = (), *,
               machine: str | None = None, options: Sequence[Option] = ()) -> list[MachineConfig]:
    """As ``load_configs``, of what ``read_yaml`` has read. Raises ConfigError."""
    for key in [key for key in document if key.startswith(_IGNORED)]:
        del document[key]
    several = _MACHINES in document
    parts = _machines(document, origins) if several else [(document, origins)]
    there = [str(part["name"]) for part, _ in parts] if several else []
    if machine is not None:
        if machine not in there:
            raise ConfigError(f"{origins.name}: has no machine called {one_line(machine, 80)}"
                              f"{': its machines are ' if there else ' (it is of one machine)'}{', '.join(there)}")
        parts = [each for each in parts if each[0]["name"] == machine]
    found = []
    for part, of_part in parts:
        for override in overrides:
            own = _of_machine(override, str(part["name"]), there) if several else override
            if own is not None:
                of_part.given[_override(part, own, override)] = _set_text(override)
        for option, key, value in options:
            of_part.given[_put(part, key, value, option)] = option
        part.setdefault("name", _default_name(path))
        found.append(_validated(path, part, of_part))
    return found


def _default_name(path: Path) -> str:
    return re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:32].strip("-") or "vm"


def _machines(document: dict[str, Any], origins: Origins) -> list[tuple[dict[str, Any], Origins]]:
    """Each with what holds for all of them. Raises ConfigError."""
    machines = document.pop(_MACHINES)
    if not isinstance(machines, dict) or not machines:
        raise origins.error((_MACHINES,), "must be a mapping of names to machines")
    if "name" in document:
        raise origins.error(("name",), f"each of the machines has the name that it has in '{_MACHINES}'")
    found = []
    for name, own in machines.items():
        at = (_MACHINES, name)
        if not isinstance(own, dict):
            raise origins.error(at, "must be a mapping of keys to values")
        if "name" in own:
            raise origins.error((*at, "name"), f"the machine has the name that it has in '{_MACHINES}'")
        try:
            check_machine_name(name)
        except VmmError as exc:
            raise origins.error(at, str(exc)) from None
        shared = {key: value for key, value in document.items() if key not in own}
        found.append((copy.deepcopy(shared) | own | {"name": name}, origins.part(at, frozenset(shared))))
    return found


def _validated(path: Path, document: dict[str, Any], origins: Origins) -> MachineConfig:
    """Raises ConfigError."""
    try:
        config = MachineConfig.model_validate(document)
    except ValidationError as exc:
        raise explain(exc, origins, document, MachineConfig) from None
    for section, file in (("guest", "image"), ("guest", "root"), ("replay", "trace")):
        model = getattr(config, section)
        given = getattr(model, file, None)
        if given is not None and not given.is_absolute():
            config = config.model_copy(
                update={section: model.model_copy(update={file: _absolute(path.parent / given)})})
    if config.guest is not None and config.guest.files:
        files = {inside: _absolute(path.parent / outside) for inside, outside in config.guest.files.items()}
        config = config.model_copy(update={"guest": config.guest.model_copy(update={"files": files})})
    config._origins = origins
    return config


def _absolute(path: Path) -> Path:
    """Links followed, as far as they lead somewhere."""
    return Path(os.path.realpath(path))


def _set_text(override: str) -> str:
    return f"--set {one_line(override, 80)}"


def _of_machine(override: str, name: str, there: list[str]) -> str | None:
    """Of a file of several machines: what it sets of this one; None: it is for another. Raises ConfigError."""
    if not override.startswith(f"{_MACHINES}."):
        return override
    of, _, rest = override.removeprefix(f"{_MACHINES}.").partition(".")
    if of not in there or not rest:
        raise ConfigError(f"{_set_text(override)}: write {_MACHINES}.NAME.key=value, with one of {', '.join(there)}")
    return rest if of == name else None


def _override(document: dict[str, Any], text: str, given: str) -> Key:
    """Apply one ``--set``, which was ``given`` so; the path that it set. Raises ConfigError."""
    where = _set_text(given)
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{where}: write key=value, for example vcpus=8")
    if key.count(".") >= DEPTH_MAX:
        raise ConfigError(f"{where}: nested deeper than {DEPTH_MAX} levels")
    return _put(document, key, parse_value(value, where), where)


def _put(document: dict[str, Any], key: str, given: Any, where: str) -> Key:
    """The steps of the key. Raises ConfigError."""
    parts = key.split(".")
    steps: list[str | int] = []
    target: Any = document
    for i, part in enumerate(parts):
        step: str | int = part
        if isinstance(target, list):
            step = key_step(part)
            if not isinstance(step, int) or step >= len(target):
                raise ConfigError(f"{where}: {key_text(tuple(steps))} has no item {one_line(part, 60)}")
        elif not isinstance(target, dict):
            raise ConfigError(f"{where}: {key_text(tuple(steps))} is not a mapping")
        steps.append(step)
        if i == len(parts) - 1:
            target[step] = given
        else:
            if isinstance(target, dict) and not isinstance(target.get(part), dict | list):
                target[part] = {}
            target = target[step]
    return tuple(steps)
