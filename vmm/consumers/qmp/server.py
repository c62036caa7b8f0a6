"""The socket: sessions, their commands one after the other, events to all of them.

Three threads at most: the loop's, which reads and writes; one in which commands run, each to its end; one that waits
for the machine's events. It ends with the machine. A machine that was migrated has left: what became of it is answered
until the last client has gone, or says ``quit``.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from ...client.machine import Machine
from ...errors import VmmError
from ..migration.addresses import parse_address
from ..migration.door import listening_at
from ..migration.report import OVER
from .commands import VERSION_INFO, Commands, check_negotiation
from .follower import Follower
from .migration import Addressing
from .story import Story, Told
from .wire import QmpError, Splitter, TooLong, decode_request, encode, event, shown

__all__ = ["QmpServer"]

_SESSIONS = 16
_PIECE = 1 << 16
_UNREAD = 1 << 20           # bytes of events and answers that a client may leave lying
_LOOK_S = 0.1               # at a migration under way
_LOOK_IDLE_S = 1.0          # whether one has begun
_LAST_S = 2.0               # for a client to take what was said last

_GREETING = encode({"QMP": {"version": VERSION_INFO, "capabilities": []}})


class QmpServer:
    """Of a machine that runs, at the Unix socket ``path``, which is its user's alone."""

    def __init__(self, name: str, path: str, addressing: Addressing = Addressing()) -> None:    # noqa: B008
        """Raises VmmError when there is no such machine, or nobody can listen there."""
        self._stack = contextlib.ExitStack()
        try:
            self._machine = self._stack.enter_context(Machine.attach(name))
            self._followed = self._stack.enter_context(self._machine.another())
            self._followed.skip_events()
            self._story = Story(self._machine.status())
            self._socket = self._stack.enter_context(listening_at(parse_address(f"ipc://{path}", listen=True)))
        except BaseException:
            self._stack.close()
            raise
        self._commands = Commands(self._machine, self._story, addressing)
        if report := self._commands.migration.report():
            self._story.migration(report)       # of old: no news
        self._sessions: set[_Session] = set()
        self._over = threading.Event()
        self._status = 0

    def run(self, ready: Callable[[], None] = lambda: None) -> int:
        """Until the machine has ended, or a signal comes; the exit status. ``ready`` is called when clients can
        come."""
        try:
            return asyncio.run(self._run(ready))
        finally:
            self._stack.close()

    async def _run(self, ready: Callable[[], None]) -> int:
        loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, self._on_signal, number)
        self._thread = ThreadPoolExecutor(1, "qmp-commands")
        follower = threading.Thread(target=self._follow, args=(loop,), name="qmp-events")
        server = await asyncio.start_unix_server(self._serve, sock=self._socket)
        looker = asyncio.create_task(self._look_after_migrations())
        follower.start()
        try:
            ready()
            await self._ended.wait()
        finally:
            self._over.set()
            server.close()
            looker.cancel()
            await asyncio.gather(*(session.close() for session in self._sessions), looker, return_exceptions=True)
            await asyncio.to_thread(follower.join)
            self._thread.shutdown(wait=not self._status)
        return self._status

    def _on_signal(self, number: int) -> None:
        self._status = 128 + number
        self._ended.set()

    # --- sessions ---------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = _Session(writer)
        if len(self._sessions) >= _SESSIONS or self._ended.is_set():
            writer.close()
            return
        self._sessions.add(session)
        try:
            with contextlib.suppress(ConnectionError):
                session.write(_GREETING)
                await self._converse(session, reader)
        finally:
            self._sessions.discard(session)
            writer.close()
            self._end_if_left()

    async def _converse(self, session: _Session, reader: asyncio.StreamReader) -> None:
        splitter = Splitter()
        while data := await reader.read(_PIECE):
            try:
                for text in splitter.feed(data):
                    await self._answer(session, text)
            except TooLong:
                session.fail(QmpError("a command is too long"))
                return
            await session.writer.drain()

    async def _answer(self, session: _Session, text: bytes | None) -> None:
        if text is None:
            return session.fail(QmpError("what came was no JSON; reading begins anew"))
        request, number, wrong = decode_request(text)
        if request is None:
            return session.fail(QmpError(wrong), number)
        session.idle.clear()
        try:
            session.answer(await self._carried_out(session, request.execute, request.arguments), number)
            self._end_if_left()
        except QmpError as exc:
            session.fail(exc, number)
        finally:
            session.idle.set()

    async def _carried_out(self, session: _Session, name: str, arguments: dict[str, Any]) -> Any:
        """Raises QmpError."""
        if not session.negotiated:
            if name != "qmp_capabilities":
                raise QmpError(f"{shown(name)}: a session begins with qmp_capabilities", "CommandNotFound")
            check_negotiation(arguments)
            session.negotiated = True
            return {}
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._commands.run, name, arguments)

    def _tell(self, told: Told) -> None:
        for name, data in told:
            line = event(name, data)
            for session in self._sessions:
                if session.negotiated:
                    session.write(line)

    # --- the machine ------------------------------------------------------------------------------------------------

    def _follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: what happens to the machine, until it was migrated, or has ended for good."""
        report = Follower(self._followed, self._story, lambda told: loop.call_soon_threadsafe(self._tell, told),
                          self._over).until_end()
        if report is None:
            return
        if report.get("handed_over"):
            self._commands.left = True
            loop.call_soon_threadsafe(self._end_if_left)
            return
        if self._story.quit:        # whoever launched it need not let it go
            with contextlib.suppress(VmmError):
                self._followed.release()
        loop.call_soon_threadsafe(self._tell, self._story.ended(report))
        loop.call_soon_threadsafe(self._ended.set)

    def _end_if_left(self) -> None:
        """It is not here any more, and nobody has anything to ask: the last client has gone, or one has said so."""
        if self._commands.left and (self._story.quit or not self._sessions):
            self._ended.set()

    async def _look_after_migrations(self) -> None:
        migrations = self._commands.migration
        while True:
            report = await asyncio.to_thread(migrations.report)
            active = report is not None and report["status"] not in OVER
            if report is not None:
                self._tell(self._story.migration(report, tell=migrations.tells))
            await asyncio.sleep(_LOOK_S if active or self._commands.left else _LOOK_IDLE_S)


class _Session:
    """A client. ``idle``: no command of its own is under way."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.negotiated = False
        self.idle = asyncio.Event()
        self.idle.set()

    def write(self, line: bytes) -> None:
        """It is not waited for whoever does not read: that client is given up."""
        transport = self.writer.transport
        if transport.get_write_buffer_size() > _UNREAD:
            transport.abort()
        elif not transport.is_closing():
            self.writer.write(line)

    def answer(self, result: Any, number: Any) -> None:
        self.write(encode({"return": result, "id": number}))

    def fail(self, error: QmpError, number: Any = msgspec.UNSET) -> None:
        """``number``: of the command, where it is known."""
        self.write(encode({"error": {"class": error.kind, "desc": str(error)}, "id": number}))

    async def close(self) -> None:
        """Once its command has been answered, and it has taken that."""
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(_LAST_S):
                await self.idle.wait()
                await self.writer.drain()
                self.writer.close()
                await self.writer.wait_closed()
        self.writer.transport.abort()
