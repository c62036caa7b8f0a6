"""A root for Linux programs made of Debian packages: downloaded with all that they need, unpacked and not installed.
This host's own packages do not matter, and nothing of it is changed."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import VmmError

__all__ = ["make_root"]

_TOOLS = ("apt-get", "dpkg-deb", "tar")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.:-]*")
_PLANNED = re.compile(r"^Inst (\S+) ", re.MULTILINE)
_TIMEOUT = 1800.0           # seconds, of one command
_AT_ONCE = 30               # packages that are downloaded by one command
_MERGED = ("bin", "sbin", "lib", "lib64")       # links to what is in /usr, as on every Debian since 12
_FOLDERS = {"dev": 0o755, "proc": 0o755, "sys": 0o755, "run": 0o755, "tmp": 0o1777, "root": 0o700, "etc": 0o755}
#: What the scripts of packages would make, as far as programs look for it.
_FILES = {"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
          "etc/group": "root:x:0:\nnogroup:x:65534:\n",
          "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
          "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n"}


def make_root(directory: Path, packages: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """The packages that are in it then, those that others need among them. ``say`` is told what is done. The directory
    is there whole, or not at all. Raises VmmError."""
    for tool in _TOOLS:
        if not shutil.which(tool):
            raise VmmError(f"{tool} is not there: a root of packages can be made on Debian and its like only")
    for package in packages:
        if not _PACKAGE.fullmatch(package):
            raise VmmError(f"{package[:60]!a} is not the name of a package")
    if directory.exists():
        raise VmmError(f"{directory}: already exists")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as aside:
            return _make(directory, Path(aside), packages, say)
    except OSError as exc:
        raise VmmError(f"{directory}: {exc.strerror or exc}") from None


def _make(directory: Path, aside: Path, packages: Sequence[str], say: Callable[[str], None]) -> list[str]:
    names = _needed(aside, packages)
    say(f"downloading {len(names)} packages")
    downloads, root = aside / "packages", aside / "root"
    downloads.mkdir()
    for at in range(0, len(names), _AT_ONCE):
        _run(["apt-get", "download", *names[at:at + _AT_ONCE]], downloads)
    say("unpacking them")
    _lay_out(root)
    for package in sorted(downloads.glob("*.deb")):
        _unpack(package, root)
    for name, text in _FILES.items():
        if not (root / name).exists():
            (root / name).write_text(text)
    root.rename(directory)
    return names


def _needed(aside: Path, packages: Sequence[str]) -> list[str]:
    """All that would be installed where nothing is yet."""
    nothing = aside / "status"
    nothing.touch()
    planned = _run(["apt-get", "--simulate", "-o", f"Dir::State::status={nothing}", "-o",
                    "APT::Install-Recommends=false", "install", *packages], aside)
    return _PLANNED.findall(planned)


def _lay_out(root: Path) -> None:
    for name, mode in _FOLDERS.items():
        (root / name).mkdir(parents=True)
        (root / name).chmod(mode)
    for name in _MERGED:
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")


def _unpack(package: Path, root: Path) -> None:
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as reader:
        _run(["tar", "-x", "--keep-directory-symlink", "--no-same-owner"], root, stdin=reader.stdout)


def _run(command: Sequence[str], directory: Path, stdin: object = None) -> str:
    """What it prints. Raises VmmError with what it says last when it fails."""
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=_TIMEOUT,
                              stdin=stdin)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        raise VmmError(f"{command[0]}: not done within {_TIMEOUT:.0f} s") from None
    if done.returncode:
        said: list[str] = []
        with contextlib.suppress(IndexError):
            said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        raise VmmError(f"{command[0]} failed: {said[0] if said else f'exit status {done.returncode}'}")
    return str(done.stdout)
