"""Points on a Ray cluster: on several nodes of this machine, one of which is lost; and ``vmm stress``, ``compare`` and
``predict`` on a Ray that they start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import vmm
from places import TESTS
from test_stress import interrupted, lines, sweep_file

from vmm.errors import VmmError
from vmm.lab.cluster.points import Stopped, run_points
from workers.accel import registry

RAY = [pytest.mark.ray, pytest.mark.timeout(240)]
ACCEL = "unicorn" if registry.available("kvm").reason else "kvm"


@pytest.fixture(autouse=True)
def rays_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray keeps its logs, its token, and which cluster there is. Its name is short, since those of sockets are
    limited."""
    with tempfile.TemporaryDirectory(prefix="svr-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("HOME", folder)      # of its token
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        (Path(folder) / "ray").mkdir()
        yield Path(folder) / "ray"


def on_nodes(what: str, directory: Path) -> Any:
    """What the function ``what`` of cluster_nodes.py found."""
    folder = TESTS / "lab"
    done = subprocess.run([sys.executable, str(folder / "cluster_nodes.py"), what, str(directory)], check=False,
                          capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestOnNodes:
    """Of a cluster on this machine."""

    pytestmark = RAY

    def test_the_points_of_a_lost_node_run_again_elsewhere(self, tmp_path: Path) -> None:
        found = on_nodes("lost_node", tmp_path)
        assert sorted(point for point, _ in found["results"]) == list(range(6))
        where = dict(found["results"])
        assert found["killed"] not in where.values()
        begun = [path.name.split("-")[1:] for path in tmp_path.glob("begun-*")]
        (lost,) = [int(point) for point, node in begun if node == found["killed"]]
        assert sorted(int(point) for point, _ in begun) == sorted([*range(6), lost])

    def test_a_sweep_survives_a_node_whose_machine_ends_with_it(self, tmp_path: Path) -> None:
        sweep_file(tmp_path / "s.yaml", accel=ACCEL, ring=[1024, 2048, 4096], seconds="3s", verify=False)
        found = on_nodes("lost_machines", tmp_path)
        assert vmm("gc").returncode == 0    # Ray kills a lost task's children, who may be cleaning up
        assert found == {"complete": True, "errors": ["", "", ""], "figures": [1, 1, 1]}
        assert len(lines(tmp_path / "out")) == 3

    def test_a_point_that_measures_time_has_its_node_for_itself(self, tmp_path: Path) -> None:
        found = on_nodes("whole", tmp_path)
        for name in ("host", "cpus"):
            assert found[f"{name} whole"] == [False] * 8
            assert found[f"{name} shared"] == [True, True]

    def test_what_cannot_be_is_said_once(self, tmp_path: Path) -> None:
        (own, code), (kvm, _), (cores, _) = on_nodes("errors", tmp_path)
        assert (own, code) == ("point 1 cannot be", 5)
        assert kvm.startswith("no node of the cluster has the resource kvm, which '1' needs")
        assert "\n" not in kvm
        assert cores == "the cluster has no node with 3 CPUs for '1'"
        assert len(list(tmp_path.glob("begun-*"))) == 1     # it is not run again


class TestStress:
    """``vmm stress --cluster``."""

    pytestmark = RAY

    def test_a_sweep_is_interrupted_and_carried_on_with_nothing_left(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        config = sweep_file(tmp_path / "s.yaml", accel=ACCEL, vcpus=[1, 2], verify=False, seconds="2s")
        first = interrupted(config, out, "--cluster", "local", patience=100.0)
        assert first["host"] == os.uname().nodename
        assert first["figures"][0]["pages_per_s"] > 0
        done = vmm("stress", "--resume", "--output", str(out), "--cluster", "local", timeout=120.0)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("already measured") == 1
        both = lines(out)
        assert both[0] == first
        assert [r["point"]["vcpus"] for r in both] == [1, 2]
        again = vmm("stress", "--resume", "--output", str(out), "--cluster", "127.0.0.1:1")     # there is nothing to do
        assert again.returncode == 0, again.stderr
        assert lines(out) == both

    @pytest.mark.parametrize(("address", "message"), [
        ("127.0.0.1:1", "no cluster at 127.0.0.1:1: Connection refused"),
        ("a..b:1", "no cluster at a..b:1: not a valid host name"),
        ("auto", "no cluster at auto: this host is not a node of one"),
        ("ray://here:10001", "--cluster: 'ray://here:10001' is not an address: auto, local, or HOST:PORT")])
    def test_no_cluster_is_said_in_a_line(self, address: str, message: str, tmp_path: Path) -> None:
        config = sweep_file(tmp_path / "s.yaml", accel="unicorn")
        done = vmm("stress", config, "--output", str(tmp_path / "out"), "--cluster", address)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


class TestOthers:
    """``vmm compare`` and ``vmm predict`` with ``--cluster``."""

    pytestmark = RAY

    def test_a_comparison_is_measured_on_the_cluster_and_kept(self, tmp_path: Path) -> None:
        small = ("compare", "--accel", ACCEL, "--ram", "8MiB", "--vcpus", "1", "--spin", "0,200", "--ring", "1024",
                 "--interval", "20ms", "--rounds", "1", "--window", "300ms", "--tracking", "bitmap", "--json",
                 "--output", str(tmp_path))
        done = vmm(*small, "--cluster", "local", timeout=120.0)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert [(row["spin"], row["mode"]) for row in found["rows"]] == [
            (0, "none"), (0, "bitmap"), (200, "none"), (200, "bitmap")]
        assert all(row["speed"] > 0 for row in found["rows"])
        kept = json.loads((tmp_path / "results.json").read_text())
        assert set(kept["hosts"].values()) == {os.uname().nodename}
        again = vmm(*small)     # here, and with nothing left to measure
        assert json.loads(again.stdout) == found

    def test_predictions_are_the_same_wherever_they_are_made(self, tmp_path: Path) -> None:
        config = tmp_path / "replay.yaml"
        config.write_text("accel: replay\nmemory: [{size: 64MiB}]\nreplay: {pattern: random, rate: 20000}\n")
        assert vmm("launch", str(config), "--name", "foretold", "--detach").returncode == 0
        trace = tmp_path / "trace"
        try:
            assert vmm("trace", "record", "foretold", str(trace), "--time", "1s").returncode == 0
        finally:
            vmm("stop", "foretold")
        grid = ("predict", "--trace", str(trace), "--bandwidth", "100MB/s", "--bandwidth", "1GB/s", "--downtime",
                "10ms", "--downtime", "300ms", "--json")
        here, there = vmm(*grid), vmm(*grid, "--cluster", "local", timeout=120.0)
        assert there.returncode == 0, there.stderr
        assert json.loads(there.stdout) == json.loads(here.stdout)
        assert [(cell["bandwidth"], cell["downtime_limit"]) for cell in json.loads(there.stdout)["grid"]] == [
            (1e8, 10.0), (1e8, 300.0), (1e9, 10.0), (1e9, 300.0)]


@pytest.mark.ray
@pytest.mark.parametrize("variable", [None, "", "auto"])
def test_the_cluster_that_this_host_was_a_node_of_is_gone(
        variable: str | None, rays_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Ray's own variable may name, or leave open."""
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    (rays_files / "ray_current_cluster").write_text("127.0.0.1:1\n")
    with pytest.raises(VmmError, match=r"^no cluster at 127\.0\.0\.1:1: Connection refused"):
        list(run_points([1], lambda point, stop, progress: point, address="auto"))


def test_without_ray_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(VmmError, match=r"--cluster needs ray.*pip install 'shardvmm\[cluster\]'"):
        list(run_points([1], lambda point, stop, progress: point, address="local"))


def test_here_each_point_is_done_when_its_result_is_asked_for() -> None:
    begun: list[int] = []

    def work(point: int, stop: Any, progress: Any) -> int:
        if stop():
            raise Stopped
        begun.append(point)
        progress("squaring")
        return point * point

    told: list[tuple[int, str]] = []
    results = run_points([3, 1, 2], work, stop=lambda: len(begun) == 2,
                         progress=lambda point, doing: told.append((point, doing)))
    assert next(results) == (3, 9)
    assert begun == [3]
    assert next(results) == (1, 1)
    with pytest.raises(Stopped):
        next(results)
    assert told == [(3, "squaring"), (1, "squaring")]


def test_faults_are_of_this_host(tmp_path: Path) -> None:
    done = vmm("stress", "--faults", "1", "--cluster", "local", "--output", str(tmp_path))
    assert done.returncode == 2
    assert "--faults: cannot be used with --cluster" in done.stderr
