"""What every accelerator, every mode of dirty tracking and every consumer keeps to; and that a new one is as few
files as docs/CONTRIBUTING.md says (tests/examples has one of each)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from bare import DATA, bare
from examples.everything import Everything
from examples.touched import most_dirtied
from machines import ACCELS, changed_pages, spec

import workers.accel
from ipc.layout import RING_MAX, machine_control, vcpu_control
from ipc.shm import PAGE_SIZE, Segment
from vmm.client.machine import Machine
from vmm.dirty.log import DirtyLog
from vmm.dirty.reaper import Reaper
from vmm.dirty.tracking.base import TrackingMode
from vmm.dirty.tracking.modes import TRACKING_MODES, tracking_mode
from vmm.machine.events import Tracer
from vmm.machine.memory import MemorySlot
from vmm.machine.names import segment_name
from vmm.machine.spec import RamSlot, ReaperSpec
from vmm.machine.trackings import MODES
from vmm.vcpus.pool import VcpuPool
from workers.accel import registry
from workers.accel.base import Accelerator, AccelError, ExitKind

EXAMPLES = Path(__file__).parent / "examples"
#: Writes to RCX pages from RBX on, one after the other: mov %al, (%rbx); add $4096, %rbx; loop; out %eax, $0xf4
WALK = bytes.fromhex("8803 4881c300100000 e2f5 e7f4".replace(" ", ""))
PUBLIC = sorted(name for name in vars(Accelerator) if not name.startswith("_"))
GUESTS = [*ACCELS, "stepper"]


@pytest.fixture(autouse=True)
def one_more_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's folder, as if it lay beside the others."""
    monkeypatch.setattr(workers.accel, "__path__", [*workers.accel.__path__, str(EXAMPLES / "accelerators")])


# --- accelerators ---------------------------------------------------------------------------


def test_an_accelerator_is_a_folder() -> None:
    assert registry.names("guest") == ("kvm", "unicorn", "stepper")
    assert registry.names() == ("kvm", "unicorn", "replay", "stepper")


@pytest.mark.parametrize("name", ["", ".", "..", "base", "registry", "kvm.vm", "../accel/kvm", "KVM", "none"])
def test_what_is_no_accelerator_is_said(name: str) -> None:
    for ask in (registry.capabilities, registry.available, registry.load):
        with pytest.raises(AccelError, match="unknown accelerator"):
            ask(name)


@pytest.mark.parametrize("name", [*registry.names(), "stepper"])
def test_an_accelerator_says_what_it_can_and_has_what_the_run_loop_calls(name: str) -> None:
    can, here = registry.capabilities(name), registry.available(name)
    assert can.section in ("guest", "replay")
    assert set(can.trackings) <= set(MODES)
    assert here.reason or here.found
    assert 0 <= here.ring_max <= RING_MAX
    made = registry.load(name)
    missing = [each for each in PUBLIC if not hasattr(made, each) and each not in ("vcpu_fd", "kvm_run_size")]
    assert not missing


@pytest.mark.parametrize("name", [p for p in GUESTS if p != ACCELS[0]])
def test_each_page_that_is_written_is_logged_once_until_it_is_reset(name: str) -> None:
    """The oracle is the memory before and after. (KVM's ring is read in tests/workers/test_kvm_accel.py.)"""
    with bare(name, WALK, rbx=DATA, rcx=7, rax=1) as vcpu:
        before = vcpu.ram.copy()
        vcpu.run()
        written = changed_pages(before, vcpu.ram)
        assert len(written) == 7
        assert set(vcpu.harvest()) == written
        assert vcpu.accel.pushed() == 7
        assert vcpu.accel.reset_ring(7) == 7
        assert vcpu.accel.reset_ring(0) == 0


@pytest.mark.parametrize("name", GUESTS)
def test_a_kick_before_the_guest_is_entered_is_not_lost(name: str) -> None:
    with bare(name, WALK, rbx=DATA, rcx=3, rax=1) as vcpu:
        before = vcpu.ram.copy()
        vcpu.accel.clear_immediate_exit()
        vcpu.accel.interrupt()
        assert vcpu.accel.run().kind is ExitKind.KICKED
        assert not changed_pages(before, vcpu.ram)
        vcpu.run()
        assert len(changed_pages(before, vcpu.ram)) == 3


# --- modes of dirty tracking ---------------------------------------------------------------------------


class Nobody:
    """No vCPU at all: what a way does for itself is left."""

    all: list[Any] = []     # noqa: RUF012
    pages_missing = False

    def kick_all(self) -> None:
        pass

    def request(self, vcpus: list[Any], make: Any) -> dict[int, Any]:
        assert not vcpus
        return {}

    def await_resets(self, vcpus: list[Any]) -> None:
        assert not vcpus


@pytest.fixture
def log() -> Iterator[DirtyLog]:
    made = DirtyLog("t")
    made.add_slot(MemorySlot("t", RamSlot(0, 0, 64 * PAGE_SIZE), vcpu_logs=0, create=True))
    yield made
    made.close()


def reaper_of(log: DirtyLog, control: Segment, tracked: TrackingMode) -> Reaper:
    return Reaper(ReaperSpec(), cast(VcpuPool, Nobody()), log, machine_control(control.address), Tracer([], ""),
                  lambda vcpu, owed, reset, pages: None, mode=tracked)


@pytest.mark.parametrize("tracked", [*TRACKING_MODES.values(), Everything()], ids=lambda each: each.name)
def test_a_way_gathers_from_nobody_without_harm_and_says_what_it_is(tracked: TrackingMode, log: DirtyLog) -> None:
    with Segment.create(segment_name("t", "control"), 2 * PAGE_SIZE) as control:
        reaper = reaper_of(log, control, tracked)
        try:
            pages = 64 if isinstance(tracked, Everything) else 0
            assert reaper.flush() == reaper.drain() == pages
            assert log.dirty_pages(0) == pages
            assert tracked.logged or not (tracked.rings or tracked.logs)
            assert not (tracked.rings and tracked.logs)
        finally:
            reaper.close()


def test_modes_are_known_by_the_names_of_the_configuration() -> None:
    assert sorted(TRACKING_MODES) == sorted(MODES)
    assert all(tracking_mode(name).name == name for name in MODES)


def test_a_ring_is_told_of_where_it_lies(log: DirtyLog) -> None:
    """A worker that is to log so finds its segment, one that is not finds none."""
    with Segment.create(segment_name("t", "control"), 2 * PAGE_SIZE) as control:
        from vmm.dirty.parts import Parts
        from vmm.vcpus.handle import VcpuHandle

        machine = spec("stamp", accel="unicorn", vcpus=1, ring=1024)
        parts = Parts(machine, control, control, log, tracking_mode("none"))
        try:
            for name in MODES:
                mode = tracking_mode(name)
                mode.need(parts, fresh=True)
                parts.mode = mode
                ring, logs = mode.segments(parts, VcpuHandle(0, vcpu_control(control.address, 0), 1024))
                assert bool(ring) == (name == "ring")
                assert set(logs) == ({0} if name in ("bitmap", "uffd") else set())
                if ring:
                    with Segment.open(ring) as opened:
                        assert opened.size == 1024 * 16
        finally:
            parts.stack.close()


# --- consumers ---------------------------------------------------------------------------


@pytest.mark.parametrize("accel", ACCELS)
def test_a_consumer_is_a_file(accel: str) -> None:
    with Machine.launch(spec("hotspot", accel=accel, writes=0, timeout=None)) as machine:
        found = most_dirtied(machine, 10)
        assert found
        (slot, page), count = found[0]
        assert (slot, 1 <= count <= 10) == (0, True)
        before = np.array(machine.ram(0)[page * PAGE_SIZE:(page + 1) * PAGE_SIZE])
        assert len(before) == PAGE_SIZE
        assert "most_dirtied" not in machine.status()["clients"]
