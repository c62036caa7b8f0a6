"""``Machine``: launch a machine or attach to one, drive it, and look into its memory.

    with Machine.launch(load_config("configs/quickstart.yaml")) as machine:
        report = machine.wait()

Everything the CLI does, it does with this class. Memory and bitmaps are numpy views of the machine's
own shared memory, without copies.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ipc.bitmap import Bitmap
from ipc.shm import PAGE_SIZE, Segment, SegmentError
from workers.accel import registry

from ..errors import ExitCode, VmmError, no_memory
from ..machine import records, verbs
from ..machine.memory import ClientBitmaps
from ..machine.names import segment_name
from ..machine.runtime import is_running, machine_dir, machine_names
from ..machine.spec import MachineSpec
from . import holds
from .connection import ControlClient
from .launch import Launched

__all__ = ["Flushed", "Machine", "SyncResult", "list_machines"]

_FOREVER = 86400.0 * 365    # seconds; what poll(2) can still be asked to wait for is less, and asked for again


@dataclass(frozen=True, slots=True)
class SyncResult:
    """What was dirtied since the client's last sync."""

    #: {slot id: [(first page, count), …]}, ascending.
    slots: dict[int, list[tuple[int, int]]]
    #: Dirty pages in all.
    pages: int
    #: Slots that are not logged now: what is written there meanwhile is not in ``slots`` (all of such a slot is,
    #: once its logging is switched on again).
    unlogged: frozenset[int] = frozenset()
    #: Slots that have been removed, told for the last time. (One that was added since under such a number has all
    #: of its pages in ``slots`` at first, and is not in here.)
    retired: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Flushed:
    """What one flush of the dirty log gave a client, as of one moment."""

    #: {slot id: dirty pages}; which ones they are is in ``Machine.bitmap``.
    slots: dict[int, int]
    #: CLOCK_MONOTONIC of this host when the flush was over, seconds.
    at: float
    #: Pages that each vCPU has dirtied until then, ring entries where there are rings.
    vcpu_pages: list[int]


@dataclass(frozen=True, slots=True)
class _View:
    """A slot that is mapped here. ``born`` tells it from another under its number."""

    born: int
    segment: Segment


class Machine:
    """A connection to one machine's coordinator. Not thread-safe; open one a thread.

    A launched machine ends with its ``with`` (or ``close``), an attached one goes on.
    """

    def __init__(self, name: str, *, launched: Launched | None = None, detached: bool = False) -> None:
        self.name = name
        self._launched = launched
        self._detached = detached       # a launched one that lives on without this process once it runs
        self._client = ControlClient(machine_dir(name), name, lambda: is_running(name),
                                     after=-1 if launched is None else 0)
        self._system: Segment | None = None
        self._views: dict[int, _View] = {}
        self._clients: dict[tuple[str, int], ClientBitmaps] = {}
        self._report: dict[str, Any] | None = None

    @property
    def _keeper(self) -> subprocess.Popen[bytes] | None:
        """Of a launched machine."""
        return None if self._launched is None else self._launched.keeper

    @property
    def warnings(self) -> list[str]:
        """What the user of a machine that was launched here should know (that no log is kept, for example)."""
        return [] if self._launched is None else list(self._launched.warnings)

    # --- launch, attach ----------------------------------------------------------------------

    @classmethod
    def launch(cls, config: Any, *, name: str | None = None, trace: list[str] | None = None,
               trace_file: str = "", detach: bool = False, start: bool = True) -> Machine:
        """Start a machine from a MachineConfig (vmm/client/config.py) or a MachineSpec.

        The machine ends when this process does; one that is detached (``detach``) lives on, once it runs.
        ``start=False`` leaves the vCPUs before their first instruction until ``start()``. Raises VmmError, with
        nothing left behind.
        """
        if isinstance(config, MachineSpec):
            from ..machine.room import check_room
            from ..machine.rules import check_machine

            spec = config if name is None else msgspec.structs.replace(config, name=name)
            check_machine(spec)
            check_room(spec)
        else:
            from .plan import plan

            spec = plan(config, name=name, trace=trace, trace_file=trace_file, linger=not detach)
        machine = cls(spec.name, launched=Launched(spec, quiet=detach), detached=detach)
        try:
            if start:
                machine.start()
        except BaseException:
            machine.close()
            raise
        return machine

    @classmethod
    def attach(cls, name: str) -> Machine:
        """Connect to a running machine. Raises VmmError when there is none of that name, or it is no name."""
        if not is_running(name):
            raise records.no_machine(name)
        return cls(name)

    # --- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Let the vCPUs enter the guest for the first time. Raises VmmError."""
        self._client.ask(verbs.Start)
        if self._launched is not None and self._detached:
            self._launched.let_go()

    def pause(self) -> None:
        """The user's pause: every vCPU is out of the guest when this returns, and stays so until ``resume``,
        whatever becomes of this process. There is one; programs that need the guest to stand still have their own
        (``paused``). Raises VmmError."""
        self._client.ask(verbs.Pause)

    def paused(self, why: str) -> contextlib.AbstractContextManager[None]:
        """A pause of this process' own: within the ``with`` every vCPU is out of the guest, whoever else pauses and
        resumes. It ends with this process at the latest. ``why``: what it is for, as others are told
        (``snapshot``). Raises VmmError."""
        return holds.paused(self._client, why)

    def lease(self, kind: str, why: str, *, recover: bool = False) -> holds.Lease:
        """Have the machine for something that others must not disturb (vmm/client/holds.py), until the end of the
        ``with``, or of this process. ``kind``: ``migration``, ``snapshot``, or ``incoming`` (not started yet: only
        who has the lease may start it, set its state and write its memory; should it go before, the machine does).
        ``why``: completes "it is being migrated …" for others. What each keeps out stands in
        vmm/coordinator/leases.py. ``recover``: go on with a machine that was handed over by a process which has
        gone. Raises VmmError, with who has it."""
        return holds.Lease(self._client, self.name, kind, why, recover)

    def state(self) -> dict[str, Any]:
        """Of a paused machine: ``spec``, its specification with the slots, limits and tracking as they are,
        ``vcpus``, their states (workers/accel/base.py; ``xsave`` in base64), and ``paused``, whether the user has
        paused it. Raises VmmError."""
        return self._client.ask(verbs.State)

    def set_state(self, vcpus: list[dict[str, Any]]) -> None:
        """Before ``start``, with the memory in its place: what ``state`` gave. Raises VmmError when this host
        cannot take it over."""
        self._client.ask(verbs.SetState, vcpus=vcpus)

    def incoming(self, socket: str) -> list[dict[int, int]]:
        """Before ``start``: pages of RAM are missing (holes in its segments), and this process fills them in while
        the guest runs (post-copy). The workers send their userfaultfds to the Unix socket ``socket``. {slot id:
        address of its mapping} for each vCPU. Nobody else may look at the memory until ``arrived``."""
        answer = self._client.ask(verbs.Incoming, socket=socket, mine=True)
        return [{int(slot): address for slot, address in each.items()} for each in answer["addresses"]]

    def arrived(self) -> None:
        """Every page that was missing is there."""
        self._client.ask(verbs.Arrived)

    def resume(self, *, force: bool = False) -> list[str]:
        """Take back the user's pause, if there is one, and nobody else's. Who wants the guest to stand still all
        the same (``snapshot (pid 123)``): it runs on when they have done; empty when it runs. ``force``: also a
        machine that was handed over to another host, which must not run there then. Raises VmmError for such a
        machine without ``force``, and while it is being handed over."""
        return [str(who) for who in self._client.ask(verbs.Resume, force=force)["held_by"]]

    def stop(self) -> None:
        """End every vCPU; ``wait`` then has the report. An ended machine is released."""
        self._client.ask(verbs.Stop)

    def release(self) -> None:
        """Let an ended machine go; its report is gone with it."""
        self._client.ask(verbs.Release)

    def status(self) -> dict[str, Any]:
        """The report so far; the same document as ``wait`` returns."""
        return self._client.ask(verbs.Status)

    def events(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Events as they come, of a launched machine from the first one: console, exit, ring-rebuilt, tracking,
        warning, ended (the last); dropped (``count``), for so many that came too long ago. docs/protocol.md has
        their fields. Stops after ``timeout`` seconds without one. Raises VmmError when the machine goes away in
        between."""
        while True:
            event = self._client.event(_FOREVER if timeout is None else timeout)
            if event is not None:
                yield event
                if event["event"] == "ended":
                    return
            elif timeout is not None:
                return

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """Until every vCPU has ended; the final report. That of a machine which has gone meanwhile is the one that
        it has left (without ``vcpus`` if it could not make one). Raises TimeoutError."""
        deadline = time.monotonic() + (_FOREVER if timeout is None else timeout)
        report: dict[str, Any] | None = None
        while report is None:
            try:
                report = self._wait_for_end(deadline)
            except VmmError as exc:
                report = records.outcome(self.name)
                # Without an answer while it runs, one coordinator is taking over from another.
                if report is None and not (exc.exit_code is ExitCode.NO_MACHINE and is_running(self.name)):
                    raise
            if report is None and time.monotonic() >= deadline:
                raise TimeoutError(f"machine '{self.name}' is still running after {timeout} s")
        self._report = report
        return report

    def _wait_for_end(self, deadline: float) -> dict[str, Any] | None:
        """The report; None: it runs still. Raises VmmError."""
        self._client.skip_events()
        while (report := self.status())["state"] != "ended":
            event: dict[str, Any] | None = {"event": ""}
            while event is not None and event["event"] != "ended":
                event = self._client.event(deadline - time.monotonic())
            if time.monotonic() >= deadline:
                return None
        return report

    # --- memory -----------------------------------------------------------------------------------

    def ram(self, slot: int, *, writable: bool = False) -> NDArray[np.uint8]:
        """A slot's memory, shape [bytes], a view of the guest's own. Who writes through a writable
        view must call ``mark_dirty`` afterwards; ``write`` does both. A view is of the slot as it is now: when that
        is removed, the view stays, of memory that is no longer the guest's (``born`` in ``status`` tells). Raises
        VmmError where there is no such slot, while pages are missing, and where there is no memory (replay)."""
        view = np.frombuffer(self._view(slot).segment.buf, np.uint8)
        view.flags.writeable = writable
        return view

    def ram_segment(self, slot: int) -> str:
        """Name of the shared-memory segment that is the slot's memory now. Raises VmmError as ``ram`` does."""
        return self._view(slot).segment.name

    def _slots(self) -> dict[int, dict[str, Any]]:
        """As they are now. Raises VmmError where nobody may look into them."""
        answer = self._client.ask(verbs.Slots)
        if not registry.capabilities(answer["accelerator"]).guests:
            raise VmmError(no_memory(self.name))
        if answer["incoming"]:
            raise VmmError(f"machine '{self.name}': its memory is still on its way here (post-copy)")
        return {int(i): slot for i, slot in answer["slots"].items()}

    def _view(self, slot: int, slots: dict[int, dict[str, Any]] | None = None) -> _View:
        """The slot as it is now, or as ``slots`` (that ``_slots`` gave) has it."""
        slots = self._slots() if slots is None else slots
        if slot not in slots:
            raise VmmError(f"there is no memory slot {slot} (there are: {', '.join(map(str, slots))})")
        born, name = slots[slot]["born"], slots[slot]["ram"]
        known = self._views.get(slot)
        if known is None or known.segment.name != name:
            if known is not None:
                del self._views[slot]
                known.segment.close()
            known = self._views[slot] = _View(born, self._open(name))
        return known

    def _open(self, name: str) -> Segment:
        try:
            return Segment.open(name)
        except SegmentError as exc:
            raise VmmError(f"machine '{self.name}': {exc} (it was removed just now)", ExitCode.NO_MACHINE) from None

    def require_memory(self) -> None:
        """Raises VmmError for a machine that has none to save or move (replay)."""
        if not registry.capabilities(self.status()["accelerator"]).guests:
            raise VmmError(no_memory(self.name))

    def system(self) -> NDArray[np.uint8]:
        """The system slot's memory (boot information, page tables), writable. It is never logged."""
        if self._system is None:
            self._system = self._open(segment_name(self.name, "system"))
        return np.frombuffer(self._system.buf, np.uint8)

    def read(self, gpa: int, size: int) -> bytes:
        """Bytes of guest memory within one slot. Raises VmmError outside RAM."""
        view, _, offset = self._locate(gpa, size)
        return bytes(view.segment.buf[offset:offset + size])

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory within one slot, and have the pages dirty for every client of the dirty log, from
        before the first byte is written: KVM logs only the guest's own stores. Raises VmmError outside RAM, and
        while somebody has the machine who must not be disturbed (the last copy of a migration), with nothing
        written; and where the slot was removed meanwhile: the data is gone with it then."""
        view, slot, offset = self._locate(gpa, len(data))
        if not data:
            return
        first = offset // PAGE_SIZE
        with holds.host_write(self._client, slot, view.born, first,
                              (offset + len(data) - 1) // PAGE_SIZE - first + 1):
            view.segment.buf[offset:offset + len(data)] = data

    def writing(self, slot: int, first: int, count: int) -> contextlib.AbstractContextManager[None]:
        """Around a write of pages ``first``..``first + count - 1`` through a writable view (``ram``): they are
        dirty in every sync of every client from its beginning to its end, and whoever freezes the machine waits
        for the end (5 s at most, so write what is in memory already). Raises VmmError, before the write, outside
        the slot and while it is frozen; and where another slot has taken the place of the one that this
        ``Machine`` has given a view of."""
        known = self._views.get(slot)
        born = known.born if known is not None else self._view(slot).born
        return holds.host_write(self._client, slot, born, first, count)

    def mark_dirty(self, slot: int, first: int, count: int) -> None:
        """Pages ``first``..``first + count - 1`` of the slot were written by the host. Call it after
        the write: a mark that comes first can be synced away before it. Raises VmmError outside the slot, and while
        the machine is frozen: what was written may be missing where the machine goes (``writing`` says so
        before); and where another slot has taken the place of the one that this ``Machine`` has given a view of."""
        known = self._views.get(slot)
        self._client.ask(verbs.Mark, slot=slot, first=first, count=count, born=known.born if known else None)

    def _locate(self, gpa: int, size: int) -> tuple[_View, int, int]:
        """(view, slot id, offset within the slot). Raises VmmError."""
        slots = self._slots()
        for slot_id, slot in slots.items():
            if slot["gpa"] <= gpa and size >= 0 and gpa + size <= slot["gpa"] + slot["size"]:
                return self._view(slot_id, slots), slot_id, gpa - slot["gpa"]
        raise VmmError(f"guest addresses [{gpa:#x}, {gpa + size:#x}) are not within one memory slot")

    # --- dirty log ------------------------------------------------------------------------------------

    def log_start(self, slot: int) -> None:
        """Switch dirty logging of a slot on."""
        self._client.ask(verbs.LogStart, slot=slot)

    def log_stop(self, slot: int) -> None:
        """Log the slot no more. Raises VmmError."""
        self._client.ask(verbs.LogStop, slot=slot)

    def register(self, client: str, *, mine: bool = False, like: str = "") -> None:
        """Begin to gather dirty pages for ``client`` (1 to 32 of a-z, 0-9, _); idempotent. ``mine``: until this
        process ends at the latest, and for it alone. ``like``: begin with what that client has gathered. Raises
        VmmError, also when it is another process' own."""
        self._client.ask(verbs.Register, client=client, mine=mine, like=like)

    def unregister(self, client: str) -> None:
        """The client gathers no more; what it had is gone. Raises VmmError."""
        self._client.ask(verbs.Unregister, client=client)
        for key in [k for k in self._clients if k[0] == client]:
            self._clients.pop(key).close()

    def sync(self, client: str) -> SyncResult:
        """Flush, then take what was dirtied since this client's last sync (or its registration). Raises VmmError;
        the next sync has what this one would have had then."""
        slots = self._sync(client)["slots"]
        ranges = {i: self.bitmap(i, client).ranges() if s["dirty"] else [] for i, s in slots.items()}
        return SyncResult(ranges, sum(s["dirty"] for s in slots.values()),
                          frozenset(i for i, s in slots.items() if not s["logged"]),
                          frozenset(i for i, s in slots.items() if s["retired"]))

    def collect(self, client: str) -> dict[int, int]:
        """As ``sync``, but without ranges: {slot id: dirty pages}; which ones they are is in ``bitmap``."""
        return self.flush(client).slots

    def flush(self, client: str) -> Flushed:
        """As ``collect``, with the moment, and each vCPU's pages until then, as the coordinator has them."""
        answer = self._sync(client)
        return Flushed({slot_id: slot["dirty"] for slot_id, slot in answer["slots"].items()}, answer["at"],
                       answer["vcpu_pages"])

    def _sync(self, client: str) -> dict[str, Any]:
        """The answer; the bitmaps that it names are open."""
        answer = self._client.ask(verbs.Sync, client=client)
        slots = answer["slots"] = {int(i): s for i, s in answer["slots"].items()}
        for key in [k for k in self._clients if k[0] == client and k[1] not in slots]:
            self._clients.pop(key).close()
        for slot_id, slot in slots.items():
            found = self._clients.get((client, slot_id))
            if found is None or found.segment.name != slot["bitmap"]:   # of another slot, or another client
                if found is not None:
                    del self._clients[client, slot_id]
                    found.close()
                self._clients[client, slot_id] = ClientBitmaps(self._open(slot["bitmap"]), slot["pages"])
        return answer

    def take(self, client: str) -> int:
        """Like ``sync``, the dirty pages only counted: no bitmap is opened, no ranges are made of it."""
        return sum(s["dirty"] for s in self._client.ask(verbs.Sync, client=client)["slots"].values())

    def bitmap(self, slot: int, client: str) -> Bitmap:
        """The client's bitmap of a slot as of its last sync here, a view; valid until its next. (The slot itself
        may have been removed since: the next sync says so.)"""
        if (client, slot) not in self._clients:
            raise VmmError(f"client '{client}' has not synced slot {slot} yet")
        return self._clients[client, slot].synced

    def dirty_limit(self, pages_per_s: int, vcpu: int | None = None) -> None:
        """The user's limit: let one vCPU, or each, dirty at most so many pages a second; 0 lifts it. It stays, and
        moves with the machine. In force when this returns; a program's own (``limits``) may be lower still. Raises
        VmmError on a machine without dirty rings."""
        self._client.ask(verbs.DirtyLimit, pages_per_s=pages_per_s, vcpu=vcpu)

    def limits(self, why: str) -> holds.Limits:
        """Dirty limits of this process' own over the user's, until the end of the ``with`` or of the process."""
        return holds.Limits(self._client, why)

    def set_tracking(self, tracking: str) -> dict[str, Any]:
        """Log dirty pages in another way (one of vmm.machine.trackings.CHOICES). The vCPUs are paused for it,
        nothing that was dirtied before is lost. ``tracking``: the way it is now; ``seconds`` of pause. Raises
        VmmError where it cannot be had, with everything as it was."""
        return self._client.ask(verbs.SetTracking, tracking=tracking)
    # --- dirty traces -----------------------------------------------------------------------------------

    def record_start(self) -> None:
        """Begin to record a dirty trace (vmm/consumers/trace.py does all of it). It ends with this process at the
        latest."""
        self._client.ask(verbs.RecordStart, mine=True)

    def record_step(self) -> bool:
        """Have the rings harvested now; False when the machine has ended. Raises VmmError when nothing is being
        recorded, as after the coordinator was replaced."""
        return bool(self._client.ask(verbs.RecordStep)["going_on"])

    def record_stop(self) -> None:
        """Flush the rest into the queue, and end the recording."""
        self._client.ask(verbs.RecordStop)

    # --- memory slots -----------------------------------------------------------------------------------

    def memory_add(self, slot: int, gpa: int, size: int, *, log: bool = True) -> None:
        """Plug a memory slot in (bytes, multiples of 4096)."""
        self._client.ask(verbs.MemoryAdd, slot=slot, gpa=gpa, size=size, log=log)

    def memory_remove(self, slot: int, *, force: bool = False) -> None:
        """Unplug a slot: vCPUs stopped, rings reaped, bitmap synced, removed, resumed. What was dirty
        in it is in each client's next sync. ``force``: also one that holds the guest's image or stacks. Raises
        VmmError."""
        self._client.ask(verbs.MemoryRemove, slot=slot, force=force)
        view = self._views.pop(slot, None)
        if view is not None:
            view.segment.close()

    # --- end ----------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Drop the connection; the machine goes on (a launched one until this process ends)."""
        for maps in self._clients.values():
            maps.close()
        self._clients.clear()
        for view in self._views.values():
            view.segment.close()
        self._views.clear()
        if self._system is not None:
            self._system.close()
            self._system = None
        self._client.close()

    def close(self) -> bool:
        """End a launched machine (stopping it if it runs) and wait until nothing of it is left;
        drop the connection to an attached one. False when a launched one could not be ended in order, and parts of
        it may be there still."""
        launched, self._launched = self._launched, None
        self.detach()
        return launched is None or launched.end()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self.close()


def list_machines() -> list[dict[str, Any]]:
    """Status of every running machine; one that does not answer is listed with state ``unknown``. One that ends
    meanwhile is not."""
    found = []
    for name in machine_names():
        machine = Machine(name)
        try:
            found.append(machine._client.ask(verbs.Status, timeout=2.0))
        except VmmError:
            if is_running(name):
                found.append({"name": name, "state": "unknown"})
        finally:
            machine.detach()
    return found
