"""The image loader: what it takes, and one clear line for everything else."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.guests import WORKLOADS
from vmm.machine.loader import GuestImage, GuestImageError, Segment, check_fits, load_image

PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE = 1, 2, 3, 4
ET_REL, ET_EXEC, ET_DYN = 1, 2, 3
BODY_AT = 0x400


def elf(*headers: dict[str, int], entry: int = 0x100000, kind: int = ET_EXEC, machine: int = 62,
        body: bytes = bytes(range(256))) -> bytes:
    """An ELF file: program headers (default: one that loads ``body`` at 1 MiB), body at 0x400."""
    if not headers:
        headers = ({},)
    out = struct.pack("<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, kind, machine, 1, entry, 64, 0, 0,
                      64, 56, len(headers), 0, 0, 0)
    for header in headers:
        fields = {"type": PT_LOAD, "flags": 5, "offset": BODY_AT, "vaddr": 0, "paddr": 0x100000,
                  "filesz": len(body), "memsz": len(body), "align": 1, **header}
        out += struct.pack("<IIQQQQQQ", *fields.values())
    return out.ljust(BODY_AT, b"\0") + body


@pytest.fixture
def load(tmp_path):
    """load(bytes) writes a file and loads it."""
    def load_bytes(data: bytes, load_address: int | None = None) -> GuestImage:
        path = tmp_path / "image"
        path.write_bytes(data)
        return load_image(path, load_address)

    return load_bytes


# --- good images ------------------------------------------------------------------------------------


def test_segments_at_their_physical_addresses(load):
    image = load(elf({"paddr": 0x300000, "memsz": 0x5000}, {"type": PT_NOTE},
                     {"vaddr": 0xFFFF_8000_0000_0000}, {"paddr": 0x200000, "filesz": 0, "memsz": 0}))
    assert image.segments == (Segment(0x100000, bytes(range(256)), 256),
                              Segment(0x300000, bytes(range(256)), 0x5000))
    assert (image.entry, image.start, image.end) == (0x100000, 0x100000, 0x305000)
    assert image.ranges == [(0x100000, 0x100100), (0x300000, 0x305000)]


def test_flat_binary(load):
    image = load(b"\xf4\xeb", 0x7C00)
    assert image.segments == (Segment(0x7C00, b"\xf4\xeb", 2),)
    assert (image.entry, image.end) == (0x7C00, 0x7C02)


def test_elf_with_a_load_address_is_taken_as_it_is(load):
    assert load(elf(), 0x1000).segments[0].data == elf()


# --- bad images ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "message"), [
    (b"", "is empty"),
    (b"#!/bin/sh\n", "is not an ELF file (a flat binary needs a load address)"),
    (b"\x7fELF", "is a damaged ELF file (truncated in its header)"),
    (elf()[:63], "is a damaged ELF file (truncated in its header)"),
    (elf()[:100], "is a damaged ELF file ("),
    (elf()[:-1], "is a damaged ELF file (truncated in a segment)"),
    (elf()[:4] + b"\1" + elf()[5:], "is a 32-bit ELF file, not a 64-bit one"),
    (elf(machine=183), "is for another architecture (EM_AARCH64), not for x86-64"),
    (elf(kind=ET_DYN), "is not a static executable (ET_DYN, link with -static -no-pie)"),
    (elf(kind=ET_REL), "is not a static executable (ET_REL"),
    (elf({}, {"type": PT_INTERP}), "is dynamically linked"),
    (elf({}, {"type": PT_DYNAMIC}), "is dynamically linked"),
    (elf({"type": PT_NOTE}), "has nothing to load (no PT_LOAD segment)"),
    (elf({"memsz": 0, "filesz": 0}), "has nothing to load"),
    (elf({"memsz": 255}), "has a segment of 256 bytes in the file but 255 in memory"),
    (elf({}, {"paddr": 0x1000FF}), "has overlapping segments (0x100000-0x1000ff and 0x1000ff-0x1001fe)"),
    (elf({"paddr": (1 << 64) - 16}), "not valid physical addresses"),
    (elf({"memsz": 1 << 63}), "not valid physical addresses"),
    (elf({"offset": 1 << 63}), "truncated in a segment"),
    (elf(entry=0xFFFFF), "has its entry point 0xfffff outside its segments"),
    (elf(*[{}] * 300), "has too many program headers (300, at most 256)"),
    (elf()[:54] + b"\0\0" + elf()[56:], "is a damaged ELF file (program headers of 0 bytes)"),
])
def test_bad_file_is_one_line_that_names_it(load, tmp_path, data, message):
    with pytest.raises(GuestImageError) as caught:
        load(data)
    text = str(caught.value)
    assert text.startswith(f"guest image {tmp_path / 'image'} ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("address", [-1, (1 << 52) - 3])
def test_flat_binary_outside_physical_addresses(load, address):
    with pytest.raises(GuestImageError, match="not a valid physical address"):
        load(b"1234", address)


def test_missing_file(tmp_path):
    with pytest.raises(GuestImageError, match=f"{tmp_path}/none cannot be read: No such file or directory"):
        load_image(tmp_path / "none")


def test_directory(tmp_path):
    with pytest.raises(GuestImageError, match="is a directory"):
        load_image(tmp_path)


def test_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(GuestImageError, match="is not a regular file"):
        load_image(tmp_path / "fifo")


def test_name_that_no_file_can_have():
    with pytest.raises(GuestImageError, match="cannot be read"):
        load_image("a\0b")


def test_unreadable_file_names_the_reason(tmp_path, monkeypatch):
    def refuse(*_args):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "image").write_bytes(b"1")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(GuestImageError, match="cannot be read: Permission denied"):
        load_image(tmp_path / "image")


def test_huge_file_is_not_read(tmp_path):
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(GuestImageError, match="is too large"):
        load_image(tmp_path / "huge")


# --- placement -----------------------------------------------------------------------------------------


def test_image_within_memory(load):
    image = load(elf({}, {"paddr": 0x1FFF80}))
    check_fits(image, [(0, 2 << 20), (2 << 20, 1 << 20)])  # the second segment spans both slots
    check_fits(image, [(2 << 20, 1 << 20), (0, 2 << 20)])


@pytest.mark.parametrize(("slots", "hole"), [
    ([], 0x100000),
    ([(0, 0x100000)], 0x100000),
    ([(0, 0x100080)], 0x100080),
    ([(0, 0x100080), (0x1000C0, 0x1000)], 0x100080),
    ([(0x100001, 0x1000)], 0x100000),
])
def test_image_outside_memory(load, slots, hole):
    message = f"is loaded at 0x100000-0x1000ff, but there is no memory at {hole:#x}"
    with pytest.raises(GuestImageError, match=message):
        check_fits(load(elf()), slots)


# --- damage ------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_images_raise_nothing_else(tmp_path_factory, data):
    """Bytes changed anywhere in the headers, and the file cut anywhere."""
    original = data.draw(st.sampled_from([elf(), elf({}, {"paddr": 0x300000}), SAMPLE]))
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, min(len(damaged), 240) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    path = _scratch(tmp_path_factory)
    path.write_bytes(damaged[:length])
    try:
        image = load_image(path)
        check_fits(image, [(0, 1 << 30)])
    except GuestImageError as exc:
        refusal = str(exc)
    else:
        assert image.start <= image.entry < image.end <= 1 << 30
        return
    assert "\n" not in refusal
    assert str(path) in refusal


SAMPLE = WORKLOADS["hello"].image.read_bytes()


def _scratch(factory: pytest.TempPathFactory) -> Path:
    return factory.getbasetemp() / "damaged-image"
