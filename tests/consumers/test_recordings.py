"""Recordings (dirty traces and working sets): interrupted, over slots that come and go, into files that cannot be
written, and from files that anybody may have made."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import ANY, spec, until

from vmm.client.interrupts import Interrupts
from vmm.client.machine import Machine
from vmm.consumers import workingset
from vmm.consumers.trace import record
from vmm.consumers.workingset import Recording
from vmm.errors import VmmError
from vmm.machine.spec import RamSlot
from vmm.machine.tracefile import TraceError, TraceHeader, TraceReader, TraceWriter, pack

PAGE = 4096
VMM = [sys.executable, "-m", "vmm"]


@pytest.fixture(params=ANY)
def busy(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with Machine.launch(spec("random", accel=request.param, mib=8, writes=0, spin=500, timeout=None)) as machine:
        yield machine


@pytest.fixture
def idle() -> Iterator[Machine]:
    with Machine.launch(spec("idle", accel="unicorn", mib=4, milliseconds=0, timeout=None)) as machine:
        yield machine


# --- interrupted ------------------------------------------------------------------------------------------------


def test_a_wait_ends_when_a_signal_comes_and_the_second_one_is_an_interrupt() -> None:
    with Interrupts() as interrupts:
        assert not interrupts.wait(0.001)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.wait(1000.0)
        assert interrupts.came == signal.SIGTERM
        assert interrupts.wait(1000.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupted(machine: Machine, arguments: list[str], signum: int) -> subprocess.CompletedProcess[str]:
    """The command, interrupted when it is recording and the guest has done something since."""
    process = subprocess.Popen([*VMM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: [h for h in machine.status()["holders"] if h["pid"] == process.pid] != [], "it records", 60.0)
    before = machine.status()["vcpus"][0]["dirty_pages"]
    until(lambda: machine.status()["vcpus"][0]["dirty_pages"] > before + 100, "something to record")
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def test_an_interrupted_trace_keeps_what_there_is_and_says_so(busy: Machine, tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    done = interrupted(busy, ["trace", "record", busy.name, str(path), "--time", "1h", "--json"], signal.SIGINT)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "")
    said = json.loads(done.stdout)
    assert (said["complete"], said["reason"]) == (False, "interrupted")
    with TraceReader(path) as reader:
        assert sum(len(r.pages) for r in reader) == said["entries"] > 0
        assert reader.end is not None
        assert (reader.end.complete, reader.end.reason) == (False, "interrupted")
    assert os.listdir(tmp_path) == ["a.trace"]
    assert [h for h in busy.status()["holders"] if h["what"] == "recording"] == []


def test_an_interrupted_working_set_keeps_what_there_is_and_says_so(busy: Machine, tmp_path: Path) -> None:
    path, page = tmp_path / "a.npz", tmp_path / "a.html"
    done = interrupted(busy, ["working-set", busy.name, "--output", str(path), "--html", str(page), "--time", "1h",
                              "--interval", "50ms", "--json"], signal.SIGTERM)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")
    said = json.loads(done.stdout)
    assert (said["complete"], said["reason"]) == (False, "interrupted")
    recording = workingset.load(path)
    assert recording.reason == "interrupted"
    assert recording.intervals == said["intervals"] > 0
    assert recording.dirty_pages().sum() > 0
    assert "interrupted" in page.read_text()
    assert sorted(os.listdir(tmp_path)) == ["a.html", "a.npz"]
    assert busy.status()["clients"] == []


def test_a_machine_that_ends_ends_its_recordings_in_order(busy: Machine, tmp_path: Path) -> None:
    def stop(part: float, *more: int) -> None:
        busy.stop()

    recording = workingset.record(busy, 0.01, 1000.0, stop)
    assert recording.reason == ""
    assert recording.intervals >= 1


# --- slots ------------------------------------------------------------------------------------------------------


def test_a_working_set_outlives_slots_that_come_and_go(busy: Machine) -> None:
    """Plugged in, written to, plugged out, another one under its id: each page is in its own interval."""
    gpa = 0x1000_0000
    steps = [lambda: busy.memory_add(5, gpa, 16 * PAGE), lambda: busy.write(gpa + 3 * PAGE, b"x"),
             lambda: busy.memory_remove(5), lambda: busy.memory_add(5, 2 * gpa, 64 * PAGE),
             lambda: busy.write(2 * gpa + 60 * PAGE, b"x"), lambda: busy.memory_remove(5)]
    done = 0

    def go_on(part: float) -> None:
        nonlocal done
        if done < len(steps):
            steps[done]()
            done += 1

    recording = workingset.record(busy, 0.01, 1000.0, go_on, lambda seconds: done == len(steps))
    assert done == len(steps)
    assert recording.reason == "interrupted"
    assert [(slot, pages) for slot, _, pages in recording.slots] == [(0, (8 << 20 >> 12) + 3), (5, 64)]
    assert recording.pages[5].tolist() == [3, *range(64), 60]    # a number used again: all of it at first
    assert all(len(offsets) == recording.intervals + 1 for offsets in recording.offsets.values())
    assert recording.vcpu_entries.shape == (recording.intervals, 2)


def test_a_trace_says_that_slots_were_changed_meanwhile(busy: Machine, tmp_path: Path) -> None:
    def add(part: float, entries: int) -> None:
        if len(busy.status()["slots"]) == 1:
            busy.memory_add(5, 0x1000_0000, PAGE)

    end = record(busy, tmp_path / "a.trace", 0.05, 0.01, add)
    assert not end.complete
    assert "memory slots" in end.reason


@pytest.mark.kvm
def test_a_trace_needs_rings_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    with Machine.launch(spec("random", accel="kvm", mib=8, writes=0, spin=500, timeout=None)) as machine:
        machine.set_tracking("bitmap")
        with pytest.raises(VmmError, match=r"has tracking mode bitmap.*\(run vmm tracking t ring\)"):
            record(machine, tmp_path / "a.trace", 1.0, 0.01)
        assert os.listdir(tmp_path) == []
        machine.set_tracking("ring")

        def there_and_back(part: float, entries: int) -> None:
            for tracking in ("bitmap", "ring"):
                machine.set_tracking(tracking)

        try:
            end = record(machine, tmp_path / "a.trace", 0.1, 0.01, there_and_back)
        except VmmError:        # the switch is refused: then there is no gap
            return
        assert not end.complete


# --- a flush is one moment -------------------------------------------------------------------------------------


def test_a_flush_has_the_coordinators_time_and_counts(busy: Machine) -> None:
    busy.register("a")
    busy.pause()
    busy.flush("a")
    busy.resume()
    before = time.monotonic()
    first = busy.flush("a")
    between = time.monotonic()
    second = busy.flush("a")
    assert before <= first.at <= between <= second.at <= time.monotonic()
    assert all(a <= b for a, b in zip(first.vcpu_pages, second.vcpu_pages, strict=True))
    busy.pause()
    last = busy.flush("a")
    assert last.vcpu_pages == [v["dirty_pages"] for v in busy.status()["vcpus"]]


def test_an_interval_has_what_was_flushed_at_its_end_whatever_the_client_does(busy: Machine) -> None:
    """The client is slow after each flush, while the guest goes on: nothing of that is in the interval before."""
    flushes = []
    original = busy.flush

    def flush(client: str) -> Any:
        flushes.append(original(client))
        entries = busy.status()["vcpus"][0]["dirty_pages"]
        until(lambda: busy.status()["vcpus"][0]["dirty_pages"] > entries, "the guest goes on")
        return flushes[-1]

    busy.flush = flush  # type: ignore[method-assign]
    recording = workingset.record(busy, 0.01, 0.1)
    assert recording.times.tolist() == [f.at - flushes[0].at for f in flushes]
    counts = np.array([f.vcpu_pages for f in flushes])
    assert (recording.vcpu_entries == counts[1:] - counts[:-1]).all()


# --- outputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    ["working-set", "t", "--output", "{}/no/a.npz", "--time", "1h"],
    ["working-set", "t", "--output", "{}/a.npz", "--png", "{}/no/a.png", "--time", "1h"],
    ["working-set", "t", "--output", "{}/a.npz", "--html", "{}", "--time", "1h"],
    ["trace", "record", "t", "{}/no/a.trace", "--time", "1h"]])
def test_an_output_that_cannot_be_written_is_said_before_the_work(idle: Machine, tmp_path: Path,
                                                                  arguments: list[str]) -> None:
    done = subprocess.run([*VMM, *(a.format(tmp_path) for a in arguments)], capture_output=True, text=True,
                          timeout=100, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"vmm: error: {tmp_path}")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_device_stays_a_device(idle: Machine) -> None:
    """Full, in this case: the recording is lost, and says so; the node is what it was."""
    before = os.stat("/dev/full")
    for arguments in (["working-set", idle.name, "--output", "/dev/full", "--time", "200ms"],
                      ["trace", "record", idle.name, "/dev/full", "--time", "200ms"]):
        done = subprocess.run([*VMM, *arguments], capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 2
        assert done.stderr == f"vmm: error: /dev/full: cannot be written: {os.strerror(errno.ENOSPC)}\n"
    after = os.stat("/dev/full")
    assert (before.st_mode, before.st_rdev, before.st_ino) == (after.st_mode, after.st_rdev, after.st_ino)


def test_a_trace_goes_into_a_pipe(idle: Machine, tmp_path: Path) -> None:
    """It alone goes there; what there is to say is said on standard error."""
    done = subprocess.run([*VMM, "trace", "record", idle.name, "/dev/fd/1", "--time", "200ms"],
                          capture_output=True, timeout=100, check=True)
    assert done.stderr.startswith(b"/dev/fd/1: ")
    path = tmp_path / "copy.trace"
    path.write_bytes(done.stdout)
    with TraceReader(path) as reader:
        list(reader)
        assert reader.end is not None


@pytest.mark.parametrize(("arguments", "said"), [
    (["working-set", "t", "--output", "x.npz", "--interval", "1us"],
     "--interval: 1us is too short: must be at least 1 ms"),
    (["trace", "record", "t", "x.trace", "--interval", "10us"], "--interval: 10us is too short: must be at least 1 ms"),
    (["working-set", "t", "--output", "x.npz", "--interval", "2s", "--time", "1s"], "is longer than --time"),
])
def test_an_interval_that_cannot_be_kept_to_is_refused(idle: Machine, arguments: list[str], said: str) -> None:
    done = subprocess.run([*VMM, *arguments], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


# --- traces that anybody may have made ---------------------------------------------------------------------------


HEADER = TraceHeader(machine="m", accelerator="kvm", vcpus=2, ring_entries=1024, interval=0.01,
                     slots=[RamSlot(0, 0, 1 << 20)])


def block(kind: bytes, records: int, entries: int, payload: bytes) -> bytes:
    head = struct.pack("<4sIII", kind, records, entries, len(payload))
    return head + struct.pack("<Q", xxhash.xxh3_64(head + payload).intdigest()) + payload


def trace_of(header: bytes, *blocks: bytes) -> bytes:
    """A file whose checksums are right, whatever is in it."""
    head = struct.pack("<8sII", b"SVMTRACE", 1, len(header)) + header
    return head + struct.pack("<Q", xxhash.xxh3_64(head).intdigest()) + b"".join(blocks)


END = block(b"END ", 0, 0, b"{}")


def test_a_block_that_unpacks_to_more_than_it_says_is_refused_before_it_does(tmp_path: Path) -> None:
    path = tmp_path / "x.trace"
    bomb = zstandard.compress(b"\0" * (1 << 28))        # 256 MiB in a few KiB
    endless = zstandard.ZstdCompressor(write_content_size=False).compress(b"\0" * (1 << 20))
    for payload in (bomb, endless):
        path.write_bytes(trace_of(msgspec.json.encode(HEADER), block(b"DATA", 1, 1, payload), END))
        with TraceReader(path) as reader, pytest.raises(TraceError, match="does not have the size that it declares"):
            list(reader)


_text = st.one_of(st.sampled_from(["", "\x1b[2J", "a\nb", "x" * 3000]), st.text(max_size=3))
_number = st.sampled_from([0, 1, -1, 2, 4096, 1 << 20, 1 << 44, 1 << 63, 1 << 64, -(1 << 63), 1e308, 0.5])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_trace_is_good_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Right checksums over a header, blocks and an end that say anything."""
    header: dict[str, Any] = msgspec.to_builtins(HEADER)
    for _ in range(data.draw(st.integers(0, 2))):
        header[data.draw(st.sampled_from(sorted(header)))] = data.draw(st.one_of(
            _text, _number, st.none(), st.lists(st.fixed_dictionaries(
                {"id": _number, "gpa": _number, "size": _number}), max_size=3)))
    text = data.draw(st.one_of(st.just(json.dumps(header).encode()), st.binary(max_size=20),
                               st.just(b"[" * 5000)))
    blocks = []
    for _ in range(data.draw(st.integers(0, 3))):
        records, entries = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5))
        size = 16 * records + 8 * entries
        plain = data.draw(st.one_of(st.binary(min_size=size, max_size=size), st.binary(max_size=100),
                                    st.just(b"\0" * size)))
        blocks.append(block(data.draw(st.sampled_from([b"DATA", b"END ", b"????"])), records, entries,
                            data.draw(st.sampled_from([plain, zstandard.compress(plain)]))))
    keys = st.sampled_from(["lost", "entries", "seconds", "reason"])
    end = data.draw(st.one_of(st.just({}), st.dictionaries(keys, st.one_of(_number, _text))))
    blocks.append(block(b"END ", 0, 0, json.dumps(end).encode()))
    path = tmp_path_factory.mktemp("t") / "x.trace"
    path.write_bytes(trace_of(text, *blocks))
    said = ""
    try:
        with TraceReader(path) as reader:
            parts = reader.vcpus()
            assert [(len(p.times), len(p.entries)) for p in parts] == reader.sizes()
    except TraceError as exc:
        said = str(exc)
    assert not said or (said.isprintable() and str(path) in said)
    assert os.listdir(path.parent) == ["x.trace"]


def test_what_a_trace_says_does_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "x.trace"
    with TraceWriter(path, msgspec.structs.replace(HEADER, machine="\x1b[2Jm\n", recorded="\x07")) as writer:
        writer.append(1, 0, pack(np.zeros(3), np.arange(3)))
        writer.finish(reason="\x1b]0;x\x07")
    done = subprocess.run([*VMM, "trace", "info", str(path)], capture_output=True, text=True, timeout=100,
                          check=True)
    assert done.stdout.replace("\n", "").isprintable()
    assert "vCPU 0: 3 entries, 3 distinct pages" in done.stdout


@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_a_trace_is_a_regular_file(tmp_path: Path, kind: str) -> None:
    path = {"fifo": tmp_path / "fifo", "device": Path("/dev/zero"), "directory": tmp_path}[kind]
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(TraceError, match=r"is not a regular file|is a directory"):
        TraceReader(path)


# --- working sets that anybody may have made --------------------------------------------------------------------


def test_a_recording_from_before_it_could_be_interrupted_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, version=np.int64(1), times=np.array([0.0, 1.0]), vcpu_entries=np.array([[3]]),
                        slot_ids=np.array([0]), slot_gpas=np.array([0]), slot_pages=np.array([8]),
                        pages_0=np.array([1, 2], np.uint32), offsets_0=np.array([0, 2]))
    assert workingset.load(path).reason == ""


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_recording_is_good_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("w") / "x.npz"
    Recording(np.array([0.0, 1.0, 2.0]), np.array([[3], [1]], np.int64), [(0, 0, 8)],
              {0: np.array([1, 2, 5], np.uint32)}, {0: np.array([0, 2, 3], np.int64)}).save(path)
    kind = data.draw(st.sampled_from(["flip", "cut", "array"]))
    if kind == "array":
        arrays = dict(np.load(path))
        name = data.draw(st.sampled_from(sorted(arrays)))
        arrays[name] = data.draw(st.sampled_from([
            np.array([]), np.array([[1]]), np.array(["a"]), np.array([1 << 40]), np.array([-1, 5]),
            np.array([0.0, np.nan, 1.0]), np.array(2.5), np.array([0, 3, 2]), np.array([9], np.uint32)]))
        np.savez_compressed(path, **arrays)
    else:
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        if kind == "flip":
            content[at] ^= data.draw(st.integers(1, 255))
        else:
            del content[at:]
        path.write_bytes(content)
    said = ""
    try:
        assert workingset.load(path).intervals >= 0
    except VmmError as exc:
        said = str(exc)
    assert not said or (said.isprintable() and str(path) in said)


def test_a_recording_does_not_unpack_to_whatever_it_wants(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("version.npy", b"")
        for name in ("times", "slot_ids"):
            archive.getinfo("version.npy")
            archive.writestr(f"{name}.npy", b"\0" * 100)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")     # the directory's last entry: its size, unpacked
    data[at + 24:at + 28] = struct.pack("<I", 0xFFFF_FFF0)
    first = data.index(b"PK\x01\x02")
    data[first + 24:first + 28] = struct.pack("<I", 0xFFFF_FFF0)
    path.write_bytes(data)
    with pytest.raises(VmmError, match="more than 4,294,967,296 bytes"):
        workingset.load(path)
