"""``vmm demo``: a newcomer's first command. It shows what it says, and leaves nothing, however it ends. (That no
process, segment, socket or runtime file is left is tests/conftest.py's to see.)"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from command import vmm
from machines import ANY
from terminal import Terminal

from vmm.errors import ExitCode

STEPS = ["launch", "dirty rate", "dirty limit", "snapshot", "migration", "verifier"]


def left(folder: Path) -> list[str]:
    """Temporary files, and records of machines."""
    records = Path(os.environ["XDG_STATE_HOME"]) / "shardvmm"
    return [*(name for name in os.listdir(folder) if name != "shardvmm"), *(p.name for p in records.glob("*demo*"))]


def check_the_limit(text: str) -> None:
    """What is shown of it was kept, by both vCPUs."""
    rates = re.search(r"([\d.,]+) MB/s a vCPU: ([\d.,]+) MB/s became ([\d.,]+) MB/s", text)
    if rates is not None:       # else there are no rings here, and it says so
        limit, before, after = (float(each.replace(",", "")) for each in rates.groups())
        assert after <= min(before * 1.5, 2 * limit * 1.15)
    else:
        assert "no dirty rings" in text


@pytest.mark.parametrize("accel", ANY)
def test_a_terminal_shows_all_of_it_on_one_screen(accel: str, tmp_path: Path, runtime_dir: Path) -> None:
    picture = tmp_path / "demo.svg"
    with Terminal("demo", "--accel", accel, "--picture", str(picture), columns=80) as terminal:
        assert terminal.wait() == 0, terminal.text
    board = [line.rstrip() for line in terminal.text.rpartition("a machine whose vCPUs are processes")[2].split("\n")]
    assert len(board) < 24
    assert max(map(len, board)) <= 80
    text = "\n".join(board)
    at = [text.index(f"✓ {step}") for step in STEPS[:-1]]
    assert at == sorted(at)
    assert len(re.findall(r"(?:source|target): passed, [1-9]\d* rounds, [1-9][\d,]* dirty pages, 0 lost", text)) == 2
    assert "nothing left behind" in text
    check_the_limit(text)
    root = ET.fromstring(picture.read_text())       # it is well-formed
    drawn = re.sub(r"\s+", " ", "".join(root.itertext()).replace("\xa0", " "))
    assert all(step in drawn for step in STEPS)
    assert not re.findall(r"(?:href|src|url\()=?['\"]?http", picture.read_text())
    assert left(runtime_dir) == []


@pytest.mark.long
def test_without_a_terminal_it_is_a_line_for_each_thing_that_is_done(runtime_dir: Path) -> None:
    done = vmm("demo", timeout=120.0)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert [next(step for step in [*STEPS, ""] if line.startswith(step)) for line in said] == [*STEPS, ""]
    assert done.stdout.isascii()
    assert done.stdout.count("passed") == 2
    check_the_limit(done.stdout)
    assert left(runtime_dir) == []


@pytest.mark.long
def test_its_figures_are_a_document(runtime_dir: Path) -> None:
    done = vmm("demo", "--json", "--memory", "16MiB", timeout=120.0)
    assert (done.returncode, done.stderr) == (0, "")
    seen = json.loads(done.stdout)
    assert seen["ok"]
    assert [taken["incremental"] for taken in seen["snapshots"]] == [False, True]
    assert seen["migration"]["status"] == "completed"
    assert seen["memory"] == 16 << 20
    if not seen["limit_missing"]:
        assert seen["limited"] <= len(seen["pids"]) * seen["limit"] * 1.15
    assert left(runtime_dir) == []


def test_a_host_without_what_it_needs_is_an_error_in_a_line(runtime_dir: Path) -> None:
    """No descriptor is left for its folder."""
    done = subprocess.run([sys.executable, "-c", "import resource\n"
                           "from vmm.errors import VmmError\n"
                           "from vmm.lab.demo import Demo\n"
                           "demo = Demo(memory=8 << 20, accel='auto', tell=lambda seen: None)\n"
                           "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
                           "try:\n"
                           "    demo.run()\n"
                           "except VmmError as exc:\n"
                           "    print(exc)\n"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the demo cannot go on: [Errno 24] Too many open files")
    assert left(runtime_dir) == []


@pytest.mark.parametrize(("shown", "number"), [
    ("Ctrl-C ends it", signal.SIGINT), ("MB/s", signal.SIGTERM),
    pytest.param("left of this round", signal.SIGINT, marks=pytest.mark.long)])
def test_an_interrupt_leaves_nothing(shown: str, number: signal.Signals, runtime_dir: Path) -> None:
    """While it is launched, while it is looked at, and in a round of the migration. Nor is anything left of a run that
    was killed before."""
    (runtime_dir / "shardvmm-demo-killed" / "snapshots").mkdir(parents=True)
    with Terminal("demo", columns=80) as terminal:
        terminal.wait_for(shown)
        terminal.process.send_signal(number)
        assert terminal.wait() == 128 + number, terminal.text
    assert "Traceback" not in terminal.text
    assert left(runtime_dir) == []


@pytest.mark.parametrize("arguments", [["--memory", "4KiB"], ["--memory", "1048577"]])
def test_what_is_wrong_is_said_before_anything_is_started(arguments: list[str], runtime_dir: Path) -> None:
    done = vmm("demo", *arguments)
    assert done.returncode == ExitCode.BAD_INPUT
    assert done.stderr.startswith("vmm: error: --memory: must be")
    assert left(runtime_dir) == []
