"""Programs to be watched: target.c, compiled, and writer.py; and what a test asks of them."""

from __future__ import annotations

import functools
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from ipc.linux.foreign import status

__all__ = ["MODES", "PAGES", "Target", "Writer", "compiler_missing"]

#: Of a mapping of a Writer, if it is not told otherwise.
PAGES = 3000

#: What the thread is at that is found; "thread-": it is not the first one.
MODES = ("compute", "signals", "sequence", "poll", "epoll", "sleep", "futex", "thread-compute", "thread-poll",
         "thread-epoll", "thread-sleep", "thread-futex")


def compiler_missing() -> str:
    """Why target.c cannot be compiled, or run; empty when it can."""
    if shutil.which("cc") is None:
        return "no C compiler"
    return "" if " avx " in Path("/proc/cpuinfo").read_text() else "this processor has no AVX"


@functools.cache
def _built() -> Path:
    """Kept for the life of this process."""
    folder = tempfile.TemporaryDirectory(prefix="svt-target-")
    _folders.append(folder)
    program = Path(folder.name) / "target"
    subprocess.run(["cc", "-O2", "-mavx", "-pthread", "-Wall", "-Werror", "-o", program,
                    Path(__file__).with_name("target.c")], check=True, timeout=60)
    return program


_folders: list[tempfile.TemporaryDirectory[str]] = []


class Target:
    """One that runs, until its ``with`` ends."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._process = subprocess.Popen([_built(), mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.pid = self._process.pid

    def __enter__(self) -> Target:
        try:
            assert self._line() == "ready"
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        found, deadline = b"", time.monotonic() + 30.0
        while not found.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"the target ({self.mode}) says nothing: {found!r}")
            more = os.read(self._process.stdout.fileno(), 100)
            if not more:
                raise EOFError(f"the target ({self.mode}) has ended: {self._process.wait()}")
            found += more
        return found.decode().strip()

    def check(self) -> str:
        """What it says of itself: "ok", or what has changed in it."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"?\n")
        return self._line()

    def descriptors(self) -> list[str]:
        """What it has open."""
        folder = Path(f"/proc/{self.pid}/fd")
        return sorted(os.readlink(each) for each in folder.iterdir())

    def tracers(self) -> set[str]:
        """Process ids; "0" is none."""
        return {status(self.pid, int(each.name))["TracerPid"] for each in Path(f"/proc/{self.pid}/task").iterdir()}


class Writer:
    """writer.py, asked."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, Path(__file__).with_name("writer.py")], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1)
        self.pid = self.process.pid
        self.addresses: list[int] = []
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        answer = self.process.stdout.readline().strip()
        assert answer, f"{line}: it has ended"
        return answer

    def map(self, kind: str, pages: int = PAGES) -> int:
        number, address = map(int, self.ask(f"map {kind} {pages}").split())
        self.addresses.append(address)
        return number

    def write(self, number: int, pages: set[int]) -> None:
        assert self.ask(f"write {number} {' '.join(map(str, sorted(pages)))}") == "done"
