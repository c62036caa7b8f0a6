"""What of a process is watched: everything that it can write, or a VM's memory alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ipc.linux.foreign import Mapping

from ...errors import VmmError, one_line

__all__ = ["Block", "MemorySize", "chooser", "command_line", "is_vmm", "told_sizes", "vm_memory", "writable"]

#: What no process writes by itself, and what belongs to a device.
_SPECIAL = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "anon_inode:", "/dev/vfio", "/dev/dri")
_NAMES = {"": "[anonymous]", "/dev/zero (deleted)": "[shared]"}
_VMMS = ("qemu-system-", "qemu-kvm", "kvm", "firecracker", "cloud-hypervisor", "crosvm", "kvmtool", "lkvm")
_LEAST = 8 << 20        # bytes: smaller mappings are no VM's memory, if its size is not known
_UNITS = {"": 1 << 20, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Block(NamedTuple):
    """Memory in one piece, [start, end), of one kind."""

    start: int
    end: int
    name: str           # "[heap]", "[anonymous]", a path; of a VM "ram"
    #: Its holes are left as they are: protecting them would take page tables for all of a reservation. (Of private
    #: anonymous memory a page that was not there and then is has been written, or is the zero page.)
    sparse: bool

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


class MemorySize(NamedTuple):
    """Of a piece of a VM's memory, as its VMM was told: its name there, and bytes."""

    name: str
    size: int


def writable(there: Iterable[Mapping]) -> list[Block]:
    """All that the process can write. What lies side by side and is of one kind is one block, whether or not the
    kernel has it in one piece (which it has not, where a part is registered and another is not)."""
    found: list[Block] = []
    last = None
    for mapping in there:
        if mapping.mode[1] != "w" or mapping.name.startswith(_SPECIAL):
            continue
        kind = mapping.mode, mapping.inode, mapping.name
        if found and found[-1].end == mapping.start and kind == last:
            found[-1] = found[-1]._replace(end=mapping.end)
        else:
            found.append(Block(mapping.start, mapping.end, one_line(_NAMES.get(mapping.name, mapping.name)),
                               mapping.private and mapping.anonymous))
        last = kind
    return found


def is_vmm(pid: int) -> bool:
    """It is a program that runs VMs, by its name. Raises OSError."""
    return _program(pid).startswith(_VMMS)


def _program(pid: int) -> str:
    words = command_line(pid)
    return words[0].rpartition("/")[2] if words else ""


def command_line(pid: int) -> list[str]:
    """Of a process; empty for a kernel thread. Raises OSError."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")


def vm_memory(there: Iterable[Mapping], sizes: Iterable[MemorySize] = ()) -> list[Block]:
    """The blocks that are a VM's memory: for each of ``sizes`` a mapping of exactly that size, or two of one kind that
    have it together (below 4 GiB and above). Where there are none: the largest, and of a file all that is mapped of
    it. Raises VmmError where nothing is large enough."""
    left = [b for b in writable(there) if b.size >= _LEAST or any(b.size == s.size for s in sizes)]
    if not left:
        raise VmmError(f"no mapping has at least {_LEAST >> 20} MiB, so none is a VM's memory (--all watches all)")
    found = []
    for wanted in sizes:
        for part in _of_size(left, wanted.size):
            left.remove(part)
            found.append(part._replace(name=wanted.name))
    if not found:
        largest = max(left, key=lambda b: b.size)
        found = [b for b in left if b == largest or (not b.sparse and b.name == largest.name)]
        found = [b._replace(name="ram") for b in found]
    return sorted(found)


def _of_size(blocks: list[Block], size: int) -> list[Block]:
    """One of exactly this size, or two."""
    for one in blocks:
        if one.size == size:
            return [one]
    for one, other in itertools.combinations(blocks, 2):
        if one.size + other.size == size and one.sparse == other.sparse and one.name == other.name:
            return [one, other]
    return []


def chooser(what: str | None, vmm: bool, sizes: Sequence[MemorySize]) -> Callable[[Iterable[Mapping]], list[Block]]:
    """What is watched of a process: ``what`` is "ram", "all", or None (RAM of a VMM, all of others). Raises VmmError
    for the RAM of what is no VMM."""
    if what == "ram" and not vmm:
        raise VmmError("--ram: the process runs no VM that is known here (QEMU, Firecracker, Cloud Hypervisor); --all "
                       "watches all of it")
    if what == "all" or not vmm:
        return writable
    return lambda there: vm_memory(there, sizes)


def told_sizes(pid: int) -> list[MemorySize]:
    """Of a VM's memory, by the command line of its VMM (QEMU's -m and memory backends; Cloud Hypervisor's
    --memory). Raises OSError."""
    words = command_line(pid)
    found = []
    for option, value in itertools.pairwise(words):
        parts = dict(part.partition("=")[::2] for part in value.split(","))
        if option == "-object" and value.startswith("memory-backend-") and "size" in parts:
            found.append(MemorySize(parts.get("id", "ram"), _bytes(parts["size"])))
        elif option in ("-m", "--memory"):
            found.append(MemorySize("ram", _bytes(parts.get("size", value.partition(",")[0]))))
    return [each for at, each in enumerate(found) if each.size and each.size not in [o.size for o in found[:at]]]


def _bytes(text: str) -> int:
    """``512`` is MiB; 0 for what is no size."""
    found = re.fullmatch(r"(\d+)([kmgt]?)(i?b)?", text.lower())
    return 0 if found is None else int(found[1]) * _UNITS[found[2]]
