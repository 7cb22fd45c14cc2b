"""Makes the secrets of a new cluster: random keys, an SSH host key, a self-signed certificate with its pin."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from discovery.wire.blocking import certificate_pin

VALID_DAYS = 3650
_CN_MAX = 64


def random_key(size_bytes: int) -> dict[str, str]:
    return {"value": secrets.token_hex(size_bytes)}


def ssh_key() -> dict[str, str]:
    """Make an Ed25519 key, as OpenSSH writes it."""
    key = ed25519.Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return {"private_key": private.decode(), "public_key": public.decode()}


def tls_certificate(hosts: Sequence[str], now_s: float) -> dict[str, str]:
    """Make a self-signed P-256 certificate for `hosts`; the pin is what clients check it by."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:_CN_MAX])])
    begin = datetime.datetime.fromtimestamp(now_s, datetime.UTC) - datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return {
        "certificate": certificate.public_bytes(serialization.Encoding.PEM).decode(),
        "private_key": private.decode(),
        "pin": certificate_pin(certificate.public_bytes(serialization.Encoding.DER)),
    }
