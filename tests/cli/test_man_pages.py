"""Man pages: one for each verb, which says what its help says, and whose examples can be copied from it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import TOP

from vmm.cli.examples import EXAMPLES


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("click_man", reason="click-man is not installed")
    directory = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, str(TOP / ".ci" / "man"), str(directory)], check=True, timeout=120,
                   capture_output=True)
    return directory


def test_there_is_one_for_each_verb(pages: Path) -> None:
    assert {path.name for path in pages.iterdir()} == {
        "vmm.1", *(f"vmm-{words.replace(' ', '-')}.1" for words in EXAMPLES)}


def test_they_are_in_order(pages: Path) -> None:
    """For mandoc(1), which knows what a page must have."""
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed")
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "error", *map(str, sorted(pages.iterdir()))],
                          capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_examples_are_there_as_they_are_typed(pages: Path) -> None:
    """Every character of them, and the options whole."""
    groff = ["groff", "-K", "utf8", "-man", "-T", "ascii", "-P-cbou"]
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    for words, examples in EXAMPLES.items():
        page = pages / f"vmm-{words.replace(' ', '-')}.1"
        done = subprocess.run([*groff, str(page)], capture_output=True, text=True, timeout=60, check=True)
        assert done.stderr == ""
        for example in examples:
            assert f"       {example}\n" in done.stdout
        assert not re.search(r"\w-\n", done.stdout), done.stdout
