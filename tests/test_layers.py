"""The import rules of the three packages, and what must stay light."""

from __future__ import annotations

import subprocess
import sys

import pytest
from places import TOP


def test_layers() -> None:
    """vmm over workers over ipc (import-linter, contract in pyproject.toml)."""
    code = "from importlinter.cli import lint_imports_command as c; c()"
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("modules", "unwanted"), [
    ("workers.process, workers.accel.kvm.vm", {"numpy", "numba", "pydantic", "unicorn"}),
    ("workers.process, workers.accel.unicorn.cpu", {"numba", "pydantic"}),
    ("workers.process, workers.accel.replay.producer", {"numba", "pydantic", "unicorn"}),
    ("vmm.coordinator.entry, ipc.compiled.calls", {"numba", "pydantic", "unicorn", "click"}),
    ("workers.zygote, vmm.cli.commands", {"numpy", "zmq", "msgspec", "importlib.metadata", "unicorn", "pydantic"}),
    ("vmm.coordinator.keeper", {"numpy", "numba", "pydantic", "click"}),
    ("vmm.consumers.watch.injector", {"numpy", "numba", "pydantic", "click", "zmq", "yaml"})])
def test_what_is_not_needed_is_not_imported(modules: str, unwanted: set[str]) -> None:
    """Each machine pays for what its processes import: Numba, say, 0.4 s and 100 MiB."""
    code = f"import sys, {modules}; sys.exit(', '.join({unwanted} & set(sys.modules)) or 0)"
    for _ in range(2):      # the first may compile, and so import the compiler
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                              check=False)
    assert done.returncode == 0, done.stderr
