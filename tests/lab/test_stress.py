"""More and more vCPU processes over one RAM, with the verifier on: the proof that it scales without loss. And
``vmm stress``, which measures it."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from command import vmm_here as vmm
from hypothesis import given
from hypothesis import strategies as st
from machines import ACCELS, exact, spec, until
from places import CONFIGS
from rich.console import Console
from terminal import read_tables

from vmm.client.config import ConfigError, MachineConfig
from vmm.client.machine import Machine
from vmm.lab.stress.measure import Figures, Proof
from vmm.lab.stress.model import fit_terms
from vmm.lab.stress.report import print_results
from vmm.lab.stress.run import run
from vmm.lab.stress.sweep import Point, PointResult, Settings, Sweep, load_results, load_sweep


@pytest.mark.stress
@pytest.mark.timeout(180)
@pytest.mark.parametrize("vcpus", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("accel", ACCELS)
def test_no_page_is_lost_however_many_vcpus(accel: str, vcpus: int) -> None:
    """Rings of 1,024 entries overflow often, pages belong to every vCPU in turn, rounds stop everybody."""
    writes = 160_000 // vcpus
    machine_spec = spec("stamp", accel=accel, vcpus=vcpus, ring=1024, mib=32, verify=exact(0.1), timeout=120.0,
                        writes=writes, spin=50)
    with Machine.launch(machine_spec) as machine:
        report = machine.wait(150.0)
    result = report["verification"]
    assert result["lost_pages"] == 0, result
    assert result["surplus_pages"] == 0, result
    assert result["rounds"] >= 2
    assert report["exit_code"] == 0
    assert len(report["vcpus"]) == vcpus
    assert len({v["pid"] for v in report["vcpus"]}) == vcpus
    assert all(0 < v["dirty_pages"] <= writes for v in report["vcpus"])
    assert all(v["ring_rebuilds"] == 0 and v["bad_entries"] == 0 for v in report["vcpus"])


# --- vmm stress -----------------------------------------------------------------------------------------

#: One vCPU, a small machine, short windows: what a point needs to be one.
QUICK = {"vcpus": 1, "ram": "16MiB", "seconds": "200ms", "warm_up": "50ms", "flushes": 3,
         "verify": {"interval": "50ms"}}


def sweep_file(path: Path, **keys: Any) -> str:
    path.write_text(yaml.safe_dump({**QUICK, **keys}))
    return str(path)


def lines(directory: Path) -> list[dict[str, Any]]:
    path = directory / "results.jsonl"
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line] if path.is_file() else []


@pytest.mark.timeout(240)
@pytest.mark.parametrize("accel", ACCELS)
def test_a_sweep_ends_with_figures_fits_and_pictures(accel: str, tmp_path: Path) -> None:
    repeat = 2 if accel == "kvm" else 1     # a fit needs more points than terms
    config = sweep_file(tmp_path / "s.yaml", accel=accel, vcpus=[1, 2], ring=[1024], repeat=repeat, flushes=6,
                        workload=[{"name": "stamp", "params": {"spin": 200}}])
    done = vmm("stress", config, "--output", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["complete"]
    assert document["lost_pages"] == document["surplus_pages"] == 0
    assert [r["point"]["vcpus"] for r in document["results"]] == [1, 2] * repeat
    for result in document["results"]:
        figures, proof = result["figures"][0], result["proof"][0]
        assert figures["pages_per_s"] > 0
        assert figures["pages_per_s"] == pytest.approx(figures["reaped_per_s"])
        assert 0 <= figures["stalled_share"] < 1
        assert len(figures["flushes"]) == 6
        assert figures["launch_s"] > 0
        assert figures["coordinator_cpu"] > 0
        assert figures["worker_pss_mib"] > 1
        assert proof["rounds"] >= 3
        assert proof["dirty"] > 0
    quantities = {f["quantity"] for f in document["model"]}
    assert "memory beyond RAM" in quantities if repeat > 1 else not quantities
    for picture in ("throughput", "stalls", "ring-full-exits", "flush"):
        assert (tmp_path / "out" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
    again = vmm("stress", "--resume", "--output", str(tmp_path / "out"))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("already measured") == 2 * repeat
    assert len(lines(tmp_path / "out")) == 2 * repeat


def test_a_lost_page_is_exit_status_1(tmp_path: Path) -> None:
    config = sweep_file(tmp_path / "s.yaml", accel="unicorn", workload="stamp",
                        verify={"interval": "50ms", "inject": "lost"})
    done = vmm("stress", config, "--output", str(tmp_path / "out"))
    assert done.returncode == 1, done.stderr
    assert "1 dirtied pages were LOST" in done.stdout
    assert "slot 0 page" in done.stdout
    assert "1 pages lost" in done.stderr


def test_a_point_that_fails_says_why_and_is_measured_again(tmp_path: Path) -> None:
    """The guest ends in the window: its writes are counted."""
    config = sweep_file(tmp_path / "s.yaml", accel="unicorn",
                        workload={"name": "random", "params": {"writes": 100}})
    sweep = load_sweep(Path(config))
    for attempt in (1, 2):
        (result,), complete = run(sweep, tmp_path / "out")
        assert complete
        assert "the machine ended during the measurement" in result.error
        assert result.exit_code
        assert len(lines(tmp_path / "out")) == attempt


def interrupted(config: str, out: Path, *options: str, patience: float) -> dict[str, Any]:
    """The result of the first of a sweep's two points, at which it was interrupted."""
    with subprocess.Popen([sys.executable, "-m", "vmm", "stress", config, "--output", str(out), *options],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: len(lines(out)) == 1, "the first point", patience)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "1 of 2 points are done" in stdout
    first, = lines(out)
    return first


@pytest.mark.timeout(240)
def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = sweep_file(tmp_path / "s.yaml", accel="unicorn", vcpus=[1, 2], verify=False)
    first = interrupted(config, out, "--seconds", "0.5", patience=60.0)
    with (out / "results.jsonl").open("ab") as file:
        file.write(b'{"point": {"acc')      # as a crash leaves it
    done = vmm("stress", config, "--output", str(out), "--seconds", "0.5")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("already measured") == 1
    both = lines(out)
    assert both[0] == first
    assert [r["point"]["vcpus"] for r in both] == [1, 2]
    other = vmm("stress", config, "--output", str(out), "--vcpus", "1")     # another window: another point
    assert other.returncode == 0, other.stderr
    assert "already measured" not in other.stderr


def test_two_machines_at_once(tmp_path: Path) -> None:
    sweep = load_sweep(None, {"machines": ("--machines 2", 2), **{k: (k, v) for k, v in QUICK.items()},
                              "accel": ("--accel unicorn", "unicorn")})
    results, complete = run(sweep, tmp_path)
    assert complete
    assert len(results) == 1
    assert len(results[0].figures) == len(results[0].proof) == 2
    assert all(f.pages_per_s > 0 for f in results[0].figures)
    assert results[0].lost == 0
    assert load_results(tmp_path) == results


@pytest.mark.parametrize(("text", "message"), [
    ("vcpus: [1, two]", "s.yaml:1: vcpus.1: input should be a valid integer"),
    ("vcpus: 1\nring: [4096, 1000]", "s.yaml:2: ring.1: must be a power of two from 1024 to 65536"),
    ("vcpus:\n  - 1\n  - 300", "s.yaml:3: vcpus.1: input should be less than or equal to 256"),
    ("vcpsu: 1", "s.yaml:1: vcpsu: unknown key (did you mean 'vcpus'?)"),
    ("verify: {injct: lost}", "s.yaml:1: verify.injct: unknown key (did you mean 'inject'?)"),
    ("accel: [unicorn, kmv]", "s.yaml:1: accel.1: input should be 'auto', 'kvm'"),
    ("accel: unicorn\nworkload:\n  - random\n  - {name: randm}",
     "s.yaml:4: workload.1: unknown workload 'randm' (did you mean 'random'?)"),
    ("accel: unicorn\nworkload: {name: random, params: {spni: 1}}", "s.yaml:2: workload.0: workload random has no"),
    ("accel: unicorn\nworkload: counter", "s.yaml:2: workload.0: counter ends by itself"),
    ("accel: unicorn\nmachine: {stack_size: 3}", "s.yaml:2: machine: stack_size: must be a multiple of 16 bytes"),
    ("machine:\n  vcpus: 3", "s.yaml:2: machine.vcpus: is set by the sweep: use vcpus"),
    ("reaper: []", "s.yaml:1: reaper: "),
    ("seconds: soon", "s.yaml:1: seconds: 'soon' is not a duration"),
])
def test_a_sweep_that_cannot_run_says_where(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError) as error:
        load_sweep(tmp_path / "s.yaml")
    assert message in re.sub(r"(yaml:\d+):\d+: ", r"\1: ", str(error.value))       # but for the column


def test_flags_win_over_the_file_and_are_named(tmp_path: Path) -> None:
    config = Path(sweep_file(tmp_path / "s.yaml", accel="unicorn", vcpus=[1, 2]))
    assert [p.vcpus for p in load_sweep(config, {"vcpus": ("--vcpus 3", [3])}).points()] == [3]
    with pytest.raises(ConfigError, match=r"^--ring 5: must be a power of two .*\(got 5\)"):
        load_sweep(config, {"ring": ("--ring 5", [5])})


@pytest.mark.kvm
def test_the_sample_sweeps_can_run_here() -> None:
    for path in CONFIGS.glob("stress*.yaml"):
        assert len(load_sweep(path).points()) > 1


@pytest.mark.parametrize("width", [80, 120, 180])
def test_the_table_of_a_sweep_can_be_read(width: int) -> None:
    """Each figure whole, in its column and on its point's line; a point that failed says so."""
    point = Point(accel="kvm", workload="stamp", params=(("spin", 200.0),), ram=1 << 40, ring=65536,
                  reaper="adaptive", dirty_limit=None, machines=1, vcpus=1, repetition=0)
    settings = Settings(seconds=1.0, warm_up=0.5, flushes=2, verify=None, machine={})
    big = Figures(**dict.fromkeys(Figures.__dataclass_fields__, 1.0) | {      # type: ignore[arg-type]
        "pages_per_s": 123_456_789.4, "ring_full_per_s": 9_876.54, "stalled_share": 0.98765, "launch_s": 12.34,
        "worker_pss_mib": 4_321.0, "coordinator_cpu": 0.777, "flushes": [(1_234_560.0, 5), (9_876_543.0, 5)]})
    proof = Proof(rounds=3, checked=10, dirty=9, lost=17, surplus=4, ok=False, findings=["slot 0 page 0x5"])
    results = [PointResult(replace(point, vcpus=n), settings, [big], [proof]) for n in (1, 256)]
    results.append(PointResult(replace(point, vcpus=4), settings, [], [], "the machine ended " * 9, 6))
    file = io.StringIO()
    print_results(results, Console(file=file, width=width))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    rows = read_tables(text)
    assert set(rows) == {"1", "256", "4"}
    for vcpus in ("1", "256"):
        row = rows[vcpus]
        assert (row["pages/s"], row["ring full/s"], row["stalled %"]) == ("123,456,789", "9876.5", "98.77")
        assert (row["flush ms"], row["worst"], row["launch s"]) == ("5555.55", "9876.5", "12.34")
        assert (row["coord. %"], row["PSS MiB"], row["lost"]) == ("77.7", "4321.0", "17, 4 surplus")
    assert rows["4"]["pages/s"] == "failed"
    for part in ("accel kvm", "workload stamp spin 200", "RAM 1 TiB", "ring 65,536", "reaper adaptive"):
        assert part in " ".join(text.split())


def test_every_accelerator_of_a_machine_can_be_swept() -> None:
    """None is left out by a list of the sweep's own."""
    for accel in get_args(MachineConfig.model_fields["accel"].annotation):
        assert Sweep.model_validate({"accel": accel}).accel == [accel]


@given(st.integers(0, 1000), st.floats(0.1, 100), st.floats(1e-3, 10))
def test_the_fit_finds_what_the_figures_were_made_of(seed: int, per_vcpu: float, per_page: float) -> None:
    random = np.random.default_rng(seed)
    vcpus, pages = random.integers(1, 17, 40).astype(float), random.integers(0, 100_000, 40).astype(float)
    values = 50 + per_vcpu * vcpus + per_page * pages
    terms, r2, left_out, free = fit_terms({"vCPU": vcpus, "page": pages, "RAM": np.full(40, 7.0)}, values)
    assert {t.name: t.value for t in terms} == pytest.approx({"constant": 50, "vCPU": per_vcpu, "page": per_page},
                                                             rel=1e-4, abs=1e-3)
    assert (left_out, free) == (["RAM"], [])
    assert r2 == pytest.approx(1, abs=1e-6)
    assert fit_terms({"vCPU": vcpus}, 100 - vcpus)[3] == ["vCPU"]       # nothing costs less than nothing
    assert fit_terms({"vCPU": vcpus[:1]}, values[:1])[0] == []
