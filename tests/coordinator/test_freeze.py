"""A freeze against processes that write guest memory: whatever is in memory afterwards was found dirty. The oracle
is a copy of the memory, kept up to date by what the dirty log says alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from machines import ANY, runs, spec, stands_still, until
from numpy.typing import NDArray

from vmm.client import holds
from vmm.client.machine import Machine
from vmm.errors import VmmError

PAGE = 4096
COUNT = "counts"            # the client of whoever copies

#: Writes pages of its own in any order, again and again; each write is one text of one page. Refusals are counted.
WRITER = """
import random, sys
from vmm import Machine, VmmError
first, count = int(sys.argv[1]), int(sys.argv[2])
done = refused = 0
with Machine.attach('t') as machine:
    print('goes', flush=True)
    while True:
        page = first + random.randrange(count)
        try:
            machine.write(page * 4096, random.randbytes(4096))
            done += 1
        except VmmError as exc:
            assert 'cannot be written to by the host' in str(exc), exc
            refused += 1
        print(done, refused, flush=True)
"""

#: Begins a write of page 600, half of it, and ends it when told to.
SLOW = """
import sys
from vmm import Machine
with Machine.attach('t') as machine:
    ram = machine.ram(0, writable=True)[600 * 4096:601 * 4096]
    with machine.writing(0, 600, 1):
        ram[:2048] = 0xaa
        print('half', flush=True)
        sys.stdin.readline()
        ram[2048:] = 0xaa
    print('whole', flush=True)
    sys.stdin.readline()
"""


class Script:
    """A process that says lines; all are read as they come."""

    def __init__(self, script: str, *arguments: object) -> None:
        self.popen = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True)
        self.last = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.last = line.strip()

    def await_line(self, line: str) -> None:
        until(lambda: self.last == line, f"'{line}'")

    def tell(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()

    @property
    def counts(self) -> tuple[int, int]:
        """(done, refused) of a writer."""
        done, refused = self.last.split() if " " in self.last else ("0", "0")
        return int(done), int(refused)

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *error: object) -> None:
        self.popen.kill()
        self.popen.wait()
        self._reader.join()
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()
        self.popen.stdout.close()


@pytest.fixture(params=ANY)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Its guest writes to the upper half of the slot, for ever."""
    guest = spec("random", accel=request.param, vcpus=1, mib=8, writes=0, spin=500, timeout=None)
    with Machine.launch(guest) as running:
        yield running


class Copy:
    """Slot 0 as whoever copies it has it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        machine.register(COUNT, mine=True)
        machine.sync(COUNT)
        self.pages = self.memory.copy()

    @property
    def memory(self) -> NDArray[np.uint8]:
        return self._machine.ram(0).reshape(-1, PAGE)

    def follow(self) -> None:
        """Copy what was dirtied since the last time."""
        self._machine.sync(COUNT)
        dirty = np.flatnonzero(self._machine.bitmap(0, COUNT).bools())
        self.pages[dirty] = self.memory[dirty]

    def differ(self) -> list[int]:
        return [int(p) for p in np.flatnonzero((self.pages != self.memory).any(axis=1))]


def more_than(before: tuple[int, int], now: Callable[[], tuple[int, int]], what: str) -> None:
    until(lambda: all(n > b + 5 for n, b in zip(now(), before, strict=True)), what)


def test_nothing_is_written_that_a_frozen_machines_last_sync_does_not_find(machine: Machine) -> None:
    with Script(WRITER, 512, 64) as first, Script(WRITER, 576, 64) as second:
        copy = Copy(machine)
        for _ in range(4):
            copy.follow()
            before = first.counts[0], second.counts[0]
            more_than(before, lambda: (first.counts[0], second.counts[0]), "writes")
            with machine.lease("migration", "to x") as lease:
                lease.freeze()
                copy.follow()
                assert copy.differ() == []
                refused = first.counts[1], second.counts[1]
                more_than(refused, lambda: (first.counts[1], second.counts[1]), "refusals")
                assert copy.differ() == []
                assert stands_still(machine)
            assert runs(machine)
        first.popen.kill()      # in the midst of whatever it does
        first.popen.wait()
        with machine.lease("migration", "to x") as lease:
            lease.freeze()
            copy.follow()
            assert copy.differ() == []


def test_a_freeze_waits_for_a_write_that_has_begun(machine: Machine) -> None:
    copy = Copy(machine)
    with Script(SLOW) as slow, machine.lease("migration", "to x") as lease, contextlib.ExitStack() as stack:
        slow.await_line("half")
        copy.follow()           # takes the first mark along: the page is copied as it is now
        frozen = threading.Event()
        attached = stack.enter_context(contextlib.closing(Machine.attach("t")))
        done: list[list[int]] = []

        def freeze() -> None:
            lease.freeze()
            frozen.set()
            copy.follow()
            done.append(copy.differ())

        thread = threading.Thread(target=freeze)
        thread.start()
        until(lambda: attached.status()["state"] == "paused", "the guest stands still")
        assert not frozen.is_set()
        with pytest.raises(VmmError, match="copied for the last time"):
            attached.write(500 * PAGE, b"x")
        assert not frozen.is_set()
        slow.tell()
        slow.await_line("whole")
        thread.join(20)
        assert frozen.is_set()
        assert done == [[]]
        assert (copy.pages[600][8:] == 0xaa).all()     # the guest may write its first word


def test_a_write_that_does_not_end_lets_the_freeze_fail_and_the_guest_run(machine: Machine,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holds, "_WRITES_END", 0.2)
    with Script(SLOW) as slow, machine.lease("migration", "to x") as lease:
        slow.await_line("half")
        with pytest.raises(VmmError, match="did not end within"):
            lease.freeze()
        assert runs(machine)
        machine.write(500 * PAGE, b"x")
        copy = Copy(machine)
        slow.popen.kill()       # the kernel gives its lock up; its page was marked when it began
        slow.popen.wait()
        lease.freeze()
        copy.follow()
        assert copy.differ() == []


def test_a_frozen_machine_stays_so_when_its_coordinator_is_replaced(machine: Machine) -> None:
    copy = Copy(machine)
    with Script(WRITER, 512, 64) as writer, machine.lease("migration", "to x") as lease:
        until(lambda: writer.counts[0] > 5, "writes")
        lease.freeze()
        pid = machine.status()["coordinator"]["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: machine.status()["coordinator"]["pid"] != pid, "a replacement")
        refused = writer.counts[1]
        until(lambda: writer.counts[1] > refused + 5, "refusals")
        copy.follow()
        assert copy.differ() == []
        time.sleep(0.05)        # no synchronisation: the longer, the more a write that gets through would show
        assert copy.differ() == []
        assert stands_still(machine)
