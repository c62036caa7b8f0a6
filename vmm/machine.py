"""``Machine``: launch a machine or attach to one, drive it, and look into its memory.

    with Machine.launch(load_config("configs/quickstart.yaml")) as machine:
        report = machine.wait()

Everything the CLI does, it does with this class. Memory and bitmaps are numpy views of the machine's
own shared memory, without copies.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ipc import process
from ipc.bitmap import Bitmap
from ipc.shm import Segment, SegmentError

from . import control, holds
from .errors import ExitCode, VmmError, no_memory
from .names import segment_name
from .ram import ClientBitmaps
from .runtime import is_running, machine_dir, machine_names
from .spec import MachineSpec, encode_spec

__all__ = ["Machine", "SyncResult", "list_machines"]

_LAUNCH_TIMEOUT = 120.0     # seconds; the first launch ever compiles the kernels
_END_TIMEOUT = 30.0


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
class _View:
    """A slot that is mapped here. ``born`` tells it from another under its number."""

    born: int
    segment: Segment


class Machine:
    """A connection to one machine's coordinator. Not thread-safe; open one a thread.

    A launched machine ends with its ``with`` (or ``close``), an attached one goes on.
    """

    def __init__(self, name: str, *, keeper: subprocess.Popen[bytes] | None = None,
                 life_fd: int = -1) -> None:
        self.name = name
        self._keeper = keeper
        self._life_fd = life_fd
        self._client = control.ControlClient(machine_dir(name), name, lambda: is_running(name))
        self._system: Segment | None = None
        self._views: dict[int, _View] = {}
        self._clients: dict[tuple[str, int], ClientBitmaps] = {}
        self._report: dict[str, Any] | None = None
        self._following = False

    # --- launch, attach ----------------------------------------------------------------------

    @classmethod
    def launch(cls, config: Any, *, name: str | None = None, trace: list[str] | None = None,
               trace_file: str = "", detach: bool = False, start: bool = True) -> Machine:
        """Start a machine from a MachineConfig (vmm/config.py) or a MachineSpec.

        A machine that is not detached ends when this process does. ``start=False`` leaves the vCPUs
        before their first instruction until ``start()``. Raises VmmError, with nothing left behind.
        """
        if isinstance(config, MachineSpec):
            spec = config
        else:
            from .plan import plan

            spec = plan(config, name=name, trace=trace, trace_file=trace_file, linger=not detach)
        if name is not None:
            spec = msgspec.structs.replace(spec, name=name)
        from .rules import check_machine

        check_machine(spec)
        status_read, status_write = os.pipe2(os.O_CLOEXEC)
        life_read, life_write = (-1, -1) if detach else os.pipe2(os.O_CLOEXEC)
        inherited = [fd for fd in (status_write, life_read) if fd >= 0]
        quiet = subprocess.DEVNULL if detach else None
        try:
            keeper = subprocess.Popen(
                process.python_module("vmm.keeper", spec.name, str(status_write), str(life_read)),
                stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, pass_fds=inherited,
                start_new_session=True)
            for fd in inherited:
                os.close(fd)
            assert keeper.stdin is not None
            with contextlib.suppress(BrokenPipeError), keeper.stdin as pipe:
                pipe.write(encode_spec(spec))
            try:
                _await_ready(spec.name, status_read)
            except BaseException:
                _close_fd(life_write)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    keeper.wait(_END_TIMEOUT)
                raise
        finally:
            os.close(status_read)
        machine = cls(spec.name, keeper=keeper, life_fd=life_write)
        machine.follow()
        if start:
            machine.start()
        return machine

    @classmethod
    def attach(cls, name: str) -> Machine:
        """Connect to a running machine. Raises VmmError when there is none of that name, or it is no name."""
        if not is_running(name):
            names = machine_names()
            there = f"running: {', '.join(names)}" if names else "none is running"
            raise VmmError(f"no machine named '{name}' ({there})", ExitCode.NO_MACHINE)
        return cls(name)

    # --- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Let the vCPUs enter the guest for the first time. Raises VmmError."""
        self._client.ask(control.Start)

    def pause(self) -> None:
        """The user's pause: every vCPU is out of the guest when this returns, and stays so until ``resume``,
        whatever becomes of this process. There is one; programs that need the guest to stand still have their own
        (``paused``). Raises VmmError."""
        self._client.ask(control.Pause)

    def paused(self, why: str) -> contextlib.AbstractContextManager[None]:
        """A pause of this process' own: within the ``with`` every vCPU is out of the guest, whoever else pauses and
        resumes. It ends with this process at the latest. ``why``: what it is for, as others are told
        (``snapshot``). Raises VmmError."""
        return holds.paused(self._client, why)

    def lease(self, kind: str, why: str, *, recover: bool = False) -> holds.Lease:
        """Have the machine for something that others must not disturb (vmm/holds.py), until the end of the
        ``with``, or of this process. ``kind``: ``migration``, ``snapshot``, or ``incoming`` (not started yet: only
        who has the lease may start it, set its state and write its memory; should it go before, the machine does).
        ``why``: completes "it is being migrated …" for others. What each keeps out stands in
        vmm/coordinator/leases.py. ``recover``: go on with a machine that was handed over by a process which has
        gone. Raises VmmError, with who has it."""
        return holds.Lease(self._client, self.name, kind, why, recover)

    def state(self) -> dict[str, Any]:
        """Of a paused machine: ``spec``, its specification with the slots, limits and tracking as they are,
        ``vcpus``, their states (workers/accel.py; ``xsave`` in base64), and ``paused``, whether the user has paused
        it. Raises VmmError."""
        return self._client.ask(control.State)

    def set_state(self, vcpus: list[dict[str, Any]]) -> None:
        """Before ``start``, with the memory in its place: what ``state`` gave. Raises VmmError when this host
        cannot take it over."""
        self._client.ask(control.SetState, vcpus=vcpus)

    def incoming(self, socket: str) -> list[dict[int, int]]:
        """Before ``start``: pages of RAM are missing (holes in its segments), and this process fills them in while
        the guest runs (post-copy). The workers send their userfaultfds to the Unix socket ``socket``. {slot id:
        address of its mapping} for each vCPU. Nobody else may look at the memory until ``arrived``."""
        answer = self._client.ask(control.Incoming, socket=socket, mine=True)
        return [{int(slot): address for slot, address in each.items()} for each in answer["addresses"]]

    def arrived(self) -> None:
        """Every page that was missing is there."""
        self._client.ask(control.Arrived)

    def resume(self, *, force: bool = False) -> list[str]:
        """Take back the user's pause, if there is one, and nobody else's. Who wants the guest to stand still all
        the same (``snapshot (pid 123)``): it runs on when they have done; empty when it runs. ``force``: also a
        machine that was handed over to another host, which must not run there then. Raises VmmError for such a
        machine without ``force``, and while it is being handed over."""
        return [str(who) for who in self._client.ask(control.Resume, force=force)["held_by"]]

    def stop(self) -> None:
        """End every vCPU; ``wait`` then has the report. An ended machine is released."""
        self._client.ask(control.Stop)

    def release(self) -> None:
        """Let an ended machine go; its report is gone with it."""
        self._client.ask(control.Release)

    def status(self) -> dict[str, Any]:
        """The report so far; the same document as ``wait`` returns."""
        return self._client.ask(control.Status)

    def follow(self) -> None:
        """Have events sent to this client from now on."""
        if not self._following:
            self._client.ask(control.Follow)
            self._following = True

    def events(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Events as they come: console, exit, ring-rebuilt, ended (the last). Stops after ``timeout``
        seconds without one. A machine that goes away in between raises VmmError."""
        self.follow()
        last = time.monotonic()
        while timeout is None or time.monotonic() - last < timeout:
            step = 0.5 if timeout is None else max(0.0, min(0.5, last + timeout - time.monotonic()))
            event = self._client.event(step)
            if event is not None:
                last = time.monotonic()
                yield event
                if event["event"] == "ended":
                    return
            elif not is_running(self.name):
                raise VmmError(f"machine '{self.name}' went away", ExitCode.NO_MACHINE)

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """Until every vCPU has ended; the final report. Raises TimeoutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.follow()
        report = self.status()
        while report["state"] != "ended":
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"machine '{self.name}' is still running after {timeout} s")
            for event in self.events(1.0 if left is None else min(left, 1.0)):
                if event["event"] == "ended":
                    break
            report = self.status()
        self._report = report
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
        answer = self._client.ask(control.Slots)
        if answer["accelerator"] == "replay":
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
        if self.status()["accelerator"] == "replay":
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
        first = offset // 4096
        with holds.host_write(self._client, self.name, slot, view.born, first,
                              (offset + len(data) - 1) // 4096 - first + 1):
            view.segment.buf[offset:offset + len(data)] = data

    def writing(self, slot: int, first: int, count: int) -> contextlib.AbstractContextManager[None]:
        """Around a write of pages ``first``..``first + count - 1`` through a writable view (``ram``): they are
        dirty in every sync of every client from its beginning to its end, and whoever freezes the machine waits
        for the end (5 s at most, so write what is in memory already). Raises VmmError, before the write, outside
        the slot and while it is frozen; and where another slot has taken the place of the one that this
        ``Machine`` has given a view of."""
        known = self._views.get(slot)
        born = known.born if known is not None else self._view(slot).born
        return holds.host_write(self._client, self.name, slot, born, first, count)

    def mark_dirty(self, slot: int, first: int, count: int) -> None:
        """Pages ``first``..``first + count - 1`` of the slot were written by the host. Call it after
        the write: a mark that comes first can be synced away before it. Raises VmmError outside the slot, and while
        the machine is frozen: what was written may be missing where the machine goes (``writing`` says so
        before); and where another slot has taken the place of the one that this ``Machine`` has given a view of."""
        known = self._views.get(slot)
        self._client.ask(control.Mark, slot=slot, first=first, count=count, born=known.born if known else None)

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
        self._client.ask(control.LogStart, slot=slot)

    def log_stop(self, slot: int) -> None:
        self._client.ask(control.LogStop, slot=slot)

    def register(self, client: str, *, mine: bool = False, like: str = "") -> None:
        """Begin to gather dirty pages for ``client`` (1 to 32 of a-z, 0-9, _); idempotent. ``mine``: until this
        process ends at the latest, and for it alone. ``like``: begin with what that client has gathered. Raises
        VmmError, also when it is another process' own."""
        self._client.ask(control.Register, client=client, mine=mine, like=like)

    def unregister(self, client: str) -> None:
        self._client.ask(control.Unregister, client=client)
        for key in [k for k in self._clients if k[0] == client]:
            self._clients.pop(key).close()

    def sync(self, client: str) -> SyncResult:
        """Flush, then take what was dirtied since this client's last sync (or its registration). Raises VmmError;
        the next sync has what this one would have had then."""
        slots = self._collect(client)
        ranges = {i: self.bitmap(i, client).ranges() if s["dirty"] else [] for i, s in slots.items()}
        return SyncResult(ranges, sum(s["dirty"] for s in slots.values()),
                          frozenset(i for i, s in slots.items() if not s["logged"]),
                          frozenset(i for i, s in slots.items() if s["retired"]))

    def collect(self, client: str) -> dict[int, int]:
        """As ``sync``, but without ranges: {slot id: dirty pages}; which ones they are is in ``bitmap``."""
        return {slot_id: s["dirty"] for slot_id, s in self._collect(client).items()}

    def _collect(self, client: str) -> dict[int, dict[str, Any]]:
        slots = self._take(client)
        for key in [k for k in self._clients if k[0] == client and k[1] not in slots]:
            self._clients.pop(key).close()
        for slot_id, slot in slots.items():
            found = self._clients.get((client, slot_id))
            if found is None or found.segment.name != slot["bitmap"]:   # of another slot, or another client
                if found is not None:
                    del self._clients[client, slot_id]
                    found.close()
                self._clients[client, slot_id] = ClientBitmaps(self._open(slot["bitmap"]), slot["pages"])
        return slots

    def take(self, client: str) -> int:
        """Like ``sync``, the dirty pages only counted: no bitmap is opened, no ranges are made of it."""
        return sum(s["dirty"] for s in self._take(client).values())

    def _take(self, client: str) -> dict[int, dict[str, Any]]:
        answer = self._client.ask(control.Sync, client=client)
        return {int(i): s for i, s in answer["slots"].items()}

    def bitmap(self, slot: int, client: str) -> Bitmap:
        """The client's bitmap of a slot as of its last sync here, a view; valid until its next. (The slot itself
        may have been removed since: the next sync says so.)"""
        if (client, slot) not in self._clients:
            raise VmmError(f"client '{client}' has not synced slot {slot} yet")
        return self._clients[client, slot].front

    def dirty_limit(self, pages_per_s: int, vcpu: int | None = None) -> None:
        """The user's limit: let one vCPU, or each, dirty at most so many pages a second; 0 lifts it. It stays, and
        moves with the machine. In force when this returns; a program's own (``limits``) may be lower still. Raises
        VmmError on a machine without dirty rings."""
        self._client.ask(control.DirtyLimit, pages_per_s=pages_per_s, vcpu=vcpu)

    def limits(self, why: str) -> holds.Limits:
        """Dirty limits of this process' own over the user's, until the end of the ``with`` or of the process."""
        return holds.Limits(self._client, why)

    def set_tracking(self, tracking: str) -> dict[str, Any]:
        """Log dirty pages in another way (one of vmm.tracking.CHOICES). The vCPUs are paused for it, nothing that
        was dirtied before is lost. ``tracking``: the way it is now; ``seconds`` of pause. Raises VmmError where it
        cannot be had, with everything as it was."""
        return self._client.ask(control.SetTracking, tracking=tracking)

    # --- dirty traces -----------------------------------------------------------------------------------

    def record_start(self) -> None:
        """Begin to record a dirty trace (vmm/record.py does all of it). It ends with this process at the latest."""
        self._client.ask(control.RecordStart, mine=True)

    def record_step(self) -> bool:
        """Have the rings harvested now; False when the machine has ended. Raises VmmError when nothing is being
        recorded, as after the coordinator was replaced."""
        return bool(self._client.ask(control.RecordStep)["going_on"])

    def record_stop(self) -> None:
        """Flush the rest into the queue, and end the recording."""
        self._client.ask(control.RecordStop)

    # --- memory slots -----------------------------------------------------------------------------------

    def memory_add(self, slot: int, gpa: int, size: int, *, log: bool = True) -> None:
        """Plug a memory slot in (bytes, multiples of 4096)."""
        self._client.ask(control.MemoryAdd, slot=slot, gpa=gpa, size=size, log=log)

    def memory_remove(self, slot: int) -> None:
        """Unplug a slot: vCPUs stopped, rings reaped, bitmap synced, removed, resumed. What was dirty
        in it is in each client's next sync."""
        self._client.ask(control.MemoryRemove, slot=slot)
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

    def close(self) -> None:
        """End a launched machine (stopping it if it runs) and wait until nothing of it is left;
        drop the connection to an attached one."""
        if self._keeper is None:
            self.detach()
            return
        keeper, self._keeper = self._keeper, None
        self.detach()
        if self._life_fd >= 0:
            os.close(self._life_fd)     # the keeper sees it and has the machine end in order
        else:
            keeper.terminate()
        try:
            keeper.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            keeper.kill()
            keeper.wait()

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self.close()


def _close_fd(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _await_ready(name: str, fd: int) -> None:
    """The coordinator's one line. Raises VmmError with what it says, or that it said nothing."""
    deadline = time.monotonic() + _LAUNCH_TIMEOUT
    text = b""
    while not text.endswith(b"\n"):
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(fd, 65536) if ready else b""
        if not chunk:
            raise VmmError(f"machine '{name}' did not start", ExitCode.WORKER_DIED)
        text += chunk
    answer = msgspec.json.decode(text.splitlines()[0])
    if "error" in answer:
        raise VmmError(answer["error"], ExitCode(answer["code"]))


def list_machines() -> list[dict[str, Any]]:
    """Status of every running machine; one that does not answer is listed with state ``unknown``."""
    found = []
    for name in machine_names():
        machine = Machine(name)
        try:
            found.append(machine._client.ask(control.Status, timeout=2.0))
        except VmmError:
            found.append({"name": name, "state": "unknown"})
        finally:
            machine.detach()
    return found
