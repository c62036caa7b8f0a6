"""Live migration, the target: wait for a machine, take its memory and state, run it when told to.

Memory is sparse at first, and filled while the machine's processes begin; what the first round has not filled is
reserved then, so that a full /dev/shm is a reason to refuse, and nothing that a guest meets.

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
from typing import NamedTuple

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from ipc.shm import is_named
from ipc.steps import step
from workers.accel.base import AccelError
from workers.state import StateError, check_states

from ...client.accelerators import choose_accelerator
from ...client.holds import Lease
from ...client.keeper import KeeperProcess
from ...client.machine import Machine
from ...errors import ExitCode, VmmError, one_line
from ...machine.names import check_machine_name, slot_segment
from ...machine.rules import NO_TREES, Trees, arriving
from ...machine.runtime import is_running
from ...machine.spec import MachineSpec
from ...optional import cryptography
from ..missing import MissingPages
from . import wire
from .addresses import Address, parse_address
from .arrival import Arrival
from .arrivals import Arrivals
from .fitness import in_the_way, notes
from .gathered import Arriving
from .keys import Keys, load_keys
from .memory import SlotMemory
from .offers import ANY, Limits, check_settings, encodings, no_postcopy, taken
from .pages import missing, missing_pages, torn, unpack
from .peers import LOOK_EVERY, Gone, Peers, ReceiveError
from .place import Place, listening
from .postcopy_target import fetch
from .proof import is_proven
from .report import latency
from .tls import Certificate
from .wire import (
    Abort,
    Accept,
    Answer,
    Buffer,
    Check,
    Checked,
    Commit,
    Complete,
    Done,
    Ended,
    Gathered,
    Offer,
    Pages,
    Ping,
    Prepared,
    Ready,
    Received,
    Refused,
    RoundAck,
    RoundEnd,
    Running,
    State,
    Torn,
    WhenReady,
    WireError,
)

__all__ = ["Continued", "ReceiveError", "receive", "receive_all", "receive_here"]

_SILENCE = 30.0             # seconds without a word after which the source is given up, before Prepared
_UNDECIDED = 300.0          # seconds that Commit is awaited after Prepared, when the connection has broken
_HEARD = 30.0               # seconds after the end of it all that a source may ask once more how it went
_KNOWN = 64                 # migrations whose end is still told after others have come
_ASK_AGAIN = 2.0            # seconds without pages after which missing ones are asked for


class Continued(NamedTuple):
    """What the machine that arrives has of the one that it continues (upgrade.py). ``make``: what it is to be;
    ``given_up``: no offer will come."""

    make: Callable[[MachineSpec], MachineSpec]
    given_up: Callable[[], bool]


class _NotWanted(VmmError):
    """An offer that is refused; another may come."""


def receive(address: str, *, name: str | None = None, accel: str = "auto", detach: bool = False, key: str = "",
            peer: str = "", insecure: bool = False, timeout: float | None = None, trees: Trees = NO_TREES,
            limits: Limits = ANY, waiting: Callable[[str], None] = lambda address: None,
            refused: Callable[[str], None] = lambda why: None) -> Machine:
    """Wait for one machine and return it, running. ``timeout`` (seconds) bounds the wait for a source; ``trees``:
    files that its program has, if it is one's; ``limits``: the largest that is taken; ``waiting`` is told the address
    when a source may connect, ``refused`` why an offer was refused (another is awaited then). Raises VmmError."""
    if name is not None:
        check_machine_name(name)
    accel = choose_accelerator(accel)
    where, keys = _address(address, key, peer, insecure)
    # What takes long is done while nobody waits: whoever comes, there will be a machine.
    keeper = KeeperProcess("", quiet=detach, fork=True)
    try:
        with listening(where, keys, waiting) as place:
            return _Target(place, keeper, name, accel, detach, timeout, refused, trees, limits, {}).run()
    finally:
        keeper.give_up()


def receive_here(address: str, keeper: KeeperProcess, name: str, accel: str, trees: Trees, continued: Continued, *,
                 waiting: Callable[[str], None]) -> Machine:
    """The machine that continues one of this host, running by itself. Raises VmmError."""
    where = parse_address(address, listen=True)
    with listening(where, None, waiting) as place:
        return _Target(place, keeper, name, accel, True, None, lambda why: None, trees, ANY, {}, continued).run()


def receive_all(address: str, *, arrived: Callable[[Machine], None], failed: Callable[[str], None],
                accel: str = "auto", key: str = "", peer: str = "", insecure: bool = False,
                timeout: float | None = None, trees: Trees = NO_TREES, limits: Limits = ANY,
                waiting: Callable[[str], None] = lambda address: None,
                refused: Callable[[str], None] = lambda why: None) -> None:
    """As ``receive``, one machine after the other, under the names that they have; each lives on without this process
    from when it runs. ``arrived`` is told of each; ``failed`` why one did not arrive, of which nothing is left here.
    Raises VmmError when no source has come for ``timeout`` seconds, or there can be none."""
    accel = choose_accelerator(accel)
    where, keys = _address(address, key, peer, insecure)
    known: dict[str, list[Answer]] = {}
    keeper = KeeperProcess("", quiet=True, fork=True)
    try:
        with listening(where, keys, waiting) as place:
            while True:
                try:
                    arrived(_Target(place, keeper, None, accel, True, timeout, refused, trees, limits, known).run())
                except VmmError as exc:
                    if exc.exit_code is ExitCode.TIMEOUT:
                        raise
                    failed(str(exc))
                while len(known) > _KNOWN:
                    del known[next(iter(known))]
                if not keeper.waits:
                    keeper = KeeperProcess("", quiet=True)
    finally:
        keeper.give_up()


def _address(address: str, key: str, peer: str, insecure: bool) -> tuple[Address, Keys | None]:
    """Raises VmmError."""
    where = parse_address(address, listen=True)
    keys = load_keys(key, peer, where, insecure=insecure)
    if keys is not None:
        cryptography("x509")        # it is installed, or that is said now
    return where, keys


class _Target:
    """One migration."""

    def __init__(self, place: Place, keeper: KeeperProcess, name: str | None, accel: str, detach: bool,
                 timeout: float | None, refused: Callable[[str], None], trees: Trees, limits: Limits,
                 known: dict[str, list[Answer]], upgrade: Continued | None = None) -> None:
        self._place = place
        self._keeper = keeper
        self._certificate = Certificate() if place.encrypted else None
        self._arrivals = Arrivals(self._write, None if self._certificate is None else self._certificate.context)
        self._peers = Peers(place.sock, self._arrivals, refused, self._look, known)
        self._known = known
        self._upgrade = upgrade
        self._limits = limits
        self._name = name
        self._accel = accel
        self._detach = detach
        self._timeout = timeout
        self._refused = refused
        self._trees = trees
        self._arrival = Arrival(place.endpoint, upgrade=upgrade is not None)
        self._machine: Machine | None = None
        self._begun = contextlib.ExitStack()    # what is needed until the machine is ready
        self._ready = self._reserved = False
        self._in_place: list[str] = []          # segments of the source's that are the machine's memory
        self._offered: MachineSpec | None = None
        self._memory: dict[int, SlotMemory] = {}
        self._pages: dict[int, int] = {}
        self._ends: dict[int, RoundEnd] = {}    # of rounds whose pages are not all here
        self._prepared = False
        self._paused = False
        self._lease: Lease
        self._absent: dict[int, NDArray[np.bool_]] = {}     # post-copy: what comes after the start
        self._missing: MissingPages | None = None
        self._gathered: Arriving

    # --- the way of a migration -----------------------------------------------------------------------------

    def run(self) -> Machine:
        with self._arrivals:
            self._place.arrivals = self._arrivals
            try:
                return self._run()
            finally:
                self._place.arrivals = None

    def _run(self) -> Machine:
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
                fetch(machine, pages, self._peers, self._arrivals, self._total, self._tell_how_it_is,
                      self._arrival.lack)
                self._lease.close()
            except BaseException as exc:
                self._end_machine()
                self._arrival.tell("failed", _reason(exc))
                self._answer_until_heard([Ended(_reason(exc))])
                raise
            blocked = [round(s * 1000, 3) for s in pages.blocked]
            waits = latency(pages.waits)
            self._arrival.complete(blocked, waits)
            self._answer_until_heard([Running(), Complete(blocked, waits)])
        return machine

    def _refuse(self, exc: BaseException) -> None:
        """End the machine, and only then say so; nothing, if that is not certain, and the source may have handed
        the machine over already."""
        gone = self._end_machine()
        self._arrival.tell("cancelled" if isinstance(exc, KeyboardInterrupt) else "failed", _reason(exc))
        if self._missing is not None:
            self._missing.close()
        if self._prepared and not all(is_named(segment) for segment in self._in_place):    # the source's no longer
            self._answer_until_heard([Ended(_reason(exc))])
        elif self._prepared and gone:
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
        if self._ready:
            with contextlib.suppress(VmmError):
                machine.stop()
        gone = machine.close()
        self._begun.close()
        return gone

    def _close_memory(self) -> None:
        for memory in self._memory.values():
            memory.close()
        self._memory.clear()

    def _look(self) -> None:
        """Raises ReceiveError when the machine here has been ended meanwhile, VmmError when it has never begun."""
        if self._machine is not None and not is_running(self._machine.name):
            if not self._ready:
                self._machine.is_ready(wait=True)
            raise ReceiveError(f"machine '{self._machine.name}' was stopped while it was arriving")

    # --- the offer ----------------------------------------------------------------------------------------------

    def _await_offer(self) -> None:
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        while True:
            heard = self._peers.hear(LOOK_EVERY if deadline is None else max(0.0, min(LOOK_EVERY, deadline
                                                                                  - time.monotonic())))
            if isinstance(heard, Check):
                self._peers.tell_stranger(self._peers.asker, self._look_at(heard))
            elif isinstance(heard, Offer):
                try:
                    return self._take_offer(heard)
                except _NotWanted as exc:
                    self._begun.close()
                    self._peers.tell_stranger(self._peers.source, Refused(str(exc)))
                    self._refused(str(exc))
                self._peers.source = b""
            elif self._upgrade is not None and self._upgrade.given_up():
                raise ReceiveError("no offer was made")
            elif deadline is not None and time.monotonic() > deadline:
                raise ReceiveError(f"no source came within {self._timeout:.0f} s", ExitCode.TIMEOUT)

    def _take_offer(self, offer: Offer) -> None:
        """Raises _NotWanted."""
        image = self._begun.enter_context(tempfile.NamedTemporaryFile(prefix="shardvmm-image-"))   # noqa: SIM115
        image.write(offer.image)
        image.flush()
        try:
            spec = taken(offer, name=self._name or offer.spec.name, accel=self._accel, image=image.name,
                         linger=not self._detach, trees=self._trees)
            if offer.segments and not self._place.local:
                raise WireError("the source offered its memory in place, which takes a Unix socket")
            if offer.segments and not is_proven(offer.proof, offer.token):
                raise WireError("the source offered its memory in place, but has another /dev/shm than the target")
        except WireError as exc:
            raise _NotWanted(str(exc)) from None
        if self._upgrade is not None:
            spec = self._upgrade.make(spec)
        wanted = msgspec.structs.replace(offer.needs, postcopy=offer.needs.postcopy or offer.postcopy)
        if found := in_the_way(spec, wanted, self._limits):
            raise _NotWanted(f"machine '{one_line(offer.spec.name)}' cannot be taken: {'; '.join(found)}")
        self._peers.token = offer.token
        self._arrivals.expect(offer.token)
        self._peers.say(Received())
        self._machine = Machine.launch(spec, detach=self._detach, start=False, keeper=self._keeper)
        self._offered = offer.spec
        self._gathered = Arriving({slot.id: slot.pages for slot in offer.spec.slots},
                                  everyone=self._upgrade is not None)
        self._arrival.begin(offer, spec.name)
        if offer.segments:
            self._in_place, self._reserved = list(offer.segments.values()), True
            self._await_machine(wait=True)      # there is nothing else to do meanwhile
        else:
            for slot in offer.spec.slots:
                self._memory[slot.id] = SlotMemory(slot_segment(spec.name, "ram", slot), slot.size)
                self._pages[slot.id] = slot.pages
        self._peers.heard_at = time.monotonic()
        self._arrival.taking()
        self._peers.say(Accept(no_postcopy(), encodings(),
                               b"" if self._certificate is None else self._certificate.der))

    def _await_machine(self, *, wait: bool) -> None:
        """Its processes begin while its memory comes. Raises VmmError for a machine that cannot be."""
        if self._ready or self._machine is None or not self._machine.is_ready(wait=wait):
            return
        self._begun.close()
        self._ready = True
        try:
            # Only we may start it, or write to it; should we go before, it does.
            self._lease = self._machine.lease("incoming", self._arrival.origin)
            self._gathered.begin(self._machine)
        except VmmError:
            self._look()
            raise

    def _look_at(self, check: Check) -> Checked:
        name = self._name or check.spec.name
        try:
            spec = arriving(check.spec, name=name, accel=self._accel, image="/image", linger=not self._detach,
                            trees=self._trees)
        except (VmmError, AccelError) as exc:
            return Checked([f"it is not a valid machine at the target: {exc}"], [], one_line(name), self._accel)
        return Checked(in_the_way(spec, check.needs, self._limits), notes(spec, check.needs), spec.name, spec.accel)

    # --- memory and state -----------------------------------------------------------------------------------------

    def _until_commit(self) -> None:
        """Rounds of pages and the state, both as often as the source says; until it commits."""
        while True:
            try:
                message = self._peers.hear(LOOK_EVERY)
            except Gone:
                if not self._prepared:
                    raise
                message = None      # the source decides now, and may come back
            self._await_machine(wait=False)
            self._arrivals.check()
            self._acknowledge()
            match message:
                case None:
                    self._be_patient()
                case Ping():
                    pass
                case RoundEnd():
                    self._ends[message.round] = message
                    self._arrivals.round_end(message.round, message.messages)
                    self._acknowledge()
                case WhenReady():
                    self._await_machine(wait=True)
                    self._peers.say(Ready())
                case wire.Missing():
                    self._note_missing(message)
                case Gathered():
                    self._gathered.note(message)
                    if self._ready and self._machine is not None:
                        self._gathered.begin(self._machine)
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

    def _write(self, message: Pages, data: Buffer) -> Torn | None:
        """In any thread. What was torn of it. Raises WireError, OSError."""
        numbers, content, intact = unpack(message, data, self._total(message.slot))
        if intact or content is not None:
            try:
                self._memory[message.slot].write(numbers, content)
            except OSError as exc:
                raise ReceiveError(f"pages of slot {message.slot} cannot be written: {exc.strerror} (is /dev/shm "
                                   "full?)") from None
        return None if intact else torn(message, content)

    def _acknowledge(self) -> None:
        """The rounds whose pages are all here."""
        for number, found in self._arrivals.rounds():
            self._reserve()
            self._peers.say(RoundAck(number, found))
            self._arrival.round(self._ends.pop(number))

    def _reserve(self) -> None:
        """What the first round has not filled: later on the guest stands still. The source sees progress. Raises
        ReceiveError."""
        if self._reserved:
            return
        for slot, memory in self._memory.items():
            try:
                for _ in memory.reserve():
                    self._arrivals.taken += 1
                    self._peers.alive()
            except OSError as exc:
                raise ReceiveError(f"slot {slot}: its memory cannot be had: {exc.strerror} (is /dev/shm full?)"
                                   ) from None
        self._reserved = True

    def _note_missing(self, message: wire.Missing) -> None:
        bits = missing_pages(message, self._total(message.slot))
        self._absent[message.slot] = self._absent.get(message.slot, False) | bits

    def _set_state(self, message: State) -> None:
        self._await_machine(wait=True)
        self._reserve()
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
        self._gathered.go_on(machine)
        self._paused = message.paused
        self._prepared = True
        self._peers.say(Prepared())
        self._arrival.tell("device")

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
        if self._detach:
            machine.let_go()        # from here on it runs by itself if it is started, and goes if it is not
        machine.start()
        step("receive-started")
        self._arrival.tell("completed" if self._missing is None else "postcopy-active")
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
        self._known[self._peers.token] = verdict
        with contextlib.suppress(Gone):
            self._peers.say(*verdict)
        until = time.monotonic() + _HEARD
        while (left := until - time.monotonic()) > 0:
            try:
                match self._peers.hear(min(left, LOOK_EVERY)):
                    case Done() as done:
                        return self._arrival.heard(done)
                    case Abort():
                        return
                    case Commit():
                        self._peers.say(*verdict)
            except (Gone, WireError):
                time.sleep(LOOK_EVERY / 10)
            except KeyboardInterrupt:
                if not self._detach:
                    raise
                return


def _reason(exc: BaseException) -> str:
    if isinstance(exc, KeyboardInterrupt):
        return "interrupted at the target"
    return str(exc) or type(exc).__name__
