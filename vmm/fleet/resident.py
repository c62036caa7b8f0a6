"""One machine of a fleet, on its host. As an actor of Ray's: its methods are called in any threads, several at a time,
and when its process ends, so does the machine.

What moves is the machine, not the actor: ``listen`` and ``arrive`` are called at one on the host to which it goes,
``ready`` and ``migrate`` at the one that has it. Should the fleet be lost meanwhile, both carry on, and its successor
asks ``migrated`` and ``arrive``.

A machine of this name may be a user's own. So nothing is done to one unless this actor has launched, restored or
received it.
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

from ipc.linux.process import not_nice

from ..client.machine import Machine
from ..consumers.migration.report import Options
from ..consumers.migration.source import migrate
from ..consumers.migration.target import receive
from ..consumers.rate import measure
from ..consumers.snapshot import list_snapshots, restore
from ..errors import ExitCode, VmmError, one_line
from ..machine.rules import Trees
from ..machine.runtime import end_at_once, tie
from .config import Wanted
from .hosts import look
from .lease import Lease
from .snapshots import Keeping, NoSnapshot, has_snapshots

__all__ = ["Resident"]

_SOURCE_PATIENCE = 60.0     # seconds until a source has come
_LISTENING = 60.0           # seconds until one may
_STOP_TIMEOUT = 30.0

P = ParamSpec("P")
R = TypeVar("R")


def _plain(method: Callable[P, R]) -> Callable[P, R]:
    """Its errors are the fleet's, and can be pickled: not every subclass of VmmError is made of its text alone."""
    @functools.wraps(method)
    def plain(*args: P.args, **options: P.kwargs) -> R:
        try:
            return method(*args, **options)
        except NoSnapshot:
            raise
        except VmmError as exc:
            raise VmmError(str(exc), exc.exit_code) from None
        except Exception as exc:
            raise VmmError(f"{type(exc).__name__}: {one_line(str(exc))}", ExitCode.BUG) from None

    return plain


class Resident:
    """``generation``: which of the cluster's actors it is; ``renew``: asks the fleet for its lease (name, generation,
    seconds it may take)."""

    def __init__(self, wanted: Wanted, generation: int, renew: Callable[[str, int, float], bool]) -> None:
        not_nice()
        self._wanted = wanted
        public, secret = zmq.curve_keypair()
        self._public, self._secret = public.decode(), secret.decode()
        self._busy = threading.Lock()       # the machine is migrated, or a snapshot taken
        self._here = threading.Event()
        self._gone = False                  # it has moved or ended: of this name there may be another
        self._closing = threading.Lock()
        self._machine: Machine | None = None
        self._keeping: Keeping | None = None
        self._lease: Lease | None = None
        if wanted.snapshots is not None:
            self._lease = Lease(wanted.snapshots.lease, lambda timeout: renew(wanted.name, generation, timeout),
                                self._end_at_once)
        self._arriving: futures.Future[Machine] | None = None
        self._leaving: futures.Future[dict[str, Any]] | None = None
        self._report: dict[str, Any] | None = None

    # --- how it comes here ----------------------------------------------------------------------------------

    @_plain
    def launch(self) -> dict[str, Any]:
        """From its configuration: ``warnings``, ``accelerator``. Raises VmmError."""
        chain = self._wanted.snapshots
        if chain is not None and has_snapshots(chain.directory):
            raise VmmError(f"{chain.directory}: has snapshots of an earlier machine: --restore goes on with them, or "
                           "remove them")
        self._wait_for_lease()
        return self._begin(Machine.launch(self._wanted.config))

    @_plain
    def restore(self) -> dict[str, Any]:
        """From its last snapshot: ``id``, ``created``, ``warnings``, ``accelerator``. Raises NoSnapshot, VmmError."""
        chain = self._wanted.snapshots
        if chain is not None and not chain.directory.parent.is_dir():       # another host may have it
            raise VmmError(f"{chain.directory.parent}: is not there")
        if chain is None or not has_snapshots(chain.directory):
            raise NoSnapshot(f"machine '{self._wanted.name}' has no snapshot")
        self._wait_for_lease()
        newest = list_snapshots(chain.directory)[-1:]
        began = self._begin(restore(chain.directory, machine_name=self._wanted.name, accel=self._accel(),
                                    trees=self._trees()))
        return {"id": newest[0].id if newest else None, "created": newest[0].created if newest else None, **began}

    @_plain
    def listen(self, host: str, peer: str) -> tuple[str, str]:
        """Wait for the machine at this address of the host, from who has the secret of ``peer``: where (tcp://…), and
        this end's public key. From then on it arrives without another word. Raises VmmError."""
        self._wait_for_lease()
        address = f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*"
        told: futures.Future[str] = futures.Future()

        def wait() -> Machine:
            with self._keys(peer) as keys:
                machine = receive(address, name=self._wanted.name, accel=self._accel(), timeout=_SOURCE_PATIENCE,
                                  trees=self._trees(), waiting=told.set_result, **keys)
            self._begin(machine)
            return machine

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
    def arrive(self) -> str:
        """Until the machine runs here; its accelerator. Raises VmmError when it does not, and will not."""
        if self._arriving is None:
            raise self._not_here()
        return _accelerator(self._arriving.result())

    def _wait_for_lease(self) -> None:
        if self._lease is not None and not self._lease.wait():
            raise VmmError("the fleet cannot be reached from its host", ExitCode.TIMEOUT)

    def _begin(self, machine: Machine) -> dict[str, Any]:
        self._machine = machine
        tie(machine.name)
        self._here.set()
        return {"warnings": machine.warnings, "accelerator": _accelerator(machine)}

    # --- while it is here -----------------------------------------------------------------------------------

    @_plain
    def keep(self) -> None:
        """Snapshots are taken from now on, if any are wanted. Idempotent. Raises VmmError where it is not here."""
        with self._closing:
            if not self._has_it:
                raise self._not_here()
            if self._wanted.snapshots is not None and self._keeping is None:
                self._keeping = Keeping(self._wanted.name, self._wanted.snapshots, self._busy)

    @property
    def _has_it(self) -> bool:
        return self._here.is_set() and not self._gone

    def _not_here(self) -> VmmError:
        return VmmError(f"machine '{self._wanted.name}' is not at its host", ExitCode.NO_MACHINE)

    def _attached(self) -> Machine:
        """To the machine that this actor has. Raises VmmError where it has none."""
        if not self._has_it:
            raise self._not_here()
        return Machine.attach(self._wanted.name)

    @_plain
    def status(self, seconds: float = 0.0) -> dict[str, Any]:
        """``report`` as ``Machine.status`` has it, ``pages_per_s`` that it dirties, measured for so many ``seconds``
        (None: not asked for, or not known), ``snapshot`` (see Keeping.last), ``look`` (at its host)."""
        report, rate = self._report, None
        if report is None:
            with contextlib.suppress(VmmError), self._attached() as machine:
                report = machine.status()
                if seconds:
                    rate = measure(machine, seconds, "bitmap").pages_per_s
        return {"host": os.uname().nodename, "report": report, "pages_per_s": rate,
                "snapshot": None if self._keeping is None else self._keeping.last, "look": look()}

    @_plain
    def ended(self, seconds: float) -> dict[str, Any] | None:
        """Until the machine has ended here: its last ``report``, and whether it was ``moved`` by the fleet. None: it
        has not in so many seconds. (Who has asked may be gone, and have a successor that asks again.) Raises
        VmmError."""
        if not self._here.wait(seconds):
            return None
        if self._report is None and not self._gone:
            try:
                with self._attached() as machine:
                    self._report = machine.wait(seconds)
            except TimeoutError:
                return None
            self._close()
        report = self._report or {"cause": "its last report is not known", "exit_code": int(ExitCode.WORKER_DIED)}
        return {"report": report, "moved": self._leaving is not None and bool(report.get("handed_over", True))}

    @_plain
    def ready(self) -> str:
        """For a migration that begins within a while: no snapshot is under way, nor is one begun. This end's public
        key. Raises VmmError."""
        if not self._has_it:
            raise self._not_here()
        if self._keeping is not None:
            self._keeping.hold(_LISTENING + _SOURCE_PATIENCE)
        return self._public

    @_plain
    def migrate(self, address: str, peer: str) -> dict[str, Any]:
        """To where another listens; the migration's report. Raises VmmError, with the machine still here, unless the
        text says otherwise."""
        leaving: futures.Future[dict[str, Any]] = futures.Future()
        self._leaving = leaving
        try:
            with self._busy, self._keys(peer) as keys:
                with self._attached() as machine:
                    report = migrate(machine, address, Options(**keys)).as_dict()
                self._gone = True
                if self._keeping is not None:
                    self._keeping.give_up()
        except BaseException as exc:
            leaving.set_exception(exc)
            raise
        finally:
            if self._keeping is not None:
                self._keeping.go_on()
        leaving.set_result(report)
        return report

    @_plain
    def migrated(self) -> dict[str, Any]:
        """What the last ``migrate`` comes to. Raises what it does; VmmError, if there was none."""
        if self._leaving is None:
            raise VmmError("its migration had not begun")
        return self._leaving.result()

    @_plain
    def handed_over(self) -> bool:
        """The machine is here, and was handed over to the target of a migration. One under way is waited for. Raises
        VmmError."""
        with self._busy, self._attached() as machine:
            return bool(machine.status()["handed_over"])

    @_plain
    def reclaim(self) -> None:
        """The machine was handed over to a target that has gone for good: it goes on here, as it was then. Raises
        VmmError."""
        with self._attached() as machine:
            machine.resume(force=True)

    # --- the end --------------------------------------------------------------------------------------------

    @_plain
    def stop(self) -> None:
        """End the machine, if it is here; nothing of it is left then."""
        if self._keeping is not None:
            self._keeping.end()
        with contextlib.suppress(VmmError, TimeoutError), self._attached() as machine:
            machine.stop()
            self._report = machine.wait(_STOP_TIMEOUT)
        self._close()

    @_plain
    def close(self) -> None:
        """It has gone elsewhere: nothing of it is left here then."""
        self._close()

    def _close(self) -> None:
        with self._closing:
            machine, self._machine = self._machine, None
            self._gone = True
            if machine is not None:
                machine.close()
            if self._lease is not None:
                self._lease.give_up()

    def _end_at_once(self) -> None:
        """The lease is over: the machine ends now, and not in order, as it would with this process."""
        try:
            if self._has_it:
                end_at_once(self._wanted.name)
        finally:
            os._exit(1)

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


def _accelerator(machine: Machine) -> str:
    """Of one that began here."""
    assert machine.spec is not None
    return machine.spec.accel


@contextlib.contextmanager
def _in_memory(text: str) -> Iterator[str]:
    """Path of a file with this text, for this process."""
    fd = os.memfd_create("key")
    try:
        os.write(fd, text.encode())
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
