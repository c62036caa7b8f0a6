"""vmm compare: what it makes of its windows, and one small run of it all."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from command import vmm_here as vmm
from needs import missing
from rich.console import Console
from terminal import read_tables

from vmm.lab.compare.measure import Grid, Point, available, summarise
from vmm.lab.compare.report import draw, print_rows, verdict

POINT = Point(ram_mib=64, vcpus=2, spin=0, ring=4096, interval_ms=100.0)


def window(mode: str, number: int, speed: float, pages: int = 1000, **more: Any) -> dict[str, Any]:
    return {"mode": mode, "round": number, "speed": speed, "seconds": 0.5, "pages": pages, "syncs": 5,
            "host_ns": 2_000_000, "steal_ns": 0, "collect_ms": [1.0, 3.0, 2.0], "switch_ms": 4.0,
            "tracking": mode, **more}


def test_ratios_are_of_one_round() -> None:
    """The host got half as fast after the first round: no mode looks the slower for it."""
    windows = [window("none", 0, 1000, 0, collect_ms=[], syncs=0), window("ring", 0, 500), window("bitmap", 0, 800),
               window("auto", 0, 720), window("none", 1, 500, 0, collect_ms=[], syncs=0), window("ring", 1, 250),
               window("bitmap", 1, 400), window("auto", 1, 360)]
    rows = {r["mode"]: r for r in summarise(POINT, windows)}
    assert rows["ring"]["relative"] == pytest.approx(0.5)
    assert rows["ring"]["relative_low"] == rows["ring"]["relative_high"] == pytest.approx(0.5)
    assert rows["ring"]["lost_us"] == pytest.approx(0.5 * 0.5 * 2 * 1e6 / 1000)
    assert rows["ring"]["host_us"] == pytest.approx(2.0)
    assert rows["bitmap"]["collect_ms"] == 2.0
    assert rows["bitmap"]["stale_ms"] == 102.0
    assert rows["none"]["collect_ms"] is None
    assert rows["auto"]["best_fixed"] == "bitmap"
    assert rows["auto"]["of_best"] == pytest.approx(0.9)
    lines = verdict(list(rows.values()))
    assert lines[0] == "fastest fixed mode: bitmap at 1 of 1 points"
    assert lines[1].startswith("auto compared with the best fixed mode: 0.900 at worst (64 MiB, 2 vCPUs, spin 0, ")


def test_the_grid_varies_one_axis_at_a_time_beside_the_main_ones() -> None:
    grid = Grid(ram_mib=(64, 128), vcpus=(1, 2), spin=(0, 9), ring=(4096, 1024), interval_ms=(100, 10))
    points = list(grid.points())
    assert len({p for p, _ in points}) == len(points) == 2 * 2 + 2 + 2 * 2 + 2
    assert [modes for p, modes in points if p.ring == 1024] == [("none", "ring")] * 2


@pytest.mark.parametrize("width", [80, 120, 190])
def test_the_table_can_be_read(width: int) -> None:
    windows = [window("none", 0, 98_765_432.0, 0, collect_ms=[], syncs=0),
               window("ring", 0, 49_382_716.0, 7_654_321)]
    file = io.StringIO()
    print_rows(summarise(POINT, windows), Console(file=file, width=width))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    rows = read_tables(text, "tracking")
    assert rows["none"]["writes/s"] == "98,765,432"
    assert (rows["none"]["dirty/s"], rows["none"]["collect ms"]) == ("-", "-")
    ring = rows["ring"]
    assert (ring["writes/s"], ring["vs none"], ring["spread"]) == ("49,382,716", "0.500", "0.50-0.50")
    assert (ring["dirty/s"], ring["collect ms"], ring["stale ms"]) == ("15,308,642", "2.00", "102.0")
    assert (rows["none"]["RAM"], rows["none"]["vCPUs"], rows["none"]["interval"]) == ("64 MiB", "2", "100 ms")


def test_pictures(tmp_path: Path) -> None:
    rows = []
    for spin in (0, 100):
        point = Point(64, 1, spin, 4096, 100.0)
        rows += summarise(point, [window("none", 0, 10, 0, collect_ms=[], syncs=0), window("ring", 0, 5)])
    assert [p.name for p in draw(rows, tmp_path)] == ["tracking-spin.png"]
    assert (tmp_path / "tracking-spin.png").read_bytes().startswith(b"\x89PNG")


def test_a_mode_that_cannot_be_had_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipc.writelog.write_log_missing", lambda: "userfaultfd: no")
    there, left_out = available(["none", "bitmap", "uffd"], "unicorn")
    assert there == ["none", "bitmap"]
    assert left_out == {"uffd": "tracking uffd: userfaultfd: no (use ring, bitmap or auto)"}


def test_a_small_comparison_is_kept_and_carried_on(tmp_path: Path) -> None:
    small = ("compare", "--accel", "auto", "--ram", "8MiB", "--vcpus", "1", "--spin", "0", "--ring", "1024",
             "--interval", "20ms", "--rounds", "1", "--window", "50ms", "--json", "--output", str(tmp_path))
    done = vmm(*small)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    modes = ["none", "sampling", "idle", "auto", "bitmap", "ring", *([] if missing("uffd") else ["uffd"])]
    rows = {r["mode"]: r for r in found["rows"]}
    assert list(rows) == modes
    for row in rows.values():
        assert row["speed"] > 0
        assert (row["dirty_per_s"] > 0) == (row["mode"] not in ("none", "idle"))
    assert set(rows["auto"]["tracking"]) <= {"ring", "bitmap"}
    again = vmm(*small)
    assert json.loads(again.stdout) == found        # nothing was measured again
    other = vmm(*small[:-3], "--rounds", "2", "--output", str(tmp_path))
    assert other.returncode == 2
    assert "was measured with other settings" in other.stderr


@pytest.mark.parametrize(("arguments", "error"), [
    (("--ram", "1MiB"), "--ram 1MiB: must be a comma-separated list of sizes in whole MiB, at least 8MiB each"),
    (("--ring", "1000"), "--ring 1000: must be a power of two from 1024 to 65536"),
    (("--tracking", "ring,dream"),
     "--tracking dream: unknown mode; choose from sampling, idle, auto, bitmap, ring, uffd"),
    (("--interval", "never"), "--interval: 'never' is not a duration"),
])
def test_what_is_wrong_is_one_line(arguments: tuple[str, str], error: str) -> None:
    done = vmm("compare", *arguments)
    assert done.returncode == 2
    assert error in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("content", "error"), [
    (b"[1]", "was not written by this version"), (b"{", "was not written by this version"),
    (b'{"version": 1, "settings": {}, "points": {}}', "was not written by this version"),
    (b"[" * 5000, "was not written by this version"),
    (b'{"version": 2, "settings": {}, "points": {}}', "was measured with other settings"),
    (bytes(65 << 20), "is too large")], ids=["list", "torn", "older", "deep", "settings", "large"])
def test_results_that_are_not_ours_are_left_alone(content: bytes, error: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(content)
    done = vmm("compare", "--quick", "--output", str(tmp_path))
    assert done.returncode == 2
    assert error in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (tmp_path / "results.json").read_bytes() == content
