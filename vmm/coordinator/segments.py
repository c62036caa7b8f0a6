"""Build a machine's memory: segments, system slot, image, control blocks.

``Parts`` owns what it made; leaving its ``with`` unlinks every name. A replacement coordinator opens
the same parts instead of making them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from ipc import forwarding, programs
from ipc.bell import PROGRAM_CALL, Doorbell
from ipc.layout import (
    CONTROL_MAGIC,
    MAX_SLOTS,
    PROTOCOL_VERSION,
    SYSTEM_SLOT,
    VcpuRequest,
    control_error,
    control_size,
    vcpu_control,
)
from ipc.messages import SlotSpec, WorkerSpec
from ipc.shm import PAGE_SIZE, Segment
from ipc.traces.segment import TraceSegment

from ..dirty.log import DirtyLog, LogClient
from ..dirty.parts import Parts
from ..dirty.tracking.modes import tracking_mode
from ..errors import VmmError
from ..machine import boot, loader
from ..machine.memory import make_or_open
from ..machine.names import belongings, segment_name
from ..machine.spec import MachineSpec, RamSlot
from ..machine.tracefile import Trace, TraceError, TraceReader, check_trace, unpack
from ..vcpus.handle import VcpuHandle
from ..vcpus.link import Endpoints

__all__ = ["adopt_parts", "copy_image", "make_parts", "make_pipes", "worker_spec"]

_TRACE_PIECE = 1 << 20      # entries of a trace looked at together


def _top_gpa(spec: MachineSpec) -> int:
    return max(s.gpa + s.size for s in spec.slots)


def copy_image(source: str, target: Path) -> None:
    """Raises VmmError."""
    try:
        shutil.copyfile(source, target)
    except OSError as exc:
        raise VmmError(f"guest image {source}: cannot be copied: {exc.strerror}") from None


def make_parts(spec: MachineSpec, tracking: str, *, logging: bool = True, incoming: bool = False) -> Parts:
    """Make every segment, load the image, write the boot structures. ``tracking``: one of
    vmm.machine.trackings.MODES; ``logging``: somebody needs a log. ``incoming``: the memory comes from elsewhere, and
    is left alone.

    Raises VmmError and SegmentError; nothing is left behind then.
    """
    image, slots = None, []
    if spec.can.guests and spec.program is None:
        image = loader.load_image(spec.image, spec.load_address)
        loader.check_fits(image, [(s.gpa, s.size) for s in spec.slots])
        slots = _boot_slots(spec, image)
    with contextlib.ExitStack() as stack:
        def segment(what: str, size: int) -> Segment:
            return stack.enter_context(Segment.create(segment_name(spec.name, what), size))

        control = segment("control", control_size(spec.vcpus))
        system = segment("system", _system_size(spec))
        log = DirtyLog(spec.name, spec.reaper.reapers)
        log.on = logging
        stack.callback(log.close)
        mode = tracking_mode(tracking)
        parts = Parts(spec, control, system, log, mode, entry=image.entry if image else 0,
                      usable=_usable_pages(slots), stack=stack)
        for slot in spec.slots:
            log.add_slot(parts.new_slot(slot, create=True, incoming=incoming))
        mode.need(parts, fresh=False)
        if image is not None:
            _load(parts, image, slots, system_only=incoming)
        elif spec.program is not None:
            _write_system(parts, lambda view: boot.write_program_slot(view, threads=spec.threads))
        if spec.replay_trace:
            parts.traces = _load_trace(spec, stack)
        block = parts.control
        block.magic, block.version, block.vcpu_count = CONTROL_MAGIC, PROTOCOL_VERSION, spec.vcpus
        parts.stack = stack.pop_all()
    return parts


def _system_size(spec: MachineSpec) -> int:
    """Bytes of the system slot. Of a replayed machine, which boots nothing, a page stands in for it."""
    if spec.program is not None:
        return programs.system_pages(spec.threads, sum(slot.pages for slot in spec.slots)) * PAGE_SIZE
    return boot.system_size(spec.vcpus, _top_gpa(spec)) if spec.can.guests else PAGE_SIZE


def _write_system(parts: Parts, write: Callable[[memoryview], None]) -> None:
    view = memoryview(parts.system.buf)
    try:
        write(view)
    finally:
        view.release()


def _load_trace(spec: MachineSpec, stack: contextlib.ExitStack) -> list[Segment]:
    """A segment a vCPU, of the size that the trace needs: what there is no room for fails before it is read. Raises
    TraceError and SegmentError."""
    path = Path(spec.replay_trace)
    made = []
    with TraceReader(path) as reader:
        check_trace(path, reader.header, spec.vcpus, spec.slots)
        for index, (records, entries) in enumerate(reader.sizes()):
            segment = TraceSegment.create(segment_name(spec.name, f"replay{index}"), records, entries)
            stack.callback(segment.close)
            made.append(segment)
        reader.read_into([Trace(s.times, s.ends, s.entries) for s in made])
        sizes = np.zeros(MAX_SLOTS, np.uint64)
        for slot in reader.header.slots:
            sizes[slot.id] = slot.pages
        for segment in made:
            for at in range(0, len(segment.entries), _TRACE_PIECE):
                slots, pages = unpack(segment.entries[at:at + _TRACE_PIECE])
                if int(slots.max()) >= MAX_SLOTS or np.any(pages >= sizes[slots]):
                    raise TraceError(f"{path}: is damaged: it names pages outside its memory slots")
    return [segment.segment for segment in made]


def _boot_slots(spec: MachineSpec, image: loader.GuestImage) -> list[boot.BootSlot]:
    return boot.boot_slots([(s.id, s.gpa, s.size) for s in spec.slots],
                           [(s.gpa, s.end) for s in image.segments],
                           vcpu_count=spec.vcpus, stack_size=spec.stack_size)


def _usable_pages(slots: list[boot.BootSlot]) -> dict[int, tuple[int, int]]:
    return {s.id: ((s.usable_start - s.gpa) // PAGE_SIZE, (s.usable_end - s.gpa) // PAGE_SIZE) for s in slots}


def _load(parts: Parts, image: loader.GuestImage, slots: list[boot.BootSlot], *, system_only: bool) -> None:
    spec = parts.spec
    _write_system(parts, lambda view: boot.write_system_slot(
        view, vcpu_count=spec.vcpus, slots=slots, image_end=image.end, params=spec.params, cmdline=spec.cmdline,
        stack_size=spec.stack_size, top_gpa=_top_gpa(spec)))
    for segment in () if system_only else image.segments:
        for slot in spec.slots:
            # A segment may span slots that touch.
            first = max(segment.gpa, slot.gpa)
            last = min(segment.gpa + len(segment.data), slot.gpa + slot.size)
            if first < last:
                memory = parts.log.slots[slot.id].memory
                memory[first - slot.gpa: last - slot.gpa] = np.frombuffer(
                    segment.data, np.uint8)[first - segment.gpa: last - segment.gpa]


def adopt_parts(spec: MachineSpec, slots: list[RamSlot], reused: list[int], clients: list[LogClient],
                tracking: str, *, logging: bool) -> Parts:
    """Open what a coordinator that died has left. From here on it is this process's to unlink. Raises SegmentError
    where the machine's memory is not there."""
    with contextlib.ExitStack() as stack:
        def segment(what: str) -> Segment:
            return stack.enter_context(make_or_open(segment_name(spec.name, what), 0, create=False))

        control = segment("control")
        wrong = control_error(control.address, control.size)
        if wrong:
            raise VmmError(f"machine '{spec.name}' cannot be taken over: {wrong}")
        mode = tracking_mode(tracking)
        parts = Parts(spec, control, segment("system"), DirtyLog(spec.name, spec.reaper.reapers), mode, stack=stack)
        if spec.image:
            image = loader.load_image(spec.image, spec.load_address)
            parts.entry, parts.usable = image.entry, _usable_pages(_boot_slots(spec, image))
        stack.callback(parts.log.close)
        parts.log.on = logging
        for slot in slots:
            parts.log.add_slot(parts.new_slot(slot, create=False))
        parts.log.reused.update(reused)
        for client in clients:
            parts.log.adopt_client(client)
        mode.need(parts, fresh=False)
        if spec.replay_trace:
            parts.traces = [segment(f"replay{i}") for i in range(spec.vcpus)]
        parts.stack = stack.pop_all()
    return parts


def make_handles(parts: Parts) -> list[VcpuHandle]:
    spec = parts.spec
    vcpus = []
    for index in range(spec.vcpus):
        block = vcpu_control(parts.control_segment.address, index)
        vcpu = VcpuHandle(index, block, parts.ring_entries)
        if parts.ring_entries and index in parts.rings:
            vcpu.ring.map_segment(parts.rings[index])
        vcpus.append(vcpu)
    return vcpus


def worker_spec(parts: Parts, index: int, directory: Path, endpoints: Endpoints, keeper_fd: int) -> WorkerSpec:
    """What vCPU ``index``'s worker is told; its control block asks it to start paused."""
    spec = parts.spec
    block = vcpu_control(parts.control_segment.address, index)
    block.ring_entries = parts.ring_entries
    block.request = VcpuRequest.PAUSE
    block.dirty_quota = spec.quotas[index]
    replay = spec.replay
    if replay is not None and parts.traces:
        replay = msgspec.structs.replace(replay, trace_segment=parts.traces[index].name)
    return WorkerSpec(
        machine=spec.name, index=index, vcpu_count=spec.vcpus, accel=spec.accel, privilege=spec.privilege,
        nice=spec.nice,
        ring_entries=parts.ring_entries, ring_segment=parts.rings[index].name if index in parts.rings else "",
        tracking=parts.tracking,
        slots=[parts.log.slot_spec(slot, index) for slot in parts.log.slots.values()],
        system_slot=SlotSpec(id=SYSTEM_SLOT, gpa=boot.SYSTEM_GPA, size=parts.system.size,
                             segment=parts.system.name),
        control_segment=parts.control_segment.name, belongings=belongings(spec.name).name,
        request_endpoint=endpoints.requests, notify_endpoint=endpoints.notify,
        fd_socket=str(directory / "fds"), keeper_fd=keeper_fd, replay=replay, program=spec.program,
        boot=_boot_registers(parts, index))


def _boot_registers(parts: Parts, index: int) -> dict[str, int]:
    spec, first = parts.spec, parts.spec.slots[0]
    if spec.is_system(index) or not spec.can.guests:
        return {}
    if spec.program is not None:
        return boot.program_registers(index)
    return boot.boot_registers(index, vcpu_count=spec.vcpus, entry=parts.entry, privilege=spec.privilege,
                               stack_top=boot.stack_top(index, first.gpa + first.size, spec.stack_size))


def make_pipes(spec: MachineSpec, directory: Path) -> None:
    """FIFOs: doorbells, and between a program's system and others (ipc/consoles.py, ipc/forwarding.py). Raises
    OSError."""
    Doorbell.make(directory)
    if spec.program is not None:
        Doorbell.make(directory, PROGRAM_CALL)
        for name in ("console-in", "console-out", *forwarding.PIPES):
            os.mkfifo(directory / name, 0o600)
