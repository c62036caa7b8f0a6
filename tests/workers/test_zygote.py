"""The process that forks the workers, and what becomes of a launch without it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import until

from ipc.layout import VcpuControl
from ipc.messages import SlotSpec, WorkerSpec
from vmm.errors import ExitCode, VmmError
from vmm.vcpus.handle import VcpuHandle
from vmm.vcpus.pool import VcpuPool
from workers import zygote
from workers.zygote import Zygote

SLOT = SlotSpec(0, 0, 4096, "/none")
SPEC = WorkerSpec(machine="t", index=0, vcpu_count=1, accel="kvm", slots=[SLOT], system_slot=SLOT,
                  control_segment="/none", belongings="t", request_endpoint="", notify_endpoint="",
                  fd_socket="", boot={})


@pytest.fixture
def started() -> Iterator[tuple[subprocess.Popen[bytes], Zygote]]:
    """As the keeper starts it; the read end of a pipe stands for the keeper's life."""
    read, write = os.pipe()
    process, ours = zygote.start(read, 2)
    forks = Zygote(ours.detach())
    try:
        yield process, forks
    finally:
        forks.close()
        process.kill()
        process.wait()
        os.close(read)
        os.close(write)


def test_it_ends_when_its_socket_is_closed(started: tuple[subprocess.Popen[bytes], Zygote]) -> None:
    process, forks = started
    forks.close()
    assert process.wait(60.0) == 0


def test_a_fork_is_a_process_of_its_own(started: tuple[subprocess.Popen[bytes], Zygote]) -> None:
    """The worker reads its specification, cannot open what that names, and ends; the zygote lives on."""
    process, forks = started
    ends = []
    for _ in range(2):
        read, write = os.pipe()
        pid = forks.fork("kvm", read)
        pidfd = os.pidfd_open(pid)
        os.close(read)
        assert pid != process.pid
        os.close(write)     # an empty specification
        until(lambda p=pidfd: over(p), "the worker has ended")
        os.close(pidfd)
        ends.append(pid)
    assert len(set(ends)) == 2
    assert process.poll() is None


def over(pidfd: int) -> bool:
    import select

    return bool(select.select([pidfd], [], [], 0)[0])


def test_a_zygote_that_was_killed_is_said_and_no_worker_is_there(
        started: tuple[subprocess.Popen[bytes], Zygote], tmp_path: Path) -> None:
    process, forks = started
    process.kill()
    process.wait()
    with contextlib.closing(VcpuPool(tmp_path, forks, lambda notification: None, lambda vcpu: None)) as vcpus:
        vcpu = VcpuHandle(0, VcpuControl(), 4096)
        with pytest.raises(VmmError, match="vcpu 0: its worker cannot be started: ") as caught:
            vcpus.spawn(vcpu, SPEC)
        assert caught.value.exit_code == ExitCode.WORKER_DIED
        assert "\n" not in str(caught.value)
        assert not vcpu.alive
        assert vcpus.all == []
