"""Sockets that listen at a path. What becomes of what is there already: tests/consumers/test_migration_sockets.py."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from pathlib import Path

import pytest

from ipc import listening
from ipc.listening import InTheWay, UnixListener, listen_tcp


def connected(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10.0)
    client.connect(str(path))
    return client


def test_a_listener_that_lets_nobody_in_is_seen_at_once(tmp_path: Path) -> None:
    """connect(2) would wait until it does."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other, contextlib.ExitStack() as stack:
        other.bind(str(path))
        other.listen(0)
        stack.enter_context(connected(path))        # its backlog is full now
        refused: list[InTheWay] = []

        def listen() -> None:
            with pytest.raises(InTheWay, match="another program is already listening there") as found:
                UnixListener(path, 1)
            refused.append(found.value)

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        thread.join(10.0)
        assert refused
    assert path.is_socket()


def test_who_has_left_it_to_another_removes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = UnixListener(path, 1)
    second = UnixListener(path, 1, inherited=os.dup(first.socket.fileno()))
    first.leave()
    first.close()
    with connected(path):
        pass
    second.close()
    second.close()
    assert not path.exists()


def test_the_file_of_a_third_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = UnixListener(path, 1)
    path.unlink()
    third = UnixListener(path, 1)
    first.close()
    with connected(path):
        pass
    third.close()


@pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_every_address_of_a_host_without_ipv6_is_ipv4(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(socket.socket):
        """Of a kernel that has no IPv6, or has it switched off."""

        def __init__(self, family: int = -1, *more: int, **options: object) -> None:
            if family == socket.AF_INET6 and code == errno.EAFNOSUPPORT:
                raise OSError(code, "")
            super().__init__(socket.AF_INET, *more)

        def bind(self, where: tuple[str, int]) -> None:
            if where[0] == "::":
                raise OSError(code, "")
            super().bind(where)

        def setsockopt(self, level: int, *option: int) -> None:
            if level != socket.IPPROTO_IPV6:
                super().setsockopt(level, *option)

    monkeypatch.setattr(listening.socket, "socket", Old)
    with listen_tcp(None, 0, 1) as found:
        assert found.getsockname()[0] == "0.0.0.0"
