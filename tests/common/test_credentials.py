"""Keys derived from the cluster key, and the certificates, judged by OpenSSL; gRPC's own TLS judges in test_rpc.py."""

from __future__ import annotations

import hashlib
import hmac
import ssl
import tempfile
from datetime import UTC, datetime

from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from tandem.common.credentials import HOST_NAME, Credentials, credentials, derive

KEY = b"k" * 32


def rfc5869(key: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA-256 without salt, written down from the RFC."""
    extracted = hmac.digest(bytes(32), key, "sha256")
    output, block, counter = b"", b"", 1
    while len(output) < length:
        block = hmac.digest(extracted, block + info + bytes([counter]), "sha256")
        output, counter = output + block, counter + 1
    return output[:length]


@given(st.binary(min_size=16, max_size=64), st.text(st.characters(codec="ascii"), max_size=20), st.integers(1, 100))
def test_derive_is_hkdf_with_the_purpose_as_its_info(key: bytes, purpose: str, length: int) -> None:
    assert derive(key, purpose, length) == rfc5869(key, b"tandem.v1 " + purpose.encode(), length)


def test_keys_differ_by_purpose_and_by_cluster_key() -> None:
    keys = {derive(key, purpose) for key in (KEY, b"w" * 32) for purpose in ("tls", "registry default", "registry b")}
    assert len(keys) == 6 and KEY not in keys


def test_two_processes_make_the_same_key_but_need_not_make_the_same_bytes() -> None:
    one, other = credentials(KEY), credentials.__wrapped__(KEY)
    assert one.private_key == other.private_key
    for first, second in ((one.certificate, other.certificate), (one.authority, other.authority)):
        assert tbs(first) == tbs(second)
    assert credentials(b"w" * 32).private_key != one.private_key


def tbs(pem: bytes) -> bytes:
    """All of a certificate but its signature."""
    return x509.load_pem_x509_certificate(pem).tbs_certificate_bytes


def handshake(server: Credentials, client: Credentials) -> None:
    """In memory. Raises ssl.SSLError where OpenSSL refuses either end."""
    ends = [context(server, ssl.PROTOCOL_TLS_SERVER), context(client, ssl.PROTOCOL_TLS_CLIENT)]
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    left = ends[0].wrap_bio(there, back, server_side=True)
    right = ends[1].wrap_bio(back, there, server_hostname=HOST_NAME)
    for _ in range(4):
        for end in (right, left):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert left.getpeercert(True) and right.getpeercert(True)


def context(own: Credentials, protocol: int) -> ssl.SSLContext:
    made = ssl.SSLContext(protocol)
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(cadata=own.authority.decode())
    with tempfile.NamedTemporaryFile() as file:
        file.write(own.private_key + own.certificate)
        file.flush()
        made.load_cert_chain(file.name)
    return made


def test_openssl_accepts_holders_of_the_key_and_nobody_else() -> None:
    handshake(credentials(KEY), credentials.__wrapped__(KEY))
    for server, client in ((KEY, b"w" * 32), (b"w" * 32, KEY)):
        try:
            handshake(credentials(server), credentials(client))
        except ssl.SSLError as exc:
            assert "certificate" in str(exc).lower() or "signature" in str(exc).lower(), exc
        else:
            raise AssertionError("a foreign key was accepted")


def test_e33_no_clock_that_a_machine_can_show_makes_a_certificate_invalid() -> None:
    for pem in (credentials(KEY).certificate, credentials(KEY).authority):
        certificate = x509.load_pem_x509_certificate(pem)
        assert certificate.not_valid_before_utc == datetime.fromtimestamp(0, UTC)
        assert certificate.not_valid_after_utc.year == 9999


def test_the_certificate_tells_nothing_of_the_cluster_key() -> None:
    """Its public key is that of a derived key, not of the cluster key itself or a plain hash of it."""
    text = b"".join(credentials(KEY))
    for secret in (KEY, hashlib.sha256(KEY).digest(), derive(KEY, "tls", 48)):
        assert secret not in text and secret.hex().encode() not in text
