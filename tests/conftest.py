"""Fixtures and the rules that hold for every test: what is needed is there or the test says so, and nothing is left
behind or open."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import long_set
import needs
import pytest
import zmq
from hypothesis import settings

from ipc.shm import list_segments
from vmm.machine.names import scope_prefix

settings.register_profile("shardvmm", deadline=None)    # time is not what a property is about
settings.load_profile("shardvmm")

# Hundreds of processes are started: with this set each of them would compile every module.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell starts what it puts into the background with these ignored, and so would be every process of a test.
for _signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_signum) is signal.SIG_IGN:
        signal.signal(_signum, signal.default_int_handler if _signum == signal.SIGINT else signal.SIG_DFL)


_CRASHES = pytest.StashKey[TextIO]()


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Where a process of the tests stood when it crashed goes into a file of SHARDVMM_CRASHES, a directory: what it
    prints is far above the end of a long output."""
    if folder := os.environ.get("SHARDVMM_CRASHES"):
        file = config.stash[_CRASHES] = (Path(folder) / str(os.getpid())).open("w")
        faulthandler.enable(file)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=0, metavar="N", help="try about N inputs in all in tests/fuzz")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs.apply(items)
    for item in items:
        if long_set.has(item.nodeid):
            item.add_marker(pytest.mark.long)


#: What libraries keep open for good, once it has been used: matplotlib its fonts.
_KEPT = re.compile(r".*/matplotlib/.*\.ttf")


def descriptors() -> set[tuple[str, str]]:
    """Open descriptors of this process: (number, what it is)."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):        # the directory's own
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return {(number, what) for number, what in found if not _KEPT.fullmatch(what)}


@pytest.fixture(scope="session", autouse=True)
def a_message_without_a_copy() -> None:
    """From the first one on pyzmq keeps a thread, a context and a socket of its own, for good (zmq.utils.garbage).
    That is no test's leak: here is the first one."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://without-a-copy")
        other.connect("inproc://without-a-copy")
        tracker = other.send(bytes(1 << 17), copy=False, track=True)
        one.recv()
        tracker.wait(10.0)


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    """The test's own process has no more descriptors and threads after a test than before."""
    threads_before, open_before = set(threading.enumerate()), descriptors()

    def leaked() -> list[str]:
        threads = [f"thread {t.name}" for t in set(threading.enumerate()) - threads_before if t.is_alive()]
        return threads + [f"descriptor {number}: {what}" for number, what in descriptors() - open_before]

    yield
    if leaked():
        gc.collect()        # what is in a cycle only is not leaked; the traceback of a failed test is one, too
    deadline = time.monotonic() + 5.0       # ZeroMQ's own threads close theirs
    while (left := leaked()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, f"left open: {sorted(left)}"


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a runtime directory of its own (short: socket paths are limited)."""
    path = Path("/tmp") / f"svt-{uuid.uuid4().hex[:8]}"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    # What machines leave on purpose (vmm/machine/records.py) is not looked at by nothing_left_behind.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.delenv("COLUMNS", raising=False)        # what is printed is as wide as of a pipe
    return path


def processes_of(runtime_dir: Path) -> dict[int, str]:
    """{pid: command line} of live processes, other than this one, that were started with this runtime directory."""
    wanted = f"XDG_RUNTIME_DIR={runtime_dir}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):      # it ended meanwhile
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:                     # a zombie has none
                    found[int(entry.name)] = command
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind(runtime_dir: Path) -> Iterator[None]:
    """No segment, no runtime file and no process survives a test."""
    prefix = scope_prefix()         # of this test's runtime directory
    before = set(list_segments(prefix))
    yield
    deadline = time.monotonic() + 5.0       # the last process of a killed machine is on its way out
    while (processes := processes_of(runtime_dir)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in processes:       # they would slow every test that follows
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not processes, f"processes left behind: {processes}"
    left = sorted(set(list_segments(prefix)) - before)
    machines = runtime_dir / "shardvmm"
    files = sorted(str(p) for p in machines.rglob("*")) if machines.is_dir() else []
    if machines.is_dir() and not files:
        machines.rmdir()
    if not files:
        runtime_dir.rmdir()
    assert not left, f"segments left behind: {left}"
    assert not files, f"files left behind: {files}"


@pytest.fixture
def steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What processes that are started from now on look into at each step (ipc/steps.py)."""
    directory = tmp_path / "steps"
    directory.mkdir()
    monkeypatch.setenv("VMM_STEPS", str(directory))
    return directory
