"""What follows from the cluster key: a key for every purpose, and the certificate that proves who holds it.

Nobody manages certificates. Every process derives one and the same P-256 key from the cluster key, makes it the key
of a certificate authority, which is the only one it trusts, and of a certificate that this authority has signed. So
whoever completes a TLS handshake, as client or server, holds the cluster key. The session keys are ephemeral: the
cluster key decrypts nothing that was recorded.
"""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import NameOID

HOST_NAME = "worker.tandem"  # in every certificate: what proves a peer is its key, not its address
_AUTHORITY = "Tandem cluster"
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_ALWAYS = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)  # a wrong clock locks nobody out


class Credentials(NamedTuple):
    """PEM. The signatures differ from process to process; the keys and names, which decide, do not."""

    private_key: bytes
    certificate: bytes
    authority: bytes  # the certificate that a peer's must be signed by


def derive(cluster_key: bytes, purpose: str, length: int = 32) -> bytes:
    """A key of `length` bytes for one purpose (HKDF-SHA-256, RFC 5869): of use for no other."""
    return HKDF(hashes.SHA256(), length, salt=None, info=f"tandem.v1 {purpose}".encode()).derive(cluster_key)


@functools.lru_cache(maxsize=8)
def credentials(cluster_key: bytes) -> Credentials:
    # 16 bytes more than the order has, so that the remainder is uniform (FIPS 186-5, A.2.1).
    secret = int.from_bytes(derive(cluster_key, "tls", 48)) % (_P256_ORDER - 1) + 1
    key = ec.derive_private_key(secret, ec.SECP256R1())
    pem = serialization.Encoding.PEM
    return Credentials(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        _certificate(key, HOST_NAME).public_bytes(pem),
        _certificate(key, _AUTHORITY).public_bytes(pem),
    )


def _certificate(key: ec.EllipticCurvePrivateKey, subject: str) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(_AUTHORITY))
        .public_key(key.public_key())
        .serial_number(1 if subject == _AUTHORITY else 2)
        .not_valid_before(_ALWAYS[0])
        .not_valid_after(_ALWAYS[1])
        .add_extension(x509.BasicConstraints(ca=subject == _AUTHORITY, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST_NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
