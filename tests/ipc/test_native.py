"""Machine code that is kept on disk: run only where nobody but this user and root can have put it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from ipc.bitmap import Bitmap, bitmap_bytes
from ipc.compiled import calls, loader
from ipc.shm import Segment
from vmm.client import doctor
from vmm.machine.names import segment_name

KEPT = loader._Kept("key", [])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The second place, after one that cannot be written to; mode 0700."""
    (tmp_path / "file").touch()
    path = tmp_path / "cache" / "shardvmm"
    monkeypatch.setattr(loader, "cache_directories", lambda source: [tmp_path / "file" / "__pycache__", path])
    loader._keep("source", KEPT)
    assert path.stat().st_mode & 0o777 == 0o700
    return path


def found() -> bool:
    return loader._find("source", "key") is not None


def test_what_was_kept_is_found_under_its_key(cache: Path) -> None:
    assert loader._find("source", "key") == KEPT
    assert loader._find("source", "another") is None
    assert loader._find("another", "key") is None
    assert [p.name for p in cache.iterdir()] == ["source.native"]


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
    loader._keep("source", KEPT)
    assert list(cache.iterdir()) == []
    assert not loader.trusted(cache)
    finding = doctor._compiled_loops()
    assert (finding.status, "only this user" in finding.advice) == ("warn", True)
    cache.chmod(0o700)
    assert doctor._compiled_loops().status == "ok"


def test_a_full_disk_leaves_no_half_a_file(cache: Path) -> None:
    resource = pytest.importorskip("resource")
    big = loader._Kept("key", [loader._Function("f", "f", "none", [], [], bytes(1 << 16))])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        loader._keep("source", big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in cache.iterdir()] == ["source.native"]
    assert (cache / "source.native").read_bytes() == msgspec.msgpack.encode(KEPT)


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
