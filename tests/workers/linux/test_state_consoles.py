"""Consoles become data: nothing that was typed or written is lost, and nothing comes twice."""

from __future__ import annotations

import os
import struct
import termios
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import Machine, packed
from twice import Out

from ipc.consoles import SIZE, Frame, FrameReader, FrameWriter, open_input, open_output
from workers.linux.settings import IUTF8, Settings
from workers.linux.terminal import Tty
from workers.linux.terminals import StreamConsole, TerminalConsole

TCGETS, TCSETS = 0x5401, 0x5402


class Shower:
    """The other side of a console, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        for name in ("console-in", "console-out"):
            os.mkfifo(folder / name)
        self.folder = folder
        self.output, self.input = open_output(folder), open_input(folder)
        self._writer, self._reader = FrameWriter(self.input), FrameReader(self.output)

    def type(self, data: bytes, kind: Frame = Frame.INPUT) -> None:
        self._writer.put(kind, data)

    def shown(self, *, last: bool = False) -> dict[int, bytes]:
        """By kind; ``last``: also what has come of one that is not whole."""
        found = {Frame.OUTPUT: b"", Frame.ERROR: b""}
        while frames := list(self._reader.frames()):
            for kind, data in frames:
                if kind in found:
                    found[Frame(kind)] += data
        rest = bytes(self._reader._data)
        if rest and last:
            found[Frame(rest[0])] += rest[5:]
        return found

    def close(self) -> None:
        os.close(self.output)
        os.close(self.input)


@pytest.fixture
def showers(tmp_path: Path) -> Any:
    found = [Shower(tmp_path / name) for name in ("one", "other")]
    yield found
    for each in found:
        each.close()


def send(group: int, number: int) -> None: ...


def close(*consoles: StreamConsole | TerminalConsole) -> None:
    for each in consoles:
        os.close(each.input_fd)
        os.close(each.output_fd)


@pytest.mark.parametrize("sizes", [[10], [60000, 5000, 3], [65536, 65536], [65531], [65530, 4, 1], [65536, 1, 65535]])
def test_what_was_not_shown_yet(showers: list[Shower], sizes: list[int]) -> None:
    one = StreamConsole(showers[0].folder, send)
    written = {Frame.OUTPUT: b"", Frame.ERROR: b""}
    one.ready()         # asks for input
    for at, size in enumerate(sizes):
        data = bytes((at * 7 + index) % 251 for index in range(size))
        done = one.write(data, error=bool(at % 2))
        written[(Frame.OUTPUT, Frame.ERROR)[at % 2]] += data[:done]
    other = StreamConsole(showers[1].folder, send)
    other.load(packed(one.save()), lambda: 0)
    found = [showers[0].shown(last=True), showers[1].shown()]
    while other.pending:
        other.pump()
        for kind, data in showers[1].shown().items():
            found[1][kind] += data
    for kind, data in showers[1].shown().items():
        found[1][kind] += data
    assert {kind: found[0][kind] + found[1][kind] for kind in written} == written
    assert not other.save()["unshown"]
    close(one, other)


def test_what_was_not_read_yet(showers: list[Shower]) -> None:
    one, other = (StreamConsole(each.folder, send) for each in showers)
    showers[0].type(b"typed")
    showers[0].type(b"", Frame.INPUT_ENDS)
    one.pump()
    assert one.read(2) == b"ty"
    other.load(packed(one.save()), lambda: 0)
    assert (other.read(9), other.read(9)) == (b"ped", b"")
    close(one, other)


def test_a_line_that_is_being_typed(showers: list[Shower]) -> None:
    one = TerminalConsole(showers[0].folder, send, lambda: 0)
    machine = Machine(console=one)
    fd, _ = machine.call("open", b"/dev/tty\0", os.O_RDWR)
    before = machine.call("ioctl", fd, TCGETS, Out(36))
    wanted = bytearray(before[1][0])
    wanted[12] &= ~(termios.ECHO & 0xFF)
    machine.call("ioctl", fd, TCSETS, bytes(wanted))
    showers[0].type(SIZE.pack(7, 70), Frame.SIZE)
    showers[0].type(b"hex\x7fl\x16")
    one.pump()
    other = TerminalConsole(showers[1].folder, send, lambda: 0)
    machine.journey(10**12, other)
    showers[1].type(b"\x03lo\n")
    other.pump()
    assert machine.call("ioctl", fd, TCGETS, Out(36)) == (0, [bytes(wanted)])
    assert machine.call("ioctl", fd, 0x5413, Out(8)) == (0, [struct.pack("<4H", 7, 70, 0, 0)])
    assert machine.call("read", fd, Out(20), 20)[1][0].rstrip(b"\0") == b"hel\x03lo\n"
    close(one, other)


def test_a_read_that_waits_for_more(showers: list[Shower]) -> None:
    """VTIME is of the clock that programs see."""
    one = TerminalConsole(showers[0].folder, send, lambda: machine.system.monotonic())
    machine = Machine(console=one)
    fd, _ = machine.call("open", b"/dev/tty\0", os.O_RDWR)
    wanted = bytearray(machine.call("ioctl", fd, TCGETS, Out(36))[1][0])
    wanted[12] &= ~(termios.ICANON | termios.ECHO) & 0xFF
    wanted[17 + termios.VMIN], wanted[17 + termios.VTIME] = 5, 20
    machine.call("ioctl", fd, TCSETS, bytes(wanted))
    showers[0].type(b"abc")
    one.pump()
    assert machine.call("read", fd, Out(20), 20) == ("blocked", 2 * 10**9)
    machine.pass_time(10**9)
    other = TerminalConsole(showers[1].folder, send, lambda: 0)
    machine.journey(-10**10, other)
    assert machine.call("read", fd, Out(20), 20) == ("blocked", 10**9)
    showers[1].type(b"d")
    other.pump()
    assert machine.call("read", fd, Out(20), 20) == ("blocked", 2 * 10**9)
    machine.pass_time(2 * 10**9)
    assert machine.call("read", fd, Out(20), 20)[0] == 4
    close(one, other)


USUAL = Settings()
KINDS = [USUAL, Settings(iflag=USUAL.iflag | IUTF8 | termios.IXANY), Settings(lflag=USUAL.lflag | termios.ECHOPRT),
         Settings(lflag=0), Settings(lflag=USUAL.lflag & ~termios.ICANON, oflag=USUAL.oflag | termios.XTABS),
         Settings(lflag=USUAL.lflag & ~termios.ECHO)]
steps = st.one_of(
    st.tuples(st.just("type"), st.lists(st.sampled_from(b"ab \t\n\r\x7f\x15\x17\x03\x04\x16\x12\x13\x11\xc3\xa4"),
                                        max_size=12).map(bytes)),
    st.tuples(st.just("write"), st.sampled_from([b"text", b"a\tb\n", b"\b\r\n", b"\xc3\xa4\t"])),
    st.tuples(st.just("read"), st.integers(0, 9)), st.tuples(st.just("set"), st.sampled_from(KINDS)),
    st.tuples(st.just("flush"), st.none()), st.tuples(st.just("resize"), st.integers(0, 3)),
    st.tuples(st.just("stop"), st.booleans()), st.tuples(st.just("journey"), st.none()))


@settings(deadline=None, max_examples=300)
@given(st.lists(steps, max_size=40))
def test_terminals(made: list[tuple[str, Any]]) -> None:
    twins = [Tty(session=1, group=1), Tty(session=1, group=1)]
    for now, (what, argument) in enumerate(made):
        if what == "journey":
            saved = packed(twins[0].save())
            twins[0] = Tty()
            twins[0].load(saved)
            assert twins[0].save() == saved
        else:
            found = [apply(each, what, argument, now) for each in twins]
            assert found[0] == found[1], (what, argument)
    assert twins[0].save() == twins[1].save()


def apply(tty: Tty, what: str, argument: Any, now: int) -> Any:
    result: Any = None
    if what == "type":
        result = tty.type(argument, now)
    elif what in ("write", "read", "set"):
        result = getattr(tty, what)(argument)
    elif what == "flush":
        tty.flush()
    elif what == "resize":
        tty.resize(argument, argument)
    elif argument:
        tty.screen.stop(by_call=True)
    else:
        tty.screen.start(by_call=True)
    shown = tty.take_shown() if now % 3 == 0 else None
    return result, shown, tty.readable, tty.is_ready(), list(tty.signals), tty.due(5, None, now)
