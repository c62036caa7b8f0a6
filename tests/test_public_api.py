"""What somebody else's program sees of this package: names, types, tests with machines. Each in a folder that has
nothing to do with this checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import TOP

import vmm

OUTSIDE = TOP / "tests" / "outside"
#: Of what it says of the package, which is most of its work.
CACHE = TOP / ".mypy_cache" / "outside"

#: A use that is wrong, and what is to be said of it: a checker that looks at nothing would pass all else.
WRONG = '''from vmm import Machine
Machine.launch("c.yaml").dirty_rate("fast")
Machine.launch("c.yaml").no_such_thing()
'''


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    shutil.copy(OUTSIDE / "uses_vmm.py", tmp_path)
    (tmp_path / "wrong.py").write_text(WRONG)
    return tmp_path


def test_dir_shows_the_public_names() -> None:
    assert dir(vmm) == sorted(vmm.__all__)
    assert {"Machine", "AsyncMachine", "VmmError", "load_config", "Options", "snapshot"} <= set(dir(vmm))
    for name in dir(vmm):
        assert getattr(vmm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vmm.nothing


def test_the_names_are_there_without_what_is_behind_them() -> None:
    code = ("import sys, vmm; dir(vmm); vmm.VmmError; "
            "sys.exit(', '.join({'numpy', 'pydantic', 'zmq', 'msgspec', 'asyncio'} & set(sys.modules)) or 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_mypy_knows_its_types_from_outside(elsewhere: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(CACHE),
         "uses_vmm.py", "wrong.py"], cwd=elsewhere, capture_output=True, text=True, timeout=280, check=False)
    lines = done.stdout.splitlines()
    assert [(line.partition(":")[0], line.rpartition("[")[2]) for line in lines] == [
        ("wrong.py", "arg-type]"), ("wrong.py", "attr-defined]")], done.stdout + done.stderr


def test_pyright_knows_its_types_from_outside(elsewhere: Path) -> None:
    """basedpyright is pyright with what it needs to run; it is asked for pyright's own strict rules."""
    if importlib.util.find_spec("basedpyright") is None:
        pytest.skip("basedpyright is not installed")
    (elsewhere / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "strict", "venvPath": str(TOP),
                                                              "venv": ".venv"}))
    done = subprocess.run([sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable],
                          cwd=elsewhere, capture_output=True, text=True, timeout=280, check=False)
    found = [(Path(each["file"]).name, each.get("rule"), each["message"], each["range"]["start"]["line"] + 1)
             for each in json.loads(done.stdout)["generalDiagnostics"] if each["severity"] == "error"]
    assert [each for each in found if each[0] == "uses_vmm.py"] == []
    assert {each[1] for each in found if each[0] == "wrong.py"} >= {"reportArgumentType", "reportAttributeAccessIssue"}


# --- the pytest plugin ------------------------------------------------------------------------------------------------

_TESTS = '''
import time
import pytest

def test_small(vmm_machine):
    assert vmm_machine.status()["state"] == "running"

@pytest.mark.vmm(vcpus=2, accel="unicorn", verify=True)
def test_keys(vmm_machine):
    assert len(vmm_machine.status()["vcpus"]) == 2

def test_two(vmm_launch):
    one, two = vmm_launch(), vmm_launch({"memory": [{"size": "4MiB"}], "guest": {"workload": "hello"}})
    assert one.name != two.name
    assert two.wait(60)["exit_code"] == 0

@pytest.mark.vmm(verify={"inject": "lost", "interval": "20ms"})
def test_lost(vmm_machine):
    while vmm_machine.status()["verification"]["rounds"] < 3:
        time.sleep(0.05)

def test_wrong(vmm_machine):
    assert False, "on purpose"

def test_refused(vmm_launch):
    vmm_launch({"memory": []})
'''


def test_the_plugin_gives_tests_machines_and_looks_after_them(tmp_path: Path, runtime_dir: Path) -> None:
    """In a pytest of its own, without any of this project's fixtures."""
    (tmp_path / "test_machines.py").write_text(_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers -p no:cacheprovider\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:xdist", "test_machines.py"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
                          env={**os.environ, "TMPDIR": "/tmp"})
    said = done.stdout
    for name in ("small", "keys", "two"):
        assert f"PASSED test_machines.py::test_{name}" in said, said + done.stderr
    assert "FAILED test_machines.py::test_wrong - AssertionError: on purpose" in said, said
    assert "ERROR test_machines.py::test_lost" in said, said
    assert "pages lost" in said
    assert "log of machine test" in said
    assert "memory" in said.partition("test_refused")[2]
    assert not list(runtime_dir.iterdir())
