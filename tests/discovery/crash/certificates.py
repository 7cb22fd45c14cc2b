"""Certificates of members in a folder: made by the same authority as on a real node."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from hostd.authority import Authority


def certify(folder: Path, members: Iterable[str]) -> Authority:
    """Make a new authority; leave its `ca.pem` and each member's `ID.pem` (with the key in it) in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = Authority.make()
    (folder / "ca.pem").write_bytes(authority.certificate.public_bytes(Encoding.PEM))
    for member in members:
        file = folder / f"{member}.pem"
        file.touch(mode=0o600)
        file.write_bytes(authority.member(member))
    return authority
