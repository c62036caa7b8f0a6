"""A program in a machine, followed from the first thing it prints to its end, wherever it goes in between."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vmm.client.machine import Machine
from vmm.client.programs import program_machine, program_spec
from vmm.machine.rules import Trees
from vmm.migrate import Options, migrate
from vmm.receive import receive

__all__ = ["Followed", "begun", "migrated", "name_of"]

_SECONDS, _AFTERWARDS = 120.0, 1.0


class Followed:
    """What the program of a machine says. ``before``: what it had said elsewhere."""

    def __init__(self, machine: Machine, before: str = "") -> None:
        self.machine, self.said = machine, before

    def until(self, text: str) -> None:
        """It has said that, here or elsewhere before."""
        deadline = time.monotonic() + _SECONDS
        while text not in self.said:
            assert time.monotonic() < deadline, self.said
            self._take(next(self.machine.events(1.0), None))

    def hear(self, seconds: float) -> None:
        """Until it has said nothing for so long."""
        for event in self.machine.events(seconds):
            self._take(event)

    def _take(self, event: dict[str, Any] | None) -> None:
        if event is not None and event["event"] == "console":
            self.said += event["data"]

    def listen(self, seconds: float) -> None:
        """For so long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._take(next(self.machine.events(left), None))

    def drain(self) -> None:
        """All that it has said there: it goes on elsewhere, or has ended."""
        self.hear(_SECONDS)

    def end(self) -> dict[str, Any]:
        """The report; no page was lost."""
        self.drain()
        report = self.machine.wait(_SECONDS)
        self.hear(_AFTERWARDS)      # on a busy host it may have said nothing for so long, and something then
        if report["verification"] is not None:
            assert report["verification"]["lost_pages"] == 0, report["verification"]
        assert report["program"]["exit_status"] is not None, report
        return report


@contextlib.contextmanager
def begun(root: Path, name: str, *command: str, memory: int = 128 << 20, threads: int = 8,
          ring_entries: int = 4096, accel: str = "auto") -> Iterator[tuple[Followed, Trees]]:
    spec = program_machine(name, program_spec(command[0], command[1:], root=str(root), env={"LC_ALL": "C"}),
                           memory=memory, threads=threads, ring_entries=ring_entries, verify=True, accel=accel)
    with Machine.launch(spec) as machine:
        yield Followed(machine), Trees(str(root))


def name_of(what: str) -> str:
    """Nobody else's."""
    return f"{what}-{os.getpid()}-{uuid.uuid4().hex[:4]}"


@contextlib.contextmanager
def migrated(program: Followed, trees: Trees, folder: Path, name: str, *, accel: str = "auto",
             **options: Any) -> Iterator[Followed]:
    """The same program, elsewhere; it has ended at the end."""
    address, arrived = f"ipc://{folder}/{name}", []
    target = threading.Thread(target=lambda: arrived.append(
        receive(address, name=name, trees=trees, accel=accel, timeout=60.0)))
    target.start()
    migrate(program.machine, address, Options(downtime=1.0, **options))
    target.join(_SECONDS)
    assert arrived
    with arrived[0] as machine:
        program.drain()
        yield Followed(machine, program.said)
