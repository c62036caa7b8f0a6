"""Connections for pages, and the door that all connections of a migration come through, without machines."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import until
from migrations import Relay, listening

from ipc.shm import Segment, open_fd
from vmm.consumers.migration import door as door_module
from vmm.consumers.migration import wire
from vmm.consumers.migration.addresses import Address, parse_address
from vmm.consumers.migration.arrivals import Arrivals
from vmm.consumers.migration.door import PAGES
from vmm.consumers.migration.pages import CHUNK_PAGES, PAGE, Packer
from vmm.consumers.migration.postcopy_source import _Missing
from vmm.consumers.migration.sockets import connect, connect_stream
from vmm.consumers.migration.streams import Sent, Stream
from vmm.consumers.migration.tls import Certificate
from vmm.consumers.migration.wire import POSTCOPY, WireError
from vmm.errors import VmmError

TOKEN = "0" * 32


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    found: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield found
    found.destroy(linger=0)


@contextlib.contextmanager
def pair() -> Iterator[tuple[Stream, socket.socket]]:
    """A stream that receives, and the plain other end."""
    here, there = socket.socketpair()
    with Stream(here) as stream, there:
        yield stream, there


# --- one message ---------------------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 199), min_size=1, max_size=CHUNK_PAGES), st.sets(st.integers(0, 199)))
@settings(max_examples=30, deadline=None)
def test_pages_come_out_of_a_segment_as_they_lie_in_it(sent: set[int], zero: set[int]) -> None:
    """Single ones are copied, runs are sent by the kernel: the bytes are those of the memory."""
    with Segment.create("/shardvmm-test-streams", 200 * PAGE) as segment:
        memory = np.frombuffer(segment.buf, np.uint8)
        memory[:] = np.random.default_rng(0).integers(1, 256, len(memory), np.uint8)
        memory.reshape(-1, PAGE)[sorted(zero)] = 0
        of = Sent(memory, open_fd(segment.name))
        found = np.full((200, PAGE), 7, np.uint8)
        with pair() as (stream, there), Stream(there) as sender:
            messages = Packer("none", sums=False).pack(3, 1, memory, np.array(sorted(sent)))
            threads = [threading.Thread(target=sender.send, args=(*each, of)) for each in messages]
            for thread in threads:      # one after the other
                thread.start()
                received = stream.receive()
                thread.join()
                assert received is not None
                message, data = received
                assert isinstance(message, wire.Pages)
                numbers = np.frombuffer(message.numbers, "<u4")
                found[numbers] = 0 if message.encoding == "zero" else np.frombuffer(data, np.uint8).reshape(-1, PAGE)
        os.close(of.fd)
        chosen = sorted(sent)
        assert (found[chosen] == memory.reshape(-1, PAGE)[chosen]).all()
        assert (np.delete(found, chosen, 0) == 7).all()
        del memory, of, threads, messages


@given(st.binary(max_size=100))
@settings(deadline=None)
def test_noise_on_a_connection_for_pages_is_an_end_or_a_wire_error(noise: bytes) -> None:
    with pair() as (stream, there):
        there.sendall(noise)
        there.shutdown(socket.SHUT_WR)
        with contextlib.suppress(WireError):
            assert stream.receive() is None


@pytest.mark.parametrize(("size", "data"), [(0, 0), (1 << 20, 0), (10, (CHUNK_PAGES + 1) * PAGE)])
def test_a_head_that_asks_for_too_much_is_refused_at_once(size: int, data: int) -> None:
    with pair() as (stream, there):
        there.sendall(struct.pack("<II8s", size, data, b""))
        with pytest.raises(WireError, match="a message of"):
            stream.receive()


def test_who_waits_in_a_stream_goes_on_when_it_is_shut() -> None:
    with pair() as (stream, _):
        found: list[object] = []
        thread = threading.Thread(target=lambda: found.append(stream.receive()))
        thread.start()
        stream.shut()
        thread.join(20)
        assert found == [None]


# --- what arrives --------------------------------------------------------------------------------------------------


def pages_message(number: int, round_: int) -> wire.Pages:
    return wire.Pages(round_, 0, np.array([number], "<u4").tobytes(), "none", xxhash.xxh3_64_digest(b"x" * PAGE))


def test_a_round_is_complete_with_its_last_message_whichever_connection_brings_it() -> None:
    written: list[int] = []
    with Arrivals(lambda message, data: written.append(message.round)) as arrivals:
        arrivals.expect(TOKEN)
        ends = [socket.socketpair() for _ in range(3)]
        threads = [threading.Thread(target=arrivals.serve, args=(here,)) for here, _ in ends]
        for thread in threads:
            thread.start()
        streams = [Stream(there) for _, there in ends]
        for stream in streams:
            stream.send(wire.Join(TOKEN))
        streams[0].send(pages_message(1, 0), b"x" * PAGE)
        streams[1].send(pages_message(2, 0), b"x" * PAGE)
        arrivals.round_end(0, 3)
        until(lambda: arrivals.taken == 2, "two have come")
        assert arrivals.rounds() == []
        streams[2].send(pages_message(3, 0), b"x" * PAGE)
        until(lambda: len(written) == 3, "all have come")
        found: list[object] = []
        until(lambda: bool(found.extend(arrivals.rounds()) or found), "the round is over")
        assert found == [(0, [])]
        streams[0].send(pages_message(4, POSTCOPY), b"y" * PAGE)
        until(lambda: arrivals.taken == 4, "one more")
        after = arrivals.next()
        assert after is not None
        assert after[1] == b"y" * PAGE
        assert len(written) == 3        # that one is for who asks
        for stream in streams:
            stream.close()
        for thread in threads:
            thread.join(20)


def test_what_is_wanted_is_asked_for_over_the_connection_that_is_for_that() -> None:
    with Arrivals(lambda message, data: None) as arrivals:
        arrivals.expect(TOKEN)
        want = wire.Want(0, b"\0\0\0\0")
        assert not arrivals.ask(want)
        (here, there), (one, other) = socket.socketpair(), socket.socketpair()
        threads = [threading.Thread(target=arrivals.serve, args=(sock,)) for sock in (here, one)]
        for thread in threads:
            thread.start()
        with Stream(there) as asked, Stream(other) as second:
            second.send(wire.Join(TOKEN))
            asked.send(wire.Join(TOKEN, asked=True))
            until(lambda: arrivals.ask(want), "it is asked")
            received = asked.receive()
            assert received is not None
            assert received[0] == want
        for thread in threads:
            thread.join(20)
        assert not arrivals.ask(want)       # it has broken


def test_a_connection_of_a_source_that_has_gone_is_ended_and_its_nonsense_is_not_the_next_ones() -> None:
    with Arrivals(lambda message, data: None) as arrivals:
        arrivals.expect(TOKEN)
        here, there = socket.socketpair()
        thread = threading.Thread(target=arrivals.serve, args=(here,))
        thread.start()
        with Stream(there) as stream:
            stream.send(wire.Join(TOKEN))
            stream.send(pages_message(1, 0), b"x" * PAGE)
            until(lambda: arrivals.taken == 1, "it is one of ours")
            arrivals.drop()
            thread.join(20)
            assert not thread.is_alive()
        arrivals.check()
    arrivals.close()        # idempotent


def test_an_error_of_whoever_writes_is_told_once() -> None:
    def full(message: wire.Pages, data: object) -> None:
        raise OSError(28, "No space left on device")

    with Arrivals(full) as arrivals:
        arrivals.expect(TOKEN)
        here, there = socket.socketpair()
        thread = threading.Thread(target=arrivals.serve, args=(here,))
        thread.start()
        with Stream(there) as stream:
            stream.send(wire.Join(TOKEN))
            stream.send(pages_message(1, 0), b"x" * PAGE)
            thread.join(20)
        with pytest.raises(VmmError, match="could not be taken"):
            arrivals.check()
        arrivals.check()


# --- encrypted -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def encrypted(context: zmq.Context[zmq.Socket[bytes]], certificate: Certificate,
              written: list[bytes]) -> Iterator[Address]:
    """A target's door on tcp, whose connections for pages have this certificate."""
    with Arrivals(lambda message, data: written.append(bytes(data)), certificate.context) as arrivals:
        arrivals.expect(TOKEN)
        with listening(context, parse_address("tcp://127.0.0.1:*", listen=True),
                       pages=arrivals.serve) as (_, endpoint):
            yield parse_address(endpoint)


def test_pages_arrive_encrypted_and_cannot_be_read_on_their_way(context: zmq.Context[zmq.Socket[bytes]],
                                                                tmp_path: Path) -> None:
    certificate, written = Certificate(), []
    memory = np.tile(np.frombuffer(b"a guest's secret", np.uint8), 16 * PAGE // 16)
    with (encrypted(context, certificate, written) as address, Relay(address.text, tmp_path / "relay") as relay,
          connect_stream(parse_address(relay.address), time.monotonic() + 10, certificate.der) as stream):
        stream.send(wire.Join(TOKEN))
        [(message, data)] = Packer("none", sums=False).pack(0, 0, memory, np.arange(16))
        stream.send(message, data, Sent(memory, -1))
        until(lambda: bool(written), "they have come")
    assert written == [memory.tobytes()]
    assert len(relay.seen) > len(memory)
    assert b"a guest's secret" not in relay.seen
    assert TOKEN.encode() not in relay.seen


def test_only_who_has_the_certificate_is_sent_pages(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    written: list[bytes] = []
    with encrypted(context, Certificate(), written) as address:
        with pytest.raises(VmmError, match="is not who was spoken to"):
            connect_stream(address, time.monotonic() + 10, Certificate().der)
        # And what is not encrypted is not taken.
        with connect_stream(address, time.monotonic() + 10) as stream, contextlib.suppress(OSError):
            stream.send(wire.Join(TOKEN))
            stream.send(pages_message(1, 0), b"x" * PAGE)
            assert stream.receive() is None
    assert written == []


# --- the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ipc://{}/s", "ipc://@{}/s", "tcp://127.0.0.1:*", "tcp://lo:0"])
def test_both_kinds_come_in_at_one_address(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, text: str) -> None:
    came: list[bytes] = []

    def pages(sock: socket.socket) -> None:
        with Stream(sock) as stream:
            received = stream.receive()
            assert received is not None
            came.append(bytes(received[1]))

    with listening(context, parse_address(text.format(tmp_path), listen=True), pages=pages) as (sock, endpoint):
        address = parse_address(endpoint)
        connection = connect(context, address, None, until=time.monotonic() + 10)
        connection.sock.send(b"hello")
        with connect_stream(address, time.monotonic() + 10) as stream:
            stream.send(pages_message(1, 0), b"z" * PAGE)
            until(lambda: bool(came), "pages have come")
        assert sock.poll(10_000)
        assert sock.recv_multipart()[1] == b"hello"
        connection.close()
    assert came == [b"z" * PAGE]


def test_whoever_says_nothing_or_nonsense_keeps_nobody_out(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "_PATIENCE", 0.5)
    path = tmp_path / "s"
    with (listening(context, parse_address(f"ipc://{path}", listen=True)) as (_, endpoint),
          contextlib.ExitStack() as all_):
        silent = [all_.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(70)]     # more than are borne
        for each in silent:
            each.connect(str(path))
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(path))
            with contextlib.suppress(OSError):
                other.sendall(b"GET / HTTP/1.0\r\n\r\n")
                assert other.recv(1) == b""
        connect(context, parse_address(endpoint), None, until=time.monotonic() + 20).close()


def test_a_door_that_closes_ends_all_that_came_in(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    def pages(sock: socket.socket) -> None:
        with Stream(sock) as stream:
            assert stream.receive() is None

    address = parse_address(f"ipc://{tmp_path}/s", listen=True)
    with listening(context, address, pages=pages), socket.socket(socket.AF_UNIX) as other:
        other.connect(str(tmp_path / "s"))
        other.sendall(PAGES)
        connection = connect(context, address, None, until=time.monotonic() + 10)
    until(lambda: connection.broken, "the end is seen")
    connection.close()


# --- what is left to be sent after the hand-over ---------------------------------------------------------------------


def test_pages_that_are_asked_for_while_the_rest_is_sent_are_sent_once() -> None:
    """One thread goes through them, another answers: numpy must not look at bits that change meanwhile. (Threads take
    turns as often as they can here; without a lock one round in twenty goes wrong.)"""
    interval, total = sys.getswitchinterval(), 2000
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(200):
            work = _Missing({0: np.arange(total)})
            fresh: list[int] = []

            def answer(work: _Missing = work, fresh: list[int] = fresh) -> None:
                for end in range(total, 0, -7):
                    fresh.append(work.sent(0, np.arange(max(0, end - 7), end)))

            thread = threading.Thread(target=answer)
            thread.start()
            while (job := work.next()) is not None:
                slot, pages = job
                assert slot == 0
                assert (np.diff(pages) > 0).all()
                assert 0 <= pages[0] <= pages[-1] < total
                fresh.append(work.sent(slot, pages))
            thread.join()
            assert sum(fresh) == total
            assert work.left == 0
    finally:
        sys.setswitchinterval(interval)
