"""Ports of the host that lead into a machine: ``vmm run --forward``, ``vmm forward``, a configuration's ``forward``."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from command import vmm
from machines import until

from vmm.client.machine import Machine, list_machines
from vmm.errors import ExitCode
from vmm.machine.forwards import Forward, parse_forward
from vmm.machine.runtime import machine_dir

WAIT = 60.0     # seconds
PORT = 7        # of the server in the machine

#: Sends back what it gets. A connection that begins with "!" is kept, and its server says nothing.
SERVER = r"""
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

static void *serve(void *argument)
{
    int fd = (int)(long)argument;
    static _Thread_local char data[1 << 16];
    long count, at, sent, first = 1;
    for (; (count = read(fd, data, sizeof data)) > 0 && !(first && data[0] == '!'); first = 0)
        for (at = 0; at < count; at += sent)
            if ((sent = write(fd, data + at, count - at)) < 0)
                goto end;
    while (count > 0)
        pause();
end:
    close(fd);
    return 0;
}

int main(void)
{
    struct sockaddr_in address = {AF_INET, htons(7)};
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    pthread_t thread;
    signal(SIGPIPE, SIG_IGN);
    bind(listener, (struct sockaddr *)&address, sizeof address);
    listen(listener, 64);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int fd = accept(listener, 0, 0);
        pthread_create(&thread, 0, serve, (void *)(long)fd);
        pthread_detach(thread);
    }
}
"""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    folder = tmp_path_factory.mktemp("server")
    (folder / "echo.c").write_text(SERVER)
    subprocess.run(["gcc", "-O1", "-static", "-pthread", "-o", folder / "echo", folder / "echo.c"], check=True,
                   timeout=WAIT)
    return folder / "echo"


@pytest.fixture
def port() -> int:
    """That nobody has just now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        number: int = found.getsockname()[1]
        return number


@contextmanager
def started(*arguments: str, ready: bytes, stream: str = "stdout") -> Iterator[subprocess.Popen[bytes]]:
    """A command that has said so."""
    with subprocess.Popen([sys.executable, "-m", "vmm", *arguments], **{stream: subprocess.PIPE}) as process:
        try:
            said = process.stdout or process.stderr
            assert said is not None
            assert ready in said.readline()
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(WAIT)


@contextmanager
def served(server: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    with started("run", "--name", "served", "--threads", "24", *options, "--", str(server), ready=b"ready") as process:
        yield process


@contextmanager
def forwarded(*ports: str) -> Iterator[subprocess.Popen[bytes]]:
    with started("forward", "served", *ports, ready=b"leads to", stream="stderr") as process:
        yield process


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), WAIT) as found:
        yield found


def echoed(port: int, data: bytes) -> bytes:
    """What comes back, from a server that ends when it has had all of it."""
    with connected(port) as client:
        def send() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        found = bytearray()
        while part := client.recv(1 << 16):
            found += part
        sender.join()
    return bytes(found)


def is_reset(client: socket.socket) -> bool:
    try:
        return client.recv(1) is None
    except ConnectionResetError:
        return True


# --- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [
    ("80", ("127.0.0.1", 80, 80)), ("8080:80", ("127.0.0.1", 8080, 80)), ("0.0.0.0:80", ("0.0.0.0", 80, 80)),
    ("localhost:8080:80", ("localhost", 8080, 80)), ("[::1]:8080:80", ("::1", 8080, 80))])
def test_how_a_port_is_written(text: str, expected: tuple[str, int, int]) -> None:
    assert parse_forward(text) == Forward(text, *expected)


@pytest.mark.parametrize("text", ["", "x", "0", "70000", "80:", "80:0", "1:2:3:4", ":80", "::1:80", "80:x", "8 0"])
def test_what_is_no_port(text: str) -> None:
    with pytest.raises(ValueError, match=r"\[ADDRESS:\]PORT|from 1 to 65535"):
        parse_forward(text)


def test_no_machine() -> None:
    assert vmm("forward", "nobody", "80").returncode == ExitCode.NO_MACHINE


# --- machines -------------------------------------------------------------------------------------------------------


@pytest.mark.kvm
def test_many_connections_with_much_both_ways(server: Path, port: int) -> None:
    data = [b"x" + random.Random(number).randbytes(10 << 20) for number in range(20)]
    with served(server, "--forward", f"{port}:{PORT}"), ThreadPoolExecutor(20) as pool, connected(port) as silent:
        silent.sendall(b"!")        # it neither reads nor is read from
        silent.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                silent.send(bytes(1 << 16))
        for sent, found in zip(data, pool.map(lambda each: echoed(port, each), data), strict=True):
            assert hashlib.sha256(sent).digest() == hashlib.sha256(found).digest()
    assert list_machines() == []
    assert not machine_dir("served").exists()


@pytest.mark.kvm
def test_refused_in_use_and_ended(server: Path, port: int) -> None:
    """Nobody listens inside; somebody does outside; the machine ends."""
    with served(server), forwarded(f"{port}:{PORT + 1}") as other:
        with contextlib.suppress(ConnectionResetError), connected(port) as client:      # it may come as early as that
            assert is_reset(client)
        second = vmm("forward", "served", f"{port}:{PORT}")
        assert (second.returncode, second.stderr) == (
            ExitCode.BAD_INPUT, f"vmm: error: {port}:{PORT}: 127.0.0.1:{port} is in use on this host\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            number = free.getsockname()[1]
        second = vmm("forward", "served", str(number))
        assert second.returncode == ExitCode.BAD_INPUT
        assert "another process forwards ports" in second.stderr
        assert len(second.stderr.splitlines()) == 1
        second = vmm("run", "--forward", str(port), "--", str(server))
        assert (second.returncode, second.stderr) == (
            ExitCode.BAD_INPUT, f"vmm: error: --forward: {port}: 127.0.0.1:{port} is in use on this host\n")
        assert vmm("stop", "served").returncode == 0
        assert other.wait(WAIT) == 0
    assert not machine_dir("served").exists()


@pytest.mark.kvm
def test_a_forwarder_is_killed_and_there_is_another(server: Path, port: int) -> None:
    with served(server):
        with forwarded(f"{port}:{PORT}") as process, connected(port) as client:
            client.sendall(b"x" * (4 << 20))
            assert client.recv(1) == b"x"
            process.send_signal(signal.SIGKILL)
            process.wait(WAIT)
        with forwarded(f"{port}:{PORT}") as process:
            assert echoed(port, b"again") == b"again"
            with connected(port) as client:
                client.sendall(b"y")
                assert client.recv(1) == b"y"
                process.send_signal(signal.SIGINT)
                assert process.wait(WAIT) == 128 + signal.SIGINT
                assert is_reset(client)


@pytest.mark.kvm
def test_while_the_machine_is_paused_bytes_wait(server: Path, port: int) -> None:
    with served(server, "--forward", f"{port}:{PORT}"), Machine.attach("served") as machine:
        assert echoed(port, b"before") == b"before"
        machine.pause()
        with connected(port) as client:
            client.sendall(b"z")
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.recv(1)
            machine.resume()
            client.settimeout(WAIT)
            assert client.recv(1) == b"z"
            machine.stop()
            assert is_reset(client)


@pytest.mark.kvm
def test_in_a_configuration(server: Path, port: int, tmp_path: Path) -> None:
    config = tmp_path / "served.yaml"
    config.write_text(f"""name: served
memory: [{{slot: 0, size: 64MiB}}]
guest: {{program: {server}, files: {{{server}: {server}}}, threads: 4, forward: ["{port}:{PORT}"]}}
""")
    with started("launch", str(config), ready=b"ready"):
        assert echoed(port, b"configured") == b"configured"
    done = vmm("launch", str(config), "--detach")
    assert done.returncode == 0
    assert f"vmm forward served {port}:{PORT}" in done.stderr
    assert vmm("stop", "served").returncode == 0
    config.write_text(config.read_text().replace(f'"{port}:{PORT}"', "443:22"))
    assert "in quotation marks" in vmm("launch", str(config)).stderr


@pytest.mark.kvm
def test_a_client_that_leaves_at_once_leaves_nothing(server: Path, port: int) -> None:
    with served(server, "--forward", f"{port}:{PORT}"):
        for _ in range(50):
            with connected(port) as client:
                client.sendall(b"1")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert echoed(port, b"still") == b"still"
        with Machine.attach("served") as machine:
            until(lambda: len(machine.program_maps()["processes"][0]["threads"]) == 1, "threads have ended")
