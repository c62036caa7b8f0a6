"""A machine's log: whole lines in order, bounded, and never waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import until

from vmm.machine import log as machinelog
from vmm.machine.log import LogFile, follow_log, log_line, read_log

MARK = b"\x1e"


def texts(path: Path) -> list[str]:
    return [line.text for line in read_log(path)]


@given(st.text(max_size=200))
def test_a_line_stays_one_line_whatever_a_guest_has_written(text: str) -> None:
    """And does nothing to the terminal it is shown on."""
    line = log_line("vcpu0", "console", text)
    assert line.splitlines() == [line]
    assert all(c == "\t" or c >= " " for c in line)
    assert not any(0x7F <= ord(c) < 0xA0 for c in line)


def test_finished_lines_are_kept_and_others_get_a_head(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    record = MARK + log_line("coordinator", "info", "ready").encode()
    log.feed(record + b"\nTraceback (most recent ")
    log.feed(b"call last):\nhalf a li" + record + b"\nthe rest")
    log.say("info", "told to end")
    log.close()
    lines = list(read_log(tmp_path / "log"))
    assert [(x.source, x.level, x.text) for x in lines] == [
        ("coordinator", "info", "ready"), ("stderr", "error", "Traceback (most recent call last):"),
        ("stderr", "error", "half a li"), ("coordinator", "info", "ready"), ("keeper", "info", "told to end"),
        ("stderr", "error", "the rest")]
    assert all(x.time.endswith("Z") for x in lines)


def test_what_never_ends_a_line_is_not_gathered_for_ever(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    for _ in range(10):
        log.feed(b"x" * 50_000)
        assert len(log._pending) <= 64 << 10
    log.close()
    assert sum(len(t) for t in texts(tmp_path / "log")) == 500_000


def test_the_log_is_bounded_and_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machinelog, "LOG_BYTES", 10_000)
    log = LogFile(tmp_path / "log")
    for i in range(1000):
        log.say("info", f"line {i}")
    log.close()
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 20_000
    numbers = [int(t.split()[1]) for t in texts(tmp_path / "log")]
    assert numbers == list(range(numbers[0], 1000))
    assert len(numbers) > 100


def test_lines_that_a_full_disk_did_not_take_are_counted(tmp_path: Path) -> None:
    """The machine must not notice; whoever reads the log later must."""
    full = LogFile(Path("/dev/full"))
    full.say("info", "lost")
    assert full.error == "No space left on device"
    full.close()
    path = tmp_path / "later" / "log"
    log = LogFile(path)
    for i in range(3):
        log.say("info", f"lost {i}")
        assert log.error == "No such file or directory"
    path.parent.mkdir()
    log.say("info", "kept")
    assert log.error == ""
    log.close()
    assert texts(path) == ["3 lines could not be written: No such file or directory", "kept"]


@pytest.mark.parametrize("reader_lags", [False, True])
def test_following_misses_no_line_over_a_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  reader_lags: bool) -> None:
    """Or says that it did, where more was written in between than is kept."""
    monkeypatch.setattr(machinelog, "LOG_BYTES", 2_000)
    monkeypatch.setattr(machinelog, "_STEP", 0.001)
    log = LogFile(tmp_path / "log")
    log.say("info", "line 0")
    written = threading.Event()
    read_one = threading.Event()

    def write() -> None:
        for i in range(1, 400):
            log.say("info", f"line {i}")
            if not reader_lags:     # half a file at most is not read yet
                read_one.wait(30)
                read_one.clear()
        log.close()
        written.set()

    writer = threading.Thread(target=write)
    found = []
    for line in follow_log(tmp_path / "log", iter(lambda: not written.is_set(), None)):
        found.append(line.text)
        read_one.set()
        if line.text == "line 0":
            writer.start()
            if reader_lags:
                assert written.wait(30)
    writer.join()
    if reader_lags:
        assert any("missing here" in t for t in found)
        assert found[-1] == "line 399"
    else:
        assert found == [f"line {i}" for i in range(400)]


# --- in the processes of a machine -------------------------------------------------------------------

SCRIPT = """
import sys
from vmm.machine.log import log_to_keeper
log = log_to_keeper("coordinator")
for i in range(int(sys.argv[1])):
    log.info("line %d " + "x" * 100, i)
print("done", flush=True)
sys.stdin.readline()
log.warning("two\\nlines")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
log.info("text", extra={"source": "vcpu7", "level": "console"})
"""


def said(count: int) -> tuple[subprocess.Popen[bytes], int]:
    """A process that has logged so many lines into a pipe that nobody reads; the pipe."""
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(count)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=write)
    os.close(write)
    return process, read


def test_a_process_never_waits_for_its_keeper(tmp_path: Path) -> None:
    """It has gone on to its end although nobody read; what was dropped is said to whoever does."""
    process, read = said(5000)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"done\n"
    log = LogFile(tmp_path / "log")
    os.set_blocking(read, False)

    def take() -> None:
        while True:
            try:
                data = os.read(read, 65536)
            except BlockingIOError:
                return
            log.feed(data)
            if not data:
                return

    take()
    process.stdin.write(b"\n")
    process.stdin.close()
    process.wait(60)
    take()
    process.stdout.close()
    os.close(read)
    log.close()
    lines = list(read_log(tmp_path / "log"))
    kept = [line for line in lines if line.text.startswith("line ")]
    dropped = next(line for line in lines if "were dropped" in line.text)
    assert int(dropped.text.split()[0]) + len(kept) == 5000
    assert [line.text for line in kept] == [f"line {i} " + "x" * 100 for i in range(len(kept))]
    after = [(line.source, line.level, line.text) for line in lines[lines.index(dropped) + 1:]]
    assert after[:3] == [("coordinator", "warning", "two"), ("coordinator", "warning", "lines"),
                         ("coordinator", "error", "failed")]
    assert after[3][2].startswith("Traceback")
    assert after[-1] == ("vcpu7", "console", "text")


def test_a_process_outlives_its_log() -> None:
    """The keeper was killed: nothing is said any more, and nobody fails of that."""
    process, read = said(0)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"done\n"
    os.close(read)
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


def test_console_lines_are_known(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log")
    log.feed(MARK + log_line("vcpu12", "console", "hello").encode() + b"\n")
    log.say("info", "x")
    until(lambda: len(texts(tmp_path / "log")) == 2, "both are there")
    assert [line.console_of for line in read_log(tmp_path / "log")] == [12, None]
    log.close()
