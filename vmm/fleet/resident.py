"""One machine of a fleet, on its host. As an actor of Ray's: its methods are called in any threads, several at a time,
and when its process ends, so does the machine.

What moves is the machine, not the actor: ``listen`` and ``arrive`` are called at one on the host to which it goes,
``migrate`` at the one that has it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, ParamSpec, TypeVar

import zmq

from ..client.machine import Machine
from ..consumers.migration.report import Options
from ..consumers.migration.source import migrate
from ..consumers.migration.target import receive
from ..consumers.rate import measure
from ..consumers.snapshot import list_snapshots, restore
from ..errors import ExitCode, VmmError
from ..lab.cluster.connection import not_nice
from ..machine.rules import Trees
from .config import Wanted
from .hosts import look
from .lease import Lease
from .snapshots import Keeping, has_snapshots

__all__ = ["Resident"]

_SOURCE_PATIENCE = 60.0     # seconds until a source has come
_LISTENING = 60.0           # seconds until one may
_STOP_TIMEOUT = 30.0

P = ParamSpec("P")
R = TypeVar("R")


def _plain(method: Callable[P, R]) -> Callable[P, R]:
    """Its errors can be pickled: not every subclass of VmmError is made of its text alone."""
    @functools.wraps(method)
    def plain(*args: P.args, **options: P.kwargs) -> R:
        try:
            return method(*args, **options)
        except VmmError as exc:
            raise VmmError(str(exc), exc.exit_code) from None

    return plain


class Resident:
    """``generation``: which of the actors that the machine has had; ``node``: the id of Ray's for its host; ``renew``:
    asks the fleet for its lease (name, generation, seconds it may take)."""

    def __init__(self, wanted: Wanted, generation: int, node: str, renew: Callable[[str, int, float], bool]) -> None:
        not_nice()
        self._wanted, self._generation, self._node = wanted, generation, node
        public, secret = zmq.curve_keypair()
        self._public, self._secret = public.decode(), secret.decode()
        self._busy = threading.Lock()       # the machine is migrated, or a snapshot taken
        self._here = threading.Event()
        self._gone = False                  # it is another's
        self._closing = threading.Lock()
        self._machine: Machine | None = None
        self._keeping: Keeping | None = None
        self._lease: Lease | None = None
        if wanted.snapshots is not None:
            self._lease = Lease(wanted.snapshots.lease, lambda timeout: renew(wanted.name, generation, timeout),
                                lambda: os._exit(1))        # its machine ends with this process
        self._arriving: futures.Future[Machine] | None = None
        self._report: dict[str, Any] | None = None

    # --- how it comes here ----------------------------------------------------------------------------------

    @_plain
    def launch(self) -> list[str]:
        """From its configuration; warnings. Raises VmmError."""
        chain = self._wanted.snapshots
        if chain is not None and has_snapshots(chain.directory):
            raise VmmError(f"{chain.directory}: has snapshots of an earlier machine: --restore goes on with them, or "
                           "remove them")
        self._wait_for_lease()
        return self._begin(Machine.launch(self._wanted.config))

    @_plain
    def restore(self) -> dict[str, Any]:
        """From its last snapshot: ``id``, ``created``. Raises VmmError, also where there is none."""
        chain = self._wanted.snapshots
        if chain is None or not has_snapshots(chain.directory):
            raise VmmError(f"machine '{self._wanted.name}' has no snapshot")
        self._wait_for_lease()
        newest = list_snapshots(chain.directory)[-1:]
        self._begin(restore(chain.directory, machine_name=self._wanted.name, accel=self._accel(),
                            trees=self._trees()))
        return {"id": newest[0].id, "created": newest[0].created} if newest else {"id": None, "created": None}

    def public_key(self) -> str:
        """For the other end of a migration."""
        return self._public

    @_plain
    def listen(self, host: str, peer: str) -> tuple[str, str]:
        """Wait for the machine at this address of the host, from who has the secret of ``peer``: where (tcp://…), and
        this end's public key. Raises VmmError."""
        self._wait_for_lease()
        address = f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*"
        told: futures.Future[str] = futures.Future()

        def wait() -> Machine:
            with self._keys(peer) as keys:
                return receive(address, name=self._wanted.name, accel=self._accel(), timeout=_SOURCE_PATIENCE,
                               trees=self._trees(), waiting=told.set_result, **keys)

        def over(arriving: futures.Future[Machine]) -> None:
            if not told.done():
                told.set_exception(arriving.exception() or VmmError("it did not listen"))

        pool = futures.ThreadPoolExecutor(1, "arrival")
        self._arriving = pool.submit(wait)
        self._arriving.add_done_callback(over)
        pool.shutdown(wait=False)
        try:
            return told.result(_LISTENING), self._public
        except TimeoutError:
            raise VmmError(f"nothing listens at {address} after {_LISTENING:.0f} s", ExitCode.TIMEOUT) from None

    @_plain
    def arrive(self) -> None:
        """Until the machine runs here. Raises VmmError when it does not, and will not."""
        assert self._arriving is not None
        machine = self._arriving.result()
        with self._closing:     # it may be asked twice
            if not self._here.is_set():
                self._begin(machine)

    def _wait_for_lease(self) -> None:
        if self._lease is not None and not self._lease.wait():
            raise VmmError("the fleet cannot be reached from its host", ExitCode.TIMEOUT)

    def _begin(self, machine: Machine) -> list[str]:
        self._machine = machine
        if self._wanted.snapshots is not None:
            self._keeping = Keeping(machine.name, self._wanted.snapshots, self._busy)
        self._here.set()
        return machine.warnings

    # --- while it is here -----------------------------------------------------------------------------------

    def describe(self) -> tuple[Wanted, int, str, bool]:
        """The machine, the generation, the node, and whether the machine is here. Not before a migration has ended."""
        with self._busy:
            return self._wanted, self._generation, self._node, self._here.is_set() and not self._gone

    def status(self, seconds: float = 0.0) -> dict[str, Any]:
        """``report`` as ``Machine.status`` has it, ``pages_per_s`` that it dirties, measured for so many ``seconds``
        (None: not asked for, or not known), ``snapshot`` (see Keeping.last), ``look`` (at its host)."""
        report, rate = self._report, None
        if report is None:
            with contextlib.suppress(VmmError), Machine.attach(self._wanted.name) as machine:
                report = machine.status()
                if seconds:
                    rate = measure(machine, seconds, "bitmap").pages_per_s
        return {"host": os.uname().nodename, "report": report, "pages_per_s": rate,
                "snapshot": None if self._keeping is None else self._keeping.last, "look": look()}

    @_plain
    def ended(self) -> dict[str, Any]:
        """Until the machine has ended here; its last report. Raises VmmError."""
        self._here.wait()
        if self._report is None:
            with Machine.attach(self._wanted.name) as machine:
                self._report = machine.wait()
            self._close()
        return self._report

    @_plain
    def migrate(self, address: str, peer: str) -> dict[str, Any]:
        """To where another listens; the migration's report. Raises VmmError, with the machine still here, unless the
        text says otherwise."""
        with self._busy, self._keys(peer) as keys:
            with Machine.attach(self._wanted.name) as machine:
                report = migrate(machine, address, Options(**keys))
            self._gone = True
            if self._keeping is not None:
                self._keeping.give_up()
        return report.as_dict()

    @_plain
    def handed_over(self) -> bool:
        """The machine is here, and was handed over to the target of a migration. Raises VmmError."""
        with Machine.attach(self._wanted.name) as machine:
            return bool(machine.status()["handed_over"])

    @_plain
    def reclaim(self) -> None:
        """The machine was handed over to a target that has gone for good: it goes on here, as it was then. Raises
        VmmError."""
        with Machine.attach(self._wanted.name) as machine:
            machine.resume(force=True)

    # --- the end --------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the machine, if it is here; nothing of it is left then."""
        if self._keeping is not None:
            self._keeping.end()
        with contextlib.suppress(VmmError, TimeoutError), Machine.attach(self._wanted.name) as machine:
            machine.stop()
            self._report = machine.wait(_STOP_TIMEOUT)
        self._close()

    def close(self) -> None:
        """It has gone elsewhere: nothing of it is left here then."""
        self._close()

    def _close(self) -> None:
        with self._closing:
            machine, self._machine = self._machine, None
            if machine is not None:
                machine.close()
            if self._lease is not None:
                self._lease.give_up()

    # --- what it is made of ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _keys(self, peer: str) -> Iterator[dict[str, Any]]:
        """As ``receive`` and ``migrate`` take them: files, which are in memory only."""
        if self._wanted.insecure:
            yield {"insecure": True}
            return
        own = f'metadata\ncurve\n    public-key = "{self._public}"\n    secret-key = "{self._secret}"\n'
        with _in_memory(own) as key, _in_memory(f'metadata\ncurve\n    public-key = "{peer}"\n') as other:
            yield {"key": key, "peer": other}

    def _accel(self) -> str:
        """On which it may go on elsewhere."""
        return "auto" if self._wanted.config.replay is not None else self._wanted.config.accel

    def _trees(self) -> Trees:
        guest = self._wanted.config.guest
        if guest is None or guest.program is None:
            return Trees()
        return Trees(str(guest.root) if guest.root else "", {at: str(path) for at, path in guest.files.items()})


@contextlib.contextmanager
def _in_memory(text: str) -> Iterator[str]:
    """Path of a file with this text, for this process."""
    fd = os.memfd_create("key")
    try:
        os.write(fd, text.encode())
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
