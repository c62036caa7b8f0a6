"""A program natively, in a root of its own, and in a machine: what it prints, how it ends, what its machine reports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Ran", "compiled", "inside", "natively"]

_SOURCES = Path(__file__).parent / "c"
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/root", "LC_ALL": "C"}


@dataclass
class Ran:
    """``report``: of the machine."""

    code: int
    output: bytes
    error: bytes
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def verification(self) -> dict[str, Any]:
        found: dict[str, Any] = self.report["verification"]
        return found


def natively(root: Path, *command: str, typed: bytes = b"", seconds: float = 60.0, proc: bool = False) -> Ran:
    """In a PID namespace too: process numbers are as in a machine. ``proc``: it has /proc."""
    namespaces = ["--pid", "--fork", *(["--mount-proc"] if proc else [])]
    ran = subprocess.run(["unshare", *namespaces, "-R", str(root), *command], input=typed, capture_output=True,
                         env=_ENVIRONMENT, timeout=seconds, check=False)
    return Ran(ran.returncode if ran.returncode >= 0 else 128 - ran.returncode, ran.stdout, ran.stderr)


def inside(root: Path, folder: Path, *command: str, typed: bytes = b"", options: tuple[str, ...] = ("--verify",),
           seconds: float = 120.0) -> Ran:
    """``folder``: for the report."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    ran = subprocess.run(
        [sys.executable, "-m", "vmm", "run", "--root", str(root), "--report-json", str(report), "--env", "LC_ALL=C",
         *options, "--", *command],
        input=typed, capture_output=True, timeout=seconds, check=False, env={**os.environ, "COLUMNS": "120"})
    return Ran(ran.returncode, ran.stdout, ran.stderr, json.loads(report.read_text()) if report.exists() else {})


def compiled(root: Path, name: str, *options: str) -> str:
    """The path in the root of a static program made of a source beside this file, with these options of gcc."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    target = root / "bin" / name
    if not target.exists():
        subprocess.run(["gcc", "-O1", "-w", "-static", "-pthread", *options, "-o", target, _SOURCES / f"{name}.c"],
                       check=True, timeout=120)
    return f"/bin/{name}"
