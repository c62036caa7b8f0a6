"""Fixtures and the rules that hold for every test: KVM is required where CI says so, and nothing is
left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from ipc.shm import list_segments
from vmm.names import scope_prefix

REQUIRE_KVM = os.environ.get("SHARDVMM_REQUIRE_KVM") == "1"


settings.register_profile("shardvmm", deadline=None)    # time is not what a property is about
settings.load_profile("shardvmm")


def kvm_missing() -> str:
    """Why KVM cannot be used here; empty when it can."""
    from workers.kvm import probe

    info = probe()
    if info.reason:
        return info.reason
    return "" if info.ring_capability else "this kernel has no dirty rings"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("kvm")]
    reason = kvm_missing() if marked else ""
    if not reason:
        return
    if REQUIRE_KVM:
        raise pytest.UsageError(f"SHARDVMM_REQUIRE_KVM=1, but {reason}")
    for item in marked:
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def locks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shared by the processes of one run (pytest-xdist gives each a folder below a common one)."""
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent
    return common / "turnstile", common / "machine"


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest, locks: tuple[Path, Path]) -> Iterator[None]:
    """A test marked ``timing`` has the host to itself; all others share it. At the turnstile one that wants
    to be alone waits for those before it only."""
    mode = fcntl.LOCK_EX if request.node.get_closest_marker("timing") else fcntl.LOCK_SH
    with locks[1].open("w") as machine:
        with locks[0].open("w") as turnstile:
            fcntl.flock(turnstile, mode)
            fcntl.flock(machine, mode)
        yield


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a runtime directory of its own (short: socket paths are limited)."""
    path = Path("/tmp") / f"svt-{uuid.uuid4().hex[:8]}"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    return path


def processes_of(runtime_dir: Path) -> list[str]:
    """Command lines of live processes, other than this one, that were started with this runtime directory."""
    wanted = f"XDG_RUNTIME_DIR={runtime_dir}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):      # it ended meanwhile
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:                     # a zombie has none
                    found.append(f"{entry.name}: {command}")
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
