"""A vCPU thread at a full ring: what lets it go, and what it heeds meanwhile. Its accelerator is the test's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from machines import asleep, until

from ipc.bell import Doorbell
from ipc.layout import ExitReason, VcpuControl, VcpuRequest, VcpuState
from ipc.messages import Exited, KickAck, Notification, RingFull
from ipc.ring import RingReader
from workers import vcpu as vcpu_module
from workers.accel.base import Accelerator, Exit, ExitKind
from workers.memory import GuestMemory
from workers.ports import PortBus
from workers.resets import serve_resets
from workers.vcpu import VcpuThread

ENTRIES = 1024
TIMEOUT = 20.0


class FullAtOnce:
    """Fills its ring whenever it runs."""

    def __init__(self) -> None:
        self.free = True
        self.by: list[str] = []     # who has reset its ring

    def clear_immediate_exit(self) -> None:
        pass

    def interrupt(self) -> None:
        pass

    def registers(self) -> dict[str, int]:
        return {}

    def run(self) -> Exit:
        was, self.free = self.free, False
        return Exit(ExitKind.KICKED if was else ExitKind.RING_FULL)

    def reset_ring(self, expected: int) -> int:
        self.by.append(threading.current_thread().name)
        self.free = True
        return expected


class Running:
    """A vCPU thread and a reset thread. ``said``: its notifications."""

    def __init__(self, directory: Path) -> None:
        self.control = VcpuControl()
        self.reader = RingReader(self.control, ENTRIES)
        self.accel = FullAtOnce()
        self.said: list[Notification] = []
        self.vcpu = VcpuThread(0, self.control, GuestMemory(), PortBus(lambda data: None), self.said.append)
        self.vcpu.accel = cast(Accelerator, self.accel)
        self.vcpu.bell = Doorbell(directory)

    @property
    def waits(self) -> bool:
        return self.control.state == VcpuState.RING_FULL and self.control.ring_full_exits > 0

    def let_go(self) -> None:
        """As the coordinator does, of what it has harvested."""
        before = self.control.ring_full_exits
        self.control.fetch_total += 1
        self.reader.ask_reset(1)
        assert self.reader.await_reset(TIMEOUT)
        assert self.reader.outstanding == 0
        until(lambda: self.control.ring_full_exits > before, "it has gone on, and filled its ring again")

    def kick(self, request: VcpuRequest = VcpuRequest.NONE) -> None:
        """Without a signal: one that comes just before a thread sleeps is as good as none."""
        self.control.request |= request
        self.control.kick_request += 1

    @property
    def has_acknowledged(self) -> bool:
        return bool(self.control.kick_ack == self.control.kick_request)


@contextmanager
def running(directory: Path, prepare: Callable[[Running], None] = lambda made: None) -> Iterator[Running]:
    Doorbell.make(directory)
    made = Running(directory)
    prepare(made)
    main = threading.Thread(target=made.vcpu.run, name="vcpu", daemon=True)
    resets = threading.Thread(target=serve_resets, args=(made.vcpu,), name="reset", daemon=True)
    with closing(made.vcpu.bell), closing(made.vcpu):
        resets.start()
        until(lambda: asleep(resets), "the reset thread sleeps")
        main.start()
        try:
            yield made
        finally:
            made.vcpu.shutdown = True
            # repeated: it may come just before the vCPU sleeps, and then that one would take the thread's request
            until(lambda: made.vcpu.wake_up() or not main.is_alive(), "the vCPU ends")  # type: ignore[func-returns-value]
            made.reader.ask_reset(0)
            resets.join(TIMEOUT)
        assert not resets.is_alive()


def patience(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Before it is said by a message, and waited for at the pipe."""
    monkeypatch.setattr(vcpu_module, "_LOOK_AROUND", seconds)


def test_it_resets_its_ring_itself_and_nothing_else_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patience(monkeypatch, 60.0)
    with running(tmp_path) as made:
        for number in range(1, 200):
            until(lambda: made.waits, "it waits")
            assert made.control.ring_full_exits == number
            made.let_go()
        assert made.accel.by == ["vcpu"] * 199
        assert made.said == []
        assert made.control.resets == made.control.reset_total == 199


def test_later_it_is_said_by_a_message_too_and_the_reset_thread_resets(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    patience(monkeypatch, 0.0)
    with running(tmp_path) as made:
        for number in range(1, 50):
            until(lambda n=number: made.said.count(RingFull(0)) == n, "it is said")  # type: ignore[misc]
            assert made.waits
            made.let_go()
        assert made.accel.by == ["reset"] * 49


@pytest.mark.parametrize("seconds", [0.0, 60.0])
@pytest.mark.parametrize("what", ["stop", "job", "another thread"])
def test_what_it_heeds_while_it_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float,
                                      what: str) -> None:
    """Looking, or at its pipe. (``wake_up`` is repeated: it may come just before the vCPU sleeps.)"""
    patience(monkeypatch, seconds)
    with running(tmp_path) as made:
        until(lambda: made.waits, "it waits")

        def woken_until(condition: Callable[[], bool]) -> None:
            until(lambda: made.vcpu.wake_up() or condition(), what)     # type: ignore[func-returns-value]

        if what == "stop":
            made.control.stop_reason = ExitReason.TIMEOUT
            made.kick(VcpuRequest.STOP)
            woken_until(lambda: made.control.state == VcpuState.EXITED)
            until(lambda: isinstance(made.said[-1], Exited), "it says so")
            assert cast(Exited, made.said[-1]).reason == ExitReason.TIMEOUT
        elif what == "job":
            done: list[int] = []
            asker = threading.Thread(target=lambda: made.vcpu.do(lambda: done.append(1)))
            asker.start()
            woken_until(lambda: done == [1])
            asker.join(TIMEOUT)
            assert made.waits
        else:       # its ring is another one now (workers/service.py)
            made.accel.free = True
            exits = made.control.ring_full_exits
            made.vcpu.ring_full = False
            woken_until(lambda: made.control.ring_full_exits > exits)


def test_a_kick_that_comes_just_before_it_sleeps_is_heeded_at_the_next_look_around(tmp_path: Path) -> None:
    """The one that a signal, or a wake-up, cannot interrupt any more."""
    late: list[int] = []

    def prepare(made: Running) -> None:
        requests: Any = made.vcpu.resets.requests
        look = requests.look

        def kicked_look(seconds: float) -> None:
            if not late:
                made.kick(VcpuRequest.PAUSE)
                late.append(made.control.kick_request)
            look(seconds)

        requests.look = kicked_look

    with running(tmp_path, prepare) as made:
        until(lambda: bool(late), "it was kicked then")
        until(lambda: made.has_acknowledged, "the kick is seen all the same")
        until(lambda: made.control.state == VcpuState.PAUSED, "it is paused")
        assert KickAck(0, late[0]) in made.said
        # What it was waiting for is the reset thread's now.
        made.control.fetch_total += 1
        made.reader.ask_reset(1)
        assert made.reader.await_reset(TIMEOUT)
        assert made.accel.by == ["reset"]
        exits = made.control.ring_full_exits
        made.control.request = 0
        made.kick()
        until(lambda: made.vcpu.wake_up() or made.control.ring_full_exits > exits,  # type: ignore[func-returns-value]
              "it goes on")
