"""Chains of snapshots as directories: what is ours in them, what a manifest may say, what a kill leaves. No machine
runs here (tests/consumers/test_snapshot.py has those)."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import replace, spec

from ipc.steps import STEPS
from vmm.consumers import snapshot
from vmm.consumers.snapshot import Damaged, Manifest, SnapshotError
from vmm.consumers.snapshot.aside import Aside
from vmm.consumers.snapshot.folder import next_id
from vmm.consumers.snapshot.manifest import FORMAT, VERSION, SlotFile, file_checksum, write_manifest
from vmm.consumers.snapshot.pagefile import (
    PAGE,
    PageFile,
    PageFileError,
    PageWriter,
    Scratch,
    compress,
    iter_pages,
    read_pages,
)
from vmm.errors import VmmError
from vmm.machine.spec import RamSlot
from workers.state import EventsState, RegsState, SegmentsState, SegmentState, TableState, VcpuSaved

PAGES = 48

_SEGMENT = SegmentState(*[0] * 12)
STATE = json.loads(msgspec.json.encode(VcpuSaved(
    regs=RegsState(*[0] * 18), segments=SegmentsState(*[_SEGMENT] * 8), gdt=TableState(0, 0), idt=TableState(0, 0),
    cr0=0, cr2=0, cr3=0, cr4=0, cr8=0, efer=0, apic_base=0, xcr0=1, xsave=b"\0" * 576, debug=(0, 0, 0, 0, 0, 0),
    msrs={}, events=EventsState(*[0] * 22), mp_state=0)))


def slot_file(folder: Path, name: str, pages: dict[int, int], total: int, packed: bool = False) -> SlotFile:
    """A page file with ``pages``: {page: the byte that it is full of}."""
    with PageWriter(folder, name, total) as writer:
        for value in set(pages.values()):
            writer.write(np.broadcast_to(np.uint8(value), total * PAGE), np.array(sorted(
                p for p, v in pages.items() if v == value)))
        done = writer.finish()
    if packed:
        compress(folder, name)
    return SlotFile(0, 0, total * PAGE, True, 0, int(done["pages"]), int(done["zero_pages"]), str(done["checksum"]))


def made(directory: Path, name: str, parent: str | None, pages: dict[int, int] | None = None, *,
         total: int = PAGES, packed: bool = False) -> Manifest:
    """A snapshot as a machine of one slot would leave it."""
    folder = directory / name
    folder.mkdir(parents=True)
    pages = {int(name) % total: int(name) % 256} if pages is None else pages
    slot = slot_file(folder, "slot0", pages, total, packed)
    system = slot_file(folder, "system", {0: 7}, 1)
    (folder / "image").write_bytes(b"an image")
    manifest = Manifest(
        format=FORMAT, version=VERSION, id=name, parent=parent, created="2025-01-01T00:00:00+00:00", program="0",
        accelerator="unicorn", live=False, compression="zstd" if packed else "none", epoch="snap_0",
        image_checksum=file_checksum(folder / "image"),
        spec=spec("idle", accel="unicorn", vcpus=1, slots=[RamSlot(0, 0, total * PAGE)]), slots=[slot],
        system=system, vcpus=[STATE])
    write_manifest(folder, manifest)
    return manifest


def contents(directory: Path, name: str | None = None) -> dict[int, int]:
    """{page: byte} of slot 0."""
    found: dict[int, int] = {}
    for manifest in snapshot.chain(directory, name):
        slot = manifest.slots[0]
        for first, data in iter_pages(directory / manifest.id, "slot0", slot.size // PAGE, slot.checksum):
            found |= {first + i: int(v) for i, v in enumerate(data[::PAGE])}
    return found


def names(directory: Path) -> list[str]:
    return [m.id for m in snapshot.list_snapshots(directory)]


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def tree(top: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(top)): p.read_bytes() if p.is_file() else None for p in sorted(top.rglob("*"))}


# --- ids -------------------------------------------------------------------------------------------------------


def test_ids_are_numbers(tmp_path: Path) -> None:
    parent = None
    for number in (9998, 9999, 10000, 10001):
        parent = made(tmp_path, f"{number:04d}", parent).id
    assert names(tmp_path) == ["9998", "9999", "10000", "10001"]
    assert [m.id for m in snapshot.verify(tmp_path)] == ["9998", "9999", "10000", "10001"]
    assert next_id(tmp_path) == "10002"
    assert snapshot.merge(tmp_path, "10000").id == "10000"
    assert names(tmp_path) == ["10000", "10001"]


@pytest.mark.parametrize("name", ["../0001", "1", "00001", "", ".", "0001.bak", "\u0660\u0660\u0660\u0661", "0\n"])
def test_what_is_not_an_id_is_never_a_path(tmp_path: Path, name: str) -> None:
    made(tmp_path / "s", "0001", None)
    for act in (snapshot.verify, snapshot.merge, snapshot.delete, snapshot.restore):
        with pytest.raises(VmmError, match=r"^invalid snapshot id ") as caught:
            act(tmp_path / "s", name)
        assert "\n" not in str(caught.value)
    assert names(tmp_path / "s") == ["0001"]


# --- what else is there ------------------------------------------------------------------------------------------


def test_what_is_not_a_snapshot_is_neither_read_nor_removed(tmp_path: Path) -> None:
    directory = tmp_path / "s"
    made(directory, "0001", None)
    made(directory, "0002", "0001")
    for name in ("lost+found", "notes", "0001.bak", "2024", ".old-photos", ".new-ideas", ".old-0001-cafecafe"):
        (directory / name).mkdir()
        (directory / name / "1.jpg").write_text("x")
    os.mkfifo(directory / "0003")
    (directory / ".new-0009-00000000").write_text("a file of mine")
    foreign = {n: v for n, v in tree(directory).items() if n.partition("/")[0] not in ("0001", "0002")}
    assert names(directory) == ["0001", "0002"]
    assert next_id(directory) == "0004"
    snapshot.verify(directory)
    snapshot.merge(directory)
    assert names(directory) == ["0002"]
    made(directory, "0005", "0002")
    snapshot.delete(directory, "0005")
    assert {n: v for n, v in tree(directory).items() if n.partition("/")[0] != "0002"} == foreign
    with pytest.raises(SnapshotError, match=r"s: no snapshot 2024; there is 0002$"):
        snapshot.delete(directory, "2024")


def test_a_file_of_somebody_elses_in_a_snapshot_is_not_deleted_with_it(tmp_path: Path) -> None:
    made(tmp_path, "0001", None)
    made(tmp_path, "0002", "0001")
    (tmp_path / "0001" / "why.txt").write_text("before the update")
    snapshot.merge(tmp_path)
    assert (tmp_path / "0001" / "why.txt").exists()
    with pytest.raises(SnapshotError, match=r"why\.txt: is not a snapshot file"):
        snapshot.delete(tmp_path, "0001")
    (tmp_path / "0001" / "why.txt").unlink()
    snapshot.delete(tmp_path, "0001")
    assert names(tmp_path) == ["0002"]
    snapshot.verify(tmp_path)


@pytest.mark.parametrize("how", ["manifest.json", "manifest.sum", "missing"])
def test_one_damaged_manifest_harms_only_what_is_built_on_it(tmp_path: Path, how: str) -> None:
    made(tmp_path, "0001", None)
    made(tmp_path, "0002", "0001")
    made(tmp_path, "0003", None)
    made(tmp_path, "0004", "0003")
    if how == "missing":
        (tmp_path / "0003" / "manifest.json").unlink()
    else:
        damage(tmp_path / "0003" / how)
    assert names(tmp_path) == ["0001", "0002", "0004"]
    marked = snapshot.survey(tmp_path)[2]
    assert isinstance(marked, Damaged)
    assert marked.id == "0003"
    assert "0003/manifest.json" in marked.reason
    assert [m.id for m in snapshot.verify(tmp_path, "0002")] == ["0001", "0002"]
    for name in (None, "0004"):
        with pytest.raises(SnapshotError, match=r"0004: depends on 0003: .*0003/manifest\.json"):
            snapshot.verify(tmp_path, name)
    with pytest.raises(SnapshotError, match="needed by 0004"):
        snapshot.delete(tmp_path, "0003")
    snapshot.delete(tmp_path, "0004")
    snapshot.delete(tmp_path, "0003")
    assert sorted(os.listdir(tmp_path)) == ["0001", "0002"]


def test_the_newest_is_the_newest_even_when_it_is_damaged(tmp_path: Path) -> None:
    """An older state is not taken for it in silence."""
    made(tmp_path, "0001", None)
    made(tmp_path, "0002", None)
    damage(tmp_path / "0002" / "manifest.json")
    for act in (snapshot.chain, snapshot.verify, snapshot.merge, snapshot.restore):
        with pytest.raises(SnapshotError, match=r"0002/manifest\.json: is damaged"):
            act(tmp_path)
    assert next_id(tmp_path) == "0003"


# --- what a manifest may say --------------------------------------------------------------------------------------


def rewritten(folder: Path, document: Any) -> None:
    """With a checksum that is right: anybody can make one."""
    text = json.dumps(document).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "manifest.sum").write_text(hashlib.blake2b(text, digest_size=32).hexdigest())


@pytest.mark.parametrize(("change", "said"), [
    ({"parent": "../../etc"}, "its parent"), ({"parent": "0002"}, "its parent"), ({"parent": "0003"}, "its parent"),
    ({"slots": []}, "slots differ"), ({"vcpus": []}, "states of 0 vCPUs"),
    ({"vcpus": [{}]}, "vcpu 0: not a valid vCPU state"),
    ({"vcpus": [STATE | {"regs": "x"}]}, "vcpu 0: not a valid vCPU state"),
    ({"id": "0003"}, "claims to be"),
    ({"version": 1}, "format version 1"), ({"format": "x"}, "not a ShardVMM snapshot"), ({"extra": 1}, "extra"),
    ({"live": "no"}, "live"), ({"created": None}, "created"),
])
def test_a_manifest_that_cannot_be(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    made(tmp_path, "0001", None)
    manifest = made(tmp_path, "0002", "0001")
    rewritten(tmp_path / "0002", msgspec.to_builtins(manifest) | change)
    with pytest.raises(SnapshotError, match=r"0002/manifest\.json: ") as caught:
        snapshot.load_manifest(tmp_path, "0002")
    assert said in str(caught.value)


def test_a_manifest_has_a_size(tmp_path: Path) -> None:
    made(tmp_path, "0001", None)
    path = tmp_path / "0001" / "manifest.json"
    os.truncate(path, 1 << 40)
    with pytest.raises(SnapshotError, match=r"manifest\.json: is too large"):
        snapshot.load_manifest(tmp_path, "0001")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SnapshotError, match=r"manifest\.json: is not a regular file"):
        snapshot.load_manifest(tmp_path, "0001")
    path.unlink()
    path.write_bytes(b"[" * 100_000)
    (tmp_path / "0001" / "manifest.sum").write_text(hashlib.blake2b(b"[" * 100_000, digest_size=32).hexdigest())
    with pytest.raises(SnapshotError, match=r"manifest\.json: is not a valid manifest"):
        snapshot.load_manifest(tmp_path, "0001")


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.sampled_from([1 << 62, 1 << 64, -(1 << 70), 1e308]),
              st.sampled_from(["", "../x", "/etc/passwd", "0001", "a\nb", "\x1b[2J", "kvm", "replay", "x" * 300]),
              st.text(max_size=3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_manifest_is_good_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Something else in one or two places of it."""
    directory = tmp_path_factory.mktemp("m") / "s"
    document = msgspec.to_builtins(made(directory, "0001", None))
    for _ in range(data.draw(st.integers(1, 2))):
        at, key = document, data.draw(st.sampled_from(sorted(document)))
        while isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
            at = at[key]
            key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        at[key] = data.draw(_json)
    rewritten(directory / "0001", document)
    before = tree(directory.parent)
    said = ""
    try:
        snapshot.verify(directory)
    except VmmError as exc:
        said = str(exc)
    assert not said or (said.isprintable() and str(directory) in said)
    assert tree(directory.parent) == before


# --- page files ---------------------------------------------------------------------------------------------------


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), packed=st.booleans())
def test_any_page_file_is_good_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject,
                                           packed: bool) -> None:
    """Bytes flipped, cut, inserted in any of its files; never a page out of place, never more than was there."""
    folder = tmp_path_factory.mktemp("p")
    whole = slot_file(folder, "f", {p: p + 1 for p in range(0, PAGES, 3)}, PAGES, packed)
    path = folder / data.draw(st.sampled_from(["f.map", "f.zst" if packed else "f.mem"]))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "empty", "fifo", "directory"]))
    if kind == "flip":
        content[at] ^= data.draw(st.integers(1, 255))
    elif kind == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=40))
    else:
        del content[0 if kind == "empty" else at:]
    path.write_bytes(content)
    if kind in ("fifo", "directory"):
        path.unlink()
        os.mkfifo(path) if kind == "fifo" else path.mkdir()
    memory = np.zeros((PAGES + 2) * PAGE, np.uint8)
    said = ""
    try:
        for first, count in read_pages(folder, "f", PAGES, whole.checksum, memory[PAGE:-PAGE]):
            assert 0 <= first < first + count <= PAGES
    except PageFileError as exc:
        said = str(exc)
    assert not said or (said.isprintable() and str(folder / "f") in said)
    if not said:    # something behind the stream, or in a hole: nobody looks at it
        assert [int(v) for v in memory[PAGE:-PAGE:PAGE]] == [p + 1 if p % 3 == 0 else 0 for p in range(PAGES)]
    assert not memory[:PAGE].any()
    assert not memory[-PAGE:].any()


@pytest.mark.parametrize("head", [b"\x00" + bytes([(29 - 10) << 3]),
                                  b"\x80" + bytes([(29 - 10) << 3]) + PAGE.to_bytes(4, "little")],
                         ids=["of-unknown-size", "of-the-right-size"])
def test_a_frame_that_asks_for_more_than_it_may_is_refused(tmp_path: Path, head: bytes) -> None:
    """512 MiB of window, asked for in the frame's header."""
    whole = slot_file(tmp_path, "f", {0: 1}, PAGES, packed=True)
    frame = bytes.fromhex("28b52ffd") + head + b"\0" * 20
    index = bytes.fromhex("502a4d18 04000000") + len(frame).to_bytes(4, "little")
    (tmp_path / "f.zst").write_bytes(index + frame)
    with pytest.raises(PageFileError, match="cannot be read"):
        list(read_pages(tmp_path, "f", PAGES, whole.checksum))


def test_a_packed_file_is_one_that_zstd_unpacks(tmp_path: Path) -> None:
    """Frame after frame, behind one that is skipped: the pages that are not zero, in their order."""
    slot_file(tmp_path, "f", {p: p % 3 for p in range(200)}, 200, packed=True)
    whole = zstandard.ZstdDecompressor().stream_reader(io.BytesIO((tmp_path / "f.zst").read_bytes()),
                                                       read_across_frames=True).read()
    assert list(whole[::PAGE]) == [p % 3 for p in range(200) if p % 3]


@pytest.mark.parametrize("packed", [False, True])
def test_damage_harms_the_block_that_it_is_in(tmp_path: Path, packed: bool) -> None:
    """Each block is told to be whole without the others."""
    whole = slot_file(tmp_path, "f", {p: 1 + p % 200 for p in range(300)}, 300, packed)
    path = tmp_path / ("f.zst" if packed else "f.mem")
    content = bytearray(path.read_bytes())
    at = len(content) // 2      # in the third of five blocks
    content[at] ^= 1
    path.write_bytes(content)
    found, said = [], []
    with PageFile(tmp_path, "f", 300, whole.checksum) as file:
        for block in range(5):
            try:
                data = file.read(block, Scratch())
            except PageFileError as exc:
                said.append(str(exc))
            else:
                found += data[:, -1].tolist()
    assert found == [1 + p % 200 for p in range(300) if p // 64 != 2]
    assert len(said) == 1
    assert "f: " in said[0]


@settings(max_examples=25, deadline=None)
@given(rounds=st.lists(st.tuples(st.dictionaries(st.integers(0, 149), st.integers(0, 3), max_size=30),
                                 st.sets(st.integers(0, 149))), min_size=1, max_size=4))
def test_pages_of_a_segment_are_as_they_were_when_they_were_copied(rounds: Any) -> None:
    """Model: a list of bytes for the segment, and one for the file. The segment has holes at first."""
    total = 150
    fd = os.memfd_create("segment")
    os.ftruncate(fd, total * PAGE)
    now, model = [0] * total, {}
    with tempfile.TemporaryDirectory() as folder:
        with PageWriter(Path(folder), "f", total) as writer:
            for writes, copied in rounds:
                for page, value in writes.items():
                    os.pwrite(fd, bytes([value]) * PAGE, page * PAGE)
                    now[page] = value
                words = np.zeros(3, np.uint64)
                for page in copied:
                    words[page // 64] |= np.uint64(1 << page % 64)
                    model[page] = now[page]
                writer.copy(fd, words)
            done = writer.finish()
        os.close(fd)
        found = {first + i: int(value)
                 for first, data in iter_pages(Path(folder), "f", total, str(done["checksum"]))
                 for i, value in enumerate(data[::PAGE])}
    assert found == model
    assert (done["pages"], done["zero_pages"]) == (len(model), sum(value == 0 for value in model.values()))


@settings(max_examples=25, deadline=None)
@given(rounds=st.lists(st.dictionaries(st.integers(0, 149), st.integers(0, 3), max_size=60), min_size=1, max_size=4),
       room=st.integers(0, 100))
def test_what_is_set_aside_is_written_as_it_was_then(tmp_path_factory: pytest.TempPathFactory, room: int,
                                                     rounds: list[dict[int, int]]) -> None:
    """Later copies of a page come after earlier ones; some find room that was mapped before, others do not."""
    folder, total = tmp_path_factory.mktemp("a"), 150
    memory, aside, model, told = np.zeros(total * PAGE, np.uint8), Aside(room), {}, []
    with PageWriter(folder, "f", total) as writer:
        for writes in rounds:
            words = np.zeros(3, np.uint64)
            for page, value in writes.items():
                memory[page * PAGE:(page + 1) * PAGE] = value
                words[page // 64] |= np.uint64(1 << page % 64)
            aside.copy(writer, memory, words)
            model |= writes
        memory[:] = 77
        assert aside.pages == sum(map(len, rounds))
        aside.write(lambda done, total: told.append((done, total)), 5, 5 + aside.pages)
        done = writer.finish()
    assert {first + i: int(value) for first, data in iter_pages(folder, "f", total, str(done["checksum"]))
            for i, value in enumerate(data[::PAGE])} == model
    assert not model or told[-1] == (5 + sum(map(len, rounds)), 5 + sum(map(len, rounds)))
    assert aside.pages == 0


def test_what_is_written_while_it_is_copied_does_not_harm_the_file(tmp_path: Path) -> None:
    """A page may be half of one and half of another then; but its checksum is of what is in the file."""
    total, over = 4096, threading.Event()
    fd = os.memfd_create("segment")
    os.truncate(fd, total * PAGE)
    memory = mmap.mmap(fd, total * PAGE)

    def write() -> None:
        value = 0
        while not over.is_set():
            value += 1
            np.frombuffer(memory, np.uint64)[::3] = value

    writer_thread = threading.Thread(target=write)
    writer_thread.start()
    try:
        with PageWriter(tmp_path, "f", total) as writer:
            for _ in range(3):
                writer.copy(fd, np.full(total // 64, (1 << 64) - 1, np.uint64))
            done = writer.finish()
    finally:
        over.set()
        writer_thread.join()
        os.close(fd)
    assert sum(count for _, count in read_pages(tmp_path, "f", total, str(done["checksum"]))) == total


# --- merge, delete ------------------------------------------------------------------------------------------------


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(st.tuples(st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 3), max_size=20),
                                 st.booleans()), min_size=1, max_size=5))
def test_a_merged_chain_is_what_the_chain_was(tmp_path_factory: pytest.TempPathFactory, layers: Any) -> None:
    directory = tmp_path_factory.mktemp("g")
    model: dict[int, int] = {}
    for number, (pages, packed) in enumerate(layers, 1):
        made(directory, f"{number:04d}", f"{number - 1:04d}" if number > 1 else None, pages, packed=packed)
        model |= pages
    merged = snapshot.merge(directory)
    assert contents(directory) == model
    assert merged.pages == len(model)
    assert merged.slots[0].zero_pages == sum(v == 0 for v in model.values())
    assert names(directory) == [merged.id]
    assert sorted(os.listdir(directory)) == [merged.id]
    snapshot.verify(directory)


@pytest.mark.parametrize("packed", [False, True])
def test_merging_takes_little_memory_whatever_the_slots_size(tmp_path: Path, packed: bool) -> None:
    total = 8 << 10         # pages: 32 MiB
    for number in range(1, 4):
        made(tmp_path, f"{number:04d}", f"{number - 1:04d}" if number > 1 else None,
             dict.fromkeys(range(number, total, 7), number), total=total, packed=packed)
    tracemalloc.start()
    try:
        snapshot.merge(tmp_path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 16 << 20, most
    snapshot.verify(tmp_path)


def test_a_merge_that_fails_leaves_the_chain_as_it_was(tmp_path: Path) -> None:
    made(tmp_path, "0001", None)
    made(tmp_path, "0002", "0001")
    damage(tmp_path / "0001" / "slot0.map")
    before = tree(tmp_path)
    with pytest.raises(PageFileError):
        snapshot.merge(tmp_path)
    assert tree(tmp_path) == before


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(st.tuples(st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, 3), max_size=20),
                                 st.booleans(), st.integers(0, 3)), min_size=2, max_size=6), data=st.data())
def test_one_in_the_middle_is_deleted_and_the_others_are_what_they_were(tmp_path_factory: pytest.TempPathFactory,
                                                                        layers: Any, data: st.DataObject) -> None:
    """A tree: each is built on one of the three before it."""
    directory = tmp_path_factory.mktemp("t")
    model: dict[str, dict[int, int]] = {}
    for number, (pages, packed, back) in enumerate(layers, 1):
        parent = f"{number - back:04d}" if 0 < back < number else None
        name = f"{number:04d}"
        made(directory, name, parent, pages, packed=packed)
        model[name] = (model[parent] if parent else {}) | pages
    while len(model) > 1:
        name = data.draw(st.sampled_from(sorted(model)))
        snapshot.delete(directory, name, fold=True)
        del model[name]
        assert names(directory) == sorted(model)
        assert {each: contents(directory, each) for each in model} == model
    snapshot.verify(directory)
    assert sorted(os.listdir(directory)) == sorted(model)


def test_one_that_is_damaged_is_not_folded(tmp_path: Path) -> None:
    made(tmp_path, "0001", None)
    made(tmp_path, "0002", "0001")
    made(tmp_path, "0003", "0002")
    damage(tmp_path / "0002" / "slot0.map")
    before = tree(tmp_path)
    with pytest.raises(PageFileError):
        snapshot.delete(tmp_path, "0002", fold=True)
    assert tree(tmp_path) == before


ACTS = {"snapshot merge": "snapshot.merge(Path(sys.argv[1]), '0003')",
        "snapshot delete": "snapshot.delete(Path(sys.argv[1]), '0004')"}


@pytest.mark.parametrize("how", ["kill", "fail"])
@pytest.mark.parametrize(("act", "at"), [(act, at) for act in ACTS for at in STEPS[act]])
def test_a_kill_or_an_error_at_every_step_leaves_the_chain_whole(tmp_path: Path, act: str, at: str,
                                                                 how: str) -> None:
    directory, steps = tmp_path / "s", tmp_path / "steps"
    for number in range(1, 5):
        made(directory, f"{number:04d}", f"{number - 1:04d}" if number > 1 else None)
    third, fourth = contents(directory, "0003"), contents(directory, "0004")
    steps.mkdir()
    (steps / f"{how}-{at}").write_text(str(errno.ENOSPC))
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nfrom pathlib import Path\nfrom vmm import snapshot, VmmError\ntry:\n"
                               f"    {ACTS[act]}\nexcept VmmError as e:\n    print(e)\n", str(directory)],
        env={**os.environ, "VMM_STEPS": str(steps)}, capture_output=True, text=True, timeout=60, check=False)
    assert not list(steps.iterdir()), done.stderr
    if how == "kill":
        assert done.returncode == -9
    else:
        assert done.stdout.endswith("No space left on device\n")
        assert done.stdout.count("\n") == 1
    assert contents(directory, "0003") == third
    if "0004" in names(directory):
        assert contents(directory, "0004") == fourth
    snapshot.verify(directory, "0003")
    # The same again, and whatever else, finds nothing in its way.
    snapshot.merge(directory, "0003")
    assert contents(directory, "0003") == third
    made(directory, "0007", "0003")
    snapshot.merge(directory)
    assert [n for n in os.listdir(directory) if n.startswith(".")] == []


def test_a_replayed_machine_cannot_be_in_a_manifest(tmp_path: Path) -> None:
    manifest = made(tmp_path, "0001", None)
    replayed = replace(manifest.spec, accel="replay")
    write_manifest(tmp_path / "0001", msgspec.structs.replace(manifest, spec=replayed))
    with pytest.raises(SnapshotError, match="no memory to restore"):
        snapshot.restore(tmp_path)
