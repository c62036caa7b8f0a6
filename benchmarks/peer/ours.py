"""A machine of ours with the interface of ``Qemu``, and how both are asked how far their guests have come."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vmm.client.machine import Machine
from vmm.guests import WORKLOADS, resolve_params
from vmm.machine.spec import MachineSpec, RamSlot, ReaperSpec

__all__ = ["Guest", "Ours", "written"]

PAGE = 4096
_STACK = 16384


class Guest(Protocol):
    """What can be asked how far it has come."""

    shares: list[tuple[int, int]]

    def word(self, address: int) -> int: ...


def written(guest: Guest, vcpu: int) -> tuple[float, int]:
    """(when, pages) that this vCPU has written since its start. The guest has counted them itself: each page's
    first word says how often it was written, and those before where the walk is say one more than those behind."""
    first, pages = guest.shares[vcpu]
    while True:
        passes = guest.word(first)
        low, high = 1, pages        # page low - 1 was written in this pass, page high (if any) was not
        while low < high:
            middle = (low + high) // 2
            if guest.word(first + middle * PAGE) >= passes:
                low = middle + 1
            else:
                high = middle
        when = time.perf_counter()
        if guest.word(first) == passes:
            return when, (passes - 1) * pages + low


class Ours:
    """vCPUs that walk over their shares of one memory slot, as the sample guest ``sequential`` does; ``idle``: the
    guest of that name. ``fill``: each page's first word is set to 1 beforehand, as if it had been written once."""

    def __init__(self, *, mib: int, vcpus: int, ring: int, spin: int = 0, idle: bool = False, fill: bool = True,
                 name: str = "bench-ours", tracking: str = "") -> None:
        guest, params = ("idle", {"milliseconds": 0}) if idle else ("sequential", {"passes": 0, "spin": spin})
        spec = MachineSpec(
            name=name, accel="kvm", vcpus=vcpus, privilege="user", ring_entries=ring,
            slots=[RamSlot(0, 0, mib << 20)], image=str(WORKLOADS[guest].image), load_address=None,
            params=resolve_params(guest, params), cmdline=guest, stack_size=_STACK, reaper=ReaperSpec(),
            verify=None, timeout=None, trace=[], trace_file="", linger=True, tracking=tracking)
        self.machine = Machine.launch(spec, start=False)
        self._words = self.machine.ram(0, writable=True)[: mib << 20].view(np.uint64)[:: PAGE // 8]
        start, end = _usable(self.machine)
        total = (end - start) // PAGE
        bounds = [index * total // vcpus for index in range(vcpus + 1)]
        self.shares = [(start + low * PAGE, high - low) for low, high in itertools.pairwise(bounds)]
        if fill:
            self._words[start // PAGE:end // PAGE] = 1
        self.machine.start()

    def word(self, address: int) -> int:
        return int(self._words[address // PAGE])

    def usage(self) -> dict[str, float]:
        """What the machine has used and met so far: seconds of the coordinator's CPU, full rings, and so on."""
        status = self.machine.status()
        fields = Path(f"/proc/{status['coordinator']['pid']}/stat").read_text().rsplit(")", 1)[1].split()
        return {"coordinator": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
                "ring-full exits": sum(v["ring_full_exits"] for v in status["vcpus"]),
                "stalled": sum(v["stalled_s"] for v in status["vcpus"]),
                "reaps": status["reaper"]["iterations"]}

    def pause(self) -> None:
        self.machine.pause()

    def resume(self) -> None:
        self.machine.resume()

    def close(self) -> None:
        del self._words
        self.machine.close()

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _usable(machine: Machine) -> tuple[int, int]:
    """What boot.py tells the guest of its first slot."""
    info: Any = machine.system()[0x200:0x228].view(np.uint64)
    return int(info[3]), int(info[4])
