"""Signs URLs of the blob store, so that a build job may do one thing with one blob for a while and knows no key.

Pure: the caller says what time it is. A signature covers method, path, end and size limit.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from buildpack.errors import TicketRefused


def sign(key: str, method: str, path: str, *, ends_at: int, bytes_max: int = 0) -> str:
    """Return the query string that permits `method` on `path` until `ends_at` (seconds since the epoch)."""
    signature = _signature(key, method, path, str(ends_at), str(bytes_max))
    return urlencode({"ends": ends_at, "max": bytes_max, "signature": signature})


def check(keys: Sequence[str], method: str, path: str, query: Mapping[str, str], *, now_s: float) -> int:
    """Return the ticket's size limit in bytes (0 = it sets none).

    Raises:
        TicketRefused: it is missing, changed, for something else, or over.
    """
    ends, bytes_max, given = query.get("ends", ""), query.get("max", ""), query.get("signature", "")
    is_ours = any(
        hmac.compare_digest(_signature(key, method, path, ends, bytes_max).encode(), given.encode()) for key in keys
    )
    if not is_ours or not ends.isdecimal() or not bytes_max.isdecimal():
        raise TicketRefused(f"{method} {path}: no valid ticket or key")
    if now_s > int(ends):
        raise TicketRefused(f"{method} {path}: the ticket has ended", hint="push again")
    return int(bytes_max)


def _signature(key: str, *parts: str) -> str:
    return hmac.new(key.encode(), "\n".join(parts).encode(), hashlib.sha256).hexdigest()
