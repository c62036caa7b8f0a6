"""TLS 1.3 for the connections of pages, where the control connection has keys.

The control connection is ZeroMQ's CURVE: each end knows the other's key, and nobody else can read or change what is
said. So it carries what makes the others as safe: the target's certificate, made for this one migration and sent with
``accept``, which the source takes and no other; and the token of the offer, which the source says first. Whoever has
neither gets no page, and brings none.
"""

from __future__ import annotations

import datetime
import ssl
import tempfile
from pathlib import Path

from ...optional import cryptography

__all__ = ["Certificate", "client"]

_NAME = "shardvmm"
#: Long enough for hosts whose clocks differ: it is the certificate itself that is known, not its dates.
_FROM, _UNTIL = datetime.datetime(2000, 1, 1), datetime.datetime(2100, 1, 1)


class Certificate:
    """The target's, of one migration. ``der`` is what the source is told; ``context`` for its connections."""

    def __init__(self) -> None:
        """Raises MissingPackage."""
        x509 = cryptography("x509")
        serialization = cryptography("hazmat.primitives.serialization")
        key = cryptography("hazmat.primitives.asymmetric.ec").generate_private_key(
            cryptography("hazmat.primitives.asymmetric.ec").SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _NAME)])
        made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
                .serial_number(x509.random_serial_number()).not_valid_before(_FROM).not_valid_after(_UNTIL)
                .sign(key, cryptography("hazmat.primitives.hashes").SHA256()))
        self.der: bytes = made.public_bytes(serialization.Encoding.DER)
        pem = (made.public_bytes(serialization.Encoding.PEM)
               + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                   serialization.NoEncryption()))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.num_tickets = 0        # no connection is resumed
        with tempfile.TemporaryDirectory(prefix="shardvmm-tls-") as folder:     # the library reads files only
            path = Path(folder) / "certificate.pem"
            path.touch(0o600)
            path.write_bytes(pem)
            self.context.load_cert_chain(path)


def client(certificate: bytes) -> ssl.SSLContext:
    """For the source's connections, to whoever has this certificate (DER) and no other. Raises ssl.SSLError for what
    is none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False      # not whose it is, but which
    context.load_verify_locations(cadata=certificate)
    return context
