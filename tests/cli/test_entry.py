"""The program around its verbs: interrupted before it has begun, with nobody to read what it says, with nowhere to
say it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.errors import ExitCode

VMM = [sys.executable, "-m", "vmm"]


def test_an_interrupt_while_it_is_imported_is_silent(tmp_path: Path) -> None:
    """A library that is imported slowly: as long as standard input is open."""
    (tmp_path / "click").mkdir()
    slow = "import sys\nprint('importing', flush=True)\nsys.stdin.read()\n"
    (tmp_path / "click" / "__init__.py").write_text(slow)
    process = subprocess.Popen([*VMM, "list"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(tmp_path)}, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "")


def test_an_interrupt_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As in a job that a shell has put into the background."""
    done = subprocess.run(["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c",
                           "import os, signal, vmm.cli.main\n"
                           "import vmm.cli.commands\n"
                            "vmm.cli.commands.run = lambda: os.kill(os.getpid(), signal.SIGINT) or 0\n"
                           "vmm.cli.main.main()"], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["list"], ["schema"], ["guests", "--json"], ["doctor"]])
def test_a_full_standard_output_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*VMM, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
                              check=False)
    assert done.returncode == ExitCode.OUTPUT
    assert done.stderr == "vmm: error: standard output: cannot be written: No space left on device\n"


@pytest.mark.parametrize("arguments", [["list"], ["schema"], ["guests"]])
def test_a_reader_that_has_left_is_told_nothing(arguments: list[str]) -> None:
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run([*VMM, *arguments], stdout=written, stderr=subprocess.PIPE, text=True, timeout=60,
                          check=False)
    os.close(written)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("closed", [">&-", "2>/dev/full", "2>&-", ">&- 2>&-"])
def test_the_exit_status_does_not_depend_on_who_listens(closed: str) -> None:
    for arguments, status in (("list", 0), ("status nobody", 7)):
        done = subprocess.run(f"{sys.executable} -m vmm {arguments} {closed}", shell=True, timeout=60, check=False)
        assert done.returncode == status, arguments


def test_what_cannot_be_decoded_comes_out_as_it_went_in(tmp_path: Path) -> None:
    """A file's name need not be text."""
    name = os.fsencode(tmp_path) + b"/\xff.yaml"
    done = subprocess.run([*VMM, "launch", name], capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"vmm: error: ")
    assert done.stderr.count(b"\n") == 1
