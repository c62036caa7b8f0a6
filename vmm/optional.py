"""Packages that only some need: extras of the distribution (pyproject.toml), each asked for here."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import VmmError

__all__ = ["MissingPackage", "cryptography", "figure", "jinja2", "lz4_block", "matplotlib", "matplotlib_colors",
           "matplotlib_ticker", "prometheus", "ray", "textual"]


class MissingPackage(VmmError):
    """It is not installed; the text says how to get it."""


def _load(module: str, extra: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise MissingPackage(f"{what} needs {module.partition('.')[0]}, which cannot be imported ({exc}): "
                             f"pip install 'shardvmm[{extra}]'") from None


def figure(**options: Any) -> Any:
    """A matplotlib Figure that is drawn to memory, with its canvas. Raises MissingPackage."""
    made = _load("matplotlib.figure", "plots", "plotting").Figure(**options)
    _load("matplotlib.backends.backend_agg", "plots", "plotting").FigureCanvasAgg(made)
    return made


def matplotlib() -> Any:
    """The module matplotlib. Raises MissingPackage."""
    return _load("matplotlib", "plots", "plotting")


def matplotlib_ticker() -> Any:
    """The module matplotlib.ticker. Raises MissingPackage."""
    return _load("matplotlib.ticker", "plots", "plotting")


def matplotlib_colors() -> Any:
    """The module matplotlib.colors. Raises MissingPackage."""
    return _load("matplotlib.colors", "plots", "plotting")


def jinja2() -> Any:
    """The module jinja2. Raises MissingPackage."""
    return _load("jinja2", "report", "vmm report")


def lz4_block() -> Any:
    """The module lz4.block. Raises MissingPackage."""
    return _load("lz4.block", "lz4", "lz4 compression")


def cryptography(module: str) -> Any:
    """A module of the package cryptography. Raises MissingPackage."""
    return _load(f"cryptography.{module}", "tls", "a migration with keys")


def prometheus(module: str = "core") -> Any:
    """A module of the package prometheus_client. Raises MissingPackage."""
    return _load(f"prometheus_client.{module}", "metrics", "metrics")


def textual() -> Any:
    """The module textual.app. Raises MissingPackage."""
    return _load("textual.app", "top", "vmm top")


def ray() -> Any:
    """The module ray. Raises MissingPackage."""
    return _load("ray", "cluster", "--cluster")
