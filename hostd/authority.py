"""The host's own certificate authority: who may reach its API over TCP, and what the host shows them.

In `state_dir/tls`: `ca.pem` and `ca.key` (made once, ten years), `server.pem` (the host's certificate and key,
made anew by itself when a third of its life is left or the host's names have changed). Client certificates are
printed and kept nowhere. Whoever holds one of this authority is root on this host; one whose organizational
unit is `read-only` may only look. There is no list of revoked ones: a fresh authority ends all of them.

A job whose spec grants prefixes of the store gets one for these (`hostd.grants`), which is printed and kept nowhere,
too; it counts as long as the store has its grant.

Called by `cli.tls`, and by the daemon as a program of its own (`python -m hostd.authority server DIR NAME…`, and
`… job DIR HOST JOB SERIAL PREFIX…`), for `cryptography` would cost it 10 MiB for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from discovery.wire import clock, roles
from discovery.wire.errors import Invalid, NotFound

AUTHORITY_DAYS, SERVER_DAYS, CLIENT_DAYS = 3650, 90, 365
_SKEW = timedelta(minutes=5)
"""Certificates count from a little earlier on, for clients whose clock is behind."""
_MEMBER_ID = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9:._@\[\]-]{0,62}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,62}")


def authority_file(folder: Path) -> Path:
    """Return where the authority's certificate is."""
    return folder / "ca.pem"


def server_file(folder: Path) -> Path:
    """Return where the host's own certificate and key are."""
    return folder / "server.pem"


def _now() -> datetime:
    return datetime.fromtimestamp(clock.now_s(), UTC)


def _write(path: Path, content: bytes) -> None:
    """Replace a file that only root may read; a reader sees the old content or the new."""
    beside = path.with_name(path.name + ".new")
    beside.unlink(missing_ok=True)
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep others out who would make an authority at the same time: the daemon and a command."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _name(common: str, unit: str = "") -> x509.Name:
    units = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit)] if unit else []
    return x509.Name([*units, x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


class Authority:
    """An authority that can certify."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.certificate = certificate
        self._key = key

    @classmethod
    def ensure(cls, folder: Path, *, is_fresh: bool = False) -> Authority:
        """Return the authority of `folder`, making it if there is none, or a new one if `is_fresh`."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(folder):
            if not is_fresh:
                with contextlib.suppress(NotFound):
                    return cls.open(folder)
            made = cls.make()
            server_file(folder).unlink(missing_ok=True)
            _write(folder / "ca.key", _pem(made._key))
            _write(authority_file(folder), made.certificate.public_bytes(Encoding.PEM))
            return made

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """Read the authority of `folder`.

        Raises:
            NotFound: there is none, or not whole.
            Invalid: its files do not parse, or do not belong together.
        """
        try:
            certificate = x509.load_pem_x509_certificate(authority_file(folder).read_bytes())
            key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
        except FileNotFoundError as error:
            raise NotFound(f"no certificate authority in {folder}", hint="hostd tls init") from error
        except ValueError as error:
            raise Invalid(f"{folder}: {error}", hint="`hostd tls init --fresh` makes a new authority") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise Invalid(f"{folder}: ca.key is not the key of ca.pem", hint="hostd tls init --fresh")
        return cls(certificate, key)

    @classmethod
    def make(cls) -> Authority:
        """Make an authority that is nowhere yet."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("hostd authority " + os.urandom(4).hex())
        builder = (
            _builder(name, name, key.public_key(), days=AUTHORITY_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(is_authority=True), critical=True)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    def server(self, names: Iterable[str], *, days: float = SERVER_DAYS, begin: datetime | None = None) -> bytes:
        """Return a certificate for these host names and addresses, and its key, as PEM."""
        wanted = [_general_name(name) for name in names]
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._leaf(key, _name("hostd"), [ExtendedKeyUsageOID.SERVER_AUTH], days, begin)
        builder = builder.add_extension(x509.SubjectAlternativeName(wanted), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM) + _pem(key)

    def client(
        self,
        name: str,
        *,
        is_read_only: bool = False,
        role: str = "",
        prefixes: Sequence[str] = (),
        days: float = CLIENT_DAYS,
        begin: datetime | None = None,
    ) -> bytes:
        """Return a client's bundle as PEM: its certificate, its key, the authority's certificate.

        `role` and a job's `prefixes` are what discovery goes by (`discovery.access`).

        Raises:
            Invalid: the name, the role or the number of days is not possible.
        """
        if role not in ("", *roles.ROLES) or (is_read_only and role not in ("", roles.READ_ONLY)):
            raise Invalid(f"role {role[:40]!r}", hint="one of " + ", ".join(roles.ROLES))
        if bool(prefixes) != (role == roles.JOB) or not all(prefixes):
            raise Invalid("a job's certificate has to name the prefixes that it grants, and no other can")
        if not _NAME.fullmatch(name):
            raise Invalid(f"name {name[:80]!r}", hint="1 to 63 letters, digits, spaces and ._@-")
        if not 0 < days <= AUTHORITY_DAYS:
            raise Invalid(f"{days:g} days", hint=f"up to {AUTHORITY_DAYS}")
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name, roles.READ_ONLY if is_read_only else role)
        builder = self._leaf(key, subject, [ExtendedKeyUsageOID.CLIENT_AUTH], days, begin)
        if prefixes:
            granted = [x509.UniformResourceIdentifier(roles.prefix_uri(prefix)) for prefix in prefixes]
            builder = builder.add_extension(x509.SubjectAlternativeName(granted), critical=False)
        made = builder.sign(self._key, hashes.SHA256())
        return made.public_bytes(Encoding.PEM) + _pem(key) + self.certificate.public_bytes(Encoding.PEM)

    def job(self, host_id: str, job_id: str, serial: int, prefixes: Sequence[str]) -> bytes:
        """Return a job's bundle, like a client's; it counts while the store has this host's grant for the job.

        It is good for as long as the authority: a running job cannot be given another, and its grant goes with it.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        uris = [*map(roles.prefix_uri, prefixes), roles.grant_uri(host_id, job_id)]
        subject, purposes = _name(job_id, roles.JOB), [ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = self._leaf(key, subject, purposes, AUTHORITY_DAYS, None, serial)
        named = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        made = builder.add_extension(named, critical=False).sign(self._key, hashes.SHA256())
        return made.public_bytes(Encoding.PEM) + _pem(key) + self.certificate.public_bytes(Encoding.PEM)

    def member(self, id: str, *, days: float = SERVER_DAYS, begin: datetime | None = None) -> bytes:
        """Return a certificate for a member of discovery, which is a server and a client, and its key, as PEM.

        Raises:
            Invalid: the id is not possible.
        """
        if not _MEMBER_ID.fullmatch(id):
            raise Invalid(f"member id {id[:80]!r}", hint="1 to 63 letters, digits and :._@[]-")
        key = ec.generate_private_key(ec.SECP256R1())
        purposes = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
        made = self._leaf(key, _name(id, roles.MEMBER), purposes, days, begin).sign(self._key, hashes.SHA256())
        return made.public_bytes(Encoding.PEM) + _pem(key)

    def _leaf(
        self,
        key: ec.EllipticCurvePrivateKey,
        subject: x509.Name,
        purposes: Iterable[x509.ObjectIdentifier],
        days: float,
        begin: datetime | None,
        serial: int = 0,
    ) -> x509.CertificateBuilder:
        own = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        last = self.certificate.not_valid_after_utc
        return (
            _builder(
                subject, self.certificate.subject, key.public_key(), days=days, begin=begin, last=last, serial=serial
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(is_authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own), critical=False)
        )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    *,
    days: float,
    begin: datetime | None = None,
    last: datetime | None = None,
    serial: int = 0,
) -> x509.CertificateBuilder:
    first = _now() - _SKEW if begin is None else begin
    end = first + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(end if last is None else min(end, last))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def ensure_server(folder: Path, names: Sequence[str]) -> bool:
    """Make sure that the host has a certificate for `names` with life in it; return whether a new one was made."""
    authority = Authority.ensure(folder)
    with _alone(folder):
        if _is_good(server_file(folder), authority, names):
            return False
        _write(server_file(folder), authority.server(names))
    return True


def _is_good(path: Path, authority: Authority, names: Sequence[str]) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        certificate.verify_directly_issued_by(authority.certificate)
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except Exception:  # noqa: BLE001 — missing, torn, or another authority's: whatever it is, make a new one
        return False
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    has_life = begin <= _now() < end - (end - begin) / 3
    return has_life and set(found) == {_general_name(name) for name in names}


def expiry(path: Path) -> datetime:
    """Return when the (first) certificate of a file ends.

    Raises:
        OSError, ValueError: there is none.
    """
    return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc


def main(arguments: Sequence[str]) -> int:
    """Make sure of the host's certificate and say so if one was made, or print a job's."""
    what, folder, *rest = arguments
    if what == "job":
        host_id, job_id, serial, *prefixes = rest
        bundle = Authority.ensure(Path(folder)).job(host_id, job_id, int(serial), prefixes)
        sys.stdout.write(bundle.decode())
    elif ensure_server(Path(folder), rest):
        sys.stdout.write("a certificate for " + ", ".join(rest) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
