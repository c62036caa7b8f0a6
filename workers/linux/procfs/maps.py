"""Mappings as /proc shows them (proc_pid_maps(5))."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..inodes import Inode
from ..space import PAGE, PROT_EXEC, PROT_READ, PROT_WRITE, Mapping, Space

if TYPE_CHECKING:
    from ..vfs import FileSystem

__all__ = ["Sizes", "label", "maps", "rights", "smaps"]

_NAME_AT = 73       # column
_KIBIBYTES = PAGE // 1024


class Sizes:
    """Of an address space, in pages."""

    def __init__(self, space: Space) -> None:
        self.virtual = self.resident = self.shared = self.text = self.data = self.stack = 0
        program = space.beginning.file if space.beginning else None
        self.library = 0
        for each in space.mappings:
            size, resident = each.end - each.start, space.resident(each)
            self.virtual += size
            self.resident += resident
            if each.backing is not None:
                self.shared += resident
            if each.grows:
                self.stack += size
            elif each.prot & PROT_WRITE and not each.shared:
                self.data += size
            if each.prot & PROT_EXEC and each.backing is program:
                self.text += size
            elif each.prot & PROT_EXEC:
                self.library += size


def maps(files: FileSystem, space: Space) -> bytes:
    return b"".join(_line(files, each) for each in space.mappings)


def smaps(files: FileSystem, space: Space) -> bytes:
    """What of it is known: pages with a frame are taken as written to where they may be."""
    parts = []
    for each in space.mappings:
        size, resident = (each.end - each.start) * _KIBIBYTES, space.resident(each) * _KIBIBYTES
        dirty = resident if each.prot & PROT_WRITE else 0
        anonymous = resident if each.backing is None else 0
        own, common = (0, 1) if each.shared else (1, 0)
        values = {"Size": size, "KernelPageSize": 4, "MMUPageSize": 4, "Rss": resident, "Pss": resident,
                  "Pss_Dirty": dirty, "Shared_Clean": (resident - dirty) * common, "Shared_Dirty": dirty * common,
                  "Private_Clean": (resident - dirty) * own, "Private_Dirty": dirty * own, "Referenced": resident,
                  "Anonymous": anonymous, "LazyFree": 0, "AnonHugePages": 0, "Swap": 0, "SwapPss": 0, "Locked": 0}
        parts.append(_line(files, each) + "".join(
            f"{name + ':':<16}{value:>8} kB\n" for name, value in values.items()).encode() + _flags(each))
    return b"".join(parts)


def _flags(mapping: Mapping) -> bytes:
    flags = [name for bit, name in ((PROT_READ, b"rd"), (PROT_WRITE, b"wr"), (PROT_EXEC, b"ex")) if mapping.prot & bit]
    flags += [b"sh"] if mapping.shared else []
    flags += [b"mr", b"mw", b"me"] + ([b"gd"] if mapping.grows else [])
    return b"THPeligible:           0\nVmFlags: " + b" ".join(flags) + b" \n"


def label(files: FileSystem, mapping: Mapping) -> bytes:
    """What is mapped: a path, or a name in brackets, or nothing. Raises OSError where a source fails."""
    if isinstance(mapping.backing, Inode):
        return files.name_of(mapping.backing).replace(b"\n", b"\\012")
    return b"[%s]" % mapping.name.encode() if mapping.name else b""


def rights(mapping: Mapping) -> bytes:
    """As ``rw-p``."""
    letters = (letter if mapping.prot & bit else ord("-") for bit, letter in zip((1, 2, 4), b"rwx", strict=True))
    return bytes(letters) + (b"s" if mapping.shared else b"p")


def _line(files: FileSystem, mapping: Mapping) -> bytes:
    backing = mapping.backing
    name, device, number, offset = label(files, mapping), 0, 0, 0
    if isinstance(backing, Inode):
        device, number, offset = backing.store.device, backing.number, mapping.offset * PAGE
    line = b"%08x-%08x %s %08x %02x:%02x %d " % (
        mapping.start * PAGE, mapping.end * PAGE, rights(mapping), offset, os.major(device), os.minor(device), number)
    return (line.ljust(_NAME_AT) + name if name else line) + b"\n"
