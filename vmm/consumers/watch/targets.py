"""Who is to be watched: a process by its number, a VM by its name, or by the socket of its monitor (QMP)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any, NamedTuple

from ipc.linux.foreign import status

from ...errors import VmmError, one_line
from .blocks import MemorySize, command_line, is_vmm, told_sizes

__all__ = ["Target", "find_target"]

_PATIENCE = 5.0             # seconds for an answer of a monitor
_UCRED = struct.Struct("3i")
_ANSWER_MAX = 1 << 20
_EVENTS = 1000              # that may come before an answer
_NAME = 60                  # characters of a memory block's


class Target(NamedTuple):
    """``sizes`` of a VM's memory, as far as it says; ``vmm``: it runs a VM."""

    pid: int
    name: str
    vmm: bool
    sizes: list[MemorySize]


def find_target(text: str) -> Target:
    """Raises VmmError where there is none, or more than one."""
    path = Path(text)
    if "/" in text and path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise VmmError(f"{text}: is not the socket of a VM's monitor")
        return _by_monitor(path)
    if text.isascii() and text.isdigit():
        return _by_pid(int(text))
    found = {pid for pid in _processes() if text in _names(pid)}
    if not found:
        raise VmmError(f"there is no VM or process named '{text}' (vmm watch takes a process id, a VM's name, or the "
                       "path of its QMP socket)")
    if len(found) > 1:
        raise VmmError(f"'{text}' is the name of {len(found)} processes: {', '.join(map(str, sorted(found)))} (give "
                       "one of these)")
    return _by_pid(found.pop())


def _by_pid(pid: int) -> Target:
    try:
        name = status(pid)["Name"]
        vmm = is_vmm(pid)
        return Target(pid, one_line(name), vmm, told_sizes(pid) if vmm else [])
    except (OSError, KeyError):
        raise VmmError(f"there is no process {pid}") from None


def _processes() -> list[int]:
    return [int(each) for each in os.listdir("/proc") if each.isdigit() and int(each) != os.getpid()]


def _names(pid: int) -> set[str]:
    """What a process is called: of a VM, what its VMM was told (QEMU's -name, Firecracker's --id), else the name of
    its program."""
    with contextlib.suppress(OSError, KeyError):
        if not is_vmm(pid):
            return {status(pid)["Name"]}
        found = {status(pid)["Name"]}
        for option, value in itertools.pairwise(command_line(pid)):
            if option == "-name":
                found |= {part.removeprefix("guest=") for part in value.split(",") if "=" not in part
                          or part.startswith("guest=")}
            elif option == "--id":
                found.add(value)
        return found
    return set()


def _by_monitor(path: Path) -> Target:
    """The VM of a QMP socket, with the memory that it says it has."""
    try:
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(_PATIENCE)
            monitor.connect(str(path))
            pid = _UCRED.unpack(monitor.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0]
            with monitor.makefile("rwb") as lines:
                lines.readline(_ANSWER_MAX)         # its greeting
                _ask(lines, "qmp_capabilities")
                memory = _ask(lines, "query-memory-size-summary")
                devices = _ask(lines, "query-memdev")
                sizes = [MemorySize(one_line(str(d.get("id", "ram")), _NAME), int(d["size"])) for d in devices]
                sizes = sizes or [MemorySize("ram", int(memory["base-memory"]))]
    except OSError as exc:
        raise VmmError(f"{path}: no monitor answers ({exc.strerror or 'in time'})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise VmmError(f"{path}: this is no QMP monitor, or not free: {one_line(str(exc))}") from None
    return Target(pid, _by_pid(pid).name, True, sizes)


def _ask(lines: Any, command: str) -> Any:
    """Raises ValueError, KeyError and TypeError for what is no answer, and OSError."""
    lines.write(json.dumps({"execute": command}).encode() + b"\n")
    lines.flush()
    for _ in range(_EVENTS):
        answer = json.loads(lines.readline(_ANSWER_MAX))
        if "event" not in answer:
            return answer["return"]
    raise ValueError("it tells of events only")
