"""Keeps who we are at which registry, and reads what a registry asks for.

The file has the shape of Docker's `config.json` (`auths`, name and password in base64) and belongs to root alone: one
that others could read is refused. Secrets are in no `repr`, no argument list and no error. Called by
`rootfs.registry` and the command.

Source: RFC 9110, 11.6.1; distribution `token.md`.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from rootfs.errors import AccessDenied, NameInvalid

_PARAMETER = re.compile(r'([a-zA-Z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))\s*(?:,|$)\s*')
_CHALLENGE_BYTES_MAX = 8192


@dataclass(frozen=True)
class Credentials:
    """A name and its password."""

    user: str
    password: str = field(repr=False)

    def basic(self) -> str:
        """Return them as the value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class CredentialsFile:
    """The file on this host. Not there means: nobody anywhere."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, registry: str) -> Credentials | None:
        """Return who we are there.

        Raises:
            AccessDenied: others than us may read the file, or it is broken.
        """
        entry = self._read().get(registry)
        if entry is None:
            return None
        try:
            user, _, password = base64.b64decode(entry["auth"], validate=True).decode().partition(":")
        except (KeyError, TypeError, binascii.Error, UnicodeDecodeError):
            raise AccessDenied(f"{self.path} is broken at {registry}", hint="hostd image login makes it anew") from None
        return Credentials(user, password)

    def set(self, registry: str, credentials: Credentials) -> None:
        """Remember who we are there."""
        if ":" in credentials.user or not credentials.user:
            raise NameInvalid(f"user {credentials.user[:40]!r}", hint="not empty, without a colon")
        auths = self._read()
        auths[registry] = {"auth": credentials.basic().removeprefix("Basic ")}
        self._write(auths)

    def remove(self, registry: str) -> bool:
        """Forget who we are there; False if nobody was known."""
        auths = self._read()
        if auths.pop(registry, None) is None:
            return False
        self._write(auths)
        return True

    def _read(self) -> dict[str, Any]:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return {}
        with os.fdopen(fd, "rb") as file:
            found = os.fstat(fd)
            if found.st_uid not in (0, os.geteuid()) or stat.S_IMODE(found.st_mode) & 0o077:
                raise AccessDenied(f"{self.path} can be read by others", hint=f"chmod 600 {self.path}")
            content = file.read(1 << 20)
        try:
            auths = msgspec.json.decode(content, type=dict[str, Any]).get("auths")
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise AccessDenied(f"{self.path} is broken", hint="remove it, then hostd image login") from None
        return auths if isinstance(auths, dict) else {}

    def _write(self, auths: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".", delete=False) as file:  # 0600 from the start
            try:
                file.write(msgspec.json.encode({"auths": auths}))
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(self.path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


def challenge_of(header: str) -> tuple[str, dict[str, str]]:
    """Read a WWW-Authenticate header: the scheme in lower case, and its parameters.

    Only the first challenge counts; of one that cannot be read there are no parameters.
    """
    scheme, _, rest = header[:_CHALLENGE_BYTES_MAX].strip().partition(" ")
    found: dict[str, str] = {}
    at = 0
    rest = rest.strip()
    while match := _PARAMETER.match(rest, at):
        found.setdefault(match[1].lower(), match[3] or re.sub(r"\\(.)", r"\1", match[2] or ""))
        at = match.end()
    return scheme.lower(), found
