"""The connection to a Ray cluster, and what its nodes say of themselves: by custom resources, which they are started
with (nodes.py)."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from workers.accel import registry

from ... import optional
from ...errors import VmmError

__all__ = ["HOST", "KVM", "PART", "connect"]

#: Custom resources of a node.
HOST, KVM = "host", "kvm"
#: Of a resource that is shared: more than that many do not fit on any host.
PART = 0.001
_CONNECT_TIMEOUT = 5.0  # seconds
_STORE = 100 << 20      # bytes of Ray's object store, where Ray is started here: results are small
#: Of a Ray that is started here: it says nothing to its makers, runs points at our own niceness, warns of no GPUs.
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@contextmanager
def connect(address: str, namespace: str = "") -> Iterator[Any]:
    """The module ray, connected: ``auto`` (the cluster that this host is a node of), ``HOST:PORT`` (of its head; this
    host is a node of it), or ``local`` (one that is started on this host, and ends with this). Meanwhile what is
    printed goes to standard error: Ray prints, and standard output is for what was asked for. ``namespace``: of Ray's,
    in which actors have their names. Raises VmmError."""
    ray = optional.ray()
    if address != "local":
        _check_address(_own_cluster() if address == "auto" else address)
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR",
                               "namespace": namespace or None}
    if address == "local":
        has = {HOST: 1.0} | ({} if registry.available("kvm").reason else {KVM: 1.0})
        options |= {"num_cpus": os.cpu_count(), "resources": has, "include_dashboard": False,
                    "object_store_memory": _STORE}
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with _own_signals(), redirect_stdout(sys.stderr):
            ray.init(**options)
    except (OSError, RuntimeError, ValueError, AssertionError, ray.exceptions.RayError) as exc:
        why = (str(exc).splitlines() or [type(exc).__name__])[0]
        hint = "" if address == "local" else " (one that asks for a token needs RAY_AUTH_MODE=token here)"
        raise VmmError(f"no cluster at {address}: {why}{hint}") from None
    with redirect_stdout(sys.stderr):
        try:
            yield ray
        finally:
            ray.shutdown()


def _own_cluster() -> str:
    """Its address, where Ray keeps it."""
    if (given := os.environ.get("RAY_ADDRESS", "auto")) not in ("", "auto"):
        return given
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        raise VmmError("no cluster at auto: this host is not a node of one; ray start --head starts one") from None


def _check_address(address: str) -> None:
    """Ray itself takes a minute to find that nobody answers."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and "/" not in host and port.isdecimal() and 0 < int(port) < 65536):
        raise VmmError(f"--cluster: '{address}' is not an address: auto, local, or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT).close()
    except (OSError, UnicodeError) as exc:
        why = exc.strerror or exc if isinstance(exc, OSError) else "not a valid host name"
        raise VmmError(f"no cluster at {address}: {why}; ray start --head starts one") from None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
