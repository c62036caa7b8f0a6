"""Who is to be watched: what is no process, no VM or no monitor is refused in one line."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest

from vmm.consumers.watch.blocks import MemorySize
from vmm.consumers.watch.targets import find_target
from vmm.errors import VmmError

GREETING = b'{"QMP": {"version": {}}}\n'


def monitor(path: Path, *answers: bytes) -> threading.Thread:
    """One that says these, a line for each that it is asked, and then nothing more."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(1)

    def serve() -> None:
        with listening:
            other, _ = listening.accept()
        with other, other.makefile("rwb") as lines:
            lines.write(GREETING)
            lines.flush()
            for answer in answers:
                lines.readline()
                lines.write(answer)
                lines.flush()

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def said(**what: object) -> bytes:
    return json.dumps(what).encode() + b"\n"


def test_a_monitor_says_what_memory_its_vm_has(tmp_path: Path) -> None:
    event = said(event="RESET")
    serving = monitor(tmp_path / "m", said(**{"return": {}}), event + event + said(**{"return": {"base-memory": 7}}),
                      said(**{"return": [{"id": "a", "size": 4096}, {"size": 8192}]}))
    found = find_target(str(tmp_path / "m"))
    serving.join()
    assert (found.pid, found.vmm) == (os.getpid(), True)       # whose end of the socket it is
    assert found.sizes == [MemorySize("a", 4096), MemorySize("ram", 8192)]


@pytest.mark.parametrize("answers", [
    [], [b"\n"], [b"{}\n"], [b"[]\n"], [b"7\n"], [b'"x"\n'], [b"\xff\xfe\n"], [b"[" * 100_000 + b"\n"],
    [said(error={"desc": "no"})], [said(**{"return": {}})], [said(event="X") * 2000],
    [said(**{"return": {}}), said(**{"return": 7}), said(**{"return": [7]})],
    [said(**{"return": {}}), said(**{"return": {}}), said(**{"return": []})],
    [said(**{"return": {}}), said(**{"return": {}}), said(**{"return": [{"size": "x"}]})],
    [said(**{"return": {}}), said(**{"return": {}}), said(**{"return": {"a": 1}})]])
def test_what_is_no_monitor_is_said_in_a_line(answers: list[bytes], tmp_path: Path) -> None:
    serving = monitor(tmp_path / "m", *answers)
    with pytest.raises(VmmError) as caught:
        find_target(str(tmp_path / "m"))
    serving.join()
    assert str(caught.value).startswith(f"{tmp_path / 'm'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["0", "99999999999999999999", "no such name", "", "/no/such/path", "é"])
def test_there_may_be_no_such_process(text: str) -> None:
    with pytest.raises(VmmError, match="there is no "):
        find_target(text)
