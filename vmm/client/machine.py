"""``Machine``: launch a machine or attach to one, drive it, and look into its memory.

    with Machine.launch(load_config("quickstart")) as machine:
        report = machine.wait()

Everything the CLI does, it does with this class. Memory and bitmaps are numpy views of the machine's
own shared memory, without copies.
"""

from __future__ import annotations

import base64
import contextlib
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from ipc.shm import PAGE_SIZE
from workers.accel import registry

from ..errors import ExitCode, StillRunning, VmmError, no_memory
from ..machine import records, verbs
from ..machine.names import belongings
from ..machine.runtime import await_upgrade, goes_on, is_running, is_upgrading, machine_dir, machine_names
from ..machine.spec import MachineSpec
from . import holds
from .connection import ControlClient
from .launch import Launched
from .views import Bitmaps, Lanes, Memory

if TYPE_CHECKING:
    import subprocess

    import numpy as np
    from numpy.typing import NDArray

    from ipc.bitmap import Bitmap
    from ipc.run import Fork

    from .keeper import KeeperProcess

__all__ = ["Flushed", "Machine", "SyncResult", "list_machines"]

_UPGRADE_PATIENCE = 10.0    # seconds
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
    #: Of the slots, those that have been removed.
    retired: frozenset[int]


class Machine:
    """A connection to one machine's coordinator. Not thread-safe; open one per thread.

    A launched machine ends with its ``with`` (or ``close``), an attached one keeps running.
    """

    def __init__(self, name: str, *, launched: Launched | None = None, detached: bool = False,
                 pinned: int | None = None, after: int = -1) -> None:
        """For ``launch`` and ``attach``. ``after``: the events that ``events`` begins behind; -1: those so far."""
        self.name = name
        self._launched = launched
        self._detached = detached       # a launched one that lives on without this process once it runs
        self._pinned = launched.keeper.pid if launched is not None else pinned
        self._after = 0 if launched is not None else after
        self._client = self._connect(self._after)
        self._memory = Memory(self._client, name)
        self._bitmaps = Bitmaps(self._client, name)
        self._report: dict[str, Any] | None = None

    def _connect(self, after: int) -> ControlClient:
        name, owner, pinned = self.name, belongings(self.name).owner_pid, self._pinned

        def alive() -> bool:
            return owner() == pinned if pinned is not None else goes_on(name)

        return ControlClient(machine_dir(name), name, alive, owner, after=after, pinned=pinned)

    @property
    def _keeper(self) -> subprocess.Popen[bytes] | Fork | None:
        """Of a launched machine."""
        return None if self._launched is None else self._launched.keeper

    @property
    def keeper(self) -> int | None:
        """Process id of the keeper of the processes that answered last; another once it was upgraded."""
        return self._client.keeper

    @property
    def spec(self) -> MachineSpec | None:
        """Of a machine that was launched here: what it was launched as."""
        return None if self._launched is None else self._launched.spec

    @property
    def warnings(self) -> list[str]:
        """What the user of a machine that was launched here should know (that no log is kept, for example)."""
        return [] if self._launched is None else list(self._launched.warnings)

    @property
    def console(self) -> str:
        """Of a machine that was launched here: how its Linux program has a console (``ProgramSpec.console``), "lines"
        also where there is none. Others than lines are to be followed (vmm/client/console.py)."""
        program = None if self._launched is None else self._launched.spec.program
        return "lines" if program is None else program.console

    @property
    def forward(self) -> list[str]:
        """The same: ports of the host that are to lead to it (``ProgramSpec.forward``)."""
        program = None if self._launched is None else self._launched.spec.program
        return [] if program is None else program.forward

    # --- launch, attach ----------------------------------------------------------------------

    @classmethod
    def launch(cls, config: Any, *, name: str | None = None, trace: list[str] | None = None,
               trace_file: str = "", detach: bool = False, start: bool = True, console: str = "lines",
               keeper: KeeperProcess | None = None) -> Self:
        """Start a machine from a MachineConfig (vmm/client/config.py) or a MachineSpec. ``console``: of a Linux
        program (ipc/messages.py); who does not want its lines follows it himself (vmm/client/console.py).

        The machine ends when this process does; one that is detached (``detach``) lives on, once it runs.
        ``start=False`` leaves the vCPUs before their first instruction until ``start()``. ``keeper``: one that was
        started before, with what is said here. A machine whose memory comes from elsewhere (``incoming`` in its
        specification) can be asked for nothing until it ``is_ready``; its memory is there when this returns (see
        vmm.machine.names.slot_segment). Raises VmmError, with nothing left behind.
        """
        if isinstance(config, MachineSpec):
            from ..machine.room import check_room
            from ..machine.rules import check_machine

            spec = config if name is None else msgspec.structs.replace(config, name=name)
            check_machine(spec)
            check_room(spec)
        else:
            from .plan import plan

            spec = plan(config, name=name, trace=trace, trace_file=trace_file, linger=not detach, console=console)
        machine = cls(spec.name, launched=Launched(spec, quiet=detach, keeper=keeper), detached=detach)
        try:
            if start:
                machine.start()
        except BaseException:
            machine.close()
            raise
        return machine

    @classmethod
    def attach(cls, name: str, *, past: bool = False) -> Self:
        """Connect to a running machine; one that is being upgraded is waited for, and one that is upgraded later stays
        connected. ``past``: its ``events`` begin with the first that is kept, not with those from now on. Raises
        VmmError when there is none of that name, or it is not a valid name."""
        if not await_upgrade(name):
            raise records.no_machine(name)
        return cls(name, after=0 if past else -1)

    @classmethod
    def attach_pinned(cls, name: str) -> Self:
        """The same, and once the machine has ended or was upgraded it is gone: for whoever ends it, or moves it.
        Raises VmmError."""
        keeper = belongings(name).owner_pid()
        if keeper is None:
            raise records.no_machine(name)
        return cls(name, pinned=keeper)

    @classmethod
    def taken_over(cls, machine: Machine) -> Self:
        """``machine`` as an object of this class, which has its place: what was launched with it ends with this one."""
        launched, machine._launched = machine._launched, None
        machine.detach()
        return cls(machine.name, launched=launched, detached=machine._detached, pinned=machine._pinned,
                   after=machine._after)

    def another(self) -> Self:
        """Another connection of this process to the machine, for another thread; its events begin where those of this
        one began. It is to be detached."""
        return type(self)(self.name, pinned=self._pinned, after=self._after)

    def beside(self, lease: holds.Lease) -> Machine:
        """Another connection of this process, for a thread that is to end ``lease``, which both show until then. It is
        to be detached."""
        other = Machine(self.name, pinned=self._pinned)
        lease.pass_to(other._client)
        return other

    # --- life -----------------------------------------------------------------------------------

    def is_ready(self, *, wait: bool = False) -> bool:
        """Of a machine that was launched here with memory from elsewhere: it can be spoken to (``wait``: it is waited
        for). Raises VmmError with the reason why it never will be."""
        assert self._launched is not None
        while not (ready := self._launched.is_ready(wait=wait)) and wait:
            pass
        return ready

    def start(self) -> None:
        """Let the vCPUs enter the guest for the first time. Raises VmmError."""
        self._client.ask(verbs.Start)
        if self._detached:
            self.let_go()

    def let_go(self) -> None:
        """A machine that was launched here lives on without this process. Idempotent."""
        if self._launched is not None:
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
        address of its mapping} for each vCPU. No other process may look at the memory until
        ``arrived``. Raises VmmError."""
        answer = self._client.ask(verbs.Incoming, socket=socket, mine=True)
        return [{int(slot): address for slot, address in each.items()} for each in answer["addresses"]]

    def arrived(self) -> None:
        """Every page that was missing is there. Raises VmmError."""
        self._client.ask(verbs.Arrived)

    def resume(self, *, force: bool = False) -> list[str]:
        """Take back the user's pause, if there is one, and no other. What still keeps the guest paused
        (``snapshot (pid 123)``): it continues when they are done; empty when it runs. ``force``: also a
        machine that was handed over to another host, which must not run there then. Raises VmmError for such a
        machine without ``force``, and while it is being handed over."""
        return [str(who) for who in self._client.ask(verbs.Resume, force=force)["held_by"]]

    def stop(self, why: str = "") -> None:
        """End every vCPU; ``wait`` then has the report, which says ``why`` ("": on request). An ended machine is
        released. Raises VmmError."""
        self._client.ask(verbs.Stop, why=why)

    def release(self) -> None:
        """Release an ended machine that lingers for its report (which is kept on disk). Raises VmmError."""
        self._client.ask(verbs.Release)

    def status(self, timeout: float = 30.0) -> dict[str, Any]:
        """The report so far (vmm/machine/report.py); the same document as ``wait`` returns. Raises VmmError, also when
        the coordinator has not answered within ``timeout`` seconds."""
        return self._client.ask(verbs.Status, timeout=timeout)

    def events(self, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Events as they come, of a launched machine from the first one: started, paused, resumed, console, exit,
        ring-rebuilt, tracking, warning, incoming-lost, ended (the last); dropped (``count``), for so many that came too
        long ago. docs/protocol.md has their fields; all but dropped have ``at``. Stops after ``timeout`` seconds
        without one. Raises VmmError when the machine goes away in between."""
        while True:
            event = self._client.event(_FOREVER if timeout is None else timeout)
            if event is not None:
                yield event
                if event["event"] == "ended":
                    return
            elif timeout is not None:
                return

    def lanes(self) -> Lanes:
        """What its processes have written down of late: reaps, stalls, verbs (ipc/lanes.py). Raises VmmError."""
        self.status()       # one that was just upgraded may have its name, and not its memory yet
        return Lanes(self.name)

    def skip_events(self) -> None:
        """Let ``events`` of an attached machine begin behind those that there are now, instead of when it is first
        asked for any. Raises VmmError."""
        self._client.skip_events()

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """Until every vCPU has ended; the final report. That of a machine which has gone meanwhile is the one that
        it has left (without ``vcpus`` if it could not make one). One that was upgraded is waited for in its new
        processes, which do not end with this one. Raises TimeoutError, which is a VmmError, too."""
        deadline = time.monotonic() + (_FOREVER if timeout is None else timeout)
        report: dict[str, Any] | None = None
        while report is None:
            try:
                report = self._wait_for_end(deadline)
            except VmmError as exc:
                report = records.outcome(self.name)
                if report is None and self.goes_on():
                    continue
                # Without an answer while it runs, one coordinator is taking over from another.
                if report is None and not (exc.exit_code is ExitCode.NO_MACHINE and is_running(self.name)):
                    raise
            if report is None and time.monotonic() >= deadline:
                raise StillRunning(f"machine '{self.name}' is still running after {timeout} s")
            if report is not None and report["cause"].endswith(records.UPGRADED) and self.goes_on():
                report = None
        self._report = report
        return report

    def goes_on(self) -> bool:
        """Of a machine that has ended: it was upgraded, and this is attached to the one that goes on, whose events
        begin with the first. Otherwise nothing has changed."""
        owner, before = belongings(self.name).owner_pid, self._client.keeper
        deadline = time.monotonic() + _UPGRADE_PATIENCE
        upgrading = is_upgrading(self.name)     # looked at first: when it is no more, the machine has its name
        while (keeper := owner()) in (before, None) and upgrading and time.monotonic() < deadline:
            time.sleep(0.01)
            upgrading = is_upgrading(self.name)
        if before is None or keeper in (before, None):
            return False
        self.detach()
        self._pinned = None
        self._client = self._connect(0)
        self._memory, self._bitmaps = Memory(self._client, self.name), Bitmaps(self._client, self.name)
        return True

    def _wait_for_end(self, deadline: float) -> dict[str, Any] | None:
        """The report; None: it is still running. Raises VmmError."""
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
        """A slot's memory, shape [bytes], a view of the guest's own. A program that writes through a writable
        view must call ``mark_dirty`` afterwards; ``write`` does both. A view is of the slot as it is now: when that
        is removed, the view stays, of memory that is no longer the guest's (``born`` in ``status`` tells). Raises
        VmmError where there is no such slot, while pages are missing, and where there is no memory (replay)."""
        import numpy as np

        view = np.frombuffer(self._memory.view(slot).segment.buf, np.uint8)
        view.flags.writeable = writable
        return view

    def ram_segment(self, slot: int) -> str:
        """Name of the shared-memory segment that is the slot's memory now. Raises VmmError as ``ram`` does."""
        return self._memory.view(slot).segment.name

    def require_state(self) -> None:
        """Raises VmmError for a machine that cannot be saved or moved: it has no memory (replay)."""
        if not registry.capabilities(self.status()["accelerator"]).guests:
            raise VmmError(no_memory(self.name))

    def system(self) -> NDArray[np.uint8]:
        """The system slot's memory (boot information, page tables), writable. It is never logged."""
        return self._memory.system()

    def read(self, gpa: int, size: int) -> bytes:
        """Bytes of guest memory within one slot. Raises VmmError outside RAM."""
        view, _, offset = self._memory.locate(gpa, size)
        return bytes(view.segment.buf[offset:offset + size])

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory within one slot, and have the pages dirty for every client of the dirty log, from
        before the first byte is written: KVM logs only the guest's own stores. Raises VmmError outside RAM, and
        while the machine must not be changed (the last copy of a migration), with nothing
        written; and where the slot was removed meanwhile: the data is lost with it then."""
        view, slot, offset = self._memory.locate(gpa, len(data))
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
        view = self._memory.known(slot) or self._memory.view(slot)
        return holds.host_write(self._client, slot, view.born, first, count)

    def mark_dirty(self, slot: int, first: int, count: int) -> None:
        """Pages ``first``..``first + count - 1`` of the slot were written by the host. Call it after
        the write: a mark that comes first can be synced away before it. Raises VmmError outside the slot, and while
        the machine is frozen: what was written may be missing where the machine goes (``writing`` says so
        before); and where another slot has taken the place of the one that this ``Machine`` has given a view of."""
        known = self._memory.known(slot)
        self._client.ask(verbs.Mark, slot=slot, first=first, count=count, born=known.born if known else None)

    # --- dirty log ------------------------------------------------------------------------------------

    def log_start(self, slot: int) -> None:
        """Switch dirty logging of a slot on; all of it counts as dirty at first. Raises VmmError."""
        self._client.ask(verbs.LogStart, slot=slot)

    def log_stop(self, slot: int) -> None:
        """Switch dirty logging of a slot off. Raises VmmError."""
        self._client.ask(verbs.LogStop, slot=slot)

    def register(self, client: str, *, mine: bool = False, like: str = "", timeout: float = 30.0) -> None:
        """Begin to gather dirty pages for ``client`` (1 to 32 of a-z, 0-9, _); idempotent. Where nobody else needs a
        log, the vCPUs stand still for some milliseconds, and log from then on. ``mine``: until this process ends at
        the latest, and for it alone. ``like``: begin with what that client has gathered. Raises VmmError, also when
        it is another process' own, and when the coordinator has not answered within ``timeout`` seconds."""
        self._client.ask(verbs.Register, timeout, client=client, mine=mine, like=like)

    def mark_for(self, client: str, slot: int, words: NDArray[np.uint64]) -> None:
        """These pages of the slot are dirty for this client alone, in its next sync (``words``: a bit a page, as in
        ``bitmap``): it is known from elsewhere that they were written. Raises VmmError."""
        for at in range(0, len(words), verbs.MARKED_WORDS):
            piece = words[at:at + verbs.MARKED_WORDS]
            if piece.any():
                bits = base64.b64encode(zlib.compress(piece.astype("<u8").tobytes(), 1)).decode()
                self._client.ask(verbs.MarkFor, client=client, slot=slot, word=at, bits=bits)

    def unregister(self, client: str, timeout: float = 30.0) -> None:
        """Stop gathering for the client; what it had is dropped. Raises VmmError, also when the coordinator has not
        answered within ``timeout`` seconds."""
        self._client.ask(verbs.Unregister, timeout, client=client)
        self._bitmaps.forget(client)

    def sync(self, client: str) -> SyncResult:
        """Flush, then take what was dirtied since this client's last sync (or its registration). Raises VmmError;
        the next sync has what this one would have had then."""
        slots = self._bitmaps.sync(client)["slots"]
        ranges = {i: self.bitmap(i, client).ranges() if s["dirty"] else [] for i, s in slots.items()}
        return SyncResult(ranges, sum(s["dirty"] for s in slots.values()),
                          frozenset(i for i, s in slots.items() if not s["logged"]),
                          frozenset(i for i, s in slots.items() if s["retired"]))

    def collect(self, client: str) -> dict[int, int]:
        """As ``sync``, but without ranges: {slot id: dirty pages}; which ones they are is in ``bitmap``."""
        return self.flush(client).slots

    def flush(self, client: str) -> Flushed:
        """As ``collect``, with the moment, and each vCPU's pages until then, as the coordinator has them."""
        answer = self._bitmaps.sync(client)
        return Flushed({slot_id: slot["dirty"] for slot_id, slot in answer["slots"].items()}, answer["at"],
                       answer["vcpu_pages"], frozenset(i for i, s in answer["slots"].items() if s["retired"]))

    def take(self, client: str, timeout: float = 30.0) -> int:
        """Like ``sync``, the dirty pages only counted: no bitmap is opened, no ranges are made of it. Raises
        VmmError, also when the coordinator has not answered within ``timeout`` seconds."""
        return sum(s["dirty"] for s in self._client.ask(verbs.Sync, timeout, client=client)["slots"].values())

    def bitmap(self, slot: int, client: str) -> Bitmap:
        """The client's bitmap of a slot as of its last sync here, a view; valid until its next. (The slot itself
        may have been removed since: the next sync says so.) Raises VmmError where there was no sync."""
        return self._bitmaps.synced(slot, client)

    def dirty_limit(self, pages_per_s: int, vcpu: int | None = None) -> None:
        """The user's limit: let one vCPU, or each, dirty at most ``pages_per_s`` pages per second; 0 lifts it. It
        stays, and moves with the machine. In force when this returns; a program's own (``limits``) may be lower
        still. Raises VmmError on a machine without dirty rings."""
        self._client.ask(verbs.DirtyLimit, pages_per_s=pages_per_s, vcpu=vcpu)

    def limits(self, why: str) -> holds.Limits:
        """Dirty limits of this process' own over the user's, until the end of the ``with`` or of the process."""
        return holds.Limits(self._client, why)

    def set_tracking(self, tracking: str) -> dict[str, Any]:
        """Log dirty pages in another mode (one of vmm.machine.trackings.CHOICES). The vCPUs are paused for it,
        nothing that was dirtied before is lost. ``tracking``: the mode it is now; ``seconds``: of pause. Raises
        VmmError where the mode is not available, with everything as it was."""
        return self._client.ask(verbs.SetTracking, tracking=tracking)

    # --- dirty traces -----------------------------------------------------------------------------------

    def record_start(self) -> None:
        """Begin to record a dirty trace (vmm/consumers/trace.py does all of it). It ends with this process at the
        latest. Raises VmmError, also on a machine without dirty rings."""
        self._client.ask(verbs.RecordStart, mine=True)

    def record_step(self) -> bool:
        """Have the rings harvested now; False when the machine has ended. Raises VmmError when nothing is being
        recorded, as after the coordinator was replaced."""
        return bool(self._client.ask(verbs.RecordStep)["going_on"])

    def record_stop(self) -> None:
        """Flush the rest into the queue, and end the recording. Raises VmmError."""
        self._client.ask(verbs.RecordStop)

    # --- Linux programs ---------------------------------------------------------------------------------

    def program_maps(self, client: str = "") -> dict[str, Any]:
        """What each process of its programs has mapped (workers/linux/survey.py has the fields). ``client``: count
        what that client's last sync gave in each mapping. Raises VmmError, also on a machine that runs none."""
        return self._client.ask(verbs.ProgramMaps, client=client)

    def program_trace(self, tracer: str, after: int = -1, *, on: bool = True) -> dict[str, Any]:
        """System calls after the first ``after`` (-1: none of those so far), as workers/linux/tracing.py gives them.
        ``tracer``: a name for who asks; calls are kept until it has not asked for 2 s, or asks with ``on`` unset.
        Raises VmmError, also on a machine that runs no program."""
        return self._client.ask(verbs.ProgramTrace, tracer=tracer, after=after, on=on)

    # --- memory slots -----------------------------------------------------------------------------------

    def memory_add(self, slot: int, gpa: int, size: int, *, log: bool = True) -> None:
        """Plug in a memory slot (``gpa`` and ``size`` in bytes, multiples of 4096); ``log``: its dirty pages are
        logged. Raises VmmError, with nothing changed."""
        self._client.ask(verbs.MemoryAdd, slot=slot, gpa=gpa, size=size, log=log)

    def memory_remove(self, slot: int, *, force: bool = False) -> None:
        """Unplug a slot: vCPUs stopped, rings reaped, bitmap synced, removed, resumed. What was dirty
        in it is in each client's next sync. ``force``: also one that holds the guest's image or stacks. Raises
        VmmError."""
        self._client.ask(verbs.MemoryRemove, slot=slot, force=force)
        self._memory.forget(slot)

    # --- end ----------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Drop the connection; the machine keeps running (a launched one until this process ends)."""
        self._bitmaps.close()
        self._memory.close()
        self._client.close()

    def close(self) -> bool:
        """End a launched machine (stopping it if it runs) and wait until nothing of it is left;
        drop the connection to an attached one. False when a launched one could not be ended in order, and parts of
        it may be there still."""
        launched, self._launched = self._launched, None
        self.detach()
        return launched is None or launched.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self.close()


def list_machines() -> list[dict[str, Any]]:
    """Status of every running machine; one that does not answer is listed with state ``unknown``. One that ends
    meanwhile is not. Raises nothing."""
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
