"""The command line as a user has it: exit status, one-line errors, JSON."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import vmm, vmm_here
from machines import ACCELS, until
from places import TOP

from vmm.errors import ExitCode

REPLAYED = sorted((TOP / "configs").glob("replay-*.yaml"))
SWEEPS = (TOP / "configs").glob("stress*.yaml")     # not machines
CONFIGS = sorted(set((TOP / "configs").glob("*.yaml")) - {*SWEEPS, *REPLAYED})
TIMEOUT = 60


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


GOOD = "memory:\n  - size: 4MiB\nguest:\n  workload: hello\n"


def size_of(text: str) -> int:
    """As the samples write sizes."""
    number, unit = re.fullmatch(r"(\d+) ?([A-Za-z]+)", text).groups()      # type: ignore[union-attr]
    return int(number) * {"pages": 4096, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}[unit]


@pytest.mark.parametrize(("config", "accel"), [
    *(pytest.param(c, *a.values, marks=a.marks, id=f"{c.stem}-{a.values[0]}") for c in CONFIGS for a in ACCELS),
    *(pytest.param(c, "replay", id=c.stem) for c in REPLAYED)])
def test_every_config_runs_as_it_says(config: Path, accel: str) -> None:
    wanted = yaml.safe_load(config.read_text())
    fewer = []      # to see that it works, not for how long
    for param in {"writes", "passes"} & set(wanted.get("guest", {}).get("params", {})):
        fewer += ["--set", f"guest.params.{param}={wanted['guest']['params'][param] // 4}"]
    done = vmm("launch", str(config), "--json", "--set", f"accel={accel}", "--set", "timeout=200s", *fewer,
               timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["state"], report["exit_code"]) == ("ended", 0)
    pages = sum(size_of(m["size"]) // 4096 for m in wanted["memory"])
    fits = next((n for n in (1024 << i for i in range(6)) if n > pages + 576), 65536)
    ring = wanted.get("dirty_ring_size", fits)
    writes = config.stem != "hello"     # to its memory
    logged = bool(wanted.get("verify")) or accel == "replay"    # for nobody else
    assert (report["tracking"], report["ring_entries"]) == ("ring" if ring else "bitmap", ring)
    assert report["reaper"]["mode"] == wanted.get("reaper", {}).get("mode", "adaptive")
    assert len(report["vcpus"]) == wanted["vcpus"]
    for vcpu in report["vcpus"]:
        assert (vcpu["accelerator"], vcpu["exit_reason"], vcpu["exit_code"]) == (accel, "code", 0)
        assert vcpu["bad_entries"] == 0
        assert vcpu["dirty_pages"] > 0 or not (logged and ring and writes)
        assert vcpu["dirty_pages"] == 0 or logged
    assert report["logging"] == logged
    assert [(s["size"], s["logged"]) for s in report["slots"]] == [
        (size_of(m["size"]), m.get("log", True)) for m in wanted["memory"]]
    dirty = sum(s["dirty"] for s in report["slots"])
    if wanted.get("verify"):
        assert report["verification"]["ok"]
        assert report["verification"]["lost_pages"] == 0
        assert report["verification"]["surplus_pages"] == 0
        assert report["verification"]["dirty_pages"] > 0
        assert report["verification"]["rounds"] >= 1
    else:
        assert report["verification"] is None
        assert (dirty > 0) == (logged and writes)      # kept for whoever comes, since nobody has
    if not writes:
        for index in range(wanted["vcpus"]):
            assert f"[vcpu {index}] hello from vCPU {index} of {wanted['vcpus']}" in done.stderr
    if config.stem == "replay-256-rings":
        assert dirty >= 256 * wanted["replay"]["phases"][0]["writes"]       # each its own pages


@pytest.mark.parametrize(("text", "arguments", "fragments"), [
    (GOOD + "vcpsu: 2\n", [], ["m.yaml:5: vcpsu: unknown key", "did you mean 'vcpus'"]),
    (GOOD + "vcpus: two\n", [], ["m.yaml:5: vcpus: ", "got 'two'"]),
    (GOOD + "vcpus: 0\n", [], ["m.yaml:5: vcpus: "]),
    (GOOD + "vcpus: 257\n", [], ["m.yaml:5: vcpus: ", "256"]),
    (GOOD + "vcpus: 2\nvcpus: 3\n", [], ["m.yaml:6: vcpus: given twice"]),
    (GOOD + "dirty_ring_size: 1000\n", [],
     ["m.yaml:5: dirty_ring_size: ", "power of two from 1024 to 65536"]),
    (GOOD + "dirty_ring_size: 512\n", [], ["m.yaml:5: dirty_ring_size: ", "power of two from 1024 to 65536"]),
    (GOOD + "dirty_ring_size: 131072\n", [], ["power of two from 1024 to 65536"]),
    (GOOD + "timeout: soon\n", [], ["m.yaml:5: timeout: ", "is not a duration"]),
    (GOOD, ["--set", "memory.0.size=4095"], ["--set memory.0.size=4095: memory.0.size",
                                             "multiple of 4096"]),
    (GOOD, ["--set", "memory.1.size=4096"], ["--set memory.1.size=4096: memory has no item 1"]),
    (GOOD, ["--set", "vcpus"], ["--set vcpus: write key=value"]),
    (GOOD, ["--set", "guest.workload=helo"], ["unknown workload 'helo'", "did you mean 'hello'"]),
    (GOOD, ["--set", "guest.params.linse=1"],
     ["--set guest.params.linse=1: guest.params.linse: ", "has no parameter 'linse'", "did you mean 'lines'"]),
    (GOOD, ["--name", "No_Name"], ["invalid machine name 'No_Name'"]),
    (GOOD, ["--trace", "kvm_dirty_rings"], ["no such event", "kvm_dirty_ring_full"]),
    ("memory:\n  - size: 4MiB\n  - {gpa: 0x3ff000, size: 4MiB}\nguest: {workload: hello}\n", [],
     ["m.yaml:3: memory.1: ", "overlaps memory.0"]),
    ("memory:\n  - {gpa: 0xf0000000, size: 4MiB}\nguest: {workload: hello}\n", [],
     ["overlaps the system area"]),
    ("memory:\n  - {size: 4MiB}\nguest: {image: nothing.elf}\n", [],
     ["m.yaml:3: guest.image: ", "nothing.elf"]),
    ("memory:\n  - {size: 4MiB}\nguest: {image: m.yaml}\n", [], ["guest.image: ", "not an ELF file"]),
    ("memory:\n  - {gpa: 0x10000000, size: 4MiB}\nguest: {workload: hello}\n", [],
     ["guest.image: ", "no memory at 0x100000"]),
    ("memory:\n  - {size: 4MiB}\nguest: {image: loop}\n", [], ["m.yaml:3: guest.image: ", "loop", "symbolic links"]),
    ("memory: [{size: 4MiB}]\nguest: {workload: hello}\ntrace: [kvm_dirty_ring_full, nonsense]\n", [],
     ["m.yaml:3: trace.1: nonsense: no such event", "kvm_dirty_ring_full"]),
    (GOOD, ["--trace", "a\nb"], ["--trace a\\nb: no such event"]),
    (GOOD, ["--name", "a\nb"], ["--name a\\nb: "]),
    (GOOD, ["--memory", "4099B"], ["--memory 4099B: "]),
    (GOOD, ["--memory", "64M"], ["--memory 64M: ", "did you mean 64MiB"]),
    ("memory:\n  - {size: 4MiB\n", [], ["m.yaml:", "invalid YAML"]),
    ("- 1\n", [], ["must be a mapping"]),
])
def test_bad_input_is_one_clear_line(tmp_path: Path, text: str, arguments: list[str],
                                     fragments: list[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    config = write(tmp_path / "m.yaml", text)
    done = vmm_here("launch", config, *arguments)
    assert done.returncode == ExitCode.BAD_INPUT, done.stderr
    assert done.stdout == ""
    said, *shown = done.stderr.splitlines()
    assert said.startswith("vmm: error: ")
    assert len(shown) in (0, 2)         # the line that it is about, with a mark
    assert all(re.match(r" {2,}\d* \| ", line) for line in shown)
    for fragment in fragments:
        assert fragment in re.sub(r"(yaml:\d+):\d+: ", r"\1: ", said)      # but for the column


def test_missing_file_is_one_line() -> None:
    done = vmm("launch", "/nowhere/m.yaml")
    assert done.returncode == 2
    assert done.stderr == "vmm: error: /nowhere/m.yaml: cannot be read: No such file or directory\n"


@pytest.mark.kvm
def test_memory_larger_than_shm_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    config = write(tmp_path / "m.yaml", "memory:\n  - size: 4MiB\n  - {gpa: 0x100000000, size: 900GiB}\n"
                                        "guest: {workload: hello}\n")
    done = vmm("launch", config, "--set", "accel=kvm")
    assert done.returncode == 2
    assert "/dev/shm is too small" in done.stderr
    assert done.stderr.count("vmm: ") == 1


@pytest.mark.parametrize("verb", ["status", "pause", "resume", "stop", "sync"])
def test_verbs_on_nothing_say_so(verb: str) -> None:
    done = vmm_here(verb, "nobody")
    assert done.returncode == ExitCode.NO_MACHINE
    assert done.stderr == "vmm: error: no machine named 'nobody' (none is running)\n"


@pytest.mark.kvm
def test_the_verbs_on_a_detached_machine(tmp_path: Path) -> None:
    config = write(tmp_path / "m.yaml", "vcpus: 2\nmemory:\n  - size: 8MiB\nguest:\n  workload: random\n"
                                        "  params: {writes: 0, spin: 100}\n")

    def ask(*arguments: str) -> Any:
        done = vmm(*arguments, "--json")
        assert done.returncode == 0, (arguments, done.stderr)
        return json.loads(done.stdout)

    try:
        assert ask("launch", config, "--name", "back", "--detach") == {"name": "back"}
        assert [m["name"] for m in ask("list")] == ["back"]
        again = vmm("launch", config, "--name", "back")
        assert again.returncode == 2
        assert "'back' is already running" in again.stderr
        ask("sync", "back")
        ask("pause", "back")
        assert ask("sync", "back")["pages"] > 0
        assert ask("sync", "back")["pages"] == 0
        assert ask("status", "back")["state"] == "paused"
        ask("memory", "add", "back", "5", "0x10000000", "1MiB")
        assert [s["id"] for s in ask("status", "back")["slots"]] == [0, 5]
        ask("memory", "remove", "back", "5")
        ask("log", "stop", "back", "0")
        assert ask("status", "back")["slots"][0]["logged"] is False
        ask("resume", "back")
    finally:
        ask("stop", "back")
    assert ask("list") == []


@pytest.mark.kvm
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_machine_in_order_and_the_report_is_printed(tmp_path: Path, signum: int) -> None:
    config = write(tmp_path / "m.yaml", "vcpus: 2\nmemory:\n  - size: 8MiB\nguest:\n  workload: random\n"
                                        "  params: {writes: 0}\n")
    trace = tmp_path / "trace"
    process = subprocess.Popen([sys.executable, "-m", "vmm", "launch", config, "--json", "--trace",
                                "kvm_dirty_ring_reap", "--trace-file", str(trace)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: trace.exists() and trace.stat().st_size > 0, "the guest runs and is reaped")
    process.send_signal(signum)
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + signum, err
    assert {v["exit_reason"] for v in json.loads(out)["vcpus"]} == {"stopped"}
    assert err == ""


@pytest.mark.kvm
def test_trace_events_have_the_seeds_names_and_arguments(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    done = vmm("launch", str(TOP / "configs/tiny-ring.yaml"), "--json", "--trace", "kvm_dirty_ring_*",
               "--trace-file", str(trace), "--set", "guest.params.writes=5000", "--set", "reaper.mode=fixed",
               "--set", "accel=kvm", "--set", "verify=false")
    assert done.returncode == 0, done.stderr
    seen: dict[str, str] = {}
    pages = 0
    for line in trace.read_text().splitlines():
        stamp, event, *fields = line.split()
        float(stamp)
        seen.setdefault(event, " ".join(f.split("=")[0] for f in fields))
        pages += event == "kvm_dirty_ring_page"
    assert seen == {"kvm_dirty_ring_full": "id", "kvm_dirty_ring_reap_vcpu": "id",
                    "kvm_dirty_ring_page": "vcpu fetch offset", "kvm_dirty_ring_reaper": "s",
                    "kvm_dirty_ring_reap": "count t", "kvm_dirty_ring_reaper_kick": "reason"}
    assert pages == sum(v["dirty_pages"] for v in json.loads(done.stdout)["vcpus"])


def test_doctor_knows_this_host() -> None:
    done = vmm("doctor", "--json")
    findings = {f["name"]: f for f in json.loads(done.stdout)}
    assert done.returncode == 0
    assert findings["kvm"]["status"] == ("ok" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "absent")
    assert {"/dev/shm", "cores", "post-copy", "leftovers", "unicorn"} <= set(findings)


def test_help_schema_and_guests() -> None:
    assert "launch" in vmm("--help").stdout
    assert vmm_here("launch", "--no-such-option").returncode == 2
    assert "memory" in json.loads(vmm_here("schema").stdout)["properties"]
    assert "stamp" in json.loads(vmm_here("guests", "--json").stdout)


def test_a_reader_that_leaves_is_no_traceback() -> None:
    done = subprocess.run(f"{sys.executable} -m vmm schema | head -1", shell=True, capture_output=True,
                          text=True, timeout=TIMEOUT, check=False)
    assert done.stdout == "{\n"
    assert done.stderr == ""
