"""How a process of this program begins and ends (ipc/run.py)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from ipc.run import own_process

MODULE = """
import gc
imported_with_the_collector = gc.isenabled()
def main(arguments):
    print("out", gc.isenabled(), imported_with_the_collector, gc.get_freeze_count() > 1000, arguments)
    if arguments[0] == "raise":
        raise ValueError("what went wrong")
    if arguments[0] == "leave":
        raise SystemExit(4)
    return int(arguments[0])
"""


def run(tmp_path: Path, *arguments: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    (tmp_path / "work.py").write_text(MODULE)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(own_process("work", *arguments), stdout=stdout, stderr=subprocess.PIPE, text=True,
                          timeout=60, check=False, env={**buffered, "PYTHONPATH": str(tmp_path)})


@pytest.mark.parametrize("code", [0, 3])
def test_the_status_is_mains_and_what_it_printed_is_there(code: int, tmp_path: Path) -> None:
    done = run(tmp_path, str(code), "more")
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout == f"out True False True ['{code}', 'more']\n"


def test_an_exception_is_printed(tmp_path: Path) -> None:
    done = run(tmp_path, "raise")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: what went wrong\n")
    assert done.stdout.startswith("out ")


def test_a_module_that_is_not_there_is_said(tmp_path: Path) -> None:
    done = subprocess.run(own_process("no.such.module"), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "No module named 'no'" in done.stderr


def test_main_may_leave_by_itself(tmp_path: Path) -> None:
    assert run(tmp_path, "leave").returncode == 4


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_the_status_is_mains_with_nowhere_to_print(closed: str, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text("def main(arguments):\n    return 5\n")
    command = " ".join(own_process("work"))
    done = subprocess.run(["sh", "-c", f"exec {command} {closed}"], timeout=60, check=False,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 5


def test_it_ends_though_nobody_reads_what_it_prints(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        assert run(tmp_path, "0", stdout=write).returncode == 0
    finally:
        os.close(write)
