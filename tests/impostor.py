"""Who pretends to belong to a cluster without its key: as a server, and as a client."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tandem.common.credentials import HOST_NAME, Credentials, credentials


def foreign_certificate(like: Credentials) -> Credentials:
    """Another key, every name as in `like`."""
    key = ec.generate_private_key(ec.SECP256R1())
    made: list[bytes] = []
    for pem in (like.certificate, like.authority):
        model = x509.load_pem_x509_certificate(pem)
        builder = x509.CertificateBuilder(model.issuer, model.subject, key.public_key(), model.serial_number)
        builder = builder.not_valid_before(datetime(2000, 1, 1, tzinfo=UTC))
        builder = builder.not_valid_after(datetime(2100, 1, 1, tzinfo=UTC))
        for extension in model.extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        made.append(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Credentials(private, *made)


def channels_without_the_key(address: str, key: bytes) -> dict[str, grpc.Channel]:
    """Every way to call without the key; `key` serves only to know the public half, which a stranger may."""
    own, wrong = credentials(key), credentials(b"w" * 32)
    twin = foreign_certificate(own)
    tls = {
        "another key": grpc.ssl_channel_credentials(wrong.authority, wrong.private_key, wrong.certificate),
        "no certificate": grpc.ssl_channel_credentials(own.authority),
        "another key's certificate": grpc.ssl_channel_credentials(own.authority, wrong.private_key, wrong.certificate),
        "the same names": grpc.ssl_channel_credentials(own.authority, twin.private_key, twin.certificate),
        "our certificate, another key": grpc.ssl_channel_credentials(own.authority, twin.private_key, own.certificate),
    }
    options = (("grpc.ssl_target_name_override", HOST_NAME),)
    secure = {name: grpc.secure_channel(address, credential, options) for name, credential in tls.items()}
    return {"plaintext": grpc.insecure_channel(address), **secure}


class Impostor:
    """A TCP server at an address where a worker is expected; records what it is sent, decrypted where it can be."""

    def __init__(self, tls: Credentials | None, directory: Path) -> None:
        self._context = None
        if tls is not None:
            pem = directory / "impostor.pem"
            pem.write_bytes(tls.private_key + tls.certificate)
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(pem)
            self._context.set_alpn_protocols(["h2"])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connections = 0
        self.received = bytearray()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            connection.settimeout(0.5)
            try:
                if self._context is not None:
                    connection = self._context.wrap_socket(connection, server_side=True)
                while data := connection.recv(65536):
                    self.received += data
            except OSError:  # ssl.SSLError and timeouts are
                pass
            finally:
                connection.close()


@contextmanager
def impostor(tls: Credentials | None, directory: Path) -> Iterator[Impostor]:
    made = Impostor(tls, directory)
    try:
        yield made
    finally:
        made.close()
