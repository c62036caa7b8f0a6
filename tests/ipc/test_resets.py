"""How the reset of a ring is asked for: by whom the request is seen, and that none is missed."""

from __future__ import annotations

import ctypes
import random
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from machines import asleep, until

from ipc.bell import Doorbell
from ipc.layout import VcpuControl
from ipc.linux import futex
from ipc.ring import ResetRequests, RingReader

TIMEOUT = 20.0


class Worker:
    """Two threads over a control block, as a worker has them; what each has answered."""

    def __init__(self, control: VcpuControl) -> None:
        self.requests = ResetRequests(control)
        self.over = False
        self.answered = {"thread": 0, "vcpu": 0}
        self._lock = threading.Lock()

    def serve(self, who: str) -> None:
        with self._lock:
            request = self.requests.pending
            if request is not None:
                self.answered[who] += 1
                self.requests.answer(request)

    def thread(self) -> None:
        while not self.over:
            self.requests.wait()
            self.serve("thread")

    def vcpu(self, chance: random.Random) -> None:
        """Looks for a while, or leaves at once (it was kicked), and does not come back while a request is pending: it
        is in the guest, and has no idea of it."""
        while not self.over:
            self.requests.begin_looking()
            if chance.random() < 0.7:
                self.requests.look(chance.choice((1e-6, 1e-5, 1e-4)))
            if chance.random() < 0.5:
                self.serve("vcpu")
            self.requests.end_looking()
            while self.requests.pending is not None and not self.over:
                time.sleep(0)


@contextmanager
def threads(control: VcpuControl, worker: Worker, reader: RingReader, *targets: Callable[[], None]) -> Iterator[None]:
    running = [threading.Thread(target=target, daemon=True) for target in targets]
    for each in running:
        each.start()
    try:
        yield
    finally:
        worker.over = True
        reader.ask_reset(0)
        for each in running:
            while each.is_alive():
                futex.wake(ctypes.addressof(control) + VcpuControl.reset_request.offset, 2)
                each.join(0.01)


@pytest.fixture
def control() -> VcpuControl:
    return VcpuControl()


def test_no_request_is_missed_however_the_vcpu_comes_and_goes(control: VcpuControl) -> None:
    """A wait for the answer that is not woken would take ``TIMEOUT``, and say so."""
    reader, worker = RingReader(control, 1024), Worker(control)
    with threads(control, worker, reader, worker.thread, lambda: worker.vcpu(random.Random(1))):
        for _ in range(3000):
            reader.ask_reset(0)
            assert reader.await_reset(TIMEOUT)
    assert sum(worker.answered.values()) >= 3000
    assert min(worker.answered.values()) > 0


@pytest.mark.parametrize("looks", [True, False])
def test_only_who_is_to_see_it_is_woken(control: VcpuControl, looks: bool) -> None:
    """The other waits on, until somebody has not answered for a while."""
    reader, worker = RingReader(control, 1024), Worker(control)
    woken: list[str] = []

    def vcpu() -> None:
        worker.requests.look(TIMEOUT)
        woken.append("vcpu")

    def thread() -> None:
        worker.requests.wait()
        woken.append("thread")

    if looks:
        worker.requests.begin_looking()
    both = [threading.Thread(target=each, daemon=True) for each in (vcpu, thread)]
    for each in both:
        each.start()
    until(lambda: all(asleep(each) for each in both), "both sleep")
    reader.ask_reset(0)
    both[not looks].join(TIMEOUT)
    assert woken == ["vcpu" if looks else "thread"]
    assert both[looks].is_alive()
    assert not reader.await_reset(0.001)
    for each in both:
        each.join(TIMEOUT)
    assert sorted(woken) == ["thread", "vcpu"]


def test_a_worker_that_says_wrongly_that_its_vcpu_looks_is_woken_all_the_same(control: VcpuControl) -> None:
    reader, worker = RingReader(control, 1024), Worker(control)
    with threads(control, worker, reader, worker.thread):
        for _ in range(20):
            control.awaits_reset = 1
            reader.ask_reset(0)
            tries = 0
            while not reader.await_reset(0.01):
                tries += 1
                assert tries < 1000
    assert worker.answered["thread"] >= 20


def test_a_full_ring_is_new_once_to_each_who_looks(control: VcpuControl) -> None:
    control.ring_full_exits = 7
    first, second = RingReader(control, 1024), RingReader(control, 1024)
    assert not first.newly_full()       # from before its time: a successor reaps all rings
    control.ring_full_exits += 1
    assert first.newly_full()
    assert not first.newly_full()
    assert second.newly_full()
    control.ring_full_exits += 2
    second.use(2048)                    # another ring: nobody waits for this one
    assert not second.newly_full()
    assert first.newly_full()
    control.ring_full_exits = ctypes.c_uint64(-1).value     # what a worker gone wild may write
    assert first.newly_full()


def test_the_bell_never_holds_anybody_up(tmp_path: Path) -> None:
    Doorbell.make(tmp_path)
    with closing(Doorbell(tmp_path)) as ours:
        with closing(Doorbell(tmp_path)) as worker:
            for _ in range(1 << 17):        # more than a pipe holds
                worker.ring()
            heard = 0
            while readable(ours):
                ours.silence()
                heard += 1
                assert heard < 1 << 17
            assert heard
            ours.silence()                  # nothing is there: another end has taken it
            worker.ring()
        assert readable(ours)               # of one that has died


def test_a_successor_hears_what_was_rung_while_nobody_listened(tmp_path: Path) -> None:
    Doorbell.make(tmp_path)
    with closing(Doorbell(tmp_path)) as worker:
        worker.ring()
        with closing(Doorbell(tmp_path)) as successor:
            assert readable(successor)


def readable(bell: Doorbell) -> bool:
    return bool(select.select([bell.fd], [], [], 0)[0])
