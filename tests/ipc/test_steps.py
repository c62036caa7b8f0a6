"""Named steps (ipc/steps.py): the list against the calls in the source, and what a file at a step does."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from places import TOP

from ipc.steps import STEPS

PACKAGES = ("ipc", "workers", "vmm")


# --- the list ---------------------------------------------------------------------------------------------------


def is_step(call: ast.Call) -> bool:
    """``step(...)``, or ``steps.step(...)``; methods of that name of other objects are none."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr == "step" and isinstance(function.value, ast.Name) and function.value.id == "steps"
    return isinstance(function, ast.Name) and function.id == "step"


def names_called(source: str, where: str = "") -> list[str]:
    """Of all steps in this source, as often as they stand there. Fails where a name is not written out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and is_step(node):
            assert len(node.args) == 1, f"{where}:{node.lineno}: a step has one argument"
            name = node.args[0]
            assert isinstance(name, ast.Constant), f"{where}:{node.lineno}: the name is not written out"
            found.append(str(name.value))
    return found


def test_calls_are_found_in_source() -> None:
    """The search itself: as a bare name and by the module, in any depth; not what only looks like it."""
    source = ("step('a')\nsteps.step('b')\nclass C:\n    def f(self):\n        if x: step('c')\n"
              "self.recording.step(True)\nrecord_step('d')\n# step('e')\n'step(\"f\")'\n")
    assert names_called(source) == ["a", "b", "c"]
    with pytest.raises(AssertionError, match="not written out"):
        names_called("step(name)")
    with pytest.raises(AssertionError, match="not written out"):
        names_called("step(f'a-{b}')")


def test_the_list_has_every_step_of_the_source_and_no_other() -> None:
    called: set[str] = set()
    for package in PACKAGES:
        for path in sorted((TOP / package).rglob("*.py")):
            called |= set(names_called(path.read_text(), str(path.relative_to(TOP))))
    listed = Counter(name for names in STEPS.values() for name in names)
    assert [name for name, count in listed.items() if count > 1] == []
    assert called == set(listed)


# --- what a file does ---------------------------------------------------------------------------------------------


def take_steps(directory: Path | None, *names: str) -> subprocess.CompletedProcess[str]:
    """A process of its own takes these steps, and prints each that it has behind it."""
    environment = {k: v for k, v in os.environ.items() if k != "VMM_STEPS"}
    if directory is not None:
        environment["VMM_STEPS"] = str(directory)
    script = ("import sys\nfrom ipc.steps import step\nfor name in sys.argv[1:]:\n    try:\n        step(name)\n"
              "        print(name, flush=True)\n    except OSError as exc:\n        print(exc.errno, flush=True)\n")
    return subprocess.run([sys.executable, "-c", script, *names], env=environment, capture_output=True, text=True,
                          timeout=60, check=False)


def test_a_step_kills_or_fails_once_where_a_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "fail-two").write_text("28\n")
    (tmp_path / "kill-three").touch()
    first = take_steps(tmp_path, "one", "two", "two", "three", "four")
    assert first.stdout.split() == ["one", "28", "two"]
    assert first.returncode == -signal.SIGKILL
    successor = take_steps(tmp_path, "three")
    assert (successor.stdout.split(), successor.returncode) == (["three"], 0)
    assert list(tmp_path.iterdir()) == []


def test_steps_do_nothing_in_ordinary_life(tmp_path: Path) -> None:
    (tmp_path / "kill-one").touch()
    assert take_steps(None, "one").returncode == 0
