"""What a person reads: every number whole, in the right row and column, at the width that the terminal has."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import ACCELS, exact, replace, spec
from places import TOP
from rich.console import Console
from rich.text import Text
from terminal import Terminal, on_a_terminal, read_tables

from vmm.cli.text import doctor_table, machines_table, print_report, progress_text
from vmm.client.doctor import Finding
from vmm.client.machine import Machine
from vmm.machine.report import Report, report_schema
from vmm.machine.spec import RamSlot
from vmm.tables import print_table, screen, size_text, table

WIDTHS = (80, 120)
wide = pytest.mark.parametrize("width", WIDTHS)


def shown(width: int, draw: Any) -> str:
    """What ``draw(console)`` leaves on a screen so wide; no line of it is longer, and nothing is cut."""
    file = io.StringIO()
    draw(Console(file=file, width=width, highlight=False))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width, text
    assert "…" not in text, text
    return text


def number(text: str) -> int:
    assert re.fullmatch(r"\d{1,3}(,\d{3})*|\d+", text), text
    return int(text.replace(",", ""))


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


# --- tables that do not fit -------------------------------------------------------------------------------------


@given(width=st.integers(40, 160), rows=st.integers(1, 4),
       columns=st.lists(st.integers(1, 30), min_size=1, max_size=12), text=st.text("abc ", max_size=60))
def test_a_table_keeps_every_cell_at_any_width(width: int, rows: int, columns: list[int], text: str) -> None:
    """Cells of the lengths in ``columns``, in as many parts as it takes; a text folds."""
    names = [f"c{i}" for i in range(len(columns))]
    made = table("row", numbers=names, texts=("text",))
    wanted = {}
    for row in range(rows):
        cells = [str(9 - row) * length for length in columns]
        made.add_row(f"r{row}", *cells, text)
        wanted[f"r{row}"] = dict(zip(names, cells, strict=True))
    found = read_tables(shown(width, lambda console: print_table(made, console)))
    assert list(found) == list(wanted)
    for row_name, cells_of in wanted.items():
        assert {name: found[row_name][name] for name in names} == cells_of
        assert squeezed(found[row_name]["text"]) == squeezed(text)


def test_a_table_that_fits_stays_in_one_piece() -> None:
    made = table("name", numbers=("a", "b"), title="things")
    made.add_row("x", "1", "2")
    text = shown(80, lambda console: print_table(made, console))
    assert text.count("┏") == 1
    assert text.startswith("things")
    narrow = shown(14, lambda console: print_table(made, console))
    assert narrow.count("┏") == 2
    assert narrow.count("things") == 1


def test_each_part_has_all_its_keys() -> None:
    made = table("host", "load", numbers=("first", "second"))
    made.add_row("here", "much", "1" * 20, "2" * 20)
    text = shown(40, lambda console: print_table(made, console, keys=2))
    assert text.count("here") == text.count("much") == 2


def test_a_pipe_is_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    made = table("name", numbers=("a", "b"), texts=("cause",))
    made.add_row("x", "1" * 20, "2" * 20, "migrated to tcp://somewhere:7000")
    print_table(made, screen())
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 60
    row = read_tables(text)["x"]
    assert (row["a"], row["b"]) == ("1" * 20, "2" * 20)
    assert squeezed(row["cause"]) == "migratedtotcp://somewhere:7000"
    monkeypatch.delenv("COLUMNS")
    assert screen().width == 120


# --- the report ---------------------------------------------------------------------------------------------------


@pytest.fixture
def report() -> dict[str, Any]:
    """Of a real machine that has ended; the tests put other numbers into it."""
    hello = replace(spec("hello", accel="unicorn", vcpus=2, lines=1),
                    slots=[RamSlot(0, 0, 4 << 20), RamSlot(7, 0x1_0000_0000, (1 << 20) + 3 * 4096, log=False)])
    with Machine.launch(hello) as machine:
        return machine.wait(60.0)


counts = st.integers(0, 10**15)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.sampled_from(WIDTHS), pages=counts, fulls=counts, resets=counts, seconds=st.floats(0, 1e9),
       dirty=counts, pid=st.integers(1, 1 << 22), code=st.integers(-2**31, 2**31))
def test_every_number_of_the_report_can_be_read(
        report: dict[str, Any], width: int, pages: int, fulls: int, resets: int, seconds: float, dirty: int,
        pid: int, code: int) -> None:
    large = json.loads(json.dumps(report))
    vcpu = large["vcpus"][1]
    vcpu.update(dirty_pages=pages, ring_full_exits=fulls, resets=resets, guest_s=seconds, stalled_s=seconds / 3,
                pid=pid, exit_code=code, exit_reason="internal-error")
    large["slots"][1].update(dirty=dirty, pages=dirty + 1, gpa=1 << 47)
    large["reaper"].update(iterations=fulls, pages=pages, microseconds=resets, flushes=dirty)
    text = shown(width, lambda console: print_report(large, console))
    rows = read_tables(text)
    assert set(rows) == {"0", "1", "7"}
    row = rows["1"]
    assert (number(row["pid"]), row["state"], row["exit"], int(row["code"])) == (pid, vcpu["state"],
                                                                                 "internal-error", code)
    assert [number(row[c]) for c in ("dirtied", "ring full", "resets")] == [pages, fulls, resets]
    assert (float(row["guest s"]), float(row["stalled s"])) == pytest.approx((seconds, seconds / 3), abs=1e-3)
    assert number(rows["0"]["dirtied"]) == report["vcpus"][0]["dirty_pages"]
    slot = rows["7"]
    assert (int(slot["gpa"], 16), slot["size"], slot["logged"]) == (1 << 47, "1 MiB + 3 pages", "no")
    assert (number(slot["pages"]), number(slot["dirty"])) == (dirty + 1, dirty)
    reaper = " ".join(text[text.index("reaper "):].split())
    for value, what in ((fulls, "iterations"), (pages, "pages"), (resets, "us"), (dirty, "flushes")):
        assert value in [number(found) for found in re.findall(rf"([\d,]*\d) {what}\b", reaper)], (value, what)


@wide
def test_the_head_of_the_report_says_what_it_is_about(report: dict[str, Any], width: int) -> None:
    head = " ".join(shown(width, lambda console: print_report(report, console)).split("vCPUs\n")[0].split())
    assert head.startswith("t ended, ")
    for part in ("unicorn", "tracking ring (4096 entries)", "exit code 0", f"{report['elapsed_s']:.3f} s"):
        assert part in head
    running = shown(width, lambda console: print_report(report | {"state": "running"}, console))
    assert "exit code" not in running
    bitmap = shown(width, lambda console: print_report(report | {"tracking": "bitmap", "ring_entries": 0}, console))
    assert "tracking bitmap, exit code 0" in " ".join(bitmap.split())


@wide
def test_troubles_are_said_with_their_vcpu(report: dict[str, Any], width: int) -> None:
    report["vcpus"][1].update(detail="#UD at [bold]0x100000[/bold]", bad_entries=3, ring_rebuilds=2,
                              exit_reason="exception")
    report["coordinator"]["restarts"] = 4
    report["verification"] = {"ok": False, "rounds": 12, "checked_pages": 1_234_567, "dirty_pages": 98_765,
                              "lost_pages": 17, "surplus_pages": 23, "injected": "lost",
                              "first_findings": ["slot 0 page 0x1234: [lost]"]}
    text = " ".join(shown(width, lambda console: print_report(report, console)).split())
    for part in ("vCPU 1: #UD at [bold]0x100000[/bold]", "vCPU 1: 3 bad ring entries dropped", "rebuilt 2 times",
                 "coordinator replaced 4 times", "verification FAILED: 12 rounds", "1,234,567 pages checked",
                 "98,765 dirty", "17 lost", "23 surplus", "(injected: lost)", "slot 0 page 0x1234: [lost]"):
        assert part in text
    assert "vCPU 0:" not in text
    report["verification"].update(ok=True, injected="none")
    good = shown(width, lambda console: print_report(report, console))
    assert "verification passed" in good
    assert "injected" not in good


@wide
def test_unchanged_pages_that_are_no_failure_are_a_figure(report: dict[str, Any], width: int) -> None:
    report["verification"] = {"ok": True, "rounds": 12, "checked_pages": 5000, "dirty_pages": 4000, "lost_pages": 0,
                              "surplus_pages": 990, "excused_pages": 10, "injected": "none", "first_findings": [],
                              "surplus_is_failure": False}
    text = " ".join(shown(width, lambda console: print_report(report, console)).split())
    assert "of the dirty pages, 1,000 (25.0%) had the content they had before" in text
    assert "surplus" not in text


@wide
def test_registers_of_a_vcpu_that_crashed(report: dict[str, Any], width: int) -> None:
    registers = {name: 0xFFFF_0000_1234_5678 + i for i, name in enumerate(
        ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r15", "rip", "rflags", "cr3", "fs_base"))}
    report["vcpus"][0].update(registers=registers, exit_reason="exception")
    text = shown(width, lambda console: print_report(report, console))
    found = dict(re.findall(r"\b([a-z]\w+) ([0-9a-f]{16})\b", text))
    assert {name: int(value, 16) for name, value in found.items()} == registers
    for line in text.splitlines():
        assert len(re.findall(r"[0-9a-f]{16}", line)) in (0, 2, 3, 4), line
    report["vcpus"][0]["exit_reason"] = "stopped"       # on request: nobody asks where it was
    assert "rflags" not in shown(width, lambda console: print_report(report, console))


@wide
def test_the_progress_line(report: dict[str, Any], width: int) -> None:
    report["vcpus"][0].update(state="running", dirty_pages=1_234_567_890_123, ring_full_exits=7_654)
    report["vcpus"][1].update(state="dead", dirty_pages=1, ring_full_exits=1)
    report.update(elapsed_s=36_000.25, logging=True)
    text = " ".join(shown(width, lambda console: console.print(Text(progress_text(report, 987_654.4)))).split())
    for part in ("36000.2 s", "1/2 vCPUs running", "1,234,567,890,124 pages dirtied", "(987,654/s)",
                 "7,655 ring full"):
        assert part in text
    assert "verified" not in text
    assert "not logged" not in text
    report["logging"] = False
    text = progress_text(report, 0.0)
    assert text.endswith("not logged")
    assert "dirtied" not in text        # nobody counts
    report["verification"] = {"rounds": 31}
    assert progress_text(report, 0.0).endswith("31 rounds verified")


@wide
def test_whether_a_machine_is_logged(report: dict[str, Any], width: int) -> None:
    for tracking, logging, state, is_said in (("ring", False, "running", True), ("bitmap", False, "paused", True),
                                              ("ring", True, "running", False), ("none", False, "running", False),
                                              ("ring", False, "ended", False)):
        report.update(tracking=tracking, logging=logging, state=state)
        text = " ".join(shown(width, lambda console: print_report(report, console)).split())
        assert ("not logged: nobody needs it" in text) == is_said, text
    del report["logging"]       # of an earlier version
    assert "not logged" not in " ".join(shown(width, lambda console: print_report(report, console)).split())


@wide
def test_a_list_of_machines(report: dict[str, Any], width: int) -> None:
    longest = "a-name-of-thirty-two-characters0"
    report.update(name=longest, state="running", elapsed_s=1_000_000.04, accelerator="unicorn",
                  ended_at=None, cause=None)
    report["slots"] = [{"size": 15 << 40}, {"size": (1 << 40) + 3 * 4096}]
    rows = read_tables(shown(width, lambda console: print_table(
        machines_table([report, {"name": "silent", "state": "does not answer"}]), console)))
    assert rows[longest] == {"name": longest, "state": "running", "accelerator": "unicorn", "vCPUs": "2",
                             "memory": "16 TiB + 3 pages", "elapsed": "1000000.0 s"}
    assert rows["silent"]["state"] == "does not answer"
    assert rows["silent"]["memory"] == ""


@wide
def test_machines_that_have_ended_with_when_and_why(report: dict[str, Any], width: int) -> None:
    """The time in one piece; the cause may take several lines."""
    cause = "vcpu 1 ended: worker-died: its worker process (pid 71) was killed by signal 9 " * 2
    report.update(name="over", ended_at="2026-11-30T06:22:30+00:00", cause=cause, exit_code=6)
    lost = {"name": "lost", "state": "lost", "exit_code": 6, "cause": "killed", "ended_at": "2026-11-30T06:22:31+00:00"}
    text = shown(width, lambda console: print_table(machines_table([report, lost]), console))
    rows = read_tables(text)
    assert [rows[name]["ended"] for name in ("over", "lost")] == [report["ended_at"], lost["ended_at"]]
    assert squeezed(rows["over"]["cause"]) == squeezed(cause)
    assert (rows["over"]["state"], rows["lost"]["state"]) == ("ended (6)", "lost (6)")


def test_the_state_is_said_once_and_a_machine_that_was_handed_over_is_not_just_paused(report: dict[str, Any]) -> None:
    for state, handed_over, said in (("running", "", "running"), ("paused", "", "paused"),
                                     ("paused", "tcp://there:7000 (migration 1)", "handed over")):
        now = report | {"state": state, "handed_over": handed_over, "ended_at": None}
        first = shown(120, lambda console, now=now: print_report(now, console)).splitlines()[0]
        assert re.findall("running|paused|handed over|exit code", first) == [said]
        rows = read_tables(shown(120, lambda console, now=now: print_table(machines_table([now]), console)))
        assert rows[report["name"]]["state"] == said


@wide
def test_what_the_doctor_found(width: int) -> None:
    findings = [Finding("kvm", "ok", "/dev/kvm can be used"),
                Finding("/dev/shm", "warn", "0.9 GiB, 0.1 GiB free",
                        "guest RAM is allocated there: mount -o remount,size=… /dev/shm".replace("…", "4G")),
                Finding("packages", "fail", "missing: " + ", ".join(f"package-{n}" for n in range(30)),
                        "pip install -e .[dev]"),
                Finding("unicorn", "absent", "x" * 200)]
    rows = read_tables(shown(width, lambda console: print_table(
        doctor_table([f.as_dict() for f in findings]), console)))
    assert list(rows) == [f.name for f in findings]
    for finding in findings:
        row = rows[finding.name]
        assert row["status"] == finding.status
        assert squeezed(row["finding"]) == squeezed(finding.finding)
        assert squeezed(row["what to do"]) == squeezed(finding.advice)


@given(st.integers(1, 1 << 52))
def test_sizes_are_exact(size: int) -> None:
    units = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "pages": 4096}
    parts = size_text(size).split(" + ")
    assert sum(int(n) * units[unit] for n, unit in (part.split() for part in parts)) == size
    if len(parts) == 1 and size >= 1024 and size % 4096 == 0:
        assert not size_text(size).endswith(" B")


# --- on a terminal --------------------------------------------------------------------------------------------


@wide
def test_status_and_list_on_a_terminal(width: int) -> None:
    """The whole way, from the verb to the terminal's lines."""
    busy = spec("random", accel="unicorn", vcpus=2, writes=0, spin=200, timeout=None)
    with Machine.launch(busy, name="a-machine-with-a-rather-long-nam") as machine:
        machine.pause()
        report = machine.status()
        status = on_a_terminal("status", machine.name, columns=width)
        listed = on_a_terminal("list", columns=width)
    assert "…" not in status + listed
    rows = read_tables(status)
    for vcpu in report["vcpus"]:
        row = rows[str(vcpu["index"])]
        assert number(row["pid"]) == vcpu["pid"]
        assert number(row["dirtied"]) == vcpu["dirty_pages"]
        assert row["state"] == "paused"
    assert read_tables(listed)[machine.name]["memory"] == "16 MiB + 3 pages"


def test_a_launch_on_a_terminal_shows_console_progress_and_report(tmp_path: Path) -> None:
    config = tmp_path / "m.yaml"
    config.write_text("vcpus: 2\naccel: unicorn\nmemory: [{size: 4MiB}]\n"
                      "guest: {workload: idle, params: {milliseconds: 0}}\n")
    with Terminal("launch", str(config), columns=80) as terminal:
        terminal.wait_for("2/2 vCPUs running")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.wait() == 128 + signal.SIGINT
        rows = read_tables(terminal.text)
        assert [rows[i]["exit"] for i in ("0", "1")] == ["stopped"] * 2
        assert "…" not in terminal.text
    config.write_text("vcpus: 2\naccel: unicorn\nmemory: [{size: 4MiB}]\nguest: {workload: hello}\n")
    shown = on_a_terminal("launch", str(config), columns=80)
    assert "[vcpu 0] hello from vCPU 0 of 2\n" in shown
    assert "[vcpu 1] hello from vCPU 1 of 2\n" in shown
    assert read_tables(shown)["1"]["exit"] == "code"


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_where_they_are_wanted(variables: dict[str, str], coloured: bool) -> None:
    with Terminal("doctor", columns=120, **variables) as terminal:
        terminal.wait()
        assert bool(terminal.colours) == coloured
        assert "kvm" in terminal.text


def test_a_pipe_has_no_colours_and_tables_as_wide_as_120() -> None:
    done = subprocess.run([sys.executable, "-m", "vmm", "doctor"], capture_output=True, text=True, timeout=60,
                          check=False)
    assert "\x1b" not in done.stdout
    assert 80 < max(map(len, done.stdout.splitlines())) <= 120
    names = {f["name"] for f in json.loads(subprocess.run(
        [sys.executable, "-m", "vmm", "doctor", "--json"], capture_output=True, text=True, timeout=60,
        check=False).stdout)}
    assert names <= set(read_tables(done.stdout))


# --- the report's schema ------------------------------------------------------------------------------


def test_the_published_schema_is_the_reports() -> None:
    published = json.loads((TOP / "docs" / "report.schema.json").read_text())
    assert published == report_schema()


@pytest.mark.parametrize("accel", ACCELS)
def test_each_report_is_of_the_schema(accel: str) -> None:
    """From the first to the last; no field more, none less."""
    with Machine.launch(spec("counter", accel=accel, verify=exact()), start=False) as machine:
        seen = [machine.status()]
        machine.start()
        seen += [machine.status(), machine.wait(60.0)]
    for report in seen:
        typed = msgspec.convert(report, Report)
        assert msgspec.to_builtins(typed) == report
    assert [r["state"] for r in seen][::2] == ["ready", "ended"]
