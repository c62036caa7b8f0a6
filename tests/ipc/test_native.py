"""Machine code that is kept on disk: run only where nobody but this user and root can have put it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from machines import ANY
from places import CONFIGS, TOP

from ipc.bitmap import Bitmap, bitmap_bytes
from ipc.compiled import calls, kept, loader
from ipc.shm import Segment
from vmm.client import doctor
from vmm.machine.names import segment_name

KEPT = kept.Kept("key", [])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The second place, after one that cannot be written to; mode 0700."""
    (tmp_path / "file").touch()
    path = tmp_path / "cache" / "shardvmm"
    monkeypatch.setattr(kept, "cache_directories", lambda source: [tmp_path / "file" / "__pycache__", path])
    kept.keep("source", KEPT)
    assert path.stat().st_mode & 0o777 == 0o700
    return path


def found() -> bool:
    return kept.find("source", "key") is not None


def test_what_was_kept_is_found_under_its_key(cache: Path) -> None:
    assert kept.find("source", "key") == KEPT
    assert kept.find("source", "another") is None
    assert kept.find("another", "key") is None
    assert [p.name for p in cache.iterdir()] == ["source.native"]
    assert (cache / "source.native").stat().st_mode & 0o777 == 0o644     # as Python's own, where the program is all's


@pytest.mark.parametrize("spoil", [
    lambda cache: cache.chmod(0o770), lambda cache: cache.chmod(0o707),
    lambda cache: (cache / "source.native").chmod(0o620), lambda cache: (cache / "source.native").chmod(0o602),
    lambda cache: ((cache / "source.native").rename(cache / "x"), (cache / "source.native").symlink_to("x")),
    lambda cache: ((cache / "source.native").unlink(), os.mkfifo(cache / "source.native")),
    lambda cache: (cache / "source.native").write_bytes(b"junk"),
])
def test_what_others_could_have_written_is_not_run(spoil: Callable[[Path], object], cache: Path) -> None:
    spoil(cache)
    assert not found()


@pytest.mark.parametrize("what", ["", "source.native"])
def test_what_is_another_users_is_not_run(what: str, cache: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can make a file that is another user's")
    os.chown(cache / what, 12345, -1)
    assert not found()


def test_nothing_is_kept_where_others_write(cache: Path) -> None:
    (cache / "source.native").unlink()
    cache.chmod(0o777)
    kept.keep("source", KEPT)
    assert list(cache.iterdir()) == []
    assert not kept.trusted(cache)
    finding = doctor._compiled_loops()
    assert (finding.status, "only this user" in finding.advice) == ("warn", True)
    cache.chmod(0o700)
    assert doctor._compiled_loops().status == "ok"


def test_a_full_disk_leaves_no_half_a_file(cache: Path) -> None:
    resource = pytest.importorskip("resource")
    big = kept.Kept("key", [kept.Function("f", "f", "none", [], [], bytes(1 << 16))])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        kept.keep("source", big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in cache.iterdir()] == ["source.native"]
    assert (cache / "source.native").read_bytes() == msgspec.msgpack.encode(KEPT)


@pytest.mark.parametrize("accel", ANY)
def test_the_first_launch_keeps_the_loops_for_those_that_follow(accel: str, tmp_path: Path) -> None:
    """A coordinator cannot write beside its program once it is confined. Each launch took three seconds longer."""
    for name in ("ipc", "vmm", "workers"):
        shutil.copytree(TOP / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "vmm", "launch", str(CONFIGS / "quickstart.yaml"), "--name", "test-native",
         "--set", f"accel={accel}", "--set", "guest.params.writes=100"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True, text=True, timeout=120.0)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "ipc/compiled/__pycache__/ipc.compiled.loops.native").exists()


@pytest.mark.parametrize("known", [True, False], ids=["this Numba", "another"])
def test_loops_run_whichever_numba_compiled_them(monkeypatch: pytest.MonkeyPatch, cache: Path, known: bool) -> None:
    """What the loader takes from Numba beside its documented interface may go: nothing is kept then, and all works.
    With the one that is installed it is kept."""
    if not known:
        monkeypatch.setattr(loader, "_object_code", lambda compiled: None)
    native = loader.Native("ipc.compiled.loops", "ipc.compiled.atomics")
    assert (cache / "ipc.compiled.loops.native").exists() == known
    monkeypatch.setattr(calls, "_native", native)
    with Segment.create(segment_name("test-native", "bitmaps"), 2 * bitmap_bytes(1000)) as segment:
        a, b = Bitmap(segment, 0, 1000), Bitmap(segment, bitmap_bytes(1000), 1000)
        a.mark_range(3, 500)
        assert calls.publish(a, b) == 500
        assert (a.count(), b.count()) == (0, 500)
