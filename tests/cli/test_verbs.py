"""Verbs of the command line on running machines: what they do, what they print for people, and their JSON.
(Errors and exit statuses are in test_cli.py.)"""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
import zmq.auth
from click.testing import CliRunner, Result
from command import vmm
from machines import ANY, spec, until
from terminal import Terminal, on_a_terminal, read_tables

from ipc.shm import Segment, list_segments
from vmm.cli.commands import cli
from vmm.client.machine import Machine, list_machines
from vmm.consumers import workingset
from vmm.errors import ExitCode, VmmError
from vmm.machine.names import machine_dir, machine_prefix, runtime_root, segment_name

PAGE = 4096
TIMEOUT = 60.0
NAME = "verbs"


@pytest.fixture(params=ANY)
def accel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def machine(accel: str) -> Iterator[Machine]:
    """Two vCPUs that write at random for ever, not too fast for anybody."""
    busy = spec("random", accel=accel, name=NAME, mib=8, writes=0, spin=500, timeout=None)
    with Machine.launch(busy) as made:
        yield made


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def said(*arguments: str | Path) -> str:
    """Standard output of a verb that succeeds."""
    done = run(*arguments)
    assert done.exception is None, done.exception
    return str(done.stdout)


def answered(*arguments: str | Path) -> Any:
    """Its JSON."""
    return json.loads(said(*arguments, "--json"))


def says(found: dict[str, Any], **fields: Any) -> bool:
    """It has these fields; others may be beside them."""
    return found | fields == found


def refused(*arguments: str | Path) -> str:
    """The error of a verb that does not."""
    done = run(*arguments)
    assert isinstance(done.exception, VmmError), done.output
    return str(done.exception)


# --- slots --------------------------------------------------------------------------------------------------------


def test_memory_and_log(machine: Machine) -> None:
    assert said("memory", "add", NAME, "5", "0x10000000", "1MiB") == "verbs: slot 5 added\n"
    assert says(answered("memory", "add", NAME, "6", "512MiB", "8192", "--no-log"), name=NAME, slot=6, done="added")
    slots = {s["id"]: s for s in machine.status()["slots"]}
    assert (slots[5]["gpa"], slots[5]["size"], slots[5]["logged"]) == (0x1000_0000, 1 << 20, True)
    assert (slots[6]["gpa"], slots[6]["size"], slots[6]["logged"]) == (512 << 20, 8192, False)
    machine.register("c")
    machine.write(0x1000_0000, b"x")
    assert machine.sync("c").slots[5] == [(0, 1)]
    assert said("memory", "remove", NAME, "5") == "verbs: slot 5 removed\n"
    assert says(answered("memory", "remove", NAME, "6"), name=NAME, slot=6, done="removed")
    assert [s["id"] for s in machine.status()["slots"]] == [0]
    assert said("log", "stop", NAME, "0") == "verbs: slot 0 is not logged\n"
    machine.sync("c")
    assert machine.sync("c").pages == 0
    assert machine.status()["slots"][0]["logged"] is False
    assert said("log", "start", NAME, "0") == "verbs: slot 0 is logged\n"
    until(lambda: machine.sync("c").pages > 0, "the guest is logged again")
    assert says(answered("log", "stop", NAME, "0"), name=NAME, slot=0, logged=False)
    assert says(answered("log", "start", NAME, "0"), name=NAME, slot=0, logged=True)


def test_sync_prints_the_ranges_that_it_returns(machine: Machine) -> None:
    machine.pause()
    said("memory", "add", NAME, "5", "0x10000000", "1MiB")
    said("sync", NAME, "--client", "me")
    machine.write(0x1000_2000, b"x" * PAGE * 3)
    machine.write(0x1000_9000, b"x")
    text = said("sync", NAME, "--client", "me")
    assert text.startswith("verbs, client me: 4 pages dirty (16 KiB), in 2 ranges\nslot 0: 0 pages dirty\n")
    assert text[text.index("slot 5"):].splitlines() == [
        "slot 5: 4 pages dirty", "    0x2-0x4 (3 pages)", "    0x9 (1 page)"]
    machine.write(0x1000_9000, b"x")
    assert says(answered("sync", NAME, "--client", "me"), name=NAME, client="me", pages=1,
                slots={"0": [], "5": [[9, 1]]})


def test_sync_prints_no_more_ranges_than_are_asked_for(machine: Machine) -> None:
    machine.pause()
    said("memory", "add", NAME, "5", "0x10000000", "1MiB")
    said("sync", NAME, "--client", "me")

    def synced(*options: str) -> list[str]:
        for page in range(0, 60, 2):
            machine.write(0x1000_0000 + page * PAGE, b"x")
        return said("sync", NAME, "--client", "me", *options).splitlines()

    ranges = [f"    {page:#x} (1 page)" for page in range(0, 60, 2)]
    assert synced()[3:] == [*ranges[:10], "    and 20 more ranges (--all prints them)"]
    assert synced("--ranges", "0")[3:] == ["    and 30 more ranges (--all prints them)"]
    assert synced("--all")[3:] == synced("--ranges", "30")[3:] == ranges
    for page in range(0, 60, 2):
        machine.write(0x1000_0000 + page * PAGE, b"x")
    assert len(answered("sync", NAME, "--client", "me")["slots"]["5"]) == 30


# --- life ---------------------------------------------------------------------------------------------------------


def test_pause_resume_stop(accel: str) -> None:
    Machine.launch(spec("random", accel=accel, name=NAME, mib=4, writes=0, timeout=None), detach=True).detach()
    try:
        with Machine.attach(NAME) as attached:
            assert said("pause", NAME).startswith("verbs is paused")
            assert attached.status()["state"] == "paused"
            assert says(answered("resume", NAME), name=NAME, done="resume")
            assert attached.status()["state"] == "running"
    finally:
        stopped = said("stop", NAME)
    assert "verbs" in stopped
    assert list_machines() == []


# --- dirty rate, limit, tracking ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ring", "bitmap", "sampling"])
def test_dirty_rate(machine: Machine, mode: str) -> None:
    arguments = ("dirty-rate", NAME, "--time", "100ms", "--mode", mode)
    found = answered(*arguments)
    assert (found["name"], found["mode"]) == (NAME, mode)
    assert found["seconds"] >= 0.1
    assert found["pages_per_s"] == pytest.approx(found["pages"] / found["seconds"])
    assert found["mib_per_s"] == pytest.approx(found["pages_per_s"] / 256)
    assert len(found["vcpus"]) == (2 if mode == "ring" else 0)
    lines = said(*arguments).splitlines()
    assert len(lines) == 1 + len(found["vcpus"])
    for index, line in enumerate(lines[:-1]):
        mib, pages = rates(line)
        assert line.startswith(f"vCPU {index}: ")
        assert mib == pytest.approx(pages / 256, abs=0.06)
    whole = re.search(r"^machine: .* \(([\d,]+) distinct pages.*in ([\d.]+) s, (\w+)\)$", lines[-1])
    assert whole is not None, lines
    mib, pages = rates(lines[-1])
    assert mib == pytest.approx(pages / 256, abs=0.06)
    assert pages == pytest.approx(number(whole[1]) / float(whole[2]), rel=0.1, abs=1.0)     # of a rounded time
    assert whole[3] == mode


def rates(line: str) -> tuple[float, int]:
    found = re.search(r"([\d.]+) MiB/s +([\d,]+) pages/s", line)
    assert found is not None, line
    return float(found[1]), number(found[2])


def number(text: str) -> int:
    assert re.fullmatch(r"\d{1,3}(,\d{3})*", text), text
    return int(text.replace(",", ""))


def test_dirty_rate_chooses_a_mode_that_the_machine_has(machine: Machine) -> None:
    def mode() -> str:
        return str(answered("dirty-rate", NAME, "--time", "50ms")["mode"])

    assert mode() == "ring"
    machine.set_tracking("bitmap")
    assert mode() == "bitmap"
    machine.set_tracking("none")
    assert mode() == "sampling"
    machine.set_tracking("auto")
    assert mode() == "ring"
    assert "50 ms to 60 s" in refused("dirty-rate", NAME, "--time", "10ms")


def test_dirty_rate_watches_until_the_machine_ends(machine: Machine) -> None:
    with Terminal("dirty-rate", NAME, "--time", "50ms", "--watch", columns=120) as terminal:
        terminal.wait_for("machine: ", times=3)
        machine.stop()
        assert terminal.wait() == 0
        assert terminal.text.count("machine: ") * 4 == len(terminal.text.splitlines())      # and when


def test_dirty_limit(machine: Machine) -> None:
    def limits() -> list[int]:
        return [v["dirty_limit_pages_per_s"] for v in machine.status()["vcpus"]]

    assert said("dirty-limit", "set", NAME, "20MB/s") == (
        "verbs: each vCPU limited to 20.0 MB/s (19.1 MiB/s), 4,883 pages/s\n")
    assert limits() == [4883, 4883]     # 20e6 / 4096
    assert says(answered("dirty-limit", "set", NAME, "1MiB/s", "--vcpu", "1"), name=NAME, vcpu=1, pages_per_s=256)
    assert limits() == [4883, 256]
    until(lambda: machine.status()["vcpus"][1]["throttled_s"] > 0, "vCPU 1 is held back")
    found = answered("dirty-limit", "query", NAME, "--time", "100ms")
    assert [(v["index"], v["limit_mb_per_s"]) for v in found["vcpus"]] == [
        (0, pytest.approx(20.0, abs=0.001)), (1, pytest.approx(1.048576))]
    assert found["vcpus"][1]["throttled_s"] > 0
    lines = said("dirty-limit", "query", NAME, "--time", "100ms").splitlines()
    assert len(lines) == 2
    for line, limit in zip(lines, ("20.0", "1.0"), strict=True):
        assert re.fullmatch(rf"vCPU \d: limit {limit} MB/s, now \d+\.\d MB/s, .* \d+\.\d\d s.*", line), line
    (one,) = answered("dirty-limit", "query", NAME, "--vcpu", "1", "--time", "50ms")["vcpus"]
    assert one["index"] == 1
    assert said("dirty-limit", "cancel", NAME, "--vcpu", "0").startswith("verbs: vCPU 0 ")
    assert limits() == [0, 256]
    assert says(answered("dirty-limit", "cancel", NAME), name=NAME, vcpu=None, pages_per_s=0)
    assert limits() == [0, 0]
    assert "limit none" in said("dirty-limit", "query", NAME, "--time", "50ms")


def test_dirty_limits_that_cannot_be(machine: Machine) -> None:
    assert "there is no vCPU 7" in refused("dirty-limit", "set", NAME, "20MB/s", "--vcpu", "7")
    assert "there is no vCPU 7" in refused("dirty-limit", "query", NAME, "--vcpu", "7", "--time", "50ms")
    assert "less than one page" in refused("dirty-limit", "set", NAME, "1")
    assert "rate: 'fast'" in refused("dirty-limit", "set", NAME, "fast").lower()
    assert [v["dirty_limit_pages_per_s"] for v in machine.status()["vcpus"]] == [0, 0]


def test_tracking(machine: Machine) -> None:
    line = said("tracking", NAME, "bitmap")
    assert re.fullmatch(r"verbs: tracking bitmap, was ring \(paused for \d+\.\d ms\)\n", line)
    found = answered("tracking", NAME, "none")
    assert (found["name"], found["before"], found["tracking"], found["asked"]) == (NAME, "bitmap", "none", "none")
    assert said("tracking", NAME, "auto").startswith("verbs: tracking auto (currently ring), was none")
    assert machine.status()["tracking_asked"] == "auto"


# --- working set ----------------------------------------------------------------------------------------------


def test_working_set(machine: Machine, tmp_path: Path) -> None:
    files = [tmp_path / f"w.{kind}" for kind in ("npz", "png", "html")]
    arguments = ("working-set", NAME, "--interval", "50ms", "--time", "300ms", "--output", files[0])
    found = answered(*arguments, "--png", files[1], "--html", files[2])
    recording = workingset.load(files[0])
    counts = recording.dirty_pages()
    assert recording.intervals == len(counts) == found["intervals"] >= 1
    assert found["most_pages"] == counts.max() > 0
    assert found["mean_pages"] == pytest.approx(counts.mean())
    assert found["output"] == str(files[0])
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "<html" in files[2].read_text()
    line = said(*arguments)
    counts = workingset.load(files[0]).dirty_pages()
    words = re.fullmatch(
        rf"{files[0]}: (\d+) intervals of [\d.]+ m?s, ([\d,]+) dirty pages per interval on average, "
        r"([\d,]+) at most\n", line)
    assert words is not None, line
    assert (int(words[1]), number(words[3])) == (len(counts), counts.max())
    assert number(words[2]) == pytest.approx(counts.mean(), abs=0.51)
    assert "is longer than --time" in refused("working-set", NAME, "--interval", "2s", "--time", "1s", "--output",
                                              files[0])


# --- snapshots ------------------------------------------------------------------------------------------------


def test_snapshot_verbs(accel: str, machine: Machine, tmp_path: Path) -> None:
    chain = tmp_path / "chain"
    pages = (8 << 20) // PAGE + 3
    assert said("snapshot", "create", NAME, chain) == f"{chain}/0001: {pages:,} pages, full\n"
    second = answered("snapshot", "create", NAME, chain, "--incremental", "--live", "--compress", "zstd")
    assert says(second, id="0002", parent="0001", machine=NAME, accelerator=accel, vcpus=2, live=True,
                compression="zstd")
    assert 0 < second["pages"] < pages
    third = said("snapshot", "create", NAME, chain, "--incremental")
    words = re.fullmatch(rf"{chain}/0003: ([\d,]+) pages since 0002\n", third)
    assert words is not None, third
    listed = answered("snapshot", "list", chain)
    assert [(s["id"], s["parent"], s["pages"]) for s in listed] == [
        ("0001", None, pages), ("0002", "0001", second["pages"]), ("0003", "0002", number(words[1]))]
    rows = read_tables(said("snapshot", "list", chain))
    for snapshot in listed:
        row = " ".join(rows[snapshot["id"]].values())
        for part in (snapshot["parent"] or "full", snapshot["created"], NAME, accel, f"{snapshot['pages']:,}",
                     snapshot["compression"]):
            assert part in row
    assert said("snapshot", "verify", chain).startswith(f"{chain}/0003: verified")
    assert answered("snapshot", "verify", chain, "0002")["id"] == "0002"
    assert "needed by 0003" in refused("snapshot", "delete", chain, "0002", "--force")
    assert said("snapshot", "merge", chain, "0002", "--force") == f"{chain}/0002: {pages:,} pages, full\n"
    assert [s["id"] for s in answered("snapshot", "list", chain)] == ["0002", "0003"]
    assert said("snapshot", "create", NAME, chain, "--incremental").startswith(f"{chain}/0004: ")
    assert said("snapshot", "delete", chain, "0004", "--force") == f"{chain}/0004: deleted\n"
    assert says(answered("snapshot", "delete", chain, "0003", "--force"), id="0003", done="delete")
    assert says(answered("snapshot", "restore", chain, "--name", "restored", "--accel", accel, "--detach"),
                name="restored")
    try:
        with Machine.attach("restored") as restored:
            assert restored.status()["accelerator"] == accel
            restored.register("c")
            until(lambda: restored.sync("c").pages > 0, "the restored guest runs")
    finally:
        said("stop", "restored")


def test_progress_of_snapshots_as_json_lines(machine: Machine, tmp_path: Path) -> None:
    chain = tmp_path / "chain"
    restore = ["restore", str(chain), "--name", "restored", "--accel", "unicorn"]
    try:
        for arguments, ended in ((["create", NAME, str(chain)], {"id": "0001", "machine": NAME}),
                                 (["verify", str(chain)], {"id": "0001"}),
                                 ([*restore, "--detach"], {"name": "restored"}),
                                 (["delete", str(chain), "0001", "--force"], {"id": "0001", "done": "delete"})):
            done = vmm("snapshot", *arguments, "--json-lines")
            assert done.returncode == 0, done.stderr
            *progress, end = [json.loads(line) for line in done.stdout.splitlines()]
            assert says(end, event="end", **ended)
            assert all(says(line, event="progress") and 0 <= line["done"] <= line["total"] for line in progress)
            assert arguments[0] == "delete" or progress[-1]["done"] == progress[-1]["total"] > 0
    finally:
        said("stop", "restored")
    assert "needs --detach" in refused("snapshot", *restore, "--json-lines")


@pytest.mark.parametrize(("verb", "said"), [
    (["working-set", NAME, "--time", "300ms", "--output"], b"dirty pages per interval"),
    (["trace", "record", NAME, "--time", "300ms"], b" entries in ")])
def test_a_recording_on_standard_output_is_that_and_nothing_else(machine: Machine, verb: list[str],
                                                                 said: bytes) -> None:
    done = subprocess.run([sys.executable, "-m", "vmm", *verb, "/dev/stdout"], capture_output=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert said not in done.stdout
    assert done.stdout
    assert "/dev/stdout: is where --json goes, too" in refused(*verb, "/dev/stdout", "--json")


def test_a_full_disk_under_json_lines_is_said_when_the_work_is_done(machine: Machine, tmp_path: Path) -> None:
    chain = tmp_path / "chain"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "vmm", "snapshot", "create", NAME, str(chain), "--json-lines"],
                              stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (
        ExitCode.OUTPUT, "vmm: error: standard output: cannot be written: No space left on device\n")
    assert [each["id"] for each in answered("snapshot", "list", chain)] == ["0001"]


def test_a_list_of_snapshots_on_a_narrow_terminal(tmp_path: Path) -> None:
    with Machine.launch(spec("idle", accel="unicorn", mib=4, milliseconds=0, timeout=None)) as machine:
        said("snapshot", "create", machine.name, tmp_path)
    (snapshot,) = answered("snapshot", "list", tmp_path)
    row = " ".join(read_tables(on_a_terminal("snapshot", "list", str(tmp_path), columns=80))["0001"].values())
    assert snapshot["created"] in row
    assert f"{snapshot['pages']:,}" in row


# --- keys, garbage --------------------------------------------------------------------------------------------


def test_keys_are_a_pair_and_the_secret_one_is_its_owners(tmp_path: Path) -> None:
    found = answered("keys", tmp_path / "new", "host-a")
    public, secret = Path(found["public"]), Path(found["secret"])
    assert (public.name, secret.name) == ("host-a.key", "host-a.key_secret")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    open_key, none = zmq.auth.load_certificate(public)
    both, hidden = zmq.auth.load_certificate(secret)
    assert none is None
    assert hidden is not None
    assert open_key == both == zmq.curve_public(hidden)
    assert hidden not in public.read_bytes()
    text = said("keys", tmp_path / "new", "host-b")
    assert [Path(line).name for line in text.splitlines()] == ["host-b.key", "host-b.key_secret"]
    assert zmq.auth.load_certificate(tmp_path / "new" / "host-b.key")[0] != open_key
    (tmp_path / "file").touch()
    assert "file" in refused("keys", tmp_path / "file" / "x", "host-c")


def dead(name: str) -> list[str]:
    """What a machine that died leaves: two segments and a folder."""
    left = [Segment.create(segment_name(name, what), PAGE) for what in ("ram0", "control")]
    for segment in left:
        segment._owner = False
        segment.close()
    runtime_root().mkdir(mode=0o700, exist_ok=True)
    machine_dir(name).mkdir()
    return [segment.name for segment in left]


def test_gc_of_one_of_all_and_of_nothing() -> None:
    for name in ("dead-one", "dead-two"):
        dead(name)
    with Machine.launch(spec("idle", accel="unicorn", name=NAME, milliseconds=0, timeout=None)) as machine:
        text = said("gc", "dead-one")
        assert text.endswith("3 removed\n")
        assert text.count("removed ") == 3
        assert list_segments(machine_prefix("dead-one")) == []
        assert len(list_segments(machine_prefix("dead-two"))) == 2
        assert len(answered("gc")["removed"]) == 3
        assert not machine_dir("dead-two").exists()
        assert said("gc") == "nothing was left behind\n"
        assert answered("gc") == {"removed": []}
        assert "is running" in refused("gc", NAME)
        assert machine.status()["state"] == "running"
        assert np.any(machine.ram(0))
