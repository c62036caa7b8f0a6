"""Real programs, on a processor in this process, against the same natively: what they print, how they end."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cpu import Machine, Ran
from packages import unpacked

from workers.linux.sources import HostTree
from workers.linux.vfs import FileSystem


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a static program of many: busybox."""
    folder = tmp_path_factory.mktemp("root")
    for name in ("bin", "dev", "proc", "sys", "tmp"):
        (folder / name).mkdir()
    shutil.copy(unpacked("busybox-static") / "bin/busybox", folder / "bin/busybox")
    (folder / "data").write_text("".join(f"{number} {number * number}\n" for number in range(500)))
    return folder


def inside(root: Path, *arguments: str, typed: bytes = b"") -> Ran:
    def fill(files: FileSystem) -> None:
        files.attach("root", tree)
        files.import_tree(files.root, "root")

    with contextlib.closing(HostTree(root)) as tree:
        return Machine(typed=typed, fill=fill).run(b"/bin/busybox", [b"busybox", *map(os.fsencode, arguments)],
                                                   [b"PATH=/bin", b"HOME=/"])


@pytest.mark.parametrize("arguments", [
    ["echo", "hello", "world"], ["true"], ["false"], ["sh", "-c", "exit 7"], ["sh", "-c", "echo $((6*7))"],
    ["cat", "/data"], ["wc", "/data"], ["sort", "-rn", "/data"], ["md5sum", "/data"], ["sha256sum", "/data"],
    ["grep", "-c", "9", "/data"], ["sed", "-n", "s/1/x/gp", "/data"], ["awk", "{ s += $2 } END { print s }", "/data"],
    ["head", "-n", "3", "/data"], ["tail", "-c", "20", "/data"], ["tr", "a-z", "A-Z"],
    ["dd", "if=/data", "bs=7", "count=3"], ["ls", "/"], ["stat", "-c", "%s %F", "/data"],
    ["basename", "/a/b"], ["seq", "1", "5"], ["expr", "3", "+", "4"],
    ["cat", "/no/such"], ["sh", "-c", "for i in 1 2 3; do echo $i; done > /tmp/x; read a < /tmp/x; echo $a"]],
    ids=" ".join)
def test_busybox(root: Path, arguments: list[str]) -> None:
    text = b"some words\n"
    native = subprocess.run(["unshare", "-R", str(root), "/bin/busybox", *arguments], input=text, capture_output=True,
                            check=False, env={"PATH": "/bin", "HOME": "/"}, timeout=60)
    ran = inside(root, *arguments, typed=text)
    assert ran.code == native.returncode << 8
    assert sorted(ran.printed.splitlines()) == sorted((native.stdout + native.stderr).splitlines())
