"""From a validated configuration to a machine that this host can run: accelerator, ring, bounds."""

from __future__ import annotations

import os
import re

from ipc.messages import ProgramSpec, ReplayPhase, ReplaySpec
from ipc.shm import PAGE_SIZE
from workers.accel import registry

from ..errors import VmmError
from ..guests import WORKLOADS, WorkloadError, get_workload, resolve_params
from ..machine import loader
from ..machine.events import check_pattern
from ..machine.room import RoomError, check_room
from ..machine.rules import RuleError, check_machine, fitting_ring
from ..machine.spec import MachineSpec, RamSlot, ReaperSpec, VerifySpec
from ..machine.tracefile import TraceError, TraceReader, check_trace
from ..machine.trackings import check_tracking
from ..outputs import open_append
from .accelerators import choose_accelerator
from .models import GuestConfig, MachineConfig, ReplayConfig
from .programs import THREADS, program_spec

__all__ = ["plan"]


def plan(config: MachineConfig, *, name: str | None = None, trace: list[str] | None = None,
         trace_file: str = "", linger: bool = True, console: str = "lines") -> MachineSpec:
    """Resolve a MachineConfig. ``console``: what a program has (ipc.messages.ProgramSpec). Raises VmmError, naming the
    key, when this host cannot run it."""
    try:
        accel = choose_accelerator(config.accel, "guest" if config.replay is None else "replay",
                                   programs=config.guest is not None and config.guest.program is not None)
    except VmmError as exc:
        raise config.error("accel", str(exc)) from None
    slots = [RamSlot(m.slot, m.gpa, m.size, m.log) for m in config.memory]
    largest = registry.available(accel).ring_max
    if not largest:
        entries = 0     # no ring in this kernel: the plain bitmap does the same work
    elif config.dirty_ring_size == "auto":
        entries = fitting_ring(slots, largest)
    elif (entries := config.dirty_ring_size) > largest:
        raise config.error("dirty_ring_size", f"{entries} entries, but the largest ring on this host has {largest}")
    if config.tracking is not None:
        try:
            check_tracking(config.tracking, accel, entries)
        except VmmError as exc:
            raise config.error("tracking", str(exc)) from None
    if config.replay is not None and config.replay.trace is not None:
        try:
            with TraceReader(config.replay.trace) as reader:
                check_trace(config.replay.trace, reader.header, config.vcpus, slots)
        except TraceError as exc:
            raise config.error("replay.trace", str(exc)) from None
    image, params, exact, program = "", list[int](), True, None
    address, vcpus = None, config.vcpus
    if config.guest is not None and config.guest.program is not None:
        program, exact = _program(config, config.guest, console), False
        vcpus = (config.guest.threads or THREADS) + 1
    elif config.guest is not None:
        image, params, exact = _guest(config, config.guest)
        address = config.guest.address
        try:
            loaded = loader.load_image(image, address)
            loader.check_fits(loaded, [(s.gpa, s.size) for s in slots])
        except loader.GuestImageError as exc:
            raise config.error("guest.image", str(exc)) from None
    patterns = _patterns(config, trace or [])
    if trace_file:
        _check_trace_file(trace_file, patterns)
    verify = config.verify
    spec = MachineSpec(
        name=name or config.name, accel=accel, vcpus=vcpus, program=program, privilege=config.privilege,
        nice=config.nice,
        ring_entries=entries, tracking=_tracking(config, entries), log=config.log, slots=slots,
        image=os.path.abspath(image) if image else "", load_address=address,
        params=params, cmdline=(config.guest and config.guest.workload) or "", stack_size=config.stack_size,
        reaper=ReaperSpec(config.reaper.mode, config.reaper.interval, config.reaper.min_interval,
                          config.reaper.max_interval, config.reapers, config.reaper.reset),
        verify=None if verify is None else VerifySpec(verify.interval, verify.inject, exact),
        timeout=config.timeout, dirty_quota=round((config.dirty_limit or 0) / PAGE_SIZE),
        trace=patterns, trace_file=os.path.abspath(trace_file) if trace_file else "", linger=linger,
        replay=None if config.replay is None else _replay(config.replay),
        replay_trace=os.path.abspath(config.replay.trace) if config.replay and config.replay.trace else "")
    try:
        check_machine(spec)
        check_room(spec)
    except (RuleError, RoomError) as exc:
        raise config.error(exc.key, exc.text) from None
    return spec


def _tracking(config: MachineConfig, entries: int) -> str:
    """What the file says, or its default. Whoever says how large a ring is wants rings."""
    measured = config.dirty_ring_size == "auto" and entries > 0 and config.replay is None
    return config.tracking or ("auto" if measured else "")


def _patterns(config: MachineConfig, given: list[str]) -> list[str]:
    """Of the file, and ``given`` by --trace. Raises VmmError."""
    for number, pattern in enumerate(config.trace):
        try:
            check_pattern(pattern)
        except VmmError as exc:
            raise config.error(f"trace.{number}", str(exc)) from None
    for pattern in given:
        try:
            check_pattern(pattern)
        except VmmError as exc:
            raise VmmError(f"--trace {exc}") from None
    return [*config.trace, *given]


def _check_trace_file(path: str, patterns: list[str]) -> None:
    """Said before anything is started. Raises VmmError."""
    if not patterns:
        raise VmmError("--trace-file: no trace event is enabled (use --trace PATTERN)")
    if re.fullmatch(r"/dev/fd/.*|/proc/self/fd/.*", path):
        raise VmmError(f"--trace-file {path}: is a descriptor of this process, which the machine's process does "
                       "not have")
    os.close(open_append(path))


def _replay(replay: ReplayConfig) -> ReplaySpec:
    phases = [ReplayPhase(p.pattern, p.writes, p.stride or 1, p.exponent or 1.0) for p in replay.phases or []]
    if replay.pattern is not None:
        phases = [ReplayPhase(replay.pattern, replay.writes, replay.stride or 1, replay.exponent or 1.0)]
    speed = {"original": 1.0, "full": 0.0}.get(str(replay.speed))
    return ReplaySpec(phases, replay.rate, replay.seed, replay.shared, replay.repeat,
                      speed=float(replay.speed) if speed is None else speed)


def _program(config: MachineConfig, guest: GuestConfig, console: str) -> ProgramSpec:
    assert guest.program is not None
    try:
        return program_spec(guest.program, guest.args, root=str(guest.root or ""), env=guest.env,
                            files={inside: str(outside) for inside, outside in guest.files.items()},
                            directory=guest.directory, seed=guest.seed, console=console, forward=guest.forward)
    except RuleError as exc:
        raise config.error(exc.key, exc.text) from None


def _guest(config: MachineConfig, guest: GuestConfig) -> tuple[str, list[int], bool]:
    """Image path, parameters, and whether each of its stores changes the page it dirties."""
    if guest.workload is None:
        values = list(guest.params.values()) if isinstance(guest.params, dict) else guest.params
        return str(guest.image), values, False
    assert isinstance(guest.params, dict)
    try:
        workload = get_workload(guest.workload)
    except WorkloadError as exc:
        raise config.error("guest.workload", str(exc)) from None
    try:
        params = resolve_params(guest.workload, guest.params)
    except WorkloadError as exc:
        key = f"guest.params.{exc.param}" if exc.param in guest.params else "guest.params"
        raise config.error(key, str(exc)) from None
    return str(WORKLOADS[guest.workload].image), params, workload.exact
