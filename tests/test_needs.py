"""Tests that need something of the host are skipped by name where it is missing, and are never so in CI."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from needs import NEEDS
from places import TESTS

#: A suite of its own: one need that no host meets, one that each does.
CONFTEST = """
import needs
needs.NEEDS = {"kvm": needs.Need(lambda: "no /dev/kvm of this colour", "SHARDVMM_REQUIRE_KVM"),
               "uffd": needs.Need(lambda: "", "SHARDVMM_REQUIRE_UFFD")}
def pytest_configure(config):
    for name in needs.NEEDS:
        config.addinivalue_line("markers", name)
def pytest_collection_modifyitems(items):
    needs.apply(items)
"""
SUITE = """
import pytest
@pytest.mark.kvm
def test_missing(): pass
@pytest.mark.uffd
def test_there(): pass
def test_plain(): pass
"""


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_suite.py").write_text(SUITE)
    (folder / "pytest.ini").write_text("[pytest]\n")
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("SHARDVMM_REQUIRE_", "PYTEST_"))}
    return subprocess.run([sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-p",
                           "no:hypothesispytest", str(folder)], cwd=folder, capture_output=True, text=True,
                          env={**ours, "PYTHONPATH": str(TESTS), **environment}, timeout=60, check=False)


def test_what_is_missing_is_skipped_with_its_reason(tmp_path: Path) -> None:
    done = run(tmp_path, SHARDVMM_REQUIRE_UFFD="1")
    assert done.returncode == 0, done.stdout
    assert "2 passed, 1 skipped" in done.stdout
    assert "kvm: no /dev/kvm of this colour" in done.stdout


def test_what_is_required_is_not_skipped(tmp_path: Path) -> None:
    done = run(tmp_path, SHARDVMM_REQUIRE_KVM="1")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    assert "SHARDVMM_REQUIRE_KVM=1, but no /dev/kvm of this colour" in done.stdout + done.stderr


def test_ci_requires_each_need_that_its_host_can_meet() -> None:
    """By what ``.ci/run`` itself finds out, compared with what the needs say."""
    script = (TESTS.parent / ".ci" / "run").read_text()
    probe = re.search(r"<<'PROBE'\n(.*?)^PROBE$", script, re.DOTALL | re.MULTILINE)
    assert probe is not None
    done = subprocess.run([sys.executable, "-c", probe[1]], capture_output=True, text=True, timeout=60, check=True)
    exported = set(re.findall(r"^export (\w+)=1$", done.stdout, re.MULTILINE))
    assert exported == {need.variable for need in NEEDS.values() if not need.missing()}
