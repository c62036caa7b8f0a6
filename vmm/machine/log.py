"""A machine's log: what its processes have to say, kept by its keeper.

    2026-03-01T09:15:02.123Z coordinator info 2 vCPUs (kvm) are ready
    2026-03-01T09:15:02.130Z vcpu0 console hello
    2026-03-01T09:15:02.131Z coordinator warning vcpu 1 ended: worker-died: its worker process (pid 71) ended
    2026-03-01T09:15:02.140Z stderr error Traceback (most recent call last):

The standard error of coordinator, workers and of the process that forks them is one pipe. The keeper reads it and
writes the file (vmm/machine/records.py says where), so a machine never waits for a disk, a full disk costs lines
and not the machine, and what a process said before it died is there. What begins with ``_RECORD`` is a finished
line, from :class:`PipeHandler`; all else is what Python, a library or the kernel's loader has written, and gets a
head here.

logging of the standard library does the rest: no further dependency in the keeper, which has to start fast and must
not fail, and its RotatingFileHandler bounds the file.
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

__all__ = ["LOG_BYTES", "LogFile", "LogLine", "PipeHandler", "append_log", "follow_log", "log_line",
           "log_to_keeper", "read_log"]

LOG_BYTES = 2 << 20         # of one file; there are two, the present one and the one before (".1")
_RECORD = b"\x1e"           # ASCII record separator
_WRITE = 4096               # PIPE_BUF: so much is written to a pipe whole, or not at all
_LINE = 3500                # bytes of a line; what is longer is broken
_PENDING = 64 << 10         # bytes without a newline that the keeper waits for
_STEP = 0.2                 # seconds between two looks at a file that is followed

#: What a guest or a library wrote must not do anything to the terminal it is shown on, nor make lines of its own.
_CONTROLS = {c: f"\\x{c:02x}" for c in (*range(0x20), *range(0x7F, 0xA0)) if c != 0x09} | {
    c: f"\\u{c:04x}" for c in (0x2028, 0x2029)}


def log_line(source: str, level: str, text: str, seconds: float | None = None) -> str:
    """One line of a log, without its newline. ``seconds`` since the epoch; None: now."""
    moment = datetime.datetime.fromtimestamp(time.time() if seconds is None else seconds, datetime.UTC)
    stamp = moment.isoformat(timespec="milliseconds").removesuffix("+00:00")
    return f"{stamp}Z {source} {level} {text.translate(_CONTROLS)}"


@dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a machine's log."""

    time: str           # ISO 8601, UTC
    source: str         # keeper, coordinator, vcpu<N> (its console), stderr
    level: str          # info, warning, error, console
    text: str

    @property
    def console_of(self) -> int | None:
        """The vCPU that has written it to the console; None: it is no console line."""
        return int(self.source.removeprefix("vcpu")) if self.level == "console" else None


# --- in the processes of the machine -----------------------------------------------------------------


class PipeHandler(logging.Handler):
    """Writes to standard error, which is the keeper's pipe, and never waits for it: what does not fit is counted,
    and said with the next line that does. ``extra={"source": …, "level": …}`` of a record replaces those two."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source
        self._dropped = 0
        # An open file of its own: O_NONBLOCK would hold for everybody who has the inherited one.
        self._fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            source = getattr(record, "source", self._source)
            level = getattr(record, "level", record.levelname.lower())
            lines = [log_line(source, level, part, record.created)
                     for text in self.format(record).split("\n") for part in _parts(text)]
            note = []
            if self._dropped:
                text = f"{self._dropped} lines were dropped: the keeper was busy"
                note = [log_line(self._source, "warning", text)]
            written = self._write(note + lines)
            if note and written:
                self._dropped = 0
            self._dropped += len(lines) - max(0, written - len(note))
        except Exception:   # whatever it is: a log never harms what it is about
            self._dropped += 1

    def _write(self, lines: list[str]) -> int:
        """How many of them were written."""
        written = 0
        batch: list[bytes] = []
        for line in [_RECORD + line.encode("utf-8", "replace") + b"\n" for line in lines] + [b""]:
            if batch and (not line or len(b"".join(batch)) + len(line) > _WRITE):
                if not self._put(b"".join(batch)):
                    break
                written += len(batch)
                batch = []
            batch.append(line)
        return written

    def _put(self, batch: bytes) -> bool:
        try:
            os.write(self._fd, batch)
        except OSError:     # EAGAIN: full; EPIPE: the keeper has gone
            return False
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()


def _parts(text: str) -> list[str]:
    """Each short enough for one write, whatever its characters are encoded in."""
    step = _LINE // 4
    return [text[i:i + step] for i in range(0, len(text), step)] or [""]


def log_to_keeper(source: str) -> logging.Logger:
    """Have this process's loggers below ``vmm`` write to its keeper's pipe."""
    logger = logging.getLogger("vmm")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(PipeHandler(source))
    return logger


# --- in the keeper -----------------------------------------------------------------------------------


class _Rotating(RotatingFileHandler):
    """Remembers why it could not write."""

    error = ""

    def handleError(self, record: logging.LogRecord) -> None:
        exc = sys.exception()
        self.error = exc.strerror or str(exc) if isinstance(exc, OSError) else repr(exc)
        stream, self.stream = self.stream, None     # what it has buffered would fail again: it is opened anew
        try:
            if stream is not None:
                stream.close()
        except OSError:
            pass


class LogFile:
    """The file. What cannot be written is counted, and said as soon as something can. None: there is no file."""

    def __init__(self, path: Path | None) -> None:
        self._handler = None if path is None else _Rotating(path, maxBytes=LOG_BYTES, backupCount=1, delay=True,
                                                            encoding="utf-8", errors="replace")
        self._pending = b""
        self._lost = 0

    @property
    def error(self) -> str:
        """Why the last line was not written; empty: it was."""
        return self._handler.error if self._handler is not None else ""

    def say(self, level: str, text: str) -> None:
        """A line of the keeper's own."""
        self._append(log_line("keeper", level, text))

    def feed(self, data: bytes) -> None:
        """What has come out of the pipe."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) > _PENDING:
            lines.append(self._pending)
            self._pending = b""
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        # A process may have died in the middle of a line: what another has said then begins within it.
        raw, mark, record = line.partition(_RECORD)
        if raw:
            self._append(log_line("stderr", "error", raw.decode("utf-8", "replace")))
        if mark:
            self._append(record.replace(_RECORD, b"").decode("utf-8", "replace"))

    def _append(self, line: str) -> None:
        if self._handler is None:
            return
        if self._lost:
            why, lost = self.error, self._lost
            self._emit(log_line("keeper", "warning", f"{lost} lines could not be written: {why}"))
            if self.error:
                self._lost += 1
                return
            self._lost = 0
        self._emit(line)
        self._lost += bool(self.error)

    def _emit(self, line: str) -> None:
        assert self._handler is not None
        self._handler.error = ""
        self._handler.handle(logging.makeLogRecord({"msg": line}))

    def close(self) -> None:
        if self._pending:
            self._take(self._pending)
            self._pending = b""
        if self._handler is not None:
            self._handler.close()


# --- for whoever reads it ----------------------------------------------------------------------------


def read_log(path: Path) -> Iterator[LogLine]:
    """What there is, oldest first. Raises FileNotFoundError."""
    return follow_log(path, iter([False]))


def append_log(path: Path, other: Path) -> None:
    """What guest and processes of another machine had to say, but for news of the processes themselves. Raises
    OSError."""
    lines = [f"{each.time} {each.source} {each.level} {each.text}\n" for each in read_log(other)
             if each.level != "info"]
    with path.open("a", encoding="utf-8", errors="replace") as file:
        file.write("".join(lines))


def follow_log(path: Path, going_on: Iterator[bool]) -> Iterator[LogLine]:
    """What there is, oldest first, then what comes; until ``going_on`` gives False, and all is read. Raises
    FileNotFoundError."""
    file = _open(path)
    try:
        yield from _earlier(path, file)
        for more in going_on:
            yield from _lines(file)
            if _rotated(path, file):
                yield from _lines(file)     # what came in between
                following = _open(path)
                if not _same(_before(path), file):
                    yield LogLine(*log_line("vmm", "warning", "lines are missing here: more was written in the "
                                                              "meantime than is kept").split(" ", 3))
                    yield from _earlier(path, following)
                file.close()
                file = following
                yield from _lines(file)
            if not more:
                return
            time.sleep(_STEP)
    finally:
        file.close()


def _before(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def _open(path: Path) -> IO[bytes]:
    """Raises FileNotFoundError."""
    for left in range(50, -1, -1):
        try:
            return path.open("rb")
        except FileNotFoundError:
            if not left or not _before(path).exists():
                raise
            time.sleep(0.01)    # between the renaming of one and the making of the next
    raise AssertionError


def _earlier(path: Path, file: IO[bytes]) -> Iterator[LogLine]:
    """The lines of the file before ``file``."""
    try:
        with _before(path).open("rb") as before:
            if not os.path.sameopenfile(before.fileno(), file.fileno()):     # it has been rotated just now
                yield from _lines(before)
    except FileNotFoundError:
        pass


def _same(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _rotated(path: Path, file: IO[bytes]) -> bool:
    return not _same(path, file) and (path.exists() or _before(path).exists())


def _lines(file: IO[bytes]) -> Iterator[LogLine]:
    """Up to the last whole line."""
    while True:
        at = file.tell()
        text = file.readline()
        if not text.endswith(b"\n"):
            file.seek(at)
            return
        parts = text[:-1].decode("utf-8", "replace").split(" ", 3)
        if len(parts) == 4:     # else it was torn: the disk was full in between
            yield LogLine(*parts)
