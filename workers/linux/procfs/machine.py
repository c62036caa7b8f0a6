"""The machine as /proc and /sys show it."""

from __future__ import annotations

import functools
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from ..space import LOWEST, PAGE
from .entries import Entries, Entry, folder, text

if TYPE_CHECKING:
    from ..system import System

__all__ = ["RELEASE", "VERSION", "proc", "sys"]

RELEASE, VERSION = b"6.1.0", b"#1 SMP"      # as uname(2) has it
_SECOND, _TICKS = 10**9, 100
_KIBIBYTES = PAGE // 1024
_PIDS, _MAPPINGS = 1 << 22, 1 << 20

#: Of the host's processor, what programs look for; all processors are alike.
_OF_PROCESSOR = ("vendor_id", "cpu family", "model", "model name", "stepping", "cpu MHz", "cache size", "flags",
                 "bogomips", "clflush size", "cache_alignment", "address sizes")


def proc(system: System) -> Entries:
    """/proc without processes."""
    return {
        b"cmdline": text(b"\n"),
        b"cpuinfo": text(lambda: _cpuinfo(system)),
        b"filesystems": text(b"nodev\ttmpfs\nnodev\tproc\nnodev\tsysfs\n"),
        b"loadavg": text(lambda: _loadavg(system)),
        b"meminfo": text(lambda: _meminfo(system)),
        b"stat": text(lambda: _stat(system)),
        b"sys": folder(_settings(system)),
        b"uptime": text(lambda: _uptime(system)),
        b"version": text(b"Linux version %s (shardvmm@shardvmm) (none) %s\n" % (RELEASE, VERSION)),
    }


def sys(system: System) -> Entries:
    """/sys."""
    number = system.processors
    every = b"0-%d\n" % (number - 1) if number > 1 else b"0\n"
    processors: dict[bytes, Entry] = {b"cpu%d" % each: folder({}) for each in range(number)}
    processors |= {name: text(every) for name in (b"online", b"possible", b"present")}
    return {
        b"devices": folder({b"system": folder({b"cpu": folder(processors)})}),
        b"kernel": folder({b"mm": folder({b"transparent_hugepage": folder({
            b"enabled": text(b"always madvise [never]\n")})})}),
    }


def _settings(system: System) -> Entries:
    boot = uuid.UUID(bytes=system.boot, version=4)
    return {
        b"fs": folder({
            b"file-max": _number(1 << 20), b"nr_open": _number(1 << 20), b"pipe-max-size": _number(1 << 20),
            b"pipe-user-pages-hard": _number(0), b"pipe-user-pages-soft": _number(16384)}),
        b"kernel": folder({
            b"cap_last_cap": _number(40), b"core_pattern": text(b"core\n"),
            b"hostname": text(lambda: system.host + b"\n"), b"ngroups_max": _number(65536),
            b"osrelease": text(RELEASE + b"\n"), b"ostype": text(b"Linux\n"), b"pid_max": _number(_PIDS),
            b"random": folder({
                b"boot_id": text(b"%s\n" % str(boot).encode()), b"entropy_avail": _number(256),
                b"poolsize": _number(256), b"uuid": text(lambda: _uuid(system))}),
            b"tainted": _number(0), b"threads-max": _number(system.threads_max), b"version": text(VERSION + b"\n")}),
        b"net": folder({b"core": folder({b"somaxconn": _number(4096)})}),
        b"vm": folder({
            b"max_map_count": _number(_MAPPINGS), b"mmap_min_addr": _number(LOWEST * PAGE),
            b"overcommit_memory": _number(0), b"overcommit_ratio": _number(50), b"swappiness": _number(0)}),
    }


def _number(value: int) -> Entry:
    return text(b"%d\n" % value)


def _uuid(system: System) -> bytes:
    return b"%s\n" % str(uuid.UUID(bytes=system.files.store.random(16), version=4)).encode()


def _uptime(system: System) -> bytes:
    return b"%.2f %.2f\n" % (system.monotonic() / _SECOND, system.monotonic() / _SECOND * system.processors)


def _loadavg(system: System) -> bytes:
    running = sum(thread.deadline is None for thread in system.threads.values())
    return b"0.00 0.00 0.00 %d/%d %d\n" % (min(running, system.threads_max), len(system.threads),
                                           max(system.processes, default=0))


def _stat(system: System) -> bytes:
    """How long each processor was busy is known to the host only."""
    idle = system.monotonic() * _TICKS // _SECOND
    number = system.processors
    lines = [b"cpu  0 0 0 %d 0 0 0 0 0 0" % (idle * number)]
    lines += [b"cpu%d 0 0 0 %d 0 0 0 0 0 0" % (each, idle) for each in range(number)]
    lines += [b"intr 0", b"ctxt 0", b"btime %d" % ((system.realtime() - system.monotonic()) // _SECOND),
              b"processes %d" % max(system.processes, default=0), b"procs_running 1", b"procs_blocked 0",
              b"softirq 0 0 0 0 0 0 0 0 0 0 0"]
    return b"\n".join(lines) + b"\n"


def _meminfo(system: System) -> bytes:
    total, free = system.memory_pages * _KIBIBYTES, system.frames.free * _KIBIBYTES
    values = {
        b"MemTotal": total, b"MemFree": free, b"MemAvailable": free, b"Buffers": 0, b"Cached": 0, b"SwapCached": 0,
        b"Active": total - free, b"Inactive": 0, b"Unevictable": 0, b"Mlocked": 0, b"SwapTotal": 0, b"SwapFree": 0,
        b"Dirty": 0, b"Writeback": 0, b"AnonPages": total - free, b"Mapped": 0, b"Shmem": 0, b"KReclaimable": 0,
        b"Slab": 0, b"SReclaimable": 0, b"SUnreclaim": 0, b"KernelStack": 0, b"PageTables": 0, b"CommitLimit": total,
        b"Committed_AS": sum(each.space.promised for each in system.processes.values()) * _KIBIBYTES,
        b"VmallocTotal": 0, b"VmallocUsed": 0, b"VmallocChunk": 0}
    lines = [b"%-15s %8d kB" % (name + b":", value) for name, value in values.items()]
    lines += [b"HugePages_Total:       0", b"HugePages_Free:        0", b"Hugepagesize:       2048 kB"]
    return b"\n".join(lines) + b"\n"


def _cpuinfo(system: System) -> bytes:
    number, common = system.processors, _processor()
    blocks = []
    for each in range(number):
        values = {"processor": str(each), **common, "physical id": "0", "siblings": str(number), "core id": str(each),
                  "cpu cores": str(number), "apicid": str(each), "fpu": "yes", "wp": "yes"}
        blocks.append("".join(f"{name + _tabs(name)}: {value}\n" for name, value in values.items()))
    return ("\n".join(blocks) + "\n").encode()


def _tabs(name: str) -> str:
    return "\t" * max(1, 2 - len(name) // 8)


@functools.cache
def _processor() -> dict[str, str]:
    """As the host's kernel describes its first one; nothing where it does not."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    found = dict(line.partition(":")[::2] for line in first.splitlines())
    values = {name.strip(): value.strip() for name, value in found.items()}
    return {name: values[name] for name in _OF_PROCESSOR if name in values}


