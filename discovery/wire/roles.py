"""What our certificates say: whose they are, what for, and which keys of the store a job may use. One vocabulary.

A certificate's subject has a common name (a person, a host, a member, a job) and at most one organizational unit, which
is the role. `hostd.authority` writes it; `discovery.access`, `discovery.transport` and `hostd.remote` go by it; each
says itself what one without a unit may do. Strings and dictionaries only: `cryptography` is not needed.

Source: `ssl.SSLSocket.getpeercert` for the shape of a certificate that was verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote_to_bytes

CONTROLLER, HOST, READ_ONLY, JOB = "controller", "host", "read-only", "job"
ROLES = (CONTROLLER, HOST, READ_ONLY, JOB)
MEMBER = "discovery-member"
"""The unit of the members of discovery, towards each other; no role, and good for nothing else."""
GRANTS = "/discoverd/grants/"
"""Below it the store has a key for each grant that is in force, HOST/JOB; its value is the certificate's number."""
_PREFIX_URI, _GRANT_URI = "hostd:prefix:", "hostd:grant:"

Certificate = Mapping[str, Any]


def certificate_of(transport: Any) -> Certificate | None:
    """Return what the other end of a connection has shown; `None` without TLS (or without a connection)."""
    found: Certificate | None = None if transport is None else transport.get_extra_info("peercert")
    return found


def name_of(certificate: Certificate) -> str:
    """Return the common name; empty: there is not exactly one."""
    return _only(certificate, "commonName")


def units_of(certificate: Certificate) -> tuple[str, ...]:
    """Return every organizational unit; ours have one or none."""
    return tuple(str(value) for value in _subject(certificate, "organizationalUnitName"))


def unit_of(certificate: Certificate) -> str:
    """Return the organizational unit; empty: there is not exactly one."""
    return _only(certificate, "organizationalUnitName")


def prefix_uri(prefix: str) -> str:
    """Return how a certificate grants a prefix of the store's keys: as a URI among its alternative names."""
    return _PREFIX_URI + quote(prefix, safe="/")


def prefixes_of(certificate: Certificate) -> tuple[bytes, ...]:
    """Return the prefixes that a certificate grants; an empty one, which would be everything, does not count."""
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    found = (unquote_to_bytes(name.removeprefix(_PREFIX_URI)) for name in names if name.startswith(_PREFIX_URI))
    return tuple(prefix for prefix in found if prefix)


def grant_uri(host_id: str, job_id: str) -> str:
    """Return how a certificate says that it counts only while that job's grant is in force."""
    return f"{_GRANT_URI}{host_id}/{job_id}"


def grant_of(certificate: Certificate) -> tuple[bytes, bytes] | None:
    """Return the key that has to be in the store for this certificate to count, and its value; `None`: it just counts.

    One that names several grants, which ours never do, gets a key that nobody has.
    """
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    found = [name.removeprefix(_GRANT_URI) for name in names if name.startswith(_GRANT_URI)]
    if not found:
        return None
    number = str(certificate.get("serialNumber", ""))
    return (GRANTS + " ".join(found)).encode(), number.encode()


def _subject(certificate: Certificate, wanted: str) -> list[Any]:
    return [value for rdn in certificate.get("subject", ()) for name, value in rdn if name == wanted]


def _only(certificate: Certificate, wanted: str) -> str:
    found = _subject(certificate, wanted)
    return str(found[0]) if len(found) == 1 else ""
