"""``vmm doctor``: what this host can do, as data; nothing is changed."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from ipc import sandbox
from ipc.shm import room
from ipc.userfault import post_copy_missing
from ipc.writelog import watching_missing, write_log_missing
from workers.accel import registry

from ..errors import VmmError
from ..machine.runtime import leftovers, runtime_root

__all__ = ["Finding", "examine", "healthy"]

_SHM_COMFORTABLE = 1 << 30
_FILES_COMFORTABLE = 1024
_PACKAGES = ("posix_ipc", "numpy", "pyzmq", "msgspec", "numba", "pydantic")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at, what there is, and what to do about it."""

    name: str
    status: str     # ok | warn | fail | absent
    finding: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def examine() -> list[Finding]:
    """Every check, in the order of what is needed first."""
    accelerators = [each for name in registry.names() for each in _accelerator(name)]
    return [*accelerators, *_shared_memory(), *_limits(), _post_copy(), _write_log(), _watch(), *_sandbox(),
            *_packages(), _compiled_loops(), _compiler(), *_runtime_directory()]


def healthy(findings: list[Finding]) -> bool:
    """At least one accelerator can be used and nothing essential is missing."""
    accelerators = {f.name: f.status for f in findings if f.name in registry.names("guest")}
    return "ok" in accelerators.values() and all(f.status != "fail" for f in findings)


def _accelerator(name: str) -> list[Finding]:
    here, can = registry.available(name), registry.capabilities(name)
    if here.reason:
        return [Finding(name, "absent", here.reason, here.advice)]
    found = [Finding(name, "ok", here.found)]
    if not here.ring_max:
        found.append(Finding("dirty ring", "warn", "this kernel has no dirty rings",
                             "machines fall back to the plain dirty bitmap"))
    elif can.kernel_ring:
        found.append(Finding("dirty ring", "ok", f"{here.ring}, at most {here.ring_max} entries"))
    return found


def _shared_memory() -> list[Finding]:
    try:
        stat = os.statvfs("/dev/shm")
    except OSError as exc:
        return [Finding("/dev/shm", "fail", str(exc.strerror), "mount a tmpfs there")]
    there, size = room(), stat.f_blocks * stat.f_frsize
    text = f"{size / (1 << 30):.1f} GiB, {there.free / (1 << 30):.1f} GiB free"
    if there.of_cgroup:
        text += f" ({there.limit} allows no more)"
    if there.free < _SHM_COMFORTABLE:
        return [Finding("/dev/shm", "warn", text, f"guest RAM is allocated there: {there.remedy}")]
    return [Finding("/dev/shm", "ok", text)]


def _limits() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard >= _FILES_COMFORTABLE or hard == resource.RLIM_INFINITY     # a machine raises its own soft limit
    files = Finding("open files", "ok" if enough else "warn", f"{soft} (hard limit {hard})",
                    "" if enough else "ulimit -n 4096")
    cores = len(os.sched_getaffinity(0))
    return [files, Finding("cores", "ok", f"{cores}; if there are more vCPUs, they share the cores")]


def _post_copy() -> Finding:
    missing = post_copy_missing()
    if missing:
        return Finding("post-copy", "absent", missing, "migration works without --postcopy")
    return Finding("post-copy", "ok", "userfaultfd for missing pages")


def _write_log() -> Finding:
    missing = write_log_missing()
    if missing:
        return Finding("uffd tracking", "absent", missing, "tracking: ring, bitmap and auto work without it")
    return Finding("uffd tracking", "ok", "asynchronous write-protection and PAGEMAP_SCAN")


def _watch() -> Finding:
    """Other processes from outside: what it takes besides is the right to trace them."""
    missing = watching_missing()
    if missing:
        return Finding("vmm watch", "absent", missing, "vmm watch works with --sample")
    if os.geteuid() == 0:
        return Finding("vmm watch", "ok", "any process")
    try:
        scope = Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip()
    except OSError:
        scope = "0"
    if scope != "0":
        return Finding("vmm watch", "absent", f"kernel.yama.ptrace_scope is {scope}: no process may be traced",
                       "sysctl kernel.yama.ptrace_scope=0, or run vmm watch as root")
    return Finding("vmm watch", "ok", "processes of this user")


def _sandbox() -> list[Finding]:
    missing = sandbox.missing()
    if missing:
        return [Finding("sandbox", "warn", text, advice) for text, advice in missing]
    return [Finding("sandbox", "ok", "Landlock and seccomp")]


def _packages() -> list[Finding]:
    versions, missing = [], []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return [Finding("packages", "fail", f"missing: {', '.join(missing)}", "pip install -e .")]
    return [Finding("packages", "ok", ", ".join(versions))]


def _compiled_loops() -> Finding:
    """Compiled loops are kept beside the source, or in the user's cache."""
    from ipc.compiled.kept import cache_directories, trusted

    paths = cache_directories("ipc.compiled.loops")
    if any(_can_be_written(path) and (not os.path.exists(path) or trusted(path)) for path in paths):
        return Finding("compiled loops", "ok", "can be cached")
    return Finding("compiled loops", "warn", "cannot be cached: every launch compiles them",
                   "set XDG_CACHE_HOME to a directory that only this user can write to")


def _can_be_written(directory: Path) -> bool:
    """It can, or could be made: what there is of the way to it says so. (A way that this user may not look into is
    not there; Path.exists would raise.)"""
    there = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    return os.access(there, os.W_OK | os.X_OK)


def _compiler() -> Finding:
    if shutil.which("as") and shutil.which("ld"):
        return Finding("assembler", "ok", "the sample guests can be rebuilt")
    return Finding("assembler", "absent", "as and ld are missing",
                   "needed only to rebuild the sample guests: apt-get install binutils")


def _runtime_directory() -> list[Finding]:
    """And what lies there, and in /dev/shm, of machines that died."""
    try:
        return [Finding("runtime directory", "ok", str(runtime_root())), *_left_behind()]
    except VmmError as exc:     # the text says what to do
        return [Finding("runtime directory", "fail", str(exc))]


def _left_behind() -> list[Finding]:
    found = leftovers()
    if not found:
        return [Finding("leftovers", "ok", "none")]
    return [Finding("leftovers", "warn", f"{name}: {len(what)} segments or directories of a crashed machine",
                    f"vmm gc {name}") for name, what in found.items()]
