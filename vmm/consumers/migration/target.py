"""Live migration, the target: wait for a machine, take its memory and state, run it when told to.

Until Commit the vCPUs stand before their first instruction. Whatever goes wrong before, the machine made here is
torn down, and only when nothing of it is left the source is told (Refused): it may then let the guest continue there.
Once everything is in its place only the source knows who is to run the machine; should the connection break then,
Commit is awaited for a while from any peer that knows the token of the migration. After Commit the machine is the
target's, and Commit is answered until the source says that it has heard (Done).

With post-copy (vmm/consumers/missing.py) pages come after the start.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable

import numpy as np
import zmq
import zstandard
from numpy.typing import NDArray

from ipc.steps import step
from ipc.userfault import Userfault, UserfaultError
from workers.state import StateError, check_states

from ...client.accelerators import choose_accelerator
from ...client.holds import Lease
from ...client.machine import Machine
from ...errors import ExitCode, VmmError
from ...machine.names import check_machine_name
from ...machine.rules import NO_TREES, Trees
from ...machine.runtime import is_running
from ...machine.spec import MachineSpec
from ..missing import MissingPages, Wanted
from . import wire
from .addresses import parse_address
from .keys import load_keys
from .memory import SlotMemory
from .offers import check_settings, taken
from .pages import CHUNK_PAGES, missing, missing_pages, torn, unpack, want
from .peers import LOOK_EVERY, Gone, Peers, ReceiveError
from .sockets import listen
from .wire import (
    Abort,
    Accept,
    Answer,
    Buffer,
    Commit,
    Complete,
    Done,
    Ended,
    Offer,
    Pages,
    Ping,
    Prepared,
    Received,
    Refused,
    RoundAck,
    RoundEnd,
    Running,
    State,
    Torn,
    WireError,
)

__all__ = ["ReceiveError", "receive"]

_SILENCE = 30.0             # seconds without a word after which the source is given up, before Prepared
_UNDECIDED = 300.0          # seconds that Commit is awaited after Prepared, when the connection has broken
_HEARD = 30.0               # seconds after the end of it all that a source may ask once more how it went
_ASK_AGAIN = 2.0            # seconds without pages after which missing ones are asked for


class _NotWanted(VmmError):
    """An offer that is refused; another may come."""


def receive(address: str, *, name: str | None = None, accel: str = "auto", detach: bool = False, key: str = "",
            peer: str = "", insecure: bool = False, timeout: float | None = None, trees: Trees = NO_TREES,
            waiting: Callable[[str], None] = lambda address: None,
            refused: Callable[[str], None] = lambda why: None) -> Machine:
    """Wait for one machine and return it, running. ``timeout`` (seconds) bounds the wait for a source; ``trees``:
    files that its program has, if it is one's; ``waiting`` is told the address when a source may connect,
    ``refused`` why an offer was refused (another is awaited then). Raises VmmError."""
    where = parse_address(address, listen=True)
    keys = load_keys(key, peer, where, insecure=insecure)
    if name is not None:
        check_machine_name(name)
    accel = choose_accelerator(accel)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
    with contextlib.ExitStack() as stack:
        stack.callback(context.term)
        sock = stack.enter_context(listen(context, where, keys))
        sock.linger = 2000
        waiting(sock.get_string(zmq.LAST_ENDPOINT))
        return _Target(sock, name, accel, detach, timeout, refused, trees).run()


class _Target:
    """One migration on a ROUTER socket."""

    def __init__(self, sock: zmq.Socket[bytes], name: str | None, accel: str, detach: bool, timeout: float | None,
                 refused: Callable[[str], None], trees: Trees) -> None:
        self._peers = Peers(sock, refused, self._look)
        self._name = name
        self._accel = accel
        self._detach = detach
        self._timeout = timeout
        self._refused = refused
        self._trees = trees
        self._machine: Machine | None = None
        self._offered: MachineSpec | None = None
        self._memory: dict[int, SlotMemory] = {}
        self._pages: dict[int, int] = {}
        self._arrived: dict[int, int] = {}      # {round: messages of pages}
        self._expected: dict[int, int] = {}     # {round: messages that the source says it sent}
        self._torn: dict[int, list[Torn]] = {}
        self._prepared = False
        self._paused = False
        self._lease: Lease
        self._absent: dict[int, NDArray[np.bool_]] = {}     # post-copy: what comes after the start
        self._missing: MissingPages | None = None

    # --- the way of a migration -----------------------------------------------------------------------------

    def run(self) -> Machine:
        try:
            self._await_offer()
            self._until_commit()
            machine = self._start()
        except BaseException as exc:
            self._refuse(exc)
            raise
        if self._missing is None:
            self._lease.close()
            self._answer_until_heard([Running()])
            return machine
        with self._missing as pages:
            try:
                self._fetch(machine, pages)
            except BaseException as exc:
                self._end_machine()
                self._answer_until_heard([Ended(_reason(exc))])
                raise
            self._answer_until_heard([Running(), Complete([round(s * 1000, 3) for s in pages.blocked])])
        return machine

    def _refuse(self, exc: BaseException) -> None:
        """End the machine, and only then say so; nothing, if that is not certain, and the source may have handed
        the machine over already."""
        gone = self._end_machine()
        if self._missing is not None:
            self._missing.close()
        if self._prepared and gone:
            self._answer_until_heard([Refused(_reason(exc))])
        elif self._peers.source and not self._prepared:
            with contextlib.suppress(Gone):
                self._peers.say(Refused(_reason(exc)))

    def _end_machine(self) -> bool:
        """True when nothing of it is left for certain."""
        self._close_memory()
        machine, self._machine = self._machine, None
        if machine is None:
            return True
        with contextlib.suppress(VmmError):
            machine.stop()
        return machine.close()

    def _close_memory(self) -> None:
        for memory in self._memory.values():
            memory.close()
        self._memory.clear()

    def _look(self) -> None:
        """Raises ReceiveError when the machine here has been ended meanwhile."""
        if self._machine is not None and not is_running(self._machine.name):
            raise ReceiveError(f"machine '{self._machine.name}' was stopped while it was arriving")

    # --- the offer ----------------------------------------------------------------------------------------------

    def _await_offer(self) -> None:
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        while True:
            heard = self._peers.hear(LOOK_EVERY if deadline is None else max(0.0, min(LOOK_EVERY, deadline
                                                                                  - time.monotonic())))
            if heard is not None and isinstance(offer := heard[0], Offer):
                try:
                    return self._take_offer(offer)
                except _NotWanted as exc:
                    self._peers.tell_stranger(self._peers.source, Refused(str(exc)))
                    self._refused(str(exc))
                self._peers.source = b""
            elif deadline is not None and time.monotonic() > deadline:
                raise ReceiveError(f"no source came within {self._timeout:.0f} s", ExitCode.TIMEOUT)

    def _take_offer(self, offer: Offer) -> None:
        """Raises _NotWanted."""
        with tempfile.NamedTemporaryFile(prefix="shardvmm-image-") as image:
            image.write(offer.image)
            image.flush()
            try:
                spec = taken(offer, name=self._name or offer.spec.name, accel=self._accel, image=image.name,
                             linger=not self._detach, trees=self._trees)
                if offer.postcopy:
                    Userfault.make().close()
            except WireError as exc:
                raise _NotWanted(str(exc)) from None
            except UserfaultError as exc:
                raise _NotWanted(f"post-copy is not possible here: {exc}") from None
            self._peers.token = offer.token
            self._peers.say(Received())
            self._machine = Machine.launch(spec, detach=self._detach, start=False)
        # Only we may start it, or write to it; should we go before, it does.
        self._lease = self._machine.lease("incoming", "via vmm receive")
        self._offered = offer.spec
        for slot in offer.spec.slots:
            self._memory[slot.id] = SlotMemory(self._machine, slot.id)
            self._pages[slot.id] = slot.pages
        self._peers.heard_at = time.monotonic()
        self._peers.say(Accept())

    # --- memory and state -----------------------------------------------------------------------------------------

    def _until_commit(self) -> None:
        """Rounds of pages and the state, both as often as the source says; until it commits."""
        while True:
            try:
                heard = self._peers.hear(LOOK_EVERY)
            except Gone:
                if not self._prepared:
                    raise
                heard = None    # the source decides now, and may come back
            if heard is None:
                self._be_patient()
                continue
            message, data = heard
            match message:
                case Pages():
                    self._write(message, data)
                case Ping():
                    pass
                case RoundEnd():
                    self._expected[message.round] = message.messages
                    self._acknowledge(message.round)
                case wire.Missing():
                    self._note_missing(message)
                case State():
                    self._set_state(message)
                case Commit() if self._prepared:
                    return
                case Abort():
                    raise ReceiveError(f"the source gave up: {message.reason}")
                case _:
                    raise WireError(f"the source sent {type(message).__name__} out of turn")

    def _be_patient(self) -> None:
        """Raises ReceiveError."""
        silence = time.monotonic() - self._peers.heard_at
        if silence > (_UNDECIDED if self._prepared else _SILENCE):
            raise ReceiveError(f"the source has sent nothing for {silence:.0f} s")

    def _total(self, slot: int) -> int:
        if slot not in self._pages:
            raise WireError(f"the source sent pages of slot {slot}, which the machine does not have")
        return self._pages[slot]

    def _write(self, message: Pages, data: Buffer) -> None:
        numbers, content, intact = unpack(message, data, self._total(message.slot))
        if not intact:
            self._torn.setdefault(message.round, []).append(torn(message, content))
        if intact or content is not None:
            self._memory[message.slot].write(numbers, content)
        self._peers.taken += 1
        self._arrived[message.round] = self._arrived.get(message.round, 0) + 1
        self._acknowledge(message.round)

    def _acknowledge(self, number: int) -> None:
        if self._expected.get(number) == self._arrived.get(number, 0):
            del self._expected[number]
            self._arrived.pop(number, None)
            self._peers.say(RoundAck(number, self._torn.pop(number, [])))

    def _note_missing(self, message: wire.Missing) -> None:
        bits = missing_pages(message, self._total(message.slot))
        self._absent[message.slot] = self._absent.get(message.slot, False) | bits

    def _set_state(self, message: State) -> None:
        machine = self._machine
        assert machine is not None
        assert self._offered is not None
        check_settings(message.spec, self._offered)
        try:
            check_states(message.vcpus, self._offered.vcpus, program=self._offered.program is not None)
        except StateError as exc:
            raise WireError(f"the source sent {exc}") from None
        if message.spec.keeps_system:
            self._set_system(machine.system(), message.system)
        self._apply_settings(machine, message.spec)
        if self._absent and self._missing is None:
            self._missing = MissingPages(machine, self._absent)
        elif self._missing is not None:
            self._missing.add(self._absent)
        self._absent = {}
        machine.set_state(message.vcpus)
        self._paused = message.paused
        self._prepared = True
        self._peers.say(Prepared())

    @staticmethod
    def _set_system(system: NDArray[np.uint8], sent: bytes) -> None:
        try:
            size = zstandard.frame_content_size(sent)
            data = zstandard.ZstdDecompressor().decompress(sent) if size == len(system) else b""
        except zstandard.ZstdError as exc:
            raise WireError(f"the source sent a system slot that cannot be decompressed: {exc}") from None
        if len(data) != len(system):
            raise WireError(f"the source sent a system slot of {size} bytes, expected {len(system)}")
        system[:] = np.frombuffer(data, np.uint8)

    def _apply_settings(self, machine: Machine, spec: MachineSpec) -> None:
        """What a user has set at run time travels with the machine."""
        assert self._offered is not None
        before, self._offered = self._offered, spec
        quotas = {i: new for i, (old, new) in enumerate(zip(before.quotas, spec.quotas, strict=True)) if new != old}
        for vcpu in (i for i, quota in quotas.items() if not quota):
            machine.dirty_limit(0, vcpu)        # first: a limit needs rings, which may be about to go
        if spec.asked_tracking != before.asked_tracking:
            machine.set_tracking(spec.asked_tracking)
        for vcpu in (i for i, quota in quotas.items() if quota):
            machine.dirty_limit(quotas[vcpu], vcpu)
        logged = {s.id: s.log for s in before.slots}
        for slot in spec.slots:
            if slot.log != logged[slot.id]:
                (machine.log_start if slot.log else machine.log_stop)(slot.id)

    def _start(self) -> Machine:
        """Commit has come: the machine is ours. Raises VmmError."""
        machine = self._machine
        assert machine is not None
        self._close_memory()
        step("receive-commit")
        if self._paused:
            machine.pause()
        machine.start()
        step("receive-started")
        with contextlib.suppress(Gone):        # it will ask again
            self._tell_how_it_is()
        return machine

    def _tell_how_it_is(self) -> None:
        """That it runs, and in post-copy what is still missing. Raises Gone."""
        pages = self._missing.bitmaps() if self._missing is not None else {}
        self._peers.say(*[missing(slot, bits) for slot, bits in pages.items()], Running())

    def _answer_until_heard(self, verdict: list[Answer]) -> None:
        """How it ended, to the source; and again to any that asks with the token, until the source says that it has
        heard, or for a while."""
        self._machine = None        # no longer to be looked after
        with contextlib.suppress(Gone):
            self._peers.say(*verdict)
        until = time.monotonic() + _HEARD
        while (left := until - time.monotonic()) > 0:
            try:
                match self._peers.hear(min(left, LOOK_EVERY)):
                    case (Done() | Abort(), _):
                        return
                    case (Commit(), _):
                        self._peers.say(*verdict)
            except (Gone, WireError):
                time.sleep(LOOK_EVERY / 10)
            except KeyboardInterrupt:
                if not self._detach:
                    raise
                return

    # --- post-copy ------------------------------------------------------------------------------------------

    def _fetch(self, machine: Machine, pages: MissingPages) -> None:
        """The guest runs. Until every page is here, however long the source is away in between."""
        for fd in pages.faults:
            self._peers.poller.register(fd, zmq.POLLIN)
        came = looked = time.monotonic()
        while pages.left:
            with contextlib.suppress(Gone):
                heard = None
                # A peer that sends nonsense is ignored: the machine is here alone by now.
                with contextlib.suppress(WireError):
                    heard = self._peers.hear(LOOK_EVERY)
                match heard:
                    case (Pages() as message, data):
                        if self._put(pages, message, data):
                            came = time.monotonic()
                    case (Commit(), _):         # Running was lost, or another process takes over
                        self._tell_how_it_is()
                        self._want(pages.ask_again())
                self._want([each for fd in pages.faults for each in pages.wanted(fd)])
                if time.monotonic() - came > _ASK_AGAIN:
                    came = time.monotonic()
                    self._want(pages.some(CHUNK_PAGES))
            if not pages.left or time.monotonic() - looked > LOOK_EVERY:
                looked = time.monotonic()
                if machine.status()["state"] == "ended":
                    raise ReceiveError("the machine was stopped before all of its memory had arrived")
        for fd in pages.faults:
            self._peers.poller.unregister(fd)
        pages.finish()
        self._lease.close()

    def _put(self, pages: MissingPages, message: Pages, data: Buffer) -> bool:
        """False for pages that are damaged, or not this machine's."""
        try:
            numbers, content, intact = unpack(message, data, self._total(message.slot))
        except WireError:
            return False
        if intact and message.slot in pages.slots:
            pages.put(message.slot, numbers, content)
        return intact

    def _want(self, wanted: list[Wanted]) -> None:
        """Raises Gone; they are asked for again when the source is back."""
        for slot in {w.slot for w in wanted}:
            numbers = sorted(w.page for w in wanted if w.slot == slot)
            for at in range(0, len(numbers), CHUNK_PAGES):
                self._peers.say(want(slot, numbers[at:at + CHUNK_PAGES]))


def _reason(exc: BaseException) -> str:
    if isinstance(exc, KeyboardInterrupt):
        return "interrupted at the target"
    return str(exc) or type(exc).__name__
