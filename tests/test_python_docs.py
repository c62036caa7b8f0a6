"""What docs/python.md shows runs as it is, each piece by itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from machines import nothing_left
from places import TOP

_PIECES = re.findall(r"```python\n(.*?)```", (TOP / "docs" / "python.md").read_text(), re.DOTALL)
_TESTS = [piece for piece in _PIECES if "def test_" in piece]
_PROGRAMS = [piece for piece in _PIECES if "def test_" not in piece]


@pytest.mark.parametrize("number", range(len(_PROGRAMS)))
def test_a_program_of_the_page_runs(number: int, tmp_path: Path, runtime_dir: Path) -> None:
    code = _PROGRAMS[number].replace("/tmp/vmm-example.sock", f"{runtime_dir}/x").replace("/tmp/vmm-example",
                                                                                        str(tmp_path / "snapshots"))
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, timeout=120,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr
    for name in ("quickstart", "first", "second", "again"):
        assert nothing_left(name)


def test_its_tests_pass(tmp_path: Path) -> None:
    (tmp_path / "test_page.py").write_text("\n".join(_TESTS).replace("configs/", f"{TOP}/configs/"))
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers -p no:cacheprovider\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "test_page.py"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
