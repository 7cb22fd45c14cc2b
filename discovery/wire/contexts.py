"""The TLS contexts of both ends of a mutual connection: 1.2 at least, both certified by one known authority.

Used by `hostd.remote` and by whoever speaks to it; apart from `wire.mutual`, because commands must start fast.
"""

from __future__ import annotations

import ssl
from pathlib import Path


def server_context(authority: Path, certificate: Path) -> ssl.SSLContext:
    """Return the context of a server that lets in whom `authority` has certified.

    `certificate` holds the server's own, with its key. Loading a newer one into the context
    (`load_cert_chain`) is enough to renew it: it counts from the next handshake on.

    Raises:
        OSError: a file is missing or does not parse (`ssl.SSLError` is one).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0  # nothing is resumed: a ticket would outlive the certificate's check
    context.load_verify_locations(authority)
    context.load_cert_chain(certificate)
    return context


def client_context(certificate: str, key: str, authority: str) -> ssl.SSLContext:
    """Return the context of a client; `authority` is PEM text, the other two are files (may be the same).

    Raises:
        OSError: a file is missing or does not parse.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=authority)
    context.load_cert_chain(certificate, key)
    return context
