"""Redis in a machine, its client outside: through a port of the host."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

import pytest
from debian_roots import root_of

COUNT = 10_000


@pytest.mark.kvm
def test_pipelined_commands_of_a_client_outside() -> None:
    root = root_of("redis", "redis-server", "redis-tools")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vmm", "run", "--root", str(root), "--verify", "--forward", f"{port}:6379", "--",
               "redis-server", "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert any(b"Ready to accept" in line for line in server.stdout)
            with socket.create_connection(("127.0.0.1", port), 60.0) as client:
                commands = b"".join(b"SET k%d %d\r\n" % (n, n) for n in range(COUNT)) + b"DBSIZE\r\nGET k77\r\n"
                threading.Thread(target=client.sendall, args=(commands,)).start()
                answers = client.makefile("rb")
                assert [answers.readline() for _ in range(COUNT)] == [b"+OK\r\n"] * COUNT
                assert [answers.readline() for _ in range(3)] == [b":%d\r\n" % COUNT, b"$2\r\n", b"77\r\n"]
                client.sendall(b"SHUTDOWN NOSAVE\r\n")
                assert answers.read() == b""        # in order, as the server leaves it
            server.stdout.read()
            assert server.wait(60.0) == 0
        finally:
            if server.poll() is None:
                server.terminate()
