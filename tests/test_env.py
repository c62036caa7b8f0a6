"""``.ci/env``: what a newcomer sees while the first command installs what it needs. (pip is played: no network.)"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from places import TOP

_PIP = """\
Obtaining file:///somewhere
  Installing build dependencies: started
Collecting numpy>=1.26 (from shardvmm==0.1.0)
  Downloading numpy-2.3.5-cp311-cp311-manylinux_2_27_x86_64.whl.metadata (62 kB)
Collecting posix_ipc>=1.1 (from shardvmm==0.1.0)
  Downloading posix_ipc-1.2.0.tar.gz (98 kB)
Downloading numpy-2.3.5-cp311-cp311-manylinux_2_27_x86_64.whl (16.9 MB)
  Using cached zstandard-0.25.0-cp311-cp311-manylinux_x86_64.whl (5.0 MB)
Building wheels for collected packages: shardvmm
Installing collected packages: numpy, posix_ipc, zstandard, shardvmm
Successfully installed numpy-2.3.5
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """One whose environment is there but for its packages; a pip that says the above, and ends with $STATUS."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(TOP / ".ci" / "env", tmp_path / ".ci" / "env")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "said").write_text(_PIP)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f"""#!/bin/sh
[ "$1" = -c ] && exit 0
echo "$@" >>{tmp_path}/asked
cat {tmp_path}/said
exit $STATUS
""")
    python.chmod(0o755)
    return tmp_path


def env(checkout: Path, status: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([checkout / ".ci" / "env", "echo", "it runs"], capture_output=True, text=True, timeout=60,
                          check=False, env=os.environ | {"STATUS": str(status)})


def test_it_says_what_it_installs_and_then_runs(checkout: Path) -> None:
    done = env(checkout, 0)
    assert (done.returncode, done.stdout) == (0, "it runs\n")
    said = [line.removeprefix("setup:").strip() for line in done.stderr.splitlines()]
    assert said[1:] == ["1: posix_ipc 1.2.0 (98 kB)", "2: numpy 2.3.5 (16.9 MB)", "3: zstandard 0.25.0 (5.0 MB)",
                        "building shardvmm", "unpacking all of them (some ten seconds)", "done"]
    assert env(checkout, 1).stderr == ""        # once


def test_a_failure_is_one_and_comes_again(checkout: Path) -> None:
    for _ in range(2):
        done = env(checkout, 3)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1] == "setup: pip could not install the packages (is there a network?)"


@pytest.mark.parametrize(("commands", "extras"), [(["vmm", "vmm"], ["all"]), (["vmm", "pytest", "vmm"], ["all", "dev"]),
                                                  (["pytest", "vmm"], ["dev"])])
def test_who_only_runs_machines_need_not_wait_for_the_tools_of_tests(checkout: Path, commands: list[str],
                                                                    extras: list[str]) -> None:
    for name in commands:
        program = checkout / ".venv" / "bin" / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        subprocess.run([checkout / ".ci" / "env", name], timeout=60, check=True, env=os.environ | {"STATUS": "0"},
                       stderr=subprocess.DEVNULL)
    asked = (checkout / "asked").read_text().splitlines()
    assert [line[line.rindex("[") + 1:-1] for line in asked] == extras


def test_on_a_terminal_one_line_changes(checkout: Path) -> None:
    controller, terminal = os.openpty()
    try:
        process = subprocess.Popen([checkout / ".ci" / "env", "true"], stdin=terminal, stdout=terminal, stderr=terminal,
                                   env=os.environ | {"STATUS": "0"})
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):      # EIO: nobody has the other end
            while piece := os.read(controller, 65536):
                shown += piece
        assert process.wait(60) == 0
    finally:
        os.close(controller)
    lines = shown.decode().split("\r\n")
    assert len(lines) == 3      # its beginning, what changed until it was done, the end of that
    assert "\r\x1b[Ksetup:   looking for numpy>=1.26\r" in lines[1]
    assert "2: numpy 2.3.5 (16.9 MB)" in lines[1]
    assert lines[1].endswith("setup: done")
