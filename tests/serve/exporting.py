"""``vmm exporter`` as a process, and what it serves."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Series", "exporter", "fetch", "fetch_unix", "parsed"]

TIMEOUT = 30.0

#: {(name, labels): value}
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@contextlib.contextmanager
def exporter(*arguments: str, status: int | None = 128 + signal.SIGTERM) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address at which it serves, and the process, which ends with SIGTERM if it has not ended before."""
    process = subprocess.Popen([sys.executable, "-m", "vmm", "exporter", *arguments], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline().strip()
        assert " at " in line, line + process.stderr.read()
        yield line.rpartition(" at ")[2], process
    finally:
        if process.poll() is None:
            process.terminate()
        _, rest = process.communicate(timeout=TIMEOUT)
    assert rest == ""
    assert status is None or process.returncode == status


def fetch(url: str, accept: str = "text/plain", seconds: float = TIMEOUT) -> str:
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return str(answer.read().decode())


def fetch_unix(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(path)
        sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        answer = b""
        while more := sock.recv(65536):
            answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == b"200"
    return body.decode()


def parsed(text: str) -> Series:
    """By Prometheus' own parser for Python. No series twice."""
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found
