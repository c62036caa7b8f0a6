"""Guest images: static x86-64 ELF executables, or flat binaries with a load address.

An image is loaded at its *physical* addresses (``p_paddr``) and entered at ``e_entry``; nothing is
relocated. Whatever is wrong with a file is a GuestImageError of one line that names the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import VmmError
from ..inputs import input_name, read_input

if TYPE_CHECKING:
    from elftools.elf.elffile import ELFFile

__all__ = ["IMAGE_SIZE_MAX", "GuestImage", "GuestImageError", "Segment", "check_fits", "load_image"]

IMAGE_SIZE_MAX = 1 << 30       # bytes of a file; a larger one is surely not meant
_ADDRESS_MAX = 1 << 52         # x86-64 physical addresses
_ELF_HEADER_SIZE = 64
_PROGRAM_HEADERS_MAX = 256


class GuestImageError(VmmError):
    """The image cannot be used; the text is one line that names the file."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes to place at ``gpa``; the rest of ``mem_size`` bytes is zero-filled."""

    gpa: int
    data: bytes
    mem_size: int

    @property
    def end(self) -> int:
        return self.gpa + self.mem_size


@dataclass(frozen=True, slots=True)
class GuestImage:
    """An image ready to be copied into guest RAM. Segments ascend and do not overlap."""

    path: Path
    entry: int                       # GPA of the first instruction
    segments: tuple[Segment, ...]

    @property
    def start(self) -> int:
        return self.segments[0].gpa

    @property
    def end(self) -> int:
        """First GPA after the image."""
        return self.segments[-1].end

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """[start, end) of every segment."""
        return [(segment.gpa, segment.end) for segment in self.segments]


def load_image(path: str | os.PathLike[str], load_address: int | None = None) -> GuestImage:
    """Read the image at ``path``. With ``load_address`` the file is flat: loaded as it is at that GPA
    and entered at its first byte. Raises GuestImageError."""
    path = Path(path)
    data = _read(path)
    if load_address is not None:
        return _flat(path, data, load_address)
    if not data.startswith(b"\x7fELF"):
        raise _error(path, "is not an ELF file (a flat binary needs a load address)")
    try:
        return _parse_elf(path, data)
    except GuestImageError:
        raise
    except Exception as exc:
        # pyelftools checks little of what it parses: a damaged file comes out as a KeyError, a
        # construct error, a MemoryError or whatever else the bytes lead to.
        raise _error(path, f"is a damaged ELF file ({type(exc).__name__})") from None


def check_fits(image: GuestImage, slots: Iterable[tuple[int, int]]) -> None:
    """Raise GuestImageError unless every segment lies in RAM; ``slots`` are (gpa, size) pairs.

    A segment may cross from one slot into the next where they touch.
    """
    for segment in image.segments:
        at = segment.gpa
        for gpa, size in sorted(slots):
            if gpa <= at < gpa + size:
                at = gpa + size
        if at < segment.end:
            raise _error(image.path, f"is loaded at {segment.gpa:#x}-{segment.end - 1:#x}, but there is no "
                                     f"memory at {at:#x}")


def _error(path: Path, what: str) -> GuestImageError:
    return GuestImageError(f"guest image {input_name(path)} {what}")


def _read(path: Path) -> bytes:
    data = read_input(path, IMAGE_SIZE_MAX, _error)
    if not data:
        raise _error(path, "is empty")
    return data


def _flat(path: Path, data: bytes, load_address: int) -> GuestImage:
    if load_address < 0 or load_address + len(data) > _ADDRESS_MAX:
        raise _error(path, f"cannot be loaded at {load_address:#x}: not a valid physical address")
    return GuestImage(path, load_address, (Segment(load_address, data, len(data)),))


def _parse_elf(path: Path, data: bytes) -> GuestImage:
    from elftools.elf.elffile import ELFFile  # a machine without an image has no use for it

    if len(data) < _ELF_HEADER_SIZE:
        raise _error(path, "is a damaged ELF file (truncated in its header)")
    elf = ELFFile(BytesIO(data))
    if elf.elfclass != 64:
        raise _error(path, f"is a {elf.elfclass}-bit ELF file, not a 64-bit one")
    if elf["e_machine"] != "EM_X86_64" or not elf.little_endian:
        raise _error(path, f"is for another architecture ({elf['e_machine']}), not for x86-64")
    if elf["e_type"] != "ET_EXEC":
        raise _error(path, f"is not a static executable ({elf['e_type']}, link with -static -no-pie)")
    segments = []
    for header in _program_headers(path, elf):
        kind = header["p_type"]
        if kind in ("PT_INTERP", "PT_DYNAMIC"):
            raise _error(path, "is dynamically linked (link with -static -no-pie)")
        if kind == "PT_LOAD" and header["p_memsz"]:
            segments.append(_segment(path, data, header))
    if not segments:
        raise _error(path, "has nothing to load (no PT_LOAD segment)")
    segments.sort(key=lambda segment: segment.gpa)
    for one, two in pairwise(segments):
        if one.end > two.gpa:
            raise _error(path, f"has overlapping segments ({one.gpa:#x}-{one.end - 1:#x} and "
                               f"{two.gpa:#x}-{two.end - 1:#x})")
    entry = elf["e_entry"]
    if not any(segment.gpa <= entry < segment.end for segment in segments):
        raise _error(path, f"has its entry point {entry:#x} outside its segments")
    return GuestImage(path, entry, tuple(segments))


def _program_headers(path: Path, elf: ELFFile) -> Iterator[Any]:
    """The raw program headers. Not ``elf.iter_segments``: it interprets what it finds (dynamic
    section, notes) and believes any count, which may never end on a damaged file."""
    from elftools.common.utils import struct_parse

    if elf["e_phnum"] and elf["e_phentsize"] != elf.structs.Elf_Phdr.sizeof():
        raise _error(path, f"is a damaged ELF file (program headers of {elf['e_phentsize']} bytes)")
    if elf["e_phnum"] > _PROGRAM_HEADERS_MAX:
        raise _error(path, f"has too many program headers ({elf['e_phnum']}, at most {_PROGRAM_HEADERS_MAX})")
    for number in range(elf["e_phnum"]):
        yield struct_parse(elf.structs.Elf_Phdr, elf.stream, elf["e_phoff"] + number * elf["e_phentsize"])


def _segment(path: Path, data: bytes, header: Any) -> Segment:
    offset, gpa = header["p_offset"], header["p_paddr"]
    file_size, mem_size = header["p_filesz"], header["p_memsz"]
    if file_size > mem_size:
        raise _error(path, f"has a segment of {file_size} bytes in the file but {mem_size} in memory")
    if offset + file_size > len(data):
        raise _error(path, "is a damaged ELF file (truncated in a segment)")
    if gpa + mem_size > _ADDRESS_MAX:
        raise _error(path, f"has a segment of {mem_size} bytes at {gpa:#x}: not valid physical addresses")
    return Segment(gpa, data[offset:offset + file_size], mem_size)
