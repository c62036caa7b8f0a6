"""From what a user says about a Linux program to a machine that runs it (docs/linux.md). Without the configuration
layer, whose imports take longer than such a machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence

from ipc.messages import ProgramSpec
from ipc.shm import PAGE_SIZE
from workers.accel import registry

from ..machine.room import check_room
from ..machine.rules import RuleError, check_machine, fitting_ring
from ..machine.spec import MachineSpec, RamSlot, ReaperSpec, VerifySpec
from .accelerators import choose_accelerator

__all__ = ["PATH", "THREADS", "program_machine", "program_spec"]

#: Threads that a program may have at once, where it is not said.
THREADS = 8
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_ABOVE_HOLE = 1 << 32       # where memory goes that does not fit below the system slot
_HOLE = 0xF000_0000


def program_spec(program: str, args: Sequence[str], *, root: str = "", files: Mapping[str, str] | None = None,
                 env: Mapping[str, str] | None = None, directory: str = "/", seed: int | None = None,
                 console: str = "lines", forward: Sequence[str] = ()) -> ProgramSpec:
    """Without a root or a file, the program itself is all there is: it is found on the host then, as a shell would.
    Raises RuleError."""
    path = program
    there = {inside: os.path.abspath(outside) for inside, outside in (files or {}).items()}
    if not root and not there:
        found = shutil.which(program)
        if found is None:
            raise RuleError("guest.program", f"{program}: not found on this host, and there is no root or file to look "
                                             "in (guest.root, guest.files)")
        path = os.path.abspath(found)
        there = {path: os.path.realpath(path)}
    environment = {"PATH": PATH, "HOME": "/root", **(env or {})}
    return ProgramSpec(path=path, args=[program, *args], root=os.path.abspath(root) if root else "", files=there,
                       env=[f"{name}={value}" for name, value in environment.items()], directory=directory,
                       seed=seed, console=console, forward=list(forward))


def program_machine(name: str, program: ProgramSpec, *, memory: int, accel: str = "auto", threads: int = THREADS,
                    ring_entries: int | None = None, verify: bool = False, timeout: float | None = None,
                    linger: bool = True) -> MachineSpec:
    """``memory`` in bytes. ``ring_entries``: None: such that all of it fits. Raises VmmError, whose text names the
    key."""
    accel = choose_accelerator(accel, programs=True)
    size = -(-memory // PAGE_SIZE) * PAGE_SIZE
    slot = RamSlot(0, 0 if size <= _HOLE else _ABOVE_HOLE, size)
    largest = registry.available(accel).ring_max
    if ring_entries is None:
        ring_entries = fitting_ring([slot], largest)
    spec = MachineSpec(
        name=name, accel=accel, vcpus=threads + 1, privilege="user", program=program,
        ring_entries=ring_entries if largest else 0, slots=[slot], image="",
        load_address=None, params=[], cmdline="", stack_size=16 << 10, reaper=ReaperSpec(),
        verify=VerifySpec(surplus_is_failure=False) if verify else None, timeout=timeout, trace=[], trace_file="",
        linger=linger)
    check_machine(spec)
    check_room(spec)
    return spec
