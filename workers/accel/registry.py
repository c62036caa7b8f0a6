"""Which accelerators there are: the folders beside this file, by name. None is imported before it is asked for, so
that a KVM worker pays for nothing that a software CPU needs."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import cast

from .base import Accelerator, AccelError, Available, Backend, Capabilities, ProgramAccelerator

__all__ = ["available", "capabilities", "features", "load", "load_program", "names"]


def names(section: str | None = None) -> tuple[str, ...]:
    """Those of the installation, what ``accel: auto`` prefers first; ``section``: those that take this one of the
    configuration."""
    found = [(m.name, capabilities(m.name)) for m in pkgutil.iter_modules(_folders()) if m.ispkg]
    return tuple(name for name, can in sorted(found, key=lambda each: -each[1].preference)
                 if section in (None, can.section))


def capabilities(name: str) -> Capabilities:
    """Raises AccelError where there is none called so."""
    return _backend(name).CAPABILITIES


def available(name: str) -> Available:
    """On this host. Raises AccelError where there is none called so."""
    return _backend(name).probe()


def features(name: str) -> list[str]:
    """CPU features that its guests are shown on this host. Raises AccelError where there is none called so."""
    return _backend(name).features()


def load(name: str) -> type[Accelerator]:
    """The accelerator itself. Raises AccelError."""
    backend = _backend(name)
    try:
        return backend.load()
    except ImportError as exc:
        raise AccelError(f"the {name} accelerator cannot be loaded: {exc}") from None


def load_program(name: str) -> type[ProgramAccelerator]:
    """The one for a thread of a Linux program. Raises AccelError."""
    backend = _backend(name)
    if backend.CAPABILITIES.programs:
        raise AccelError(f"the {name} accelerator {backend.CAPABILITIES.programs}")
    try:
        return backend.load_program()
    except ImportError as exc:
        raise AccelError(f"the {name} accelerator cannot be loaded: {exc}") from None


def _folders() -> list[str]:
    return list(importlib.import_module(__package__).__path__)


def _backend(name: str) -> Backend:
    if not name.isidentifier() or not any((Path(p) / name / "__init__.py").is_file() for p in _folders()):
        raise AccelError(f"unknown accelerator '{name}'")
    return cast(Backend, importlib.import_module(f"{__package__}.{name}"))
