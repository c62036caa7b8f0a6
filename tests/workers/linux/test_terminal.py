"""Terminals against the host's: the same is typed, written, set and read on a pseudoterminal, and what is echoed, what
its reader gets and which signals come are compared."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import select
import signal
import struct
import termios
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.linux.settings import IUTF8, Settings
from workers.linux.terminal import Tty

TCSETS, TCSETS2, TCGETS2 = 0x5402, 0x402C542B, 0x802C542A
SIGNALS = {signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGWINCH}
LAST = signal.SIGPWR        # it comes after those
FOREVER = 1 << 62


class Host:
    """A pseudoterminal, and a process whose terminal it is, which waits for signals."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self._came, came = os.pipe()
        ready, is_ready = os.pipe()
        self.child = os.fork()
        if not self.child:
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS | {LAST})
                os.setsid()
                fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)
                os.write(is_ready, b"x")
                while True:
                    os.write(came, bytes((signal.sigwait(SIGNALS | {LAST}),)))
            finally:
                os._exit(1)
        os.read(ready, 1)
        for fd in (came, ready, is_ready):
            os.close(fd)
        for fd in (self.master, self.slave):
            os.set_blocking(fd, False)

    def close(self) -> None:
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        for fd in (self.master, self.slave, self._came):
            os.close(fd)

    def set(self, wanted: Settings) -> None:
        fcntl.ioctl(self.slave, TCSETS, wanted.pack())

    def type(self, data: bytes) -> None:
        while data:
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(self.master, data):]

    def read(self, count: int) -> bytes | None:
        """All that was typed has been looked at when it gives None."""
        return _read(self.slave, count)

    def write(self, data: bytes) -> int:
        try:
            return os.write(self.slave, data)
        except BlockingIOError:
            return 0

    def shown(self) -> bytes:
        found = b""
        while data := _read(self.master, 65536):
            found += data
        return found

    def settle(self) -> bool:
        """All that was typed has been looked at, unless (False) there is something to be read."""
        return not select.select([self.slave], [], [], 0)[0]

    def readable(self) -> int:
        return int(struct.unpack("i", fcntl.ioctl(self.slave, termios.FIONREAD, bytes(4)))[0])

    def flush(self) -> None:
        termios.tcflush(self.slave, termios.TCIFLUSH)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def signals(self) -> list[int]:
        """That have come since. Several of a kind may be one."""
        os.kill(self.child, LAST)
        found = b""
        while LAST not in found:
            found += os.read(self._came, 100)
        return sorted(found[:-1])


def _read(fd: int, count: int) -> bytes | None:
    try:
        return os.read(fd, count)
    except BlockingIOError:
        return None


class Ours:
    """The same."""

    def __init__(self) -> None:
        self.tty = Tty()
        self._rest = b""

    def set(self, wanted: Settings) -> None:
        self.tty.set(Settings().changed(wanted.pack()))

    def type(self, data: bytes) -> None:
        self._rest += data
        self.settle()

    def settle(self) -> None:
        self._rest = self._rest[self.tty.type(self._rest, 0):]

    def read(self, count: int) -> bytes | None:
        self.settle()
        until = self.tty.due(count, None, 1)
        if until is None or until > 1:
            return self.tty.read(count) or None
        return self.tty.read(count)

    def write(self, data: bytes) -> int:
        return self.tty.write(data)

    def shown(self) -> bytes:
        return self.tty.take_shown()

    def readable(self) -> int:
        return self.tty.readable

    def flush(self) -> None:
        self._rest = b""
        self.tty.flush()

    def resize(self, rows: int, columns: int) -> None:
        self.tty.resize(rows, columns)

    def signals(self) -> list[int]:
        found, self.tty.signals = sorted(set(self.tty.signals)), []
        return found


class Both:
    """The two, step by step. Each step leaves nothing untold."""

    def __init__(self, wanted: Settings | None = None) -> None:
        self.host, self.ours = Host(), Ours()
        self.set(wanted or Settings())

    def set(self, wanted: Settings) -> None:
        self.settings = wanted
        self.host.set(wanted)
        self.ours.set(wanted)
        self.look()

    def type(self, data: bytes) -> None:
        """A byte at a time where one may have what came before it forgotten."""
        lflag = self.settings.lflag
        for part in [data[i:i + 1] for i in range(len(data))] if lflag & termios.ISIG else [data]:
            self.host.type(part)
            self.ours.type(part)
            self.look()

    def read(self, count: int) -> bytes | None:
        theirs, ours = self.host.read(count), self.ours.read(count)
        assert ours == theirs
        return ours

    def read_all(self, count: int = 1 << 16) -> list[bytes]:
        """Until there is nothing; an empty one is an end."""
        found = []
        while (data := self.read(count)) is not None:
            found.append(data)
            if not data and not self.settings.lflag & termios.ICANON:
                break
        return found

    def write(self, data: bytes) -> None:
        assert self.host.write(data) == self.ours.write(data)
        self.look()

    def flush(self) -> None:
        self.host.flush()
        self.ours.flush()

    def look(self) -> None:
        """What is shown, once all that was typed has been looked at: lines must have been read for that."""
        while not self.host.settle():
            self.read(1 << 16)
        self.ours.settle()
        assert self.ours.shown() == self.host.shown()
        assert self.ours.readable() == self.host.readable()
        assert self.ours.signals() == self.host.signals()


@contextlib.contextmanager
def both(wanted: Settings | None = None) -> Iterator[Both]:
    made = Both(wanted)
    try:
        yield made
    finally:
        made.host.close()


def with_flags(base: Settings | None = None, *, on: dict[str, int] | None = None, off: dict[str, int] | None = None,
               **characters: int) -> Settings:
    found = base or Settings()
    for name, bits in (off or {}).items():
        found = replace(found, **{name: getattr(found, name) & ~bits})
    for name, bits in (on or {}).items():
        found = replace(found, **{name: getattr(found, name) | bits})
    array = bytearray(found.characters)
    for name, value in characters.items():
        array[getattr(termios, name)] = value
    return replace(found, characters=bytes(array))


RAW = with_flags(off={"lflag": termios.ICANON | termios.ECHO | termios.ISIG, "iflag": termios.ICRNL | termios.IXON,
                      "oflag": termios.OPOST}, VMIN=255)


# --- examples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", [
    b"hello\n", b"hallo\x7f\x7f\x7f\x7fello\n", b"one two  three\x17\x17\n", b"all of it\x15again\n",
    b"a\tb\t\x7f\x7fc\n", b"\x01\x02\x7f\x7f\n", b"end\x04\x04more\n", b"\x16\x03\x16\x7fx\n", b"again\x12s\n",
    b"caf\xc3\xa9\x7f\x7fx\n", b"a\rb\r", b"\x1aabc\x03def\x1cg\n", b"abc\x13def\x11g\n", b"\xff\xfe\x7f\x00\x7f\x00\n",
    b"\tx\t\ty\x15z\n"])
@pytest.mark.parametrize("utf8", [False, True])
def test_typed_by_a_person(typed: bytes, utf8: bool) -> None:
    with both(with_flags(on={"iflag": IUTF8 if utf8 else 0})) as pair:
        pair.write(b"prompt> ")
        pair.type(typed)
        pair.read_all()


@pytest.mark.parametrize("count", [1, 3, 5, 6, 100])
def test_lines_in_parts(count: int) -> None:
    with both(with_flags(off={"lflag": termios.ISIG})) as pair:
        for text in (b"hello\nyou\n", b"hello\x04", b"hel\x04lo\x04\n\x04", b"\n\x04\x04x\n"):
            pair.host.type(text)
            pair.ours.type(text)
            pair.read_all(count)
            pair.look()


def test_a_line_that_is_too_long() -> None:
    with both(with_flags(off={"lflag": termios.ECHO})) as pair:
        pair.host.type(b"x" * 5000 + b"yz\n" + b"next\n")
        pair.ours.type(b"x" * 5000 + b"yz\n" + b"next\n")
        lines = pair.read_all()
        assert [len(line) for line in lines] == [4096, 5]


def test_what_nobody_reads_is_kept() -> None:
    with both(with_flags(RAW, VMIN=1)) as pair:
        for part in range(10):
            pair.ours.type(bytes((part,)) * 1000)
            pair.host.type(bytes((part,)) * 1000)
        theirs, ours = b"", b""
        while data := pair.host.read(1 << 16):
            theirs += data
        while data := pair.ours.read(1 << 16):
            ours += data
        assert ours == theirs
        assert len(ours) == 10_000


def test_another_way_of_reading_what_was_typed() -> None:
    cooked = with_flags(off={"lflag": termios.ISIG})
    with both(cooked) as pair:
        for text in (b"abc", b"abc\x16", b"", b"ab\0"):
            pair.type(text)
            pair.set(RAW)
            pair.type(text)
            pair.set(cooked)
            pair.type(b"def\x7f\x7f\n")
            pair.read_all()
            pair.type(text)
            pair.flush()
            pair.look()


@pytest.mark.parametrize(("least", "tenths"), [(0, 0), (0, 1), (1, 0), (3, 0), (3, 1), (30, 1)])
def test_least_and_time(least: int, tenths: int) -> None:
    with both(with_flags(RAW, VMIN=least, VTIME=tenths)) as pair:
        assert ready(pair) is False
        pair.read_all(5)
        for size in (1, 2, 5):
            pair.host.type(b"x" * size)
            pair.ours.type(b"x" * size)
            assert ready(pair) in (True, False)
            pair.read_all(5)


def ready(pair: Both) -> bool:
    theirs = bool(select.select([pair.host.slave], [], [], 0)[0])
    assert pair.ours.tty.is_ready() == theirs
    return theirs


def test_how_long_a_reader_waits() -> None:
    tty = Tty(with_flags(RAW, VMIN=0, VTIME=3))
    assert tty.due(10, None, 5) == 5 + 300_000_000
    assert tty.due(10, 7, 6) == 7
    tty.set(with_flags(RAW, VMIN=3, VTIME=3))
    assert tty.due(10, None, 5) is None
    tty.type(b"x", 6)
    assert tty.due(10, None, 100) == 100 + 300_000_000
    assert tty.due(10, 50, 100) == 6 + 300_000_000
    tty.type(b"xy", 200)
    assert tty.due(10, None, 300) == 300
    assert tty.due(1, None, 300) == 300


def test_hung_up() -> None:
    tty = Tty()
    tty.type(b"abc", 0)
    tty.hang_up()
    assert tty.signals == [signal.SIGHUP, signal.SIGCONT]
    assert tty.is_ready()
    assert tty.due(10, None, 5) == 5
    assert tty.read(10) == b""


def test_size() -> None:
    with both() as pair:
        for size in ((24, 80), (24, 80), (25, 80), (0, 0)):
            pair.host.resize(*size)
            pair.ours.resize(*size)
            pair.look()


def test_stopped_by_a_call() -> None:
    with both() as pair:
        for action, act in ((termios.TCOOFF, pair.ours.tty.screen.stop), (termios.TCOON, pair.ours.tty.screen.start)):
            termios.tcflow(pair.host.slave, action)
            act(by_call=True)
            pair.type(b"ab\x11c\x13d")
            pair.write(b"text")
        pair.type(b"\x11")


@pytest.mark.parametrize("cflag", [
    termios.B9600 | termios.CS7 | termios.PARENB, termios.B0, termios.B115200 | termios.CS8, termios.B4000000,
    termios.B38400 | termios.B9600 << 16, 0x1000, 0x1000 | 0x1000 << 16])
def test_structures(cflag: int) -> None:
    with both() as pair:
        for request, wanted in ((TCSETS, replace(Settings(), cflag=cflag).pack()),
                                (TCSETS2, replace(Settings(), cflag=cflag, ispeed=1234, ospeed=777).pack2())):
            fcntl.ioctl(pair.host.slave, request, wanted)
            pair.ours.tty.set(pair.ours.tty.settings.changed(wanted))
            theirs = fcntl.ioctl(pair.host.slave, TCGETS2, bytes(Settings.SIZE2))
            assert pair.ours.tty.settings.pack2() == theirs


def test_settings_that_nobody_has_changed() -> None:
    master, slave = pty.openpty()
    try:
        assert Settings().pack2() == fcntl.ioctl(slave, TCGETS2, bytes(Settings.SIZE2))
    finally:
        os.close(master)
        os.close(slave)


# --- anything -------------------------------------------------------------------------------------------------------


def flags(names: str) -> st.SearchStrategy[int]:
    bits = [IUTF8 if name == "IUTF8" else getattr(termios, name) for name in names.split()]
    return st.sets(st.sampled_from(bits)).map(sum)


CHARACTERS = ["VINTR", "VQUIT", "VERASE", "VKILL", "VEOF", "VSTART", "VSTOP", "VSUSP", "VEOL", "VREPRINT", "VWERASE",
              "VLNEXT", "VEOL2"]
BYTES = st.lists(st.sampled_from([bytes((byte,)) for byte in (
    *b"aab  \t\t\n\n\r\x7f\x7f\x17\x15\x16\x12\x04\x03\x1c\x1a\x13\x11\x08\0\x01_.\xff\xc3\xa9\xe2\x82\xac\xd7\x80\xfb"
    b"ge",)]), max_size=25).map(b"".join)
SETTINGS = st.builds(
    lambda iflag, oflag, lflag, changed: with_flags(replace(Settings(), iflag=iflag, oflag=oflag, lflag=lflag),
                                                    VMIN=255, **changed),
    flags("ISTRIP INLCR IGNCR ICRNL IXON IXANY IUTF8"), flags("OPOST ONLCR OCRNL ONOCR ONLRET XTABS"),
    flags("ISIG ICANON ECHO ECHOE ECHOK ECHONL NOFLSH ECHOCTL ECHOPRT ECHOKE IEXTEN"),
    st.dictionaries(st.sampled_from(CHARACTERS), st.sampled_from(b"\0a\n\r\x7f\x08 ge\xc3"), max_size=3))
STEPS = st.lists(st.one_of(
    BYTES.map(lambda data: ("type", data)), BYTES.map(lambda data: ("type", data)),
    BYTES.map(lambda data: ("write", data)), SETTINGS.map(lambda wanted: ("set", wanted)),
    st.just(("flush",))), max_size=6)


@settings(max_examples=50, deadline=None)
@given(wanted=SETTINGS, steps=STEPS)
def test_anything(wanted: Settings, steps: list[tuple[Any, ...]]) -> None:
    with both(wanted) as pair:
        for name, *arguments in steps:
            getattr(pair, name)(*arguments)
        if not wanted.lflag & termios.ICANON:
            pair.set(with_flags(wanted, VMIN=0))
        pair.read_all(3)


def test_no_descriptor_is_left() -> None:
    with both() as pair:
        fds = (pair.host.master, pair.host.slave)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor") as raised:
            os.fstat(fd)
        assert raised.value.errno == errno.EBADF
