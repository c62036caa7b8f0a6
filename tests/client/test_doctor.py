"""The doctor says what is so: compared with what the kernel says by other ways, also where less can be had."""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ipc.shm import Segment
from vmm.client.doctor import Finding, examine, healthy
from vmm.machine.names import machine_dir, runtime_root, segment_name

#: uapi/linux/kvm.h and userfaultfd.h, and the system call's number on x86-64. Not those of the program's own files.
_KVM_CHECK_EXTENSION, _CAP_RING, _CAP_RING_ACQ_REL = 0xAE03, 192, 223
_USERFAULTFD, _UFFDIO_API = 323, 0xC018AA3F


def found() -> dict[str, Finding]:
    return {f.name: f for f in examine()}


def doctor(*before: str) -> tuple[int, dict[str, dict[str, str]]]:
    """``vmm doctor`` under a command (prlimit, unshare): exit status and findings."""
    done = subprocess.run([*before, sys.executable, "-m", "vmm", "doctor", "--json"], capture_output=True,
    text=True,                       timeout=60, check=False)
    assert done.stderr == ""
    return done.returncode, {f["name"]: f for f in json.loads(done.stdout)}


def gibibytes(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"([\d.]+) GiB", text)]


# --- this host ------------------------------------------------------------------------------------------------


def test_kvm_and_its_rings() -> None:
    findings = found()
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR)
    except OSError as exc:
        found_missing = (findings["kvm"].status, str(exc.strerror) in findings["kvm"].finding)
        kvm = -1
    if kvm < 0:
        assert found_missing == ("absent", True)
        assert "dirty ring" not in findings
        return
    try:
        names = {_CAP_RING: "KVM_CAP_DIRTY_LOG_RING,", _CAP_RING_ACQ_REL: "KVM_CAP_DIRTY_LOG_RING_ACQ_REL,"}
        sizes = {cap: fcntl.ioctl(kvm, _KVM_CHECK_EXTENSION, cap) for cap in names}
    finally:
        os.close(kvm)
    assert findings["kvm"].status == "ok"
    ring = findings["dirty ring"]
    assert ring.status == ("ok" if any(sizes.values()) else "warn")
    if any(sizes.values()):
        (named,) = [cap for cap, name in names.items() if name in ring.finding]
        entries = re.search(r"at most (\d+) entries", ring.finding)
        assert entries is not None
        assert int(entries[1]) * 16 == sizes[named]     # the capability is in bytes, 16 for each entry


def test_shared_memory_limits_and_cores() -> None:
    findings = found()
    df = subprocess.run(["df", "-B1", "--output=size,avail", "/dev/shm"], capture_output=True, text=True,
                        check=True)
    size, free = (int(n) / 2**30 for n in df.stdout.splitlines()[1].split())
    memory = int(re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())[0]) / 2**20
    # Others use memory meanwhile.
    assert gibibytes(findings["/dev/shm"].finding) == [pytest.approx(size, abs=0.06),
                                                       pytest.approx(min(free, memory), abs=2.0)]
    assert findings["/dev/shm"].status == ("ok" if gibibytes(findings["/dev/shm"].finding)[1] >= 1 else "warn")
    soft, hard = (subprocess.run(["bash", "-c", f"ulimit -{kind}n"], capture_output=True, text=True,
                                 check=True).stdout.strip() for kind in "SH")
    assert findings["open files"].finding == f"{soft} (hard limit {hard})"
    nproc = subprocess.run(["nproc"], capture_output=True, text=True, check=True).stdout.strip()
    assert findings["cores"].finding.startswith(f"{nproc};")


def userfaultfd(flags: int, features: int) -> bool:
    fd = ctypes.CDLL(None).syscall(_USERFAULTFD, flags)
    if fd < 0:
        return False
    try:
        fcntl.ioctl(fd, _UFFDIO_API, (ctypes.c_uint64 * 3)(0xAA, features, 0))
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def test_what_userfaultfd_is_good_for() -> None:
    """Two uses, with different demands: post-copy needs faults of the kernel told (KVM's), tracking does not."""
    findings = found()
    assert (findings["post-copy"].status == "ok") == userfaultfd(0, 1 << 5)
    assert (findings["uffd tracking"].status == "ok") == userfaultfd(1, 1 << 12 | 1 << 13 | 1 << 15)


def test_packages_are_named_with_the_versions_that_are_imported() -> None:
    text = found()["packages"].finding
    versions = dict(part.split(" ") for part in text.split(", "))
    assert len(versions) >= 6
    for name, module in {"numpy": "numpy", "numba": "numba", "pydantic": "pydantic", "pyzmq": "zmq"}.items():
        assert versions[name] == importlib.import_module(module).__version__


def test_left_overs_are_named_with_the_way_out() -> None:
    assert found()["leftovers"].status == "ok"
    segment = Segment.create(segment_name("long-dead", "ram0"), 4096)
    try:
        runtime_root().mkdir(mode=0o700)
        machine_dir("long-dead").mkdir()
        finding = found()["leftovers"]
    finally:
        segment.close()
        machine_dir("long-dead").rmdir()
    assert (finding.status, finding.advice) == ("warn", "vmm gc long-dead")
    assert finding.finding.startswith("long-dead: 2 ")


def test_this_host_is_healthy() -> None:
    status, findings = doctor()
    assert status == 0
    assert healthy(examine())
    assert {f["status"] for f in findings.values()} <= {"ok", "warn", "absent"}
    assert findings["unicorn"]["status"] == "ok"


# --- hosts that have less -------------------------------------------------------------------------------------


def test_few_descriptors() -> None:
    _, findings = doctor("prlimit", "--nofile=512:600")
    assert findings["open files"] == {"name": "open files", "status": "warn", "finding": "512 (hard limit 600)",
                                      "advice": "ulimit -n 4096"}


def test_one_core() -> None:
    core = min(os.sched_getaffinity(0))
    _, findings = doctor("taskset", "-c", str(core))
    assert findings["cores"]["finding"].startswith("1;")


def test_no_assembler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found()["assembler"].status == "absent"
    for name in ("as", "ld"):
        (tmp_path / name).touch(mode=0o755)
    assert found()["assembler"].status == "ok"


@pytest.mark.root
def test_little_shared_memory() -> None:
    status, findings = doctor("unshare", "--mount", "sh", "-c",
                              'mount -t tmpfs -o size=300m tmpfs /dev/shm && exec "$@"', "sh")
    assert status == 0
    assert findings["/dev/shm"]["status"] == "warn"
    assert gibibytes(findings["/dev/shm"]["finding"]) == [0.3, 0.3]
    assert "remount" in findings["/dev/shm"]["advice"]


@pytest.mark.root
def test_no_kvm() -> None:
    status, findings = doctor("unshare", "--mount", "sh", "-c",
                              'mount --bind /dev/null /dev/kvm && exec "$@"', "sh")
    assert findings["kvm"]["status"] == "absent"
    assert "unicorn works" in findings["kvm"]["advice"]
    assert status == 0      # the software CPU is there


def as_nobody(home: Path) -> dict[str, dict[str, str]]:
    """The findings of a user without any rights."""
    script = ("import json, os, sys\nfrom vmm.client.doctor import examine\nexamine()\n"    # has read what it needs
              "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
              "print(json.dumps([f.as_dict() for f in examine()]))\n")
    environment = {k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False,
                          env=environment | {"HOME": str(home), "XDG_RUNTIME_DIR": "/nonexistent"})
    assert done.returncode == 0, done.stderr
    return {f["name"]: f for f in json.loads(done.stdout)}


@pytest.mark.root
def test_a_user_without_rights(runtime_dir: Path) -> None:
    home = runtime_dir / "home"
    home.mkdir(mode=0o700)
    findings = as_nobody(home)      # of somebody else: not even looked into
    assert findings["compiled loops"]["status"] == "warn"
    assert "XDG_CACHE_HOME" in findings["compiled loops"]["advice"]
    privileged = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    assert findings["post-copy"]["status"] == ("ok" if privileged else "absent")
    if not privileged:
        assert "vm.unprivileged_userfaultfd=1" in findings["post-copy"]["finding"]
    os.chown(home, 65534, 65534)
    runtime_dir.chmod(0o711)
    assert as_nobody(home)["compiled loops"]["status"] == "ok"        # ~/.cache can be made
    home.rmdir()


FULL = [Finding("kvm", "ok", ""), Finding("unicorn", "ok", ""), Finding("/dev/shm", "ok", "")]


@pytest.mark.parametrize(("change", "well"), [
    (lambda f: f, True),
    (lambda f: [f[0], f[2]], True),                                         # one accelerator is enough
    (lambda f: f[1:], True),
    (lambda f: [f[2]], False),
    (lambda f: [Finding("kvm", "absent", ""), Finding("unicorn", "absent", ""), f[2]], False),
    (lambda f: [*f, Finding("open files", "warn", "")], True),
    (lambda f: [*f, Finding("packages", "fail", "")], False),
])
def test_what_healthy_means(change: Callable[[list[Finding]], list[Finding]], well: bool) -> None:
    assert healthy(change(FULL)) is well


def test_a_runtime_directory_that_others_can_write_to(runtime_dir: Path) -> None:
    assert found()["runtime directory"] == Finding("runtime directory", "ok", str(runtime_dir / "shardvmm"))
    (runtime_dir / "shardvmm").mkdir()
    (runtime_dir / "shardvmm").chmod(0o777)
    status, findings = doctor()
    (runtime_dir / "shardvmm").rmdir()
    assert status == 1
    assert findings["runtime directory"]["status"] == "fail"
    assert "chmod 700" in findings["runtime directory"]["finding"]
