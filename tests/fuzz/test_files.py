"""Files that a user may name: configurations, guest images, snapshots, traces."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import yaml
import zstandard
from damage import changed, damaged
from hypothesis import given
from hypothesis import strategies as st
from machines import spec
from places import CONFIGS
from surface import Surface

from vmm import snapshot
from vmm.client.config import load_config
from vmm.client.machine import Machine
from vmm.client.plan import plan
from vmm.consumers.snapshot.manifest import load_manifest
from vmm.consumers.snapshot.pagefile import PAGE, PageWriter, compress, read_pages
from vmm.errors import VmmError
from vmm.guests import WORKLOADS
from vmm.machine.loader import load_image
from vmm.machine.spec import RamSlot
from vmm.machine.tracefile import TraceHeader, TraceReader, TraceWriter

CONFIG_TEXTS = [path.read_text() for path in sorted(CONFIGS.glob("*.yaml"))]


def test_configurations_as_text(surface: Surface) -> None:
    path = surface.folder / "c.yaml"

    @surface.settings(4)
    @given(damaged([text.encode() for text in CONFIG_TEXTS]))
    def try_it(data: bytes) -> None:
        path.write_bytes(data)
        surface.read(lambda: load_config(path), VmmError, lines=True)

    try_it()


def test_configurations_by_key(surface: Surface) -> None:
    """And what is made of one."""
    path = surface.folder / "c.yaml"

    @surface.settings(4)
    @given(changed([yaml.safe_load(text) for text in CONFIG_TEXTS if not text.lstrip().startswith("sweep")]))
    def try_it(document: Any) -> None:
        try:
            path.write_text(yaml.safe_dump(document))
        except (UnicodeEncodeError, yaml.YAMLError):
            return
        surface.read(lambda: plan(load_config(path)), VmmError, lines=True)

    try_it()


def test_guest_images(surface: Surface) -> None:
    path = surface.folder / "image"
    images = [each.image.read_bytes() for each in WORKLOADS.values()]

    @surface.settings()
    @given(damaged(images), st.sampled_from([None, None, 0, 0x100000, -1, 2**64]))
    def try_it(data: bytes, address: int | None) -> None:
        path.write_bytes(data)
        surface.read(lambda: load_image(path, address), VmmError)

    try_it()


@pytest.fixture
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real one."""
    folder = tmp_path_factory.mktemp("fuzz") / "chain"
    idle = spec("idle", accel="unicorn", name="fuzz-snap", vcpus=1, milliseconds=0, timeout=None)
    with Machine.launch(idle) as machine:
        machine.pause()
        snapshot.create(machine, folder)
    return folder


def test_manifests(surface: Surface, snapshots: Path) -> None:
    """Its checksum is right: only what it says is wrong."""
    text = (snapshots / "0001" / "manifest.json").read_bytes()
    target = surface.folder / "0001"
    target.mkdir()

    @surface.settings()
    @given(st.one_of(damaged([text]), changed([json.loads(text)])))
    def try_it(found: Any) -> None:
        try:
            data = found if isinstance(found, bytes) else json.dumps(found, default=repr).encode()
        except ValueError:
            return
        (target / "manifest.json").write_bytes(data)
        (target / "manifest.sum").write_text(hashlib.blake2b(data, digest_size=32).hexdigest())
        surface.read(lambda: load_manifest(surface.folder, "0001"), VmmError)

    try_it()


@pytest.mark.parametrize("packed", [False, True])
def test_page_files(surface: Surface, *, packed: bool) -> None:
    """The map, or the pages."""
    pages = 40
    memory = np.arange(pages * PAGE, dtype=np.uint32).view(np.uint8)[:pages * PAGE].copy()
    with PageWriter(surface.folder, "p", pages) as writer:
        writer.write(memory, np.array([0, 3, 4, 39]))
        checksum = str(writer.finish()["checksum"])
    if packed:
        compress(surface.folder, "p")
    files = [path for path in surface.folder.iterdir() if path.suffix in (".map", ".mem", ".zst")]
    whole = {path: path.read_bytes() for path in files}
    read = np.zeros_like(memory)

    @surface.settings(1 if packed else 4)
    @given(st.sampled_from(sorted(files)).flatmap(lambda path: st.tuples(st.just(path), damaged([whole[path]]))))
    def try_it(found: tuple[Path, bytes]) -> None:
        path, data = found
        path.write_bytes(data)
        surface.read(lambda: list(read_pages(surface.folder, "p", pages, checksum, read)), VmmError)
        path.write_bytes(whole[path])

    try_it()


def test_traces(surface: Surface) -> None:
    """Each checksum is right, whatever lies between: damage goes in, and the sums are made anew."""
    path = surface.folder / "t.trace"
    header = TraceHeader(machine="m", accelerator="kvm", vcpus=2, ring_entries=1024, slots=[RamSlot(0, 0, 64 * 4096)],
                         interval=0.1)
    with TraceWriter(path, header) as writer:
        for i in range(3):
            writer.append(i * 1000, i % 2, np.arange(5, dtype=np.uint64))
        writer.finish()
    parts = split(path.read_bytes())

    @surface.settings()
    @given(st.data())
    def try_it(data: Any) -> None:
        heads, bodies = [list(each) for each in zip(*parts, strict=True)]
        which = data.draw(st.integers(0, len(parts) - 1))
        what = data.draw(st.sampled_from(["head", "body", "packed", "raw"]))
        if what == "head":
            heads[which] = data.draw(damaged([heads[which]]))
        elif what == "body":
            bodies[which] = data.draw(damaged([bodies[which]]))
        elif what == "packed" and which and bodies[which].startswith(b"\x28\xb5\x2f\xfd"):
            inside = zstandard.ZstdDecompressor().decompress(bodies[which])
            bodies[which] = zstandard.ZstdCompressor().compress(data.draw(damaged([inside])))
        text = joined(list(zip(heads, bodies, strict=True)))
        path.write_bytes(data.draw(damaged([text])) if what == "raw" else text)
        surface.read(lambda: read_trace(path), VmmError)

    try_it()


@pytest.mark.parametrize(("records", "entries", "taken"), [(1, 1 << 24, False), (1 << 18, 0, True),
                                                           (1 << 18, 1 << 19, True)])
def test_a_small_trace_does_not_become_large(surface: Surface, records: int, entries: int, *, taken: bool) -> None:
    """Some hundred bytes that say that they are many zeros. One took 768 MiB."""
    path = surface.folder / "t.trace"
    with TraceWriter(path, TraceHeader(machine="m", accelerator="kvm", vcpus=1, ring_entries=1024,
                                       slots=[RamSlot(0, 0, 4096)], interval=0.1)) as writer:
        writer.append(0, 0, np.zeros(1, np.uint64))
        writer.finish()
    (head, text), *_ = split(path.read_bytes())
    counts = np.zeros(records, [("time_ns", "<u8"), ("vcpu", "<u4"), ("count", "<u4")])
    counts["count"][-1] = entries
    packed = zstandard.ZstdCompressor().compress(counts.tobytes() + bytes(8 * entries))
    end = json.dumps({"records": records, "entries": entries}).encode()
    parts = [(struct.pack("<4sIII", b"DATA", records, entries, len(packed)), packed),
             (struct.pack("<4sIII", b"END ", 0, 0, len(end)), end)]
    path.write_bytes(joined([(head, text), *parts]))
    del counts, packed
    with surface.longer(60.0):
        surface.read(lambda: read_trace(path), VmmError)
    assert surface.counts["taken"] == taken


def split(data: bytes) -> list[tuple[bytes, bytes]]:
    """(head, body) of the header and of each block of a trace (vmm/machine/tracefile.py has the format)."""
    size = struct.unpack_from("<8sII", data)[2]
    found = [(data[:16], data[16:16 + size])]
    at = 16 + size + 8
    while at < len(data):
        length = struct.unpack_from("<4sIII", data, at)[3]
        found.append((data[at:at + 16], data[at + 24:at + 24 + length]))
        at += 24 + length
    return found


def joined(parts: list[tuple[bytes, bytes]]) -> bytes:
    """A trace of such parts, each checksum right: behind the header, and within a block."""
    sums = [xxhash.xxh3_64_intdigest(head + body).to_bytes(8, "little") for head, body in parts]
    (head, text), *blocks = parts
    return head + text + sums[0] + b"".join(each + digest + body for (each, body), digest in
                                           zip(blocks, sums[1:], strict=True))


def read_trace(path: Path) -> None:
    with TraceReader(path) as reader:
        for _ in reader:
            pass
