"""Roots of programs that nobody here wrote: Debian's, made once in the checkout's ``.packages`` (ignored by git)."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from places import TOP

from vmm.client.debian import make_root
from vmm.errors import VmmError

__all__ = ["root_of"]

_FOLDER = TOP / ".packages" / "roots"


def root_of(name: str, *packages: str) -> Path:
    """Skips where they cannot be had."""
    _FOLDER.mkdir(parents=True, exist_ok=True)
    folder = _FOLDER / name
    with (_FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # one test process makes it
        if not folder.exists():
            try:
                make_root(folder, packages, lambda text: None)
            except VmmError as exc:
                pytest.skip(f"no packages: {exc}")
    return folder
