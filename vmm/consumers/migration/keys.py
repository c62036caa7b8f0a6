"""CURVE: keys in files, and sockets that let in only a peer that has the right one, and none when in doubt.

``vmm keys DIR NAME`` makes a pair: NAME.key to give away, NAME.key_secret to keep. Either end of a migration is
given its own secret file and the other end's public one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from ...errors import VmmError
from ...machine.names import check_key_name
from .addresses import Address

__all__ = ["Keys", "admit", "load_keys", "make_keys", "present"]

_DOMAIN = b"shardvmm"
_KEY_SIZE = 40              # characters of Z85: 32 bytes
_FILE_MAX = 65536
_LINE = re.compile(rb"""^[ \t]*(public|secret)-key[ \t]*=[ \t]*["']?([^"'\r\n]*?)["']?[ \t\r]*$""", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Keys:
    """Own pair, and the other end's public key; Z85."""

    public: bytes
    secret: bytes
    peer: bytes


def load_keys(key: str, peer: str, address: Address, *, insecure: bool = False) -> Keys | None:
    """Own secret key file, the other end's public one; None without. Raises VmmError for files that are not that,
    for one without the other, and for a tcp address without keys unless ``insecure``."""
    if bool(key) != bool(peer):
        raise VmmError("--key and --peer must be given together: this end's secret key file and the other end's "
                       "public one")
    if not key:
        if not address.local and not insecure:
            raise VmmError(f"address '{address.text}': guest memory would be sent unencrypted: give --key and "
                           "--peer (vmm keys creates them), or --insecure")
        return None
    public, secret = _load(key)
    other, _ = _load(peer)
    if secret is None:
        raise VmmError(f"{key}: contains no secret key (use the file that ends in .key_secret)")
    return Keys(public, secret, other)


def _load(path: str) -> tuple[bytes, bytes | None]:
    """(public, secret or None) of a file as ``make_keys`` writes it."""
    try:
        text = _read(path)
    except OSError as exc:
        raise VmmError(f"{path}: cannot be read as a key file: {exc.strerror}") from None
    found = {match[1]: match[2] for match in _LINE.finditer(text)}
    public, secret = found.get(b"public"), found.get(b"secret")
    if public is None:
        raise VmmError(f"{path}: is not a key file (vmm keys creates them)")
    for key in (public, secret):
        if key is not None and not _is_key(key):
            raise VmmError(f"{path}: its key is damaged: it must be {_KEY_SIZE} Z85 characters (got "
                           f"{len(key)})")
    return public, secret


def _read(path: str) -> bytes:
    """Of a regular file: one that never ends, or never begins, is not a key file. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return os.read(fd, _FILE_MAX)
    finally:
        os.close(fd)


def _is_key(key: bytes) -> bool:
    if len(key) != _KEY_SIZE:
        return False
    try:
        return len(z85.decode(key)) == 32
    except (ValueError, KeyError, OverflowError):
        return False


def present(sock: zmq.Socket[bytes], keys: Keys | None) -> None:
    """A socket that connects: prove ourselves, and hold the other end to its key."""
    if keys is not None:
        sock.curve_publickey, sock.curve_secretkey, sock.curve_serverkey = keys.public, keys.secret, keys.peer


@contextlib.contextmanager
def admit(context: zmq.Context[zmq.Socket[bytes]], sock: zmq.Socket[bytes], keys: Keys | None) -> Iterator[None]:
    """A socket that listens: let in only a peer with the secret of ``keys.peer``. Without the authenticator (it
    ended, or has not begun) none is let in: ZeroMQ is told that the domain must be asked (ZMQ_ZAP_ENFORCE_DOMAIN;
    by default it lets all in then)."""
    if keys is None:
        yield
        return
    sock.curve_publickey, sock.curve_secretkey = keys.public, keys.secret
    sock.curve_server = True
    sock.zap_domain = _DOMAIN
    sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    guard = ThreadAuthenticator(context)
    with tempfile.TemporaryDirectory(prefix="shardvmm-keys-") as folder:
        (Path(folder) / "peer.key").write_text(f'metadata\ncurve\n    public-key = "{keys.peer.decode()}"\n')
        guard.start()
        try:
            guard.configure_curve(domain=_DOMAIN.decode(), location=folder)
            yield
        finally:
            guard.stop()


def make_keys(directory: Path, name: str, *, force: bool = False) -> tuple[Path, Path]:
    """A new pair in ``directory`` (made if need be): public and secret file. Raises VmmError, also for a pair
    that already exists, unless ``force``."""
    check_key_name(name)
    public, secret = directory / f"{name}.key", directory / f"{name}.key_secret"
    there = [path for path in (public, secret) if os.path.lexists(path)]
    if there and not force:
        raise VmmError(f"{there[0]}: already exists; a new pair would lock out whoever uses the old one (--force "
                       "creates it anyway)")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Made aside, under the directory's file system, and put in their places whole.
        with tempfile.TemporaryDirectory(prefix=".keys-", dir=directory) as aside:
            made = zmq.auth.create_certificates(aside, name)
            for path, target in zip(made, (public, secret), strict=True):
                os.chmod(path, 0o600)
                if force:
                    os.replace(path, target)
                else:
                    os.link(path, target)
    except OSError as exc:
        raise VmmError(f"{directory}: keys cannot be written: {exc.strerror}") from None
    return public, secret
