"""Tells callers of the controller's API apart: HTTP Basic, where the password is one of the cluster's keys.

Several keys are valid at once, so that one can be replaced without a gap. The comparison takes the
same time wherever a wrong key differs. Refuses everything else with `Unauthorized`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

from aiohttp import web

from discovery.wire.errors import Invalid, Unauthorized

KEY_LENGTH_MIN = 16


def parse_keys(text: str) -> tuple[str, ...]:
    """Read a comma list of keys.

    Raises:
        Invalid: there is none, or one is short enough to guess.
    """
    found = tuple(key for key in (part.strip() for part in text.split(",")) if key)
    if not found or any(len(key) < KEY_LENGTH_MIN for key in found):
        raise Invalid("CONTROLLER_KEY is missing or too short", hint=f"one or more keys of {KEY_LENGTH_MIN}+ letters")
    return found


def identity(key: str) -> str:
    """Name a key for the log without telling it."""
    return "key-" + hashlib.sha256(key.encode()).hexdigest()[:8]


def password_of(header: str) -> str | None:
    """Return the password of an `Authorization: Basic` header, or `None` if it is none."""
    scheme, _, rest = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        decoded = base64.b64decode(rest.strip(), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
    return decoded.partition(":")[2] if ":" in decoded else None


class Doorkeeper:
    """Lets holders of a key in; given to `wire.serve.application`."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def identify(self, header: str) -> str:
        """Return who sends this `Authorization` header.

        Raises:
            Unauthorized: nobody that we know.
        """
        given = (password_of(header) or "").encode()
        # every key is compared, so that timing does not tell which one came close
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        if not given or not any(matches):
            raise Unauthorized(
                "the controller does not know this key",
                hint="send the key as the password of HTTP Basic auth; flynn cluster add … takes it from bootstrap",
            )
        return identity(given.decode())

    async def __call__(self, request: web.Request) -> str:
        return self.identify(request.headers.get("Authorization", ""))
