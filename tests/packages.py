"""Programs that nobody here wrote: Debian's, downloaded once into the checkout's ``.packages`` (ignored by git),
unpacked there and not installed."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest
from places import TOP

__all__ = ["unpacked"]

_FOLDER = TOP / ".packages"


def unpacked(name: str) -> Path:
    """A folder with the contents of a package (without those that it needs). Skips where it cannot be had."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        pytest.skip("no apt-get")
    _FOLDER.mkdir(exist_ok=True)
    folder = _FOLDER / name
    with (_FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # one test process downloads it
        if not folder.exists():
            aside = _FOLDER / f"{name}.new"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            done = subprocess.run(["apt-get", "download", name], cwd=aside, capture_output=True, text=True, timeout=120,
                                  check=False)
            found = list(aside.glob("*.deb"))
            if done.returncode or not found:
                shutil.rmtree(aside)
                pytest.skip(f"apt-get cannot download {name}: {done.stderr.strip().splitlines()[-1:]}")
            subprocess.run(["dpkg-deb", "-x", found[0], aside / "root"], check=True, timeout=60)
            with contextlib.suppress(FileExistsError):
                (aside / "root").rename(folder)
            shutil.rmtree(aside)
    return folder
