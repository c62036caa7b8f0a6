"""vmm events: what it shows of a machine, against what the machine's own counters say."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import vmm, vmm_here
from machines import ACCELS, spec, until
from places import TOP

from vmm.client.machine import Machine
from vmm.consumers.events.event import Event
from vmm.consumers.events.lines import json_line, read_json_lines, text_line
from vmm.consumers.events.perfetto import Tracks
from vmm.consumers.events.stream import Stream
from vmm.consumers.migration.upgrade import upgrade
from vmm.errors import VmmError
from vmm.machine.spec import ReaperSpec

TIMEOUT = 60.0
#: Rings that get full, and are reaped because they are.
SMALL = {"ring": 1024, "mib": 16, "log": "always", "reaper": ReaperSpec(mode="fixed", interval=5.0, reset="early")}


def lines(name: str, *options: str) -> list[dict[str, Any]]:
    done = vmm_here("events", name, "--format", "jsonl", *options)
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("accel", ACCELS)
def test_events_agree_with_the_counters(accel: str) -> None:
    """Each stall of each vCPU with the time that it took, each reap with what it harvested."""
    with Machine.launch(spec("sequential", accel=accel, passes=3, **SMALL), name="t") as machine:
        report = machine.wait(TIMEOUT)
        assert report["exit_code"] == 0
        found = lines("t", "--since", "1m")
    assert not [e for e in found if e["event"] == "dropped"]
    for vcpu in report["vcpus"]:
        own = [e for e in found if e["source"] == f"vcpu{vcpu['index']}"]
        stalls = [e["took_us"] for e in own if e["event"] == "stall"]
        full = [e for e in own if e["event"] == "kvm_dirty_ring_full"]
        assert len(stalls) == len(full) == vcpu["ring_full_exits"] > 0
        assert sum(stalls) / 1e6 == pytest.approx(vcpu["stalled_s"], rel=1e-3, abs=1e-5)
        harvested = [e["count"] for e in found if e["event"] == "kvm_dirty_ring_reap_vcpu" and e["id"] == vcpu["index"]]
        assert sum(harvested) == vcpu["dirty_pages"]
    reaps = [e for e in found if e["event"] == "kvm_dirty_ring_reap"]
    assert sum(e["count"] for e in reaps) == report["reaper"]["pages"]
    assert sum(e["t"] for e in reaps) == pytest.approx(report["reaper"]["microseconds"], abs=len(reaps))
    assert [e["exit_code"] for e in found if e["event"] == "ended"] == [0]
    assert [e["at"] for e in found] == sorted(e["at"] for e in found)


@pytest.mark.parametrize("accel", ACCELS)
def test_events_come_in_the_order_in_which_they_were_over(accel: str) -> None:
    """Also from one look to the next, while rings get full all the time: a kick of the reaper comes before its reap."""
    with Machine.launch(spec("sequential", accel=accel, passes=3, **SMALL), name="t") as machine, \
            contextlib.closing(Stream(watched := Machine.attach("t", past=True), 60.0)) as stream:
        found: list[Event] = []
        while not stream.ended:
            found += stream.next(0.001)
        own = [e.at for e in found if e.source == "coordinator" and e.name.startswith("kvm_dirty_ring")]
        names = [e.name for e in found if e.name in ("kvm_dirty_ring_reaper_kick", "kvm_dirty_ring_reap")]
        assert own == sorted(own)
        assert names.count("kvm_dirty_ring_reaper_kick") > 0
        assert "kvm_dirty_ring_reaper_kick kvm_dirty_ring_reaper_kick" not in " ".join(names)
        assert machine.wait(TIMEOUT)["exit_code"] == 0
        watched.detach()


@pytest.mark.parametrize("accel", ACCELS)
def test_a_client_and_a_pause_have_tracks_of_their_own(accel: str, tmp_path: Path) -> None:
    """The trace as Perfetto reads it: a slice for each verb on its client's track, for the pause on each vCPU's."""
    path = tmp_path / "trace.json"
    with Machine.launch(spec("random", accel=accel, writes=0, timeout=None), name="t") as machine:
        machine.register("me", mine=True)
        machine.sync("me")
        machine.pause()
        machine.resume()
        machine.sync("me")
        done = vmm("events", "t", "--format", "perfetto", "--output", str(path))
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
        machine.stop()
        machine.wait(TIMEOUT)
    found = slices(json.loads(path.read_text()))
    own = {name for track, name in found if track.startswith(f"client {os.getpid()} (")}
    assert own >= {"register", "sync", "pause", "resume"}
    for vcpu in (0, 1):
        assert (f"vCPU {vcpu}", "pause") in found
    assert found >= {("coordinator", "flush"), ("coordinator", "reap"), ("coordinator", "reset")}


#: What an entry of each phase must have, by the Trace Event Format.
NEEDED = {"X": {"ts", "dur", "name"}, "B": {"ts", "name"}, "i": {"ts", "name", "s"}, "C": {"ts", "name", "args"},
          "M": {"name", "args"}}


def slices(trace: dict[str, Any]) -> set[tuple[str, str]]:
    """(track, name) of all slices, by the Trace Event Format: names of threads are metadata, slices are complete
    events, and those of one thread lie within one another or apart; times are microseconds."""
    events = trace["traceEvents"]
    for e in events:
        assert set(e) >= NEEDED[e["ph"]] | {"pid", "tid"}, e
        assert all(isinstance(e.get(key, 0), int | float) and e.get(key, 0) >= 0 for key in ("ts", "dur")), e
        assert e["ph"] != "C" or all(isinstance(value, int) for value in e["args"].values()), e
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert len(names) == len(set(names.values()))
    for place in names:
        ends: list[float] = []
        for e in sorted((e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == place),
                        key=lambda e: (e["ts"], -e["dur"])):
            while ends and ends[-1] <= e["ts"] + 0.002:     # microseconds have three digits
                ends.pop()
            assert not ends or e["ts"] + e["dur"] <= ends[-1] + 0.002, e
            ends.append(e["ts"] + e["dur"])
    return {(names[e["pid"], e["tid"]], e["name"]) for e in events if e["ph"] == "X"}


def test_follow_ends_with_the_machine() -> None:
    """And shows what came while it was looking, once."""
    with Machine.launch(spec("stamp", accel="unicorn", writes=20_000), name="t", start=False) as machine:
        process = subprocess.Popen([sys.executable, "-m", "vmm", "events", "t", "--follow", "--json"],
                                   stdout=subprocess.PIPE, text=True)
        machine.start()
        machine.wait(TIMEOUT)
        out, _ = process.communicate(timeout=TIMEOUT)
    found = [json.loads(line) for line in out.splitlines()]
    assert process.returncode == 0
    assert [e["event"] for e in found].count("ended") == 1
    assert [e for e in found if e["event"] == "exit"]
    assert len({(e["at"], e["source"], e["event"], e.get("id")) for e in found}) == len(found)


@pytest.mark.parametrize("accel", ACCELS)
def test_follow_goes_on_with_other_processes(accel: str) -> None:
    """When the coordinator was killed, and when the machine was upgraded: what the new ones do is told."""
    with Machine.launch(spec("random", accel=accel, writes=0, timeout=None, log="always"), name="t", start=False) as it:
        with contextlib.closing(Stream(watched := Machine.attach("t", past=True), 60.0)) as stream:
            it.start()
            os.kill(it.status()["coordinator"]["pid"], signal.SIGKILL)
            it.pause()
            until(lambda: bool(of(stream, "verb", verb="pause")), "the successor's verb is told")
            it.resume()
            upgrade("t")
            with Machine.attach("t") as moved:
                moved.pause()
                until(lambda: bool(of(stream, "verb", verb="pause")), "a verb of the upgraded machine is told")
                moved.resume()
                moved.stop()
            until(lambda: stream.next(0.05) is not None and stream.ended, "it has ended")
        watched.detach()


def of(stream: Stream, name: str, **fields: object) -> list[Event]:
    """What has come of this kind."""
    return [e for e in stream.next(0.05) if e.name == name and fields.items() <= e.fields.items()]


@pytest.mark.parametrize("kind", ["text", "jsonl", "perfetto"])
def test_an_interrupt_keeps_what_there_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with Machine.launch(spec("random", accel="unicorn", writes=0, timeout=None), name="t") as machine:
        process = subprocess.Popen([sys.executable, "-m", "vmm", "events", "t", "-f", "--format", kind, "--output",
                                    str(path)])
        machine.register("me", mine=True)
        until(lambda: bool(list(tmp_path.iterdir())), "it has begun to write")
        machine.sync("me")
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
        machine.stop()
        machine.wait(TIMEOUT)
    assert path.exists()
    if kind == "perfetto":
        assert json.loads(path.read_text())["traceEvents"]


def test_since_begins_there() -> None:
    with Machine.launch(spec("random", accel="unicorn", writes=0, timeout=None, log="always"), name="t") as machine:
        machine.register("me", mine=True)
        machine.sync("me")
        all_of_it = lines("t", "--since", "1m")
        latest = max(e["at"] for e in all_of_it)
        until(lambda: lines("t", "--since", "1m")[-1]["at"] > latest + 0.3, "something else has happened")
        recent = lines("t", "--since", "200ms")
        machine.stop()
        machine.wait(TIMEOUT)
    assert recent
    assert min(e["at"] for e in recent) > latest


def test_what_is_wrong_is_said() -> None:
    assert vmm_here("events", "nobody").returncode == 7
    done = vmm_here("events", "nobody", "--time", "1s")
    assert (done.returncode, done.stderr) == (2, "vmm: error: --time is for --follow\n")
    done = vmm_here("events", "nobody", "--json", "--format", "text")
    assert done.returncode == 2
    assert "give one of the two" in done.stderr


EVENTS = [
    Event(at=10.0, source="vcpu0", name="kvm_dirty_ring_full", fields={"id": 0}),
    Event(at=10.00025, source="coordinator", name="kvm_dirty_ring_reap_vcpu",
          fields={"id": 0, "count": 448, "outstanding": 448}),
    Event(at=10.0003, source="coordinator", name="reset", took=5e-5, fields={"entries": 448}),
    Event(at=10.00031, source="coordinator", name="kvm_dirty_ring_reap", took=1e-4,
          fields={"count": 448, "t": 100, "next_us": 1000}),
    Event(at=10.0004, source="vcpu0", name="stall", took=4e-4),
    Event(at=10.5, source="vcpu1", name="pause-begin"),
    Event(at=11.0, source="coordinator", name="warning", fields={"text": "a\nb"})]


def test_lines_are_read_as_they_were_written() -> None:
    text = "".join(json_line(e, 0.0) + "\n" for e in EVENTS)
    assert read_json_lines(text.encode(), "e.jsonl") == EVENTS


def test_a_damaged_line_is_named() -> None:
    text = json_line(EVENTS[0], 0.0) + "\n{}\n"
    with pytest.raises(VmmError, match=r"^e\.jsonl:2: is not an event"):
        read_json_lines(text.encode(), "e.jsonl")


def test_text_is_a_line_each() -> None:
    text = [text_line(e, 1e9 - 10) for e in EVENTS]
    assert text[0] == "2001-09-09T01:46:40.000000Z vcpu0 kvm_dirty_ring_full id=0"
    assert text[3] == "2001-09-09T01:46:40.000310Z coordinator kvm_dirty_ring_reap count=448 t=100 next_us=1000"
    assert text[4] == "2001-09-09T01:46:40.000400Z vcpu0 stall took=400us"
    assert all("\n" not in line for line in text)


def trace() -> str:
    tracks = Tracks("m")
    return tracks.begin() + "".join(map(tracks.add, EVENTS)) + tracks.end()


def test_a_client_whose_process_is_not_known_has_a_track() -> None:
    """One of another namespace of processes has the number 0."""
    tracks = Tracks("m")
    verb = Event(at=1.0, source="client0", name="verb", took=0.5, fields={"verb": "sync", "pid": 0})
    assert slices(json.loads(tracks.begin() + tracks.add(verb) + tracks.end())) == {("client 0", "sync")}


def test_a_stall_is_a_slice_as_long_as_it_took() -> None:
    """And what has not ended has begun."""
    whole = json.loads(trace())
    assert slices(whole) == {("vCPU 0", "ring full"), ("coordinator", "reap"), ("coordinator", "reset")}
    entries = whole["traceEvents"]
    (stall,) = [e for e in entries if e["name"] == "ring full"]
    assert (stall["ph"], stall["ts"], stall["dur"]) == ("X", 10_000_000.0, 400.0)
    (pause,) = [e for e in entries if e["name"] == "pause"]
    assert (pause["ph"], pause["ts"]) == ("B", 10_500_000.0)
    fill = [(e["ts"], e["args"]["entries"]) for e in entries if e["name"] == "vCPU 0 ring entries"]
    assert fill == [(10_000_250.0, 448), (10_000_300.0, 0)]


def test_what_a_coordinator_tells_is_documented() -> None:
    """By the text of its source: in the protocol, in the table of events, and where Python programs look."""
    told = {name for file in (TOP / "vmm" / "coordinator").glob("*.py")
            for name in re.findall(r'"event": "([a-z-]+)"', file.read_text())}
    assert told >= {"started", "paused", "console", "ended"}
    protocol = (TOP / "docs" / "protocol.md").read_text().partition("The events are")[2].partition("Each has `at`")[0]
    assert {name for line in protocol.splitlines() for name in re.findall(r"`([a-z-]+)`(?: \(|[;,]|$)", line)
            if line.startswith("* ")} >= told
    row, = (line for line in (TOP / "docs" / "events.md").read_text().splitlines() if "`ring-rebuilt`" in line)
    assert set(re.findall(r"`([a-z-]+)`", row)) == told
    said = inspect.getdoc(Machine.events) or ""
    assert set(re.findall(r"[a-z-]+", said.partition(": ")[2].partition(";")[0])) - {"the", "last"} == told
