"""``vmm.AsyncMachine``: what ``vmm.Machine`` does, for asyncio.

    async with await AsyncMachine.launch("configs/quickstart.yaml") as machine:
        rate = await machine.dirty_rate(1.0)

Each machine has a thread, in which its short calls run one after the other. What takes long (waiting, measuring,
recording, snapshots, migrations, events) has a connection and a thread of its own, so any number of them go on at once.
A task that is cancelled ends what it waits for: a migration is cancelled, a recording given up, and what cannot be
given up halfway (a snapshot) goes on to its end behind it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Self, TypeVar

from .api import Machine
from .client.machine import SyncResult

if TYPE_CHECKING:
    from .client.config import MachineConfig
    from .consumers.migration.report import Options
    from .consumers.migration.report import Report as MigrationReport
    from .consumers.rate import DirtyRate
    from .consumers.snapshot import Manifest
    from .consumers.workingset import Recording
    from .machine.report import Report
    from .machine.spec import MachineSpec

__all__ = ["AsyncMachine"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_LOOK_S = 0.25      # seconds after which a thread sees that nobody waits for it any more


class _GivenUp(BaseException):
    """The task that waits was cancelled."""


class AsyncMachine:
    """A machine, from one event loop. ``machine`` is what it is about: views of its memory are had from there
    (``machine.ram(0)``), and are as valid here."""

    def __init__(self, machine: Machine) -> None:
        """It is this object's from now on: nothing else may use it meanwhile."""
        self.machine = machine
        self._calls = ThreadPoolExecutor(1, f"machine-{machine.name}")

    @property
    def name(self) -> str:
        """The machine's."""
        return self.machine.name

    # --- launch, attach -------------------------------------------------------------------------------------------

    @classmethod
    async def launch(cls, config: MachineConfig | MachineSpec | str | os.PathLike[str], *, name: str | None = None,
                     overrides: Sequence[str] = (), detach: bool = False, start: bool = True) -> Self:
        """As ``Machine.launch``. Raises VmmError."""
        return await cls._made(functools.partial(Machine.launch, config, name=name, overrides=overrides, detach=detach,
                                                 start=start))

    @classmethod
    async def attach(cls, name: str) -> Self:
        """As ``Machine.attach``. Raises VmmError."""
        return await cls._made(functools.partial(Machine.attach, name))

    @classmethod
    async def restore(cls, directory: str | os.PathLike[str], snapshot: str | None = None, *, name: str | None = None,
                      accel: str = "auto", detach: bool = False, start: bool = True, lazy: bool = False) -> Self:
        """As ``Machine.restore``. Raises VmmError."""
        return await cls._made(functools.partial(Machine.restore, directory, snapshot, name=name, accel=accel,
                                                 detach=detach, start=start, lazy=lazy))

    @classmethod
    async def receive(cls, address: str, *, name: str | None = None, accel: str = "auto", detach: bool = False,
                      key: str = "", peer: str = "", insecure: bool = False, timeout: float | None = None,
                      waiting: Callable[[str], None] = lambda address: None) -> Self:
        """As ``Machine.receive``; ``waiting`` is called in the loop. A task that is cancelled leaves it waiting, for
        ``timeout`` seconds. Raises VmmError."""
        loop = asyncio.get_running_loop()
        return await cls._made(functools.partial(
            Machine.receive, address, name=name, accel=accel, detach=detach, key=key, peer=peer, insecure=insecure,
            timeout=timeout, waiting=lambda at: _ignored(loop.call_soon_threadsafe(waiting, at))))

    @classmethod
    async def _made(cls, make: Callable[[], Machine]) -> Self:
        """In a thread. Should the task be cancelled meanwhile, what comes of it is closed."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Machine] = loop.create_future()

        def take(machine: Machine) -> None:
            if done.cancelled():
                threading.Thread(target=machine.close, name="machine-close", daemon=True).start()
            else:
                done.set_result(machine)

        def run() -> None:
            try:
                machine = make()
            except BaseException as exc:
                return _settle(loop, done, exc)
            try:
                loop.call_soon_threadsafe(take, machine)
            except RuntimeError:        # the loop has gone
                machine.close()

        threading.Thread(target=run, name="machine-make", daemon=True).start()
        return cls(await done)

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """As ``Machine.start``. Raises VmmError."""
        await self._do(self.machine.start)

    async def pause(self) -> None:
        """As ``Machine.pause``. Raises VmmError."""
        await self._do(self.machine.pause)

    async def resume(self, *, force: bool = False) -> list[str]:
        """As ``Machine.resume``. Raises VmmError."""
        return await self._do(self.machine.resume, force=force)

    async def stop(self, why: str = "") -> None:
        """As ``Machine.stop``. Raises VmmError."""
        await self._do(self.machine.stop, why)

    async def release(self) -> None:
        """As ``Machine.release``. Raises VmmError."""
        await self._do(self.machine.release)

    async def status(self) -> dict[str, Any]:
        """As ``Machine.status``. Raises VmmError."""
        return await self._do(self.machine.status)

    async def report(self) -> Report:
        """As ``Machine.report``. Raises VmmError."""
        return await self._do(self.machine.report)

    async def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """As ``Machine.wait``. Raises TimeoutError, VmmError."""
        def wait(machine: Machine, given_up: threading.Event) -> dict[str, Any]:
            while not given_up.is_set():
                with contextlib.suppress(TimeoutError):
                    return machine.wait(_LOOK_S)
            raise _GivenUp

        async with asyncio.timeout(timeout):
            return await self._apart(wait)

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Events as they come, of a machine that was launched here from the first one (``Machine.events``), until it
        has ended. Raises VmmError when it goes away in between."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()

        def follow(machine: Machine, given_up: threading.Event) -> None:
            while not given_up.is_set():
                for event in machine.events(_LOOK_S):
                    loop.call_soon_threadsafe(queue.put_nowait, event)
                    if event["event"] == "ended":
                        return
                    if given_up.is_set():
                        return

        task = asyncio.ensure_future(self._apart(follow))
        task.add_done_callback(lambda done: queue.put_nowait(None))
        try:
            while (event := await queue.get()) is not None:
                yield event
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # --- memory and dirty log ---------------------------------------------------------------------------------------

    async def read(self, gpa: int, size: int) -> bytes:
        """As ``Machine.read``. Raises VmmError."""
        return await self._do(self.machine.read, gpa, size)

    async def write(self, gpa: int, data: bytes) -> None:
        """As ``Machine.write``. Raises VmmError."""
        await self._do(self.machine.write, gpa, data)

    async def register(self, client: str, *, mine: bool = False) -> None:
        """As ``Machine.register``. Raises VmmError."""
        await self._do(self.machine.register, client, mine=mine)

    async def unregister(self, client: str) -> None:
        """As ``Machine.unregister``. Raises VmmError."""
        await self._do(self.machine.unregister, client)

    async def sync(self, client: str) -> SyncResult:
        """As ``Machine.sync``. Raises VmmError."""
        return await self._do(self.machine.sync, client)

    async def dirty_limit(self, pages_per_s: int, vcpu: int | None = None) -> None:
        """As ``Machine.dirty_limit``. Raises VmmError."""
        await self._do(self.machine.dirty_limit, pages_per_s, vcpu)

    async def set_tracking(self, tracking: str) -> dict[str, Any]:
        """As ``Machine.set_tracking``. Raises VmmError."""
        return await self._do(self.machine.set_tracking, tracking)

    # --- measured, kept, moved --------------------------------------------------------------------------------------

    async def dirty_rate(self, seconds: float = 1.0, mode: Literal["ring", "bitmap", "sampling"] | None = None, *,
                         unchanged: bool = False) -> DirtyRate:
        """As ``Machine.dirty_rate``. Raises VmmError."""
        return await self._apart(lambda machine, _: machine.dirty_rate(seconds, mode, unchanged=unchanged))

    async def working_set(self, seconds: float = 10.0, interval: float = 0.1) -> Recording:
        """As ``Machine.working_set``. Raises VmmError."""
        return await self._apart(lambda machine, given_up: machine.working_set(seconds, interval, wait=given_up.wait))

    async def snapshot(self, directory: str | os.PathLike[str], *, incremental: bool = False, live: bool = False,
                       compression: Literal["none", "zstd"] = "none", working_set: float = 0.0) -> Manifest:
        """As ``Machine.snapshot``. Raises VmmError."""
        return await self._apart(lambda machine, _: machine.snapshot(
            directory, incremental=incremental, live=live, compression=compression, working_set=working_set))

    async def migrate(self, address: str, options: Options | None = None, *,
                      progress: Callable[[MigrationReport], None] = lambda report: None) -> MigrationReport:
        """As ``Machine.migrate``; ``progress`` is called in the loop. Raises MigrationError, VmmError."""
        loop = asyncio.get_running_loop()

        def migrate(machine: Machine, given_up: threading.Event) -> MigrationReport:
            def told(report: MigrationReport) -> None:
                if given_up.is_set() and report.status in ("setup", "active"):
                    raise _GivenUp("cancelled")
                loop.call_soon_threadsafe(progress, report)

            return machine.migrate(address, options, progress=told)

        return await self._apart(migrate)

    # --- threads --------------------------------------------------------------------------------------------------

    async def _do(self, call: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> _T:
        """A short call, after those before it."""
        return await asyncio.get_running_loop().run_in_executor(
            self._calls, functools.partial(call, *arguments, **options))

    async def _apart(self, work: Callable[[Machine, threading.Event], _T]) -> _T:
        """With a connection of its own, in a thread of its own. The event is set when the task is cancelled;
        the thread ends then when it can."""
        given_up, loop = threading.Event(), asyncio.get_running_loop()
        done: asyncio.Future[_T] = loop.create_future()
        other = self.machine.another()

        def run() -> None:
            try:
                found = work(other, given_up)
            except BaseException as exc:
                _settle(loop, done, exc)
            else:
                _settle(loop, done, found)
            finally:
                other.detach()

        threading.Thread(target=run, name=f"machine-{self.name}", daemon=True).start()
        try:
            return await done
        except asyncio.CancelledError:
            given_up.set()
            raise

    # --- end ------------------------------------------------------------------------------------------------------

    async def detach(self) -> None:
        """As ``Machine.detach``."""
        await self._do(self.machine.detach)
        self._calls.shutdown(wait=False)

    async def close(self) -> bool:
        """As ``Machine.close``."""
        closed = await self._do(self.machine.close)
        self._calls.shutdown(wait=False)
        return closed

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None,
                        tb: TracebackType | None) -> None:
        await self.close()


def _settle(loop: asyncio.AbstractEventLoop, done: asyncio.Future[_T], outcome: _T | BaseException) -> None:
    """From a thread. Whoever waited may have gone, and the loop with it."""
    def settle() -> None:
        if done.cancelled():
            return
        if isinstance(outcome, BaseException):
            done.set_exception(outcome)
            done.exception()        # seen, also where nobody waits any more
        else:
            done.set_result(outcome)

    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(settle)


def _ignored(_: object) -> None:
    pass
