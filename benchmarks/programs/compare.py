"""A program natively and in a machine, from the same root: what it printed, how it ended, what it left in /out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmm.client.debian import make_root
from vmm.errors import VmmError

__all__ = ["SCRIPTS", "Case", "Ran", "inside", "made_root", "natively", "prepared", "run_natively", "version_of",
           "vmm_run"]

_TOP = Path(__file__).parents[2]
_ROOTS = _TOP / ".packages" / "roots"
SCRIPTS = Path(__file__).with_name("scripts")
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/usr/games", "HOME": "/root", "LC_ALL": "C"}
#: In namespaces of its own, with what a machine has: empty /tmp and /out, /dev, /proc.
_NATIVE = ('for each in tmp out run; do mount -t tmpfs -o mode=755 none "$0/$each"; done; mount --rbind /dev "$0/dev"; '
           'mount -t proc none "$0/proc"; mount -t sysfs none "$0/sys" 2> /dev/null; exec chroot "$0" "$@"')

_BUILD = 'mount --rbind /dev "$0/dev"; mount -t proc none "$0/proc"; exec chroot "$0" "$@"'


@dataclass
class Case:
    """``root``: its name, and the packages that make it. ``differs``: what may be different from run to run, each
    with what is put in its place. ``prepare``: called with the root, once. ``package``: whose
    version is told (its name, if there is none), in another root if that is given."""

    name: str
    what: str
    root: tuple[str, ...]
    command: Sequence[str]
    memory: str = "128MiB"
    threads: int = 4
    package: str = ""
    root_of_package: tuple[str, ...] = ()
    differs: Sequence[tuple[str, str]] = ()
    prepare: Callable[[Path], None] | None = None
    typed: bytes = b""
    seconds: float = 600.0
    remark: str = ""


@dataclass
class Ran:
    """``report``: of the machine."""

    code: int
    output: bytes
    error: bytes
    seconds: float
    report: dict[str, Any] = field(default_factory=dict)

    def compared(self, differs: Sequence[tuple[str, str]]) -> str:
        text = f"{self.output.decode(errors='replace')}\n--- exit status {self.code}\n"
        for pattern, instead in differs:
            text = re.sub(pattern, instead, text, flags=re.MULTILINE)
        return text


def made_root(root: tuple[str, ...]) -> Path:
    """Of its name and packages; made where it is not there. Raises VmmError."""
    name, *packages = root
    folder = _ROOTS / name
    if not folder.exists():
        names = make_root(folder, packages, lambda text: print(f"{name}: {text}", flush=True))
        _note_versions(folder, names)
    return folder


def _note_versions(folder: Path, names: Sequence[str]) -> None:
    shown = subprocess.run(["apt-cache", "show", "--no-all-versions", *names], capture_output=True, text=True,
                           check=True)
    found = re.findall(r"^Package: (\S+)$.*?^Version: (\S+)$", shown.stdout, re.MULTILINE | re.DOTALL)
    (folder / ".versions").write_text(json.dumps(dict(found)))


def version_of(case: Case) -> str:
    """Of the package, as it was when the root was made."""
    folder = _ROOTS / (case.root_of_package or case.root)[0]
    versions: dict[str, str] = json.loads((folder / ".versions").read_text())
    return versions.get(case.package or case.name, "")


def prepared(case: Case) -> Path:
    """Its root. Raises VmmError."""
    root = made_root(case.root)
    for folder in ("out", "bench"):
        (root / folder).mkdir(exist_ok=True)
    for each in SCRIPTS.iterdir():
        (root / "bench" / each.name).write_bytes(each.read_bytes())
    if case.prepare is not None:
        case.prepare(root)
    return root


def run_natively(root: Path, command: Sequence[str], environment: dict[str, str]) -> None:
    """Something that makes what is to be run. Raises VmmError."""
    done = subprocess.run(["unshare", "--mount", "sh", "-c", _BUILD, str(root), *command], capture_output=True,
                          env=_ENVIRONMENT | environment, text=True, check=False)
    if done.returncode:
        raise VmmError(f"{command[0]}: {done.stderr[-200:]}")


def natively(root: Path, case: Case) -> Ran:
    began = time.monotonic()
    done = subprocess.run(["unshare", "--mount", "--pid", "--fork", "sh", "-c", _NATIVE, str(root), *case.command],
                          input=case.typed, capture_output=True, env=_ENVIRONMENT, timeout=case.seconds, check=False)
    code = done.returncode if done.returncode >= 0 else 128 - done.returncode
    return Ran(code, done.stdout, done.stderr, time.monotonic() - began)


def vmm_run(root: Path, command: Sequence[str], *options: str, environment: dict[str, str], report: Path,
            seconds: float, memory: str, threads: int) -> list[str]:
    """The command line that runs it in a machine, for so long at most."""
    return [sys.executable, "-m", "vmm", "run", "--root", str(root), *options, "--report-json", str(report),
            "--timeout", f"{seconds:.0f}s",
            *(word for name, value in environment.items() for word in ("--env", f"{name}={value}")),
            "--memory", memory, "--threads", str(threads), "--", *command]


def inside(root: Path, case: Case) -> Ran:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        began = time.monotonic()
        done = subprocess.run(
            vmm_run(root, case.command, "--verify", environment=_ENVIRONMENT, report=report, seconds=case.seconds,
                    memory=case.memory, threads=case.threads),
            input=case.typed, capture_output=True, timeout=case.seconds + 60, check=False, env=dict(os.environ))
        found = json.loads(report.read_text()) if report.exists() else {}
        return Ran(done.returncode, done.stdout, done.stderr, time.monotonic() - began, found)
