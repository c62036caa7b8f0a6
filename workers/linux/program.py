"""A program as execve(2) finds it: its ELF file and its interpreter mapped, and the stack that it starts with.

Where things are is where Linux puts them without randomisation, so that a run can be repeated: a position-independent
program at 0x555555554000, the stack below 0x7ffffffff000, all else below 0x7ffff7fff000.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ipc.programs import REGISTERS

from .space import PAGE, PROT_EXEC, PROT_READ, PROT_WRITE, STACK_MOST, Backing, Beginning, Space

__all__ = ["Executable", "Started", "start"]

STACK_TOP = 0x7FFF_FFFF_F000
STACK_LIMIT = STACK_MOST * PAGE             # RLIMIT_STACK
_STACK_FIRST = 132 << 10                    # what is mapped at first; it grows
_POSITION_INDEPENDENT = 0x5555_5555_4000
_ARGUMENTS_MAX = STACK_LIMIT // 4           # execve(2)
_RIP, _RSP, _RFLAGS = (REGISTERS.index(name) for name in ("rip", "rsp", "rflags"))
_SCRIPT_LINE = 256                          # binfmt_script
_SCRIPTS_MAX = 4                            # interpreters that are scripts themselves

# uapi/linux/elf.h. Not pyelftools: a program is begun often, and six numbers are all that is wanted of its file.
_HEADER = struct.Struct("<6s10xHH4xQQ8x4x2xHH6x")       # Elf64_Ehdr
_SEGMENT = struct.Struct("<IIQQQQQQ")                   # Elf64_Phdr
_IDENT = b"\x7fELF\x02\x01"                             # 64 bits, the lower byte first
_ET_EXEC, _ET_DYN, _EM_X86_64, _PT_LOAD, _PT_INTERP = 2, 3, 62, 1, 3
_HEADERS_MAX = 65536        # bytes (load_elf_phdrs of fs/binfmt_elf.c)

# uapi/linux/auxvec.h
_AT = {"NULL": 0, "PHDR": 3, "PHENT": 4, "PHNUM": 5, "PAGESZ": 6, "BASE": 7, "FLAGS": 8, "ENTRY": 9, "UID": 11,
       "EUID": 12, "GID": 13, "EGID": 14, "PLATFORM": 15, "HWCAP": 16, "CLKTCK": 17, "SECURE": 23, "RANDOM": 25,
       "HWCAP2": 26, "EXECFN": 31, "SYSINFO_EHDR": 33, "MINSIGSTKSZ": 51}


class Executable(Backing, Protocol):
    """A regular file."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, count: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Started:
    """Where its first thread begins. ``path``: of the ELF file itself."""

    rip: int
    rsp: int
    path: bytes

    def registers(self) -> list[int]:
        """All of them, at its first instruction."""
        found = [0] * len(REGISTERS)
        found[_RIP], found[_RSP], found[_RFLAGS] = self.rip, self.rsp, 0x202
        return found


class _Header(NamedTuple):
    """``headers``: where its program headers are in the file."""

    type: int
    entry: int
    headers: int
    number: int


class _Segment(NamedTuple):
    """``size`` bytes of the file, ``full`` in memory."""

    type: int
    flags: int
    offset: int
    address: int
    physical: int
    size: int
    full: int
    align: int


@dataclass(frozen=True, slots=True)
class _Image:
    base: int
    entry: int
    headers: int        # address of its program headers
    count: int
    end: int            # address behind its last segment
    interpreter: bytes


def start(space: Space, opened: Callable[[bytes], Executable], path: bytes, arguments: Sequence[bytes],
          environment: Sequence[bytes], *, random: bytes, features: int = 0,
          vdso: Callable[[Space], int] | None = None) -> Started:
    """Map the program into an empty space. ``opened`` gives the file of a path, or raises OSError. ``random``: 16
    bytes; ``features``: CPUID 1, EDX; ``vdso`` maps one, and gives its address. Raises OSError (ENOEXEC, ENOENT, E2BIG,
    ENOMEM, ...), SegmentationFault, NoFrames, NoTables."""
    arguments = list(arguments)
    file, path, arguments = _program(opened, path, arguments)
    image = _map(space, file, None)
    loader = _map(space, opened(image.interpreter), 0) if image.interpreter else None
    library = vdso(space) if vdso else 0
    space.set_heap(-(-image.end // PAGE))
    rsp = _stack(space, file, path, arguments, environment, random, {
        "PHDR": image.headers, "PHENT": 56, "PHNUM": image.count, "PAGESZ": PAGE,
        "BASE": loader.base if loader else 0, "FLAGS": 0, "ENTRY": image.entry, "UID": 0, "EUID": 0, "GID": 0,
        "EGID": 0, "HWCAP": features, "HWCAP2": 0, "CLKTCK": 100, "SECURE": 0, "MINSIGSTKSZ": 3632,
        **({"SYSINFO_EHDR": library} if library else {})})
    return Started(loader.entry if loader else image.entry, rsp, path)


def _program(opened: Callable[[bytes], Executable], path: bytes,
             arguments: list[bytes]) -> tuple[Executable, bytes, list[bytes]]:
    """The ELF file, behind scripts that name their interpreter. Raises OSError."""
    name = path
    for _ in range(_SCRIPTS_MAX + 1):
        file = opened(path)
        head = file.read(0, _SCRIPT_LINE)
        if not head.startswith(b"#!"):
            return file, name, arguments
        words = head[2:].partition(b"\n")[0].strip(b" \t").split(None, 1)
        if not words:
            raise OSError(errno.ENOEXEC, "")
        arguments = [words[0], *(word.rstrip(b" \t") for word in words[1:]), name, *arguments[1:]]
        path = name = words[0]
    raise OSError(errno.ELOOP, "")


def _map(space: Space, file: Executable, base: int | None) -> _Image:
    """``base``: 0 for an interpreter, which goes where there is room. Raises OSError."""
    head = _header(file)
    segments = [_Segment(*each) for each in _SEGMENT.iter_unpack(file.read(head.headers, head.number * _SEGMENT.size))]
    loads = [each for each in segments if each.type == _PT_LOAD and each.full]
    if len(segments) != head.number or not loads:
        raise OSError(errno.ENOEXEC, "")
    low = min(each.address for each in loads) // PAGE * PAGE
    high = max(each.address + each.full for each in loads)
    shift = 0
    if head.type == _ET_DYN:
        wish = 0 if base is not None else _POSITION_INDEPENDENT
        place = space.map(wish, high - low, 0, fixed=bool(wish), reserve=False)     # the whole of it, in one piece
        space.unmap(place, high - low)
        shift = place - low
    for each in loads:
        _segment(space, file, each, shift)
    interpreter = next((file.read(each.offset, each.size).rstrip(b"\0") for each in segments
                        if each.type == _PT_INTERP), b"")
    headers = next((each.address + head.headers - each.offset for each in loads
                    if each.offset <= head.headers < each.offset + each.size), 0)
    return _Image(low + shift, head.entry + shift, headers + shift if headers else 0, head.number, high + shift,
                  interpreter)


def _header(file: Executable) -> _Header:
    """Of a program for this machine. Raises OSError."""
    data = file.read(0, _HEADER.size)
    if len(data) == _HEADER.size:
        ident, kind, machine, entry, headers, size, count = _HEADER.unpack(data)
        if (ident == _IDENT and machine == _EM_X86_64 and kind in (_ET_EXEC, _ET_DYN) and size == _SEGMENT.size
                and count * size <= _HEADERS_MAX):
            return _Header(kind, entry, headers, count)
    raise OSError(errno.ENOEXEC, "")


def _segment(space: Space, file: Executable, segment: _Segment, shift: int) -> None:
    """File and zeros behind it. Raises OSError."""
    address, offset, size, full = segment.address + shift, segment.offset, segment.size, segment.full
    flags = segment.flags
    prot = (PROT_READ if flags & 4 else 0) | (PROT_WRITE if flags & 2 else 0) | (PROT_EXEC if flags & 1 else 0)
    if address % PAGE != offset % PAGE or size > full:
        raise OSError(errno.ENOEXEC, "")
    start = address // PAGE * PAGE
    filled = start
    if size:
        space.map(start, address + size - start, prot, fixed=True, backing=file, offset=offset // PAGE)
        filled = -(-(address + size) // PAGE) * PAGE
        if full > size and prot & PROT_WRITE and (address + size) % PAGE:
            space.write(address + size, bytes(filled - address - size))     # of the last page, what is not the file's
    end = -(-(address + full) // PAGE) * PAGE
    if end > filled:
        space.map(filled, end - filled, prot, fixed=True)


def _stack(space: Space, file: Executable, path: bytes, arguments: Sequence[bytes], environment: Sequence[bytes],
           random: bytes, auxiliary: dict[str, int]) -> int:
    """What a program finds on it (x86-64 psABI, 3.4.1); the stack pointer. Raises OSError."""
    if sum(len(text) + 9 for text in (*arguments, *environment, path)) > _ARGUMENTS_MAX:
        raise OSError(errno.E2BIG, "")
    texts = bytearray()
    places: list[int] = []
    for text in (path, b"x86_64", *arguments, *environment):
        places.append(len(texts))
        texts += text + b"\0"
    top = STACK_TOP - 8
    base = (top - len(texts) - len(random)) & ~15
    name, platform, *strings = [base + len(random) + at for at in places]
    auxiliary |= {"RANDOM": base, "EXECFN": name, "PLATFORM": platform}
    words = [len(arguments), *strings[:len(arguments)], 0, *strings[len(arguments):], 0]
    vector = [part for key, value in auxiliary.items() for part in (_AT[key], value)] + [_AT["NULL"], 0]
    words += vector
    rsp = (base - 8 * len(words)) & ~15
    size = max(_STACK_FIRST, STACK_TOP - rsp + (16 << 10))
    space.map(STACK_TOP - size, size, PROT_READ | PROT_WRITE, fixed=True, name="stack", grows=True)
    space.write(rsp, struct.pack(f"<{len(words)}Q", *words))
    space.write(base, random + bytes(texts))
    first, end = base + len(random) + places[2] if strings else 0, base + len(random) + len(texts)
    middle = strings[len(arguments)] if environment else end
    space.begin(Beginning(file, struct.pack(f"<{len(vector)}Q", *vector), (first, middle), (middle, end), rsp))
    return rsp
