"""The models of docs/models are searched to the end and have no error, and each of their mutants has one; the table
that ties them to the code names nothing that is not there."""

from __future__ import annotations

import ast
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from places import TOP

from ipc.steps import STEPS

MODELS = TOP / "docs" / "models"
DEADLINE = 240.0        # seconds for one search; the longest takes 6 s of an idle processor, 30 s where memory is slow
DEPTH = 200_000         # steps; the longest path has a third of that
LONG = {"entries", "vcpus"}     # checks that take longer than it takes to have the compiler optimise


@dataclass(frozen=True)
class Model:
    """What a model's first comment says of it. ``checks``: {name: flags}; ``mutants``: {name: its check}."""

    path: Path
    text: str
    checks: dict[str, list[str]]
    mutants: dict[str, str]


def read(path: Path) -> Model:
    text = path.read_text()
    return Model(path, text,
                 {name: flags.split() for name, flags in re.findall(r"^ \* Check (\w+): +(.*)$", text, re.MULTILINE)},
                 dict(re.findall(r"^ \* Mutant (\w+) \((\w+)\): .+$", text, re.MULTILINE)))


ALL = {path.stem: read(path) for path in sorted(MODELS.glob("*.pml"))}


@dataclass(frozen=True)
class Outcome:
    """Of a search. ``unreached``: {(line of the model, what stands there)}."""

    errors: int
    states: int
    whole: bool
    unreached: set[tuple[int, str]]
    text: str


def search(model: Model, flags: list[str], folder: Path, *, optimise: str) -> Outcome:
    """Everything that the model can do, or up to the first error."""
    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("spin", *flags, "-a", str(model.path))
    run("cc", optimise, "-w", "-DSAFETY", "-DMEMLIM=1024", "-o", "pan", "pan.c")
    text = run("./pan", f"-m{DEPTH}", "-w22")      # a hash table of 32 MiB
    errors, states = re.search(r"errors: (\d+)", text), re.search(r"(\d+) states, stored", text)
    assert errors is not None, text
    assert states is not None, text
    cut_short = re.search(r"max search depth too small|Search not completed|MEMLIM|out of memory", text)
    unreached = {(int(line), what) for line, what in re.findall(r":(\d+), state \d+, \"(.*)\"$", text, re.MULTILINE)}
    return Outcome(int(errors[1]), int(states[1]), cut_short is None, unreached, text)


@pytest.mark.spin
@pytest.mark.parametrize("name", ALL)
def test_a_model_has_no_error_whatever_happens_in_it(name: str, tmp_path: Path) -> None:
    model = ALL[name]
    unreached: list[set[tuple[int, str]]] = []
    for check, flags in model.checks.items():
        folder = tmp_path / check
        folder.mkdir()
        outcome = search(model, flags, folder, optimise="-O2" if check in LONG else "-O0")
        assert outcome.errors == 0, outcome.text
        assert outcome.whole, outcome.text
        unreached.append(outcome.unreached)
        print(f"{name}, {check}: {outcome.states:,} states")
    assert unreached
    never = {(line, what) for line, what in set.intersection(*unreached) if what != "-end-"}
    assert not never, "the model never comes to these lines"


@pytest.mark.spin
@pytest.mark.parametrize(("name", "mutant"), [(name, m) for name, model in ALL.items() for m in model.mutants])
def test_each_mutant_is_caught(name: str, mutant: str, tmp_path: Path) -> None:
    model = ALL[name]
    flags = model.checks[model.mutants[mutant]]
    outcome = search(model, [*flags, f"-DMUTANT_{mutant}"], tmp_path, optimise="-O0")
    assert outcome.errors > 0, outcome.text


@pytest.mark.parametrize("name", ALL)
def test_a_model_says_what_its_mutants_are(name: str) -> None:
    """All that there are in its text, and no others."""
    model = ALL[name]
    assert set(re.findall(r"MUTANT_(\w+)", model.text)) == set(model.mutants)
    assert len(model.mutants) >= 4
    assert set(model.mutants.values()) <= set(model.checks)


# --- the table ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Of the table in docs/models/README.md."""

    model: str
    step: str           # as the model's text has it
    functions: list[str]
    steps: list[str]    # names of ipc/steps.py


def rows() -> list[Row]:
    """A table's heading names its model."""
    found, model = [], ""
    for line in (MODELS / "README.md").read_text().splitlines():
        if heading := re.fullmatch(r"### `(\w+)\.pml`", line):
            model = heading[1]
        elif model and line.startswith("| `"):
            step, functions, steps = (re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|"))
            found += [Row(model, each, functions, steps) for each in step]
    return found


def exists(name: str) -> bool:
    """``package.module.Class.function`` is in the source: the longest module that there is, then what it defines.
    What is nested in a function counts as its own."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        path = TOP.joinpath(*parts[:cut]).with_suffix(".py")
        if path.is_file():
            node: ast.AST = ast.parse(path.read_text())
            for part in parts[cut:]:
                inner = [each for each in ast.iter_child_nodes(node)
                         if isinstance(each, ast.FunctionDef | ast.ClassDef) and each.name == part]
                if not inner:
                    return False
                node = inner[0]
            return True
    return False


def test_the_table_has_rows_for_each_model() -> None:
    assert {row.model for row in rows()} == set(ALL)


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.model}-{row.step}")
def test_a_row_of_the_table_names_what_there_is(row: Row) -> None:
    assert re.search(rf"\b{re.escape(row.step)}\b", ALL[row.model].text), f"{row.model}.pml has no {row.step}"
    assert row.functions
    missing = [name for name in row.functions if not exists(name)]
    assert not missing
    assert {*row.steps} <= {name for names in STEPS.values() for name in names}


def test_the_look_up_finds_what_is_not_there() -> None:
    assert exists("vmm.dirty.reaper.Reaper.reap")
    assert exists("vmm.coordinator.takeover.take_over")
    assert not exists("vmm.dirty.reaper.Reaper.reaped")
    assert not exists("vmm.dirty.reapers.Reaper.reap")
