"""What processes use, as the kernel counts it in /proc; and which host this is."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from ..machine.names import RAM_MAPPING

__all__ = ["CpuTime", "cores", "cpu_time", "describe_host", "pss_beyond_ram", "thread_times"]


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Seconds since the process began: on a CPU, and ready to run without one."""

    used: float
    waited: float

    def __add__(self, other: CpuTime) -> CpuTime:
        return CpuTime(self.used + other.used, self.waited + other.waited)

    def __sub__(self, other: CpuTime) -> CpuTime:
        return CpuTime(self.used - other.used, self.waited - other.waited)


def cores() -> int:
    """CPUs that this process, and so a machine that it launches, may use."""
    return len(os.sched_getaffinity(0))


def thread_times(pid: int) -> Iterator[tuple[int, CpuTime]]:
    """(thread id, its times) of each thread of a process, from the scheduler's own statistics, which count in
    nanoseconds. (psutil has the times on a CPU, in clock ticks, and not the others.) Raises OSError when the process
    is gone, or the kernel keeps no such statistics."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        used, waited, _ = (task / "schedstat").read_text().split()
        yield int(task.name), CpuTime(int(used) / 1e9, int(waited) / 1e9)


def cpu_time(pid: int) -> CpuTime:
    """Over all threads of a process; without the time waited where the kernel does not count it. Raises OSError when
    the process is gone."""
    try:
        return sum((times for _, times in thread_times(pid)), CpuTime(0.0, 0.0))
    except FileNotFoundError:   # a kernel without these statistics (or a thread that ended just now)
        with _oserror():
            times = psutil.Process(pid).cpu_times()
        return CpuTime(times.user + times.system, 0.0)


def pss_beyond_ram(pid: int) -> int:
    """Bytes of a process's proportional set size, without the mappings of guest RAM. Raises OSError when the process
    is gone."""
    with _oserror():
        maps = psutil.Process(pid).memory_maps(grouped=False)
    return sum(each.pss for each in maps if not RAM_MAPPING.search(each.path))


@contextlib.contextmanager
def _oserror() -> Iterator[None]:
    try:
        yield
    except psutil.AccessDenied as exc:
        raise PermissionError(str(exc)) from None
    except psutil.Error as exc:
        raise ProcessLookupError(str(exc)) from None


@dataclass(frozen=True, slots=True)
class _Host:
    cpu: str
    cores: int
    memory_mib: int
    kernel: str
    python: str
    shardvmm: str


def describe_host() -> dict[str, Any]:
    """What figures depend on, to stand beside them."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return asdict(_Host(
        cpu=model[1] if model else platform.machine(), cores=cores(),
        memory_mib=psutil.virtual_memory().total >> 20, kernel=platform.release(),
        python=platform.python_version(), shardvmm=version("shardvmm")))
