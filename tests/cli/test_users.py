"""Users who have next to nothing: no home, no runtime directory, no right to /dev/kvm; two of them at once."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import vmm
from places import TOP

pytestmark = pytest.mark.root

#: Of nobody, nor of another run of these tests.
_UIDS = (20000 + os.getpid() * 2 % 39000, 20001 + os.getpid() * 2 % 39000)


@dataclass(frozen=True)
class User:
    uid: int
    python: str = sys.executable

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Of Python, with nothing in the environment but where things are."""
        return subprocess.run([self.python, "-P", *arguments], user=self.uid, group=self.uid, extra_groups=[], cwd="/",
                              env={"PATH": os.defpath, "PYTHONPATH": f"{TOP}:{sysconfig.get_path('purelib')}"},
                              capture_output=True, text=True, timeout=90, check=False)

    def vmm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "vmm", *arguments)


def interpreter() -> str:
    """One of this version that these users may run; this one's own may be in somebody's home."""
    code = "import sys, numpy, vmm; print(sys.version_info[:2])"
    for python in (sys.executable, shutil.which(f"python{sys.version_info[0]}.{sys.version_info[1]}", path=os.defpath)):
        with contextlib.suppress(PermissionError):
            if python and User(_UIDS[0], python).run("-c", code).stdout.strip() == str(sys.version_info[:2]):
                return python
    pytest.skip("other users cannot read this program, or have no Python of this version")


@pytest.fixture
def users() -> Iterator[list[User]]:
    python = interpreter()
    done = vmm("launch", "hello", "--set", "accel=unicorn", "--name", "users")
    assert done.returncode == 0, done.stderr    # and its loops are compiled, for all: these users could not keep them
    found = [User(uid, python) for uid in _UIDS]
    try:
        yield found
    finally:
        for user in found:
            user.vmm("stop", "--force", "same")
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(f"/tmp/shardvmm-{user.uid}")
        assert not [p for p in os.listdir("/dev/shm") for user in found if p.startswith(f"shardvmm.{user.uid}.")]


def test_a_machine_of_a_user_without_a_home(users: list[User]) -> None:
    done = users[0].vmm("launch", "hello")
    assert done.returncode == 0, done.stderr
    assert "hello from vCPU 0" in done.stdout
    assert "Traceback" not in done.stderr
    assert users[0].vmm("doctor").returncode == 0
    assert not Path("/~").exists()


def test_two_users_have_machines_of_one_name(users: list[User]) -> None:
    for user in users:
        done = user.vmm("launch", "quickstart", "--name", "same", "--set", "guest.params.writes=0", "--detach")
        assert done.returncode == 0, done.stderr
    assert users[0].vmm("stop", "same").returncode == 0
    assert "no machine is running" in users[0].vmm("list").stdout
    assert "same" in users[1].vmm("list").stdout
    assert users[1].vmm("stop", "same").returncode == 0
