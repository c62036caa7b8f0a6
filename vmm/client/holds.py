"""What a process can hold of a machine, as that process has it: a pause, a lease, dirty limits, a host write.

Each is the process' own: it can be given back by whoever made it, and goes when the process ends, by whatever
death. The coordinator knows the process by its pid and start time, as it sees them on the connection
(ipc/linux/processid.py).

* The process is whoever *opened the connection*. A forked child has a connection of its own or none: what the
  parent holds stays the parent's, and goes with it, whether the child lives or not.
* It lasts as long as the process, whatever that process has become (execve(2) changes nothing).
* A process in a child PID namespace may hold; one that the coordinator cannot see (from a namespace beside or above
  its own) or that has another clock (a time namespace) is refused.

**Host writes and freezes.** KVM logs only the guest's stores, so a host write is announced by its maker: its pages
are dirty in every sync from before the first byte is written until after the last, or the maker's death
(vmm/coordinator/writes.py). A freeze has the coordinator let no other begin, and waits for those that have. They
are in its journal, so one that was begun under a coordinator that died is waited for too.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from types import TracebackType

from ipc.steps import step

from ..errors import ExitCode, VmmError
from ..machine import verbs
from .connection import ControlClient

__all__ = ["Lease", "Limits", "host_write", "paused"]

_WRITES_END = 5.0       # seconds that a host write may take once a freeze waits for it
_LOOK_AGAIN = 0.001


def _token() -> str:
    return uuid.uuid4().hex


def _give_back(client: ControlClient, token: str) -> None:
    try:
        client.ask(verbs.GiveBack, token=token)
    except VmmError as exc:
        if exc.exit_code != ExitCode.NO_MACHINE:    # with the machine, what was held of it has gone
            raise


@contextlib.contextmanager
def paused(client: ControlClient, why: str) -> Iterator[None]:
    """``Machine.paused``."""
    token = _token()
    try:
        client.ask(verbs.Pause, mine=True, token=token, why=why)
        yield
    finally:
        _give_back(client, token)       # also when the answer to the first was not waited for


class Limits:
    """Dirty limits of this process, over the user's; ``Machine.limits``."""

    def __init__(self, client: ControlClient, why: str) -> None:
        self._client = client
        self._why = why
        self._token = _token()

    def set(self, pages_per_s: int, vcpu: int | None = None) -> None:
        """Let one vCPU, or each, dirty at most so many pages per second; 0: as the others say. In force when this
        returns. Raises VmmError on a machine without dirty rings."""
        self._client.ask(verbs.DirtyLimit, mine=True, token=self._token, why=self._why, pages_per_s=pages_per_s,
                         vcpu=vcpu)

    def close(self) -> None:
        """The vCPUs are limited by the others alone. Idempotent; it may be set again."""
        _give_back(self._client, self._token)

    def __enter__(self) -> Limits:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self.close()


class Lease:
    """Exclusive use of a machine; ``Machine.lease``. Made, it is had. Raises VmmError."""

    def __init__(self, client: ControlClient, machine: str, kind: str, why: str, recover: bool) -> None:
        self.kind = kind
        self._client = client
        self._machine = machine
        self._token = _token()
        try:
            client.ask(verbs.TakeLease, mine=True, token=self._token, kind=kind, why=why, recover=recover)
        except BaseException as exc:
            if not isinstance(exc, VmmError):       # interrupted: it may have been had
                _give_back(client, self._token)
            raise
        client.lease = self._token

    def freeze(self) -> None:
        """The guest stands still and no host write is under way when this returns, until ``thaw`` or the end of the
        lease; ``Machine.write`` and ``mark_dirty`` are refused meanwhile, with this lease's name. What a sync finds
        then is all there is. May be repeated. Raises VmmError, with the machine as it was, when a host write that
        had begun does not end within 5 s."""
        try:
            deadline = time.monotonic() + _WRITES_END
            while writing := self._client.ask(verbs.Freeze, token=self._token)["writing"]:
                if time.monotonic() > deadline:
                    raise VmmError(f"machine '{self._machine}': a write to its memory did not end within "
                                   f"{_WRITES_END:g} s: {', '.join(writing)}")
                time.sleep(_LOOK_AGAIN)
        except BaseException:
            with contextlib.suppress(VmmError):
                self.thaw()
            raise

    def thaw(self) -> None:
        """The guest goes on, unless somebody else wants it to stand still. Raises VmmError."""
        self._client.ask(verbs.Thaw, token=self._token)

    def hand_over(self, to: str) -> None:
        """When this returns, the frozen machine is another host's: it stays paused here for good, whatever dies,
        and ``Machine.resume`` is refused unless it is forced. ``to``: where, for people. When it raises VmmError
        (no answer came), it may be so; ``Machine.status()["handed_over"]`` says it. May be repeated."""
        self._client.ask(verbs.HandOver, token=self._token, to=to)

    def take_back(self) -> None:
        """The other host has refused the machine, and surely does not run it. It is frozen still. Raises
        VmmError."""
        self._client.ask(verbs.TakeBack, token=self._token)

    def pass_to(self, client: ControlClient) -> None:
        """Have it with another connection of this process, too; this one ends it."""
        client.lease = self._token
        self._client = client

    def close(self) -> None:
        """End it: others may have the machine again, and (unless it was handed over) the guest goes on. Idempotent.
        Raises VmmError."""
        if self._client.lease == self._token:
            self._client.lease = ""
        _give_back(self._client, self._token)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 tb: TracebackType | None) -> None:
        self.close()


@contextlib.contextmanager
def host_write(client: ControlClient, slot: int, born: int, first: int, count: int) -> Iterator[None]:
    """``Machine.writing``."""
    token = _token()
    client.ask(verbs.Mark, mine=True, token=token, why="host write", slot=slot, born=born, first=first,
               count=count, when="before")
    try:
        step("host-write-begun")
        yield
        step("host-write-made")
    finally:
        client.ask(verbs.Mark, token=token, slot=slot, first=first, count=count, when="after")
