"""Addresses, keys and sockets of a migration, without machines."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from machines import until
from migrations import Relay, listening

import ipc.listening
from vmm.consumers.migration import keys as keys_module
from vmm.consumers.migration import sockets
from vmm.consumers.migration.addresses import parse_address
from vmm.consumers.migration.keys import Keys, load_keys, make_keys
from vmm.consumers.migration.sockets import Connection, Unreachable, connect
from vmm.errors import VmmError

LOCAL = parse_address("ipc://x")
ANYWHERE = parse_address("tcp://127.0.0.1:*", listen=True)


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    found: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield found
    found.destroy(linger=0)


# --- addresses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "listen"), [
    ("tcp://localhost:5000", False), ("tcp://127.0.0.1:1", False), ("tcp://[::1]:65535", False),
    ("ipc:///tmp/a", False), ("ipc://relative", False), ("ipc://@abstract", False), ("tcp://*:*", True),
    ("tcp://0.0.0.0:0", True), ("tcp://lo:5000", True), ("tcp://[::]:*", True)])
def test_addresses(text: str, listen: bool) -> None:
    address = parse_address(text, listen=listen)
    assert address.text == text
    assert address.local == text.startswith("ipc")


@pytest.mark.parametrize("text", [
    "", "x", "udp://a:1", "tcp://", "ipc://", "tcp://a", "tcp://:5", "tcp://a:", "tcp://a:abc", "tcp://a:0",
    "tcp://a:65536", "tcp://a:99999", "tcp://a:-1", "tcp://a:\u00b2", "tcp://:::", "tcp://::1:5", "tcp://[::1]5",
    "tcp://[x]:5", "tcp://a b:5", "tcp://*:5", "ipc://" + "x" * 108, "ipc://a\0b", "ipc://a\nb", "ipc://\udcff",
    "ipc://*"])
def test_addresses_that_cannot_be_are_one_line(text: str) -> None:
    with pytest.raises(VmmError, match=r"^address '[^\n]*$"):
        parse_address(text)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_one_line(text: str) -> None:
    for prefix in ("", "tcp://", "ipc://", "tcp://a:"):
        for listens in (False, True):
            error = ""
            try:
                parse_address(prefix + text, listen=listens)
            except VmmError as exc:
                error = str(exc)
            assert "\n" not in error


def test_a_host_that_nobody_knows_is_one_line(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    address = parse_address("tcp://nobody.invalid:1")
    with pytest.raises(VmmError, match=r"host 'nobody\.invalid'"):
        connect(context, address, None, until=time.monotonic() + 1)


# --- keys -------------------------------------------------------------------------------------------------------


def test_a_pair_of_keys_is_made_once(tmp_path: Path) -> None:
    public, secret = make_keys(tmp_path / "new", "a")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    before = secret.read_text()
    with pytest.raises(VmmError, match="already exists"):
        make_keys(tmp_path / "new", "a")
    public.unlink()
    with pytest.raises(VmmError, match="already exists"):
        make_keys(tmp_path / "new", "a")
    assert secret.read_text() == before
    make_keys(tmp_path / "new", "a", force=True)
    assert secret.read_text() != before
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.key", "a.key_secret"]


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".a", "Host A", "x" * 65, "a\nb"])
def test_keys_have_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(VmmError, match="key name"):
        make_keys(tmp_path / "d", name)
    assert not (tmp_path / "d").exists()


def test_a_secret_key_through_a_link_is_not_written_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "a.key_secret").symlink_to(tmp_path / "precious")
    with pytest.raises(VmmError, match="already exists"):
        make_keys(tmp_path, "a")
    make_keys(tmp_path, "a", force=True)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("content", [
    b"", b"nonsense", b"\xff\xfe\0", b'curve\n    public-key = "short"\n', b'curve\n    public-key = "' + b"~" * 40,
    b"public-key", b'    public-key = "' + b"\xff" * 40 + b'"\n'])
def test_what_is_not_a_key_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    _, secret = make_keys(tmp_path, "good")
    bad = tmp_path / "bad.key"
    bad.write_bytes(content)
    for key, peer in ((bad, secret), (secret, bad)):
        with pytest.raises(VmmError, match=r"^[^\n]*bad\.key: [^\n]*key[^\n]*$"):
            load_keys(str(key), str(peer), LOCAL)


def test_a_key_file_that_never_ends_or_never_begins_is_one_line(tmp_path: Path) -> None:
    _, secret = make_keys(tmp_path, "good")
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/zero", str(tmp_path / "fifo"), str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(VmmError, match="cannot be read as a key file"):
            load_keys(path, str(secret), LOCAL)


def test_keys_go_together_and_tcp_needs_them(tmp_path: Path) -> None:
    public, secret = make_keys(tmp_path, "good")
    tcp = parse_address("tcp://h:1")
    assert load_keys("", "", LOCAL) is None
    assert load_keys("", "", tcp, insecure=True) is None
    with pytest.raises(VmmError, match="would be sent unencrypted"):
        load_keys("", "", tcp)
    for key, peer in (("", str(public)), (str(secret), "")):
        with pytest.raises(VmmError, match="given together"):
            load_keys(key, peer, tcp, insecure=True)
    with pytest.raises(VmmError, match="contains no secret key"):
        load_keys(str(public), str(public), tcp)
    assert load_keys(str(secret), str(public), tcp) is not None


# --- listening at a path ------------------------------------------------------------------------------------------


def at_path(context: zmq.Context[zmq.Socket[bytes]],
            path: Path) -> contextlib.AbstractContextManager[tuple[zmq.Socket[bytes], str]]:
    return listening(context, parse_address(f"ipc://{path}", listen=True))


def test_what_is_at_the_path_stays_there(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    file, folder, link = tmp_path / "file", tmp_path / "folder", tmp_path / "link"
    file.write_text("precious")
    folder.mkdir()
    link.symlink_to(file)
    for path in (file, folder, link):
        with pytest.raises(VmmError, match="exists and is not a socket"), at_path(context, path):
            pass
    assert file.read_text() == "precious"
    assert link.is_symlink()
    assert folder.is_dir()


def test_only_the_socket_of_one_who_was_killed_is_replaced(context: zmq.Context[zmq.Socket[bytes]],
                                                           tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(VmmError, match="another program is already listening there"), at_path(context, path):
            pass
        assert stat.S_ISSOCK(path.lstat().st_mode)
    # It has ended, and left its file behind.
    with at_path(context, path):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
        with pytest.raises(VmmError, match="another program is already listening there"), at_path(context, path):
            pass
    assert not path.exists()


@pytest.mark.root
def test_a_stale_socket_of_another_user_is_not_touched(context: zmq.Context[zmq.Socket[bytes]],
                                                       tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
    os.chown(path, 65534, 65534)
    with pytest.raises(VmmError, match="another user"), at_path(context, path):
        pass
    assert path.lstat().st_uid == 65534


def test_what_another_has_put_in_the_place_meanwhile_stays(context: zmq.Context[zmq.Socket[bytes]],
                                                           tmp_path: Path) -> None:
    path = tmp_path / "s"
    with at_path(context, path):
        path.unlink()
        path.write_text("precious")
    assert path.read_text() == "precious"


def test_of_two_that_replace_a_stale_socket_at_once_one_listens(context: zmq.Context[zmq.Socket[bytes]],
                                                                tmp_path: Path) -> None:
    path = tmp_path / "s"
    for _ in range(10):
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
        begin, end = threading.Barrier(2), threading.Barrier(2)
        found: list[str] = []

        def one(begin: threading.Barrier = begin, end: threading.Barrier = end, found: list[str] = found) -> None:
            begin.wait()
            try:
                with at_path(context, path):
                    found.append("listens")
                    end.wait(10)
            except VmmError:
                found.append("refused")
                end.wait(10)

        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == ["listens", "refused"]
        assert not path.exists()


def test_a_folder_that_somebody_else_has_locked_is_one_line(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(ipc.listening, "_LOCK_PATIENCE", 0.1)
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(VmmError, match="locked by another process"), at_path(context, tmp_path / "s"):
        pass
    os.close(fd)


# --- who is let in -----------------------------------------------------------------------------------------------


def heard(sock: zmq.Socket[bytes], seconds: float) -> bool:
    return bool(sock.poll(int(seconds * 1000)))


@pytest.mark.root
def test_another_user_is_not_listened_to_and_not_sent_anything(context: zmq.Context[zmq.Socket[bytes]],
                                                               tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder != Path("/") and folder != Path("/tmp"):
            folder.chmod(0o711)
    path = tmp_path / "s"
    with at_path(context, path) as (sock, _):
        path.chmod(0o777)       # as if nothing but the peer's credentials were in the way
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setresuid(65534, 65534, 65534)
                other: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
                with other.socket(zmq.DEALER) as mine:
                    mine.linger = 0
                    mine.connect(f"ipc://{path}")
                    mine.send(b"let me in")
                    time.sleep(0.5)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert isinstance(sock, zmq.Socket)
        assert not heard(sock, 0.2)
    # And the other way round: a socket that belongs to somebody else gets nothing.
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.setresuid(65534, 65534, 65534)
        with socket.socket(socket.AF_UNIX) as theirs:
            theirs.bind("\0" + str(path))
            theirs.listen()
            os.write(told, b".")
            peer, _ = theirs.accept()
            peer.settimeout(5)
            with contextlib.suppress(OSError):
                while peer.recv(4096):      # ZeroMQ's greeting is no secret
                    pass
            os._exit(0)
    os.read(ready, 1)
    with pytest.raises(VmmError, match=r"another user \(uid 65534\)"):
        connect(context, parse_address(f"ipc://@{path}"), None, until=time.monotonic() + 5)
    os.waitpid(child, 0)
    os.close(ready)
    os.close(told)


def pair_of(folder: Path, own: str, peer: str) -> Keys:
    for name in (own, peer):
        with contextlib.suppress(VmmError):
            make_keys(folder, name)
    found = load_keys(str(folder / f"{own}.key_secret"), str(folder / f"{peer}.key"), LOCAL)
    assert found is not None
    return found


@pytest.mark.parametrize(("own", "peer"), [("stranger", "target"), ("source", "stranger"), (None, None)],
                         ids=["another source", "another target", "no keys"])
def test_curve_lets_the_right_key_in_and_no_other(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path,
                                                  own: str | None, peer: str | None) -> None:
    good = pair_of(tmp_path, "source", "target")
    bad = pair_of(tmp_path, own, peer) if own and peer else None
    with listening(context, ANYWHERE, pair_of(tmp_path, "target", "source")) as (at, endpoint):
        address = parse_address(endpoint)
        with pytest.raises(VmmError, match=r"rejected these keys|with the right keys" if bad else "target has keys"):
            connect(context, address, bad, until=time.monotonic() + 1.5)
        connection = connect(context, address, good, until=time.monotonic() + 10)
        connection.sock.send(b"hello")
        assert heard(at, 10)
        connection.close()


@contextlib.contextmanager
def program_that_says(banner: bytes) -> Iterator[str]:
    """And closes; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    one, _ = listener.accept()
                    with one:
                        one.sendall(banner)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("keyed", [True, False], ids=["keys", "insecure"])
@pytest.mark.parametrize(("banner", "why"), [
    (b"SSH-2.0-OpenSSH_9.2\r\n", "another program listens there, not vmm receive"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"x" * 100, "another program listens there, not vmm receive"),
    (b"", r"was broken off there \(is it vmm receive")], ids=["ssh", "http", "closes"])
def test_another_program_is_not_said_to_reject_keys(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path,
                                                    banner: bytes, why: str, keyed: bool) -> None:
    keys = pair_of(tmp_path, "source", "target") if keyed else None
    with program_that_says(banner) as at, pytest.raises(VmmError, match=why):
        connect(context, parse_address(at), keys, until=time.monotonic() + 0.5)


def test_without_its_authenticator_a_target_lets_nobody_in(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """CURVE alone lets in whoever knows the target's public key; who it is, the authenticator says."""

    class Dead:
        def __init__(self, context: object) -> None: ...
        def start(self) -> None: ...
        def configure_curve(self, **options: object) -> None: ...
        def stop(self) -> None: ...

    monkeypatch.setattr(keys_module, "ThreadAuthenticator", Dead)
    with listening(context, ANYWHERE, pair_of(tmp_path, "target", "source")) as (_, endpoint):
        address = parse_address(endpoint)
        with pytest.raises(VmmError):
            connect(context, address, pair_of(tmp_path, "source", "target"), until=time.monotonic() + 1.5)


# --- connections --------------------------------------------------------------------------------------------------


def test_nobody_there_is_said_after_a_while(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    for text in (f"ipc://{tmp_path}/s", "tcp://127.0.0.1:1"):
        with pytest.raises(Unreachable, match="no receiver is listening there"):
            connect(context, parse_address(text), None, until=time.monotonic() + 0.3)


def test_a_try_that_the_end_cuts_short_does_not_say_why(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was not is what there is to tell."""
    attempt = sockets._attempt
    tries: list[Any] = []

    def slower(*arguments: Any) -> Connection:
        tries.append(arguments)
        if len(tries) == 1:
            return attempt(*arguments)
        while time.monotonic() < until:
            time.sleep(0.01)
        return attempt(*arguments)

    monkeypatch.setattr(sockets, "_attempt", slower)
    until = time.monotonic() + 2.0
    with pytest.raises(Unreachable, match="no receiver is listening there"):
        connect(context, parse_address(f"ipc://{tmp_path}/s"), None, until=until)
    assert len(tries) == 2


def test_one_who_comes_later_is_waited_for(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    over = threading.Event()

    def later() -> None:
        with at_path(context, tmp_path / "s"):
            over.wait(20)

    thread = threading.Timer(0.5, later)
    thread.start()
    connect(context, parse_address(f"ipc://{tmp_path}/s"), None, until=time.monotonic() + 20).close()
    over.set()
    thread.join()


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_what_a_peer_said_last_is_heard_after_it_has_gone(tmp_path: Path, scheme: str) -> None:
    """Its reason for refusing, say: who listens closes right after it, and the other end looks only then."""
    text = "tcp://127.0.0.1:*" if scheme == "tcp" else f"ipc://{tmp_path}/t"
    with zmq.Context() as theirs, zmq.Context() as ours:
        with listening(theirs, parse_address(text, listen=True)) as (target, at):
            connection = connect(ours, parse_address(at), None, until=time.monotonic() + 10)
            connection.sock.send(b"hello")
            who, _ = target.recv_multipart()
            target.send_multipart([who, b"no, because"])
            target.linger = 2000
        until(lambda: connection.broken, "the target has gone")
        assert connection.sock.poll(10_000)
        assert connection.sock.recv() == b"no, because"
        connection.close()


@pytest.mark.parametrize("curve", [False, True], ids=["plain", "curve"])
@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_a_peer_that_is_cut_off_without_a_word_is_noticed(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch, scheme: str,
                                                          curve: bool) -> None:
    """A relay stands between them and forwards nothing any more, from one moment on: no FIN, no RST."""
    monkeypatch.setattr(sockets, "_HEARTBEAT_MS", 100)
    monkeypatch.setattr(sockets, "_HEARTBEAT_TIMEOUT_MS", 500)
    ours = pair_of(tmp_path, "source", "target") if curve else None
    theirs = pair_of(tmp_path, "target", "source") if curve else None
    text = "tcp://127.0.0.1:*" if scheme == "tcp" else f"ipc://{tmp_path}/t"
    with (listening(context, parse_address(text, listen=True), theirs) as (target, at),
          Relay(at, tmp_path / "relay") as relay):
        connection = connect(context, parse_address(relay.address), ours, until=time.monotonic() + 10)
        connection.sock.send(b"hello")
        who, _ = target.recv_multipart()
        assert not connection.broken
        relay.cut()
        until(lambda: connection.broken, "the source has noticed")

        def gone() -> bool:
            try:
                target.send_multipart([who, b"are you there?"])
            except zmq.ZMQError:
                return True
            return False

        until(gone, "the target has noticed")
        connection.close()
