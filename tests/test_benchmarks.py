"""The benchmarks can be run: each at its smallest. What they measure is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import TOP

from benchmarks.__main__ import NAMES
from benchmarks.common import Case, Results, Targets, quartiles


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=TOP, capture_output=True, text=True,
                          timeout=240, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_at_its_smallest_or_says_why_not(name: str, tmp_path: Path) -> None:
    done = run(name, "--quick", "--patience", "0", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"--- {name}\n")
    said = done.stdout.split("\n", 1)[1]
    assert said.strip()
    table = tmp_path / f"{name}.md"
    if table.exists() and "skipped" not in said:
        assert len(table.read_text().splitlines()) > 3


def test_every_module_is_listed() -> None:
    """Those that no name stands for are shared by the others."""
    modules = {path.stem for path in (TOP / "benchmarks").glob("*.py")}
    assert modules - {"__init__", "__main__", "common"} == set(NAMES)


def test_an_unknown_name_is_refused() -> None:
    done = run("dirtyin")
    assert done.returncode == 2
    assert "There are: dirtying, " in done.stderr


def test_a_case_compares_runs_that_were_made_in_turns(tmp_path: Path) -> None:
    """Pairs that others disturbed are left out, where enough are left."""
    calm = [({"rate": 100.0 * n, "busy": 0.0}, {"rate": 50.0 * n, "busy": 0.05}) for n in (1, 2, 3)]
    disturbed = ({"rate": 1.0, "busy": 2.0}, {"rate": 100.0, "busy": 0.0})
    case = Case("c", [a for a, _ in [*calm, disturbed]], [b for _, b in [*calm, disturbed]], at_least={"rate": 1.5})
    assert case.ratio("rate") == (2.0, 2.0, 2.0)
    assert case.median("ours", "rate") == 200.0
    assert case.verdict("rate") == "met (>= 1.5)"
    results = Results("r", "title", "peer", {"rate": ("rate", 1.0, ".0f")})
    results.cases.append(case)
    results.save(tmp_path)
    assert "| c | rate | 200 | 100 | 2.00 | 2.00 to 2.00 | met (>= 1.5) |" in (tmp_path / "r.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["r"]["cases"][0]["name"] == "c"
    assert quartiles([1, 2, 3, 4, 5]) == (2, 3, 4)


def test_a_target_is_compared_with_the_median(tmp_path: Path) -> None:
    values = iter([3.0, 1.0, 2.0, 9.0, 8.0, 7.0])
    targets = Targets("t", 3, 0.0)
    for what in ("good", "bad"):
        targets.add(what, lambda: next(values), "ms", 5.0)
    targets.save(tmp_path)
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[-2:] == ["| good | 2.00 ms | 1.00 to 3.00 | at most 5 ms | met |",
                          "| bad | 8.00 ms | 7.00 to 9.00 | at most 5 ms | not met |"]
