"""What processes use, as the kernel counts it in /proc; and which host this is."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..machine.names import RAM_MAPPING

__all__ = ["CpuTime", "cores", "cpu_time", "describe_host", "pss_beyond_ram"]

_TICKS = os.sysconf("SC_CLK_TCK")


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


def cpu_time(pid: int) -> CpuTime:
    """Over all threads of a process, from the scheduler's own statistics (nanoseconds), else from /proc/PID/stat
    (ticks of 10 ms; then without the time waited). Raises OSError when the process is gone."""
    try:
        parts = [(task / "schedstat").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
        return CpuTime(sum(int(p[0]) for p in parts) / 1e9, sum(int(p[1]) for p in parts) / 1e9)
    except FileNotFoundError:   # a kernel without scheduler statistics (or a thread that ended just now)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return CpuTime((int(fields[11]) + int(fields[12])) / _TICKS, 0.0)


def pss_beyond_ram(pid: int) -> int:
    """Bytes of a process's proportional set size, without the mappings of guest RAM. Raises OSError."""
    total, counted = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if first == "Pss:":
            total += int(rest.split()[0]) * 1024 if counted else 0
        elif not first.endswith(":"):   # the head of a mapping
            counted = not RAM_MAPPING.search(line)
    return total


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
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return asdict(_Host(cpu=model[1] if model else platform.machine(), cores=cores(), memory_mib=memory >> 20,
                        kernel=platform.release(), python=platform.python_version(), shardvmm=version("shardvmm")))
