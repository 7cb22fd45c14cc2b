"""Puts certificates where HAProxy reads them: one PEM file a certificate in a 0700 directory, and the crt-list.

The first line of the list is what a client without (or with an unknown) SNI gets: a self-signed
certificate of our own, made once a start. Refuses certificates that no TLS server could use. Private keys are
written 0600 and never logged.
"""

from __future__ import annotations

import hashlib
import logging
import os
import ssl
import subprocess
from collections.abc import Iterable
from pathlib import Path

from router.table import Certificate

log = logging.getLogger(__name__)


def write_all(directory: Path, crt_list: Path, certificates: Iterable[Certificate]) -> None:
    """Write what is missing, remove what is no longer used, and write the crt-list."""
    folder = directory / "certs"
    folder.mkdir(mode=0o700, exist_ok=True)
    default = folder / "default.pem"
    if not default.exists():
        make_self_signed(default)
    lines = [str(default)]
    used = {default}
    for certificate in certificates:
        mark = hashlib.sha256((certificate.domain + certificate.pem).encode()).hexdigest()[:24]
        path = folder / f"{mark}.pem"
        if not path.exists():
            write_private(path, certificate.pem)
        used.add(path)
        if not is_usable(path):
            log.error("the certificate of %s cannot be used: its clients get another one", certificate.domain)
            continue
        lines.append(f"{path} {certificate.domain}")
    write_private(crt_list, "\n".join(lines) + "\n")
    for stale in set(folder.glob("*.pem")) - used:
        stale.unlink()


def is_usable(path: Path) -> bool:
    """Say whether HAProxy can serve this file: one that it cannot would keep it from taking any change at all."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path)
    except (ssl.SSLError, ValueError):
        return False
    return True


def make_self_signed(path: Path) -> None:
    """Make the default certificate with openssl(1), which every image that trusts CAs has.

    In a process of its own: a Python library for it would stay in memory for one use.
    """
    key = path.with_suffix(".key")
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-days", "3650", "-subj", "/CN=no-such-app.invalid", "-keyout", str(key), "-out", "-",
    ]  # fmt: skip
    certificate = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    try:
        write_private(path, certificate + key.read_text())
    finally:
        key.unlink(missing_ok=True)


def write_private(path: Path, text: str) -> None:
    """Replace a file that only its owner may read, whole or not at all."""
    beside = path.with_name(path.name + ".new")
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    beside.replace(path)
