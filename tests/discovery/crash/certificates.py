"""Certificates for members, for clients and for strangers of every kind: made with `cryptography`, kept in a folder."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

MEMBER = "discovery-member"
"""The organizational unit of who may take part in the consensus."""


class Authority:
    """A certificate authority in a folder: `ca.pem`, and for each name `NAME.pem` and `NAME.key`."""

    def __init__(self, folder: Path, name: str = "crash test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        certificate = (
            _builder(self._name, self._name, self._key.public_key(), timedelta(days=-1), timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))

    @property
    def certificate(self) -> Path:
        return self._folder / "ca.pem"

    def pair(self, name: str) -> tuple[Path, Path]:
        """Return where a name's certificate and key are."""
        return self._folder / f"{name}.pem", self._folder / f"{name}.key"

    def issue(self, name: str, unit: str = MEMBER, *, common: str = "", is_expired: bool = False) -> tuple[Path, Path]:
        """Make a certificate of a common name (default: `name`) and a unit, for both ends of a connection."""
        key = ec.generate_private_key(ec.SECP256R1())
        end = timedelta(hours=-1) if is_expired else timedelta(days=1)
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
        made = (
            _builder(_name(common or name, unit), self._name, key.public_key(), timedelta(days=-1), end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(common or name)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        certificate_file, key_file = self.pair(name)
        certificate_file.write_bytes(made.public_bytes(Encoding.PEM))
        key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        key_file.chmod(0o600)
        return certificate_file, key_file


def _name(common: str, unit: str = "") -> x509.Name:
    units = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit)] if unit else []
    return x509.Name([*units, x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: timedelta, end: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + start)
        .not_valid_after(now + end)
    )
