"""Tests of the LTP in a root of their own, natively and in machines: many of them one after the other, by a shell
script."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.programs.compare import made_root, vmm_run
from vmm.errors import VmmError

__all__ = ["Outcome", "Test", "found_tests", "inside", "natively", "root_of_tests"]

_ENVIRONMENT = {"PATH": "/ltp:/bin:/usr/bin:/usr/sbin", "HOME": "/root", "LC_ALL": "C", "TMPDIR": "/tmp",
                "LTPROOT": "/", "LTP_COLORIZE_OUTPUT": "n", "LTP_TIMEOUT_MUL": "3",
                "KCONFIG_SKIP_CHECK": "1"}
_ACCOUNTS = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/:/bin/sh\nbin:x:2:2:bin:/:/bin/sh\n" \
            "nobody:x:65534:65534:nobody:/:/bin/sh\n"
_GROUPS = "root:x:0:\ndaemon:x:1:\nbin:x:2:\nsys:x:3:\nusers:x:100:\nnobody:x:65534:\nnogroup:x:65533:\n"
#: In namespaces of its own, without what is the whole host's: its clock, its devices, its settings.
_NATIVE = ('set -e; mount -t tmpfs -o mode=1777 none "$0/tmp"; mount -t tmpfs -o mode=755 none "$0/dev"; '
           'for each in null:3 zero:5 full:7 random:8 urandom:9; do '
           'mknod -m 666 "$0/dev/${each%:*}" c 1 "${each#*:}"; done; '
           'mkdir -p "$0/dev/shm"; chmod 1777 "$0/dev/shm"; ip link set lo up; '
           'mount -t proc none "$0/proc"; mount --bind -o ro "$0/proc/sys" "$0/proc/sys"; '
           'mount -t sysfs -o ro none "$0/sys"; '
           'exec setpriv --bounding-set=-sys_time,-sys_boot,-sys_module,-sys_rawio chroot "$0" "$@"')
_NAMESPACES = ("--mount", "--pid", "--ipc", "--uts", "--net", "--cgroup", "--fork")
#: A test that takes too long is asked to end first: then it takes its children with it.
_SCRIPT = ('cd /tmp; limit=$0; for each in "$@"; do echo "@@ begin $each"; '
           'timeout -s INT -k 5 "$limit" sh -c "exec $each" < /dev/null 2>&1; echo "@@ end $?"; done')
_TIMED_OUT = (124, 137, 143, 130)
_WORDS = ("TPASS", "TFAIL", "TBROK", "TWARN", "TCONF")


@dataclass(frozen=True)
class Test:
    """``command``: as in LTP's runtest/syscalls. ``about``: the directory of its source."""

    name: str
    command: str
    about: str


@dataclass
class Outcome:
    """``code``: None: it did not end. ``words``: how often each was said."""

    code: int | None
    output: str
    words: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        bad = sum(self.words.get(word, 0) for word in ("TFAIL", "TBROK"))
        return self.code in (0, 4) and not bad and bool(self.words.get("TPASS"))

    @property
    def declined(self) -> bool:
        """It said that there is nothing to test."""
        return not self.words.get("TPASS") and bool(self.words.get("TCONF")) and self.code in (0, 32)

    @property
    def kind(self) -> str:
        if self.passed:
            return "passed"
        if self.declined:
            return "declined"
        return "did not end" if self.code is None or self.code in _TIMED_OUT else "failed"


def found_tests(built: Path, folders: Sequence[str]) -> list[Test]:
    """Those of some directories that were built."""
    programs = _programs(built, folders)
    tests = []
    for line in (built / "runtest" / "syscalls").read_text().splitlines():
        name, _, command = line.strip().partition(" ")
        program = command.split()[0] if command.strip() else ""
        if program in programs and not line.startswith("#"):
            tests.append(Test(name, command.strip(), programs[program].parent.name))
    return tests


def _programs(built: Path, folders: Sequence[str]) -> dict[str, Path]:
    found = {}
    for folder in folders:
        for path in sorted((built / "testcases" / "kernel" / "syscalls" / folder).glob("*")):
            if path.is_file() and os.access(path, os.X_OK) and path.read_bytes()[:4] == b"\x7fELF":
                found[path.name] = path
    return found


def root_of_tests(built: Path, folders: Sequence[str]) -> Path:
    """A root with the programs of some directories. Raises VmmError."""
    root = made_root(("ltp", "busybox-static"))
    for name in ("ltp", "etc", "tmp", "root", "proc", "sys", "dev"):
        (root / name).mkdir(exist_ok=True)
    (root / "etc" / "passwd").write_text(_ACCOUNTS)
    (root / "etc" / "group").write_text(_GROUPS)
    for name in ("sh", "timeout", "mount", "true", "cat", "echo"):
        if not (root / "bin" / name).exists():
            (root / "bin" / name).symlink_to("busybox")
    for name, path in _programs(built, folders).items():
        target = root / "ltp" / name
        if not target.exists() or target.stat().st_mtime != path.stat().st_mtime:
            shutil.copy2(path, target)
    return root


def _shell(tests: Sequence[Test], seconds: int) -> list[str]:
    return ["/bin/sh", "-c", _SCRIPT, str(seconds), *(test.command for test in tests)]


def natively(root: Path, tests: Sequence[Test], seconds: int) -> dict[str, Outcome]:
    command = ["unshare", *_NAMESPACES, "--kill-child", "sh", "-c", _NATIVE, str(root), *_shell(tests, seconds)]
    return _parsed(tests, _output(command, _ENVIRONMENT, seconds * (len(tests) + 2)))


def inside(root: Path, tests: Sequence[Test], seconds: int, *, memory: str = "768MiB",
           threads: int = 64) -> dict[str, Outcome]:
    """Those that have ended; the one after them has ended its machine, or hangs in a way that nothing ends."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        most = seconds * (len(tests) + 1)
        output = _output(vmm_run(root, _shell(tests, seconds), environment=_ENVIRONMENT, report=report, seconds=most,
                                 memory=memory, threads=threads), dict(os.environ), most + 60)
        found = _parsed(tests, output)
        if report.exists() and len(tests) == 1:
            said = json.loads(report.read_text()).get("program", {})
            for outcome in found.values():
                outcome.missing = said.get("missing_calls", {})
        return found


def _output(command: Sequence[str], environment: dict[str, str], seconds: float) -> str:
    """What it writes, as far as it comes in that time; in a file, which children that stay behind do not hold up."""
    with tempfile.TemporaryFile() as to:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=to, stderr=subprocess.STDOUT,
                                   env=environment)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(60)
        to.seek(0)
        return to.read().decode(errors="replace")


def _parsed(tests: Sequence[Test], output: str) -> dict[str, Outcome]:
    """By name. Raises VmmError, where nothing has begun."""
    found = {}
    parts = output.split("@@ begin ")
    if len(parts) == 1:
        raise VmmError(f"nothing was run: {output[-500:]}")
    for test, part in zip(tests, parts[1:], strict=False):
        text, mark, rest = part.partition("\n")[2].rpartition("@@ end ")
        if not mark:
            text = rest
        words = {word: len(re.findall(rf"\b{word}\b\s*:", text)) for word in _WORDS}
        found[test.name] = Outcome(int(rest.split()[0]) if mark else None, text, words)
    return found
