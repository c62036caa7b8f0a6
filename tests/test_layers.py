"""The import rules of the three packages, and what must stay light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parent.parent


def test_layers() -> None:
    """vmm over workers over ipc (import-linter, contract in pyproject.toml)."""
    code = "from importlinter.cli import lint_imports_command as c; c()"
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_kvm_worker_imports_neither_numpy_nor_numba() -> None:
    code = ("import sys, workers.worker, workers.kvm; "
            "sys.exit(', '.join({'numpy', 'numba', 'pydantic', 'unicorn'} & set(sys.modules)) or 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stderr
