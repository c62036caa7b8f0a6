"""The example configurations, which the package brings along: each has a name, ``quickstart`` for one."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from .origins import ConfigError

__all__ = ["find_config", "sample_names"]

#: In a checkout a link to configs/; in a wheel those files themselves.
_SAMPLES = Path(__file__).parent.parent / "configs"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,60}")


def sample_names() -> list[str]:
    """Of all examples, in alphabetical order."""
    return sorted(path.stem for path in _SAMPLES.glob("*.yaml"))


def find_config(path: str | Path) -> Path:
    """The file that is meant: ``path`` or, where nothing is called so and it is a bare name, the example of that name.
    Raises ConfigError for a bare name of neither."""
    if not _NAME.fullmatch(str(path)) or os.path.exists(path):
        return Path(path)
    names = sample_names()
    if str(path) in names:
        return _SAMPLES / f"{path}.yaml"
    near = difflib.get_close_matches(str(path), names, n=1)
    raise ConfigError(f"{path}: no such file, and no example of that name"
                      + (f" (did you mean '{near[0]}'?)" if near else f"; there are {', '.join(names)}"))
