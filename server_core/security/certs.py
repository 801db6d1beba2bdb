"""The server's own CA and certificate, ECDSA P-256: made on first start, so that nobody ever runs without TLS.

ECDSA, because it halves the cost of a reconnect against RSA, and a whole fleet reconnects at once.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from outrider.errors import InvalidInput
from server_core.security.files import write_private

CA_LIFE = timedelta(days=3650)
CERT_LIFE = timedelta(days=365)
RENEW_BEFORE = timedelta(days=60)
# Clocks of nodes are not trusted: a certificate must not be "not yet valid" on one that is a little behind.
_BACKDATED = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM of a private key and of its certificate chain."""

    key: bytes
    chain: bytes


def ensure(directory: Path, names: Sequence[str], *, now: datetime | None = None) -> Certificate:
    """The server certificate in ``directory``, made or renewed where needed, and the CA that signs it.

    It is renewed when it ends within 60 days, lacks one of ``names`` (host names or IP addresses), or was
    signed by another CA. Agents trust the CA, so a renewal needs nothing of them.
    """
    moment = now or datetime.now(UTC)
    ca_key, ca = _ensure_ca(directory, moment)
    key_file, cert_file = directory / "server.key", directory / "server.pem"
    wanted = [*dict.fromkeys(["localhost", "127.0.0.1", "::1", *_own_names(), *names])]
    if not (key_file.exists() and cert_file.exists() and _still_good(cert_file, ca, wanted, moment)):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _sign_server(key, wanted, ca_key, ca, moment)
        # The key first: a crash between the two leaves a pair that doesn't match, which `_still_good` sees.
        write_private(key_file, _key_pem(key))
        write_private(cert_file, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return Certificate(key_file.read_bytes(), cert_file.read_bytes())


def read(cert_file: Path, key_file: Path) -> Certificate:
    """An operator's own certificate. Raises InvalidInput if a file can't be read or the two don't belong together."""
    try:
        chain, key_pem = cert_file.read_bytes(), key_file.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{error.filename} can't be read: {error.strerror}", code="tls_file_unreadable") from error
    try:
        certificate = x509.load_pem_x509_certificate(chain)
        key = serialization.load_pem_private_key(key_pem, None)
    except (ValueError, TypeError) as error:
        raise InvalidInput(
            f"{cert_file} and {key_file} must be a PEM certificate and its unencrypted PEM key: {error}",
            code="tls_file_invalid",
        ) from error
    if certificate.public_key() != key.public_key():
        raise InvalidInput(f"the key {key_file} is not that of the certificate {cert_file}", code="tls_pair_mismatch")
    return Certificate(key_pem, chain)


def expires_at(chain: bytes) -> datetime:
    """When the first certificate of a PEM chain ends."""
    return x509.load_pem_x509_certificate(chain).not_valid_after_utc


def _ensure_ca(directory: Path, now: datetime) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key_file, ca_file = directory / "ca.key", directory / "ca.pem"
    if not (key_file.exists() and ca_file.exists()):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Outrider"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"Outrider CA of {socket.gethostname()}"[:64]),
            ]
        )
        ca = (
            _builder(name, name, key.public_key(), now, CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        write_private(key_file, _key_pem(key))
        write_private(ca_file, ca.public_bytes(serialization.Encoding.PEM), mode=0o644)
    try:
        loaded = serialization.load_pem_private_key(key_file.read_bytes(), None)
        ca = x509.load_pem_x509_certificate(ca_file.read_bytes())
    except (ValueError, TypeError) as error:
        raise InvalidInput(
            f"the CA in {directory} can't be read: {error}",
            code="ca_damaged",
            hint="restore ca.key and ca.pem from a backup; with a new CA every agent needs the new ca.pem",
        ) from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != ca.public_key():
        raise InvalidInput(f"{key_file} is not the key of {ca_file}", code="ca_damaged")
    return loaded, ca


def _still_good(cert_file: Path, ca: x509.Certificate, names: Sequence[str], now: datetime) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(cert_file.read_bytes())
        key = serialization.load_pem_private_key(cert_file.with_suffix(".key").read_bytes(), None)
        certificate.verify_directly_issued_by(ca)
        listed = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except Exception:  # whatever is wrong with it, a new one is made
        return False
    have = {str(name.value) for name in listed}
    ours = key.public_key() == certificate.public_key()
    return ours and have >= set(names) and certificate.not_valid_after_utc - now > RENEW_BEFORE


def _sign_server(
    key: ec.EllipticCurvePrivateKey,
    names: Sequence[str],
    ca_key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    now: datetime,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Outrider server")])
    ca_id = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        _builder(subject, ca.subject, key.public_key(), now, CERT_LIFE)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + life)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise InvalidInput(f"{name!r} can't stand in a certificate: {error}", code="bad_name") from error


def _own_names() -> list[str]:
    # Not getfqdn(): it asks the DNS, which can take many seconds to say that it does not know.
    name = socket.gethostname()
    return [name] if name and name.isascii() and len(name) <= 253 else []


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
